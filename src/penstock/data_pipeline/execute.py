"""The loop: a loader's batches through a model, in training, evaluation or prediction."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from penstock._core.protocols import BatchEngine
from penstock.data_pipeline.components import build_function, build_optimizer
from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.settings import TrainingConfig
from penstock.data_pipeline.steps import (
    LOGGER_NAME,
    NonFiniteLossError,
    call_model,
    check_finite,
    compute_loss,
    optimize_model,
    resolve_device,
    set_model_mode,
    split_batch,
    to_device,
)

Result = dict[str, Any]

_LOGGER: Final = logging.getLogger(LOGGER_NAME)


def execute_data_pipeline(
    model: nn.Module | BatchEngine,
    data_loader: Iterable[Any] | None,
    training_config: TrainingConfig | Mapping[str, Any] | None = None,
) -> list[Result]:
    """Train, evaluate or predict over a loader's batches.

    An ``nn.Module`` is driven by the steps of :mod:`penstock.data_pipeline.steps`. In evaluation and prediction there
    are no gradients and the model is in evaluation mode; its former mode returns afterwards. The batches of an
    accumulation never run across the end of a pass: at the end of one, the step's loss is the mean of those that are
    left.

    Anything with ``train_batch``, ``eval_batch`` and ``predict_batch`` (:class:`BatchEngine`) is driven through those:
    each call takes from the loader what one step needs, and batches at the end of a pass that fill no step are left
    out and logged. Its optimizer, loss, device, clipping and accumulation are its own and may not be set here.

    Args:
        model: A module or an engine.
        data_loader: Batches, as often as there are passes: a torch DataLoader or any iterable; see
            :func:`split_batch` for what a batch is. None for an engine that has data of its own (train mode, with
            ``max_steps``).
        training_config: A :class:`TrainingConfig` or the same as a dictionary.

    Returns:
        A dictionary per step: ``step`` and ``epoch`` (both from 0); ``loss`` (a float) in train and eval; ``batches``,
        how many of the loader's batches the step took; ``outputs`` in predict, with tensors on the CPU;
        ``grad_norm`` where gradients are clipped.

    Raises:
        ValueError: The configuration or a batch is wrong.
        NonFiniteLossError: The loss of a training step is not finite; that step changed no weight and leaves no
            gradients.
    """
    config = validate_config(TrainingConfig, {} if training_config is None else training_config, "training_config")
    if isinstance(model, BatchEngine):
        steps = _engine_steps(model, data_loader, config)
    elif isinstance(model, nn.Module):
        if data_loader is None:
            raise ValueError("a module has no data of its own: give a data_loader")
        steps = _module_steps(model, data_loader, config)
    else:
        raise ValueError(
            f"cannot drive a {type(model).__name__}: give a torch.nn.Module, or an engine with train_batch, eval_batch "
            "and predict_batch"
        )
    results: list[Result] = []
    for result in itertools.islice(steps, config.max_steps):
        results.append(result)
        if config.log_every and (result["step"] + 1) % config.log_every == 0:
            loss = f" loss {result['loss']:.4f}" if "loss" in result else ""
            _LOGGER.info("%s step %d%s", config.mode, result["step"], loss)
        for callback in config.callbacks:
            callback(result)
    return results


def _module_steps(model: nn.Module, loader: Iterable[Any], config: TrainingConfig) -> Iterator[Result]:
    device = None if config.device is None else resolve_device(config.device)
    loss_fn = None if config.loss_fn is None else build_function("loss", config.loss_fn)
    if device is not None:
        model.to(device)
    optimizer = build_optimizer(config.optimizer, model) if config.mode == "train" else None
    if optimizer is not None:  # whatever ran before may have left gradients
        optimizer.zero_grad(set_to_none=True)
    step = 0
    for epoch, batches in enumerate(_epochs(loader, config)):
        for group in _groups(batches, config.gradient_accumulation_steps):
            placed = group if device is None else [to_device(batch, device) for batch in group]
            # The mode is set for a step, not for the loop: between steps it is the caller's, whose callbacks may
            # evaluate, or abandon the loop.
            with set_model_mode(model, config.mode):
                result: Result = {"step": step, "epoch": epoch, "batches": len(group)}
                if optimizer is not None:
                    result |= _train_step(model, placed, loss_fn, optimizer, config.max_grad_norm, step)
                elif config.mode == "eval":
                    result["loss"] = float(compute_loss(model, placed[0], loss_fn)[0])
                else:
                    outputs = call_model(model, split_batch(placed[0])[0])
                    result["outputs"] = to_device(outputs, torch.device("cpu"))
            _mark_trained(loader, config, len(group))
            yield result
            step += 1


def _train_step(
    model: nn.Module,
    batches: list[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    step: int,
) -> Result:
    losses = []
    for batch in batches:
        loss, _ = compute_loss(model, batch, loss_fn)
        (loss / len(batches) if len(batches) > 1 else loss).backward()
        losses.append(loss.detach())
    # One look at the device per step; in double so that the mean of half-precision losses is not rounded.
    try:
        mean = check_finite(float(torch.stack(losses).double().mean()), step)
    except NonFiniteLossError:
        optimizer.zero_grad(set_to_none=True)  # who catches the error and goes on must not go on with these
        raise
    norm = optimize_model(optimizer, max_grad_norm=max_grad_norm)
    return {"loss": mean} if norm is None else {"loss": mean, "grad_norm": norm}


def _epochs(loader: Iterable[Any], config: TrainingConfig) -> Iterator[Iterator[Any]]:
    """A fresh iterator over the loader for each pass; endless when only ``max_steps`` bounds the run."""
    bounded = config.epochs is not None or config.max_steps is None
    goes_on = config.mode == "train" and _counts_training(loader)
    if goes_on and (config.epochs or 1) > 1:
        raise ValueError(
            f"epochs={config.epochs}, but the loader's sampler goes on where training stands and knows its own length; "
            "set epochs or num_samples in sampling instead"
        )
    for epoch in range(config.epochs or 1) if bounded else itertools.count():
        for holder in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            set_epoch = getattr(holder, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        batches = iter(loader)
        first = list(itertools.islice(batches, 1))
        if not first and goes_on and epoch > 0:
            _LOGGER.warning("the sampler's run is over before max_steps=%s; training ends with it", config.max_steps)
            return
        if not first:
            raise ValueError(
                f"the data_loader gave no batch in epoch {epoch}: the dataset is empty, smaller than one batch with "
                "drop_last, trained on to the end, or an iterator that can be read only once"
            )
        yield itertools.chain(first, batches)


def _groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(itertools.islice(batches, size)):
        yield group


def _counts_training(loader: Iterable[Any]) -> bool:
    """Whether the loader's sampler wants to hear what was really trained on, whatever was prefetched."""
    return hasattr(getattr(loader, "batch_sampler", None), "mark_trained")


