import torch
from torch import nn

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe import TiedLayerSpec
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
