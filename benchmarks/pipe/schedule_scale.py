"""How long it takes to make, validate and simulate the schedule of 1,024 stages and 4,096 micro-batches.

Beside it, at a size that it can do, torch.distributed.pipelining's own dry run (place communication, play it through)
on the same table::

    python -m benchmarks.pipe.schedule_scale
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.pipe.schedule import Schedule, get_schedule, simulate, validate

RUNS = 5
LARGE = {"1f1b": 1024, "interleaved_1f1b": 512, "zb_h1": 1024, "zb_v": 512, "v_half": 512}
"""Ranks, so chosen that there are 1,024 stages."""
MICRO_BATCHES = 4096
SMALL = {"1f1b": 32, "zb_v": 16}
"""Ranks of the size at which the peer is timed too: 32 stages."""
SMALL_MICRO_BATCHES = 128
RESULTS = Path(__file__).parents[1] / "results" / "pipe"


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def peer_of(schedule: Schedule) -> Callable[[], Any] | None:
    """torch's dry run of the same table, or None where this torch has none."""
    try:
        from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _simulate_comms_compute
    except ImportError:
        return None
    table = {rank: [_Action.from_str(str(action)) for action in actions] for rank, actions in enumerate(schedule.ranks)}
    placed = schedule.placement.__getitem__

    def dry_run() -> Any:
        steps = _add_send_recv({rank: list(actions) for rank, actions in table.items()}, placed, schedule.num_stages)
        return _simulate_comms_compute(steps, placed, schedule.num_stages)

    return dry_run


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def large(name: str, ranks: int) -> dict[str, Any]:
    """One schedule of 1,024 stages: seconds to make, to validate and to simulate it."""
    times: dict[str, list[float]] = {"make": [], "validate": [], "simulate": []}
    for _ in range(RUNS):
        taken, schedule = seconds(lambda: get_schedule(name, ranks, MICRO_BATCHES))
        times["make"].append(taken)
        times["validate"].append(seconds(lambda made=schedule: validate(made, capacity=8))[0])
        taken, timeline = seconds(lambda made=schedule: simulate(made))
        times["simulate"].append(taken)
    return {
        "schedule": name,
        "ranks": ranks,
        "stages": schedule.num_stages,
        "actions": schedule.num_actions,
        "bubble_of_makespan": timeline.bubble_fraction,
        **{what: spread(values) for what, values in times.items()},
    }


def small(name: str, ranks: int) -> dict[str, Any]:
    """One schedule of 32 stages: validate and simulate, and the peer's dry run, in turn."""
    schedule = get_schedule(name, ranks, SMALL_MICRO_BATCHES)
    contenders: dict[str, Callable[[], Any] | None] = {
        "penstock": lambda: (validate(schedule), simulate(schedule)),
        "torch": peer_of(schedule),
    }
    times: dict[str, list[float]] = {who: [] for who, work in contenders.items() if work}
    for _ in range(RUNS):
        for who in times:
            work = contenders[who]
            assert work is not None
            times[who].append(seconds(work)[0])
    return {
        "schedule": name,
        "ranks": ranks,
        "stages": schedule.num_stages,
        "actions": schedule.num_actions,
        **{who: spread(values) for who, values in times.items()},
    }


def main() -> None:
    """Measure and write ``results/pipe/schedule_scale.{json,md}``."""
    report = {
        "runs": RUNS,
        "micro_batches": MICRO_BATCHES,
        "large": [large(name, ranks) for name, ranks in LARGE.items()],
        "small_micro_batches": SMALL_MICRO_BATCHES,
        "small": [small(name, ranks) for name, ranks in SMALL.items()],
    }
    lines = [
        f"# Schedules of 1,024 stages and {MICRO_BATCHES:,} micro-batches, median of {RUNS} runs (least to most), s",
        "",
        "| schedule | ranks | actions | make | validate | simulate |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['schedule']} | {row['ranks']:,} | {row['actions']:,} | "
            + " | ".join(_cell(row[what]) for what in ("make", "validate", "simulate"))
            + " |"
            for row in report["large"]
        ),
        "",
        f"Beside torch's dry run of the same table, 32 stages and {SMALL_MICRO_BATCHES} micro-batches:",
        "",
        "| schedule | actions | penstock: validate and simulate | torch: place communication and play |",
        "|---|---|---|---|",
        *(
            f"| {row['schedule']} | {row['actions']:,} | {_cell(row['penstock'])} | "
            f"{_cell(row['torch']) if 'torch' in row else 'not in this torch'} |"
            for row in report["small"]
        ),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "schedule_scale.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "schedule_scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(found: dict[str, float]) -> str:
    return f"{found['median_s']:.3g} ({found['min_s']:.3g} to {found['max_s']:.3g})"


if __name__ == "__main__":
    main()
