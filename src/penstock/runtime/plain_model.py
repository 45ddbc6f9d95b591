"""Any ``nn.Module`` as a pipeline of one stage, trained in place."""

from typing import Any

import torch
from torch import nn

from penstock.pipe.stage import Stage


def plain_stage(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Stage:
    """One stage of one layer that is the model itself, moved to ``device`` and ``dtype``.

    The model is called with its inputs as keyword arguments if they are a dict (as Hugging Face models want them), as
    positional arguments if they are a tuple or list, else as the one argument.

    A model in eval mode as a whole (as ``from_pretrained`` of Hugging Face leaves it) is put into train mode; parts
    that are in eval mode inside a model in train mode stay so.
    """
    if not model.training:
        model.train()
    return Stage(
        index=0,
        num_stages=1,
        start=0,
        modules=[model.to(device=device, dtype=dtype)],
        forward_fns={0: _call},
        device=device,
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)
