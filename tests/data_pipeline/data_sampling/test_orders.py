from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.order import Order, SequentialOrder, ShuffledOrder
from penstock.data_pipeline.data_sampling.stratified import StratifiedOrder
from penstock.data_pipeline.data_sampling.weighted import ReplacementOrder, WeightedOrder, log_weights

labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def epochs_of(order: Order, count: int) -> list[list[int]]:
    return order(np.arange(count * order.epoch_size)).reshape(count, -1).tolist()


@given(labels, st.integers(0, 1000), st.data())
def test_each_epoch_holds_each_sample_once_and_positions_may_come_in_any_order(
    given_labels: list[int], seed: int, data: st.DataObject
) -> None:
    size = len(given_labels)
    for order in (
        SequentialOrder(size),
        ShuffledOrder(size, seed),
        StratifiedOrder(np.array(given_labels), seed),
        WeightedOrder(log_weights(np.array(given_labels) + 1.0), seed),
    ):
        epochs = epochs_of(order, 3)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        asked = data.draw(st.lists(st.integers(0, 3 * size - 1), max_size=6))
        assert order(np.array(asked, dtype=np.int64)).tolist() == [epochs[k // size][k % size] for k in asked]


def test_epochs_and_seeds_differ() -> None:
    for kind in (ShuffledOrder, lambda size, seed: WeightedOrder(np.zeros(size), seed)):
        first, second = epochs_of(kind(100, 0), 2)
        assert first != second
        assert epochs_of(kind(100, 1), 1)[0] != first
        assert kind(100, 0).digest() != kind(100, 1).digest()
    assert SequentialOrder(4)(np.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]


@given(labels, st.integers(0, 9))
def test_every_prefix_mirrors_the_strata(given_labels: list[int], seed: int) -> None:
    strata = Counter(given_labels)
    size = len(given_labels)
    drawn = epochs_of(StratifiedOrder(np.array(given_labels), seed), 1)[0]
    for length in range(size + 1):
        got = Counter(given_labels[sample] for sample in drawn[:length])
        for label, count in strata.items():
            # When a fraction x of the epoch has passed, n * x of a stratum are due, rounded half up; all strata
            # together are then off from size * x by at most half a sample each.
            assert abs(got[label] - length * count / size) <= 1 + len(strata) / 2 * count / size


def test_strata_of_equal_size_take_turns() -> None:
    given_labels = np.array(["a", "b", "c"] * 5)
    drawn = epochs_of(StratifiedOrder(given_labels, 0), 2)
    assert [given_labels[sample] for sample in drawn[0]] == ["a", "b", "c"] * 5
    assert drawn[0] != drawn[1]


def test_first_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    logs = log_weights(weights)
    runs = 4000
    firsts = Counter(int(WeightedOrder(logs, seed)(np.array([0]))[0]) for seed in range(runs))
    for sample, share in enumerate(weights / weights.sum()):
        assert abs(firsts[sample] - runs * share) <= 4.5 * np.sqrt(runs * share * (1 - share))
    # Successive draws without replacement: P(2 then 1) = 5/8 * 2/3.
    pairs = Counter(tuple(WeightedOrder(logs, seed)(np.arange(2)).tolist()) for seed in range(runs))
    share = 5 / 8 * 2 / 3
    assert abs(pairs[(2, 1)] - runs * share) <= 4.5 * np.sqrt(runs * share * (1 - share))


def test_a_short_epoch_prefers_heavy_samples_and_does_not_repeat() -> None:
    order = WeightedOrder(log_weights(np.array([1.0] * 50 + [50.0] * 50)), 0, samples_per_epoch=20)
    for epoch in epochs_of(order, 5):
        assert len(set(epoch)) == 20
        assert sum(sample >= 50 for sample in epoch) >= 15


def test_weights_may_differ_by_any_factor() -> None:
    """Quotients of these are beyond floats: divided, the light ones would never come."""
    order = WeightedOrder(log_weights(np.array([5e-324, 1e-300, 1.0, 1e300])), 0)
    assert epochs_of(order, 3) == [[3, 2, 1, 0]] * 3


def test_replacement_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 0.0, 2.0, 5.0])
    order = ReplacementOrder(weights, 0, samples_per_epoch=8000)
    counts = np.bincount(order(np.arange(8000)), minlength=4)
    assert counts[1] == 0
    assert (abs(counts - 1000 * weights) <= 4.5 * np.sqrt(1000 * weights)).all()
    assert order(np.array([17, 3])).tolist() == order(np.arange(20))[[17, 3]].tolist()
    assert ReplacementOrder(weights, 0).epoch_size == 4


def test_weights_that_are_none_are_refused() -> None:
    for weights, message in (
        ([1.0, -1.0], "sample 1 has the weight -1.0"),
        ([np.inf], "sample 0 has the weight inf"),
        ([0.0, 0.0], "all 2 weights are 0"),
        ([[1.0]], "one weight per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            log_weights(np.array(weights))
    with pytest.raises(ValueError, match="samples_per_epoch=3, but 2 samples have a weight above 0"):
        WeightedOrder(log_weights(np.array([1.0, 0.0, 2.0])), 0, samples_per_epoch=3)
    with pytest.raises(ValueError, match="one label per sample"):
        StratifiedOrder(np.zeros((2, 2)), 0)
