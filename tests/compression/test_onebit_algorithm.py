import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.compression import create_compression_algorithm
from penstock.compression.algorithms import OneBit
from penstock.compression.algorithms.onebit import _pack_by_torch, _unpack_by_torch
from support.compression_reference import sent_by_onebit


def seen(algorithm: OneBit, x: torch.Tensor) -> torch.Tensor:
    return algorithm.decompress(algorithm.compress(x), torch.empty(x.shape, dtype=x.dtype))


@given(
    numel=st.integers(0, 3000),
    block=st.sampled_from([8, 64, 1000, 1024, 2048]),
    scale=st.sampled_from(["l1", "rms"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_a_receiver_sees_the_sign_times_the_blocks_scale(numel, block, scale, dtype, seed) -> None:
    x = torch.randn(numel, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    expected = sent_by_onebit(x.double().numpy(), block, scale)
    np.testing.assert_allclose(seen(OneBit(block_size=block, scale=scale), x).double().numpy(), expected, rtol=3e-7)


@pytest.mark.parametrize("numel", [(1 << 18) - 1, (1 << 18) + 9, 2 * (1 << 18) + 1025])
def test_tiles_make_no_difference(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(seen(OneBit(), x).numpy(), sent_by_onebit(x.double().numpy()), rtol=3e-7)
    left = x.clone()
    OneBit().compress_with_memory(torch.zeros(numel), left)
    np.testing.assert_allclose(left, x.double().numpy() - sent_by_onebit(x.double().numpy()), atol=1e-6)


@given(numel=st.integers(1, 2500), seed=st.integers(0, 1000))
def test_what_is_sent_and_what_is_left_add_up(numel: int, seed: int) -> None:
    x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    left = torch.zeros_like(x)
    payload = OneBit().compress_with_memory(x, left)
    sent = OneBit().decompress(payload, torch.empty_like(x))
    assert torch.equal(left, x - sent)
    assert torch.equal(payload["codes"], OneBit().compress(x)["codes"])
    assert torch.equal(payload["scales"], OneBit().compress(x)["scales"])


@given(numel=st.integers(1, 100), seed=st.integers(0, 100), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_torchs_bits_are_numpys(numel: int, seed: int, dtype: torch.dtype) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0] = -0.0
    packed = torch.empty(1, -(-numel // 8), dtype=torch.uint8)
    _pack_by_torch(x.view(1, -1), packed)
    assert torch.equal(packed[0], OneBit().compress(x)["codes"])
    signs = torch.empty(1, 8 * packed.numel(), dtype=dtype)
    _unpack_by_torch(packed, signs)
    assert torch.equal(signs[0, :numel], torch.where(torch.signbit(x), -1.0, 1.0).to(dtype))


def test_the_sign_is_the_sign_bit() -> None:
    x = torch.tensor([0.0, -0.0, 3.0, -1.0, 0.0, 0.0, 0.0, 0.0, -8.0])
    payload = OneBit(block_size=8).compress(x)
    assert payload["codes"].tolist() == [0b1010, 0b1]
    assert payload["scales"].tolist() == [0.5, 8.0]
    assert seen(OneBit(block_size=8), x).tolist() == [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, 0.5, 0.5, -8.0]


@given(seed=st.integers(0, 200), factor=st.floats(0.5, 1.5))
def test_no_scale_has_less_error_than_l1(seed: int, factor: float) -> None:
    x = torch.randn(1024, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    best = (x - seen(OneBit(), x)).square().sum()
    other = (x - factor * seen(OneBit(), x)).square().sum()
    assert best <= other * (1 + 1e-6)


def test_it_contracts_at_the_stated_factor() -> None:
    x = torch.randn(1024, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left = (x - seen(OneBit(), x)).square().sum() / x.square().sum()
    stated = 1 - x.abs().sum() ** 2 / (1024 * x.square().sum())
    assert left.item() == pytest.approx(stated.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_non_finite_value_is_seen_and_not_remembered(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3000, dtype=dtype)
    x[1500] = bad
    left = torch.full((3000,), 0.25)
    payload = OneBit().compress_with_memory(x, left)
    sent = OneBit().decompress(payload, torch.empty_like(x))
    assert not sent[1024:2048].isfinite().any()
    assert sent[:1024].isfinite().all()
    assert sent[2048:].isfinite().all()
    assert left.isfinite().all()
    assert (left[1024:2048] == 0.25).all()


def test_any_strides_and_short_floats() -> None:
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen(OneBit(), x.t()), seen(OneBit(), x.t().contiguous()))
    short = x.bfloat16()
    assert torch.equal(seen(OneBit(), short), seen(OneBit(), short.float()).bfloat16())


@given(numel=st.integers(0, 1 << 24), block=st.integers(1, 600).map(lambda k: 8 * k))
def test_the_wire_has_a_bit_an_element_and_four_bytes_a_block(numel: int, block: int) -> None:
    expected = [-(-numel // block) * 4, -(-numel // 8)]
    padded = sum(-(-n // 8) * 8 for n in expected)
    assert OneBit(block_size=block).bytes_for((numel,)) == padded


def test_the_default_wire_is_a_thirty_first_of_float32() -> None:
    numel = 1_000_000
    assert 4 * numel / OneBit().bytes_for((numel,)) >= 31


@pytest.mark.parametrize("block", [0, -8, 12])
def test_a_block_is_whole_bytes(block: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8 .*got {block}"):
        create_compression_algorithm("onebit", {"block_size": block})


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown scale 'l2'; known: 'l1'.*'rms'"):
        create_compression_algorithm("onebit", {"scale": "l2"})
