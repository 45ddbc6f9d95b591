import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.compression import (
    CompressionConfig,
    CompressionModule,
    ErrorFeedback,
    create_compression_algorithm,
    initialize_module,
)


@pytest.mark.parametrize("name", ["bf16", "fp16", "onebit"])
@given(numel=st.integers(1, 2000), steps=st.integers(1, 8), seed=st.integers(0, 100))
def test_everything_sent_plus_the_memory_is_everything_that_came_in(
    name: str, numel: int, steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    algorithm = create_compression_algorithm(name)
    feedback = ErrorFeedback.for_tensor(algorithm, torch.empty(numel, dtype=torch.float64))
    came_in = torch.zeros(numel, dtype=torch.float64)
    sent = torch.zeros(numel, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randn(numel, dtype=torch.float64, generator=generator)
        kept = x.clone()
        sent += algorithm.decompress(feedback.compress(x), torch.empty_like(x))
        assert torch.equal(x, kept)
        came_in += x
    torch.testing.assert_close(sent + feedback.memory, came_in, rtol=0, atol=1e-12)


def test_the_memory_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    algorithm = create_compression_algorithm("onebit")
    feedback = ErrorFeedback.for_tensor(algorithm, torch.empty(4096))
    norms = []
    for _ in range(200):
        feedback.compress(torch.randn(4096, generator=generator))
        norms.append(feedback.memory.norm().item())
    assert max(norms[100:]) < 1.5 * max(norms[50:100])


@pytest.mark.parametrize("name", ["bf16", "fp16", "onebit"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_seen_and_forgotten(name: str, bad: float) -> None:
    algorithm = create_compression_algorithm(name)
    feedback = ErrorFeedback.for_tensor(algorithm, torch.empty(100))
    x = torch.linspace(-1, 1, 100)
    feedback.compress(x)
    spoilt = x.clone()
    spoilt[7] = bad
    sent = algorithm.decompress(feedback.compress(spoilt), torch.empty(100))
    assert not sent[7].isfinite()
    assert feedback.memory.isfinite().all()
    again = algorithm.decompress(feedback.compress(x), torch.empty(100))
    assert again.isfinite().all()


def test_a_module_keeps_a_memory_for_each_name() -> None:
    module = initialize_module("onebit")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, generator=generator), torch.randn(20, 5, generator=generator)
    first = module(a, "a")
    module(b, "b")
    alone = initialize_module("onebit")
    assert torch.equal(first, alone(a, "a"))
    assert torch.equal(module(a, "a"), alone(a, "a"))
    assert module.statistics.calls == 3
    assert module.statistics.bytes_in == 4 * 700
    assert module.statistics.bytes_out == 2 * (8 + 40) + (8 + 16)
    with pytest.raises(ValueError, match="memory named 'a' holds 300 elements, but the tensor has 100"):
        module(b, "a")
    with pytest.raises(ValueError, match=r"torch.int64"):
        module(torch.arange(3))


def test_statistics_measure_the_error() -> None:
    module = initialize_module({"algorithm": "onebit", "error_feedback": False})
    x = torch.tensor([3.0, 1.0, -2.0, -2.0])  # seen as 2, 2, -2, -2
    assert module(x).tolist() == [2.0, 2.0, -2.0, -2.0]
    assert module(x).tolist() == [2.0, 2.0, -2.0, -2.0]
    assert module.statistics.relative_error == pytest.approx(math.sqrt(2 / 18))
    assert module.statistics.ratio == pytest.approx(16 / 16)


def test_a_module_resumes_bitwise() -> None:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(5000, generator=generator) for _ in range(6)]
    straight, stopped = initialize_module("onebit"), initialize_module("onebit")
    for x in xs[:3]:
        straight(x, "w")
        stopped(x, "w")
    saved = stopped.state_dict()
    saved["memories"] = {name: memory.clone() for name, memory in saved["memories"].items()}
    for target in (initialize_module("onebit"), stopped):  # a fresh one, and one that has gone on
        target(xs[5], "w")
        target(xs[5], "other")
        target.load_state_dict(saved)
        again = [target(x, "w") for x in xs[3:]]
        reference = initialize_module("onebit")
        for x in xs[:3]:
            reference(x, "w")
        assert all(torch.equal(a, reference(x, "w")) for a, x in zip(again, xs[3:], strict=True))
        assert target.statistics == reference.statistics
        assert target.state_dict()["memories"].keys() == {"w"}


def test_loading_another_models_memory_is_refused_before_anything_changes() -> None:
    module = initialize_module("onebit")
    module(torch.ones(10), "w")
    before = module.state_dict()["memories"]["w"].clone()
    with pytest.raises(ValueError, match="'w' has 3 elements, this one 10"):
        module.load_state_dict({"memories": {"w": torch.zeros(3)}, "statistics": {}})
    assert torch.equal(module.state_dict()["memories"]["w"], before)


def test_initialize_module_takes_a_name_a_mapping_or_a_configuration() -> None:
    config = CompressionConfig(algorithm="onebit", options={"block_size": 64})
    for given_as in (config, config.model_dump()):
        module = initialize_module(given_as)
        assert isinstance(module, CompressionModule)
        assert module.algorithm.options() == {"block_size": 64, "scale": "l1"}
    assert not initialize_module("none").error_feedback  # nothing is ever left over
    with pytest.raises(ValueError, match="did you mean 'fp16'"):
        initialize_module("fp61")
