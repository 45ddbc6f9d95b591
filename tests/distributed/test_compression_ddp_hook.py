from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from penstock._core.meter import REPLICAS, Meter
from penstock.compression import (
    DDPCompression,
    FeedbackRule,
    create_compression_algorithm,
    ddp_compression_hook,
    machine_groups,
)
from support.pool import WorkerPool


def model_of() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(50, 50), nn.Tanh()))).double()


def inputs(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 50, dtype=torch.float64, generator=generator)


def wrap(name: str | None, **options: Any) -> tuple[DistributedDataParallel, DDPCompression]:
    # Several buckets in flight: each weight is 20 kB.
    model = DistributedDataParallel(model_of(), bucket_cap_mb=0.03)
    state = DDPCompression(None if name is None else create_compression_algorithm(name), **options)
    model.register_comm_hook(state, ddp_compression_hook)
    return model, state


def gradients(model: nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    model.zero_grad()
    model(inputs(rank, step)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def mean_gradients(ranks: int, step: int) -> list[torch.Tensor]:
    return [torch.stack(parts).mean(0) for parts in zip(*(gradients(model_of(), r, step) for r in range(ranks)))]  # noqa: B905


def several_steps(rank: int, world_size: int, name: str | None, steps: int, warmup: int) -> list[Any]:
    meter = Meter()
    model, state = wrap(name, warmup_steps=warmup, meter=meter)
    results = []
    for step in range(steps):
        before = meter.sent[REPLICAS]
        results.append((gradients(model, rank, step), meter.sent[REPLICAS] - before))
    return [results, len(state.state_dict())]


@pytest.mark.parametrize(("name", "tolerance"), [(None, 1e-13), ("none", 1e-13), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_the_hook_gives_the_mean_gradient(pool: WorkerPool, name: str | None, tolerance: float) -> None:
    for results, _ in pool.run(several_steps, 2, name, 3, 0):
        for step, (got, _) in enumerate(results):
            for a, b in zip(got, mean_gradients(2, step), strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_many_compressed_buckets_in_flight_agree_on_every_rank(pool: WorkerPool, ranks: int) -> None:
    steps, warmup = 60, 2
    answers = pool.run(several_steps, ranks, "onebit", steps, warmup)
    ours, entries = answers[0]
    for theirs, _ in answers[1:]:
        for (a, _), (b, _) in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for step in range(warmup):
        for a, b in zip(ours[step][0], mean_gradients(ranks, step), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if ranks > 1:
        assert ours[0][1] > 28 * 2 * ours[-1][1]  # float64 going in: twice the saving
    assert entries > 1 + 2 * 2  # several buckets, each with two memories
    # Errors are fed back: the sum over steps is far closer than any step.
    expected = [mean_gradients(ranks, step) for step in range(warmup, steps)]
    got = [step[0] for step in ours[warmup:]]
    for index in (0, 8):
        total = sum(e[index] for e in expected)
        assert (sum(g[index] for g in got) - total).norm() < 0.5 * sum(
            ((g[index] - e[index]).norm() for g, e in zip(got, expected, strict=True)), torch.tensor(1e-12)
        )


def accumulate(rank: int, world_size: int) -> list[torch.Tensor]:
    model, _ = wrap("none")
    model.zero_grad()
    with model.no_sync():
        model(inputs(rank, 0)).square().mean().backward()
    model(inputs(rank, 1)).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_no_sync_accumulates_before_the_exchange(pool: WorkerPool) -> None:
    for got in pool.run(accumulate, 2):
        for a, b, c in zip(got, mean_gradients(2, 0), mean_gradients(2, 1), strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-12, atol=1e-14)


def resume(rank: int, world_size: int) -> list[bool]:
    model, state = wrap("onebit")
    for step in range(4):
        gradients(model, rank, step)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()}
    expected = gradients(model, rank, 4)
    state.load_state_dict(saved)
    again = gradients(model, rank, 4)
    same = [state.step == 5, all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))]
    with pytest.raises(ValueError, match=f"memories of rank {1 - rank}, but this is rank {rank}: .* on each rank"):
        state.load_state_dict({**saved, "rank": 1 - rank})
    return same


def test_memories_are_restored_bitwise_and_anothers_are_refused(pool: WorkerPool) -> None:
    assert pool.run(resume, 2) == [[True, True]] * 2


class Crossed(nn.Module):
    """Equal layers that run in another order than they are registered in, and one that does not run at all."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(50, 50, bias=False) for _ in range(4)).double()
        self.order = (2, 0, 3, 1)
        if unused:
            self.unused = nn.Linear(50, 50, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x


def crossed(*, unused: bool = False, **options: Any) -> tuple[DistributedDataParallel, DDPCompression]:
    model = DistributedDataParallel(Crossed(unused=unused), bucket_cap_mb=25, find_unused_parameters=unused)
    state = DDPCompression(create_compression_algorithm("onebit"), **options)
    model.register_comm_hook(state, ddp_compression_hook)
    return model, state


def owed_after_each_step(rank: int, world_size: int) -> list[Any]:
    model, state = crossed()
    result = []
    for step in range(3):
        gradients(model, rank, step)
        saved = state.state_dict()
        result.append((saved["bucket_000.parameters"], saved["bucket_000.worker"].clone()))
    return [result, gradients(Crossed(unused=False), rank, 1)]


def test_equal_parameters_that_change_places_do_not_inherit_each_others_memory(pool: WorkerPool) -> None:
    onebit = create_compression_algorithm("onebit")
    for ((first, _), (second, owed), (third, _)), local in pool.run(owed_after_each_step, 2):
        assert first == [0, 1, 2, 3]
        assert sorted(second) == first != second  # DDP did rearrange its one bucket, of four equal shapes
        assert third == second
        # The second step owes what one compression of its gradient alone leaves, chunk by chunk (half of the elements,
        # up to a multiple of 64).
        expected = torch.cat([local[number].flatten() for number in second])
        for chunk in expected.split(5056):
            onebit.compress_with_memory(torch.zeros_like(chunk), chunk)
        torch.testing.assert_close(owed, expected, rtol=1e-12, atol=1e-15)


def restart(rank: int, world_size: int) -> list[Any]:
    model, state = crossed()
    for step in range(3):
        gradients(model, rank, step)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()}
    again, fresh = crossed()
    fresh.load_state_dict(saved)
    owed = []
    for step in (3, 4):
        gradients(again, rank, step)
        now = fresh.state_dict()
        owed.append((now["bucket_000.parameters"], now["bucket_000.worker"].clone()))
    return [saved, owed, [gradients(Crossed(unused=False), rank, step) for step in (3, 4)]]


def test_a_restarted_run_takes_its_memories_when_their_bucket_comes(pool: WorkerPool) -> None:
    onebit = create_compression_algorithm("onebit")
    for saved, owed, local in pool.run(restart, 2):
        layout = saved["bucket_000.parameters"]
        assert owed[0][0] != layout == owed[1][0]
        # At first the saved memory is another layout's and waits, then it is added to the gradient.
        before = [torch.zeros(10000, dtype=torch.float64), saved["bucket_000.worker"]]
        for (numbers, left), waiting, gradient in zip(owed, before, local, strict=True):
            expected = waiting + torch.cat([gradient[number].flatten() for number in numbers])
            for chunk in expected.split(5056):
                onebit.compress_with_memory(torch.zeros_like(chunk), chunk)
            torch.testing.assert_close(left, expected, rtol=1e-12, atol=1e-15)


def with_an_unused_layer(rank: int, world_size: int) -> list[Any]:
    model, state = crossed(unused=True)
    got = [gradients(model, rank, step) for step in range(4)]
    return [got, sorted(name for name in state.state_dict() if name.endswith("parameters"))]


def test_a_layer_that_does_not_run_leaves_the_ranks_equal(pool: WorkerPool) -> None:
    (ours, names), (theirs, _) = pool.run(with_an_unused_layer, 2)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert names


def scaled(rank: int, world_size: int, name: str, kind: Any, scaling: str) -> list[Any]:
    """SGD for eight steps, of which the sixth overflows in one layer of one rank; its scale changes every other step.

    ``scaling``: ``"told"`` with a GradScaler that the hook knows of, ``"untold"`` with one that it does not, ``"none"``
    without, and without the step that the others skip.
    """
    torch.manual_seed(1)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(50, 50), nn.Tanh())))
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**20, growth_interval=2, backoff_factor=2.0**-6, enabled=scaling != "none"
    )
    state = DDPCompression(
        create_compression_algorithm(name),
        error_feedback=FeedbackRule(kind),
        scaler=scaler if scaling != "untold" else None,
    )
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.015)
    wrapped.register_comm_hook(state, ddp_compression_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []
    for step in range(8):
        if step == 5 and scaling == "none":
            continue
        loss = wrapped(inputs(rank, step).float()).square().mean()
        if step == 5 and rank == 1:
            loss = loss + 1e36 * model[2].weight.sum()  # type: ignore[union-attr, operator]
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return [[p.detach().clone() for p in model.parameters()], scales, state.step, state.state_dict()]


@pytest.mark.parametrize(("name", "kind"), [("onebit", "classic"), ("powersgd", "classic"), ("topk", "ef21")])
def test_a_loss_scale_that_changes_and_a_skipped_step_leave_no_trace(pool: WorkerPool, name: str, kind: str) -> None:
    plain, told = (pool.run(scaled, 2, name, kind, scaling) for scaling in ("none", "told"))
    for (weights, scales, steps, state), (wanted, _, _, memories) in zip(told, plain, strict=True):
        # Powers of two change no bits but exponents.
        assert scales == [2.0**k for k in (20, 20, 21, 21, 22, 22, 16, 16)]
        assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
        assert steps == 7
        assert state.keys() == memories.keys()
        assert all(torch.equal(a, memories[key]) for key, a in state.items() if isinstance(a, torch.Tensor))
    if name == "onebit":
        (untold, *_), _ = pool.run(scaled, 2, name, kind, "untold")
        assert not all(torch.equal(a, b) for a, b in zip(untold, plain[0][0], strict=True))


def over_machines(rank: int, world_size: int, name: str | None, steps: int) -> list[Any]:
    inside, between = machine_groups([range(world_size)], 2)
    model, state = wrap(name, group=between, inside=inside)
    results = [gradients(model, rank, step) for step in range(steps)]
    return [results, sum(v.numel() for key, v in state.state_dict().items() if key.endswith("worker"))]


def test_machines_sum_in_full_precision_and_compress_between_them(pool: WorkerPool) -> None:
    numel = sum(p.numel() for p in model_of().parameters())
    for results, owed in pool.run(over_machines, 4, "none", 1):
        assert owed == 0
        for a, b in zip(results[0], mean_gradients(4, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    answers = pool.run(over_machines, 4, "int8", 3)
    # Each of a machine's two ranks owes for its shards alone.
    assert [answers[0][1] + answers[1][1], answers[2][1] + answers[3][1]] == [numel, numel]
    for results, _ in answers:
        for step in range(3):
            for a, b, mean in zip(results[step], answers[0][0][step], mean_gradients(4, step), strict=True):
                assert torch.equal(a, b)
                assert (a - mean).norm() < 0.05 * mean.norm()
                assert not torch.equal(a, mean)


def test_whole_matrices_and_shards_do_not_go_together(pool: WorkerPool) -> None:
    for message in pool.run(matrices_over_machines, 2):
        assert "cuts them into shards; take another algorithm, or leave inside out" in message


def matrices_over_machines(rank: int, world_size: int) -> str:
    try:
        DDPCompression(create_compression_algorithm("powersgd"), inside=torch.distributed.group.WORLD)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_warm_up_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="got -2"):
        DDPCompression(None, warmup_steps=-2)


def tiny_half_gradients(rank: int, world_size: int) -> torch.Tensor:
    """Gradients of 1e-7, which float16 knows only times a loss scale."""
    model = nn.Linear(8, 4, bias=False).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(DDPCompression(None, scaler=scaler), ddp_compression_hook)
    loss = wrapped(torch.ones(1, 8, dtype=torch.float16)).float().sum() * 1e-7
    scaler.scale(loss).backward()
    assert model.weight.grad is not None
    return model.weight.grad


def test_what_loss_scaling_saves_is_not_lost_where_nothing_is_compressed(pool: WorkerPool) -> None:
    for gradient in pool.run(tiny_half_gradients, 2):
        torch.testing.assert_close(gradient.float(), torch.full((4, 8), 1e-7 * 2**16), rtol=1e-2, atol=0)
