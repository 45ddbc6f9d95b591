"""The engine in one process: all stages on one rank, so that nothing but the engine is under test."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock._core.batch_key import current_batch_key
from penstock._core.meter import Meter
from penstock.pipe import LayerSpec, MicroBatch, PipeDataParallelTopology, PipelineModule
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups
from penstock.pipe.schedule import Action, Schedule, ScheduleError, get_schedule
from support.pipe_exchange import PlainExchange
from support.pipe_models import batch, cross_entropy, language_model

SEED = 5


def all_on_one_rank(name: str, num_stages: int, micro_batches: int) -> Schedule:
    """The named schedule's actions, one micro-batch after the other through all stages, on a single rank."""
    if num_stages == 1:
        return get_schedule(name, 1, micro_batches)
    order = [
        action
        for m in range(micro_batches)
        for action in (
            *(Action(stage, "F", m) for stage in range(num_stages)),
            *(Action(stage, "B", m) for stage in reversed(range(num_stages))),
        )
    ]
    return Schedule.from_ranks([order], name)


def make(
    module: PipelineModule,
    micro_batches: int,
    *,
    loss_fn: Any = cross_entropy,
    num_stages: int = 1,
    schedule: Schedule | None = None,
    **kwargs: Any,
) -> tuple[PipelineEngine, PlainExchange]:
    stages = [module.build_stage(index) for index in range(num_stages)]
    exchange = PlainExchange(dict.fromkeys(p for stage in stages for p in stage.parameters()))
    engine = PipelineEngine(
        stages,
        schedule=schedule or all_on_one_rank("1f1b", num_stages, micro_batches),
        micro_batches=micro_batches,
        groups=PipeGroups(PipeDataParallelTopology(1, 1)),
        exchange=exchange,
        loss_fn=loss_fn,
        seed=SEED,
        **kwargs,
    )
    return engine, exchange


def plain(layers: list[Any], loss_fn: Any = None) -> PipelineModule:
    return PipelineModule(layers, num_stages=1, loss_fn=loss_fn)


def gradients(engine: PipelineEngine) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for stage in engine.stages.values()
        for name, parameter in stage.canonical_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_on_one_rank_hand_values_over(num_stages: int) -> None:
    """The tied weight has a copy on the first stage and one on the last; both get the sum."""
    batches = [batch(0, index) for index in range(4)]
    whole, _ = make(language_model(1), 4)
    expected = whole.train_step(batches, step=0)
    parts, exchange = make(language_model(num_stages), 4, num_stages=num_stages)
    assert parts.train_step(batches, step=0).loss == pytest.approx(expected.loss, rel=1e-6)
    wanted = gradients(whole)
    for stage in parts.stages.values():
        for name, parameter in stage.canonical_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert [call for call, _ in exchange.calls] == ["begin_step", *["arm"] * num_stages, "ready", "finish"]


def test_the_exchange_is_driven_in_order() -> None:
    engine, exchange = make(language_model(1), 3)
    engine.train_step([batch(0, index) for index in range(3)], step=0)
    untied = 6 * 4
    assert exchange.calls == [("begin_step", 0), ("arm", untied), ("ready", 1), ("finish", 0)]


def test_frozen_parameters_are_left_out() -> None:
    engine, exchange = make(language_model(1), 1)
    for name, parameter in engine.stages[0].canonical_parameters():
        parameter.requires_grad_("linear" not in name)
    again = PipelineEngine(
        engine.stages[0],
        micro_batches=1,
        groups=engine.groups,
        exchange=exchange,
        loss_fn=cross_entropy,
    )
    again.train_step([batch(0, 0)], step=0)
    assert ("arm", 6 * 2) in exchange.calls


