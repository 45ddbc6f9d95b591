import pytest
import torch
from torch import nn

from penstock.data_pipeline import register_components
from penstock.data_pipeline.components import (
    build_function,
    build_optimizer,
    call,
    find_component,
    import_attribute,
    token_cross_entropy,
)


def _one() -> int:
    return 1


def _two() -> int:
    return 2


def test_names_are_found_and_may_only_change_on_purpose() -> None:
    register_components({"model": {"test_components_a": _one}}, loss={"test_components_b": "torch.nn:MSELoss"})
    assert find_component("model", "test_components_a") is _one
    assert find_component("loss", "test_components_b") is nn.MSELoss
    register_components(model={"test_components_a": _one})
    with pytest.raises(ValueError, match="registered already"):
        register_components(model={"test_components_a": _two, "test_components_new": _two})
    with pytest.raises(ValueError, match="unknown model"):
        find_component("model", "test_components_new")  # a mistake registers nothing
    register_components(model={"test_components_a": _two}, replace=True)
    assert find_component("model", "test_components_a") is _two


def test_import_paths() -> None:
    assert import_attribute("torch.nn:Module.forward") is nn.Module.forward
    for path, sentence in [
        ("torch", "not an import path"),
        ("torch:", "not an import path"),
        ("torch:nn; import os", "not an import path"),
        ("__import__('os'):system", "not an import path"),
        ("no_such_module_here:x", "cannot import"),
        ("torch.nn:Linaer", "did you mean 'Linear'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            import_attribute(path)
    with pytest.raises(ValueError, match="cannot be called"):
        find_component("model", "math:pi")


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        ({"modle": {}}, "did you mean 'model'"),
        ({"model": {"": _one}}, "not empty"),
        ({"model": {"a:b": _one}}, "import path"),
        ({"model": {"x": 3}}, "cannot be called"),
    ],
)
def test_mistakes_in_registration(kinds: dict[str, dict[str, object]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        register_components(kinds)  # type: ignore[arg-type]


def test_functions_from_names_classes_and_tables() -> None:
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    assert build_function("loss", "mse")(x, y) == 5.0
    assert build_function("loss", {"name": "mse", "reduction": "sum"})(x, y) == 10.0
    assert build_function("loss", {"name": "torch.nn:MSELoss", "reduction": "sum"})(x, y) == 10.0
    assert build_function("loss", "torch.nn:MSELoss")(x, y) == 5.0


def test_arguments_are_checked_before_the_call() -> None:
    with pytest.raises(ValueError, match="did you mean 'out_features'"):
        call("model", nn.Linear, in_features=3, out_feature=3)
    with pytest.raises(ValueError, match="missing a required argument: 'out_features'"):
        call("model", nn.Linear, in_features=3)
    assert call("model", nn.Linear, in_features=3, out_features=2).out_features == 2


def test_frozen_parameters_are_not_given_to_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer({"name": "adam", "lr": 0.5}, model)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[1].parameters()]


def test_token_cross_entropy_is_the_mean_over_labels_that_count() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, -100, 4], [0, 2, -100]])
    terms = [
        logits[b, s].logsumexp(0) - logits[b, s, label]
        for b, row in enumerate(labels.tolist())
        for s, label in enumerate(row)
        if label >= 0
    ]
    assert torch.allclose(token_cross_entropy(logits, labels), sum(terms) / len(terms), rtol=1e-12)  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda value: token_cross_entropy(value, labels), logits)
