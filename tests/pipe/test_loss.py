from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.pipe.loss import loss_of


@dataclass
class Output:
    loss: Any


def mean(output: Any, targets: Any) -> Any:
    return (output * targets).mean()


def test_a_loss_function_gets_output_and_targets() -> None:
    assert loss_of(torch.ones(4), torch.full((4,), 2.0), mean, stage=0).item() == 2.0


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"loss": x, "logits": 1}, Output])
def test_a_model_may_return_its_loss(wrap: Any) -> None:
    x = torch.tensor(3.0)
    assert loss_of(wrap(x), None, None, stage=0) is x


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 3), r"stage 4: .* scalar, got a tensor of shape \(2, 3\)"),
        (torch.ones(1), r"got a tensor of shape \(1,\); .*reduce it"),
        (torch.tensor(1), "floating-point loss, got torch.int64"),
        (1.0, "must return a scalar tensor .* got float"),
        ({"logits": 1}, "got dict"),
    ],
)
@pytest.mark.parametrize("with_function", [True, False])
def test_what_is_no_loss_is_refused(value: Any, message: str, with_function: bool) -> None:
    def give(output: Any, targets: Tensor) -> Any:
        return output

    with pytest.raises(ValueError, match=message):
        loss_of(value, None, give if with_function else None, stage=4)
