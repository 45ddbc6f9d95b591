"""Sequence-length warm-up: batches cut to the length of their step, by leaving tokens out or by cutting rows in parts.

Li, Zhang, He, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models" (NeurIPS
2022).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.data_pipeline.data_sampling.births import birth_steps
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.runtime.batching_section import SequenceLengthSection


@dataclass(frozen=True)
class SequenceLengths:
    """The lengths of a run's sequences.

    Attributes:
        scheduler: Tokens of a sequence by step.
        reshape: Whether rows are cut into several instead of cut off.
        full: Tokens of the data's sequences.
    """

    scheduler: CurriculumScheduler
    reshape: bool
    full: int

    @classmethod
    def of(cls, section: SequenceLengthSection, full: int | None) -> "SequenceLengths":
        """The lengths that a configuration describes.

        Raises:
            ValueError: The data's length is unknown, is exceeded, or cannot be cut into parts of a length.
        """
        if full is None:
            raise ValueError("batching.sequence_length shortens sequences of a known length; set data.sequence_length")
        scheduler = section.scheduler()
        if scheduler.max_difficulty > full:
            raise ValueError(
                f"batching.sequence_length ends at {scheduler.max_difficulty} tokens, but the data's sequences have "
                f"{full}; lower it or raise data.sequence_length"
            )
        if section.mode == "reshape":
            lengths = [int(scheduler.get_difficulty(step)) for step in birth_steps([scheduler], full + 1)]
            uneven = [length for length in lengths if full % length]
            if uneven:
                raise ValueError(
                    f"batching.sequence_length: rows of {full} tokens cannot be cut into equal parts of {uneven[0]}; "
                    "give a fixed_discrete schedule of divisors, or take mode: truncate"
                )
        return cls(scheduler, section.mode == "reshape", full)

    def at(self, step: int) -> int:
        """Tokens of a sequence at a step."""
        return int(self.scheduler.get_difficulty(step))

    def rows(self, rows: int, step: int) -> int:
        """How many rows a step makes of so many samples."""
        return rows * (self.full // self.at(step)) if self.reshape else rows

    def shaped(self, value: Any, step: int) -> Any:
        """A batch's tensors of full sequences, ``[B, S, ...]``, at the length of a step; others as they are."""
        length = self.at(step)
        if length == self.full:
            return value

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[1] != self.full:
                return leaf
            if self.reshape:
                return leaf.reshape(-1, length, *leaf.shape[2:])
            return leaf[:, :length].contiguous()

        return pytree.tree_map(one, value)
