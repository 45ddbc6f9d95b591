"""Results on disk: numbers in JSON, tensors in safetensors, nothing pickled."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from penstock._core.files import atomic_file, write_bytes


def process_and_save_results(results: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Write a loop's results, atomically.

    Scalars (tensors of one number too) become plain numbers; infinities and not-a-number become the strings ``"inf"``,
    ``"-inf"`` and ``"nan"``, which JSON has no numbers for. Larger tensors go to a safetensors file of the same name
    beside it, and their place in the JSON holds ``{"tensor": key, "shape": [...], "dtype": ...}``.

    Args:
        results: Dictionaries, as :func:`execute_data_pipeline` returns.
        path: ``.jsonl`` for a line per result, ``.json`` for one list.

    Returns:
        The path of the JSON file.

    Raises:
        ValueError: The suffix is another, or a result holds something that is neither data nor tensors.
    """
    target = Path(path)
    if target.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{target}: results are written as .jsonl (a line each) or .json (one list)")
    tensors: dict[str, Tensor] = {}
    rows = [_plain(result, f"{number:06d}", tensors) for number, result in enumerate(results)]
    beside = target.with_suffix(".safetensors")
    # Tensors first: a JSON file never names tensors that are not there.
    if tensors:
        write_bytes(beside, save(tensors))
    else:
        beside.unlink(missing_ok=True)
    with atomic_file(target) as file:
        if target.suffix == ".json":
            file.write(json.dumps(rows, indent=2, allow_nan=False).encode() + b"\n")
        else:
            file.writelines(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
    return target


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "US":
        value = value.tolist()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.ndim == 0:
            return _plain(value.item(), place, tensors)
        if place in tensors:
            raise ValueError(f"result {place}: two entries have this place; use keys without dots, or other ones")
        # A copy of its own: safetensors refuses tensors that share storage.
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {"tensor": place, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{place}.{key}", tensors) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry, f"{place}.{number}", tensors) for number, entry in enumerate(value)]
    raise ValueError(
        f"result {place}: cannot save a {type(value).__name__}; return numbers, text, tensors or nests of them"
    )


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a module's parameters and buffers as safetensors, atomically; tied ones are written under each name."""
    target = Path(path)
    write_bytes(
        target, save({name: value.detach().cpu().clone().contiguous() for name, value in _state(model).items()})
    )
    return target


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a module's parameters and buffers from safetensors, into the storage they have.

    Raises:
        ValueError: The file is missing or malformed, or its names, shapes or dtypes are not the module's.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: there is no such weights file")
    try:
        stored = load_file(file)
    except Exception as error:  # safetensors raises its own kinds
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    own = _state(model)
    missing, unknown = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"{file}: not this model's weights; missing: {_some(missing)}; not in the model: {_some(unknown)}"
        )
    for name, value in own.items():
        if stored[name].shape != value.shape or stored[name].dtype != value.dtype:
            raise ValueError(
                f"{file}: {name} is {tuple(stored[name].shape)} of {stored[name].dtype}, but the model's is "
                f"{tuple(value.shape)} of {value.dtype}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
