"""A ledger's summary: for every cost what was spent, what the plain run would have spent, and what that saves."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from penstock._core.meter import ACTIVATIONS, CONTROL, MODEL, REPLICAS, TIED
from penstock.runtime.units import percent, quantity

_KIND_TITLES = {
    REPLICAS: "between replicas",
    TIED: "tied weights",
    ACTIVATIONS: "activations",
    MODEL: "tensor parallel",
    CONTROL: "control",
}


def summarize(state: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a ledger, of one process or merged over all, as a JSON value.

    Args:
        state: From :meth:`penstock.runtime.ledger.Ledger.state_dict` or :func:`penstock.runtime.ledger.merge`.

    Returns:
        ``steps``, ``ranks``, and for each cost ``{"spent", "plain", "saved"}``: ``samples``, ``raw_tokens``,
        ``layer_tokens``, ``flops``, ``bytes_sent`` and ``bytes_received`` (by kind), ``bubble_fraction``, ``wall_s``,
        ``bubble_s``, ``peak_memory_bytes`` (by kind, of the largest process). ``saved`` is ``1 - spent / plain``; it
        and ``plain`` are None where the plain run's cost has no formula. ``layers`` holds ``layer_tokens`` for each
        layer by itself.
    """
    spent, plain, meter = state["spent"], state["plain"], state["meter"]
    layers = {layer: _line(kept, full) for layer, (kept, full) in state["layer_tokens"].items()}
    step_s, bubble_s = state["seconds"]["steps"], state["seconds"]["bubble"]
    return {
        "steps": spent.get("steps", 0),
        "ranks": state["ranks"],
        "samples": _line(spent.get("samples", 0), plain.get("samples", 0)),
        "raw_tokens": _line(spent.get("tokens", 0), plain.get("tokens", 0)),
        "layer_tokens": _line(
            sum(line["spent"] for line in layers.values()), sum(line["plain"] for line in layers.values())
        ),
        "layers": layers,
        "flops": _line(spent.get("flops", 0), plain.get("flops", 0)),
        "bytes_sent": _bytes(meter["sent"], meter.get("spared_sent", {}), plain.get("replica_bytes", 0)),
        "bytes_received": _bytes(meter["received"], meter.get("spared_received", {}), plain.get("replica_bytes", 0)),
        "bubble_fraction": _line(bubble_s / step_s if step_s else 0.0, state["plain_bubble"]),
        "bubble_s": _line(bubble_s, None),
        "wall_s": _line(state["slowest_s"], None),
        "peak_memory_bytes": {kind: _line(peak, None) for kind, peak in state["peak_memory"].items()},
    }


def render(summary: Mapping[str, Any], *, title: str = "What was spent") -> Table:
    """The summary as a table with the columns spent, plain run and saved."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("spent", "plain run", "saved"):
        table.add_column(column, justify="right")

    def row(name: str, line: Mapping[str, Any], unit: str = "") -> None:
        table.add_row(name, _number(line["spent"], unit), _number(line["plain"], unit), _saving(line))

    table.add_row("optimizer steps", _number(summary["steps"]), _number(summary["steps"]), "")
    row("samples", summary["samples"])
    row("raw tokens read", summary["raw_tokens"])
    row("layer-tokens computed", summary["layer_tokens"])
    row("FLOPs", summary["flops"])
    for kind, line in summary["bytes_sent"].items():
        row(f"sent, {_KIND_TITLES.get(kind, kind)}", line, "B")
    for kind, line in summary["bytes_received"].items():
        row(f"received, {_KIND_TITLES.get(kind, kind)}", line, "B")
    row("bubble, of all steps' time", summary["bubble_fraction"], "%")
    row("bubble, all processes", summary["bubble_s"], "s")
    row("wall-clock", summary["wall_s"], "s")
    for kind, line in summary["peak_memory_bytes"].items():
        row(f"peak memory of a process, {kind}", line, "B")
    return table


def _line(spent: float, plain: float | None) -> dict[str, Any]:
    saved = 1.0 - spent / plain if plain else None
    return {"spent": spent, "plain": plain, "saved": saved}


def _bytes(measured: Mapping[str, int], spared: Mapping[str, int], plain_replicas: int) -> dict[str, Any]:
    """Lines by kind; the exchange between replicas differs in the plain run, and what compression spared."""
    lines = {
        kind: _line(count, count + spared.get(kind, 0)) for kind, count in sorted(measured.items()) if kind != REPLICAS
    }
    if REPLICAS in measured or plain_replicas:
        lines = {REPLICAS: _line(measured.get(REPLICAS, 0), plain_replicas), **lines}
    return lines


def _number(value: float | None, unit: str = "") -> str:
    """A cell of the table; empty for what is not known."""
    if value is None:
        return ""
    if unit == "%":
        return percent(value)
    return f"{value:.1f} s" if unit == "s" else quantity(value, unit)


def _saving(line: Mapping[str, Any]) -> str:
    saved, spent, plain = line["saved"], line["spent"], line["plain"]
    if saved is None:
        return ""
    if saved < 0:
        return f"{percent(-saved)} more"
    times = f" ({plain / spent:.1f}x fewer)" if spent and plain / spent >= 2 else ""
    return percent(saved) + times
