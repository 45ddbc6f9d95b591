"""What a training loop holds: an algorithm, its error memories and what it has cost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.config import CompressionConfig
from penstock.compression.error_feedback import CLASSIC, ErrorFeedback, FeedbackRule, all_finite

_UNCOMPRESSED: Final = "uncompressed"


@dataclass
class CompressionStatistics:
    """Totals since the start.

    Attributes:
        calls: How many tensors were compressed.
        bytes_in: Bytes of the tensors.
        bytes_out: Bytes of their payloads on the wire.
        error_energy: Sum of squares of ``tensor - decompressed``, over the calls that decompressed.
        energy: Sum of squares of the tensors of the same calls.
    """

    calls: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    error_energy: float = 0.0
    energy: float = 0.0

    @property
    def ratio(self) -> float:
        """Bytes in over bytes out; 1 before the first call."""
        return self.bytes_in / self.bytes_out if self.bytes_out else 1.0

    @property
    def relative_error(self) -> float:
        """Root of the error's energy over the tensors' energy; 0 before the first round trip."""
        return math.sqrt(self.error_energy / self.energy) if self.energy else 0.0


class CompressionModule:
    """An algorithm with an error memory per named tensor, statistics and a state dict.

    Calling it gives the tensor that a receiver would see::

        module = get_compression_module("onebit")
        for name, parameter in model.named_parameters():
            parameter.grad = module(parameter.grad, name)

    Args:
        algorithm: Any algorithm.
        error_feedback: Carry what was not sent over to the next tensor of the same name; a :class:`FeedbackRule` says
            how.
        warmup_steps: Tensors of each name that pass uncompressed first.
    """

    def __init__(
        self, algorithm: CompressionAlgorithm, *, error_feedback: bool | FeedbackRule = True, warmup_steps: int = 0
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.algorithm = algorithm
        self.error_feedback = bool(error_feedback) and not algorithm.lossless
        self.warmup_steps = warmup_steps
        self.statistics = CompressionStatistics()
        self._rule = error_feedback if isinstance(error_feedback, FeedbackRule) else CLASSIC
        self._memories: dict[str, ErrorFeedback] = {}
        self._starts: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        if self.error_feedback:
            self._rule.check(algorithm)

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Compress and decompress: a new tensor of the same shape and dtype, as a receiver would see it."""
        tensor = tensor.detach()
        seen = self.decompress(
            self.compress(tensor, name), torch.empty_like(tensor, memory_format=torch.contiguous_format), name
        )
        self.statistics.error_energy += float((tensor - seen).double().square().sum())
        self.statistics.energy += float(tensor.double().square().sum())
        return seen

    def compress(self, tensor: Tensor, name: str = "") -> Payload:
        """Compress a tensor; ``name`` says whose error memory to use.

        Raises:
            ValueError: The tensor is not floating, or differs in size from the last one of the same name.
        """
        if not tensor.is_floating_point():
            raise ValueError(f"only floating tensors are compressed, got {tensor.dtype}")
        tensor = tensor.detach()
        call = self._calls.get(name, 0)
        memory = self._memory_for(name, tensor)
        self._calls[name] = call + 1
        self.statistics.calls += 1
        self.statistics.bytes_in += tensor.numel() * tensor.element_size()
        if call < self.warmup_steps:
            self.statistics.bytes_out += tensor.numel() * tensor.element_size()
            return {_UNCOMPRESSED: tensor.clone(memory_format=torch.contiguous_format)}
        self.statistics.bytes_out += self.algorithm.bytes_for(tensor.shape)
        algorithm = self.algorithm.keyed(name, call)
        if memory is not None:
            if memory.rule.resets_at(call):
                memory.memory.zero_()
            memory.algorithm = algorithm
        if isinstance(algorithm, PowerSGD):
            return self._compress_from_last(algorithm, tensor, name, memory)
        if memory is not None:
            return memory.compress(tensor)
        # What needs no rounding may lie where the caller's tensor does, who is free to change it before it is sent.
        mine = tensor.untyped_storage().data_ptr()
        payload = algorithm.compress(tensor)
        return {
            field: part.clone() if part.untyped_storage().data_ptr() == mine else part
            for field, part in payload.items()
        }

    def decompress(self, payload: Payload, out: Tensor, name: str = "") -> Tensor:
        """Fill the contiguous tensor ``out`` from a payload and return it; with EF21 the name says whose estimate."""
        if _UNCOMPRESSED in payload:
            return out.copy_(payload[_UNCOMPRESSED])
        memory = self._memories.get(name)
        if memory is not None and memory.rule.kind == "ef21":
            return memory.receive(payload, out)
        return self.algorithm.decompress(payload, out)

    def _memory_for(self, name: str, tensor: Tensor) -> ErrorFeedback | None:
        if not self.error_feedback:
            return None
        memory = self._memories.get(name)
        if memory is None:
            memory = self._memories[name] = ErrorFeedback.for_tensor(self.algorithm, tensor, self._rule)
        memory.memory = memory.memory.to(tensor.device)  # a loaded one lies where it was read to
        if memory.memory.numel() != tensor.numel():
            raise ValueError(
                f"the error memory named {name!r} holds {memory.memory.numel()} elements, but the tensor has "
                f"{tensor.numel()}; give each tensor a name of its own"
            )
        return memory

    def _compress_from_last(
        self, algorithm: PowerSGD, tensor: Tensor, name: str, memory: ErrorFeedback | None
    ) -> Payload:
        """A power iteration from where the last one of this name ended."""
        if name not in self._starts:
            first = algorithm.start(tensor.shape, tensor.device)
            if first is not None:
                self._starts[name] = first
        start, factors = self._starts.get(name), algorithm.factors(tensor.shape)
        if (None if start is None else tuple(start.shape)) != (None if factors is None else factors[1:]):
            raise ValueError(
                f"the tensor named {name!r} was of another shape before, now it is of {tuple(tensor.shape)}; give each "
                "tensor a name of its own"
            )
        if start is not None:
            start = self._starts[name] = start.to(tensor.device)
        if memory is None:
            return algorithm.compress_from(tensor, start)
        total = tensor + memory.memory.view(tensor.shape)
        payload = algorithm.compress_from(total, start)
        left = total - algorithm.decompress(payload, torch.empty_like(total))
        if all_finite(left):
            memory.memory.lerp_(left.view(-1), 1.0 - memory.rule.decay)
        return payload

    def state_dict(self) -> dict[str, Any]:
        """The error memories and PowerSGD's starts (tensors, by name), the calls by name and the statistics."""
        return {
            "memories": {name: feedback.memory for name, feedback in self._memories.items()},
            "starts": dict(self._starts),
            "calls": dict(self._calls),
            "statistics": asdict(self.statistics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; existing memories are written in place, others are forgotten."""
        saved: Mapping[str, Tensor] = state["memories"]
        for name, memory in saved.items():
            mine = self._memories.get(name)
            if mine is not None and mine.memory.shape != memory.shape:
                raise ValueError(
                    f"the saved error memory {name!r} has {memory.numel()} elements, this one "
                    f"{mine.memory.numel()}: it belongs to another model"
                )
        for name in self._memories.keys() - saved.keys():
            del self._memories[name]
        for name, memory in saved.items():
            if name in self._memories:
                self._memories[name].memory.copy_(memory)
            else:
                self._memories[name] = ErrorFeedback(self.algorithm, memory.clone(), self._rule)
        self._starts = {name: start.clone() for name, start in state["starts"].items()}
        self._calls = dict(state["calls"])
        self.statistics = CompressionStatistics(**state["statistics"])


def initialize_module(config: CompressionConfig | Mapping[str, Any] | str) -> CompressionModule:
    """Make a :class:`CompressionModule` from a configuration, a mapping with its keys, or an algorithm's name.

    Raises:
        ValueError: A key, the algorithm or an option is unknown, or a value is out of range.
    """
    if isinstance(config, str):
        config = CompressionConfig(algorithm=config)
    elif not isinstance(config, CompressionConfig):
        config = CompressionConfig.model_validate(dict(config))
    feedback = config.feedback()
    return CompressionModule(
        config.create(), error_feedback=False if feedback is None else feedback, warmup_steps=config.warmup_steps
    )
