"""Steps that do not count, memories that change hands, and copies of a weight in different company."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import penstock
from penstock._core.meter import REPLICAS, Meter
from penstock.compression import (
    DiLoCo,
    FeedbackRule,
    ParameterRules,
    Reducer,
    create_compression_algorithm,
    machine_groups,
)
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens


def exchanged(reducer: Reducer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> list[Tensor]:
    reducer.begin_step(lambda: 0.5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    reducer.ready(parameters)
    reducer.finish()
    return [p.grad.clone() for p in parameters if p.grad is not None]


def gradients(rank: int, step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def copied(reducer: Reducer) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in reducer.state_dict().items()}


SHAPES: list[tuple[int, ...]] = [(300,), (40, 30), (17,)]


def with_a_step_undone(rank: int, world_size: int, name: str, error_feedback: Any) -> list[str]:
    """A NaN in one bucket; the others were exchanged in full."""
    rule = error_feedback if error_feedback is True else FeedbackRule(**error_feedback)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    reducer = Reducer(
        [[(str(i), p) for i, p in enumerate(parameters)]],
        algorithm=create_compression_algorithm(name),
        error_feedback=rule,
        bucket_bytes=1,
        undoable=True,
    )
    wrong = []
    for step in range(2):
        exchanged(reducer, parameters, gradients(rank, step, SHAPES))
    before = copied(reducer)
    spoilt = gradients(rank, 2, SHAPES)
    if rank == 1:
        spoilt[0][7] = torch.nan
    results = exchanged(reducer, parameters, spoilt)
    if results[0].isfinite().all() or not results[1].isfinite().all():
        wrong.append("the NaN is not where it belongs")
    reducer.undo()
    after = copied(reducer)
    wrong += [key for key in before if not torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key]))]
    try:
        reducer.undo()
        wrong.append("undone twice")
    except RuntimeError:
        pass
    return wrong


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("powersgd", True),
        ("topk", True),
        ("bf16", True),
        ("int4", {"kind": "ef21"}),
        ("topk_int2", {"kind": "ef21"}),
        ("int8", {"reset_every": 2}),
    ],
)
def test_an_undone_step_leaves_every_memory_as_it_was(pool: WorkerPool, name: str, rule: Any) -> None:
    assert pool.run(with_a_step_undone, 2, name, rule) == [[], []]


def overflowing(rank: int, world_size: int, settings: dict[str, Any]) -> list[Any]:
    """Whether a step was skipped, and the sum of the memories' changes in it."""
    answers = []
    with penstock.initialize(model(layers=2), settings, training_data=tokens()) as engine:
        for _ in range(4):
            reducer = engine.parts.exchange
            assert isinstance(reducer, Reducer)
            before = copied(reducer)
            engine.train_batch()
            assert engine.last is not None
            after = copied(reducer)
            changed = sum(not torch.equal(before[key], after[key]) for key in before if key != "step")
            answers.append([engine.last.skipped, changed, after["step"] - before["step"]])
    return answers


def test_a_skipped_step_of_a_run_leaves_every_memory_as_it_was(pool: WorkerPool) -> None:
    """The scale is too large by far, and comes down by half at every step."""
    made = config(stages=1, replicas=2, precision="fp16", dropping=False, steps=4)
    made["compression"] = {"algorithm": "onebit", "bucket_mb": 0.01}
    made["fp16"] = {"initial_scale_power": 19, "hysteresis": 1}
    ranks = pool.run(overflowing, 2, made, deadline_s=100)
    assert {skipped for skipped, *_ in ranks[0]} == {True, False}
    for answers in ranks:
        for skipped, changed, steps in answers:
            assert (changed == 0) == skipped
            assert steps == (not skipped)


def tied_copies(rank: int, world_size: int, settings: dict[str, Any], folder: str) -> int:
    with penstock.initialize(model(layers=3), settings, training_data=tokens()) as engine:
        for _ in range(3):
            engine.train_batch()
        engine.save_checkpoint(Path(folder))  # compares the copies bit for bit
        assert isinstance(engine.parts.exchange, Reducer)
        return len(engine.parts.exchange.buckets)


@pytest.mark.parametrize(
    "section",
    [
        {"algorithm": "int4", "options": {"stochastic": True}},
        {"algorithm": "randomk", "options": {"every": 4}, "min_dimensions": 2},
    ],
)
def test_copies_of_a_tied_weight_stay_equal_when_choices_are_random(
    pool: WorkerPool, tmp_path: Path, section: dict[str, Any]
) -> None:
    """The two stages have different numbers of buckets before that of the tied weight."""
    made = config(stages=2, replicas=2, precision="float32", dropping=False, steps=4)
    made["compression"] = {**section, "bucket_mb": 0.003}
    buckets = pool.run(tied_copies, 4, made, str(tmp_path), deadline_s=100)
    assert buckets[0] != buckets[-1]


