"""Compressed gradients of parameters that FSDP2 divides: the collective by itself, and in whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import penstock
from penstock._core.meter import REPLICAS
from penstock.compression import FeedbackRule, compress_fsdp, create_compression_algorithm
from penstock.compression.sharded import CompressedReduceScatter
from support.pool import WorkerPool
from support.run_jobs import config, model, resume_job, tokens

SIZE = 300


def contribution(rank: int, step: int, ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(ranks * SIZE, generator=generator, dtype=torch.float64)


def scatter(made: CompressedReduceScatter, given: Tensor, ranks: int) -> Tensor:
    out = torch.empty(SIZE, dtype=given.dtype)
    assert dist.group.WORLD is not None
    made(out, given, dist.group.WORLD)
    return out


def several_calls(rank: int, world_size: int, name: str, rule: FeedbackRule, calls: int) -> list[Any]:
    made = CompressedReduceScatter(create_compression_algorithm(name), error_feedback=rule, warmup_steps=1)
    made.scale = 0.25
    results = [scatter(made, contribution(rank, call, world_size), world_size) for call in range(calls)]
    return [results, made.memory, made.received]


@pytest.mark.parametrize("name", ["int4", "topk", "onebit"])
def test_what_was_reduced_and_what_is_owed_is_what_came_in(pool: WorkerPool, name: str) -> None:
    ranks, calls = 3, 4
    answers = pool.run(several_calls, ranks, name, FeedbackRule(), calls)
    came_in = [sum(contribution(r, call, ranks) for r in range(ranks)) * 0.25 for call in range(calls)]
    warm = torch.cat([results[0] for results, *_ in answers])
    torch.testing.assert_close(warm, came_in[0], rtol=0, atol=1e-13)  # the first call goes as it is
    sent = torch.cat([sum(results[1:]) for results, *_ in answers])
    owed = sum(memory for _, memory, _ in answers)
    assert owed.abs().max() > 1e-2
    torch.testing.assert_close(sent + owed, sum(came_in[1:]), rtol=0, atol=1e-12)


def constant(rank: int, world_size: int, rule: FeedbackRule) -> list[float]:
    """The error of each call when all send the same, of which one is spoilt by a rank."""
    made = CompressedReduceScatter(create_compression_algorithm("int2", {"block_size": 60}), error_feedback=rule)
    wanted = sum(contribution(r, 0, world_size) for r in range(world_size))[rank * SIZE : (rank + 1) * SIZE]
    errors = []
    for call in range(12):
        given = contribution(rank, 0, world_size)
        if call == 3 and rank == 1:
            given[5] = torch.inf  # in what it sends to rank 0
        out = scatter(made, given, world_size)
        errors.append(float((out - wanted).norm() / wanted.norm()))
    return errors


def test_rules_of_feedback_hold_for_shards(pool: WorkerPool) -> None:
    for rank, errors in enumerate(pool.run(constant, 2, FeedbackRule("ef21"))):
        assert errors[0] > 0.2
        assert errors[-1] < 1e-2
        assert (errors[3] < errors[0]) == (rank == 1)  # rank 0 sees what is not finite, once
        assert errors[4] < errors[2]
    for errors in pool.run(constant, 2, FeedbackRule(reset_every=4)):
        assert errors[4] == errors[0] == errors[8] != errors[5]


def undone(rank: int, world_size: int) -> list[bool]:
    made = CompressedReduceScatter(create_compression_algorithm("int4", {"stochastic": True}), undoable=True)
    scatter(made, contribution(rank, 0, world_size), world_size)
    assert made.memory is not None
    before = made.memory.clone()
    first = scatter(made, contribution(rank, 1, world_size), world_size)
    changed = not torch.equal(made.memory, before)
    made.undo()
    made.undo()  # of a call that was not made since
    restored = made.step == 1 and torch.equal(made.memory, before)
    again = scatter(made, contribution(rank, 1, world_size), world_size)
    made.settle()
    owed = made.memory.clone()
    made.undo()  # of a step that did without this module
    return [changed, restored, torch.equal(first, again), torch.equal(made.memory, owed)]


def test_an_undone_call_leaves_no_trace(pool: WorkerPool) -> None:
    assert pool.run(undone, 2) == [[True] * 4] * 2
    with pytest.raises(RuntimeError, match="undoable=True"):
        CompressedReduceScatter(create_compression_algorithm("int4")).undo()


def settings(stages: int, **changes: Any) -> dict[str, Any]:
    made = config(stages=stages, replicas=2, precision="float32", steps=6, **changes)
    made["data_parallel"]["sharding"] = "fsdp2"
    made["optimizer"]["gradient_clipping"] = 0.5
    return made


@pytest.mark.parametrize(
    ("stages", "schedule", "section"),
    [
        (2, "zb_h1", {"algorithm": "int8", "options": {"stochastic": True}, "warmup_steps": 2}),
        (1, "1f1b", {"algorithm": "topk_int2", "error_feedback": "ef21", "weights": "int8"}),
    ],
)
def test_sharded_runs_resume_to_the_bit(
    pool: WorkerPool, tmp_path: Path, stages: int, schedule: str, section: dict[str, Any]
) -> None:
    made = settings(stages, schedule=schedule, compression=section)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = pool.run(resume_job, 2 * stages, made, str(tmp_path / "whole"), False, 6, 100, deadline_s=100)
    first = pool.run(resume_job, 2 * stages, made, str(tmp_path / "stopped"), False, 3, 3, deadline_s=100)
    second = pool.run(resume_job, 2 * stages, made, str(tmp_path / "stopped"), True, 6, 100, deadline_s=100)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def first_steps(rank: int, world_size: int, made: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Losses, gradient norms, and the bytes of the last step."""
    with penstock.initialize(model(layers=2), made, training_data=tokens()) as engine:
        losses, norms = [], []
        for _ in range(3):
            before = engine.parts.meter.sent[REPLICAS]
            losses.append(engine.train_batch())
            assert engine.last is not None
            assert engine.last.gradient_norm is not None
            norms.append(engine.last.gradient_norm)
        return losses, norms, engine.parts.meter.sent[REPLICAS] - before


