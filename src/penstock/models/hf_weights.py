"""From the canonical names of a pipeline's weights back to those of a Hugging Face model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penstock.models.hf_layers import hf_layers
from penstock.pipe.layer_spec import TiedLayerSpec, layer_name


def hf_names(model: Any) -> dict[str, str]:
    """For each weight of ``hf_layers(model)``, its canonical name and the model's own name of it.

    A tied weight appears once, under the names of the first layer and of the embedding.

    Raises:
        ValueError: As :func:`hf_layers`.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    tied = False
    for index, layer in enumerate(hf_layers(model)):
        if isinstance(layer, TiedLayerSpec):
            if tied:
                continue
            tied = True
        module = layer if isinstance(layer, nn.Module) else layer.build()
        for name, parameter in module.named_parameters():
            found[f"{layer_name(index)}.{name}"] = own[id(parameter)]
    return found


def load_hf_weights(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy a run's weights into the model that it was made of, in place; ``model.save_pretrained`` then writes them.

    Args:
        model: Of the configuration that went to :func:`hf_layers`.
        tensors: By canonical name (``layer_003.block.mlp.up_proj.weight``), perhaps after ``weight:`` as in the files
            of a checkpoint, whose other entries are passed over.

    Raises:
        ValueError: A weight is missing or of another shape.
    """
    given = {name.removeprefix("weight:"): tensor for name, tensor in tensors.items()}
    parameters = dict(model.named_parameters())
    names = hf_names(model)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {len(names)} weights are not among the {len(given)} tensors given, the "
            f"first is {missing[0]} ({names[missing[0]]}); give the tensors of all layers of a run on "
            "hf_layers(model)"
        )
    for name, own in names.items():
        if given[name].shape != parameters[own].shape:
            raise ValueError(
                f"{own}: the run's {name} has the shape {tuple(given[name].shape)}, but the model's is "
                f"{tuple(parameters[own].shape)}; take the model of the same configuration"
            )
    with torch.no_grad():
        for name, own in names.items():
            parameters[own].copy_(given[name])
