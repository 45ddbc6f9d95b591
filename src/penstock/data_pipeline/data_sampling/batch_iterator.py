"""One iteration over a sampler's batches, which can be stopped and taken up again."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self


class BatchSource(Protocol):
    """What :class:`BatchIterator` draws from; a :class:`DataSampler` is one."""

    def batch_at(self, k: int) -> list[int] | None:
        """The batch that starts at position ``k``; None at the end."""

    def next_position(self, k: int) -> int:
        """Where the batch after the one at ``k`` starts."""

    def set_consumed(self, consumed: int) -> None:
        """Go on from a position."""


class BatchIterator(Iterator[list[int]]):
    """Batches from a position on.

    Args:
        source: Where they come from.
        k: The position of the first one.
    """

    def __init__(self, source: BatchSource, k: int) -> None:
        self._source, self._k = source, k

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[int]:
        batch = self._source.batch_at(self._k)
        if batch is None:
            raise StopIteration
        self._k = self._source.next_position(self._k)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out so far."""
        return {"position": self._k}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that :meth:`state_dict` counted; the sampler counts them as trained on.

        Raises:
            ValueError: There is no such position.
        """
        position = state.get("position")
        if not isinstance(position, int):
            raise ValueError(f"not the state of an iteration over batches: {dict(state)}")
        self._source.set_consumed(position)
        self._k = position
