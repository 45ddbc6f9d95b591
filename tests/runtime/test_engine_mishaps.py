"""An engine in one process when things go wrong, or are not quite as the example in the README has them."""

import math
import threading
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import penstock
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.pipe import LayerSpec, PipelineModule
from penstock.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.engine import Engine, NotFiniteError
from penstock.runtime.preparation import prepare

SETTINGS: dict[str, Any] = {"train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 20}}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, generator=generator), torch.randn(3, generator=generator)) for _ in range(64)]


def start(model: nn.Module, **arguments: Any) -> Engine:
    return penstock.initialize(model, SETTINGS, training_data=samples(), loss_fn=F.mse_loss, **arguments)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def bad_batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(2, 6), torch.randn(2, 3)
    yield torch.full((2, 6), math.nan), torch.randn(2, 3)


def test_a_step_that_failed_leaves_nothing_in_the_next_ones_gradient() -> None:
    # The second micro-batch is bad: by then the first has left its gradient.
    model, untouched = net(), net()
    with start(model) as engine, start(untouched) as other:
        with pytest.raises(NotFiniteError, match="step 0: the loss is nan"):
            engine.train_batch(bad_batches())
        for _ in range(3):
            assert engine.train_batch() == other.train_batch()
    for mine, theirs in zip(weights(model), weights(untouched), strict=True):
        assert torch.equal(mine, theirs)


class RootOfZero(nn.Module):
    """A finite loss whose gradient is NaN: 0 times the slope of a root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x_BD: Tensor) -> Tensor:
        return (self.weight * 0).square().sum().sqrt() + (x_BD * self.weight).sum()


@pytest.mark.parametrize("clipping", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_step(clipping: float | None) -> None:
    model = RootOfZero()
    settings = {**SETTINGS, "optimizer": {"gradient_clipping": clipping}}
    with penstock.initialize(model, settings, training_data=samples(), loss_fn=lambda out, _: out) as engine:
        with pytest.raises(NotFiniteError, match=r"step 0: the .*gradient.* is nan"):
            engine.train_batch()
        assert engine.progress.step == 0
    assert torch.equal(model.weight, torch.zeros(6))


def test_a_large_but_finite_gradient_is_no_fault() -> None:
    model = net()
    with penstock.initialize(
        model, SETTINGS, training_data=samples(), loss_fn=lambda out, y: 1e25 * F.mse_loss(out, y)
    ) as engine:
        engine.train_batch()
    assert all(p.isfinite().all() for p in model.parameters())


def test_training_leaves_the_users_random_state_alone() -> None:
    # A data loader shuffles from it; the ranks that read inputs and those that read targets must go on alike.
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    with start(model) as engine:
        torch.manual_seed(5)
        expected = torch.rand(4)
        torch.manual_seed(5)
        first = engine.train_batch()
        assert torch.equal(torch.rand(4), expected)
        torch.manual_seed(6)
        assert engine.train_batch() != first


class WithLoss(nn.Module):
    """Takes named tensors and returns its loss, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, *, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.dropout(self.linear(features)), labels)}


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_model_that_returns_its_loss_needs_no_targets(kind: Callable[[dict[str, Tensor]], Any]) -> None:
    data = [{"features": x, "labels": y} for x, y in samples()]
    torch.manual_seed(0)
    with penstock.initialize(WithLoss(), SETTINGS, training_data=data) as engine:
        rows = [{name: torch.stack([s[name] for s in data[i : i + 2]]) for name in data[0]} for i in (0, 2)]
        mean = engine.eval_batch(iter(kind(row) for row in rows))
        linear = engine.stage.get_submodule("layers.0.module.linear")
        expected = sum(F.mse_loss(linear(row["features"]), row["labels"]).item() for row in rows) / 2
        assert mean == pytest.approx(expected, rel=1e-6)
        assert math.isfinite(engine.train_batch(iter(kind(row) for row in rows)))
        assert math.isfinite(engine.train_batch())


def test_with_a_loss_function_targets_are_wanted() -> None:
    with start(net()) as engine, pytest.raises(ValueError, match=r"must be a pair \(inputs, targets\), got a dict"):
        engine.train_batch(iter([{"features": torch.randn(2, 6)}] * 2))


def test_a_model_in_eval_mode_is_trained_in_train_mode_but_its_frozen_parts() -> None:
    pretrained = WithLoss().eval()
    penstock.initialize(pretrained, SETTINGS).close()
    assert pretrained.training
    assert pretrained.dropout.training
    partly = net()
    partly[1].eval()
    penstock.initialize(partly, SETTINGS, loss_fn=F.mse_loss).close()
    assert not partly[1].training


def test_a_list_is_no_iterator() -> None:
    with start(net()) as engine, pytest.raises(ValueError, match=r"must be an iterator, got a list.*iter\("):
        engine.train_batch(samples())  # type: ignore[arg-type]


def test_an_optimizer_may_hold_frozen_parameters_too() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = weights(model)
    with start(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1)) as engine:
        engine.train_batch()
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert changed == [False, False, True, True]


