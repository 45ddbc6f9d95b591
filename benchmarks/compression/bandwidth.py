"""Step time and bytes on ordinary networks: every algorithm beside DDP without a hook and PyTorch's own hooks.

Machines are network namespaces whose interfaces send at 100 Mbit/s or 1 Gbit/s (see ``shaped_network.py``); what a step
computes is in ``bandwidth_worker.py``, the same for all. Contenders take turns, round after round, and every finished
cell is kept: a run goes on with those that are missing. Beside each step stands what ``penstock network`` predicts of
it. Needs root and iproute2::

    python -m benchmarks.compression.bandwidth                               # all: an hour or so
    python -m benchmarks.compression.bandwidth --rounds 1 --rates 1000 --machines 2 --only DDP "penstock onebit"
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from benchmarks.compression.bandwidth_prediction import NETWORK, cell_of, predicted_step_s
from benchmarks.compression.bandwidth_worker import COMPUTE_S, PARAMETERS, PERIOD, SHAPES
from benchmarks.compression.shaped_network import require_namespaces, run_machines, shaped_machines
from penstock._core.files import atomic_file
from penstock.compression import known_algorithms

RESULTS: Final = Path(__file__).parents[1] / "results" / "compression"
RATES: Final = (1000, 100)
MACHINES: Final = (2, 4)
ROUNDS: Final = 3
BASELINE: Final = "DDP"
CONTENDERS: Final = (
    BASELINE,
    "penstock onebit",
    "torch fp16 hook",
    "torch PowerSGD",
    *(f"penstock {name}" for name in known_algorithms() if name != "onebit"),
    "1-bit Adam",
    "DiLoCo float32",
    "DiLoCo int8",
    "SparseLoCo",
)
WANTED: Final = {
    "penstock onebit": "at least 10x at 100 Mbit/s, 1.8x at 1 Gbit/s; bytes at most 1/28",
    "DiLoCo float32": "bytes 1/30",
    "DiLoCo int8": "bytes at most 1/100",
    "SparseLoCo": "bytes at most 1/1000",
}

Cells = dict[str, dict[str, Any]]


def run(
    cells: Cells, path: Path, rates: Iterable[int], machines: Iterable[int], rounds: int, only: Iterable[str]
) -> None:
    """Measure the cells that are missing, and keep each as it comes."""
    contenders = list(only)
    for count in machines:
        for rate in rates:
            wanted = [(0, NETWORK), *((number, name) for number in range(rounds) for name in contenders)]
            missing = [(number, name) for number, name in wanted if _key(rate, count, name, number) not in cells]
            if not missing:
                continue
            with shaped_machines(count, rate) as names:
                for number, contender in missing:
                    try:
                        ranks = run_machines(names, "benchmarks.compression.bandwidth_worker", contender)
                        cell = cell_of(ranks) if contender == NETWORK else _cell(ranks)
                    except RuntimeError as error:
                        cell = {"error": str(error)[-400:]}
                    cells[_key(rate, count, contender, number)] = cell
                    print(_key(rate, count, contender, number), cell.get("step_s", cell.get("error", "")), flush=True)
                    with atomic_file(path) as file:
                        file.write((json.dumps(cells, indent=1) + "\n").encode())


def _cell(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step_s": max(rank["median"] for rank in ranks),
        "cpu_s": statistics.fmean(rank["cpu_s"] for rank in ranks),
        "bytes": statistics.fmean(rank["bytes"] for rank in ranks),
        "seconds": ranks[0]["seconds"],
    }


def _key(rate: int, machines: int, contender: str, number: int) -> str:
    return f"{rate} Mbit/s, {machines} machines, {contender}, round {number}"


def report(cells: Cells) -> str:
    """The cells as Markdown."""
    lines = [
        "# Step time and bytes on shaped networks",
        "",
        f"{PARAMETERS:,} parameters, gloo, one thread a machine; {COMPUTE_S * 1e3:.0f} ms of compute a step (a sleep",
        "under the backward pass) and the gradients' products, equal for all; after warm-up. Seconds are medians over",
        "the rounds of the median step, with the least and the largest; bytes are what one machine sends per step,",
        "counted by the kernel. CPU seconds are those of one machine's process per step: all machines share this one's",
        "cores, so step times on a fast network are bounded by them. torch's PowerSGD (rank 4) has one bucket for all;",
        f"with more it aborts on gloo. Methods that train apart meet every {PERIOD} steps; theirs are averages over",
        "a period. Predicted is what `penstock network` says of such a step, from its own measurements between these",
        "machines; nothing is predicted of torch's hooks.",
    ]
    shapes = sorted({tuple(key.split(", ")[:2]) for key in cells}, key=lambda s: (int(s[1].split()[0]), s[0]))
    for rate, machines in shapes:
        lines += ["", f"## {rate}, {machines}", ""]
        lines.append("| | step, s | predicted | faster | bytes a step | fewer | CPU, s | wanted |")
        lines.append("|---|---|---|---|---|---|---|---|")
        network = next((cell for cell in _rows(cells, rate, machines, NETWORK) if NETWORK in cell), None)
        base = [row for row in _rows(cells, rate, machines, BASELINE) if "step_s" in row]
        for contender in CONTENDERS:
            rows = _rows(cells, rate, machines, contender)
            if not rows:
                continue
            good = [row for row in rows if "step_s" in row]
            if not good:
                lines.append(f"| {contender} | fails | | | | | | |")
                continue
            said = None if network is None else predicted_step_s(contender, network, SHAPES, period=PERIOD)
            predicted = "" if said is None else f"{said:.3f}"
            step, sent = _median(good, "step_s"), _median(good, "bytes")
            spread = f"{min(row['step_s'] for row in good):.2f}-{max(row['step_s'] for row in good):.2f}"
            faster = f"{_median(base, 'step_s') / step:.2f}x" if base else ""
            fewer = f"{_median(base, 'bytes') / sent:.1f}x" if base else ""
            lines.append(
                f"| {contender} | {step:.3f} ({spread}) | {predicted} | {faster} | {sent:,.0f} | {fewer} "
                f"| {_median(good, 'cpu_s'):.3f} | {WANTED.get(contender, '')} |"
            )
    return "\n".join(lines) + "\n"


def _rows(cells: Cells, rate: str, machines: str, contender: str) -> list[dict[str, Any]]:
    start = f"{rate}, {machines}, {contender}, round "
    return [cell for key, cell in cells.items() if key.startswith(start)]


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def main() -> None:
    """Measure what is missing and write ``bandwidth.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES, metavar="MBIT")
    parser.add_argument("--machines", type=int, nargs="+", default=MACHINES, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", default=CONTENDERS, choices=CONTENDERS, metavar="CONTENDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require_namespaces()
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "bandwidth.json"
    cells: Cells = json.loads(path.read_text()) if path.exists() else {}
    run(cells, path, arguments.rates, arguments.machines, arguments.rounds, arguments.only)
    text = report(cells)
    (arguments.results / "bandwidth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
