"""``python -m benchmarks``: name every benchmark, or run some of them in turn.

Each is a program of its own, ``python -m benchmarks.ROOM.CLAIM``, with options of its own; some take minutes, some need
network namespaces, a GPU or a quiet machine, and say so. Results are in ``benchmarks/results``.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """Every benchmark, as it is named on the command line."""
    return [
        ".".join(path.relative_to(HERE).with_suffix("").parts)
        for path in sorted(HERE.rglob("*.py"))
        if not path.name.startswith("_") and 'if __name__ == "__main__":' in path.read_text()
    ]


def main(arguments: list[str]) -> None:
    """Run what is named; without arguments, list what there is."""
    known = names()
    unknown = [name for name in arguments if name not in known]
    if unknown or not arguments:
        print("\n".join([*(f"there is no benchmark {name!r}" for name in unknown), *known]))
        sys.exit(2 if unknown else 0)
    for name in arguments:
        sys.argv = [f"benchmarks.{name}"]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
