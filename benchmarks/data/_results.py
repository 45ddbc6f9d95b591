"""What the benchmarks of this folder share: medians with their spread, and where results go."""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "data"


def spread(numbers: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def shown(numbers: list[float], digits: int = 1) -> str:
    """``median (min to max)``."""
    found = spread(numbers)
    return f"{found['median']:,.{digits}f} ({found['min']:,.{digits}f} to {found['max']:,.{digits}f})"


def write_results(name: str, facts: dict[str, Any], markdown: str) -> None:
    """Write ``results/data/NAME.{json,md}`` and print the text."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown)
    print(markdown)
