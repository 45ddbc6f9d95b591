"""What the benchmarks of this folder share."""

import json
from pathlib import Path
from typing import Any

REUSE = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""The allocator keeps what is freed, as ``penstock train`` has it."""

_RESULTS = Path(__file__).parents[1] / "results" / "random_ltd"


def write_results(name: str, facts: dict[str, Any], lines: list[str]) -> None:
    """Write ``results/random_ltd/NAME.{json,md}`` and print the text."""
    text = "\n".join(lines) + "\n"
    _RESULTS.mkdir(parents=True, exist_ok=True)
    (_RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)
