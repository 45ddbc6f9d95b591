"""Keeps a wrapper's own level out of state dicts."""

from functools import partial
from typing import Any

from torch import nn


def hide_inner_name(wrapper: nn.Module, inner_name: str) -> None:
    """Make the wrapper's state dict that of the module inside it, for saving and for loading.

    Args:
        wrapper: A module without parameters or buffers of its own.
        inner_name: Its attribute that holds the wrapped module.
    """
    # Not closures: a model is sent to another process as a whole.
    wrapper.register_state_dict_post_hook(partial(_drop, inner_name))
    wrapper.register_load_state_dict_pre_hook(partial(_add, inner_name))


def _drop(
    inner_name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Take the inner name out of the keys just collected; their order stays."""
    inner = f"{prefix}{inner_name}."
    for key in [key for key in state_dict if key.startswith(inner)]:
        state_dict[prefix + key.removeprefix(inner)] = state_dict.pop(key)
    metadata = getattr(state_dict, "_metadata", {})
    for name in [name for name in metadata if f"{name}.".startswith(inner)]:
        metadata[(prefix + f"{name}.".removeprefix(inner)).removesuffix(".")] = metadata.pop(name)


def _add(inner_name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the keys of a clean state dict the inner name that torch looks them up under."""
    inner = f"{prefix}{inner_name}."
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(inner)]:
        state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