class Probe(nn.Module):
    """Notes what it sees; its output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.Dropout()
        self.seen: list[Any] = []

    def forward(self, value: Tensor) -> Tensor:
        key = current_batch_key()
        assert key is not None
        modes = (self.training, self.inner.training, torch.is_grad_enabled())
        self.seen.append((key.seed, key.step, key.micro_batch, key.positions, modes))
        return self.weight * value.sum()


def probe_engine(micro_batches: int) -> tuple[PipelineEngine, Probe]:
    engine, _ = make(plain([LayerSpec(Probe)]), micro_batches, loss_fn=None)
    probe = engine.stages[0].layers["0"]
    assert isinstance(probe, Probe)
    return engine, probe


def test_layers_see_the_key_of_their_micro_batch() -> None:
    engine, probe = probe_engine(2)
    batches = [MicroBatch(torch.ones(1), None, 4, (70, 71)), MicroBatch(torch.ones(3), None, 5)]
    result = engine.train_step(batches, step=9)
    assert [seen[:4] for seen in probe.seen] == [(SEED, 9, 4, (70, 71)), (SEED, 9, 5, ())]
    assert result.loss == 2.0
    assert probe.weight.grad is not None
    assert probe.weight.grad.item() == 2.0


def test_evaluation_has_no_gradients_and_gives_modes_back() -> None:
    engine, probe = probe_engine(2)
    probe.inner.eval()
    loss = engine.eval_step([MicroBatch(torch.ones(n), None, n) for n in (1, 2, 3)])
    assert loss == 2.0
    assert [seen[4] for seen in probe.seen] == [(False, False, False)] * 3
    assert (probe.training, probe.inner.training) == (True, False)


def test_prediction_gives_every_output_in_order() -> None:
    engine, _ = probe_engine(2)
    outputs = engine.predict_step([MicroBatch(torch.ones(n), None, n) for n in (3, 1, 2)], ranks=None)
    assert outputs is not None
    assert [output.item() for output in outputs] == [3.0, 1.0, 2.0]
    assert not outputs[0].requires_grad


def test_modes_come_back_after_an_error() -> None:
    engine, probe = probe_engine(1)
    with pytest.raises(ValueError, match="got 0 micro-batches"):
        engine.eval_step([])
    with pytest.raises(AttributeError):
        engine.eval_step([MicroBatch(None, None, 0)])
    assert probe.training
    assert probe.inner.training


def test_weights_of_micro_batches_scale_loss_and_gradient() -> None:
    engine, probe = probe_engine(2)
    batches = [MicroBatch(torch.full((1,), 2.0), None, 0, weight=0.5), MicroBatch(torch.ones(1), None, 1, weight=1.5)]
    assert engine.train_step(batches, step=0).loss == (0.5 * 2 + 1.5 * 1) / 2
    assert probe.weight.grad is not None
    assert probe.weight.grad.item() == (0.5 * 2 + 1.5 * 1) / 2


def test_seconds_add_up() -> None:
    meter = Meter()
    engine, _ = make(language_model(1), 2, meter=meter)
    result = engine.train_step([batch(0, 0), batch(0, 1)], step=0)
    assert 0 < result.compute_seconds <= result.seconds
    assert result.compute_seconds == meter.seconds["compute"]
    assert result.bubble_seconds == 0.0
    assert not meter.sent


def test_an_error_says_where_it_happened() -> None:
    engine, _ = make(plain([LayerSpec(nn.Linear, 2, 2), LayerSpec(nn.Linear, 3, 3)]), 1)
    with pytest.raises(RuntimeError) as caught:
        engine.train_step([MicroBatch(torch.ones(1, 2), torch.ones(1), 6)], step=4)
    assert caught.value.__notes__ == [
        "(penstock: in layer_001, Linear)",
        "(penstock: rank 0, step 4, stage 0, F, micro-batch 6)",
    ]


def test_a_stage_that_changes_its_input_in_place_is_told_what_to_do() -> None:
    module = PipelineModule([nn.Linear(2, 2), nn.ReLU(inplace=True)], num_stages=2, partition_method="uniform")
    engine, _ = make(module, 1, num_stages=2, loss_fn=lambda x, y: x.sum())
    with pytest.raises(RuntimeError) as caught:
        engine.train_step([MicroBatch(torch.ones(1, 2), None, 0)], step=0)
    assert "in layer_001, ReLU" in caught.value.__notes__[0]
    assert "must not change its input in place" in caught.value.__notes__[1]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_wrong_number_of_micro_batches(given: int) -> None:
    engine, _ = probe_engine(2)
    with pytest.raises(ValueError, match=f"got {given} micro-batches, but a step of this engine has 2 per replica"):
        engine.train_step([MicroBatch(torch.ones(1), None, i) for i in range(given)], step=0)


def test_a_loss_without_a_gradient() -> None:
    engine, _ = make(plain([LayerSpec(nn.Linear, 2, 2)]), 1, loss_fn=lambda x, y: x.mean().detach())
    with pytest.raises(ValueError, match="stage 0: the loss depends on no parameter that requires a gradient"):
        engine.train_step([MicroBatch(torch.ones(1, 2), None, 0)], step=0)


def test_what_does_not_fit_together_is_refused() -> None:
    module = language_model(2)
    groups = PipeGroups(PipeDataParallelTopology(1, 1))
    stage = module.build_stage(0)

    def build(stages: Any, schedule: Any, micro_batches: int = 2) -> None:
        PipelineEngine(
            stages, schedule=schedule, micro_batches=micro_batches, groups=groups, exchange=PlainExchange([])
        )

    with pytest.raises(ValueError, match="at least one stage"):
        build([], "1f1b")
    with pytest.raises(ValueError, match="is for 2 pipeline ranks, but the topology's pipe axis has 1"):
        build(stage, "1f1b")
    with pytest.raises(
        ValueError, match=r"places stages \[0, 1\] on pipeline rank 0, but it was given stages \[0\] of 2"
    ):
        build(stage, all_on_one_rank("1f1b", 2, 2))
    with pytest.raises(ValueError, match="is for 3 micro-batches, but the engine was given micro_batches=2"):
        build(stage, get_schedule("gpipe", 2, 3))
    with pytest.raises(ValueError, match="only runs forward"):
        build(language_model(1).build_stage(0), get_schedule("forward_only", 1, 2))
    with pytest.raises(ScheduleError, match="at least 1 micro-batch"):
        build(stage, "1f1b", 0)
    with pytest.raises(ValueError, match="1f2b"):
        build(stage, "1f2b")
    lacking = Schedule.from_ranks([[Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 1)]], "lacking")
    with pytest.raises(ScheduleError, match="rank 0, action 0B0: it is missing"):
        build(language_model(1).build_stage(0), lacking)


def split_on_one_rank(num_stages: int, micro_batches: int) -> Schedule:
    """Forward passes, input halves, then weight halves, the last micro-batch's in the middle of them."""
    down, up = range(num_stages), list(reversed(range(num_stages)))
    order = [Action(stage, "F", m) for m in range(micro_batches) for stage in down]
    order += [Action(stage, "I", m) for m in range(micro_batches) for stage in up]
    order += [Action(stage, "W", m) for m in sorted(range(micro_batches), key=lambda m: (m * 2) % 3) for stage in up]
    return Schedule.from_ranks([order], "split")