def test_sharded_gradients_are_about_the_same_in_fewer_bytes(pool: WorkerPool) -> None:
    (losses, norms, sent), _ = pool.run(first_steps, 2, settings(1, dropping=False), deadline_s=100)
    made = settings(1, dropping=False, compression={"algorithm": "int8"})
    (compressed, theirs, fewer), _ = pool.run(first_steps, 2, made, deadline_s=100)
    assert compressed == pytest.approx(losses, rel=1e-3)
    assert theirs == pytest.approx(norms, rel=1e-2)
    # Each rank sends half of its gradients in a fourth of the bytes; weights are gathered in full all the same.
    assert fewer < 0.75 * sent
    made = settings(1, dropping=False, compression={"algorithm": "int8", "weights": "fp8"})
    (rounded, theirs, fewest), (elsewhere, *_) = pool.run(first_steps, 2, made, deadline_s=100)
    assert rounded == elsewhere
    assert rounded != compressed
    assert rounded == pytest.approx(losses, rel=1e-2)
    assert theirs == pytest.approx(norms, rel=0.1)
    assert fewest < 0.55 * fewer


def overflowing(rank: int, world_size: int, made: dict[str, Any]) -> list[Any]:
    """Whether a step was skipped, and whether the state of the exchange changed in it."""
    answers = []
    with penstock.initialize(model(layers=2), made, training_data=tokens()) as engine:
        for _ in range(4):
            before = {name: torch.as_tensor(v).clone() for name, v in engine.parts.exchange.state_dict().items()}
            engine.train_batch()
            assert engine.last is not None
            after = engine.parts.exchange.state_dict()
            changed = before.keys() != after.keys() or any(
                not torch.equal(value, torch.as_tensor(after[name])) for name, value in before.items()
            )
            answers.append([engine.last.skipped, changed])
    return answers


