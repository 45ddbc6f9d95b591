"""The same schedules as torch.distributed.pipelining, and the same text."""

import csv
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.pipe.schedule import SCHEDULES, Schedule, get_schedule, place_communication, text_with_communication

peer = pytest.importorskip("torch.distributed.pipelining.schedules")
_NEEDED = ("_Action", "_add_send_recv", "_simulate_comms_compute", "_validate_schedule", "ScheduleDualPipeV")
if not all(hasattr(peer, name) for name in _NEEDED) or not hasattr(peer.Schedule1F1B, "_get_pipeline_order"):
    pytest.skip("this torch keeps its schedules elsewhere", allow_module_level=True)


def _single(kind: str, ranks: int, micro_batches: int) -> Schedule:
    schedule = object.__new__(getattr(peer, kind))
    schedule._num_stages, schedule._n_microbatches = ranks, micro_batches
    return _read(schedule._get_pipeline_order(), ranks)


def _multi(kind: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    schedule = object.__new__(getattr(peer, kind))
    schedule.pp_group_size, schedule._n_microbatches = ranks, micro_batches
    schedule._num_stages = schedule.num_stages = ranks * chunks
    schedule.n_local_stages, schedule._stages = chunks, [SimpleNamespace()] * chunks
    schedule.number_of_rounds = max(1, micro_batches // ranks)
    schedule.microbatches_per_round = micro_batches // schedule.number_of_rounds
    return _read({rank: schedule._calculate_single_rank_operations(rank) for rank in range(ranks)}, ranks)


def _read(order: dict[int, list[Any]], ranks: int) -> Schedule:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(order[rank] for rank in range(ranks))  # as the peer dumps it
    return Schedule.from_text(text.getvalue())


@pytest.mark.parametrize(("name", "kind"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
@settings(max_examples=20)
@given(p=st.integers(2, 8), extra=st.integers(0, 8))
def test_the_peers_tables_are_ours(name: str, kind: str, p: int, extra: int) -> None:
    # The peer's 1F1B needs at least as many micro-batches as stages, and in torch 2.13 its last rank counts forwards
    # from 1: there only the order of the ops is compared.
    theirs, ours = _single(kind, p, p + extra), get_schedule(name, p, p + extra)
    assert theirs.ranks[:-1] == ours.ranks[:-1]
    assert [action.op for action in theirs.ranks[-1]] == [action.op for action in ours.ranks[-1]]


@settings(max_examples=20)
@given(p=st.integers(2, 8), m=st.integers(1, 24), chunks=st.integers(1, 3))
def test_the_peers_interleaved_tables_are_ours(p: int, m: int, chunks: int) -> None:
    m -= m % max(1, m // p)  # The peer's groups are of one size.
    assert _multi("ScheduleInterleaved1F1B", p, m, chunks).ranks == get_schedule("interleaved_1f1b", p, m, chunks).ranks


@settings(max_examples=20)
@given(p=st.integers(2, 8), m=st.integers(1, 12), chunks=st.integers(1, 3))
def test_the_peers_breadth_first_tables_are_ours_but_for_the_order_of_backwards(p: int, m: int, chunks: int) -> None:
    theirs, ours = _multi("ScheduleLoopedBFS", p, m, chunks), get_schedule("looped_bfs", p, m, chunks)
    for their, our in zip(theirs.ranks, ours.ranks, strict=True):
        assert [(a.stage, a.op, m - 1 - a.micro_batch if a.op == "B" else a.micro_batch) for a in their] == list(our)


@settings(max_examples=20)
@given(p=st.integers(1, 8), extra=st.integers(0, 12))
def test_the_peers_dualpipe_v_tables_are_ours(p: int, extra: int) -> None:
    assert _multi("ScheduleDualPipeV", p, 2 * p + extra, 2).ranks == get_schedule("dualpipe_v", p, 2 * p + extra).ranks


@settings(max_examples=20)
@given(p=st.integers(1, 8), m=st.integers(1, 24))
def test_the_peers_zb_v_tables_are_ours_but_for_the_last_weight_gradients(p: int, m: int) -> None:
    # At the end the peer takes one chunk's weight gradients after the other's, here the oldest goes first.
    for their, our in zip(
        _multi("ScheduleZBVZeroBubble", p, m, 2).ranks, get_schedule("zb_v", p, m).ranks, strict=True
    ):
        assert [a for a in their if a.op != "W"] == [a for a in our if a.op != "W"]
        assert sorted(their) == sorted(our)
        if m >= 2 * p - 1:
            assert [a.op for a in their] == [a.op for a in our]


@pytest.mark.parametrize("name", [name for name, known in SCHEDULES.items() if not known.sliced and known.trains])
@settings(max_examples=10)
@given(p=st.integers(1, 5), m=st.integers(1, 9))
def test_the_peer_accepts_and_plays_our_tables(name: str, p: int, m: int) -> None:
    schedule = get_schedule(name, p, m)
    order = _actions(schedule.to_text(), peer._Action.from_str)
    peer._validate_schedule(order, p, schedule.num_stages, m)
    placed = schedule.placement.__getitem__
    peer._simulate_comms_compute(
        peer._add_send_recv({r: list(a) for r, a in order.items()}, placed, schedule.num_stages),
        placed,
        schedule.num_stages,
    )
    # With our own sends and receives too.
    steps = _actions(text_with_communication(schedule), peer._Action.from_str)
    assert [list(map(str, rank)) for rank in steps.values()] == [
        list(map(str, s)) for s in place_communication(schedule)
    ]
    peer._simulate_comms_compute(steps, placed, schedule.num_stages)


def _actions(text: str, read: Callable[[str], Any]) -> dict[int, list[Any]]:
    return {rank: [read(cell) for cell in line.split(",")] for rank, line in enumerate(text.splitlines())}


def test_a_pair_to_be_overlapped_is_read_as_two_actions() -> None:
    text = "0F0,(0F1;1B0)OVERLAP_F_B,1B1\n"
    assert Schedule.from_text(f"0F0, (1F0;1B0)OVERLAP_F_B ,0B0,{''}\r\n").to_text() == "0F0,1F0,1B0,0B0\n"
    with pytest.raises(ValueError, match="'' is not a schedule action"):
        Schedule.from_text(text.replace("0F1;1B0", ""))
