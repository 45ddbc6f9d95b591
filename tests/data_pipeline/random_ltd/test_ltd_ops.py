"""The registered operators, on small tensors (torch's indexing) and large ones (one pass over a table of addresses)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from penstock.data_pipeline.random_ltd import ops
from penstock.data_pipeline.random_ltd.kernels import any_device, cpu

INDICES = torch.tensor([[0, 2, 3], [4, 1, 2]], dtype=torch.int32)


@pytest.fixture(params=["indexing", "addresses"])
def way(request, monkeypatch):
    """Both ways for the same small tensors."""
    monkeypatch.setattr(cpu, "LARGE", 1 << 22 if request.param == "indexing" else 1)


def arguments(batch_first: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, 5, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    if not batch_first:
        x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
    return x.requires_grad_(), y.requires_grad_()


def by_hand(x, y, indices, length, batch_first, add):
    """Token by token, over Python lists."""
    x, y = (one if one is None or batch_first else one.transpose(0, 1) for one in (x, y))
    like = y if x is None else x
    out = torch.zeros(like.shape[0], length, *like.shape[2:], dtype=like.dtype) if x is None else x.clone()
    for row, at in enumerate(indices.tolist()):
        for token, where in enumerate(at):
            put = torch.zeros_like(out[row, where]) if y is None else y[row, token]
            out[row, where] = out[row, where] + put if add else put
    return out if batch_first else out.transpose(0, 1)


# One mode of combine takes opcheck several seconds (it compiles), so each takes one of the two orders.
@pytest.mark.parametrize(("mode", "batch_first"), [("put", True), ("clear", False), ("place", True), ("add", False)])
def test_combine_is_a_well_behaved_operator(mode, batch_first):
    x, y = arguments(batch_first)
    x, y = (None if mode == "place" else x), (None if mode == "clear" else y)
    opcheck(ops.combine, (x, y, INDICES, 5, batch_first, mode == "add"))


@pytest.mark.parametrize("batch_first", [True, False])
def test_gather_is_a_well_behaved_operator(batch_first):
    opcheck(ops.gather, (arguments(batch_first)[0], INDICES, batch_first))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients(batch_first):
    x, y = arguments(batch_first, torch.float64)
    cases = [
        (lambda x, y: ops.gather(x, INDICES, batch_first)),
        (lambda x, y: ops.combine(x, y, INDICES, 5, batch_first)),
        (lambda x, y: ops.combine(x, y, INDICES, 5, batch_first, True)),
        (lambda x, y: ops.combine(x, None, INDICES, 5, batch_first)),
        (lambda x, y: ops.combine(None, y, INDICES, 5, batch_first)),
    ]
    for case in cases:
        assert gradcheck(case, (x, y))
        assert gradgradcheck(case, (x, y))


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.cat((tensor, tensor), dim=-1)[..., : tensor.shape[-1]]
    if layout == "stepped":
        return torch.stack((tensor, tensor), dim=-1)[..., 0]
    return tensor


layouts = st.sampled_from(["plain", "transposed", "sliced", "stepped"])


@pytest.mark.usefixtures("way")
@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(0, 4), st.integers(1, 3)),
    share=st.floats(0, 1),
    batch_first=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.complex128]),
    of_x=layouts,
    of_y=layouts,
    seed=st.integers(0, 99),
)
def test_every_dtype_and_stride(sizes, share, batch_first, dtype, of_x, of_y, seed):
    torch.manual_seed(seed)
    batch, length, width, depth = sizes
    kept = round(share * length)
    order = (lambda b, s: (b, s)) if batch_first else (lambda b, s: (s, b))
    x = laid_out((torch.randn(*order(batch, length), depth, width) * 9).to(dtype), of_x)
    y = laid_out((torch.randn(*order(batch, kept), depth, width) * 9).to(dtype), of_y)
    indices = torch.stack([torch.randperm(length)[:kept] for _ in range(batch)])
    before = x.clone(), y.clone()

    gathered = ops.gather(x, indices, batch_first)
    cells = gathered if batch_first else gathered.transpose(0, 1)
    rows = x if batch_first else x.transpose(0, 1)
    for row, at in enumerate(indices.tolist()):
        for token, where in enumerate(at):
            assert torch.equal(cells[row, token], rows[row, where])
    for one, other, add in ((x, y, False), (x, None, False), (None, y, False), (x, y, True)):
        if add and dtype == torch.bool:
            continue
        combined = ops.combine(one, other, indices, length, batch_first, add)
        assert combined.is_contiguous()
        assert torch.equal(combined, by_hand(one, other, indices, length, batch_first, add))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [True, False])
def test_on_other_devices_torchs_indexing_does_the_same(batch_first):
    x, y = arguments(batch_first)
    assert torch.equal(any_device.gather(x, INDICES, batch_first), ops.gather(x, INDICES, batch_first))
    for one, other, add in ((x, y, False), (x, y, True), (x, None, False), (None, y, False)):
        found = any_device.combine(one, other, INDICES, 5, batch_first, add)
        assert torch.equal(found, by_hand(one, other, INDICES, 5, batch_first, add))
        assert found.is_contiguous()
    for operator in ("penstock::ltd_gather", "penstock::ltd_combine"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, "MPS")


def test_tokens_of_a_broadcast_row():
    x = torch.randn(1, 5, 4).expand(2, 5, 4)
    y = torch.randn(4).expand(2, 3, 4)
    assert torch.equal(ops.gather(x, INDICES, True), torch.stack([x[b, INDICES[b].long()] for b in range(2)]))
    assert torch.equal(ops.combine(x, y, INDICES, 5, True), by_hand(x, y, INDICES, 5, True, False))


def test_large_outputs_are_right_aligned_and_ordinary_tensors():
    torch.manual_seed(0)
    x, y = torch.randn(4, 300, 1024), torch.randn(4, 100, 1024)
    indices = torch.stack([torch.randperm(300)[:100].sort().values for _ in range(4)]).int()
    merged = ops.combine(x, y, indices, 300, True)
    assert merged.nbytes >= cpu.LARGE
    assert merged.data_ptr() % 64 == 0
    expected = x.scatter(1, indices.long()[..., None].expand(y.shape), y)
    assert torch.equal(merged, expected)
    merged.add_(1)
    assert torch.equal(merged, expected + 1)
    assert merged.storage_offset() == 0


@pytest.mark.usefixtures("way")
def test_dtypes_that_torch_cannot_index():
    x, y = (one.detach() for one in arguments(True, torch.float32))
    expected = by_hand(x.bfloat16(), y.bfloat16(), INDICES, 5, True, False).to(torch.float8_e5m2)
    merged = ops.combine(x.bfloat16().to(torch.float8_e5m2), y.bfloat16().to(torch.float8_e5m2), INDICES, 5, True)
    assert torch.equal(merged.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("offset", [0, 1, 3, 4])
def test_tokens_that_begin_anywhere_in_memory(offset):
    rng = np.random.default_rng(0)
    data = torch.from_numpy(rng.integers(0, 100, size=2 * 700 * 1024 * 4 + 4, dtype=np.uint8))
    x = torch.frombuffer(data.numpy(), dtype=torch.int32, count=2 * 700 * 1024, offset=offset).view(2, 700, 1024)
    y = torch.frombuffer(data.numpy(), dtype=torch.int32, count=2 * 9 * 1024, offset=4 - offset).view(2, 9, 1024)
    indices = torch.stack([torch.randperm(700)[:9] for _ in range(2)])
    assert x.nbytes >= cpu.LARGE
    assert torch.equal(ops.gather(x, indices, True), torch.stack([x[b, indices[b]] for b in range(2)]))
    assert torch.equal(ops.combine(x, y, indices, 700, True), by_hand(x, y, indices, 700, True, False))


def test_tokens_of_many_values():
    x, y = torch.zeros(1, 2, 1 << 22, dtype=torch.int8), torch.ones(1, 1, 1 << 22, dtype=torch.int8)
    for given_x, given_y in ((x, y), (None, y), (x, None)):
        merged = ops.combine(given_x, given_y, torch.tensor([[1]]), 2, True)
        assert torch.equal(merged, by_hand(given_x, given_y, torch.tensor([[1]]), 2, True, False))


@pytest.mark.usefixtures("way")
def test_results_may_be_changed_in_place():
    x, y = arguments(True, torch.float64)
    assert gradcheck(lambda x: ops.gather(x, INDICES, True).mul_(2).add_(1), (x,))
    assert gradcheck(lambda x, y: ops.combine(x, y, INDICES, 5, True).mul_(3), (x, y))


@pytest.mark.parametrize(
    ("x", "y", "length", "add", "message"),
    [
        (None, None, 5, False, "needs x or y"),
        (None, (2, 3, 4), 5, True, "both to add"),
        ((2, 5, 4), None, 5, True, "no tokens to add"),
        ((2, 5, 4), None, 6, False, "length=6 is not that of"),
        ((2, 5, 4), (2, 3, 5), 5, False, r"must have shape \(2, 3, 4\)"),
        (None, (2, 3, 4), 2, False, "2 rows of 2 tokens"),
        (None, (2, 2, 4), 5, False, "do not place tokens"),
        (None, (2, 3, 4), 4, False, r"must lie in \[0, 4\), got 0..4"),
    ],
)
def test_mistakes_are_named(x, y, length, add, message):
    x, y = (None if shape is None else torch.zeros(shape) for shape in (x, y))
    with pytest.raises(ValueError, match=message):
        ops.combine(x, y, INDICES, length, True, add)


def test_tokens_of_another_dtype_do_not_mix():
    with pytest.raises(ValueError, match=r"bfloat16 on cpu do not go among tokens of torch.float32"):
        ops.combine(torch.zeros(2, 5, 4), torch.zeros(2, 3, 4, dtype=torch.bfloat16), INDICES, 5, True)
