"""Layer specs."""

from functools import partial
from typing import Any

import pytest
from torch import nn

from penstock.pipe.layer_spec import LayerSpec, TiedLayerSpec, callable_name


def test_a_spec_builds_a_new_layer_each_time() -> None:
    spec = LayerSpec(nn.Linear, 3, 4, bias=False)
    first, second = spec.build(), spec.build()
    assert isinstance(first, nn.Linear)
    assert (first.in_features, first.out_features, first.bias) == (3, 4, None)
    assert first is not second
    assert repr(spec) == "LayerSpec(Linear, 3, 4, bias=False)"


def test_any_callable_that_returns_a_module_will_do() -> None:
    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())

    assert LayerSpec(mlp, 3).name == "mlp"
    assert isinstance(LayerSpec(mlp, 3).build(), nn.Sequential)
    assert LayerSpec(partial(nn.Linear, 3), 4).name == "partial"
    assert callable_name(len) == "len"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSpec(nn.Linear(2, 2)), "got an instance of Linear; put the instance itself into the list"),
        (lambda: LayerSpec("Linear", 2), r"got 'Linear' \(str\)"),  # type: ignore[arg-type]
        (lambda: LayerSpec(dict, a=1).build(), "dict returned dict, a layer must be a torch.nn.Module"),
        (lambda: TiedLayerSpec("", nn.Linear, 2, 2), "key must be a non-empty string, got ''"),
        (lambda: TiedLayerSpec(3, nn.Linear, 2, 2), "key must be a non-empty string, got 3"),  # type: ignore[arg-type]
        (lambda: TiedLayerSpec("e", nn.Linear, 2, 2, forward_fn=1), "forward_fn must be a callable"),  # type: ignore[arg-type]
        (lambda: TiedLayerSpec("e", nn.Linear, 2, 2, tied_weight_attr=[]), "tied_weight_attr must be"),
        (lambda: TiedLayerSpec("e", nn.Linear, 2, 2, tied_weight_attr=["a", "a"]), "repeats a name"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tied_attributes_are_a_tuple_of_names() -> None:
    assert TiedLayerSpec("e", nn.Embedding, 2, 2).tied_weight_attr == ("weight",)
    assert TiedLayerSpec("e", nn.Linear, 2, 2, tied_weight_attr=["weight", "bias"]).tied_weight_attr == (
        "weight",
        "bias",
    )
