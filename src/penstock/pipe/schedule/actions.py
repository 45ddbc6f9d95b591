"""The compute actions of one rank, in order, stored as arrays."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar, overload

import numpy as np
import numpy.typing as npt

from penstock.pipe.schedule.action import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action

OP_NAMES: Final = (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
"""The compute op of each code in :attr:`Actions.ops`."""
F_CODE, B_CODE, I_CODE, W_CODE = range(4)
_CODE_OF: Final = {name: code for code, name in enumerate(OP_NAMES)}

_Number = TypeVar("_Number", bound=np.generic)


class Actions(Sequence[Action]):
    """An immutable sequence of compute actions.

    It behaves as a tuple of :class:`Action`, and compares equal to one. Passes over large schedules read the arrays
    instead, which take 9 bytes an action.

    Attributes:
        stages: ``int32``, the stage of each action.
        ops: ``uint8``, the index of its op in :data:`OP_NAMES`.
        units: ``int32``, its micro-batch (with sequence slices: micro-batch times slices plus slice).
    """

    __slots__ = ("ops", "stages", "units")

    stages: npt.NDArray[np.int32]
    ops: npt.NDArray[np.uint8]
    units: npt.NDArray[np.int32]

    def __init__(self, stages: npt.ArrayLike, ops: npt.ArrayLike, units: npt.ArrayLike) -> None:
        length = np.size(ops)
        self.stages = _frozen(np.asarray(stages, dtype=np.int32), length)
        self.ops = _frozen(np.asarray(ops, dtype=np.uint8), length)
        self.units = _frozen(np.asarray(units, dtype=np.int32), length)

    @classmethod
    def of(cls, actions: Iterable[Action]) -> "Actions":
        """The same actions as arrays.

        Raises:
            KeyError: An action is a send or a receive.
        """
        if isinstance(actions, Actions):
            return actions
        listed = list(actions)
        return cls([a.stage for a in listed], [_CODE_OF[a.op] for a in listed], [a.micro_batch for a in listed])

    def __len__(self) -> int:
        return len(self.ops)

    @overload
    def __getitem__(self, at: int) -> Action: ...
    @overload
    def __getitem__(self, at: slice) -> "Actions": ...
    def __getitem__(self, at: int | slice) -> "Action | Actions":
        if isinstance(at, slice):
            return Actions(self.stages[at], self.ops[at], self.units[at])
        return Action(int(self.stages[at]), OP_NAMES[self.ops[at]], int(self.units[at]))

    def __iter__(self) -> Iterator[Action]:
        names = (OP_NAMES[code] for code in self.ops.tolist())
        return map(Action, self.stages.tolist(), names, self.units.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Actions):
            return (
                np.array_equal(self.stages, other.stages)
                and np.array_equal(self.ops, other.ops)
                and np.array_equal(self.units, other.units)
            )
        if isinstance(other, tuple):
            return tuple(self) == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        shown = ",".join(map(str, self[:8]))
        return f"Actions({shown}{',...' if len(self) > 8 else ''}: {len(self)})"


def _frozen(values: npt.NDArray[_Number], length: int) -> npt.NDArray[_Number]:
    array = np.ascontiguousarray(np.broadcast_to(values, (length,)))
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array
