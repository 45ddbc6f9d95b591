"""Copying past the caches, beside plain indexing."""

import importlib
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.random_ltd import ops
from penstock.data_pipeline.random_ltd.kernels import cpu

pytest.importorskip("numba")

from penstock.data_pipeline.random_ltd.kernels import cpu_streaming, torch_threads


@pytest.fixture
def copies(monkeypatch):
    """Small outputs are streamed too, on several threads; returns the sizes of what was."""
    copied = []
    inner = cpu_streaming.copy_tokens

    def counted(sources, out):
        copied.append(out.nbytes)
        inner(sources, out)

    monkeypatch.setattr(cpu, "LARGE", 1)
    monkeypatch.setattr(cpu, "STREAMED", 1)
    monkeypatch.setattr(cpu, "_LONG", 64)
    monkeypatch.setattr(cpu_streaming, "_SHARE", 1 << 12)
    monkeypatch.setattr(cpu_streaming, "copy_tokens", counted)
    return copied


@settings(max_examples=80)
@given(
    count=st.integers(1, 40),
    size=st.one_of(st.integers(64, 700), st.integers(1, 9).map(lambda lines: 64 * lines)),
    begin=st.integers(0, 63),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 99),
)
def test_the_kernel_writes_its_tokens_and_nothing_else(count, size, begin, part, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, 5000, dtype=np.uint8)
    at = rng.integers(0, len(data) - size, count)
    first, last = (round(share * count) for share in part)
    out = rng.integers(0, 256, begin + count * size + 200, dtype=np.uint8)
    expected = out.copy()
    for token in range(first, last):
        expected[begin + token * size : begin + (token + 1) * size] = data[at[token] : at[token] + size]
    sources = at + data.ctypes.data
    cpu_streaming._copy_some(out.ctypes.data + begin, sources.ctypes.data, size, first, last)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 48), (torch.float32, 49), (torch.bfloat16, 77), (torch.complex128, 33)]
)
def test_the_operators_give_the_same_bits_with_and_without_it(dtype, width, batch_first, threads, copies, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, length, kept = 3, 57, 20
    order = (lambda b, s: (b, s)) if batch_first else (lambda b, s: (s, b))
    x = torch.randn(*order(rows, length), width + 3).to(dtype)[..., 1:-2]  # begins anywhere, and has gaps
    y = torch.randn(*order(rows, kept), width).to(dtype)
    indices = torch.stack([torch.randperm(length)[:kept] for _ in range(rows)])

    def results():
        yield ops.gather(x, indices, batch_first)
        for one, other in ((x, y), (x, None), (None, y)):
            yield ops.combine(one, other, indices, length, batch_first)

    streamed = list(results())
    assert len(copies) == 4
    monkeypatch.setattr(cpu, "_can_stream", lambda: False)
    indexed = list(results())
    assert len(copies) == 4
    for one, other in zip(streamed, indexed, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    by_row = x if batch_first else x.transpose(0, 1)
    expected = torch.stack([by_row[b, indices[b]] for b in range(rows)])
    assert torch.equal(streamed[0] if batch_first else streamed[0].transpose(0, 1), expected)


def test_only_large_outputs_of_long_tokens_are_streamed(copies, monkeypatch):
    monkeypatch.setattr(cpu, "STREAMED", 1 << 12)
    indices = torch.tensor([[1, 3]])
    ops.gather(torch.randn(1, 4, 256), indices, True)  # 2 KiB
    ops.gather(torch.randn(1, 999, 15), torch.arange(999)[None], True)  # 60 bytes a token
    assert not copies
    ops.gather(torch.randn(1, 4, 512), indices, True)
    assert copies == [1 << 12]


@pytest.mark.parametrize(("threads", "most", "expected"), [(1, 9, 1), (3, 9, 3), (3, 2, 2), (3, 0, 1)])
def test_a_function_is_called_once_on_each_of_torchs_threads(threads, most, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    @cpu_streaming.numba.cfunc("void(intp)")
    def count(calls):
        cpu_streaming._add_at(calls, 1)

    calls = np.zeros(1, dtype=np.int64)
    torch_threads.run_on_torch_threads(count.address, calls.ctypes.data, most=most)
    assert calls[0] == expected


@pytest.mark.parametrize("error", [ImportError("Numba needs NumPy 2.2 or less"), RuntimeError("no locator available")])
def test_numba_that_cannot_be_used_is_told_once_and_done_without(error, monkeypatch):
    def refuse(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    cpu._can_stream.cache_clear()
    with pytest.warns(UserWarning, match=f"copied without numba, which cannot be used here: {error}"):
        assert not cpu._can_stream()
    assert not cpu._can_stream()
    cpu._can_stream.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_copies_without_the_threads_that_stayed_behind(copies, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    data, out = torch.randn(64, 256), torch.zeros(64, 256)
    sources = np.arange(64)[::-1] * 1024 + data.data_ptr()
    cpu_streaming.copy_tokens(np.ascontiguousarray(sources), out)
    assert torch.equal(out, data.flip(0))
    out.zero_()
    child = os.fork()
    if not child:
        cpu_streaming.copy_tokens(np.ascontiguousarray(sources), out)
        os._exit(0 if np.array_equal(out.numpy(), data.numpy()[::-1]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
