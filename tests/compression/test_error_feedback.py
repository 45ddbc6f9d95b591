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
    registry,
)
from penstock.compression.algorithms import OneBit


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


def test_warm_up_decay_reset_and_ef21_of_a_module() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    warm = initialize_module({"algorithm": "onebit", "warmup_steps": 2})
    assert torch.equal(warm(x, "w"), x)
    assert torch.equal(warm(x, "w"), x)
    first = warm(x, "w")
    assert torch.equal(first, initialize_module("onebit")(x, "w"))
    assert warm.statistics.bytes_out == 2 * 2000 + warm.algorithm.bytes_for(500)
    fading = initialize_module({"algorithm": "onebit", "error_decay": 0.75})
    seen = fading(x, "w")
    torch.testing.assert_close(fading.state_dict()["memories"]["w"], 0.25 * (x - seen))
    resetting = initialize_module({"algorithm": "onebit", "error_reset_every": 2})
    seen = [resetting(x, "w") for _ in range(4)]
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    estimating = initialize_module({"algorithm": "int4", "error_feedback": "ef21"})
    errors = [float((estimating(x, "w") - x).norm()) for _ in range(8)]
    assert errors[-1] < 1e-4 * errors[0]
    spoilt = x.clone()
    spoilt[3] = math.nan
    before = estimating.state_dict()["memories"]["w"].clone()
    assert not estimating(spoilt, "w").isfinite().all()
    assert torch.equal(estimating.state_dict()["memories"]["w"], before)


@pytest.mark.parametrize(
    ("name", "options"), [("powersgd", {"rank": 1}), ("randomk", {}), ("int2", {"stochastic": True})]
)
def test_modules_with_more_than_a_memory_resume_bitwise(name: str, options: dict) -> None:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(30, 40, generator=generator) for _ in range(6)]
    straight, other = (initialize_module({"algorithm": name, "options": options}) for _ in range(2))
    for x in xs[:3]:
        straight(x, "w")
    saved = straight.state_dict()
    saved["memories"] = {key: memory.clone() for key, memory in saved["memories"].items()}
    saved["starts"] = {key: start.clone() for key, start in saved["starts"].items()}
    saved["calls"] = dict(saved["calls"])
    expected = [straight(x, "w") for x in xs[3:]]
    other.load_state_dict(saved)
    assert all(torch.equal(other(x, "w"), want) for x, want in zip(xs[3:], expected, strict=True))
    assert len({float(want.sum()) for want in expected}) == 3


class _Point:
    def __init__(self, name: str, target: object) -> None:
        self.name, self.value, self.dist = name, f"package:{name}", None
        self._target = target

    def load(self) -> object:
        if isinstance(self._target, Exception):
            raise self._target
        return self._target


def test_packages_bring_algorithms_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guest(OneBit):
        name = "guest"

    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point("guest", Guest)])
    registry._register_installed.cache_clear()
    assert isinstance(create_compression_algorithm("guest", {"block_size": 64}), Guest)
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point("broken", ImportError("no such module"))])
    registry._register_installed.cache_clear()
    with pytest.raises(ValueError, match=r"entry point broken = package:broken .* no such module; mend or uninstall"):
        create_compression_algorithm("broken")
    registry._register_installed.cache_clear()


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("none", torch.float32)]
)
def test_a_payload_is_apart_from_the_tensor_that_it_was_made_of(name: str, dtype: torch.dtype) -> None:
    module = CompressionModule(create_compression_algorithm(name), error_feedback=False)
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = gradient.clone()
    payload = module.compress(gradient)
    gradient.zero_()
    assert torch.equal(module.decompress(payload, torch.empty_like(before)), before)
