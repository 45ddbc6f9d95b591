import pytest
import torch

from penstock.data_pipeline.random_ltd.layer_inputs import KeptTokens

B, S, D = 2, 6, 3
INDICES = torch.tensor([[0, 2, 5], [1, 2, 3]], dtype=torch.int32)
BATCH_FIRST = KeptTokens(INDICES, S, batch_first=True)
SEQ_FIRST = KeptTokens(INDICES, S, batch_first=False)


def rows_of(tensor):
    """[B, S, ...] gathered by plain indexing."""
    return torch.stack([tensor[row, at.long()] for row, at in enumerate(INDICES)])


def test_per_token_tensors_are_gathered():
    ids, vectors = torch.arange(B * S).reshape(B, S), torch.randn(B, S, D)
    assert torch.equal(BATCH_FIRST.inputs(ids), rows_of(ids))
    assert torch.equal(BATCH_FIRST.inputs(vectors), rows_of(vectors))
    assert torch.equal(SEQ_FIRST.inputs(vectors.transpose(0, 1)), rows_of(vectors).transpose(0, 1))
    assert torch.equal(SEQ_FIRST.inputs(ids), rows_of(ids))


def test_one_row_for_all_is_gathered_for_each():
    ids, vectors = torch.arange(S)[None], torch.randn(1, S, D)
    assert torch.equal(BATCH_FIRST.inputs(ids), INDICES.long())
    assert torch.equal(BATCH_FIRST.inputs(vectors), rows_of(vectors.expand(B, S, D)))
    assert torch.equal(SEQ_FIRST.inputs(vectors.transpose(0, 1)), rows_of(vectors.expand(B, S, D)).transpose(0, 1))


def test_nests_are_gathered_inside():
    ids = torch.arange(B * S).reshape(B, S)
    out = BATCH_FIRST.inputs({"rope": (ids, [ids, None]), "n": 3, "name": "x"})
    assert torch.equal(out["rope"][0], rows_of(ids))
    assert torch.equal(out["rope"][1][0], rows_of(ids))
    assert out["rope"][1][1] is None
    assert (out["n"], out["name"]) == (3, "x")


@pytest.mark.parametrize("shape", [(B, 1, S, S), (1, 1, S, S), (B, 4, 1, S), (1, 4, S, S)])
@pytest.mark.parametrize("named", [True, False])
def test_attention_masks_of_four_dimensions_are_gathered_on_both(shape, named):
    mask = torch.randn(shape)
    out = BATCH_FIRST.inputs(mask, is_mask=named)
    full = mask.expand(B, *shape[1:])
    for row, at in enumerate(INDICES.long()):
        expected = full[row] if shape[2] == 1 else full[row][:, at]
        assert torch.equal(out[row], expected[:, :, at])


def test_masks_by_name_of_fewer_dimensions():
    mask = torch.randn(B, S, S)
    out = BATCH_FIRST.inputs(mask, is_mask=True)
    for row, at in enumerate(INDICES.long()):
        assert torch.equal(out[row], mask[row][at][:, at])
    padding = torch.rand(B, S) > 0.5
    assert torch.equal(BATCH_FIRST.inputs(padding, is_mask=True), rows_of(padding))
    assert torch.equal(SEQ_FIRST.inputs(padding, is_mask=True), rows_of(padding))
    assert BATCH_FIRST.inputs(None, is_mask=True) is None


def test_a_causal_mask_for_all_rows_stays_one():
    causal = torch.full((S, S), float("-inf")).triu(1)
    assert torch.equal(BATCH_FIRST.inputs(causal), causal[:3, :3])
    assert torch.equal(BATCH_FIRST.inputs(causal, is_mask=True), causal[:3, :3])


def test_any_other_mask_for_all_rows_is_refused():
    window = torch.ones(S, S, dtype=torch.bool).tril().triu(-1)
    with pytest.raises(ValueError, match=r"pass it as \[batch or 1, 1, 6, 6\]"):
        BATCH_FIRST.inputs(window)


def test_a_named_mask_of_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 7\) goes with 2 rows of 6 tokens"):
        BATCH_FIRST.inputs(torch.ones(2, 7), is_mask=True)


def test_what_has_no_sequence_dimension_passes_through():
    for tensor in (torch.zeros(()), torch.zeros(S), torch.zeros(D, D), torch.zeros(B, D, S)):
        assert BATCH_FIRST.inputs(tensor) is tensor


def test_gathered_inputs_carry_gradients():
    vectors = torch.randn(B, S, D, requires_grad=True)
    BATCH_FIRST.inputs(vectors).sum().backward()
    expected = torch.zeros(B, S, D)
    expected[torch.arange(B)[:, None], INDICES.long()] = 1
    assert torch.equal(vectors.grad, expected)
