from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.choice import draw_tokens
from penstock.data_pipeline.random_ltd.layer_inputs import KeptTokens
from penstock.data_pipeline.random_ltd.layer_rule import LayerRule

B, S, D = 2, 6, 3
INDICES = torch.tensor([[0, 2, 5], [1, 2, 3]], dtype=torch.int32)


@dataclass(slots=True)
class Slotted:
    lengths: torch.Tensor | None


class Layer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states


def kept(batch_first=True, indices=INDICES, length=S, width=D, **declared):
    rule = LayerRule.of(Layer(), declared, batch_first=batch_first)
    return KeptTokens(indices, length, width, rule)


def rows_of(tensor, indices=INDICES):
    """[B, S, ...] gathered by plain indexing."""
    return torch.stack([tensor[row, at.long()] for row, at in enumerate(indices)])


def mask_of(mask, indices=INDICES):
    """[B, ..., S, S] gathered by plain indexing."""
    return torch.stack([mask[row][..., at, :][..., at] for row, at in enumerate(indices.long())])


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "document_ids", "unknown"])
def test_ids_per_token_are_gathered(name):
    ids = torch.arange(B * S).reshape(B, S)
    assert torch.equal(kept().inputs(name, ids), rows_of(ids))
    assert torch.equal(kept(batch_first=False).inputs(name, ids), rows_of(ids))
    assert torch.equal(kept().inputs(name, ids[:1]), rows_of(ids[:1].expand(B, S)))


def test_vectors_per_token_are_gathered():
    vectors = torch.randn(B, S, D)
    assert torch.equal(kept().inputs("extra", vectors), rows_of(vectors))
    assert torch.equal(kept().inputs("extra", vectors[:1]), rows_of(vectors[:1].expand(B, S, D)))
    first = vectors.transpose(0, 1)
    assert torch.equal(kept(batch_first=False).inputs("extra", first), rows_of(vectors).transpose(0, 1))
    one = rows_of(vectors[:1].expand(B, S, D)).transpose(0, 1)
    assert torch.equal(kept(batch_first=False).inputs("extra", first[:, :1]), one)


def test_position_ids_of_every_shape():
    ids = torch.arange(100, 100 + S)
    assert torch.equal(kept().inputs("position_ids", ids), ids[INDICES.long()])
    three = torch.randn(3, B, S)
    expected = torch.stack([rows_of(one) for one in three])
    assert torch.equal(kept().inputs("position_ids", three), expected)
    assert torch.equal(kept(batch_first=False).inputs("position_ids", three[0].T), rows_of(three[0]).T)


@pytest.mark.parametrize(
    "shape",
    [
        (S, 4), (S, 1, 4), (B, S, 4), (1, S, 4), (B, S, 1, 4), (1, S, 1, 4),
        (B, 5, S, 4), (B, 1, S, 4), (1, 1, S, 4), (3, B, S, 4),
    ],
)  # fmt: skip
def test_rotary_angles_of_every_shape(shape):
    cos, sin = torch.randn(shape), torch.randn(shape)
    out = kept().inputs("position_embeddings", (cos, sin))
    for ours, given in zip(out, (cos, sin), strict=True):
        dim = shape.index(S)
        batched = given if B in shape[:dim] or shape[0] == 1 else given[None]
        expected = batched.expand([B if i == 0 and n == 1 else n for i, n in enumerate(batched.shape)])
        rows = expected.shape.index(B)
        tokens = expected.shape.index(S)
        moved = rows_of(expected.movedim((rows, tokens), (0, 1))).movedim((0, 1), (rows, tokens))
        assert torch.equal(ours, moved)


def test_rotary_angles_beside_one_row():
    cos = torch.randn(1, 1, S, 4)
    assert torch.equal(kept(indices=INDICES[:1]).inputs("cos", cos), cos[:, :, INDICES[0].long()])


def test_sequence_first_rotary_angles():
    freqs = torch.randn(S, 1, 1, 4)
    out = kept(batch_first=False).inputs("rotary_pos_emb", freqs)
    assert torch.equal(out, freqs[:, 0][INDICES.T.long()])


def test_nests_are_gathered_inside():
    ids = torch.arange(B * S).reshape(B, S)
    out = kept().inputs("more", {"a": (ids, [ids, None]), "n": 3, "name": "x"})
    assert torch.equal(out["a"][0], rows_of(ids))
    assert torch.equal(out["a"][1][0], rows_of(ids))
    assert out["a"][1][1] is None
    assert (out["n"], out["name"]) == (3, "x")


