"""The steps that the loop is made of, each usable alone in a loop of one's own."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from penstock.data_pipeline.settings import Mode

LOGGER_NAME: Final = "penstock.data_pipeline"
_TARGET_KEYS: Final = ("labels", "targets")


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or not a number; the message names the step. No weight was changed by that step."""


def setup_logging(level: str = "info", file: str | None = None) -> logging.Logger:
    """Make the pipeline's logger speak, on standard error and in a file if one is named. Safe to call again.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        file: Appended to; its directory is created.

    Returns:
        The logger ``penstock.data_pipeline``.

    Raises:
        ValueError: The level is unknown.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown logging level {level!r}; known: debug, info, warning, error")
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(number)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    return logger


def configure_globals(
    seed: int | None = None, threads: int | None = None, device: str | torch.device | None = None
) -> torch.device:
    """Seed the process's generators, set torch's threads, and check the device.

    Args:
        seed: For Python's ``random``, NumPy's legacy generator and torch on every device; in ``[0, 2**32)``. None
            leaves them as they are.
        threads: Threads of torch's CPU operators. None leaves torch's choice.
        device: ``cpu``, ``cuda``, ``cuda:1``. None is ``cpu``.

    Returns:
        The device.

    Raises:
        ValueError: A value is out of range, or this machine has no such device.
    """
    chosen = resolve_device(device)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if seed is not None:
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    return chosen


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that a name stands for, if this machine has it.

    Raises:
        ValueError: The name is malformed or there is no such device.
    """
    try:
        chosen = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device ({str(error).splitlines()[0]})") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ValueError(f"device {str(chosen)!r}: this machine has {count} CUDA devices; use cpu or another index")
    return chosen


def set_model_mode(model: nn.Module, mode: Mode) -> AbstractContextManager[None]:
    """Put a model in the right mode: training mode for ``train``, evaluation mode for ``eval`` and ``predict``.

    As a plain call the mode stays. In a ``with`` statement it holds for the block, where autograd follows it too
    (gradients for ``train``, none otherwise); afterwards every submodule's own mode (a batch norm frozen in evaluation
    mode, for example) and the gradient mode are as before.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in ("train", "eval", "predict"):
        raise ValueError(f"unknown mode {mode!r}; known: train, eval, predict")
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    return _for_a_block(before, gradients=mode == "train")


@contextmanager
def _for_a_block(before: list[tuple[nn.Module, bool]], *, gradients: bool) -> Iterator[None]:
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in before:
            module.training = training


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    A pair is ``(inputs, targets)``; a tuple or list of one, and anything else that is no mapping, is inputs alone. A
    mapping's targets are its ``labels`` or ``targets``, its inputs the rest.

    Returns:
        ``(inputs, targets)``; targets are None where there are none.

    Raises:
        ValueError: A tuple or list of another length.
    """
    if isinstance(batch, Mapping):
        target = next((key for key in _TARGET_KEYS if key in batch), None)
        inputs = {key: value for key, value in batch.items() if key != target}
        return inputs, None if target is None else batch[target]
    if isinstance(batch, tuple | list):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
        raise ValueError(
            f"a batch of {len(batch)} parts is not clear: return (inputs, targets), a mapping, or inputs alone from "
            "the collate function"
        )
    return batch, None


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a mapping becomes keyword arguments, anything else is the one argument."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def compute_loss(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None = None
) -> tuple[Tensor, Any]:
    """Run the model on a batch and compute its loss.

    Args:
        model: Called with the batch's inputs (see :func:`split_batch`); without a ``loss_fn`` a mapping is passed
            whole, targets included, as Hugging Face's models take it.
        batch: ``(inputs, targets)``, a mapping, or inputs alone.
        loss_fn: ``loss_fn(outputs, targets)``. None: the outputs are the loss, or hold it as ``.loss`` or ``["loss"]``.

    Returns:
        ``(loss, outputs)``; the loss is a scalar tensor.

    Raises:
        ValueError: There are no targets for ``loss_fn``, no loss in the outputs, or the loss is not a scalar.
    """
    inputs, targets = split_batch(batch)
    if loss_fn is not None:
        if targets is None:
            raise ValueError(
                "loss_fn needs targets, but the batch has none: give pairs (inputs, targets) or a mapping with 'labels'"
            )
        outputs = call_model(model, inputs)
        return _scalar(loss_fn(outputs, targets), "loss_fn"), outputs
    outputs = call_model(model, batch if isinstance(batch, Mapping) else inputs)
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"no loss_fn is given, and the model's outputs ({type(outputs).__name__}) are not a loss and hold none; "
            "set loss_fn"
        )
    return _scalar(found, "the model"), outputs


def _scalar(loss: Any, origin: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"shape {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{origin} returned a loss of {what}; a loss is a floating-point scalar (use .mean())")
    return loss.reshape(())


def check_finite(loss: float, step: int) -> float:
    """The loss, if it is a number.

    Raises:
        NonFiniteLossError: It is not.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"the loss is {loss} at step {step}, so training stopped before that step changed a weight; lower the "
            "learning rate, clip gradients (max_grad_norm), or look at that step's data"
        )
    return loss


def optimize_model(optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None) -> float | None:
    """One optimizer step from the gradients at hand, which are cleared afterwards.

    Args:
        optimizer: The optimizer.
        max_grad_norm: Clip the global norm of all its parameters' gradients to this first.

    Returns:
        The norm before clipping, or None without clipping.
    """
    norm = None
    if max_grad_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def to_device(value: Any, device: torch.device) -> Any:
    """A nest of tuples, lists and mappings with its tensors on ``device``."""
    if isinstance(value, Tensor):
        # Towards the CPU a copy that does not block may be read before it is there.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(entry, device) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(entry, device) for entry in value)
    if isinstance(value, Mapping):
        return {key: to_device(entry, device) for key, entry in value.items()}
    return value
