from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import DataSampler

VALUES = [7, 1, 5, 3, 1, 9, 2, 8, 4, 6, 5, 3]


def epoch(config: dict[str, Any]) -> list[int]:
    sampler = DataSampler(VALUES, config)
    return sampler.sample_at(np.arange(sampler.epoch_size)).tolist()


@given(st.integers(1, 12), st.integers(0, 2**40))
def test_a_count_is_so_many_samples_and_always_the_same(count: int, seed: int) -> None:
    chosen = epoch({"subset": {"count": count}, "seed": seed})
    assert len(set(chosen)) == len(chosen) == count
    again = DataSampler(VALUES, {"subset": {"count": count}, "seed": seed, "strategy": "sequential"})
    assert again.sample_at(np.arange(count)).tolist() == sorted(chosen)
    assert again.num_excluded == 12 - count


def test_shares_predicates_and_indices() -> None:
    assert len(epoch({"subset": {"percent": 25}})) == 3
    assert len(epoch({"subset": {"percent": 0.1}})) == 1
    even = {"predicate": lambda value: value % 2 == 0}
    assert epoch({"subset": even, "strategy": "sequential"}) == [6, 7, 8, 9]
    assert epoch({"subset": {"indices": [5, 0, 3]}, "strategy": "sequential"}) == [0, 3, 5]


def test_every_strategy_works_on_a_subset() -> None:
    subset = {"predicate": lambda value: value >= 3}
    members = {index for index, value in enumerate(VALUES) if value >= 3}
    metric = {"values": VALUES, "schedule_type": "fixed_discrete"}
    metric["schedule_config"] = {"difficulty": [4, 9], "max_step": [0]}
    for config in (
        {"strategy": "stratified", "labels": [value % 2 for value in VALUES]},
        {"strategy": "stratified", "labels": lambda value: value % 2},
        {"strategy": "weighted", "weights": VALUES},
        {"strategy": "importance", "scores": VALUES},
        {"strategy": "curriculum", "curriculum": {"metrics": {"m": metric}}, "batch_size": 3},
    ):
        assert set(epoch({**config, "subset": subset})) == members
    config = {"strategy": "curriculum", "curriculum": {"metrics": {"m": metric}}, "batch_size": 3, "subset": subset}
    assert {VALUES[index] for index in epoch(config)[:3]} == {3, 4}


def test_importance_draws_by_the_exponential_of_the_score() -> None:
    scores = np.log([1.0, 2.0, 3.0, 4.0])
    drawn = DataSampler(range(4), {"strategy": "importance", "scores": scores, "replacement": True, "seed": 1})
    shares = np.bincount(drawn.sample_at(np.arange(40_000))) / 40_000
    assert np.abs(shares - [0.1, 0.2, 0.3, 0.4]).max() < 0.01
    # At twice the temperature the weights are the roots.
    flat = DataSampler(
        range(4), {"strategy": "importance", "scores": scores, "temperature": 2, "replacement": True, "seed": 1}
    )
    roots = np.sqrt([1, 2, 3, 4])
    assert np.abs(np.bincount(flat.sample_at(np.arange(40_000))) / 40_000 - roots / roots.sum()).max() < 0.01
    for far in (2000, 1e307):  # exponentials beyond floats, and differences
        once = DataSampler(range(4), {"strategy": "importance", "scores": -far * scores, "temperature": 0.01})
        assert once.sample_at(np.arange(4)).tolist() == [0, 1, 2, 3]
        assert (once.epoch_size, once.num_excluded) == (4, 0)


def test_weights_may_lie_in_a_file(tmp_path: Any) -> None:
    np.save(tmp_path / "w.npy", np.arange(12.0))
    stored = DataSampler(VALUES, {"strategy": "weighted", "weights": str(tmp_path / "w.npy")})
    given_ones = DataSampler(VALUES, {"strategy": "weighted", "weights": np.arange(12.0)})
    assert stored.sample_at(np.arange(30)).tolist() == given_ones.sample_at(np.arange(30)).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"subset": {}}, "exactly one of count, percent, predicate and indices; got none"),
        ({"subset": {"count": 1, "percent": 2}}, "got \\['count', 'percent'\\]"),
        ({"subset": {"count": 13}}, "count=13, but there are 12 samples"),
        ({"subset": {"predicate": lambda value: False}}, "true for none of 12 samples"),
        ({"subset": {"indices": [1, 1]}}, "1 of 2 are repeats"),
        ({"subset": {"indices": [-1]}}, "sample -1 does not exist"),
        ({"subset": {"indices": [0, 12]}}, "sample 12 does not exist; there are 12"),
        ({"subset": {"indices": [0.5]}}, "expected sample numbers, got float64"),
        ({"temperature": 2}, "used by strategy 'importance'"),
        ({"strategy": "importance"}, "needs scores"),
        ({"strategy": "importance", "scores": ["a"] * 12}, "expected numbers"),
        ({"strategy": "importance", "scores": [0.0] * 11 + [np.inf]}, "sample 11 has the score inf"),
        ({"strategy": "weighted", "weights": "nowhere.npy"}, "no such file"),
    ],
)
def test_mistakes_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSampler(VALUES, config)