def test_a_scheduled_rate_is_in_the_checkpoint(tmp_path: Path) -> None:
    def run(load: bool, steps: int) -> tuple[Optimizer, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with start(model, optimizer=optimizer) as engine:
            if load:
                engine.load_checkpoint(tmp_path)
            for _ in range(steps):
                engine.train_batch()
                scheduler.step()
            if not load:
                engine.save_checkpoint(tmp_path)
        return optimizer, model

    optimizer, _ = run(False, 3)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8
    optimizer, _ = run(True, 1)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 16


def test_the_configured_rate_may_change_on_a_resume(tmp_path: Path) -> None:
    rates = []
    for lr in (0.1, 0.2):
        with penstock.initialize(
            net(),
            {**SETTINGS, "optimizer": {"lr": lr}, "schedule": {"decay": "constant"}},
            training_data=samples(),
            loss_fn=F.mse_loss,
        ) as engine:
            if lr == 0.2:
                engine.load_checkpoint(tmp_path)
            engine.train_batch()
            engine.save_checkpoint(tmp_path)
            rates.append(engine.optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.2]


class Counting(Optimizer):
    """Keeps a whole number and a flag for each parameter, and takes them to be just that."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["even"] = state["step"] % 2 == 0
                assert type(state["step"]) is int
                p.data.sub_(p.grad, alpha=group["lr"] / [1, 2, 3, 4, 5, 6, 7][state["step"]])


@pytest.mark.parametrize("make", [Counting, lambda groups: torch.optim.Adafactor(groups, lr=0.01)])
def test_numbers_and_factored_moments_come_back_as_they_were(tmp_path: Path, make: Any) -> None:
    with start(net(), optimizer=make) as engine:
        engine.train_batch()
        engine.save_checkpoint(tmp_path)
        expected = [engine.train_batch() for _ in range(3)]
    with start(net(), optimizer=make) as engine:
        engine.load_checkpoint(tmp_path)
        assert [engine.train_batch() for _ in range(3)] == expected


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = RandomLayerTokenDrop(nn.Linear(6, 6), reserved_length=2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.block(x_BSD).square().mean()
        return out


def test_each_weight_of_a_wrapped_layer_is_stored_once_and_its_file_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with penstock.initialize(Dropping(), SETTINGS) as engine:
        engine.train_batch(iter([torch.randn(2, 4, 6)] * 2))
        path = engine.save_checkpoint(tmp_path)
        stored = Checkpoint(path).read_layer(0)
        kinds = sorted(key.split(":")[0] for key in stored if not key.startswith("optimizer."))
        assert kinds == ["buffer", "weight", "weight"]
        reads = []
        read = Checkpoint.read_layer
        monkeypatch.setattr(Checkpoint, "read_layer", lambda self, layer: reads.append(layer) or read(self, layer))
        engine.load_checkpoint(tmp_path)
    assert reads == [0, 0]  # for the weights, and for the moments


@pytest.mark.parametrize("fails", [False, True])
def test_engines_one_after_the_other_leave_no_threads(fails: bool) -> None:
    model = net()
    before = threading.active_count()
    for _ in range(3):
        try:
            with start(model) as engine:
                engine.train_batch()
                if fails:
                    raise KeyError("of the user's own")
        except KeyError:
            pass
    assert threading.active_count() == before


def test_a_stage_without_trainable_parameters_is_refused() -> None:
    layers = [LayerSpec(nn.Linear, 6, 3), LayerSpec(nn.Tanh)]
    module = PipelineModule(layers, num_stages=2, loss_fn=F.mse_loss, partition_method="uniform")
    with pytest.raises(ValueError, match=r"stage 1 would hold layers 1 to 1.*\[21, 0\]"):
        prepare(module, SETTINGS, world_size=2)


@pytest.mark.parametrize(
    ("topology", "world_size", "message"),
    [
        (PipeDataParallelTopology(1, 2), 1, r"data=2, but this run has 1 replicas of 1 stages.*\(2\)"),
        (PipeDataParallelTopology(1, 1), 2, r"data=1, but this run has 2 replicas"),
        (
            PipeModelDataParallelTopology(1, 2, 1),
            1,
            r"1 process cannot form whole pipelines .* a multiple of 2 processes",
        ),
        (ProcessTopology(["pipe", "depth"], [1, 2]), 1, r"axis 'depth' of size 2"),
    ],
)
def test_a_topology_that_is_not_the_runs_is_refused(topology: ProcessTopology, world_size: int, message: str) -> None:
    module = PipelineModule([LayerSpec(nn.Linear, 6, 3)], topology=topology, loss_fn=F.mse_loss)
    with pytest.raises(ValueError, match=message):
        prepare(module, SETTINGS, world_size=world_size)


def test_a_models_topology_says_which_rank_is_where() -> None:
    topology = ProcessTopology(["data", "pipe"], [2, 1])
    module = PipelineModule([LayerSpec(nn.Linear, 6, 3)], topology=topology, loss_fn=F.mse_loss)
    assert prepare(module, SETTINGS, world_size=2).topology is topology
