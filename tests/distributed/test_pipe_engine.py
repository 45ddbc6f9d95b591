"""What the engine does besides training: evaluation, prediction, other placements, counting."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock._core.batch_key import current_batch_key
from penstock._core.meter import ACTIVATIONS, CONTROL, TIED, Meter
from penstock._core.waiting import Watcher
from penstock.pipe import LayerSpec, MicroBatch, PipeDataParallelTopology, PipelineModule
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups, tied_ranks
from penstock.pipe.schedule import Action, Schedule
from support.pipe_exchange import PlainExchange
from support.pipe_models import VOCABULARY, WIDTH, batch, language_model
from support.pool import WorkerPool


def engine_for(
    rank: int,
    world_size: int,
    module: PipelineModule,
    micro_batches: int,
    *,
    pipe: int,
    schedule: str | Schedule = "1f1b",
    placement: tuple[int, ...] | None = None,
) -> PipelineEngine:
    watcher = Watcher(rank=rank, deadline_s=30.0)
    topology = PipeDataParallelTopology(pipe, world_size // pipe)
    groups = PipeGroups(topology, tied=tied_ranks(module, placement), watcher=watcher)
    where = placement or range(pipe)
    stages = [module.build_stage(s) for s, holder in enumerate(where) if holder == groups.pipe_rank]
    return PipelineEngine(
        stages,
        schedule=schedule,
        micro_batches=micro_batches,
        groups=groups,
        exchange=PlainExchange([p for stage in stages for p in stage.parameters()], groups.replicas),
        loss_fn=module.loss_fn,
        watcher=watcher,
        seed=5,
        meter=Meter(),
    )


def alone(module: PipelineModule, micro_batches: int) -> PipelineEngine:
    return engine_for(0, 1, module, micro_batches, pipe=1)


def evaluate(rank: int, world_size: int, pipe: int) -> tuple[float, Any, Any, Any, bool]:
    engine = engine_for(rank, world_size, language_model(pipe), 2, pipe=pipe)
    first = 4 * engine.groups.replica
    batches = [batch(0, first + index) for index in range(4)]
    loss = engine.eval_step(batches)
    outputs = engine.predict_step(batches)
    everywhere = engine.predict_step(batches, ranks=None)
    asked = engine.predict_step(batches, ranks=[0])
    training = all(module.training for stage in engine.stages.values() for module in stage.modules())
    return loss, outputs, everywhere, asked, training


@pytest.mark.parametrize(("pipe", "data"), [(3, 1), (2, 2)])
def test_evaluation_and_prediction_equal_one_process(pool: WorkerPool, pipe: int, data: int) -> None:
    whole = alone(language_model(1), 2)
    batches = [batch(0, index) for index in range(4 * data)]
    expected = whole.predict_step(batches)
    assert expected is not None
    loss = whole.eval_step(batches)
    for rank, (found, outputs, everywhere, asked, training) in enumerate(pool.run(evaluate, pipe * data, pipe)):
        pipe_rank, replica = divmod(rank, data)
        wanted = expected[4 * replica : 4 * replica + 4]
        assert found == pytest.approx(loss, rel=1e-6)
        assert (outputs is None) == (pipe_rank < pipe - 1)
        assert everywhere is not None
        assert (asked is None) == (0 < pipe_rank < pipe - 1)
        for given in (outputs, everywhere, asked):
            if given is not None:
                assert len(given) == 4
                for a, b in zip(given, wanted, strict=True):
                    torch.testing.assert_close(a, b)
        assert training


V = (0, 1, 1, 0)


def v_shaped(micro_batches: int) -> Schedule:
    """Four stages on two ranks, down and up again; all forward passes, then all backward ones."""
    forward, backward = range(micro_batches), reversed(range(micro_batches))
    rank0 = [Action(s, "F", m) for s in (0, 3) for m in forward]
    rank1 = [Action(s, "F", m) for m in forward for s in (1, 2)]
    for m in backward:
        rank0.append(Action(3, "B", m))
        rank1 += [Action(2, "B", m), Action(1, "B", m)]
    rank0 += [Action(0, "B", m) for m in reversed(range(micro_batches))]
    return Schedule.from_ranks([rank0, rank1], "v-shaped")


def train_v(rank: int, world_size: int) -> tuple[float, float, dict[str, Tensor]]:
    engine = engine_for(rank, world_size, language_model(4), 5, pipe=2, schedule=v_shaped(5), placement=V)
    batches = [batch(0, index) for index in range(5)]
    result = engine.train_step(batches, step=0)
    gradients = {
        name: parameter.grad
        for stage in engine.stages.values()
        for name, parameter in stage.canonical_parameters()
        if parameter.grad is not None
    }
    return result.loss, engine.eval_step(batches), gradients


def test_a_rank_may_hold_several_stages(pool: WorkerPool) -> None:
    whole = alone(language_model(1), 5)
    batches = [batch(0, index) for index in range(5)]
    expected = whole.train_step(batches, step=0).loss
    gradients = {name: p.grad for name, p in whole.stages[0].canonical_parameters()}
    found: set[str] = set()
    for loss, eval_loss, local in pool.run(train_v, 2):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert eval_loss == pytest.approx(whole.eval_step(batches), rel=1e-6)
        found |= set(local)
        for name, gradient in local.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)
    assert found == set(gradients)


class Watching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.keys: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        key = current_batch_key()
        assert key is not None
        self.keys.append((key.micro_batch, key.positions))
        return self.linear(x)


def watch_positions(rank: int, world_size: int) -> list[tuple[int, tuple[int, ...]]]:
    module = PipelineModule([LayerSpec(Watching)] * 3, num_stages=3, loss_fn=lambda x, y: (x - y).mean())
    engine = engine_for(rank, world_size, module, 2, pipe=3)
    x = torch.ones(1, 2)
    batches = [
        MicroBatch(x if rank == 0 else None, x if rank == 2 else None, index, (10 + index, 20) if rank == 0 else ())
        for index in range(2)
    ]
    engine.train_step(batches, step=0)
    layer = engine.stages[rank].layers[str(rank)]
    assert isinstance(layer, Watching)
    return layer.keys


def test_positions_travel_to_stages_that_were_not_given_them(pool: WorkerPool) -> None:
    assert pool.run(watch_positions, 3) == [[(0, (10, 20)), (1, (11, 20))]] * 3


def count(rank: int, world_size: int) -> dict[str, Any]:
    engine = engine_for(rank, world_size, language_model(2), 4, pipe=2)
    for step in range(2):
        engine.train_step([batch(0, 0)] * 4, step=step)
    return engine.meter.state_dict()


def tally(rank: int, world_size: int) -> tuple[tuple[float, ...], float]:
    engine = engine_for(rank, world_size, language_model(2), 1, pipe=2)
    return engine.train_step([batch(0, 0)], step=0, tally=(2.0**rank, 1.0)).tally, engine.eval_step([batch(0, 0)])


def test_tallies_add_up_over_all_ranks(pool: WorkerPool) -> None:
    answers = pool.run(tally, 2)
    assert [tallied for tallied, _ in answers] == [(3.0, 2.0), (3.0, 2.0)]
    assert answers[0][1] == answers[1][1]


def test_bytes_are_counted_by_kind(pool: WorkerPool) -> None:
    there, here = pool.run(count, 2)
    assert there["sent"][ACTIVATIONS] == here["received"][ACTIVATIONS]
    assert here["sent"][ACTIVATIONS] == there["received"][ACTIVATIONS]
    rows, length = 2, 3
    floats = 2 * rows * length * WIDTH + 1  # hidden, unused and the mean that travels with them
    assert there["sent"][ACTIVATIONS] > 2 * 4 * 4 * floats
    # An all-reduce over two ranks moves the buffer once each way.
    assert there["sent"][TIED] == here["sent"][TIED] == 2 * 4 * VOCABULARY * WIDTH
    assert 0 < there["sent"][CONTROL] == here["received"][CONTROL] < 2 * 512  # one sum a step
    assert here["seconds"]["wait_forward"] > 0
    assert there["seconds"]["wait_backward"] > 0


class Detour(nn.Module):
    """Passes its input through untouched beside its output; the first layer's output needs no gradient at all."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).requires_grad_(not frozen)

    def forward(self, value: Any) -> Any:
        through, x = (value, value) if isinstance(value, Tensor) else value
        return through, self.linear(x)


def end_of(value: Any, target: Tensor) -> Tensor:
    through, x = value
    return ((through * x) - target).square().mean()


def detour(rank: int, world_size: int) -> dict[str, Tensor | None]:
    module = PipelineModule(
        [LayerSpec(Detour, index == 0) for index in range(3)], num_stages=world_size, loss_fn=end_of
    )
    engine = engine_for(rank, world_size, module, 2, pipe=world_size)
    x = torch.arange(6.0).reshape(2, 3)
    engine.train_step([MicroBatch(x + index, x, index) for index in range(2)], step=0)
    return {
        name: p.grad for stage in engine.stages.values() for name, p in stage.canonical_parameters() if p.requires_grad
    }


def test_values_without_gradients_and_values_passed_through(pool: WorkerPool) -> None:
    expected = detour(0, 1)
    for local in pool.run(detour, 3):
        for name, gradient in local.items():
            torch.testing.assert_close(gradient, expected[name])
