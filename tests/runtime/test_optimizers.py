from typing import Any

import pytest
import torch
from torch import nn

from penstock.runtime.optimizers import check_parameters, load_state, parameter_groups, save_state


def layers() -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    torch.manual_seed(0)
    own = [("layer_001.weight", nn.Parameter(torch.randn(3, 2))), ("layer_001.bias", nn.Parameter(torch.randn(3)))]
    shared = [("layer_000.a", nn.Parameter(torch.randn(2, 2))), ("layer_000.b", nn.Parameter(torch.randn(4, 2)))]
    return own, shared


def test_vectors_are_not_decayed_and_each_shared_weight_is_alone() -> None:
    own, shared = layers()
    groups = parameter_groups(own, shared, weight_decay=0.1)
    assert [([tuple(p.shape) for p in g["params"]], g["weight_decay"]) for g in groups] == [
        ([(3, 2)], 0.1),
        ([(3,)], 0.0),
        ([(2, 2)], 0.1),
        ([(4, 2)], 0.1),
    ]
    assert [len(g["params"]) for g in parameter_groups(own, shared)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_state_goes_by_name_whatever_the_order(make: Any, options: dict[str, Any]) -> None:
    def run(named: list[tuple[str, nn.Parameter]], optimizer: Any, steps: int) -> None:
        for step in range(steps):
            for name, parameter in named:
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * len(name))
            optimizer.step()

    own, shared = layers()
    named = own + shared
    straight = make([p for _, p in named], **options)
    run(named, straight, 3)
    saved = save_state(straight, {id(p): name for name, p in named})

    other_own, other_shared = layers()
    turned = list(reversed(other_own + other_shared))
    resumed = make([p for _, p in turned], **options)
    by_name = dict(named)
    with torch.no_grad():
        for name, parameter in turned:
            parameter.copy_(by_name[name])
    load_state(resumed, {id(p): name for name, p in turned}, saved)
    run(named, straight, 2)
    run(turned, resumed, 2)
    for name, parameter in turned:
        assert torch.equal(parameter, by_name[name])


def test_a_state_of_another_shape_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    with pytest.raises(ValueError, match=r"exp_avg of layer_000\.weight.*\[3, 2\].*\[2, 3\]"):
        load_state(optimizer, {id(parameter): "layer_000.weight"}, {"layer_000.weight": {"exp_avg": torch.zeros(3, 2)}})


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    mine, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="holds 1 parameters, of which 0 are among the 1"):
        check_parameters(torch.optim.SGD([other], lr=0.1), [mine])
