"""The cost of a step by formulas written out here, and what follows from them for a recommendation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.compression import create_compression_algorithm, get_compression_class, known_algorithms
from penstock.compression.network.cost import (
    Prediction,
    exchange_of,
    predict,
    quality,
    recommend,
    square_shapes,
)
from penstock.compression.network.link import Link, fit_link
from penstock.compression.network.probe import Codec, Network

SHAPES = [[1024, 1024]] * 25  # 100 MiB of float32: four buckets of 25 MiB


def network_of(bandwidth: float, ranks: int = 2, latency_s: float = 0.0) -> Network:
    link = Link(latency_s, 8 / bandwidth)
    return Network(ranks, link, link, link)


@given(
    st.floats(0, 0.1),
    st.floats(1e-11, 1e-5),
    st.lists(st.sampled_from([4096, 65536, 524288, 4194304]), min_size=0, max_size=3),
)
def test_the_line_is_found_again_whatever_a_few_bad_measurements_say(
    latency: float, per_byte: float, bad: list[int]
) -> None:
    sizes = [size for size in (4096, 65536, 524288, 4194304) for _ in range(7)]
    times = [latency + per_byte * size for size in sizes]
    for size in set(bad):
        times[sizes.index(size)] += 1.0
    link = fit_link(sizes, times)
    for size in sizes:
        assert link.seconds(size) == pytest.approx(latency + per_byte * size, rel=1e-2, abs=1e-9)


def test_a_line_needs_two_sizes_and_a_time_for_each() -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_link([10, 10], [1.0, 2.0])
    with pytest.raises(ValueError, match="2 sizes but 1 times"):
        fit_link([10, 20], [1.0])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bytes_are_those_of_the_collectives(ranks: int) -> None:
    numel = 25 << 20
    payload = {name: create_compression_algorithm(name).bytes_for(numel) for name in ("none", "onebit", "topk")}
    wanted = {
        "none": 2 * (ranks - 1) / ranks * payload["none"],  # an all-reduce
        "onebit": 2 * (ranks - 1) / ranks * payload["onebit"],  # all-to-all and all-gather of chunks
        "topk": (ranks - 1) * payload["topk"],  # each rank's to all others
    }
    for name, nbytes in wanted.items():
        assert exchange_of(create_compression_algorithm(name), SHAPES, ranks).nbytes == pytest.approx(nbytes)
    factors = 25 * (1024 + 1024) * 4 * 4  # rank 4, float32
    powersgd = exchange_of(create_compression_algorithm("powersgd"), SHAPES, ranks)
    assert powersgd.nbytes == pytest.approx(2 * (ranks - 1) / ranks * factors, rel=1e-3)


def test_a_step_is_its_compute_the_compression_and_what_the_backward_pass_does_not_hide() -> None:
    none, free = create_compression_algorithm("none"), Codec(0.0, 0.0, 0.0)
    nbytes = 4 * (25 << 20)  # two ranks send the buffer once
    network = network_of(1e9, latency_s=0.001)
    wire_s = 4 * 0.001 + nbytes * 8e-9
    assert predict(none, free, network, SHAPES, 0.3).step_s == pytest.approx(0.3 + wire_s - 0.2)
    # Under a long backward pass all is hidden but the last of the four buckets.
    assert predict(none, free, network, SHAPES, 30.0).step_s == pytest.approx(30.0 + wire_s / 4)
    apart = predict(none, free, network, SHAPES, 0.3, period=30)
    assert apart.step_s == pytest.approx(0.3 + wire_s / 30)
    assert apart.nbytes == pytest.approx(nbytes / 30)
    # Two phases: each rank compresses its buffer and the sum of its half, and decompresses two buffers in all.
    onebit = create_compression_algorithm("onebit")
    codec = Codec(compress_s=2e-9, decompress_s=1e-9, relative_error=0.6)
    slower = predict(onebit, codec, network, SHAPES, 0.3).step_s - predict(onebit, free, network, SHAPES, 0.3).step_s
    assert slower == pytest.approx((25 << 20) * (1.5 * 2e-9 + 2 * 1e-9))


CODECS = {
    "none": Codec(0, 0, 0.0),
    "bf16": Codec(1e-10, 1e-10, 0.002),
    "int8": Codec(1e-9, 3e-10, 0.006),
    "int4": Codec(1e-9, 3e-10, 0.1),
    "onebit": Codec(1e-9, 3e-10, 0.6),
    "topk_int2": Codec(5e-9, 1e-10, 0.9),
}


def choice(bandwidth: float, compute_s: float) -> Prediction:
    network = network_of(bandwidth)
    made = [predict(create_compression_algorithm(n), c, network, SHAPES, compute_s) for n, c in CODECS.items()]
    return recommend(made, compute_s)


@given(st.floats(1e6, 1e12), st.floats(1.0, 1e3), st.floats(0.01, 100))
def test_a_faster_network_never_asks_for_more_compression(bandwidth: float, faster: float, compute_s: float) -> None:
    before, after = choice(bandwidth, compute_s), choice(bandwidth * faster, compute_s)
    assert after.relative_error <= before.relative_error
    assert after.nbytes >= before.nbytes


def test_the_ends_of_the_range() -> None:
    assert choice(1e13, 1.0).algorithm == "none"
    assert choice(1e6, 1.0).algorithm == "topk_int2"


def test_methods_that_train_apart_are_not_recommended_by_themselves() -> None:
    with pytest.raises(ValueError, match="nothing to recommend"):
        recommend([Prediction("none", 30, 1.0, 1.0, 0.0)], 1.0)


def test_quality_is_said_plainly() -> None:
    assert quality(0.0) == "none: the exchange is exact"
    assert quality(0.05).startswith("small: 5.0%")
    assert "OneBitAdam" in quality(0.6)


def test_a_model_of_which_only_the_size_is_known_has_that_size() -> None:
    for parameters in (1, 1 << 20, 25_000_000):
        for name in known_algorithms():
            if not get_compression_class(name).__module__.startswith("penstock."):
                continue  # another test's
            assert exchange_of(create_compression_algorithm(name), square_shapes(parameters), 2).nbytes > 0
        assert sum(s[0] * (s[1] if len(s) > 1 else 1) for s in square_shapes(parameters)) == parameters
