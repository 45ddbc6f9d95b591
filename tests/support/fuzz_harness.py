"""Coverage-guided fuzzing by atheris (libFuzzer).

Run from the repository's root, for as long as you like; a finding ends it with the input that did it::

    python tests/support/fuzz_harness.py idx -max_total_time=600
    python tests/support/fuzz_harness.py manifest -runs=100000
    python tests/support/fuzz_harness.py config corpus_folder/
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["penstock._core", "penstock.data_pipeline", "penstock.runtime"]):
    from support.fuzz_targets import TARGETS

from support.fuzz_harness_seeds import SEEDS


def main() -> None:
    """Fuzz the target that the first argument names; the others are libFuzzer's."""
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate(SEEDS[name]):
            (Path(seeds) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *sys.argv[2:], seeds], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
