"""Pictures and traces: well-formed, to scale, complete."""

import io
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.pipe.schedule import (
    SCHEDULES,
    Costs,
    Schedule,
    ScheduleError,
    get_schedule,
    html,
    png,
    save_trace,
    simulate,
    svg,
    trace_events,
)

SVG = "{http://www.w3.org/2000/svg}"


def _boxes(text: str) -> dict[str, tuple[float, float, float]]:
    """For each action's tooltip: where its box is from left, from above, and how wide."""
    boxes = {}
    for rect in ET.fromstring(text).iter(f"{SVG}rect"):
        tip = rect.find(f"{SVG}title")
        if tip is not None:
            assert tip.text is not None
            boxes[tip.text] = (float(rect.attrib["x"]), float(rect.attrib["y"]), float(rect.attrib["width"]))
    return boxes


def test_boxes_are_to_scale() -> None:
    timeline = simulate(Schedule.from_text("0F0,0B0\n1F0,1B0", "two"), Costs(forward=1, backward=[3.0, 2.0]))
    boxes = _boxes(svg(timeline, width=772))  # 100 pixels a unit, beside the margins
    assert {tip: (round(x), round(w)) for tip, (x, _, w) in boxes.items()} == {
        "0F0: 0 to 1": (64, 100),
        "1F0: 1 to 2": (164, 100),
        "1B0: 2 to 4": (264, 200),
        "0B0: 4 to 7": (464, 300),
    }
    rows = {tip[0]: y for tip, (_, y, _) in boxes.items()}
    assert rows["0"] < rows["1"]


@settings(max_examples=30)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 6), st.integers(1, 9), st.integers(200, 3000))
def test_every_action_is_in_the_picture_and_in_the_trace(name: str, p: int, m: int, width: int) -> None:
    timeline = simulate(get_schedule(name, p, m))
    boxes = _boxes(svg(timeline, width=width))
    wanted = sorted(str(event.action) for event in timeline.events())
    assert sorted(tip.split(":")[0] for tip in boxes) == wanted
    assert all(x >= 0 and x + wide <= width for x, _, wide in boxes.values())
    trace = trace_events(timeline, seconds_per_unit=1e-3)
    found = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert sorted(event["name"] for event in found) == wanted
    assert max(event["ts"] + event["dur"] for event in found) == pytest.approx(timeline.makespan * 1000)
    assert {event["tid"] for event in found} == set(range(p))


def test_the_page_stands_alone_and_names_are_escaped(tmp_path: Path) -> None:
    timeline = simulate(Schedule.from_text("0F0,0B0", "<mine> & yours"))
    page = html(timeline)
    assert "&lt;mine&gt; &amp; yours" in page
    assert "<mine>" not in page
    assert "src=" not in page
    assert "href=" not in page
    assert "<th>bubble, of the makespan</th><td>0.0000</td>" in page
    save_trace(timeline, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == trace_events(timeline)


def test_a_timeline_of_no_length_is_drawn() -> None:
    assert len(_boxes(svg(simulate(Schedule.from_text("0F0,0F1"), Costs(forward=0.0))))) == 2


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ScheduleError, match="at least 200 pixels, got 100"):
        svg(simulate(get_schedule("1f1b", 2, 2)), width=100)
    with pytest.raises(ScheduleError, match="has 20480 actions, a picture shows at most 20000"):
        svg(simulate(get_schedule("1f1b", 16, 640)))


def test_a_png_has_the_same_boxes_in_the_same_colours() -> None:
    image = pytest.importorskip("matplotlib.image")
    timeline = simulate(Schedule.from_text("0F0,0B0\n1F0,1B0", "two"), Costs(forward=1, backward=[3.0, 2.0]))
    data = png(timeline, width=772)  # 100 pixels a unit, beside the margins
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = (255 * image.imread(io.BytesIO(data), format="png")).round().astype(int)
    text = svg(timeline, width=772)
    assert pixels.shape[:2] == (int(ET.fromstring(text).attrib["height"]), 772)

    def colour(x: float, y: float) -> str:
        return "#{:02x}{:02x}{:02x}".format(*pixels[int(y), int(x), :3])

    for rect in ET.fromstring(text).iter(f"{SVG}rect"):
        if rect.find(f"{SVG}title") is not None:
            x, y, width = (float(rect.attrib[name]) for name in ("x", "y", "width"))
            assert {colour(x + 4, y + 5), colour(x + width - 4, y + 20)} == {rect.attrib["fill"]}
    assert colour(664, 34 + 30 + 5) == "#f0f0f0"  # the second rank has nothing to do there
    with pytest.raises(ScheduleError, match="at least 200 pixels"):
        png(timeline, width=100)


def test_a_png_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a PNG needs matplotlib: pip install 'penstock\[report\]'"):
        png(simulate(get_schedule("1f1b", 2, 2)))
