"""How long ``import penstock`` takes beside ``import torch``, whole processes in turn::

python -m benchmarks.import_time
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
STATEMENTS = {
    "python alone": "pass",
    "import torch": "import torch",
    "import penstock": "import penstock",
    "import torch, penstock; penstock.initialize": "import torch, penstock; penstock.initialize",
}


def seconds(statement: str) -> float:
    """Wall-clock of a fresh interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write ``results/import_time.md``."""
    for statement in STATEMENTS.values():
        seconds(statement)  # warms the file cache
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(RUNS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    torch_median = statistics.median(times["import torch"])
    lines = [
        f"# Import time, whole processes, {RUNS} runs of each in turn",
        "",
        "| statement | median s | min s | max s | median over import torch |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        median = statistics.median(values)
        ratio = median / torch_median
        lines.append(f"| {name} | {median:.3f} | {min(values):.3f} | {max(values):.3f} | {ratio:.2f} |")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "import_time.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
