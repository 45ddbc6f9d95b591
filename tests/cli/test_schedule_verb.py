"""``penstock schedule``: schedules of every kind, files, pictures and the search."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.pipe.schedule import get_schedule, load_schedule, load_timeline, place_communication


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_both_bubbles_and_the_peak_are_printed() -> None:
    out = run("schedule", "zb_h2", "-p", 4, "-m", 8).output
    assert "zb_h2, 4 stages on 4 ranks, 8 micro-batches: valid" in out
    assert "bubble fraction   0.111111 of the makespan" in out
    assert "0.000000 of the longest rank's span" in out
    assert "peak activations  7, 7, 7, 7  (kept at a time, by rank)" in out
    out = run("schedule", "seq1f1b", "-p", 2, "-m", 3, "--slices", 4, "--backward", 1).output
    assert "2 stages on 2 ranks, 3 micro-batches of 4 slices: valid" in out
    assert "makespan          26" in out
    assert "6 stages on 2 ranks" in run("schedule", "looped_bfs", "-p", 2, "-m", 3, "--chunks", 3).output


def test_costs_come_from_a_file(tmp_path: Path) -> None:
    costs = tmp_path / "costs.yaml"
    costs.write_text("forward: [1.0, 3.0]\nbackward: 2\ntransfer: [0.5]\n")
    # F0 1, message 0.5, F 3, B 2, message 0.5, B 2.
    assert "makespan          9\n" in run("schedule", "1f1b", "-p", 2, "-m", 1, "--costs", costs).output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forwards: 1", "unknown cost 'forwards'; did you mean 'forward'?"),
        ("forward: fast", "'forward' must be a number or a list of numbers, found 'fast'"),
        ("forward: [1, yes]", "must be a number or a list of numbers"),
        ("[1, 2]", "must be a table of costs"),
        ("forward: [1", "cannot be read as YAML or JSON"),
        ("forward: [1, 2, 3]", "costs of F are given for 3 stages, the schedule has 2"),
    ],
)
def test_a_file_that_holds_no_costs(tmp_path: Path, text: str, message: str) -> None:
    costs = tmp_path / "costs.yaml"
    costs.write_text(text)
    result = run("schedule", "1f1b", "-p", 2, "-m", 1, "--costs", costs)
    assert result.exit_code == 2
    assert message in result.output


def test_everything_is_written(tmp_path: Path) -> None:
    files = {what: tmp_path / f"out.{what}" for what in ("svg", "html", "trace")}
    saved, timeline = tmp_path / "mine.json", tmp_path / "times.json"
    options = [part for what, path in files.items() for part in (f"--{what}", path)]
    assert run("schedule", "zb_v", "-p", 2, "-m", 3, "--save", saved, "--timeline", timeline, *options).exit_code == 0
    assert load_schedule(saved) == load_timeline(timeline).schedule == get_schedule("zb_v", 2, 3)
    assert files["svg"].read_text().startswith("<svg ")
    assert "<svg " in files["html"].read_text()
    assert len(json.loads(files["trace"].read_text())["traceEvents"]) == 36 + 5
    assert "zb_v, 4 stages on 2 ranks" in run("schedule", saved, "-p", 2, "-m", 3).output
    assert "made for 2 ranks" in run("schedule", saved, "-p", 4, "-m", 3).output


def test_csv_with_sends_and_receives() -> None:
    out = run("schedule", "1f1b", "-p", 2, "-m", 2, "--csv", "--communication").output
    assert out == "".join(",".join(map(str, steps)) + "\n" for steps in place_communication(get_schedule("1f1b", 2, 2)))


def test_the_search_says_what_it_found_and_saves_it(tmp_path: Path) -> None:
    saved = tmp_path / "mine.json"
    rules = ("--search", "--memory", 3, "--no-solver")
    out = run("schedule", "loop", "-p", 2, "-m", 3, *rules, "--save", saved).output
    assert "best built-in: zb_h1, 10" in out
    assert "proved to be among the shortest" in out
    assert load_schedule(saved).placement == (0, 1)
    assert json.loads(saved.read_text())["notes"]["memory"] == 3
    out = run("schedule", "loop", "-p", 2, "-m", 2, "--chunks", 2, "--search", "--no-solver").output
    assert "searched, 4 stages on 2 ranks" in out or "looped_bfs" in out or "interleaved_1f1b" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("1f1b", "--memory", 3), "--memory limits what --search looks for; give both or neither"),
        (("v", "--search", "--slices", 2), "--search does not cut micro-batches into slices"),
        (("1f1b", "--search"), "unknown placement '1f1b'"),
        (("loop", "--search", "--memory", 0.5), "one micro-batch alone keeps 1 on rank 0, the memory is 0.5"),
        (("1f1b", "--slices", 2), "does not cut micro-batches into slices"),
        (("zb_h1", "--chunks", 2), "'zb_h1' holds 1 stage(s) per rank, got chunks=2"),
        (("none.json",), "none.json: the file is missing"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[object, ...], message: str) -> None:
    result = run("schedule", *options, "-p", 2, "-m", 4)
    assert result.exit_code == 2
    assert message in result.output