def _mark_trained(loader: Any, config: TrainingConfig, batches: int) -> None:
    if config.mode == "train" and batches and _counts_training(loader):
        loader.batch_sampler.mark_trained(batches)


class _Feed(Iterator[Any]):
    """A loader's batches for an engine, counting what it takes and telling what is left."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._held: deque[Any] = deque()
        self.taken = 0
        self.ran_dry = False

    def __next__(self) -> Any:
        if not self.ahead(1):
            self.ran_dry = True
            raise StopIteration
        self.taken += 1
        return self._held.popleft()

    def ahead(self, count: int) -> int:
        """How many batches are left, up to ``count``."""
        self._held.extend(itertools.islice(self._batches, max(0, count - len(self._held))))
        return min(count, len(self._held))


def _engine_steps(engine: BatchEngine, loader: Iterable[Any] | None, config: TrainingConfig) -> Iterator[Result]:
    _check_engine_config(config, has_loader=loader is not None)
    if loader is None:
        for step in itertools.count():
            loss = check_finite(_as_float(engine.train_batch()), step)
            yield {"step": step, "epoch": 0, "batches": 0, "loss": loss}
    else:
        yield from _fed_steps(engine, loader, config)


def _fed_steps(engine: BatchEngine, loader: Iterable[Any], config: TrainingConfig) -> Iterator[Result]:
    step, needed = 0, 1
    for epoch, batches in enumerate(_epochs(loader, config)):
        feed = _Feed(batches)
        # Every step takes as many as the one before, so a step that could not be filled is never begun: in the midst
        # of one, other processes would be waiting for this one.
        while (left := feed.ahead(needed)) == needed:
            before = feed.taken
            try:
                outcome = _call_engine(engine, feed, config.mode)
            except (StopIteration, RuntimeError) as error:  # inside a generator the one becomes the other
                if feed.ran_dry:
                    raise ValueError(
                        f"the data_loader ended after {feed.taken - before} batches of a step of the engine; give more "
                        "data or a smaller global batch"
                    ) from error
                if isinstance(error, StopIteration):
                    raise ValueError("the engine stopped although the data_loader has more batches") from error
                raise
            taken = feed.taken - before
            if not taken and config.max_steps is None:
                raise ValueError("the engine takes nothing from the data_loader, so give max_steps to say when to end")
            needed = max(1, taken)
            result: Result = {"step": step, "epoch": epoch, "batches": taken}
            if config.mode == "predict":
                result["outputs"] = to_device(outcome, torch.device("cpu"))
            else:
                loss = _as_float(outcome)
                result["loss"] = check_finite(loss, step) if config.mode == "train" else loss
            _mark_trained(loader, config, taken)
            yield result
            step += 1
        if left:
            _LOGGER.info("epoch %d: the last %d batches fill no step of %d; left out", epoch, left, needed)


def _call_engine(engine: BatchEngine, feed: _Feed, mode: str) -> Any:
    if mode == "train":
        return engine.train_batch(feed)
    return engine.eval_batch(feed) if mode == "eval" else engine.predict_batch(feed)


def _check_engine_config(config: TrainingConfig, *, has_loader: bool) -> None:
    own = ["optimizer", "loss_fn", "device", "max_grad_norm"]
    given = [name for name in own if getattr(config, name) is not None]
    if config.gradient_accumulation_steps != 1:
        given.append("gradient_accumulation_steps")
    if given:
        raise ValueError(f"an engine has its own {', '.join(given)}; set them where the engine is made, not here")
    if not has_loader and (config.mode != "train" or config.max_steps is None):
        raise ValueError("without a data_loader an engine can only train on its own data, for a given max_steps")


def _as_float(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"the engine returned a loss of shape {tuple(loss.shape)}; a loss is a scalar")
    return float(loss)
