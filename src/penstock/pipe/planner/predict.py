"""Says what a step will take, and how much memory."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from penstock.pipe.planner.profile import Profile
from penstock.pipe.planner.stages import StageCosts
from penstock.pipe.schedule import Schedule, Timeline, simulate


@dataclass(frozen=True)
class Prediction:
    """One way to lay a model out, and what it comes to.

    Attributes:
        micro_batch_size: Rows.
        bounds: Of the stages.
        interval: Layers recomputed together; 0 forms no groups.
        timeline: Of one step's forward and backward passes, in seconds; it holds the schedule.
        seconds: A whole step: reading, the makespan, the longest update of a rank, and what every step takes besides.
        memory: For each rank, its peak in bytes.
        recomputed: Without groups, the layers that are recomputed, each by itself.
    """

    micro_batch_size: int
    bounds: tuple[int, ...]
    interval: int
    timeline: Timeline
    seconds: float
    memory: tuple[int, ...]
    recomputed: tuple[int, ...] = ()

    @property
    def schedule(self) -> Schedule:
        """What is computed where, in which order."""
        return self.timeline.schedule

    @property
    def chunks(self) -> int:
        """Stages per rank."""
        return self.schedule.num_stages // self.schedule.num_ranks

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time over the passes of a step."""
        return self.timeline.bubble_fraction


def predict(
    profile: Profile,
    schedule: Schedule,
    bounds: Sequence[int],
    interval: int = 0,
    recomputed: Collection[int] = (),
) -> Prediction:
    """Simulate a step of a schedule with the costs of a profile.

    Args:
        profile: Of the model.
        schedule: With as many stages as the bounds have.
        bounds: Stage ``s`` holds layers ``bounds[s]`` to ``bounds[s + 1] - 1``.
        interval: Layers recomputed together in the backward pass; 0 forms no groups.
        recomputed: Without groups, the layers that are recomputed, each by itself.
    """
    stages = StageCosts.of(profile, bounds, interval, recomputed)
    simulated = simulate(schedule, stages.costs)
    updates = [sum(stages.updates[s] for s in schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    reading = profile.reading * schedule.micro_batches
    return Prediction(
        micro_batch_size=profile.micro_batch_size,
        bounds=tuple(bounds),
        interval=interval,
        timeline=Timeline(schedule, simulated.starts, simulated.ends, "s"),
        seconds=reading + simulated.makespan + max(updates) + profile.step,
        memory=stages.memory(schedule),
        recomputed=tuple(sorted(recomputed)),
    )
