"""Rotation before few bits, and what each codec makes of a tensor."""

import math

import pytest
import torch

from penstock.runtime.activation_codec import activation_codecs, rotate


def through(name: str, direction: str, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    codec = activation_codecs(name)[direction]
    parts = codec.encode(tensor)
    assert parts is not None
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    codec.decode(parts, out)
    return out, sum(part.nbytes for part in parts)


def test_the_rotation_is_hadamards_with_signs() -> None:
    """Entry (i, j) is 1 over the root of 128, its sign by the bits that i and j share and by the column."""
    turned = rotate(torch.eye(128, dtype=torch.float64)).view(128, 128).T  # its rows are images of unit vectors
    places = torch.arange(128)
    shared = (places[:, None] & places).tolist()
    expected = torch.tensor([[(-1.0) ** bits.bit_count() for bits in row] for row in shared]).double() / 128**0.5
    signs = turned[0] * 128**0.5
    assert torch.equal(signs.abs(), torch.ones(128).double())
    assert 40 < int((signs > 0).sum()) < 88
    torch.testing.assert_close(turned, expected * signs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 300])
def test_turning_back_and_what_is_left_over(count: int) -> None:
    x = torch.randn(count, dtype=torch.float64)
    turned = rotate(x)
    whole = count // 128 * 128
    assert torch.equal(turned[whole:], x[whole:])
    torch.testing.assert_close(turned.norm(), x.norm())
    torch.testing.assert_close(rotate(turned, back=True), x, rtol=1e-12, atol=1e-12)


def test_the_rotation_helps_few_bits_with_one_large_element() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 60.0
    seen, nbytes = through("int4", "F", x)
    assert nbytes == 64 * (128 // 2 + 4)
    blocks = x.abs().amax(1, keepdim=True) / 7
    plain = torch.round(x / blocks) * blocks
    assert (seen - x).norm() < 0.4 * (plain - x).norm()


@pytest.mark.parametrize(
    ("name", "direction", "nbytes", "error"),
    [
        ("bf16", "F", 2000, 2.0**-8),
        ("fp8", "B", 1000 + 4, 2.0**-4),
        ("int8", "F", 1000 + 4 * 4, 1 / 127),
        ("int4", "B", 1000 + 4 * 4, 1 / 127),
    ],
)
def test_bytes_and_errors(name: str, direction: str, nbytes: int, error: float) -> None:
    x = torch.randn(10, 100, generator=torch.Generator().manual_seed(1)).T
    seen, spent = through(name, direction, x)
    assert spent == nbytes
    assert float((seen - x).abs().max()) <= error * float(x.abs().max())


def test_what_would_not_get_smaller_stays() -> None:
    assert activation_codecs("none") == {}
    assert activation_codecs("int8")["F"].encode(torch.ones(1)) is None
    assert activation_codecs("bf16")["F"].encode(torch.ones(100, dtype=torch.bfloat16)) is None


def test_infinities_are_not_hidden() -> None:
    """A loss scaler must see that gradients overflowed."""
    x = torch.ones(512)
    x[3] = math.inf
    for name in ("bf16", "fp8", "int8", "int4"):
        assert not torch.isfinite(through(name, "B", x)[0][3])
        assert not torch.isfinite(through(name, "F", x)[0]).all()


def test_rotated_values_may_exceed_the_range_of_16_bits() -> None:
    """A block of equal signs along a row of the rotation becomes one element eleven times as large."""
    row = rotate(torch.eye(128), back=True).view(128, 128)[5].sign()
    x = (row * 30000).to(torch.float16).repeat(64, 1)
    assert rotate(x).abs().max() > torch.finfo(torch.float16).max
    seen, _ = through("int4", "F", x)
    torch.testing.assert_close(seen, x, rtol=0.01, atol=0)
