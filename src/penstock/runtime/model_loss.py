"""The difficulty metric "loss under a model": a Penstock checkpoint or a Hugging Face model, over many samples."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock._core.files import MANIFEST_NAME, sha256_of
from penstock.data_pipeline.datasets.tokenize import load_tokenizer
from penstock.models.gpt import gpt_model
from penstock.runtime.checkpoint import Checkpoint, copy_into
from penstock.runtime.config import load_config
from penstock.runtime.engine_state import find
from penstock.runtime.initialize import PARAMETER_DTYPES
from penstock.runtime.run_directory import CHECKPOINTS_NAME

_Logits = Callable[[Tensor], Tensor]
_BATCH_TOKENS: Final = 1 << 13
_LOGITS: Final = 1 << 28  # 1 GiB of them in float32


class ModelLoss:
    """Mean loss of a causal language model over each sample's tokens but the first, in nats; a metric function.

    Samples longer than the model's context, or than 8,192 tokens, are read in windows that overlap in one token, so
    that every token but the first is predicted once. The weights have the type that the checkpoint holds: a run of
    bf16 or fp16, which computes in these, is measured in float32. The model is loaded at the first call; a copy for
    another process carries its path alone.

    Args:
        path: A run's directory, one of its checkpoints, or a directory of a Hugging Face model.
        device: Where the model runs.

    Raises:
        ValueError: There is no model at the path.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self._lock = threading.Lock()
        self._loaded: tuple[_Logits, int, int] | None = None
        self._is_penstock = (self.path / CHECKPOINTS_NAME).is_dir() or (self.path / MANIFEST_NAME).is_file()
        if self._is_penstock:  # the newest checkpoint of now, also if the run goes on and writes others
            self.path = find(self.path if (self.path / MANIFEST_NAME).is_file() else self.path / CHECKPOINTS_NAME).path
        elif not (self.path / "config.json").is_file():
            raise ValueError(
                f"{path}: no model there; name a run's directory, a checkpoint, or a directory of a Hugging Face model "
                "(config.json beside its weights)"
            )

    @property
    def identity(self) -> str:
        """What tells the model from others: of a checkpoint its checksums, of a directory its files and their times."""
        if self._is_penstock:
            return sha256_of(self.path / MANIFEST_NAME)
        files = sorted(file for file in self.path.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
        return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelLoss, (self.path, str(self.device))

    def __call__(self, tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The loss of every sample, float64; 0 for a sample of fewer than two tokens.

        Raises:
            ValueError: A token lies beyond the model's vocabulary.
        """
        logits, context, vocab_size = self._model()
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"{self.path}: token numbers run from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
                f"{vocab_size}; tokenize with the model's own tokenizer"
            )
        sums = np.zeros(len(offsets) - 1)
        at_once = max(1, _LOGITS // vocab_size)
        for owners, inputs_BS, labels_BS in _batches(
            tokens, offsets, min(context, _BATCH_TOKENS), min(at_once, _BATCH_TOKENS)
        ):
            with torch.inference_mode():
                found_NV = logits(inputs_BS.to(self.device)).flatten(0, 1)
                labels_N = labels_BS.to(self.device).flatten()
                # The loss takes float32 copies of its logits: of some rows at a time.
                parts = zip(found_NV.split(at_once), labels_N.split(at_once), strict=True)
                losses = torch.cat(
                    [F.cross_entropy(x.float(), y, ignore_index=_IGNORED, reduction="none") for x, y in parts]
                )
            np.add.at(sums, owners, losses.view_as(labels_BS).double().sum(1).cpu().numpy())
        sums /= np.maximum(np.diff(offsets) - 1, 1)
        return sums

    def _model(self) -> tuple[_Logits, int, int]:
        with self._lock:
            if self._loaded is None:
                self._loaded = _penstock(self.path, self.device) if self._is_penstock else _hugging_face(self)
            return self._loaded


_IGNORED: Final = -100


def _penstock(path: Path, device: torch.device) -> tuple[_Logits, int, int]:
    checkpoint = Checkpoint(path)
    config = load_config(checkpoint.read_state()["config"])
    if config.model is None:
        raise ValueError(
            f"{checkpoint.path}: written by a run of a model object, of which the configuration says nothing; give "
            "DataAnalyzer a metric function that calls your model"
        )
    tokenizer = config.data.tokenizer
    shape = config.model.gpt_config(
        vocab_size=None if tokenizer is None else load_tokenizer(tokenizer).get_vocab_size(),
        context=config.sequence_length,
    )
    model = gpt_model(shape).to(dtype=PARAMETER_DTYPES[config.precision]).eval()
    for index, layer in enumerate(model.layers):
        tensors = checkpoint.read_layer(index)
        for name, parameter in layer.named_parameters():
            key = f"weight:layer_{index:03d}.{name}"
            if key not in tensors:
                raise ValueError(f"{checkpoint.path}: holds no {key!r}; it was written by another model")
            copy_into(parameter, tensors[key], f"{checkpoint.path}: {name}")
    return model.to(device), shape.context_length, shape.vocab_size


def _hugging_face(of: ModelLoss) -> tuple[_Logits, int, int]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(f"{of.path}: a Hugging Face model needs transformers: pip install 'penstock[hf]'") from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(of.path, local_files_only=True)
    except (OSError, KeyError) as error:
        raise ValueError(f"{of.path}: not a causal language model that transformers can load ({error})") from None
    model.to(of.device).eval()
    context = int(getattr(model.config, "max_position_embeddings", None) or 1024)
    return lambda input_ids_BS: model(input_ids=input_ids_BS).logits, context, int(model.config.vocab_size)


def _batches(
    tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64], context: int, batch_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor]]:
    """Windows of at most ``context + 1`` tokens, of like length together: their samples, inputs and labels.

    Several windows together have at most ``batch_tokens`` tokens. Rows are filled up at the end, where causal attention
    does not look and labels do not count.
    """
    windows = [
        (owner, at, min(at + context + 1, end))
        for owner, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        for at in range(start, end - 1, context)
    ]
    windows.sort(key=lambda window: window[2] - window[1])
    first = 0
    while first < len(windows):
        stop = first + 1
        while stop < len(windows) and (stop + 1 - first) * (windows[stop][2] - windows[stop][1]) <= batch_tokens:
            stop += 1
        part = windows[first:stop]
        width = part[-1][2] - part[-1][1] - 1
        inputs_BS = torch.zeros((len(part), width), dtype=torch.int64)
        labels_BS = torch.full((len(part), width), _IGNORED, dtype=torch.int64)
        for row, (_, start, end) in enumerate(part):
            window = torch.from_numpy(tokens[start:end].astype(np.int64))
            inputs_BS[row, : len(window) - 1] = window[:-1]
            labels_BS[row, : len(window) - 1] = window[1:]
        yield np.array([owner for owner, _, _ in part]), inputs_BS, labels_BS
        first = stop
