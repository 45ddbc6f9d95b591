"""Damaged and malicious files: refused in words, never a crash, never memory beyond their size."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from support import fuzz_harness_seeds, fuzz_targets

HARNESS = Path(fuzz_targets.__file__).with_name("fuzz_harness.py")

edges = st.sampled_from(
    [0, 1, 2, 3, 34, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
counts = st.integers(0, 4) | edges
numbers = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-3, 12)


@given(
    st.integers(0, 12),
    st.integers(0, 9),
    counts,
    counts,
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-1, 4), max_size=4),
    st.lists(numbers, max_size=8),
    st.binary(max_size=6),
)
def test_indices_with_a_true_header(
    tokens: int, code: int, sequences: int, documents: int, lengths: list[int], rest: list[int], tail: bytes
) -> None:
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, sequences, documents)
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(rest)}q", *rest) + tail
    fuzz_targets.idx(bytes([tokens]) + index[:tokens].ljust(tokens, b"\1") + index)
    fuzz_targets.idx(bytes([0]) + index)


values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.sampled_from(["../x", "/etc/passwd", "m", "", "a\0b", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "sha256", "m", "x"]), inner),
    max_leaves=5,
)
keys = ["kind", "metrics", "num_samples", "num_tokens", "fingerprint", "files", "format", "version", "step"]
known = json.loads(fuzz_harness_seeds.SEEDS["manifest"][0])


@given(st.dictionaries(st.sampled_from(keys), values, max_size=3), st.binary(max_size=3), st.integers(0, 400))
def test_manifests_with_any_values(changes: dict[str, object], tail: bytes, size: int) -> None:
    text = json.dumps({**known, **changes}).encode()
    fuzz_targets.manifest(text)
    fuzz_targets.manifest(text[:size] + tail)


sections = st.sampled_from(
    ["train", "model", "data", "sampling", "strategy", "curriculum", "optimizer", "pipe", "training"]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(sections | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(sections, plain, max_size=4), st.binary(max_size=4), st.integers(0, 99))
def test_configurations_with_any_values(table: dict[str, object], inserted: bytes, at: int) -> None:
    text = yaml.safe_dump(table, allow_unicode=True).encode("utf-8", "replace")
    fuzz_targets.config(text)
    fuzz_targets.config(text[:at] + inserted + text[at:])


@pytest.mark.parametrize(
    "text",
    [
        # Each line doubles what the one before stands for: written out it would be 2**60 entries.
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "train: &t {steps: *t}",
        "&a [*a]",
        "[" * 5000,
        "{a: " * 2000,
        "steps: " + "9" * 6000,
        "steps: 1e99999",
        "!!python/object/apply:os.system ['true']",
        "a: 2001-99-99",
        "? {a: b}\n: c",
    ],
)
def test_configurations_made_to_hurt(text: str) -> None:
    fuzz_targets.config(text.encode())


def test_a_short_guided_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    done = subprocess.run(
        [sys.executable, str(HARNESS), "idx", "-runs=150", "-seed=1", f"-artifact_prefix={tmp_path}/"],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # libFuzzer leaves without cleaning up
    )
    assert done.returncode == 0, done.stderr[-3000:]
