"""Activation checkpointing by layer class: the same numbers, recomputed where asked and nowhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock._core.batch_key import BatchKey
from penstock.pipe.module import LayerSpec, PipelineModule
from penstock.runtime.preparation import prepare
from support.run_jobs import config, model

KEY = BatchKey(3, 5, 2, (7, 8))
CALLS: list[str] = []


class Noisy(nn.Module):
    """A linear layer with dropout that notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(type(self).__name__)
        return nn.functional.dropout(self.inner(x).tanh(), 0.5, self.training)


class Other(Noisy):
    """The same by another name."""


LAYERS = [LayerSpec(Noisy), LayerSpec(Other), LayerSpec(Other), LayerSpec(Noisy), LayerSpec(Other)]


def run(**changes: Any) -> tuple[list[str], list[Tensor]]:
    stage = PipelineModule(LAYERS, num_stages=1, **changes).build_stage(0, dtype=torch.float64)
    CALLS.clear()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    stage(x, KEY).square().sum().backward()
    return list(CALLS), [x.grad, *(p.grad for p in stage.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("layers", [["Other"], ["Noisy"], ["Noisy", "Other"]])
def test_layers_of_the_named_classes_run_twice_to_the_same_gradients(layers: list[str]) -> None:
    calls, gradients = run()
    again, others = run(activation_checkpoint_layers=layers)
    for name in ("Noisy", "Other"):
        assert again.count(name) == calls.count(name) * (2 if name in layers else 1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, others, strict=True))


def test_layers_may_be_named_by_number() -> None:
    calls, gradients = run()
    again, others = run(activation_checkpoint_layers=[1, 3])
    assert [again.count(name) - calls.count(name) for name in ("Noisy", "Other")] == [1, 1]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, others, strict=True))
    mixed = PipelineModule(LAYERS, num_stages=2, partition_method=[0, 2, 5], activation_checkpoint_layers=["Noisy", 4])
    assert [mixed.build_stage(stage).recomputed for stage in (0, 1)] == [{0}, {3, 4}]


def test_evaluation_recomputes_nothing() -> None:
    stage = PipelineModule(LAYERS, num_stages=1, activation_checkpoint_layers=["Noisy"]).build_stage(0).eval()
    CALLS.clear()
    with torch.no_grad():
        stage(torch.zeros(2, 6))
    assert len(CALLS) == len(LAYERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_checkpoint_layers": ["Noisi"]}, "did you mean 'Noisy'"),
        ({"activation_checkpoint_layers": "Noisy"}, r"write \['Noisy'\]"),
        ({"activation_checkpoint_layers": [5]}, "there is no layer 5; the model has layers 0 to 4"),
        ({"activation_checkpoint_layers": [True]}, "there is no layer True"),
        ({"activation_checkpoint_layers": ["Noisy"], "activation_checkpoint_interval": 1}, "set one of them"),
    ],
)
def test_what_is_not_a_class_of_the_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineModule(LAYERS, **changes)


def test_the_configuration_says_it_for_a_given_model_too() -> None:
    made = config(dropping=False)
    made["pipe"]["activation_checkpoint_layers"] = ["GPTBlock"]
    ready = prepare(model(), made, world_size=1).module
    assert ready is not None
    assert ready.build_stage(0).recomputed == {1, 2, 3, 4}
    made["pipe"] = {"activation_checkpoint_interval": 2}
    ready = prepare(model(), made, world_size=1).module
    assert ready is not None
    assert ready.build_stage(0).activation_checkpoint_interval == 2
    differing = PipelineModule(LAYERS, activation_checkpoint_interval=3)
    with pytest.raises(ValueError, match=r"activation_checkpoint_interval=3 .* says 2 .*; say it in one place"):
        prepare(differing, made, world_size=1)
