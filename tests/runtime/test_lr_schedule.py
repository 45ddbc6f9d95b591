import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.config import load_config
from penstock.runtime.lr_schedule import LRSchedule, lr_schedule


def test_the_curve_at_points_computed_by_hand() -> None:
    schedule = LRSchedule(peak=1.0, total_tokens=1100, warmup_tokens=100, decay="cosine", min_ratio=0.2)
    expected = {0: 0.0, 25: 0.25, 100: 1.0, 600: 0.6, 1100: 0.2, 5000: 0.2, 350: 0.6 + 0.4 * math.sqrt(0.5)}
    for tokens, rate in expected.items():
        assert schedule.lr_at(tokens) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(("decay", "middle", "end"), [("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_other_decays(decay: str, middle: float, end: float) -> None:
    schedule = LRSchedule(peak=2.0, total_tokens=200, warmup_tokens=0, decay=decay, min_ratio=0.1)
    assert schedule.lr_at(0) == 2.0
    assert schedule.lr_at(100) == pytest.approx(2.0 * middle)
    assert schedule.lr_at(200) == pytest.approx(2.0 * end)


@given(
    total=st.integers(1, 10**13),
    warmup=st.floats(0, 1),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    ratio=st.floats(0, 1),
    tokens=st.lists(st.floats(0, 2), min_size=2, max_size=20),
)
def test_rises_to_the_peak_then_never_rises(
    total: int, warmup: float, decay: str, ratio: float, tokens: list[float]
) -> None:
    schedule = LRSchedule(3e-4, total, int(total * warmup), decay, ratio)
    points = sorted(int(total * share) for share in tokens)
    rates = [schedule.lr_at(point) for point in points]
    slack = 1e-15
    assert all(0 <= rate <= 3e-4 + slack for rate in rates)
    for (a, rate_a), (b, rate_b) in zip(
        zip(points, rates, strict=True), list(zip(points, rates, strict=True))[1:], strict=False
    ):
        if b <= schedule.warmup_tokens and schedule.warmup_tokens < total:
            assert rate_a <= rate_b + slack
        if a >= schedule.warmup_tokens:
            assert rate_a >= rate_b - slack
            assert rate_b >= 3e-4 * ratio - slack


def test_first_step_learns_and_warm_up_ends_at_the_peak() -> None:
    schedule = LRSchedule(peak=1.0, total_tokens=1000, warmup_tokens=100)
    assert schedule.lr_for_step(0, 40) == pytest.approx(0.4)
    assert schedule.lr_for_step(40, 40) == pytest.approx(0.8)
    assert schedule.lr_for_step(80, 40) == 1.0  # the step that crosses the end of warm-up
    assert schedule.lr_for_step(120, 40) == schedule.lr_at(120)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"peak": 0.0}, "positive and finite"),
        ({"peak": math.inf}, "positive and finite"),
        ({"total_tokens": 0}, "total_tokens=0"),
        ({"warmup_tokens": 101}, "101 tokens does not fit into total_tokens=100"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"decay": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LRSchedule(**{"peak": 1.0, "total_tokens": 100, **arguments})  # type: ignore[arg-type]


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        LRSchedule(peak=1.0, total_tokens=100).lr_at(-1)


BASE = {"train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 50}, "data": {"sequence_length": 8}}


def test_from_a_configuration() -> None:
    plain = lr_schedule(load_config(BASE, ["optimizer.lr=0.01"]))
    assert plain == LRSchedule(0.01, 50 * 32, 0, "cosine", 0.1)
    steps = lr_schedule(load_config(BASE, ["schedule.warmup_steps=5", "schedule.decay=linear"]))
    assert (steps.warmup_tokens, steps.decay) == (5 * 32, "linear")
    tokens = lr_schedule(load_config(BASE, ["schedule.warmup_tokens=7", "schedule.total_tokens=900"]))
    assert (tokens.warmup_tokens, tokens.total_tokens) == (7, 900)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warm-up of 1632 tokens is longer than the 1600 .*32 per step"):
        lr_schedule(load_config(BASE, ["schedule.warmup_steps=51"]))


def test_without_a_sequence_length_the_tokens_must_be_given() -> None:
    config = load_config({"train": BASE["train"]})
    with pytest.raises(ValueError, match=r"set data\.sequence_length"):
        lr_schedule(config)
    assert lr_schedule(config, tokens_per_step=10).total_tokens == 500
