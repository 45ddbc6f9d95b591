"""What each algorithm says of itself holds: sizes, contraction factors, means, conservation, non-finite values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.compression import CompressionAlgorithm, ErrorFeedback, create_compression_algorithm
from penstock.compression.algorithms._blocks import as_flat
from penstock.compression.algorithms._sparse import pack_places, unpack_places
from penstock.compression.algorithms.dct_topk import _basis_of

VARIANTS = [
    ("none", {}),
    ("fp16", {}),
    ("bf16", {}),
    ("fp8", {}),
    ("fp8", {"format": "e5m2", "block_size": 32}),
    ("int8", {}),
    ("int8", {"block_size": 7}),
    ("int4", {}),
    ("int4", {"block_size": 6}),
    ("int2", {}),
    ("int2", {"block_size": 12}),
    ("onebit", {}),
    ("onebit", {"block_size": 8}),
    ("topk", {}),
    ("topk", {"chunk_size": 100, "keep": 3, "values": "bf16"}),
    ("topk_int2", {}),
    ("topk_int2", {"chunk_size": 50, "keep": 7}),
    ("randomk", {}),
    ("randomk", {"every": 5}),
    ("dct_topk", {}),
    ("dct_topk", {"chunk": 9, "topk": 4}),
    ("powersgd", {}),
    ("powersgd", {"rank": 1}),
]
EVERY = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o))}" for n, o in VARIANTS]
)
SHAPES = st.one_of(
    st.tuples(st.integers(0, 5000)),
    st.tuples(st.integers(1, 80), st.integers(1, 90)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
)


def seen(algorithm: CompressionAlgorithm, x: Tensor) -> Tensor:
    return algorithm.decompress(algorithm.compress(x), torch.empty(x.shape, dtype=x.dtype))


def lopsided(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose sizes spread over decades, some of them zero: unlike anything that the algorithms were made for."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape, generator=generator, dtype=dtype) * (seed % 7)
    x = torch.randn(shape, generator=generator, dtype=dtype) * torch.exp(-spread)
    return x * (torch.rand(shape, generator=generator) > 0.1 * (seed % 4)).to(dtype)


@EVERY
@settings(max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_payload_is_as_promised(name: str, options: dict, shape: tuple[int, ...], seed: int, dtype) -> None:
    if name == "none" and dtype == torch.float64:
        return
    algorithm = create_compression_algorithm(name, options)
    payload = algorithm.compress(lopsided(shape, seed).to(dtype))
    promised = {field.name: (field.dtype, tuple(field.shape)) for field in algorithm.layout_for(shape)}
    assert {field: (part.dtype, tuple(part.shape)) for field, part in payload.items()} == promised
    padded = sum(-(-part.nbytes // 8) * 8 for part in payload.values())
    assert algorithm.bytes_for(shape) == padded
    out = algorithm.decompress(payload, torch.empty(shape, dtype=dtype))
    twice = algorithm.decompress_add(payload, out.clone())
    torch.testing.assert_close(twice, 2 * out, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-30)


@EVERY
@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_it_contracts_at_its_stated_factor(name: str, options: dict, shape: tuple[int, ...], seed: int) -> None:
    algorithm = create_compression_algorithm(name, options)
    factor = algorithm.contraction(shape)
    if factor is None:
        assert name == "fp16"  # its range has no bound
        return
    x = lopsided(shape, seed)
    energy = x.double().square().sum().item()
    if name == "randomk":
        # An element is sent with probability 1/every whatever its value: the mean over 200 keys of what is left.
        left = [
            (x - seen(algorithm.keyed(key), x)).double().square().sum().item() for key in range(200 if seed < 50 else 0)
        ]
        if left and energy:
            spread = float(np.std(left)) / math.sqrt(len(left))
            assert abs(np.mean(left) - (1 - _share(shape, algorithm.every, x)) * energy) <= 5 * spread + 1e-9
        return
    left = (x - seen(algorithm, x)).double().square().sum().item()
    assert left <= (1 - factor) * energy + 1e-12 * energy


def _share(shape: tuple[int, ...], every: int, x: Tensor) -> float:
    """The part of the energy that a choice of one in every group sends on average; the last group may be short."""
    flat = x.double().square().view(-1)
    groups = [flat[i : i + every] for i in range(0, flat.numel(), every)]
    return float(sum(g.sum() / len(g) for g in groups) / flat.sum())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {"stochastic": True, "block_size": 64}),
        ("int4", {"stochastic": True}),
        ("int2", {"stochastic": True, "block_size": 60}),
        ("randomk", {"scaled": True, "every": 4}),
    ],
)
def test_the_unbiased_are_right_on_average(name: str, options: dict) -> None:
    algorithm = create_compression_algorithm(name, options)
    assert algorithm.unbiased
    assert algorithm.random
    x = torch.randn(501, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([seen(algorithm.keyed(k), x).double() for k in range(1000)])
    error = draws.mean(0) - x.double()
    deviation = draws.std(0) / math.sqrt(len(draws))
    z = (error / deviation)[deviation > 0.2 * deviation.max()]  # not those next to a level, where a draw is rare
    assert z.numel() > 200
    assert error.abs().max() < 5 * deviation.max()
    assert z.abs().max() < 5  # 501 elements: five deviations are exceeded once in 3,000 runs of the test
    assert z.square().mean().item() == pytest.approx(1, abs=0.25)
    assert torch.equal(seen(algorithm.keyed(3, "a"), x), seen(algorithm.keyed(3, "a"), x))
    assert not torch.equal(seen(algorithm.keyed(3), x), seen(algorithm.keyed(4), x))


def test_rounding_at_random_does_not_depend_on_tiles() -> None:
    algorithm = create_compression_algorithm("int4", {"stochastic": True})
    x = torch.randn((1 << 17) + 300, generator=torch.Generator().manual_seed(0))
    once = seen(algorithm, x)
    memory = torch.zeros_like(x)
    payload = algorithm.compress_with_memory(x, memory)
    assert torch.equal(algorithm.decompress(payload, torch.empty_like(x)), once)
    assert torch.equal(memory, x - once)


BITWISE = [v for v in VARIANTS if v[0] not in ("none", "dct_topk", "powersgd")]


@pytest.mark.parametrize(("name", "options"), BITWISE)
@settings(max_examples=30)
@given(numel=st.integers(1, 2000), steps=st.integers(1, 5), seed=st.integers(0, 100))
def test_everything_sent_plus_the_memory_is_everything_that_came_in_bitwise(
    name: str, options: dict, numel: int, steps: int, seed: int
) -> None:
    # Multiples of 2**-12 below 8: every number that can occur fits float64's 53 bits, so sums are exact in any order.
    generator = torch.Generator().manual_seed(seed)
    algorithm = create_compression_algorithm(name, options)
    feedback = ErrorFeedback.for_tensor(algorithm, torch.empty(numel, dtype=torch.float64))
    came_in = torch.zeros(numel, dtype=torch.float64)
    sent = torch.zeros(numel, dtype=torch.float64)
    for step in range(steps):
        x = torch.randint(-(1 << 15), 1 << 15, (numel,), generator=generator).double() / (1 << 12)
        feedback.algorithm = algorithm.keyed(step)
        sent += algorithm.decompress(feedback.compress(x), torch.empty_like(x))
        came_in += x
    assert torch.equal(sent + feedback.memory, came_in)


@pytest.mark.parametrize(("name", "options"), VARIANTS[-4:])
def test_transforms_and_factors_conserve_up_to_rounding(name: str, options: dict) -> None:
    algorithm = create_compression_algorithm(name, options)
    x = lopsided((70, 65), 1, torch.float64)
    memory = lopsided((70, 65), 2, torch.float64).view(-1)
    total = x + memory.view_as(x)
    sent = algorithm.decompress(algorithm.compress_with_memory(x, memory), torch.empty_like(x))
    torch.testing.assert_close(sent + memory.view_as(x), total, rtol=0, atol=1e-13)


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_seen_and_not_remembered(name: str, options: dict, bad: float) -> None:
    algorithm = create_compression_algorithm(name, options)
    if algorithm.lossless:
        return
    x = torch.ones(60, 70)
    x[7, 3] = bad
    memory = torch.full((4200,), 0.125)
    payload = algorithm.compress_with_memory(x, memory)
    assert not all(part.isfinite().all() for part in payload.values() if part.is_floating_point()) or name == "bf16"
    assert not algorithm.decompress(payload, torch.empty_like(x)).isfinite().all()
    assert memory.isfinite().all()
    assert memory[7 * 70 + 3] == 0.125


@EVERY
def test_zeros_stay_zeros(name: str, options: dict) -> None:
    algorithm = create_compression_algorithm(name, options)
    for x in (torch.zeros(300), torch.zeros(0), torch.zeros(20, 30), torch.full((40,), 1e-42)):
        assert (seen(algorithm, x).abs() <= 2e-42).all()


@given(chunk=st.sampled_from([3, 256, 257, 4096, 5000, 65536]), count=st.integers(0, 200), seed=st.integers(0, 99))
def test_places_survive_packing(chunk: int, count: int, seed: int) -> None:
    places = torch.randint(0, chunk, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_places(places, chunk)
    bits = 8 if chunk <= 256 else 12 if chunk <= 4096 else 16
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_places(packed, count, chunk), places)


def test_topk_sends_the_largest_of_each_chunk() -> None:
    x = torch.tensor([1.0, -5.0, 2.0, 0.5, 3.0, -0.1, 0.2, 0.3, 9.0])
    assert seen(create_compression_algorithm("topk", {"chunk_size": 4, "keep": 2}), x).tolist() == [
        *[0.0, -5.0, 2.0, 0.0],
        *[3.0, 0.0, 0.0, pytest.approx(0.3)],
        9.0,
    ]
    two_bits = seen(create_compression_algorithm("topk_int2", {"chunk_size": 9, "keep": 4}), x)
    # kept: 9, -5, 3, 2; their mean 4.75; above: 9 and 5, not above: 3 and 2
    assert two_bits.tolist() == [0.0, -7.0, 2.5, 0.0, 2.5, 0.0, 0.0, 0.0, 7.0]


def test_integers_are_multiples_of_the_scale() -> None:
    x = torch.tensor([7.0, -3.4, 0.5, 1.5, 2.5, -7.0])
    assert seen(create_compression_algorithm("int4", {"block_size": 6}), x).tolist() == [7.0, -3.0, 0.0, 2.0, 2.0, -7.0]
    y = torch.tensor([127.0, -3.4, 0.5])
    assert seen(create_compression_algorithm("int8"), y).tolist() == [127.0, -3.0, 0.0]


def test_two_bits_suit_normal_elements() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    left = ((x - seen(create_compression_algorithm("int2"), x)).square().sum() / x.square().sum()).item()
    assert left == pytest.approx(0.1188, abs=0.003)  # Max 1960, table II, N = 4


def test_the_cosine_basis_is_orthonormal() -> None:
    for size in (1, 2, 7, 64):
        basis = _basis_of(size, torch.float64, torch.device("cpu"))
        torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    wave = torch.cos(math.pi / 64 * 3 * (torch.arange(64, dtype=torch.float64) + 0.5))
    found = create_compression_algorithm("dct_topk", {"topk": 1})
    torch.testing.assert_close(seen(found, wave), wave, rtol=0, atol=1e-6)


def test_powersgd_is_exact_for_a_matrix_of_its_rank_and_homes_in_on_others() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 3, generator=generator), torch.randn(3, 40, generator=generator)
    algorithm = create_compression_algorithm("powersgd", {"rank": 3})
    torch.testing.assert_close(seen(algorithm, left @ right), left @ right, rtol=1e-4, atol=1e-4)
    noisy = left @ right + 0.3 * torch.randn(50, 40, generator=generator)
    u, s, v = torch.linalg.svd(noisy.double())
    best = (s[3:].square().sum()).item()
    start = algorithm.start(noisy.shape, noisy.device)
    for _ in range(8):
        payload = algorithm.compress_from(noisy, start)
    error = (noisy - algorithm.decompress(payload, torch.empty_like(noisy))).double().square().sum().item()
    assert error == pytest.approx(best, rel=1e-3)
    assert best > 1  # there was something to leave out
    del u, v


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int4", {"block_size": 3}, "multiple of 2"),
        ("int2", {"block_size": 6}, "multiple of 4"),
        ("int8", {"block_size": 0}, "positive multiple of 1"),
        ("int8", {"stochastic": 1}, "true or false"),
        ("int8", {"seed": "x"}, "seed must be an integer"),
        ("fp8", {"format": "e4m4"}, "unknown format 'e4m4'; known: 'e4m3', 'e5m2'"),
        ("topk", {"chunk_size": 70000}, "chunk_size must be a whole number from 1 to 65536, got 70000"),
        ("topk", {"chunk_size": 16, "keep": 17}, "keep must be a whole number from 1 to 16, got 17"),
        ("topk", {"values": "fp8"}, "unknown values 'fp8'"),
        ("topk", {"values": ["bf16"]}, r"unknown values \['bf16'\]"),
        ("fp8", {"format": ["e4m3"]}, r"unknown format \['e4m3'\]"),
        ("topk_int2", {"keep": 0}, "keep must be"),
        ("randomk", {"every": 0}, "every must be"),
        ("randomk", {"scaled": "yes"}, "true or false"),
        ("dct_topk", {"chunk": 300}, "from 1 to 256"),
        ("dct_topk", {"chunk": 4, "topk": 17}, "from 1 to 16"),
        ("powersgd", {"rank": 0}, "rank must be a positive whole number"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_compression_algorithm(name, options)


def test_a_scaled_random_choice_keeps_no_memory() -> None:
    scaled = create_compression_algorithm("randomk", {"scaled": True})
    with pytest.raises(ValueError, match=r"scaled=True multiplies by 32.*error_feedback: false"):
        ErrorFeedback.for_tensor(scaled, torch.empty(3))


def test_two_sizes_of_equal_elements_are_their_size() -> None:
    """The mean of equal numbers may be rounded to below them, and then all of them would be above it."""
    algorithm = create_compression_algorithm("topk_int2", {"chunk_size": 128, "keep": 100})
    for size in torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist():
        x = torch.full((100,), size)
        torch.testing.assert_close(seen(algorithm, x), x, rtol=1e-6, atol=0)


def test_what_is_strided_or_expanded_is_compressed_as_what_it_shows() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    for shown in (x[::2], torch.tensor(2.5).expand(4, 256), x.view(40, 50).T):
        assert as_flat(shown).is_contiguous()
        for name in ("onebit", "int8", "topk"):
            algorithm = create_compression_algorithm(name)
            assert torch.equal(
                seen(algorithm, shown), seen(algorithm, shown.clone(memory_format=torch.contiguous_format))
            )
