from collections import Counter
from itertools import combinations
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.random_ltd.dropping_utils import bert_sample_tokens, gpt_sample_tokens
from penstock.data_pipeline.random_ltd.sampling import gather_mask, keyed_indices, smallest


def chi_squared_limit(freedom: int, sigmas: float = 5.0) -> float:
    """Wilson and Hilferty's approximation of the quantile that lies ``sigmas`` above the median."""
    return freedom * (1 - 2 / (9 * freedom) + sigmas * sqrt(2 / (9 * freedom))) ** 3


@given(
    seq=st.integers(1, 200),
    share=st.floats(0, 1),
    batch=st.integers(1, 5),
    layers=st.integers(1, 4),
    key=st.none() | st.integers(0, 2**64 - 1),
)
def test_indices_are_sorted_distinct_int32_of_the_stated_shape(seq, share, batch, layers, key):
    kept = max(1, round(share * seq))
    indices, mask = gpt_sample_tokens(kept, seq, batch, layers, key=key)
    assert indices.shape == (layers, batch, kept)
    assert indices.dtype == torch.int32
    assert mask is None
    assert bool((indices.diff(dim=-1) > 0).all())
    assert int(indices.min()) >= 0
    assert int(indices.max()) < seq


def test_every_subset_is_equally_likely_over_samples_and_over_layers():
    subsets = list(combinations(range(5), 2))
    draws = 20_000
    over_samples = keyed_indices(7, range(draws), [3], 5, 2)[0]
    over_layers = keyed_indices(7, [11], range(draws), 5, 2)[:, 0]
    for table in (over_samples, over_layers):
        counts = Counter(map(tuple, table.tolist()))
        expected = draws / len(subsets)
        statistic = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
        assert statistic < chi_squared_limit(len(subsets) - 1)


def test_draws_without_a_key_are_uniform_too():
    torch.manual_seed(0)
    draws = 20_000
    counts = Counter(map(tuple, gpt_sample_tokens(3, 5, draws)[0][0].tolist()))
    subsets = list(combinations(range(5), 3))
    expected = draws / len(subsets)
    statistic = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    assert statistic < chi_squared_limit(len(subsets) - 1)


def test_each_position_is_kept_equally_often_in_long_rows():
    draws, seq, kept = 4000, 256, 64
    counts = np.bincount(keyed_indices(1, range(draws), [0], seq, kept).ravel(), minlength=seq)
    share = kept / seq
    # The counts of one row add up to `kept`, hence the correction (1 - 1/seq) of each variance.
    statistic = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (1 - 1 / seq)
    assert statistic < chi_squared_limit(seq - 1)


