import torch
from torch import nn

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe import TiedLayerSpec
from penstock.pipe.local_stages import LocalStages, share_tied
from penstock.pipe.module import PipelineModule
from penstock.pipe.tied import TiedGradients


def tied(num_stages: int) -> tuple[TiedGradients, list[nn.Parameter]]:
    module = PipelineModule(
        [TiedLayerSpec("a", nn.Linear, 2, 2, tied_weight_attr=["weight", "bias"]) for _ in range(3)],
        num_stages=num_stages,
        partition_method="uniform",
    )
    stages = [module.build_stage(index) for index in range(num_stages)]
    gradients = TiedGradients(stages, {}, watcher=Watcher(), meter=Meter())
    return gradients, gradients.parameters


def test_uses_on_one_stage_share_a_copy_and_are_left_alone() -> None:
    gradients, parameters = tied(1)
    assert [tuple(p.shape) for p in parameters] == [(2,), (2, 2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gradients.sum()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters if p.grad is not None)


def test_copies_on_several_stages_get_the_sum_and_a_missing_gradient_counts_as_zeros() -> None:
    gradients, parameters = tied(3)
    assert [tuple(p.shape) for p in parameters] == [(2,)] * 3 + [(2, 2)] * 3
    for number, parameter in enumerate(parameters[:5]):
        parameter.grad = torch.full_like(parameter, 10.0**number)
    storage = [p.grad.data_ptr() for p in parameters[:5] if p.grad is not None]
    gradients.sum()
    sums = [p.grad.flatten()[0].item() for p in parameters if p.grad is not None]
    assert sums == [111.0] * 3 + [11000.0] * 3
    assert storage == [p.grad.data_ptr() for p in parameters[:5] if p.grad is not None], "gradients moved"


def test_frozen_copies_are_left_out() -> None:
    module = PipelineModule([TiedLayerSpec("a", nn.Linear, 2, 2, bias=False)], num_stages=1)
    stage = module.build_stage(0).requires_grad_(False)
    assert TiedGradients([stage], {}, watcher=Watcher(), meter=Meter()).parameters == []


class _Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def test_stages_of_one_rank_share_a_weight() -> None:
    module = PipelineModule(
        [TiedLayerSpec("a", _Inside, tied_weight_attr="inner.weight") for _ in range(3)],
        num_stages=3,
        partition_method="uniform",
    )
    stages = [module.build_stage(index) for index in range(3)]
    share_tied(stages)
    (weight,) = {id(p): p for stage in stages for p in stage.parameters()}.values()
    assert [(name, p is weight) for name, p in LocalStages(stages).canonical_parameters()] == [
        ("layer_000.inner.weight", True)
    ]
    x = torch.eye(2)
    for stage in stages:
        stage(x).sum().backward()
    gradients = TiedGradients(stages, {}, watcher=Watcher(), meter=Meter())
    gradients.sum()
    assert len(gradients.parameters) == 1
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((2, 2), 3.0))
