"""Chooses partition, placement, schedule, micro-batch size and activation checkpointing."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from penstock.pipe.partition import balance
from penstock.pipe.planner.bounds import Bounds, best_bounds
from penstock.pipe.planner.predict import Prediction, least_seconds, predict
from penstock.pipe.planner.profile import Profile
from penstock.pipe.planner.selective import select_recomputed
from penstock.pipe.planner.stages import StageCosts
from penstock.pipe.schedule import SCHEDULES, Problem, Schedule, get_schedule, search

TRAINABLE: Final = tuple(name for name, known in SCHEDULES.items() if known.trains and not known.sliced)
"""Schedules that a run takes."""
WHOLE: Final = tuple(name for name in TRAINABLE if not SCHEDULES[name].split)
"""Those of them whose backward passes are whole."""
_CHUNKS: Final = (2, 3, 4)
_REFINED: Final = 16
_ALONE: Final = "1f1b"


@dataclass(frozen=True)
class Plan:
    """What was considered.

    Attributes:
        predictions: Those that fit in the memory, fastest first; of equally fast ones, first the one that needs less.
        too_large: How many do not fit.
        memory: The limit, in bytes per rank; None is no limit.
    """

    predictions: tuple[Prediction, ...]
    too_large: int
    memory: int | None

    @property
    def best(self) -> Prediction:
        """The choice."""
        return self.predictions[0]


def plan(
    profiles: Sequence[Profile],
    *,
    ranks: int,
    samples: int,
    memory: int | None = None,
    schedules: Iterable[str] = TRAINABLE,
    intervals: Iterable[int] = (0, 1),
    search_effort_s: float = 0.0,
) -> Plan:
    """Predict every combination, and rank them.

    Args:
        profiles: Of one model, for each size of micro-batch that may be chosen.
        ranks: Pipeline ranks.
        samples: Of each pipeline in a step. Sizes of micro-batches that do not divide it are left out.
        memory: What each rank may take, in bytes; None is no limit.
        schedules: Names of built-in schedules.
        intervals: Of activation checkpointing; 0 is none, 1 recomputes every layer. Where memory is short, some
            layers alone are recomputed, too (:func:`~penstock.pipe.planner.select_recomputed`).
        search_effort_s: Seconds to search for a schedule of one's own for the best bounds; 0 does not.

    Raises:
        ValueError: More ranks than layers, no size that divides the samples, nothing that fits in the memory, or a
            negative effort.
    """
    if search_effort_s < 0:
        raise ValueError(f"search_effort_s must be 0, which does not search, or more; got {search_effort_s}")
    layers = len(profiles[0].layers)
    if not 1 <= ranks <= layers:
        raise ValueError(f"{ranks} pipeline ranks cannot share {layers} layers; take 1 to {layers}")
    usable = [profile for profile in profiles if samples % profile.micro_batch_size == 0]
    if not usable:
        sizes = ", ".join(str(profile.micro_batch_size) for profile in profiles)
        raise ValueError(f"{samples} samples per pipeline and step cannot be divided into micro-batches of {sizes}")
    names = tuple(schedules)
    drafts = []
    for profile in usable:
        for schedule in _schedules(names, ranks, samples // profile.micro_batch_size, layers):
            for interval in intervals:
                bounds = balance(_loads(profile), schedule.num_stages)
                drafts.append((profile, predict(profile, schedule, bounds, interval)))
    drafts.sort(key=lambda draft: _score(draft[0], draft[1], memory))
    # A short look ranks them; the best are then divided with care, and of each kind of checkpointing some.
    chosen = {id(draft): draft for draft in drafts[:_REFINED]}
    for interval in intervals:
        chosen |= {id(d): d for d in [d for d in drafts if d[1].interval == interval][: _REFINED // 2]}
    found: list[Prediction] = []
    for draft in drafts:
        profile, prediction = draft
        if id(draft) not in chosen:
            found.append(prediction)
            continue
        found.append(_refined(profile, prediction, memory))
        if memory is not None:
            found += [new for new in _selective(profile, found[-1], memory) if not any(_same(new, f) for f in found)]
    by_size = {profile.micro_batch_size: profile for profile in usable}
    usual = [prediction for prediction in found if not _bare(by_size[prediction.micro_batch_size], prediction.bounds)]
    if not usual:
        raise ValueError(
            f"every division of the {layers} layers into at least {ranks} stages leaves one without trainable "
            "parameters, which a run refuses; take fewer pipeline ranks"
        )
    found = usual
    fitting = [prediction for prediction in found if _excess(prediction, memory) == 0]
    if not fitting:
        least = min(found, key=lambda prediction: max(prediction.memory))
        raise ValueError(
            f"nothing fits in {memory:,} bytes per rank: the least of {len(found)} layouts takes "
            f"{max(least.memory):,} ({least.schedule.name}, micro-batches of {least.micro_batch_size}, "
            f"activation_checkpoint_interval={least.interval}); allow more, or take more pipeline ranks or a smaller "
            "model"
        )
    order = {name: at for at, name in enumerate(TRAINABLE)}

    def rank(prediction: Prediction) -> tuple[float, int, int]:
        return (prediction.seconds, max(prediction.memory), order.get(prediction.schedule.name, len(order)))

    fitting.sort(key=rank)
    if search_effort_s > 0:
        best = fitting[0]
        split = any(SCHEDULES[name].split for name in names)
        found_one = _searched(by_size[best.micro_batch_size], best, memory, split=split, effort_s=search_effort_s)
        fitting = sorted([*fitting, found_one], key=rank)
    return Plan(tuple(fitting), len(found) - sum(_excess(p, memory) == 0 for p in found), memory)


def plan_bounds(
    profile: Profile,
    schedule: Schedule,
    interval: int = 0,
    memory: int | None = None,
    recomputed: Collection[int] = (),
) -> Bounds:
    """The division of a profiled model for a given schedule, by predicted step and within a memory limit if one can."""

    def score(bounds: Bounds) -> tuple[float, ...]:
        return _score(profile, predict(profile, schedule, bounds, interval, recomputed), memory)

    def least(bounds: Bounds) -> tuple[float, ...]:
        return _bare(profile, bounds), 0, least_seconds(profile, schedule, bounds, interval, recomputed), 0

    return best_bounds(_loads(profile), schedule.num_stages, score, least=least)


def _schedules(names: Sequence[str], ranks: int, micro_batches: int, layers: int) -> Iterator[Schedule]:
    if ranks == 1:
        yield get_schedule(_ALONE, 1, micro_batches)
        return
    for name in names:
        known = SCHEDULES[name]
        for chunks in _CHUNKS if known.any_chunks else (known.chunks,):
            if ranks * chunks <= layers:
                yield get_schedule(name, ranks, micro_batches, chunks)


def _loads(profile: Profile) -> list[float]:
    return [layer.forward + layer.backward for layer in profile.layers]


def _score(profile: Profile, prediction: Prediction, memory: int | None) -> tuple[float, ...]:
    """Stages without trainable parameters, which a run refuses; bytes too many; seconds."""
    return _bare(profile, prediction.bounds), _excess(prediction, memory), prediction.seconds, max(prediction.memory)


def _bare(profile: Profile, bounds: Bounds) -> int:
    """Stages without trainable parameters, unless no layer has any."""
    trained = [layer.state > 0 for layer in profile.layers]
    return sum(not any(trained[start:stop]) for start, stop in pairwise(bounds)) if any(trained) else 0


def _excess(prediction: Prediction, memory: int | None) -> int:
    return 0 if memory is None else max(0, max(prediction.memory) - memory)


def _refined(profile: Profile, draft: Prediction, memory: int | None) -> Prediction:
    bounds = plan_bounds(profile, draft.schedule, draft.interval, memory)
    return predict(profile, draft.schedule, bounds, draft.interval)


def _selective(profile: Profile, full: Prediction, memory: int) -> Iterator[Prediction]:
    """The same layout with no more layers recomputed than must be, where that is some but not all."""
    layers = select_recomputed(profile, full.schedule, full.bounds, memory)
    if layers and len(layers) < len(profile.layers):
        yield predict(profile, full.schedule, full.bounds, recomputed=layers)


def _same(one: Prediction, other: Prediction) -> bool:
    """Whether two predictions are of one layout, as no and full recomputation may come to the same cuts."""
    return (one.schedule.name, one.chunks, one.micro_batch_size, one.bounds, one.recomputed) == (
        *(other.schedule.name, other.chunks, other.micro_batch_size, other.bounds, other.recomputed),
    )


def _searched(profile: Profile, best: Prediction, memory: int | None, *, split: bool, effort_s: float) -> Prediction:
    """A schedule of one's own for the placement and the bounds of the best one.

    Backward passes are split only where schedules that do so were asked for: else the run refuses them, or their halves
    were not measured.
    """
    stages = StageCosts.of(profile, best.bounds, best.interval, best.recomputed)
    left = None
    if memory is not None:
        schedule = best.schedule
        held = [schedule.stages_of(rank) for rank in range(schedule.num_ranks)]
        fixed = [sum(stages.static[s] for s in here) + max(stages.workspace[s] for s in here) for here in held]
        left = [float(memory - there) for there in fixed]
    problem = Problem(
        best.schedule.placement,
        best.schedule.micro_batches,
        stages.costs,
        memory=left,
        activations=[float(b) for b in stages.activations],
        split=split,
    )
    return predict(profile, search(problem, effort_s=effort_s).schedule, best.bounds, best.interval, best.recomputed)
