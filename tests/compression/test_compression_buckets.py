import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.compression import LocalGradients
from penstock.compression.buckets import make_buckets
from penstock.compression.chunks import chunk_bounds

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@given(
    sets=st.lists(st.lists(st.tuples(st.integers(0, 400), DTYPES), max_size=6), max_size=4),
    bucket_bytes=st.integers(1, 3000),
    reverse=st.booleans(),
)
def test_every_parameter_has_its_own_aligned_place(sets, bucket_bytes: int, reverse: bool) -> None:
    named = [
        [(f"{s}.{i}", nn.Parameter(torch.zeros(n, dtype=dtype))) for i, (n, dtype) in enumerate(members)]
        for s, members in enumerate(sets)
    ]
    buckets = make_buckets(named, bucket_bytes=bucket_bytes, reverse=reverse)
    assert sorted(name for b in buckets for name in b.names) == sorted(name for m in named for name, _ in m)
    for bucket in buckets:
        flat = bucket.new_flat()
        assert flat.dtype == bucket.dtype
        assert {p.dtype for p in bucket.parameters} == {bucket.dtype}
        assert {int(name.split(".")[0]) for name in bucket.names} == {bucket.set_index}
        assert len(bucket.names) == 1 or bucket.numel * bucket.dtype.itemsize <= bucket_bytes
        for view in bucket.views(flat):
            assert (view.storage_offset() * view.element_size()) % 64 == 0
            view += 1
        for gap in bucket.gaps(flat):
            gap += 1
        assert (flat == 1).all()  # parameters and gaps cover the buffer, and nothing overlaps
    order = [name for b in buckets for name in b.names if b.dtype == torch.float32]
    expected = [name for m in named for name, p in (reversed(m) if reverse else m) if p.dtype == torch.float32]
    assert order == expected


def test_a_parameter_listed_twice_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"'b' is listed twice \(first as 'a'\)"):
        make_buckets([[("a", p)], [("b", p)]])
    with pytest.raises(ValueError, match="bucket_bytes must be positive, got 0"):
        make_buckets([[("a", p)]], bucket_bytes=0)


@given(numel=st.integers(0, 100_000), ranks=st.integers(1, 64))
def test_chunks_cover_the_buffer_in_order(numel: int, ranks: int) -> None:
    bounds = chunk_bounds(numel, ranks)
    assert len(bounds) == ranks
    assert [i for start, stop in bounds for i in (start, stop)] == sorted(i for pair in bounds for i in pair)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(start % 64 == 0 or start == numel for start, _ in bounds)
    assert max(stop - start for start, stop in bounds) == bounds[0][1] - bounds[0][0]


def test_local_gradients_are_scaled_so_that_their_mean_counts() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    exchange = LocalGradients([used, unused], replicas=4)
    assert not exchange.averages_gradients
    exchange.begin_step(lambda: 0.125)
    (used.sum() * 6).backward()
    exchange.arm([used])
    exchange.ready([unused])
    exchange.finish()
    assert used.grad is not None
    assert used.grad.tolist() == [3.0] * 3
    assert unused.grad is None
    assert exchange.state_dict() == {}
    exchange.load_state_dict({})
    with pytest.raises(ValueError, match="gradients stay local"):
        exchange.load_state_dict({"bucket_000.worker": torch.zeros(1)})
    assert LocalGradients([used], replicas=1).averages_gradients
    with pytest.raises(ValueError, match="replicas=0"):
        LocalGradients([used], replicas=0)
