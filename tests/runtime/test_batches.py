from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import Consumed
from penstock.runtime.batches import Cut, collate_samples, from_iterator, from_order, split_pair, tokens_in
from penstock.runtime.feed import Feed, Step


def cut(
    size: int = 2, count: int = 3, replica: int = 0, replicas: int = 1, first: bool = True, last: bool = True
) -> Cut:
    return Cut(size, count, replica, replicas, first, last, torch.device("cpu"))


class Identity:
    """The order in which sample k stands at position k."""

    def sample_at(self, k: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(k)


def step_of(part: Cut, start: int) -> Step:
    return Feed(part.global_batch_size, part.micro_batches * part.replicas).step(0, samples=start, tokens=0)


def rows(count: int, length: int = 5) -> list[np.ndarray[Any, Any]]:
    return [np.arange(length) + 100 * i for i in range(count)]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_replicas_share_out_what_one_process_computes(size: int, count: int, replicas: int, step: int) -> None:
    start = step * size * count * replicas
    data = rows(4 * size * count * replicas)
    alone = cut(size, count * replicas)
    whole, read = from_order(data, Identity(), collate_samples, alone, step_of(alone, start))
    expected = {batch.index: batch for batch in whole}
    assert sorted(expected) == list(range(count * replicas))
    seen = []
    together = Consumed()
    for replica in range(replicas):
        here = cut(size, count, replica, replicas)
        part, its_own = from_order(data, Identity(), collate_samples, here, step_of(here, start))
        together.add(its_own)
        for batch in part:
            assert torch.equal(batch.inputs, expected[batch.index].inputs)
            assert torch.equal(batch.targets, expected[batch.index].targets)
            assert batch.positions == expected[batch.index].positions
            seen += batch.positions
    assert sorted(seen) == list(range(start, start + size * count * replicas))
    assert together.state_dict() == read.state_dict()


def test_a_middle_stage_reads_nothing_but_knows_the_positions() -> None:
    batches, _ = from_order(None, Identity(), collate_samples, cut(first=False, last=False), step_of(cut(), 6))
    assert [(b.inputs, b.targets, b.positions) for b in batches] == [
        (None, None, (6, 7)),
        (None, None, (8, 9)),
        (None, None, (10, 11)),
    ]


def test_first_and_last_stages_keep_only_their_half() -> None:
    (first, *_), _ = from_order(rows(6), Identity(), collate_samples, cut(last=False), step_of(cut(), 0))
    (last, *_), _ = from_order(rows(6), Identity(), collate_samples, cut(first=False), step_of(cut(), 0))
    assert first.targets is None
    assert last.inputs is None
    assert first.inputs.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103]]
    assert last.targets.tolist() == [[1, 2, 3, 4], [101, 102, 103, 104]]


def test_an_iterator_gives_pairs_in_turn() -> None:
    pairs = iter([(torch.full((2, 1), i), torch.full((2,), i)) for i in range(3)])
    batches = from_iterator(pairs, cut(replica=1, replicas=2), 12)
    assert [int(b.inputs[0, 0]) for b in batches] == [0, 1, 2]
    assert [b.index for b in batches] == [1, 3, 5]
    assert [b.positions for b in batches] == [(14, 15), (18, 19), (22, 23)]


def test_a_middle_stage_leaves_the_iterator_alone() -> None:
    iterator = iter([1, 2, 3])
    from_iterator(iterator, cut(first=False, last=False), 0)
    assert next(iterator) == 1


def test_an_iterator_that_ends_early_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"replica 0 ended after 1 of the 3 micro-batches"):
        from_iterator(iter([(torch.ones(2, 1), torch.ones(2))]), cut(), 0)


def test_pairs_are_wanted_unless_targets_are_not_needed() -> None:
    with pytest.raises(ValueError, match="got a tuple of 3"):
        split_pair((1, 2, 3))
    with pytest.raises(ValueError, match="got a dict of 1"):
        split_pair({"input_ids": 1})
    assert split_pair({"input_ids": 1}, targets_needed=False) == ({"input_ids": 1}, None)


def test_samples_of_different_lengths_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match=r"different lengths \(3 to 4 tokens\)"):
        collate_samples([np.arange(3), np.arange(4)])


def test_other_samples_are_stacked_by_torch() -> None:
    inputs, targets = collate_samples([(torch.zeros(3), 1), (torch.ones(3), 0)])
    assert inputs.shape == (2, 3)
    assert targets.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), 14),
        ({"input_ids": torch.zeros(2, 7, dtype=torch.int64), "mask": torch.ones(2, 7)}, 14),
        (torch.zeros(2, 7), 2),
        ((torch.zeros(3, 7), torch.zeros(3)), 3),
        (None, 0),
    ],
)
def test_tokens_are_counted_where_there_are_tokens(inputs: Any, tokens: int) -> None:
    assert tokens_in(inputs) == tokens