@pytest.mark.parametrize("shape", [(B, 1, S, S), (1, 1, S, S), (B, 4, 1, S), (1, 4, S, S)])
@pytest.mark.parametrize("name", ["attention_mask", "unknown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_attention_masks_of_four_dimensions_are_gathered_on_both(shape, name, dtype):
    mask = torch.randn(shape) > 0 if dtype == torch.bool else torch.randn(shape)
    out = kept().inputs(name, mask)
    assert out.dtype == dtype
    full = mask.expand(B, *shape[1:])
    for row, at in enumerate(INDICES.long()):
        expected = full[row] if shape[2] == 1 else full[row][:, at]
        assert torch.equal(out[row], expected[:, :, at])


def test_masks_of_fewer_dimensions():
    mask = torch.randn(B, S, S)
    assert torch.equal(kept().inputs("attention_mask", mask), mask_of(mask))
    padding = torch.rand(B, S) > 0.5
    for name in ("attention_mask", "src_key_padding_mask", "protected_tokens"):
        assert torch.equal(kept().inputs(name, padding), rows_of(padding))
        assert torch.equal(kept(batch_first=False).inputs(name, padding), rows_of(padding))
    assert kept().inputs("attention_mask", None) is None


def test_a_bias_for_each_head_gets_rows():
    bias = torch.randn(4, S, S)
    assert torch.equal(kept(bias="_ S S").inputs("bias", bias), mask_of(bias.expand(B, 4, S, S)))
    by_batch = torch.randn(4, B, S, S)
    assert torch.equal(kept(bias="_ B Q S").inputs("bias", by_batch), mask_of(by_batch.transpose(0, 1)).transpose(0, 1))


def test_a_causal_mask_for_all_rows_stays_one():
    causal = torch.full((S, S), float("-inf")).triu(1)
    for name in ("attention_mask", "unknown"):
        assert torch.equal(kept().inputs(name, causal), causal[:3, :3])


@pytest.mark.parametrize("shape", [(S, S), (1, 1, S, S), (B, 4, S, S)])
def test_a_mask_declared_causal_is_cut_and_not_gathered(shape):
    causal = torch.ones(shape, dtype=torch.bool).tril()
    out = kept(attention_mask="causal").inputs("attention_mask", causal)
    assert out.shape == (*shape[:-2], 3, 3)
    assert out.data_ptr() == causal.data_ptr()
    assert torch.equal(out, causal[..., :3, :3])


def test_documents_packed_in_a_row_stay_apart():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(S, S, dtype=torch.bool).tril()
    out = kept().inputs("attention_mask", mask)
    for row, at in enumerate(INDICES.tolist()):
        for q, token in enumerate(at):
            for k, other in enumerate(at):
                same = documents[row, token] == documents[row, other]
                assert out[row, 0, q, k] == (same and other <= token)


def test_offsets_of_packed_documents_are_counted_among_the_kept_tokens():
    tokens = kept(indices=torch.tensor([[1, 2, 5, 8]]), length=10)
    for dtype in (torch.int32, torch.int64):
        # Documents of tokens 0-2, 3-4 (nothing kept), 5-8, 9.
        out = tokens.inputs("cu_seq_lens_q", torch.tensor([0, 3, 5, 9, 10], dtype=dtype))
        assert out.tolist() == [0, 2, 2, 4, 4]
        assert out.dtype == dtype
    assert tokens.inputs("max_length_q", 4) == 4
    with pytest.raises(ValueError, match="pack the documents into one row"):
        kept().inputs("cu_seq_lens_q", torch.tensor([0, 6]))


@pytest.mark.parametrize("rows", [None, 1, B])
def test_block_masks_are_made_anew_over_the_kept_tokens(rows):
    length = 300
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(length, generator=generator)[:170].sort().values for _ in range(B)]).int()
    documents = torch.randint(0, 3, (rows or 1, length), generator=generator).sort(1).values

    def packed(b, h, q, kv):
        return (q >= kv) & (documents[b, q] == documents[b, kv]) & ((q + h) % 7 != 0)

    mask = create_block_mask(packed, rows, 2, length, length, device="cpu", BLOCK_SIZE=64)
    out = kept(indices=indices, length=length).inputs("attention_mask", mask)
    assert out.shape == (B, 2, 170, 170)
    at = torch.arange(170)
    dense = torch.stack(
        [torch.stack([out.mask_mod(torch.tensor(b), torch.tensor(h), at[:, None], at) for h in (0, 1)]) for b in (0, 1)]
    )
    for row, index in enumerate(indices.long()):
        for head in (0, 1):
            expected = packed(row if rows == B else 0, head, index[:, None], index[None])
            assert torch.equal(dense[row, head], expected)
    blocks = torch.nn.functional.pad(dense, (0, 192 - 170, 0, 192 - 170)).unflatten(3, (3, 64)).unflatten(2, (3, 64))
    assert torch.equal(out.to_dense() > 0, blocks.any(-1).any(3))


