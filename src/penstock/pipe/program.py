"""A schedule made ready for one rank: its steps, and what they imply for channels and gradients."""

from collections import Counter
from dataclasses import dataclass

from penstock.pipe.schedule import COMPUTE_OPS, Action, Channel, Schedule, channel_of, place_communication


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
    """

    schedule: Schedule
    rank: int
    stages: tuple[int, ...]
    steps: tuple[tuple[Action, Channel | None], ...]
    messages: dict[Channel, int]
    last_backward: dict[int, Action]
    split: frozenset[tuple[int, int]]

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
            messages=dict(Counter(channel for _, channel in steps if channel is not None)),
            last_backward={action.stage: action for action, _ in steps if action.op in ("B", "W")},
            split=frozenset((action.stage, action.micro_batch) for action, _ in steps if action.op == "W"),
        )

    def forward_only(self, micro_batches: int) -> "Program":
        """The program that computes outputs of ``micro_batches`` micro-batches with the same placement of stages."""
        ranks = [
            [
                Action(stage, "F", micro_batch)
                for micro_batch in range(micro_batches)
                for stage in self.schedule.stages_of(rank)
            ]
            for rank in range(self.schedule.num_ranks)
        ]
        return Program.of(Schedule.from_ranks(ranks, "forward_only"), self.rank)
