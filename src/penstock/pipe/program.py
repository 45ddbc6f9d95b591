"""A schedule made ready for one rank: its steps, and what they imply for channels and gradients."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace

from penstock.pipe.schedule import COMPUTE_OPS, Action, Channel, Schedule, channel_of, forward_on, place_communication

Steps = tuple[tuple[Action, Channel | None], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What one pipeline rank does in a step.

    Attributes:
        schedule: Where it comes from.
        rank: The pipeline rank.
        stages: The stages it holds, in model order.
        steps: Computation, sends and receives, in order; a send or receive comes with its channel.
        messages: How many messages each of the rank's channels carries.
        last_backward: For each stage, the action after which the gradients of its weights are final.
        split: Stages and micro-batches whose backward pass is split.
        forwards_end: How many of the steps there are up to the last forward pass and the sending of its output.
    """

    schedule: Schedule
    rank: int
    stages: tuple[int, ...]
    steps: Steps
    messages: dict[Channel, int]
    last_backward: dict[int, Action]
    split: frozenset[tuple[int, int]]
    forwards_end: int

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "Program":
        """Prepare a schedule."""
        steps = tuple(
            (action, None if action.op in COMPUTE_OPS else channel_of(action, schedule.placement))
            for action in place_communication(schedule)[rank]
        )
        return cls(
            schedule=schedule,
            rank=rank,
            stages=schedule.stages_of(rank),
            steps=steps,
            messages=_messages(steps),
            last_backward={action.stage: action for action, _ in steps if action.op in ("B", "W")},
            split=frozenset((action.stage, action.micro_batch) for action, _ in steps if action.op == "W"),
            forwards_end=_forwards_end(steps),
        )

    def divided(self, head: Set[tuple[int, int]]) -> tuple["Program", "Program"]:
        """The program in two parts, one to be run after the other.

        Args:
            head: Stages and micro-batches whose forward passes are to be in the first part, on all ranks; see
                :func:`penstock.pipe.schedule.head_start`. What they send to a pass that is not among them is sent in
                the second part, so that on every channel what is sent in a part is received in it.
        """
        first: list[tuple[Action, Channel | None]] = []
        second: list[tuple[Action, Channel | None]] = []
        for action, channel in self.steps:
            stage = action.stage + 1 if action.op == "SEND_F" else action.stage
            early = action.op in ("F", "RECV_F", "SEND_F") and (stage, action.micro_batch) in head
            (first if early else second).append((action, channel))
        one, two = (
            replace(self, steps=steps, messages=_messages(steps), forwards_end=_forwards_end(steps))
            for steps in (tuple(first), tuple(second))
        )
        return one, two

    def forward_only(self, micro_batches: int) -> "Program":
        """The program that computes outputs of ``micro_batches`` micro-batches with the same placement of stages."""
        return Program.of(forward_on(self.schedule.placement, micro_batches), self.rank)


def _messages(steps: Steps) -> dict[Channel, int]:
    return dict(Counter(channel for _, channel in steps if channel is not None))


def _forwards_end(steps: Steps) -> int:
    return max((at for at, (action, _) in enumerate(steps, 1) if action.op in ("F", "SEND_F")), default=0)
