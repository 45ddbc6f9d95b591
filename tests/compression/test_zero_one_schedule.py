import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.compression.optim.zero_one_schedule import ZeroOneSchedule


@given(freeze=st.integers(1, 300), kappa=st.integers(1, 20), scaler=st.integers(1, 40), clipper=st.integers(1, 33))
def test_it_is_the_rule_that_is_carried_along_step_by_step(freeze: int, kappa: int, scaler: int, clipper: int) -> None:
    schedule = ZeroOneSchedule(freeze, kappa, scaler, clipper)
    interval, count, updates = 1, 0, 0
    local_interval, local_count = 1, 0
    for step in range(1, 400):
        update = step <= freeze and step % interval == 0
        if update:
            updates, count = updates + 1, count + 1
            if count == kappa:
                interval, count = 2 * interval, 0
        assert schedule.updates_variance(step) == update
        assert schedule.variance_updates(step) == updates
        assert schedule.interval(step) == local_interval
        assert schedule.exchanges(step) == (step % local_interval == 0)
        if step > freeze:
            local_count += 1
            if local_count == scaler:
                local_interval, local_count = min(clipper, 2 * local_interval), 0


def test_the_first_step_has_a_variance_and_the_late_ones_cost_nothing() -> None:
    assert ZeroOneSchedule().updates_variance(1)
    late = ZeroOneSchedule(local_step_scaler=1, var_update_scaler=1)
    assert late.interval(10**15) == 16
    assert not late.updates_variance(10**15)


@pytest.mark.parametrize("name", ["var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"])
def test_what_is_not_positive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ZeroOneSchedule(**{name: 0})
