"""What a rehearsal took is spread over the layers, and what is left over is every step's."""

from typing import Any

import pytest
import torch
from torch import nn

from penstock._core.waiting import Watcher
from penstock.pipe import LayerSpec, PipeDataParallelTopology, PipelineModule
from penstock.pipe.groups import PipeGroups
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.planner import Profile
from penstock.pipe.schedule import get_schedule
from penstock.runtime import profiling
from penstock.runtime.config import load_config
from penstock.runtime.engine_costs import EngineCosts
from penstock.runtime.optimizer_section import OptimizerSection
from penstock.runtime.profiling import Profiler
from penstock.runtime.rehearsal import Rehearsal, rehearse

BATCHES = 4
WHOLE_STEP, OVERHEAD, READING, ACTION, INSIDE = 50.0, 0.25, 0.125, 0.0625, 0.03125


def profile(
    monkeypatch: pytest.MonkeyPatch,
    *,
    spans: dict[str, float],
    compiled: bool = False,
    memory: int | None = None,
    **changes: Any,
) -> Profile:
    """A profile of three layers, of which one trains nothing, by a rehearsal that says what it is told to."""
    rehearsed = Rehearsal(spans=spans, update=0.5, step=WHOLE_STEP, state_ratio=2.0)
    monkeypatch.setattr(profiling, "rehearse", lambda *_, **__: rehearsed)
    monkeypatch.setattr(profiling, "_LEAST_S", 0.0)
    monkeypatch.setattr(EngineCosts, "action", lambda self: (ACTION, INSIDE))
    layers = [LayerSpec(nn.Linear, 6, 12), LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 12, 6)]
    module = PipelineModule(layers, num_stages=1, loss_fn=nn.functional.mse_loss, **changes)
    settings: dict[str, Any] = {"train": {"global_batch_size": 2 * BATCHES, "micro_batch_size": 2, "steps": 3}}
    if compiled:
        settings["compile"] = {"enabled": True, "backend": "eager", "layers": ["Linear"]}
    watcher = Watcher(rank=0)
    profiler = Profiler(
        module=module,
        config=load_config(settings),
        loss_fn=module.loss_fn,
        groups=PipeGroups(PipeDataParallelTopology(1, 1), watcher=watcher),
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast_dtype=None,
        watcher=watcher,
        overhead=OVERHEAD,
        memory=memory,
    )
    return profiler.profile(2, (torch.ones(2, 6), torch.zeros(2, 6)), reading=READING)


def test_layers_add_up_to_what_their_stage_took_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(monkeypatch, spans={"F": 1.0, "B": 2.0})
    assert sum(layer.forward for layer in found.layers) == pytest.approx(1.0 - INSIDE)
    assert sum(layer.backward for layer in found.layers) == pytest.approx(2.0 - INSIDE)
    # By trained bytes: of weights and biases, 84 numbers and 78.
    assert [layer.update for layer in found.layers] == pytest.approx([0.5 * 84 / 162, 0.0, 0.5 * 78 / 162])
    assert [layer.state for layer in found.layers] == [3 * 4 * 84, 0, 3 * 4 * 78]
    passes = BATCHES * (3.0 - 2 * INSIDE + 2 * ACTION)
    assert found.step == pytest.approx(WHOLE_STEP - passes - 0.5 + OVERHEAD)
    assert found.reading == READING


def test_what_is_recomputed_in_the_rehearsal_is_no_part_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(monkeypatch, spans={"F": 1.0, "B": 3.0}, activation_checkpoint_interval=2)
    assert sum(layer.backward for layer in found.layers) == pytest.approx(2.0 - INSIDE)
    # The step that was rehearsed did recompute: nothing of that is left over.
    passes = BATCHES * (3.0 + 1.0 - 3 * INSIDE + 2 * ACTION)
    assert found.step == pytest.approx(WHOLE_STEP - passes - 0.5 + OVERHEAD)


@pytest.mark.parametrize(("share", "recomputed"), [(1.0, False), (0.99, True)])
def test_a_step_that_does_not_fit_is_rehearsed_with_its_layers_recomputed(
    monkeypatch: pytest.MonkeyPatch, share: float, recomputed: bool
) -> None:
    # Weights and biases with gradients and two moments; of a micro-batch of two rows the input, tanh's output, and the
    # output and the targets, which the loss keeps.
    memory = 4 * (4 * (84 + 78) + 2 * (6 + 12 + 6 + 6))
    found = profile(monkeypatch, spans={"F": 1.0, "B": 3.0}, memory=round(share * memory))
    assert sum(layer.backward for layer in found.layers) == pytest.approx((2.0 if recomputed else 3.0) - INSIDE)


def test_without_spans_layers_stay_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(monkeypatch, spans={})
    assert 0 < sum(layer.forward for layer in found.layers) < 1.0


def test_measuring_leaves_the_random_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    profile(monkeypatch, spans={})
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_a_run_compiles_are_measured_compiled_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    found = profile(monkeypatch, spans={}, compiled=True)
    assert compiled == [(nn.Linear, {"backend": "eager", "mode": None})] * 2
    for layer in found.layers:
        assert (layer.input_gradient, layer.weight_gradient) == (layer.backward, 0.0)


def test_a_rehearsal_leaves_weights_and_gradients_as_they_were() -> None:
    module = PipelineModule([LayerSpec(nn.Linear, 4, 4)], num_stages=1, loss_fn=nn.functional.mse_loss)
    stage = module.build_stage(0)
    before = [p.detach().clone() for p in stage.parameters()]
    watcher = Watcher(rank=0)
    found = rehearse(
        stage,
        [MicroBatch(torch.ones(1, 4), torch.zeros(1, 4), index) for index in range(2)],
        schedule=get_schedule("1f1b", 1, 2),
        optimizer=OptimizerSection(gradient_clipping=1.0),
        groups=PipeGroups(PipeDataParallelTopology(1, 1), watcher=watcher),
        loss_fn=module.loss_fn,
        watcher=watcher,
        seed=1,
        compression="none",
        budget_s=0.0,
    )
    assert set(found.spans) == {"F", "B"}
    assert found.state_ratio == 2.0  # AdamW's two moments
    assert found.step >= found.update > 0
    assert all(torch.equal(p, old) for p, old in zip(stage.parameters(), before, strict=True))
    assert all(p.grad is None for p in stage.parameters())
