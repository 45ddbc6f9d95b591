"""A schedule made ready for one rank: its steps, and what they imply for channels and gradients."""

from collections import Counter
from dataclasses import dataclass

from penstock.pipe.schedule import Action, Channel, Schedule, channel_of, place_communication

_RUNNABLE = frozenset({"F", "B"})


@dataclass(frozen=True, slots=True)
class Program:
    """What one pipeline rank does in a step.

    Attributes:
        schedule: Where it comes from.
        rank: The pipeline rank.
        stages: The stages it holds, in model order.
        steps: Computation, sends and receives, in order; a send or receive comes with its channel.
        messages: How many messages each of the rank's channels carries.
        last_backward: For each stage, the micro-batch whose backward pass comes last.
    """

    schedule: Schedule
    rank: int
    stages: tuple[int, ...]
    steps: tuple[tuple[Action, Channel | None], ...]
    messages: dict[Channel, int]
    last_backward: dict[int, int]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "Program":
        """Prepare a schedule.

        Raises:
            ValueError: The schedule has an op that the engine does not run.
        """
        for action in schedule.ranks[rank]:
            if action.op not in _RUNNABLE:
                raise ValueError(
                    f"schedule {schedule.name!r}, rank {rank}, action {action}: the engine runs whole backward passes "
                    "(B); choose a schedule without split ones, such as '1f1b'"
                )
        steps = tuple(
            (action, None if action.op in _RUNNABLE else channel_of(action, schedule.placement))
            for action in place_communication(schedule)[rank]
        )
        return cls(
            schedule=schedule,
            rank=rank,
            stages=schedule.stages_of(rank),
            steps=steps,
            messages=dict(Counter(channel for _, channel in steps if channel is not None)),
            last_backward={action.stage: action.micro_batch for action, _ in steps if action.op == "B"},
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
