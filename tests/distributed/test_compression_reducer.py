from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock._core.meter import REPLICAS, Meter
from penstock._core.protocols import GradientExchange
from penstock.compression import Reducer, create_compression_algorithm
from support.compression_reference import bounds
from support.pool import WorkerPool

WEIGHT = 0.25


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5), nn.Linear(5, 3)).to(dtype)


def batch(rank: int, micro_batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * micro_batch + rank)
    return torch.randn(4, 7, dtype=torch.float64, generator=generator).to(dtype)


def run_step(model: nn.Module, reducer: Reducer, rank: int, step: int, dtype: torch.dtype = torch.float64) -> None:
    """Two micro-batches, the last of which may overlap with communication."""
    model.zero_grad()
    reducer.begin_step(lambda: WEIGHT)
    model(batch(rank, 2 * step, dtype)).square().mean().backward()
    reducer.arm(model.parameters())
    model(batch(rank, 2 * step + 1, dtype)).square().mean().backward()
    reducer.finish()


def expected_gradients(ranks: int, step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    model = network(dtype)
    for rank in range(ranks):
        for micro_batch in (2 * step, 2 * step + 1):
            (WEIGHT * model(batch(rank, micro_batch, dtype)).square().mean()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain(rank: int, world_size: int, bucket_bytes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    model = network(dtype)
    reducer = Reducer([list(model.named_parameters())], bucket_bytes=bucket_bytes)
    assert isinstance(reducer, GradientExchange)
    run_step(model, reducer, rank, 0, dtype)
    run_step(model, reducer, rank, 1, dtype)
    return gradients_of(model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 10**7])
def test_uncompressed_gradients_are_the_weighted_sum(pool: WorkerPool, ranks: int, bucket_bytes: int) -> None:
    answers = pool.run(plain, ranks, bucket_bytes, torch.float64)
    for gradients in answers:
        for got, expected, first in zip(gradients, expected_gradients(ranks, 1), answers[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
            assert torch.equal(got, first)


def test_bf16_gradients_stay_bf16(pool: WorkerPool) -> None:
    for got, expected in zip(
        pool.run(plain, 2, 600, torch.bfloat16)[1], expected_gradients(2, 1, torch.bfloat16), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def compressed(rank: int, world_size: int, name: str, steps: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """The gradients of each step; then, for each parameter, what all ranks together still owe."""
    model = network(dtype)
    sets = [list(model[:3].named_parameters()), list(model[3:].named_parameters(prefix="last"))]
    reducer = Reducer(sets, algorithm=create_compression_algorithm(name), bucket_bytes=900, warmup_steps=1)
    results = []
    for step in range(steps):
        run_step(model, reducer, rank, step, dtype)
        results.append(gradients_of(model))
    owed = {}
    for index, bucket in enumerate(reducer.buckets):
        flat = reducer.state_dict()[f"bucket_{index:03d}.worker"].clone()
        start, stop = bounds(bucket.numel, world_size)[rank]
        flat[start:stop] += reducer.state_dict()[f"bucket_{index:03d}.server"]
        dist.all_reduce(flat)
        owed.update(zip(bucket.parameters, bucket.views(flat), strict=True))
    return [*results, [owed[p] for p in model.parameters()]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_compressed_gradients_and_what_is_owed_add_up(pool: WorkerPool, ranks: int) -> None:
    steps = 20
    answers = pool.run(compressed, ranks, "onebit", steps, torch.float64)
    for theirs in answers[1:]:
        for ours, others in zip(answers[0], theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    *by_step, owed = answers[0]
    for got, expected in zip(by_step[0], expected_gradients(ranks, 0), strict=True):  # the warm-up step
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    for index in range(len(owed)):
        got = sum(step[index] for step in by_step) + owed[index]
        expected = sum(expected_gradients(ranks, step)[index] for step in range(steps))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        assert not torch.equal(by_step[1][index], expected_gradients(ranks, 1)[index])  # it was compressed


def test_compressed_bf16_gradients_agree_bitwise(pool: WorkerPool) -> None:
    ours, theirs = pool.run(compressed, 2, "onebit", 4, torch.bfloat16)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert {g.dtype for step in ours[:-1] for g in step} == {torch.bfloat16}
    assert {memory.dtype for memory in ours[-1]} == {torch.float32}


def stop_and_go_on(rank: int, world_size: int, name: str) -> bool:
    def fresh() -> tuple[nn.Module, Reducer]:
        model = network()
        algorithm = create_compression_algorithm(name)
        return model, Reducer([list(model.named_parameters())], algorithm=algorithm, bucket_bytes=900, warmup_steps=2)

    model, reducer = fresh()
    for step in range(5):
        run_step(model, reducer, rank, step)
        if step == 2:
            saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in reducer.state_dict().items()}
    resumed, other = fresh()
    run_step(resumed, other, rank, 9)  # whatever it did before
    storage = [t.data_ptr() for t in other.state_dict().values() if isinstance(t, torch.Tensor)]
    other.load_state_dict(saved)
    assert storage == [t.data_ptr() for t in other.state_dict().values() if isinstance(t, torch.Tensor)]
    for step in (3, 4):
        run_step(resumed, other, rank, step)
    return all(torch.equal(a, b) for a, b in zip(gradients_of(model), gradients_of(resumed), strict=True))


@pytest.mark.parametrize("name", ["onebit", "bf16", "none"])
def test_a_resumed_run_is_bitwise_the_same(pool: WorkerPool, name: str) -> None:
    assert pool.run(stop_and_go_on, 2, name) == [True, True]


def disorder(rank: int, world_size: int) -> list[torch.Tensor]:
    """Gradients become final in a different order on each rank; one parameter is never used by rank 1."""
    parameters = [nn.Parameter(torch.ones(100)) for _ in range(6)]
    reducer = Reducer([[(str(i), p)] for i, p in enumerate(parameters)])
    reducer.begin_step(lambda: 1.0)
    order = [0, 1, 2, 3, 4, 5] if rank == 0 else [5, 3, 1, 4, 2]
    for index in order:
        parameters[index].grad = torch.full((100,), float(10 * rank + index))
        reducer.ready([parameters[index]])
    reducer.finish()
    return gradients_of(nn.ParameterList(parameters))


def test_any_order_of_readiness_gives_the_same_answer(pool: WorkerPool) -> None:
    for gradients in pool.run(disorder, 2):
        assert [g[0].item() for g in gradients] == [0.0] + [10.0 + 2 * i for i in range(1, 6)]


def overlap(rank: int, world_size: int) -> int:
    model = network()
    meter = Meter()
    reducer = Reducer([list(model.named_parameters())], bucket_bytes=1, meter=meter)
    reducer.begin_step(lambda: WEIGHT)
    model(batch(rank, 0)).square().mean().backward()
    assert meter.sent[REPLICAS] == 0  # nothing is armed: more gradients are to come
    reducer.arm(model.parameters())
    model(batch(rank, 1)).square().mean().backward()
    started_in_backward = meter.sent[REPLICAS]
    reducer.finish()
    assert meter.sent[REPLICAS] == started_in_backward
    return started_in_backward


def test_reductions_start_under_the_last_backward_and_only_there(pool: WorkerPool) -> None:
    padded = sum(-(-p.numel() // 8) * 8 for p in network().parameters())
    assert pool.run(overlap, 2) == [8 * padded, 8 * padded]


def partly_frozen(rank: int, world_size: int) -> list[Any]:
    model = network()
    model[2].requires_grad_(False)
    reducer = Reducer([list(model.named_parameters())], bucket_bytes=1)
    run_step(model, reducer, rank, 0)
    frozen = [p.grad is None for p in model[2].parameters()]
    return [*frozen, model[0].weight.grad]


def test_frozen_parameters_are_left_alone(pool: WorkerPool) -> None:
    for *frozen, gradient in pool.run(partly_frozen, 2):
        assert frozen == [True, True]
        torch.testing.assert_close(gradient, expected_gradients(2, 0)[0], rtol=1e-13, atol=1e-15)


def megabytes(rank: int, world_size: int, name: str | None) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    meter = Meter()
    algorithm = None if name is None else create_compression_algorithm(name)
    reducer = Reducer([list(model.named_parameters())], algorithm=algorithm, warmup_steps=1, meter=meter)
    for _ in range(2):
        before = meter.sent[REPLICAS]
        reducer.begin_step(lambda: 1.0)
        reducer.arm(model.parameters())
        model(torch.ones(2, 512)).sum().backward()
        reducer.finish()
    return meter.sent[REPLICAS] - before


def test_a_million_parameters_take_a_twenty_eighth_of_the_bytes(pool: WorkerPool) -> None:
    plain_bytes = pool.run(megabytes, 2, None)
    one_bit = pool.run(megabytes, 2, "onebit")
    assert plain_bytes == [4 * 4 * (512 * 512 + 512)] * 2
    assert max(one_bit) * 28 <= min(plain_bytes)


def mistakes(rank: int, world_size: int) -> list[str]:
    p, stranger = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    reducer = Reducer([[("p", p)]], algorithm=create_compression_algorithm("onebit"))
    said: list[str] = []
    calls: list[Any] = [
        reducer.finish,
        lambda: reducer.arm([stranger]),
        lambda: reducer.load_state_dict({"step": 1, "bucket_000.worker": torch.zeros(16)}),
        lambda: Reducer([], warmup_steps=-1),
    ]
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_mistakes_are_named(pool: WorkerPool) -> None:
    for said in pool.run(mistakes, 2):
        assert len(said) == 4
        assert "without begin_step()" in said[0]
        assert "shape (2,) is not one of this reducer's" in said[1]
        assert "do not fit: bucket_000.server (1 of 2 differ)" in said[2]
        assert "warmup_steps must not be negative, got -1" in said[3]


def test_a_step_that_failed_half_way_is_forgotten() -> None:
    model = network()
    reducer = Reducer([list(model.named_parameters())])
    reducer.begin_step(lambda: 1.0)
    reducer.arm(model.parameters())
    run_step(model, reducer, 0, 0)
    for got, expected in zip(gradients_of(model), expected_gradients(1, 0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    reducer.close()
    model(batch(0, 0)).sum().backward()  # no hook is left to object


def late_gradient(rank: int, world_size: int, reentrant: bool) -> str | list[torch.Tensor]:
    """A layer used twice, each use recomputed: a nested backward pass for each gives the weight two gradients."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.eye_(model.weight)
    reducer = Reducer([list(model.named_parameters())])
    reducer.begin_step(lambda: 1.0)
    reducer.arm(model.parameters())
    x = torch.ones(2, 4, requires_grad=True)
    y = checkpoint(model, checkpoint(model, x, use_reentrant=reentrant), use_reentrant=reentrant)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return str(error)
    reducer.finish()
    return gradients_of(model)


def test_a_gradient_after_the_last_one_is_an_error_and_not_a_wrong_sum(pool: WorkerPool) -> None:
    assert all("take use_reentrant=False" in answer for answer in pool.run(late_gradient, 2, True))
    for (gradient,) in pool.run(late_gradient, 2, False):
        # Two ranks, two uses, two rows of ones: the weight is the identity, so both uses see and return ones.
        assert torch.equal(gradient, torch.full((4, 4), 8.0))