class Flex(nn.Module):
    def forward(self, hidden, block_mask):
        heads = hidden.unflatten(2, (2, 16)).transpose(1, 2)
        return flex_attention(heads, heads, heads, block_mask=block_mask).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_kept_tokens_is_attention_restricted_to_them():
    length, key = 60, BatchKey(seed=1, step=0, micro_batch=0, positions=(4, 9))
    hidden = torch.randn(B, length, 32, generator=torch.Generator().manual_seed(0))
    documents = torch.arange(length) // 25

    def packed(b, h, q, kv):
        return (q >= kv) & (documents[q] == documents[kv])

    mask = create_block_mask(packed, None, None, length, length, device="cpu")
    with entered(key):
        found = RandomLayerTokenDrop(Flex(), 3, reserved_length=20)(hidden, mask)
        indices = draw_tokens(3, B, length, 20, hidden.device).long()
    chosen = torch.zeros(B, length, dtype=torch.bool).scatter_(1, indices, True)
    at = torch.arange(length)
    allowed = packed(0, 0, at[:, None], at) & (chosen[:, None, None] | torch.eye(length, dtype=torch.bool))
    heads = hidden.unflatten(2, (2, 16)).transpose(1, 2)
    whole = scaled_dot_product_attention(heads, heads, heads, attn_mask=allowed).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, torch.where(chosen[..., None], whole, hidden))


def test_the_mask_of_a_cross_attention_is_gathered_in_the_queries_only():
    cross = torch.randn(B, 1, S, 9)
    assert torch.equal(kept().inputs("encoder_attention_mask", cross), rows_of(cross.transpose(1, 2)).transpose(1, 2))
    padding = torch.ones(B, 9)
    assert kept().inputs("memory_mask", padding) is padding
    states = torch.randn(B, S, D)
    assert kept().inputs("encoder_hidden_states", states) is states


class Cache:
    def __init__(self, held):
        self.held = held

    def get_seq_length(self):
        return self.held


def test_an_empty_cache_is_withheld_and_a_filled_one_refused():
    assert kept().inputs("past_key_values", Cache(0)) is None
    assert kept().inputs("cache_position", torch.arange(S)) is None
    with pytest.raises(ValueError, match=r"Cache that holds 4 tokens: .* use a cache in eval mode"):
        kept().inputs("past_key_values", Cache(4))
    with pytest.raises(ValueError, match="object of unknown content"):
        kept().inputs("layer_past", object())


def test_what_has_no_sequence_dimension_passes_through():
    for value in (torch.zeros(()), torch.zeros(D, D), torch.zeros(B, D), nn.Linear(S, S), 3, "x", len):
        assert kept().inputs("unknown", value) is value


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("unknown", (S,), "none of 'B S ...', 'B _ Q S', 'S S'"),
        ("unknown", (B, D, S), "say how it is laid out"),
        ("unknown", (4, S, S), "arguments={'unknown': 'B S ...'}"),
        ("unknown", (B, S, S, S), "may be 'B S ...' or 'B _ Q S'"),
        ("attention_mask", (B, 7), r"shape \(2, 7\) beside 2 rows of 6 tokens: it is none of 'B _ Q S'"),
        ("position_embeddings", (B, S, S, 4), "may be 'B S _ _' or 'B _ S _'"),
        ("position_embeddings", (B, B, S, 4), "may be 'B _ S _' or '_ B S _'"),
    ],
)
def test_what_can_be_read_in_two_ways_or_none_is_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        kept().inputs(name, torch.zeros(shape))


