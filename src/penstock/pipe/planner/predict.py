"""Says what a step will take, and how much memory."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from penstock.pipe.planner.profile import Profile
from penstock.pipe.planner.stages import StageCosts
from penstock.pipe.schedule import Problem, Schedule, Timeline, simulate
from penstock.pipe.schedule.actions import W_CODE


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
    return Prediction(
        micro_batch_size=profile.micro_batch_size,
        bounds=tuple(bounds),
        interval=interval,
        timeline=Timeline(schedule, simulated.starts, simulated.ends, "s"),
        seconds=simulated.makespan + _beside(profile, schedule, stages),
        memory=stages.memory(schedule),
        recomputed=tuple(sorted(recomputed)),
    )


def least_seconds(
    profile: Profile,
    schedule: Schedule,
    bounds: Sequence[int],
    interval: int = 0,
    recomputed: Collection[int] = (),
) -> float:
    """What :func:`predict`'s seconds are at least, without a simulation; the arguments are the same."""
    stages = StageCosts.of(profile, bounds, interval, recomputed)
    split = any(bool((actions.ops == W_CODE).any()) for actions in schedule.ranks)
    problem = Problem(schedule.placement, schedule.micro_batches, stages.costs, split=split)
    return problem.bound() + _beside(profile, schedule, stages)


def _beside(profile: Profile, schedule: Schedule, stages: StageCosts) -> float:
    """Seconds of a step besides its passes."""
    updates = [sum(stages.updates[s] for s in schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    return profile.reading * schedule.micro_batches + max(updates) + profile.step
