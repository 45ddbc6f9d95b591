"""What changes an order while a run is under way: stretches left out, and births that wait for the validation loss."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from penstock.data_pipeline.data_sampling import DataSampler
from penstock.data_pipeline.data_sampling.growing import GrowingOrder
from penstock.data_pipeline.data_sampling.pacing import Pacer, PacingConfig
from penstock.data_pipeline.data_sampling.skips import SkipRanges

VALUES = [7, 1, 5, 3, 1, 9, 2, 8, 4, 6, 5, 3]

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda pair: (pair[0], sum(pair))), max_size=5)


@given(ranges)
def test_places_are_those_that_are_left(skipped: list[tuple[int, int]]) -> None:
    left = [place for place in range(90) if not any(first <= place < end for first, end in skipped)]
    assert SkipRanges(skipped).places(np.arange(40)).tolist() == left[:40]


@given(ranges, ranges, st.integers(0, 40))
def test_runs_agree_up_to_where_their_ranges_have_begun_alike(
    some: list[tuple[int, int]], others: list[tuple[int, int]], k: int
) -> None:
    first, second = SkipRanges(some), SkipRanges(others)
    if first.begun_before(k) == second.begun_before(k):
        assert first.places(np.arange(k)).tolist() == second.places(np.arange(k)).tolist()


def test_a_resumed_run_leaves_out_what_lies_ahead_only() -> None:
    config: dict[str, Any] = {"strategy": "random", "batch_size": 2, "epochs": 4}
    whole = DataSampler(VALUES, config).sample_at(np.arange(48)).tolist()
    sampler = DataSampler(VALUES, config)
    sampler.mark_trained(3)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = DataSampler(VALUES, {**config, "skip_ranges": [[6, 10], [20, 21]]})
    resumed.load_state_dict(state)
    assert [index for batch in resumed for index in batch][:20] == whole[10:20] + whole[21:31]
    resumed.mark_trained(1)
    with pytest.raises(ValueError, match=r"by position 8 the run had passed over skip_ranges \[\(6, 10\)\], but"):
        sampler.load_state_dict(resumed.state_dict())
    DataSampler(VALUES, {**config, "skip_ranges": [[6, 10]]}).load_state_dict(resumed.state_dict())
    with pytest.raises(ValueError, match=r"\(5, 5\) is not a stretch"):
        DataSampler(VALUES, {"skip_ranges": [[5, 5]]})


def test_a_curriculum_that_is_a_warm_up_ends_in_the_plain_order() -> None:
    metric = {"values": VALUES, "schedule_type": "fixed_discrete"}
    metric["schedule_config"] = {"difficulty": [2, 4], "max_step": [1]}
    curriculum = {"metrics": {"m": metric}, "until_step": 5}
    sampler = DataSampler(VALUES, {"strategy": "curriculum", "batch_size": 3, "curriculum": curriculum, "seed": 4})
    warm = sampler.sample_at(np.arange(15))
    assert {VALUES[index] for index in warm[:6]} == {1, 2}
    assert {VALUES[index] for index in warm} == {1, 2, 3, 4}
    plain = DataSampler(VALUES, {"strategy": "random", "seed": 4})
    assert sampler.sample_at(np.arange(15, 39)).tolist() == plain.sample_at(np.arange(24)).tolist()
    parts = [sampler.sample_at(np.arange(15)), sampler.sample_at(np.arange(15, 39))]
    assert sampler.sample_at(np.arange(39)).tolist() == np.concatenate(parts).tolist()
    assert [sampler.difficulty_at(k) for k in (0, 5, 6, 14, 15)] == [{"m": 2}, {"m": 2}, {"m": 4}, {"m": 4}, {}]
    assert sampler.num_excluded == 0


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(1, 7),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_a_birth_never_changes_what_was_drawn_before(sizes: list[int], grid: int, gaps: list[int], seed: int) -> None:
    births = (np.cumsum([0, *gaps])[: len(sizes)] * grid).tolist()
    length = births[-1] + 3 * sum(sizes)
    final = GrowingOrder(sizes, births, seed, grid)(np.arange(length)).tolist()
    for known in range(1, len(sizes)):
        before = GrowingOrder(sizes[:known], births[:known], seed, grid)(np.arange(length)).tolist()
        assert before[: births[known]] == final[: births[known]]
    # Within a pass nothing repeats: counts of what is in from the start differ by one at most, pass by pass.
    counts = Counter(final[: births[1]])
    assert max(counts.values()) - min(counts[slot] for slot in range(sizes[0])) <= 1


def paced(**pacing: Any) -> dict[str, Any]:
    metric = {"values": VALUES, "schedule_type": "fixed_discrete"}
    metric["schedule_config"] = {"difficulty": [2, 5, 9], "max_step": [1, 2]}
    curriculum = {"metrics": {"m": metric}, "pacing": {"every": 2, **pacing}}
    return {"strategy": "curriculum", "batch_size": 3, "epochs": 20, "curriculum": curriculum}


def test_blocks_enter_when_the_validation_loss_stalls() -> None:
    sampler = DataSampler(VALUES, paced(min_improvement=0.1))
    seen: list[list[int]] = []
    reports = {2: 5.0, 4: 4.0, 6: 3.9, 8: 3.0, 10: 3.0, 12: 2.9, 14: 2.9}
    entered = []
    states: dict[int, Any] = {}
    for step in range(1, 17):
        seen.append(next(iter(sampler)))
        sampler.mark_trained()
        if step in reports and sampler.report_validation(reports[step]):
            entered.append(step)
        states[step] = json.loads(json.dumps(sampler.state_dict()))
    assert entered == [6, 10]  # the first report after a birth is what the next ones are compared with
    hardest = [max(VALUES[index] for index in batch) for batch in seen]
    assert max(hardest[:8]) <= 2 < max(hardest[8:12]) <= 5 < max(hardest[12:])
    assert [sampler.difficulty_at(3 * step)["m"] for step in (0, 7, 8, 11, 12)] == [2, 2, 5, 5, 9]
    resumed = DataSampler(VALUES, paced(min_improvement=0.1))
    resumed.load_state_dict(states[7])
    assert next(iter(resumed)) == seen[7]
    for step in (8, 9, 10):
        resumed.mark_trained()
        if step in reports:
            resumed.report_validation(reports[step])
    assert resumed.state_dict() == states[10]
    assert resumed.sample_at(np.arange(36, 48)).tolist() == [index for batch in seen[12:16] for index in batch]


def test_patience_and_mistakes() -> None:
    pacer = Pacer(PacingConfig(every=4, patience=2, min_improvement=0), 2)
    assert [pacer.report(step, loss) for step, loss in ((1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0), (5, 2.0))] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert pacer.births == [0, 8]
    assert not pacer.report(9, 5.0)  # all blocks are in
    with pytest.raises(ValueError, match="a validation loss of nan"):
        pacer.report(9, float("nan"))
    with pytest.raises(ValueError, match="not a log of births on multiples of 4 steps"):
        pacer.load_state_dict({"births": [0, 3], "best": None, "waited": 0})
    with pytest.raises(ValueError, match=r"set curriculum\.pacing"):
        DataSampler(VALUES).report_validation(1.0)
    sampler = DataSampler(VALUES, paced())
    assert sampler.paced
    assert not sampler.report_validation(1.0, step=1)
    for _ in zip(range(3), DataLoader(VALUES, batch_sampler=sampler), strict=False):
        pass
    with pytest.raises(ValueError, match=r"were handed out already; raise pacing\.every"):
        sampler.report_validation(1.0, step=1)