def test_as_many_rows_as_tokens():
    """[S, S] was once gathered as ids of B rows, and silently so, when there happened to be as many rows as tokens."""
    square = kept(indices=torch.tensor([[0, 2], [0, 1], [1, 2]]), length=3, width=8)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"'attention_mask' of shape \(3, 3\) .*'S S' or 'B S'"):
        square.inputs("attention_mask", causal)
    with pytest.raises(ValueError, match="cannot be told, since there are 3 tokens and 3 rows"):
        square.inputs("unknown", causal)
    declared = kept(indices=square.indices, length=3, attention_mask="S S", unknown="B S", passing="pass")
    assert torch.equal(declared.inputs("attention_mask", causal), causal[:2, :2])
    assert torch.equal(declared.inputs("unknown", causal), rows_of(causal, square.indices))
    assert declared.inputs("passing", causal) is causal
    assert torch.equal(square.inputs("position_ids", causal), rows_of(causal, square.indices))


def test_as_many_tokens_as_hidden_units():
    with pytest.raises(ValueError, match="6 tokens and the hidden states' width of 6"):
        kept(width=S).inputs("condition", torch.zeros(B, S))
    assert kept(width=S, condition="pass").inputs("condition", torch.zeros(B, S)).shape == (B, S)


def test_any_other_mask_for_all_rows_is_refused():
    window = torch.ones(S, S, dtype=torch.bool).tril().triu(-1)
    with pytest.raises(ValueError, match=r"pass it as \[batch or 1, 1, 6, 6\]"):
        kept().inputs("attention_mask", window)


def test_tensors_of_tokens_in_an_object_are_refused():
    holder = SimpleNamespace(lengths=torch.zeros(B, S))
    holders = {
        "SimpleNamespace whose lengths": holder,
        "SimpleNamespace whose parts": SimpleNamespace(parts=[None, torch.zeros(S)]),
        "Slotted whose lengths": Slotted(torch.zeros(B, S)),
        "UserDict whose data": UserDict(lengths=torch.zeros(B, S)),
        "ndarray that": np.zeros((B, S)),
    }
    for told, value in holders.items():
        with pytest.raises(ValueError, match=rf"{told} has shape \([\d, ]+\), with a dimension of 6"):
            kept().inputs("metadata", value)
    assert kept(metadata="pass").inputs("metadata", holder) is holder
    for harmless in (SimpleNamespace(parts=[torch.zeros(B)]), Slotted(None), np.zeros(5), nn.Linear(S, S)):
        assert kept().inputs("metadata", harmless) is harmless


def test_a_dict_of_another_class_stays_one():
    ids = torch.arange(B * S).reshape(B, S)
    found = kept().inputs("metadata", OrderedDict(position_ids=ids, other=3))
    assert type(found) is OrderedDict
    assert torch.equal(found["position_ids"], rows_of(ids))
    assert found["other"] == 3


class TwoStreams(nn.Module):
    def forward(self, hidden, residual=None):
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(residual), residual


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_second_stream_of_kept_tokens_does_not_meet_other_tokens(batch_first):
    order = "batch_seq_dim" if batch_first else "seq_batch_dim"
    first, second = (
        RandomLayerTokenDrop(TwoStreams(), at, reserved_length=4, hidden_state_order=order) for at in range(2)
    )
    hidden, residual = first(torch.randn((B, 10, 8) if batch_first else (10, B, 8)))
    with pytest.raises(ValueError, match=r"has as many tokens as are kept, 4: .*route='block'"):
        second(hidden, residual)
    second.rule = LayerRule.of(TwoStreams(), {"residual": "pass"}, batch_first=batch_first)
    second(hidden, residual)  # on the user's word
    begin, end = (
        RandomLayerTokenDrop(TwoStreams(), 0, reserved_length=4, hidden_state_order=order, route=part)
        for part in ("begin", "end")
    )
    hidden = torch.randn((B, 10, 8) if batch_first else (10, B, 8))
    out, residual = end(*begin(hidden))  # of the same tokens
    assert out.shape == hidden.shape
    assert residual.shape == ((B, 4, 8) if batch_first else (4, B, 8))


def test_gathered_inputs_carry_gradients():
    vectors = torch.randn(B, S, D, requires_grad=True)
    kept().inputs("extra", vectors).sum().backward()
    expected = torch.zeros(B, S, D)
    expected[torch.arange(B)[:, None], INDICES.long()] = 1
    assert torch.equal(vectors.grad, expected)
