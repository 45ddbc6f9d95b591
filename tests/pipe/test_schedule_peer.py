"""The same schedules as torch.distributed.pipelining, and the same text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import Schedule, get_schedule, place_communication

peer = pytest.importorskip("torch.distributed.pipelining.schedules")
if not (hasattr(peer, "_Action") and hasattr(peer.Schedule1F1B, "_get_pipeline_order")):
    pytest.skip("this torch keeps its schedules elsewhere", allow_module_level=True)


def _peers_ranks(kind: str, num_stages: int, micro_batches: int) -> list[list[Any]]:
    schedule = object.__new__(getattr(peer, kind))
    schedule._num_stages, schedule._n_microbatches = num_stages, micro_batches
    order = schedule._get_pipeline_order()
    return [order[rank] for rank in range(num_stages)]


@pytest.mark.parametrize(("name", "kind"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
@given(p=st.integers(2, 8), extra=st.integers(0, 8))
def test_the_peers_tables_are_ours(name: str, kind: str, p: int, extra: int) -> None:
    # The peer's 1F1B needs at least as many micro-batches as stages, and in torch 2.13 its last rank counts forwards
    # from 1: there only the order of the ops is compared.
    ranks = _peers_ranks(kind, p, p + extra)
    lines = [",".join("" if action is None else repr(action) for action in rank) for rank in ranks]
    theirs = Schedule.from_text("\n".join(lines), name)
    ours = get_schedule(name, p, p + extra)
    assert theirs.ranks[:-1] == ours.ranks[:-1]
    assert [action.op for action in theirs.ranks[-1]] == [action.op for action in ours.ranks[-1]]


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 8))
def test_the_peer_reads_our_text(name: str, p: int, m: int) -> None:
    for steps in place_communication(get_schedule(name, p, m)):
        for step in steps:
            read = peer._Action.from_str(str(step))
            assert (read.stage_index, read.microbatch_index) == (step.stage, step.micro_batch)
            assert repr(read) == str(step)