def over_machines(rank: int, world_size: int) -> list[dict[str, Any]]:
    """What everybody owes after three steps, and what is taken over of it by as many machines."""
    inside, between = machine_groups([range(world_size)], 2)
    states = []
    parameter = nn.Parameter(torch.zeros(1000))
    mask = torch.arange(1000) % 3 != 0

    def make() -> Reducer:
        algorithm = create_compression_algorithm("onebit", {"block_size": 64})
        return Reducer([[("w", parameter)]], algorithm=algorithm, group=between, inside=inside, masks={"w": mask})

    reducer = make()
    for step in range(3):
        exchanged(reducer, [parameter], gradients(rank, step, [(1000,)]))
    states.append(copied(reducer))
    everyone: list[dict[str, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyone, states[0])
    reducer.close()
    other = make()
    assert other.load_debts(everyone)
    return [*states, copied(other)]


def test_machines_take_over_what_is_owed_of_their_shards(pool: WorkerPool) -> None:
    ranks = pool.run(over_machines, 4)
    shards = []
    for place in range(2):
        before, after = ([ranks[rank][when] for rank in (place, place + 2)] for when in (0, 1))

        def owed(states: list[dict[str, Any]]) -> Tensor:
            workers: Tensor = sum(state["bucket_000.worker"] for state in states)
            return workers + torch.cat([state["bucket_000.server"] for state in states])

        torch.testing.assert_close(owed(after), owed(before), rtol=0, atol=1e-6)
        assert torch.equal(after[0]["bucket_000.worker"], after[1]["bucket_000.worker"])
        shards.append(owed(before))
    whole = torch.cat(shards)[:1000]
    assert (whole[::3] == 0).all()  # nothing is owed where the mask lets nothing through
    assert (whole[1::3] != 0).any()


def with_rows_of_zeros(rank: int, world_size: int) -> list[float]:
    """PowerSGD of a matrix whose first rows never get a gradient, after a step without any."""
    parameter = nn.Parameter(torch.zeros(40, 30))
    reducer = Reducer([[("w", parameter)]], algorithm=create_compression_algorithm("powersgd", {"rank": 2}))
    direction = torch.outer(torch.arange(40.0) - 4, torch.randn(30, generator=torch.Generator().manual_seed(1)))
    direction[:4] = 0
    norms = []
    for step in range(4):
        (result,) = exchanged(reducer, [parameter], [direction * (step > 0)])
        norms.append(float((result - direction).norm() / direction.norm()))
    return norms


def test_powersgd_finds_its_way_after_a_step_of_zeros(pool: WorkerPool) -> None:
    for norms in pool.run(with_rows_of_zeros, 2):
        assert norms[0] == 1.0
        assert max(norms[1:]) < 1e-4


def test_memories_that_do_not_fit_are_emptied_but_iterations_start_as_ever() -> None:
    parameters = [nn.Parameter(torch.zeros(40, 30)), nn.Parameter(torch.zeros(5))]
    reducer = Reducer(
        [[("w", parameters[0]), ("b", parameters[1])]],
        algorithm=create_compression_algorithm("powersgd"),
        rules=ParameterRules(min_dimensions=2),
    )
    first = copied(reducer)
    reducer.load_state_dict({"step": 7})
    assert not reducer.load_debts([{"step": 7}, {"step": 7}])
    after = copied(reducer)
    assert after["step"] == 7
    assert after["bucket_000.start_000"].norm() > 1
    assert torch.equal(after["bucket_000.start_000"], first["bucket_000.start_000"])


def synchronized_twice(rank: int, world_size: int) -> list[Any]:
    """Bytes, and whether the parameters moved, of a meeting right after a meeting, and of one in between."""
    parameter = nn.Parameter(torch.zeros(50))
    optimizer, meter = torch.optim.SGD([parameter], lr=0.1), Meter()
    answers: list[Any] = []
    with DiLoCo(optimizer, period=2, meter=meter) as local:
        for step in range(3):
            parameter.grad = torch.full((50,), 1.0 + rank)
            optimizer.step()
            if step:
                for _ in range(2):
                    before, sent = parameter.detach().clone(), meter.sent[REPLICAS]
                    local.synchronize()
                    answers.append((torch.equal(before, parameter.detach()), meter.sent[REPLICAS] - sent))
    return answers


def test_who_has_just_met_does_not_meet_again(pool: WorkerPool) -> None:
    for answers in pool.run(synchronized_twice, 2):
        assert answers[0] == answers[1] == answers[3] == (True, 0)  # no outer momentum without a gradient
        assert not answers[2][0]
        assert answers[2][1] > 0


def ended_by_the_engine(rank: int, world_size: int, settings: dict[str, Any]) -> list[Tensor]:
    with penstock.initialize(model(layers=2), settings, training_data=tokens()) as engine:
        for _ in range(3):
            engine.train_batch()
        engine.synchronize()
        return [p.detach().clone() for p in engine.stage.parameters()]


@pytest.mark.parametrize("name", ["streaming_diloco", "zero_one_adam"])
def test_an_engine_ends_what_replicas_do_apart(pool: WorkerPool, name: str) -> None:
    made = config(replicas=2, precision="float32", dropping=False, steps=4)
    if name == "zero_one_adam":  # after one step every fourth exchanges
        options = {"var_freeze_step": 1, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 4}
        made["optimizer"] = {"name": name, "lr": 1e-3, "options": options}
    else:
        made["local_updates"] = {"method": name, "period": 4, "fragments": 2, "overlap": 1}
    first, second = pool.run(ended_by_the_engine, 2, made, deadline_s=100)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))
