"""Compiled layers give the numbers of plain ones."""

from typing import Any

import pytest
import torch

import penstock
from penstock.runtime.preparation import prepare
from support.run_jobs import config, model, tokens

COMPILED = {"enabled": True, "backend": "aot_eager", "layers": ["GPTBlock"]}


def run(**changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = config(steps=4, train={"global_batch_size": 2, "micro_batch_size": 1, "steps": 4}, **changes)
    with penstock.initialize(model(layers=3), made, training_data=tokens(8)) as engine:
        losses = [engine.train_batch() for _ in range(2)]
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
        return losses, weights


# torch looks at the gradients of inputs that are no leaves while it compiles.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", [{}, {"schedule": "zb_h1"}], ids=["dropping", "split"])
def test_compiled_layers_give_the_same_numbers(changes: dict[str, Any]) -> None:
    losses, weights = run(**changes)
    with torch._functorch.config.patch(donated_buffer=True):  # which a split schedule turns off for the process
        others, changed = run(compile=COMPILED, **changes)
    assert others == losses
    assert all(torch.equal(changed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"enabled": True, "backend": "inducto"}, "did you mean 'inductor'"),
        ({"enabled": True, "layers": ["GPTBlok"]}, "did you mean 'GPTBlock'"),
        ({"enabled": True, "mode": "reduce-overhead"}, "unknown mode 'reduce-overhead'"),
        ({"enabled": True, "mode": "default", "backend": "aot_eager"}, "is one of inductor's"),
    ],
)
def test_what_cannot_be_compiled_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(model(), {**config(dropping=False), "compile": section}, world_size=1)


@pytest.mark.parametrize("other", [{"tensor_parallel": {"size": 2}}, {"data_parallel": {"sharding": "fsdp2"}}])
def test_layers_that_communicate_are_not_compiled(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set compile\.enabled: false"):
        prepare(model(), {**config(dropping=False), "compile": COMPILED, **other}, world_size=2)