def test_a_skipped_step_of_a_sharded_run_leaves_every_memory_as_it_was(pool: WorkerPool) -> None:
    """The scale is too large by far, and comes down by half at every step."""
    made = settings(1, dropping=False, compression={"algorithm": "onebit"})
    made |= {"precision": "fp16", "fp16": {"initial_scale_power": 19, "hysteresis": 1}}
    for answers in pool.run(overflowing, 2, made, deadline_s=100):
        assert {skipped for skipped, _ in answers} == {True, False}
        assert all(changed != skipped for skipped, changed in answers)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"algorithm": "powersgd"}, "powersgd compresses whole matrices.*sharding: none"),
        ({"algorithm": "dct_topk"}, "dct_topk compresses whole matrices.*int8 or onebit"),
        ({"algorithm": "int8", "min_dimensions": 2}, "min_dimensions=2 cannot be had.*leave min_dimensions out"),
        ({"algorithm": "int8", "full_precision": ["*norm*"]}, "full_precision=.*one buffer"),
        ({"algorithm": "int8", "replicas_per_machine": 2}, "replicas_per_machine=2 cannot be had"),
        ({"algorithm": "int8", "bucket_mb": 1.0}, "bucket_mb=1.0 cannot be had"),
        ({"weights": "powersgd"}, "powersgd compresses whole matrices"),
        ({"weights": "randomk"}, "randomk would set most weights to zero; take fp8, int8"),
        ({"weights": "int8", "weights_options": {"stochastic": True}}, "leave stochastic out for weights"),
        ({"weights": "int8", "weights_options": {"block": 3}}, "did you mean 'block_size'"),
    ],
)
def test_what_cannot_be_done_to_sharded_gradients_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        penstock.initialize(model(), settings(1, compression=section), training_data=tokens())


def test_weights_are_compressed_on_the_way_only_where_they_are_gathered() -> None:
    made = config(replicas=2, compression={"weights": "fp8"})
    with pytest.raises(ValueError, match=r"compression.weights=fp8 .*sharding=none each holds all.*sharding: fsdp2"):
        penstock.initialize(model(), made, training_data=tokens())


class Uneven(nn.Module):
    """Sizes that no number of ranks divides, and a layer that only even steps use."""

    def __init__(self) -> None:
        super().__init__()
        torch.default_generator.manual_seed(5)
        self.first, self.second, self.rare = nn.Linear(7, 11), nn.Linear(11, 5), nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor, step: int) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.second(hidden) + (self.rare(hidden) if step % 2 == 0 else 0.0)
        return out


def summed_gradients(rank: int, world_size: int, steps: range, kind: Any, states: Any) -> list[Any]:
    """The sums over ranks of the gradients that came in and of those that came out, and what this rank owes."""
    made = Uneven().double()
    plain = Uneven().double()
    fully_shard(made)
    algorithm = create_compression_algorithm("int4", {"block_size": 32})
    (scatter,) = compress_fsdp(made, gradients=algorithm, error_feedback=FeedbackRule(kind)).values()
    made.set_gradient_divide_factor(1.0)
    taken = states is None or scatter.load_debts(states)
    given, got = [], []
    for step in steps:
        x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
        for module, into in ((made, got), (plain, given)):
            module.zero_grad()
            (module(x, step) * (1.0 + rank)).square().sum().backward()
            grads = [p.grad for p in module.parameters()]
            into.append(
                [g.full_tensor() if isinstance(g, DTensor) else torch.zeros(()) if g is None else g for g in grads]
            )
    # What is still owed comes with gradients of zeros, in as many calls as it takes.
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in scatter.state_dict().items()}
    for step in range(1000, 1012):
        made.zero_grad()
        (made(torch.zeros(4, 7, dtype=torch.float64), step) * 0.0).sum().backward()
        got.append([p.grad.full_tensor() for p in made.parameters()])  # type: ignore[union-attr]
    return [[sum(g) for g in zip(*given, strict=True)] if given else None, got, state, taken]


