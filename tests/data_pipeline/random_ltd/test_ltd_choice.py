import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, protected_tokens
from penstock.data_pipeline.random_ltd.choice import _draw_op, draw_tokens

CPU = torch.device("cpu")


def key(positions, seed=1):
    return BatchKey(seed=seed, step=0, micro_batch=0, positions=tuple(positions))


def draw(positions, length, kept, layer=3, **more):
    with entered(key(positions)):
        return draw_tokens(layer, len(positions), length, kept, CPU, **more)


def inclusion(indices, length):
    return torch.zeros(len(indices), length).scatter_(1, indices.long(), 1).mean(0)


def successive_inclusion(weights, kept):
    """The chance of each token when drawn one after another in proportion to the weights of those left."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for order in itertools.permutations(range(len(weights)), kept):
        chance, left = 1.0, float(sum(weights))
        for token in order:
            chance *= weights[token] / left
            left -= weights[token]
        for token in order:
            total[token] += chance
    return total


def test_weights_draw_one_token_after_another_in_proportion_to_those_left():
    weights, draws = [1.0, 2.0, 5.0, 0.5, 3.0], 20_000
    drawn = draw(range(draws), 5, 2, weights_BS=torch.tensor([weights]))
    chance = successive_inclusion(weights, 2)
    error = (inclusion(drawn, 5) - chance).abs()
    assert bool((error <= 5 * (chance * (1 - chance) / draws).sqrt()).all())


def test_protected_tokens_are_kept_and_the_others_drawn_alike():
    draws, length, kept = 20_000, 6, 3
    protected = torch.tensor([[False, True, False, False, False, False]])
    seen = inclusion(draw(range(draws), length, kept, protected_BS=protected), length)
    assert seen[1] == 1
    chance = torch.tensor(2 / 5)
    assert bool(((seen[[0, 2, 3, 4, 5]] - chance).abs() <= 5 * (chance * (1 - chance) / draws).sqrt()).all())


@settings(max_examples=50)
@given(
    length=st.integers(1, 40),
    share=st.floats(0, 1),
    rows=st.integers(1, 5),
    marked=st.floats(0, 1),
    weighted=st.booleans(),
    data=st.data(),
)
def test_any_split_of_the_rows_keeps_the_same_protected_and_distinct_tokens(
    length, share, rows, marked, weighted, data
):
    kept = max(1, round(share * length))
    positions = data.draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    protected = torch.zeros(rows, length, dtype=torch.bool)
    for row in protected:
        row[torch.randperm(length, generator=generator)[: round(marked * kept)]] = True
    weights = torch.rand(rows, length, generator=generator) + 0.01 if weighted else None
    whole = draw(positions, length, kept, protected_BS=protected, weights_BS=weights)
    assert whole.shape == (rows, kept)
    assert whole.dtype == torch.int32
    assert bool((whole[:, 1:] > whole[:, :-1]).all())
    for row, marks in zip(whole, protected, strict=True):
        assert set(marks.nonzero().flatten().tolist()) <= set(row.tolist())
    for row, position in enumerate(positions):
        one = None if weights is None else weights[row : row + 1]
        alone = draw([position], length, kept, protected_BS=protected[row : row + 1], weights_BS=one)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.filterwarnings("ignore:a row protects more tokens")
@pytest.mark.parametrize("weighted", [False, True])
def test_of_too_many_protected_tokens_each_is_kept_equally_often(weighted):
    draws, length, kept = 20_000, 6, 3
    protected = torch.tensor([[True, True, False, True, False, True]])
    weights = torch.tensor([[1.0, 9.0, 99.0, 0.0, 0.0, 3.0]]) if weighted else None
    seen = inclusion(draw(range(draws), length, kept, protected_BS=protected, weights_BS=weights), length)
    chance = torch.tensor(3 / 4)
    assert bool((seen[[2, 4]] == 0).all())
    assert bool(((seen[[0, 1, 3, 5]] - chance).abs() <= 5 * (chance * (1 - chance) / draws).sqrt()).all())


def test_a_row_with_too_many_protected_tokens_is_told_and_leaves_the_others_as_they_are():
    protected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 1]]) > 0
    with pytest.warns(UserWarning, match="a row protects more tokens than the 3 of 5 that are kept"):
        both = draw([1, 2], 5, 3, protected_BS=protected)
    assert torch.equal(both[:1], draw([1], 5, 3, protected_BS=protected[:1]))
    assert draw([2], 5, 4, protected_BS=protected[1:]).tolist() == [[0, 1, 2, 4]]  # as many as are kept: no warning


def test_tokens_of_weight_zero_fill_the_places_that_no_others_are_left_for():
    draws = 20_000
    seen = inclusion(draw(range(draws), 5, 3, weights_BS=torch.tensor([[1e-30, 0.0, 0.0, 1e30, 0.0]])), 5)
    chance = torch.tensor(1 / 3)
    assert bool((seen[[0, 3]] == 1).all())
    assert bool(((seen[[1, 2, 4]] - chance).abs() <= 5 * (chance * (1 - chance) / draws).sqrt()).all())


def test_the_choice_in_a_compiled_graph_is_a_well_behaved_operator():
    protected = torch.tensor([[True, *[False] * 5]])
    with entered(key((4, 9))):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        for facts in ((None, None), (protected, torch.ones(2, 6))):
            opcheck(_draw_op, (3, 2, 6, 4, CPU, *facts, torch.randn(2, 6, 1)), test_utils=tests)


def test_a_weight_of_zero_is_not_drawn_before_others():
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    assert draw([4], 5, 3, weights_BS=weights).tolist() == [[0, 2, 4]]
    protected = torch.tensor([[False, True, False, False, False]])
    assert draw([4], 5, 4, weights_BS=weights, protected_BS=protected).tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weights_BS": torch.ones(1, 4)}, r"token_weights must be \[batch or 1, tokens\], here \[2 or 1, 5\]"),
        ({"protected_BS": torch.ones(3, 5) > 0}, r"protected_tokens must be .*; got \(3, 5\)"),
        ({"protected_BS": torch.ones(2, 5)}, "must be bool, got torch.float32"),
        ({"weights_BS": torch.tensor([[1.0, -1, 1, 1, 1]])}, "finite and not negative"),
        ({"weights_BS": torch.tensor([[1.0, float("nan"), 1, 1, 1]])}, "finite and not negative"),
    ],
)
def test_mistakes_are_named(more, message):
    with pytest.raises(ValueError, match=message):
        draw([1, 2], 5, 3, **more)


IDS = torch.tensor([[7, 1, 2, 0, 3, 9], [0, 4, 4, 4, 0, 7]])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["000000", "000000"]),
        ({"token_ids": (7, 9)}, ["100001", "000001"]),
        ({"separator_id": 0}, ["100010", "110001"]),
        ({"position_ids_BS": torch.tensor([[0, 1, 2, 0, 1, 2]])}, ["100100", "100100"]),
        ({"document_ids_BS": torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]])}, ["101001", "100000"]),
        ({"predicate": lambda ids: ids == 4}, ["000000", "011100"]),
        ({"token_ids": (9,), "predicate": lambda ids: ids == 4}, ["000001", "011100"]),
    ],
)
def test_what_can_be_protected(asked, expected):
    marked = protected_tokens(IDS, **asked)
    assert ["".join("01"[int(one)] for one in row) for row in marked] == expected


def test_a_predicate_must_mark_each_token():
    with pytest.raises(ValueError, match=r"bool \(2, 6\), got torch.int64 \(2, 6\)"):
        protected_tokens(IDS, predicate=lambda ids: ids)


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, hidden_states, **kwargs):
        self.calls.append(kwargs)
        return hidden_states


@pytest.mark.parametrize("training", [True, False])
def test_the_wrapper_takes_protected_tokens_and_weights_out_of_the_call(training):
    layer = Seen()
    wrapper = RandomLayerTokenDrop(layer, 3, reserved_length=2).train(training)
    protected = torch.tensor([[False, False, True, False]])
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    ids = torch.arange(4)[None]
    wrapper(torch.zeros(1, 4, 2), position_ids=ids, protected_tokens=protected, token_weights=weights)
    (call,) = layer.calls
    assert set(call) == {"position_ids"}
    assert call["position_ids"].tolist() == ([[0, 2]] if training else [[0, 1, 2, 3]])
