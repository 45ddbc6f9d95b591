"""One action of a schedule, and its text form."""

import re
from typing import Final, NamedTuple

FORWARD: Final = "F"
"""The stage's forward pass of one micro-batch."""
BACKWARD: Final = "B"
"""The whole backward pass: gradients of the inputs and of the weights."""
INPUT_GRADIENT: Final = "I"
"""First half of a split backward pass: the gradient of the stage's inputs, which the stage before waits for."""
WEIGHT_GRADIENT: Final = "W"
"""Second half of a split backward pass: the gradient of the weights, which nobody waits for."""
SEND_FORWARD: Final = "SEND_F"
"""Send the stage's output to the next stage."""
RECEIVE_FORWARD: Final = "RECV_F"
"""Receive the stage's input from the stage before."""
SEND_BACKWARD: Final = "SEND_B"
"""Send the gradient of the stage's inputs to the stage before."""
RECEIVE_BACKWARD: Final = "RECV_B"
"""Receive the gradient of the stage's output from the next stage."""

COMPUTE_OPS: Final = frozenset({FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT})
COMMUNICATION_OPS: Final = frozenset({SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD, RECEIVE_BACKWARD})

_PATTERN: Final = re.compile(r"([0-9]+)(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]+)")


class Action(NamedTuple):
    """What a pipeline rank does next: an op of one stage on one micro-batch.

    The text form is PyTorch's: ``str(Action(0, "F", 3)) == "0F3"``, ``"1SEND_B2"`` for communication.
    """

    stage: int
    op: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read the text form.

        Raises:
            ValueError: ``text`` is not of the form stage, op, micro-batch.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a schedule action: write stage, op and micro-batch, such as 0F3, 1B0 or 2SEND_F1 "
                f"(ops: {', '.join(sorted(COMPUTE_OPS | COMMUNICATION_OPS))})"
            )
        return cls(int(match[1]), match[2], int(match[3]))
