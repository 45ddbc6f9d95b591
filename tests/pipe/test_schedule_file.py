"""Schedules and timelines as files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock._core.files import CorruptFileError
from penstock.pipe.schedule import (
    SCHEDULES,
    Costs,
    Schedule,
    ScheduleError,
    get_schedule,
    load_schedule,
    load_timeline,
    save_schedule,
    save_timeline,
    simulate,
    timeline_from_json,
    timeline_to_json,
)
from penstock.runtime.config_sections import PipeSection

VALID: dict[str, Any] = {
    "format": "penstock.schedule",
    "version": 1,
    "name": "mine",
    "micro_batches": 1,
    "slices": 1,
    "placement": [0, 1],
    "forward_only": False,
    "ranks": ["0F0,0B0", "1F0,1I0,1W0"],
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(name=st.sampled_from(list(SCHEDULES)), p=st.integers(1, 5), m=st.integers(1, 8))
def test_saved_and_loaded_again(tmp_path: Path, name: str, p: int, m: int) -> None:
    schedule = get_schedule(name, p, m)
    path = tmp_path / "schedule.json"
    save_schedule(schedule, path, {"costs": [1, 2]})
    assert load_schedule(path) == schedule
    assert get_schedule(str(path), p, m, slices=schedule.slices) == schedule
    assert json.loads(path.read_text())["notes"] == {"costs": [1, 2]}
    timeline = simulate(schedule, Costs(forward=0.1, weight_gradient=0.7))
    save_timeline(timeline, path)
    read = load_timeline(path)
    assert read.schedule == schedule
    assert list(read.events()) == list(timeline.events())
    assert (read.makespan, read.spans, read.unit) == (timeline.makespan, timeline.spans, timeline.unit)


def _written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({**VALID, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "penstock.timeline"}, "not a penstock.schedule file"),
        ({"version": 2}, "version 2 is not known; this version of penstock reads 1"),
        ({"name": 3}, "'name' must be of type str, found 3"),
        ({"micro_batches": True}, "'micro_batches' must be of type int, found True"),
        ({"placement": [0, "1"]}, "'placement' must list a rank for every stage"),
        ({"ranks": "0F0"}, "'ranks' must list a line of actions"),
        ({"ranks": ["0F0,0B0", 3]}, "'ranks' must list a line of actions"),
        ({"ranks": ["0F0,0B0", "1F0,1X0"]}, "'1X0' is not a schedule action"),
        ({"ranks": ["0F0,0B0", "1F0,1B0", "2F0,2B0"]}, r"make placement \[0, 1, 2\], the file says \[0, 1\]"),
        ({"ranks": ["0F0,0B0,0F1,0B1", "1F0,1B0,1F1,1B1"]}, "make micro_batches 2, the file says 1"),
        ({"ranks": ["0F0,0B0", "1B0,1F0"]}, "rank 1, action 1B0: it comes before 1F0"),
        ({"ranks": ["0F0,0B0", "1F0,1I0"]}, "rank 1, action 1W0: it is missing"),
    ],
)
def test_a_file_that_is_no_schedule_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _written(tmp_path, **changes)
    with pytest.raises(ScheduleError, match=message) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="the file is missing"):
        get_schedule(str(tmp_path / "none.json"), 2, 1)
    (tmp_path / "torn.json").write_text('{"format"')
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        load_schedule(tmp_path / "torn.json")


def test_a_file_for_another_run_is_refused(tmp_path: Path) -> None:
    path = str(_written(tmp_path))
    assert get_schedule(path, 2, 1, chunks=1).name == "mine"
    with pytest.raises(
        ScheduleError, match=r"made for 2 ranks, 2 stages, 1 micro-batches .* has 4 ranks, 2 stages, 8 m"
    ):
        get_schedule(path, 4, 8)
    with pytest.raises(ScheduleError, match="the run has 2 ranks, 4 stages, 1 micro-batches and 3 slices"):
        get_schedule(path, 2, 1, chunks=2, slices=3)


def test_a_run_can_name_a_file(tmp_path: Path) -> None:
    path = str(_written(tmp_path))
    assert PipeSection(stages=2, schedule=path).schedule == path
    save_schedule(get_schedule("forward_only", 2, 1), path)
    with pytest.raises(ValueError, match="without backward passes cannot train"):
        PipeSection(stages=2, schedule=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "not a penstock.timeline file"),
        ({"unit": None}, "needs a 'unit', a 'schedule' and the 'columns'"),
        ({"columns": ["rank"]}, "needs a 'unit'"),
        ({"events": None}, "None is not an event"),
        ({"events": [[0, 0, "F", 0, 1.0, 0.5]]}, "with start <= end"),
        ({"events": [[0, 0, "F", 0, 0.0, float("inf")]]}, "with start <= end"),
        ({"events": [[0, 0, "F", -1, 0.0, 1.0]]}, "is not an event"),
        ({"events": [[3, 0, "F", 0, 0.0, 1.0]]}, "is on rank 3, but stages are placed on 2 ranks"),
        ({"events": [[0, 0, "F", 0, 0.0, 1.0]]}, "every rank must hold at least one stage"),
        ({"events": [[0, 0, "F", 0, 0.0, 1.0], [1, 1, "SEND_F", 0, 0.0, 1.0]]}, "compute actions only"),
        ({"events": [[0, 0, "F", 0, 0.0, 1.0], [1, 1, "F", 0, 0.0, 1.0]]}, "make forward_only True, the file says"),
    ],
)
def test_an_object_that_is_no_timeline(changes: dict[str, Any], message: str) -> None:
    value = timeline_to_json(simulate(Schedule.from_text("0F0,0B0\n1F0,1B0", "x"))) | changes
    with pytest.raises(ScheduleError, match=message) as caught:
        timeline_from_json(value, "run.json")
    assert "run.json: " in str(caught.value)


def test_the_timelines_rows() -> None:
    value = timeline_to_json(simulate(Schedule.from_text("0F0\n1F0", "x"), Costs(forward=[2.0, 1.5], transfer=0.25)))
    assert value["columns"] == ["rank", "stage", "op", "micro_batch", "start", "end"]
    assert value["events"] == [[0, 0, "F", 0, 0.0, 2.0], [1, 1, "F", 0, 2.25, 3.75]]
