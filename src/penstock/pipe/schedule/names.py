"""Schedules by name."""

from collections.abc import Callable
from typing import Final, NamedTuple

from penstock._core.suggest import unknown_name
from penstock.pipe.schedule.dualpipe_v import dualpipe_v
from penstock.pipe.schedule.forward_only import forward_only
from penstock.pipe.schedule.gpipe import gpipe
from penstock.pipe.schedule.interleaved_1f1b import interleaved_1f1b
from penstock.pipe.schedule.looped_bfs import looped_bfs
from penstock.pipe.schedule.one_f_one_b import one_f_one_b
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.schedule_file import SUFFIX, load_schedule
from penstock.pipe.schedule.seq1f1b import seq1f1b
from penstock.pipe.schedule.v_half import v_half
from penstock.pipe.schedule.v_min import v_min
from penstock.pipe.schedule.zb_h1 import zb_h1
from penstock.pipe.schedule.zb_h2 import zb_h2
from penstock.pipe.schedule.zb_v import zb_v


class BuiltIn(NamedTuple):
    """A schedule that is made by name.

    Attributes:
        make: A pure function of ranks and micro-batches, and of chunks or slices where it has a choice of them.
        chunks: Stages per rank, by default where there is a choice.
        any_chunks: Whether there is a choice.
        sliced: Whether it cuts micro-batches into slices along the sequence.
        split: Whether its backward passes come in halves, I and W.
        trains: Whether anything runs backward.
    """

    make: Callable[..., Schedule]
    chunks: int = 1
    any_chunks: bool = False
    sliced: bool = False
    split: bool = False
    trains: bool = True


SCHEDULES: Final[dict[str, BuiltIn]] = {
    "gpipe": BuiltIn(gpipe),
    "1f1b": BuiltIn(one_f_one_b),
    "looped_bfs": BuiltIn(looped_bfs, chunks=2, any_chunks=True),
    "interleaved_1f1b": BuiltIn(interleaved_1f1b, chunks=2, any_chunks=True),
    "zb_h1": BuiltIn(zb_h1, split=True),
    "zb_h2": BuiltIn(zb_h2, split=True),
    "zb_v": BuiltIn(zb_v, chunks=2, split=True),
    "v_half": BuiltIn(v_half, chunks=2, split=True),
    "v_min": BuiltIn(v_min, chunks=2, split=True),
    "dualpipe_v": BuiltIn(dualpipe_v, chunks=2, split=True),
    "seq1f1b": BuiltIn(seq1f1b, sliced=True),
    "forward_only": BuiltIn(forward_only, any_chunks=True, trains=False),
}
"""The built-in schedules."""


def get_schedule(
    name: str, ranks: int, micro_batches: int, chunks: int | None = None, slices: int | None = None
) -> Schedule:
    """The schedule called ``name`` for these sizes.

    Args:
        name: One of :data:`SCHEDULES`, or the path of a file that :func:`~penstock.pipe.schedule.save_schedule` wrote,
            which must end in ``.json`` and be for these sizes.
        ranks: Pipeline ranks. The model is cut into ``ranks * chunks`` stages.
        micro_batches: Micro-batches per step and pipeline.
        chunks: Stages per rank. None takes the schedule's own number.
        slices: Pieces along the sequence into which each micro-batch is cut. None takes the schedule's own number.

    Raises:
        ValueError: An unknown name, sizes below one or other than the file's, or a number of chunks or slices that the
            schedule cannot have.
        CorruptFileError: The file is missing or no JSON.
    """
    if name.endswith(SUFFIX):
        return _loaded(name, ranks, micro_batches, chunks, slices)
    if name not in SCHEDULES:
        raise ValueError(unknown_name("schedule", name, SCHEDULES))
    known = SCHEDULES[name]
    options: dict[str, int] = {}
    if chunks is not None:
        if known.any_chunks:
            options["chunks"] = chunks
        elif chunks != known.chunks:
            able = ", ".join(other for other, entry in SCHEDULES.items() if entry.any_chunks)
            raise ScheduleError(
                f"schedule {name!r} holds {known.chunks} stage(s) per rank, got chunks={chunks}; any number of them "
                f"is taken by: {able}"
            )
    if slices is not None:
        if known.sliced:
            options["slices"] = slices
        elif slices != 1:
            able = ", ".join(other for other, entry in SCHEDULES.items() if entry.sliced)
            raise ScheduleError(
                f"schedule {name!r} does not cut micro-batches into slices, got slices={slices}; these do: {able}"
            )
    return known.make(ranks, micro_batches, **options)


def _loaded(path: str, ranks: int, micro_batches: int, chunks: int | None, slices: int | None) -> Schedule:
    schedule = load_schedule(path)
    stages = schedule.num_stages if chunks is None else ranks * chunks
    wanted = (ranks, stages, micro_batches, schedule.slices if slices is None else slices)
    found = (schedule.num_ranks, schedule.num_stages, schedule.micro_batches, schedule.slices)
    if wanted != found:
        raise ScheduleError(
            "{}: made for {} ranks, {} stages, {} micro-batches and {} slices; ".format(path, *found)
            + "the run has {} ranks, {} stages, {} micro-batches and {} slices".format(*wanted)
        )
    return schedule
