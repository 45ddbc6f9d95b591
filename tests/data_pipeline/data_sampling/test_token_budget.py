"""Batches of a token budget: every sample of an epoch is in one micro-batch, and none is too big."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import IndexedDataset, IndexedDatasetBuilder
from penstock.data_pipeline.data_sampling.order import ShuffledOrder
from penstock.data_pipeline.data_sampling.pieces import DocumentPieces
from penstock.data_pipeline.data_sampling.token_budget import StepPlan, TokenBudget, TokenBudgetConfig


def budget(lengths: Any, micro_batches: int = 2, seed: int = 3, **config: Any) -> TokenBudget:
    lengths = np.asarray(lengths)
    order = ShuffledOrder(len(lengths), seed)
    return TokenBudget(lengths, order, len(lengths), micro_batches, seed, TokenBudgetConfig(**config))


def walk(found: TokenBudget, until: int) -> list[StepPlan]:
    steps, consumed = [], 0
    while consumed < until:
        steps.append(found.step_at(consumed))
        consumed += steps[-1].samples
    assert consumed == until
    return steps


@given(
    st.lists(st.integers(1, 18), min_size=5, max_size=60),
    st.integers(1, 5),
    st.integers(20, 60),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from(["steps", "micro_batches"]),
)
def test_each_epoch_holds_each_sample_once_within_the_budget(
    lengths: list[int], micro_batches: int, tokens: int, max_rows: int | None, multiple: int, window: int, shuffle: str
) -> None:
    found = budget(
        lengths,
        micro_batches,
        max_tokens=tokens,
        max_rows=max_rows,
        multiple_of=multiple,
        window=window,
        shuffle=shuffle,
    )
    count = len(lengths)
    order = ShuffledOrder(count, 3)
    steps = walk(found, 2 * count)
    places: list[int] = []
    for step in steps:
        assert len(step.micro_batches) == micro_batches
        for batch in step.micro_batches:
            of_rows = np.array(lengths)[order(batch.positions)]
            assert batch.width == -(-of_rows.max() // multiple) * multiple
            assert batch.width * len(batch.positions) <= tokens
            assert max_rows is None or len(batch.positions) <= max_rows
            assert batch.tokens == of_rows.sum()
            if not batch.repeats:
                places += batch.positions.tolist()
        assert step.tokens == sum(b.tokens for b in step.micro_batches if not b.repeats)
        assert any(not batch.repeats for batch in step.micro_batches)
    assert sorted(places[:count]) == list(range(count))
    assert sorted(places[count:]) == list(range(count, 2 * count))
    assert found.positions(0, 2 * count).tolist() == places
    assert found.positions(3, count + 2).tolist() == places[3 : count + 2]
    assert sum(step.tokens for step in steps) == 2 * sum(lengths)
    assert found.summary(0, 2 * count) == (len(steps), 2 * sum(lengths), sum(step.padded_tokens for step in steps))


@given(st.lists(st.integers(1, 30), min_size=4, max_size=40), st.data())
def test_a_step_depends_on_the_samples_consumed_alone(lengths: list[int], data: st.DataObject) -> None:
    settings = {"max_tokens": 40, "window": 10}
    steps = walk(budget(lengths, **settings), 3 * len(lengths))
    number = data.draw(st.integers(0, len(steps) - 1))
    consumed = sum(step.samples for step in steps[:number])
    again = budget(lengths, **settings).step_at(consumed)
    assert [b.positions.tolist() for b in again.micro_batches] == [
        b.positions.tolist() for b in steps[number].micro_batches
    ]


def test_padding_and_mixing_of_a_broad_distribution() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 40_000), 1, 2048).astype(np.int32)
    found = budget(lengths, 8, max_tokens=8192)
    _, tokens, padded = found.summary(0, len(lengths))
    assert tokens == lengths.sum()
    assert 1 - tokens / padded < 0.01
    first = [step.micro_batches[0].width for step in walk(found, len(lengths))]
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2  # steps are shuffled
    mixed = budget(lengths, 8, max_tokens=8192, shuffle="micro_batches").step_at(0)
    assert len({batch.width for batch in mixed.micro_batches}) > 4


def test_a_budget_of_one_row_repeats_rows_that_do_not_count() -> None:
    (*_, last) = sorted(walk(budget([9] * 10, 4, max_tokens=9), 10), key=lambda step: -step.samples)
    assert [batch.repeats for batch in last.micro_batches] == [False, False, True, True]
    assert (last.samples, last.tokens, last.padded_tokens) == (2, 18, 36)


@pytest.mark.parametrize(
    ("lengths", "config", "message"),
    [
        ([3, 9, 2], {"max_tokens": 8}, "sample 1 takes 9 tokens, more than max_tokens=8"),
        ([3, 7, 2], {"max_tokens": 7, "multiple_of": 4}, "sample 1 takes 8 tokens"),
        ([3, 0, 2], {"max_tokens": 8}, "sample 1 has 0 tokens"),
        ([3], {"max_tokens": 8}, "an epoch of 1 samples cannot fill the 2 micro-batches"),
        ([[3]], {"max_tokens": 8}, "expected one length per sample"),
    ],
)
def test_mistakes_are_named(lengths: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget(lengths, **config)


def test_another_budget_is_noticed_on_resuming() -> None:
    consumed = budget([5] * 40, max_tokens=20).step_at(0).samples
    with pytest.raises(ValueError, match=f"no step begins after {consumed} samples"):
        budget([5] * 40, max_tokens=15).step_at(consumed)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 4), st.sampled_from(["longest", "powers"]))
def test_pieces_predict_each_token_once(tmp_path_factory: Any, documents: list[int], bits: int, cut: Any) -> None:
    prefix, length = Path(tmp_path_factory.mktemp("pieces")) / "d", 2**bits
    texts = [np.arange(size) + 100 * number for number, size in enumerate(documents)]
    with IndexedDatasetBuilder(prefix, np.int32) as builder:
        for text in texts:
            builder.add_document(text)
    source = IndexedDataset(prefix)
    if max(documents) < 2:
        with pytest.raises(ValueError, match="nothing to predict"):
            DocumentPieces(source, length, cut)
        return
    pieces = DocumentPieces(source, length, cut)
    assert [len(pieces[i]) for i in range(len(pieces))] == pieces.lengths.tolist()
    predicted = [token for i in range(len(pieces)) for token in pieces[i][1:].tolist()]
    assert predicted == [token for text in texts for token in text[1:].tolist()]
    for i in range(len(pieces)):
        assert (np.diff(pieces[i]) == 1).all()  # within one document
        assert len(pieces[i]) - 1 <= length
        if cut == "powers":
            assert (len(pieces[i]) - 1).bit_count() == 1
    with pytest.raises(IndexError):
        pieces[len(pieces)]


def test_pieces_refuse_impossible_lengths(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", np.int32) as builder:
        builder.add_document(np.arange(5))
    with pytest.raises(ValueError, match="a power of two, got length=6"):
        DocumentPieces(IndexedDataset(tmp_path / "d"), 6, "powers")
    with pytest.raises(ValueError, match="at least 1, got length=0"):
        DocumentPieces(IndexedDataset(tmp_path / "d"), 0)
