"""The sequence of loss scales, against DeepSpeed's rules written out another way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.config_sections import FP16Section
from penstock.runtime.loss_scaler import LossScaler


def expected(overflows: list[bool], section: FP16Section) -> list[float]:
    """Scales after each step by DeepSpeed's documented rules, in terms of step numbers; ends where training must."""
    scale, credit, last = 2.0**section.initial_scale_power, section.hysteresis, -1
    scales = []
    for step, overflow in enumerate(overflows):
        if overflow:
            if credit == 1:
                if scale <= section.min_loss_scale:
                    return scales
                scale = max(scale / 2, section.min_loss_scale)
            credit = max(1, credit - 1)
            last = step
        else:
            if section.consecutive_hysteresis:
                credit = section.hysteresis
            if (step - last) % section.loss_scale_window == 0:
                credit = section.hysteresis
                scale *= 2
        scales.append(scale)
    return scales


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 6),
    st.sampled_from([0.25, 1.0]),
    st.integers(0, 60),
)
def test_scales_follow_deepspeeds_rules_also_across_a_resume(
    overflows: list[bool], window: int, hysteresis: int, consecutive: bool, power: int, least: float, stop: int
) -> None:
    section = FP16Section(
        initial_scale_power=power,
        loss_scale_window=window,
        hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
        min_loss_scale=least,
    )
    scaler = LossScaler(section)
    scales = []
    for step, overflow in enumerate(overflows):
        if step == stop:
            resumed = LossScaler(section)
            resumed.load_state_dict(scaler.state_dict())
            scaler = resumed
        try:
            scaler.update(overflowed=overflow)
        except FloatingPointError:
            break
        scales.append(scaler.scale)
    assert scales == expected(overflows, section)
    assert scaler.skipped >= sum(overflows[: len(scales)])


def test_a_fixed_scale_stays_and_ends_at_its_first_overflow() -> None:
    scaler = LossScaler(FP16Section(loss_scale=128.0, loss_scale_window=1))
    for _ in range(5):
        scaler.update(overflowed=False)
    assert scaler.scale == 128.0
    with pytest.raises(FloatingPointError, match=r"at a loss scale of 128, fixed by fp16\.loss_scale; lower"):
        scaler.update(overflowed=True)


def test_a_scale_that_starts_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="initial_scale_power=2 starts at a scale of 4, below min_loss_scale=8"):
        FP16Section(initial_scale_power=2, min_loss_scale=8)