def test_every_pair_of_tokens_is_kept_equally_often():
    draws, seq, kept = 20_000, 10, 4
    member = np.zeros((draws, seq))
    np.put_along_axis(member, keyed_indices(3, range(draws), [1], seq, kept)[0], 1, axis=1)
    together = (member.T @ member)[np.triu_indices(seq, 1)]
    share = kept * (kept - 1) / (seq * (seq - 1))
    # Each count has the variance of a binomial one; 45 of them, none further off than 5 standard errors.
    assert np.abs(together - draws * share).max() < 5 * sqrt(draws * share * (1 - share))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 30),
    share=st.floats(0, 1),
    spread=st.sampled_from([2**64, 2**34, 2**6]),
    seed=st.integers(0, 1000),
)
def test_the_smallest_words_are_found_even_if_their_upper_halves_are_tied(rows, length, share, spread, seed):
    count = max(1, round(share * length))
    rng = np.random.default_rng(seed)
    words = np.array([rng.choice(min(spread, 2**62), length, replace=False) for _ in range(rows)], dtype=np.uint64)
    words[:, : length // 2] |= np.uint64(2**63)
    expected = [sorted(sorted(range(length), key=lambda token: int(row[token]))[:count]) for row in words]
    found = np.empty((rows, count), np.int32)
    smallest(words, count, out=found)
    assert found.tolist() == expected


def test_two_layers_choose_independently_for_the_same_sample():
    draws = 20_000
    first, second = keyed_indices(5, range(draws), [0, 1], 4, 1)[:, :, 0]
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    statistic = ((table - draws / 16) ** 2 / (draws / 16)).sum()
    assert statistic < chi_squared_limit(15)


def test_neighbouring_samples_choose_independently():
    rows = keyed_indices(5, range(20_001), [2], 4, 1)[0, :, 0]
    table = np.zeros((4, 4))
    np.add.at(table, (rows[:-1], rows[1:]), 1)
    statistic = ((table - 20_000 / 16) ** 2 / (20_000 / 16)).sum()
    assert statistic < chi_squared_limit(15)


@given(
    positions=st.lists(st.integers(0, 2**40), min_size=2, max_size=8),
    layers=st.lists(st.integers(0, 100), min_size=1, max_size=3, unique=True),
    cut=st.integers(1, 7),
)
def test_a_keyed_draw_depends_on_position_and_layer_only(positions, layers, cut):
    whole, _ = gpt_sample_tokens(6, 20, len(positions), len(layers), key=9, positions=positions, layer_ids=layers)
    cut = min(cut, len(positions) - 1)
    for part in (slice(None, cut), slice(cut, None)):
        rows = positions[part]
        for at, layer in enumerate(layers):
            one, _ = gpt_sample_tokens(6, 20, len(rows), key=9, positions=rows, layer_ids=[layer])
            assert torch.equal(one[0], whole[at, part])


def test_seed_position_and_layer_each_change_the_draw():
    base = keyed_indices(1, [10], [2], 1000, 500)
    for other in (keyed_indices(2, [10], [2], 1000, 500), keyed_indices(1, [11], [2], 1000, 500)):
        assert not np.array_equal(base, other)
    assert not np.array_equal(base, keyed_indices(1, [10], [3], 1000, 500))


def test_keyed_draws_leave_torchs_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gpt_sample_tokens(4, 9, 2, key=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_key_torchs_seed_decides():
    torch.manual_seed(3)
    first, _ = gpt_sample_tokens(30, 90, 2)
    second, _ = gpt_sample_tokens(30, 90, 2)
    torch.manual_seed(3)
    again, _ = gpt_sample_tokens(30, 90, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_the_decoder_mask_is_the_slice_which_for_a_causal_mask_is_the_gathered_one():
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, 9, 9)
    indices, mask = gpt_sample_tokens(4, 9, 3, layers=2, attn_mask=causal)
    assert mask is not None
    assert torch.equal(mask, causal[:, :, :4, :4])
    assert torch.equal(mask, gather_mask(causal, indices[1]))


@pytest.mark.parametrize("batch_of_mask", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_encoder_masks_are_gathered_in_both_dimensions(batch_of_mask, heads, queries, dtype):
    mask = (torch.randn(batch_of_mask, heads, queries, 7) * 3).to(dtype)
    indices, masks = bert_sample_tokens(3, 7, 3, layers=2, attn_mask=mask)
    assert isinstance(masks, list)
    assert len(masks) == 2
    for layer in range(2):
        assert masks[layer].shape == (3, heads, 1 if queries == 1 else 3, 3)
        assert masks[layer].dtype == dtype
        for row in range(3):
            for head in range(heads):
                source = mask[row % batch_of_mask, head]
                for q in range(masks[layer].shape[2]):
                    for k in range(3):
                        from_query = 0 if queries == 1 else int(indices[layer, row, q])
                        expected = source[from_query, int(indices[layer, row, k])]
                        assert masks[layer][row, head, q, k] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reserved_length": 0}, "reserved_length=0 is not between 1 and seq_length=8"),
        ({"reserved_length": 9}, "reserved_length=9 is not between 1 and seq_length=8"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": 0}, "layers=0"),
        ({"attn_mask": torch.ones(2, 8, 8)}, r"attn_mask must be .*got \(2, 8, 8\)"),
        ({"attn_mask": torch.ones(3, 1, 8, 8)}, "for a batch of 2"),
        ({"positions": [1, 2]}, "pass key= too"),
        ({"key": 1, "positions": [1]}, "2 rows .* got 1 positions"),
        ({"key": 1, "layer_ids": [1, 2]}, "1 layers, got 2 positions and 2 layer_ids"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gpt_sample_tokens(**{"reserved_length": 4, "seq_length": 8, "batch_size": 2, **arguments})


def test_the_encoder_needs_a_mask():
    with pytest.raises(ValueError, match="gpt_sample_tokens"):
        bert_sample_tokens(4, 8, 2)


@settings(max_examples=20)
@given(kept=st.integers(1, 30))
def test_keeping_everything_keeps_everything(kept):
    indices, _ = gpt_sample_tokens(kept, kept, 2, 2)
    assert torch.equal(indices, torch.arange(kept, dtype=torch.int32).expand(2, 2, kept))
