import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.runtime.display import Display
from penstock.runtime.units import duration, percent, quantity


@dataclass(frozen=True)
class Step:
    step: int
    loss: float = 2.0
    lr: float = 3e-4
    tokens: int = 0
    kept_tokens: int | None = None
    difficulty: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.5
    bubble_seconds: float = 0.125


def shown(steps: range, *, total: int, terminal: bool = False, enabled: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None, legacy_windows=False)
    with Display(total, log_every=10, enabled=enabled, console=console) as display:
        for step in steps:
            report = Step(step, tokens=1000 * (step + 1), kept_tokens=48, difficulty={"seqlen": 64.0})
            display.update(report, bytes_sent=123_456 * (step + 1))
        display.note("evaluated [here]: 3.5")
    return out.getvalue()


def test_without_a_terminal_there_are_plain_lines() -> None:
    lines = shown(range(25), total=25).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 10/25",
        "step 20/25",
        "step 25/25",
        "evaluated [here]: 3.5",
    ]
    assert lines[0] == (
        "step 10/25  loss 2.0000  lr 3.00e-04  2 k tokens/s  seqlen 64  kept 48  "
        "rank 0: sent 123 kB/step  bubble 25.0 %  0:08 left"
    )
    assert "\x1b" not in "".join(lines)


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    lines = shown(range(17, 25), total=25).splitlines()
    assert "2 k tokens/s" in lines[0]
    assert "rank 0: sent 123 kB/step" in lines[0]


def test_on_a_terminal_one_line_is_kept_up_to_date() -> None:
    out = shown(range(7), total=25, terminal=True)
    assert "step 7/25" in out
    assert "\x1b[" in out  # moves the cursor back over the line
    assert "evaluated [here]: 3.5" in out


def test_other_ranks_show_nothing() -> None:
    assert shown(range(25), total=25, enabled=False) == ""
    assert shown(range(25), total=25, enabled=False, terminal=True) == ""


def test_what_is_unknown_is_left_out() -> None:
    out = io.StringIO()
    with Display(1, console=Console(file=out)) as display:
        display.update(Step(0, seconds=0.0), bytes_sent=0)
    assert out.getvalue() == "step 1/1  loss 2.0000  lr 3.00e-04  0:00 left\n"


def test_speed_is_that_of_recent_steps() -> None:
    out = io.StringIO()
    with Display(60, log_every=60, console=Console(file=out)) as display:
        for step in range(60):
            slow = step < 40  # compilation, cold caches
            display.update(Step(step, tokens=100 * step, seconds=10.0 if slow else 0.1), bytes_sent=0)
    assert "1 k tokens/s" in out.getvalue()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        Display(0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (12_345_678, "12.3 MB"),
        (2e21, "2e+03 EB"),
        (0.5, "0.5 B"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value, "B") == text


@given(st.floats(1e-3, 1e20))
def test_a_quantity_is_within_half_a_percent(value: float) -> None:
    digits, _, prefix = quantity(value).partition(" ")
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[prefix]
    assert float(digits) * scale == pytest.approx(value, rel=5.1e-3)


def test_durations_and_percentages() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3599, 3661)] == ["0:00", "1:00", "1:01", "59:59", "1:01:01"]
    assert percent(0.1234) == "12.3 %"