def test_another_number_of_ranks_takes_over_what_shards_owe(pool: WorkerPool) -> None:
    before = pool.run(summed_gradients, 3, range(4), "classic", None)
    states = [state for *_, state, _ in before]
    after = pool.run(summed_gradients, 2, range(0), "classic", states)
    assert all(taken for *_, taken in after)
    came_in = [sum(parts) for parts in zip(*(given for given, *_ in before), strict=True)]
    sent = [sum(parts) for parts in zip(*before[0][1][:4], strict=True)]
    paid = [sum(parts) for parts in zip(*after[0][1], strict=True)]
    for whole, so_far, rest in zip(came_in, sent, paid, strict=True):
        owed = whole - so_far
        assert owed.norm() > 0.005 * whole.norm()
        assert (rest - owed).norm() < 1e-6 * owed.norm()


def test_another_number_of_ranks_takes_over_what_shards_know(pool: WorkerPool) -> None:
    before = pool.run(summed_gradients, 3, range(4), "ef21", None)
    states = [state for *_, state, _ in before]
    *_, again, taken = pool.run(summed_gradients, 2, range(0), "ef21", states)[0]
    assert taken
    known = sum(state["memory"] for state in states).view(3, -1)
    for rank, state in enumerate(states):
        torch.testing.assert_close(known[rank], state["received"], rtol=0, atol=1e-12)
    others = pool.run(summed_gradients, 2, range(0), "ef21", states)
    known = sum(answer[2]["memory"] for answer in others).view(2, -1)
    for rank, answer in enumerate(others):
        torch.testing.assert_close(known[rank], answer[2]["received"], rtol=0, atol=1e-12)
    assert again["memory"].norm() > 0


def owed_in_a_run(rank: int, world_size: int, made: dict[str, Any], folder: str, load: bool) -> list[Any]:
    """The exchange's memories after three steps and a checkpoint, or after loading it."""
    with penstock.initialize(model(layers=2), made, training_data=tokens()) as engine:
        if load:
            engine.load_checkpoint(folder)
        else:
            for _ in range(3):
                engine.train_batch()
            engine.save_checkpoint(folder)
        state = engine.parts.exchange.state_dict()
        copied = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        engine.train_batch()
        return [state["step"], copied]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_run_on_more_replicas_takes_over_what_is_owed(pool: WorkerPool, tmp_path: Path, sharding: str) -> None:
    """Every size is a multiple of the ranks here, so that nothing is padding."""
    made = config(replicas=2, precision="float32", dropping=False, steps=6, compression={"algorithm": "onebit"})
    made["data_parallel"] = {"sharding": sharding}
    old = pool.run(owed_in_a_run, 2, made, str(tmp_path), False, deadline_s=100)
    new = pool.run(owed_in_a_run, 4, made, str(tmp_path), True, deadline_s=100)

    def owed(ranks: list[Any]) -> dict[str, Tensor]:
        """What is owed to each buffer's sum, in whatever order it lies."""
        found: dict[str, Tensor] = {}
        for name in sorted(name for name in ranks[0][1] if name.endswith((".worker", ".memory"))):
            whole = sum(state[name] for _, state in ranks)
            server = name.replace(".worker", ".server")
            if server in ranks[0][1] and server != name:
                whole = whole + torch.cat([state[server] for _, state in ranks])
            found[name] = whole.sort().values
        return found

    assert {step for step, _ in new} == {3}
    then, now = owed(old), owed(new)
    assert then.keys() == now.keys()
    assert any(name.endswith(".memory") for name in then) == (sharding == "fsdp2")
    for name, debt in then.items():
        assert debt.any()
        torch.testing.assert_close(now[name], debt, rtol=1e-5, atol=1e-7)
