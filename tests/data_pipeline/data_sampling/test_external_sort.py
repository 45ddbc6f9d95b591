import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.external_sort import sort_order


@given(
    st.lists(st.integers(-5, 5), max_size=200) | st.lists(st.floats(-1e3, 1e3), max_size=60),
    st.integers(1, 50),
)
def test_the_order_is_the_stable_one(values: list[float], run: int) -> None:
    out = np.full(len(values), -1, dtype=np.int64)
    sort_order(np.array(values), out, run=run)
    assert out.tolist() == sorted(range(len(values)), key=lambda i: (values[i], i))


_FLOATS = st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 1e308, -1e308, float("inf"), float("-inf")]) | st.floats(-2, 2)
_INTEGERS = {
    np.int64: st.sampled_from([-(1 << 63), -1, 0, 1 << 40, (1 << 63) - 1]) | st.integers(-70_000, 70_000),
    np.uint64: st.sampled_from([0, 1 << 63, (1 << 64) - 1]) | st.integers(0, 70_000),
    np.int16: st.integers(-(1 << 15), (1 << 15) - 1),
    np.bool_: st.booleans(),
}


@given(st.data(), st.sampled_from([np.float64, np.float32, *_INTEGERS]), st.integers(1, 40))
def test_the_order_is_the_stable_one_at_the_ends_of_every_type(data: st.DataObject, dtype: Any, run: int) -> None:
    """Numbers are sorted sixteen bits at a time: signs, exponents and what wraps around must not change places."""
    numbers = data.draw(st.lists(_INTEGERS.get(dtype, _FLOATS), max_size=40))
    with np.errstate(over="ignore"):
        values = np.array(numbers, dtype=dtype)
    out = np.empty(len(values), dtype=np.int64)
    sort_order(values, out, run=run)
    assert out.tolist() == np.argsort(values, kind="stable").tolist()


@pytest.mark.parametrize("kind", ["distinct", "equal", "skewed"])
def test_large_runs_in_a_mapped_file(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(3)
    n = 60_000
    values = {"distinct": rng.permutation(n), "equal": np.ones(n), "skewed": rng.geometric(0.4, n)}[kind]
    out = np.lib.format.open_memmap(tmp_path / "o.npy", mode="w+", dtype=np.int64, shape=(n,))
    sort_order(values, out, run=7_000)
    assert (out == np.argsort(values, kind="stable")).all()
    assert [path.name for path in tmp_path.iterdir()] == ["o.npy"]


def test_equal_values_take_no_more_memory_than_others(tmp_path: Path) -> None:
    """Whole numbers repeat without end: a range of them cannot be made narrower, so they are copied run by run."""
    n, run = 400_000, 10_000
    out = np.lib.format.open_memmap(tmp_path / "o.npy", mode="w+", dtype=np.int64, shape=(n,))
    values = np.ones(n)
    tracemalloc.start()
    sort_order(values, out, run=run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * 8
    assert (out == np.arange(n)).all()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="run=0"):
        sort_order(np.zeros(3), np.zeros(3, dtype=np.int64), run=0)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        sort_order(np.zeros(3), np.zeros(2, dtype=np.int64))
