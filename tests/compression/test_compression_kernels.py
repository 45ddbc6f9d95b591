"""Kernels give the bits of the plain composition."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.compression import create_compression_algorithm
from penstock.compression.kernels import choice, kernels_for, use_kernels

ALGORITHMS = st.one_of(
    st.tuples(
        st.just("onebit"),
        st.fixed_dictionaries(
            {"block_size": st.sampled_from([8, 24, 64, 1024]), "scale": st.sampled_from(["l1", "rms"])}
        ),
    ),
    st.tuples(
        st.sampled_from(["int8", "int4"]),
        st.fixed_dictionaries(
            {"block_size": st.sampled_from([2, 6, 32, 256]), "stochastic": st.booleans(), "seed": st.integers(0, 3)}
        ),
    ),
)


@pytest.fixture
def _plain_afterwards() -> Iterator[None]:
    yield
    use_kernels("auto")


@pytest.mark.usefixtures("_plain_afterwards")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the extra numba is not installed")
@settings(max_examples=60)
@given(which=ALGORITHMS, numel=st.integers(0, 3000), seed=st.integers(0, 1000), wild=st.booleans())
def test_the_cpu_kernels_give_the_bits_of_torch_and_numpy(which, numel: int, seed: int, wild: bool) -> None:
    name, options = which
    algorithm = create_compression_algorithm(name, options)
    assert kernels_for(name, None, torch.empty(1), block_size=256) is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10.0 ** (seed % 40 - 20)
    owed = torch.randn(numel, generator=generator) * x.abs().mean()
    if wild and numel > 2:
        x[numel // 2], owed[0], x[0] = torch.inf, -0.0, -0.0
        x[numel // 3 : numel // 3 + 40] = 0.0
    out = []
    for chosen in ("none", "auto"):
        use_kernels(chosen)
        memory = owed.clone()
        plain, fed = algorithm.compress(x), algorithm.compress_with_memory(x, memory)
        seen = algorithm.decompress(fed, torch.empty_like(x))
        out.append([*plain.values(), *fed.values(), memory, seen, algorithm.decompress_add(plain, seen.clone())])
    for torchs, kernels in zip(*out, strict=True):
        if torchs.is_floating_point():
            assert torch.equal(torchs.nan_to_num(nan=12345.0), kernels.nan_to_num(nan=12345.0))
        else:
            assert torch.equal(torchs, kernels)


def test_a_choice_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="unknown choice of kernels 'numba'; known: 'auto', 'none'"):
        use_kernels("numba")  # type: ignore[arg-type]
    assert kernels_for("onebit", None, torch.empty(1, dtype=torch.float64), block_size=256) is None


INTERPRETED = """
import torch
from penstock.compression import create_compression_algorithm
from penstock.compression.kernels import gpu, use_kernels
use_kernels("none")
generator = torch.Generator().manual_seed(0)
for name, key, options in [
    ("onebit", "onebit", {"block_size": 24}), ("onebit", "onebit_rms", {"block_size": 64, "scale": "rms"}),
    ("int8", "int8", {"block_size": 32}), ("int4", "int4", {"block_size": 12}), ("int4", "int4", {"block_size": 64}),
]:
    algorithm, kernels = create_compression_algorithm(name, options), gpu.find(key, None)
    for numel in (0, 1, 97, 200):
        x, owed = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
        if numel == 200:
            x[3] = float("nan")
        for memory in (None, owed):
            mine = None if memory is None else memory.clone()
            theirs = owed.clone()
            payload = algorithm.compress(x) if memory is None else algorithm.compress_with_memory(x, theirs)
            scales, codes = torch.empty_like(payload["scales"]), torch.full_like(payload["codes"], 7)
            kernels.encode(x, mine, scales, codes, algorithm.block_size)
            close = dict(rtol=1e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(scales, payload["scales"], **close)
            first = 0 if numel < 200 else algorithm.block_size  # codes of a block that is not finite mean nothing
            assert torch.equal(codes[first:], payload["codes"][first:]), (name, options, numel)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, **close)
            seen, added = torch.empty(numel), torch.ones(numel)
            kernels.decode(scales, codes, seen, algorithm.block_size, add=False)
            torch.testing.assert_close(seen, algorithm.decompress(payload, torch.empty(numel)), **close)
            kernels.decode(scales, codes, added, algorithm.block_size, add=True)
            torch.testing.assert_close(added, seen + 1, **close)
assert gpu.find("int8", 3) is None and gpu.find("topk", None) is None
print("same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_kernels_do_the_same_in_tritons_interpreter() -> None:
    program = textwrap.dedent(INTERPRETED)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]


def test_a_compiler_that_cannot_be_used_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    x = torch.randn(100)

    def fail(name: str) -> None:
        raise ImportError("it needs another numpy")

    choice._compiled.cache_clear()
    monkeypatch.setattr(choice.importlib, "import_module", fail)
    with pytest.warns(UserWarning, match="goes without numba, which cannot be used here: it needs another numpy"):
        assert choice.kernels_for("onebit", None, x, block_size=64) is None
    assert choice.kernels_for("onebit", None, x, block_size=64) is None  # warnings are errors
    choice._compiled.cache_clear()
