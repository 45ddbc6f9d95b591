import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.frame import (
    HEADER_BYTES,
    Address,
    FrameError,
    Header,
    LayoutCache,
    copy_into,
    read_layout,
    read_positions,
    views,
    write_head,
)
from penstock.pipe.value import flatten, unflatten

ADDRESS = Address("F", 2, 7, 3)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def send(value: Any, positions: tuple[int, ...] = (), *, apart: bool = False) -> tuple[Any, Any, tuple[int, ...], Any]:
    """Through a frame and back, with caches of their own on both sides: value, layout, positions and frame."""
    structure, tensors = flatten(value)
    layout = LayoutCache().of(structure, tensors, [apart] * len(tensors))
    header = layout.header(ADDRESS, positions)
    frame = torch.full((header.frame_bytes,), 0xAB, dtype=torch.uint8)  # torch's memory is aligned to 64 bytes
    payload = torch.full((header.apart_bytes,), 0xAB, dtype=torch.uint8) if header.apart_bytes else None
    memory = frame.numpy().data
    write_head(memory, header, layout.preamble, positions)
    copy_into(views(frame.numpy(), payload, header.data_start, layout), tensors)
    read = Header.read(memory, ADDRESS)
    assert read == header
    arrived = read_layout(memory, read, LayoutCache())
    assert arrived == layout
    got = unflatten(arrived.structure, views(frame.numpy(), payload, read.data_start, arrived))
    return got, arrived, read_positions(memory, read), frame


shapes = st.lists(st.integers(0, 4), max_size=4)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes, st.booleans()), max_size=5), st.booleans())
def test_tensors_of_any_dtype_and_shape_arrive_with_the_same_bits(described: list[Any], apart: bool) -> None:
    tensors = []
    for dtype, shape, transposed in described:
        x = torch.randint(0, 100, shape).to(dtype)
        tensors.append(x.transpose(0, -1) if transposed and x.dim() else x)
    arrived, _, _, _ = send(tensors, apart=apart)
    for x, y in zip(tensors, arrived, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.contiguous().flatten().view(torch.uint8), y.flatten().view(torch.uint8))
        assert y.is_contiguous()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(tuple))
def test_positions_travel(positions: tuple[int, ...]) -> None:
    assert send({"x": torch.ones(3)}, positions)[2] == positions


def test_tensors_start_at_multiples_of_64_bytes() -> None:
    arrived, _, _, frame = send([torch.ones(n) for n in (1, 3, 17)], (5,))
    assert [(x.data_ptr() - frame.data_ptr()) % 64 for x in arrived] == [0, 0, 0]


def test_gradient_flags_travel_and_tensors_that_need_gradients_can_be_sent() -> None:
    x = torch.ones(2, requires_grad=True)
    arrived, layout, _, _ = send([x * 2, torch.ones(1), x])
    assert layout.requires_grad == (True, False, True)
    assert arrived[0].tolist() == [2.0, 2.0]
    assert not arrived[0].requires_grad


def test_conjugated_and_negated_views_arrive_resolved() -> None:
    x = torch.tensor([1 + 2j, 3 - 4j])
    arrived = send([x.conj(), x.conj().imag])[0]
    assert arrived[0].tolist() == [1 - 2j, 3 + 4j]
    assert arrived[1].tolist() == [-2.0, 4.0]


def test_changing_one_tensor_in_place_does_not_spoil_another_for_autograd() -> None:
    a, b = send([torch.full((2,), 3.0), torch.zeros(2)])[0]
    a.requires_grad_()
    product = a * a
    b.add_(1)
    product.sum().backward()
    assert a.grad.tolist() == [6.0, 6.0]


def test_a_frame_without_tensors() -> None:
    assert send({"n": None, "x": []})[0] == {"n": None, "x": []}


def test_a_dtype_that_cannot_be_sent_is_refused() -> None:
    x = torch.zeros(2, dtype=torch.float8_e5m2fnuz)
    with pytest.raises(ValueError, match="float8_e5m2fnuz cannot be sent"):
        send([x])


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Address("F", 2, 8, 3), "expected the activation for stage 2, step 8, micro-batch 3, but received .*step 7"),
        (Address("F", 2, 7, 4), "micro-batch 4, but received the activation for stage 2, step 7, micro-batch 3"),
        (Address("B", 2, 7, 3), "expected the gradient .* but received the activation"),
        (Address("F", 1, 7, 3), "for stage 1, .* for stage 2"),
    ],
)
def test_another_frame_than_the_expected_one_is_named(expected: Address, message: str) -> None:
    frame = send([torch.ones(2)])[3]
    with pytest.raises(FrameError, match=message):
        Header.read(frame.numpy().data, expected)


def test_a_message_that_is_no_frame() -> None:
    frame = send([torch.ones(2)])[3]
    frame[0] = 0
    with pytest.raises(FrameError, match="no frame of version 1"):
        Header.read(frame.numpy().data, ADDRESS)


@given(st.binary(max_size=200))
def test_a_damaged_preamble_is_an_error_and_nothing_else(preamble: bytes) -> None:
    with pytest.raises(FrameError, match="damaged preamble"):
        LayoutCache().parse(preamble)


def test_a_header_that_disagrees_with_its_preamble() -> None:
    frame = send([torch.ones(2)])[3]
    inline = struct.unpack_from("<q", frame.numpy(), 32)[0]
    assert inline == 64
    struct.pack_into("<q", frame.numpy(), 32, 128)
    header = Header.read(frame.numpy().data, ADDRESS)
    with pytest.raises(FrameError, match="announces 128 bytes"):
        read_layout(frame.numpy().data, header, LayoutCache())


def test_repeated_layouts_are_looked_up() -> None:
    cache = LayoutCache()
    structure, tensors = flatten({"x": torch.ones(2, 3)})
    first = cache.of(structure, tensors, [False])
    assert cache.of(structure, [torch.zeros(2, 3)], [False]) is first
    assert cache.of(structure, [torch.zeros(3, 2)], [False]) is not first
    assert cache.of(structure, [torch.zeros(2, 3, requires_grad=True)], [False]) is not first
    assert cache.parse(first.preamble) is cache.parse(bytes(first.preamble))


def test_shapes_that_never_repeat_do_not_fill_memory() -> None:
    cache = LayoutCache()
    for n in range(2000):
        structure, tensors = flatten(torch.empty(n))
        cache.of(structure, tensors, [False])
    assert len(cache._by_value) <= 512


def test_the_header_is_as_long_as_it_says() -> None:
    assert struct.calcsize("<4sHBBqqqqIIQ") <= HEADER_BYTES