@pytest.mark.parametrize("interval", [0, 1, 2])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_split_backward_passes_give_the_same_gradients(num_stages: int, interval: int) -> None:
    batches = [batch(0, index) for index in range(4)]
    whole, _ = make(language_model(1), 4)
    expected = whole.train_step(batches, step=0)
    parts, exchange = make(
        language_model(num_stages, interval=interval),
        4,
        num_stages=num_stages,
        schedule=split_on_one_rank(num_stages, 4),
    )
    assert parts.train_step(batches, step=0).loss == pytest.approx(expected.loss, rel=1e-6)
    wanted = gradients(whole)
    for stage in parts.stages.values():
        for name, parameter in stage.canonical_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert parts.whole_reasons == dict.fromkeys(range(num_stages), ())
    # PlainExchange proves that each parameter was declared final once; most are while others are still computed.
    assert [count for call, count in exchange.calls if call == "arm"].count(2) >= 10


class Twice(nn.Module):
    """A layer whose parameters' gradients cannot wait: both uses hang on them directly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.norm(x)))


def test_gradients_that_did_not_wait_are_declared_final_too() -> None:
    module = PipelineModule([LayerSpec(nn.Linear, 2, 2), LayerSpec(Twice)], num_stages=1, loss_fn=lambda x, y: x.std())
    engine, exchange = make(module, 2, loss_fn=module.loss_fn, schedule=split_on_one_rank(1, 2))
    engine.train_step([MicroBatch(torch.randn(3, 2), None, index) for index in range(2)], step=0)
    assert exchange.calls[-3:-1] == [("ready", 2), ("ready", 0)]  # the norm's; then the tied ones, of which none are
    assert engine.whole_reasons[0]
