"""What was not sent this time is sent later: one memory for every algorithm.

Stich and Karimireddy, "The error-feedback framework: better rates for SGD with delayed gradients and compressed
updates", JMLR 2020. With ``y = x + memory``, a compressor sends ``C(y)`` and the memory becomes ``y - C(y)``; so the
sum of everything sent, plus the memory, is the sum of everything that came in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload
from penstock.compression.algorithms.powersgd import PowerSGD


@dataclass(frozen=True)
class FeedbackRule:
    """How errors are carried over.

    Attributes:
        kind: ``"classic"``, as above; or ``"ef21"`` of Richtarik, Sokolov, Fatkhullin, "EF21: a new, simpler,
            theoretically better, and practically faster error feedback", NeurIPS 2021: both ends keep an estimate of
            the tensor, and what is compressed and added to it is the difference from it.
        decay: The memory becomes ``decay * memory + (1 - decay) * (y - C(y))``, in [0, 1): a moving average of errors,
            as in Xie, Lin, Toh, Zhou, "LoCo: low-bit communication adaptor for large-scale model training", 2024
            (arXiv:2407.04480). 0 is exact.
        reset_every: Empty the memory every so many steps, as LoCo does; 0 for never.
    """

    kind: Literal["classic", "ef21"] = "classic"
    decay: float = 0.0
    reset_every: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("classic", "ef21"):
            raise ValueError(f"unknown error feedback {self.kind!r}; known: 'classic', 'ef21'")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.reset_every < 0:
            raise ValueError(f"reset_every must not be negative (0: never), got {self.reset_every}")
        if self.kind == "ef21" and (self.decay or self.reset_every):
            raise ValueError(
                "decay and reset_every belong to classic error feedback: EF21 keeps an estimate that both ends share, "
                "which must neither fade nor be emptied; leave them out, or take kind='classic'"
            )

    def resets_at(self, step: int) -> bool:
        """Whether the memory is emptied before this step (from 0)."""
        return self.reset_every > 0 and step > 0 and step % self.reset_every == 0

    def check(self, algorithm: CompressionAlgorithm) -> None:
        """Raise ``ValueError`` if errors of this algorithm cannot be carried over so."""
        algorithm.check_feedback()
        if self.kind == "ef21" and isinstance(algorithm, PowerSGD):
            raise ValueError(
                "powersgd starts each step from the last one's factors, which EF21's differences would mislead; "
                "take classic error feedback"
            )

    def check_sum(self, algorithm: CompressionAlgorithm) -> None:
        """Raise ``ValueError`` if errors of a sum over ranks by this algorithm cannot be carried over so."""
        if algorithm.lossless:
            return
        self.check(algorithm)
        halves = algorithm.linear and any(field.dtype.itemsize < 4 for field in algorithm.payload_layout(1))
        if self.kind == "ef21" and halves:
            raise ValueError(
                f"EF21 adds up what was sent, and the all-reduce of {algorithm.name} rounds the sum once more, so the "
                "estimate would drift away from what the ranks have sent; take classic error feedback, or int8"
            )


CLASSIC = FeedbackRule()


def compress_with_feedback(
    algorithm: CompressionAlgorithm, tensor: Tensor, memory: Tensor, rule: FeedbackRule = CLASSIC
) -> Payload:
    """Compress ``tensor`` with what is in ``memory``; the classic kind updates the memory.

    EF21's estimate is only read: its owner adds the decompressed payload when it is known that all ends will.

    Args:
        algorithm: Any algorithm.
        tensor: Floating, any shape; only read.
        memory: Contiguous, with as many elements, float32 or float64.
        rule: See :class:`FeedbackRule`.
    """
    if rule.kind == "ef21":
        return algorithm.compress(tensor - memory.view(tensor.shape))
    if not rule.decay:
        return algorithm.compress_with_memory(tensor, memory)
    before = memory.clone()
    payload = algorithm.compress_with_memory(tensor, memory)
    memory.lerp_(before, rule.decay)
    return payload


class ErrorFeedback:
    """An algorithm with the memory of one tensor: the sender's end, and what the receiver sees.

    A NaN or infinity never enters the memory: it is sent (so the receiver sees it), and the memory of the elements
    that it spoilt stays as it was.

    Args:
        algorithm: Any algorithm.
        memory: Flat float32 or float64 tensor, used in place; zeros to begin with.
        rule: How errors are carried over.

    Attributes:
        memory: What is owed to the receiver; with EF21, the estimate that both ends have.
    """

    def __init__(self, algorithm: CompressionAlgorithm, memory: Tensor, rule: FeedbackRule = CLASSIC) -> None:
        algorithm.check_feedback()
        self.algorithm = algorithm
        self.memory = memory
        self.rule = rule

    @classmethod
    def for_tensor(
        cls, algorithm: CompressionAlgorithm, tensor: Tensor, rule: FeedbackRule = CLASSIC
    ) -> "ErrorFeedback":
        """With an empty memory that fits ``tensor``."""
        memory = torch.zeros(tensor.numel(), dtype=memory_dtype(tensor.dtype), device=tensor.device)
        return cls(algorithm, memory, rule)

    def compress(self, tensor: Tensor) -> Payload:
        """Compress ``tensor`` with the memory, and keep in the memory what is not sent; ``tensor`` is only read.

        With EF21 the payload belongs to the estimate as it was: :meth:`receive` brings it up to date.
        """
        return compress_with_feedback(self.algorithm, tensor.detach(), self.memory, self.rule)

    def receive(self, payload: Payload, out: Tensor) -> Tensor:
        """Fill ``out`` with what a receiver sees, which with EF21 is the new estimate; a non-finite one is not kept."""
        self.algorithm.decompress(payload, out)
        if self.rule.kind == "ef21":
            out.add_(self.memory.view(out.shape))
            if is_finite(payload):
                self.memory.copy_(out.view(-1))
        return out


def is_finite(payload: Payload) -> bool:
    """Whether a payload holds neither NaN nor infinity in its floating fields; waits for a GPU."""
    return are_finite([payload])


def are_finite(payloads: Iterable[Payload]) -> bool:
    """Whether no payload holds a NaN or infinity; waits for a GPU once, however many they are."""
    fields = [field for payload in payloads for field in payload.values() if field.is_floating_point()]
    if not fields:
        return True
    sums = torch.stack([field.sum(dtype=_wide(field)).double() for field in fields])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(field).all()) for field in fields)


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; waits for a GPU."""
    # A sum is cheaper, and decides unless it overflows itself.
    return bool(torch.isfinite(tensor.sum(dtype=_wide(tensor)))) or bool(torch.isfinite(tensor).all())


def _wide(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the error memory for a tensor: float32, or float64 where the tensor has it."""
    return torch.float64 if dtype == torch.float64 else torch.float32
