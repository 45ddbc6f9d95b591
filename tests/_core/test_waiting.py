import time

import pytest
import torch.distributed as dist

from penstock._core.waiting import EXIT_DEADLINE, EXIT_PEER, WaitError, Watcher


def left(codes: list[int], seconds: float = 5.0) -> list[int]:
    until = time.monotonic() + seconds
    while not codes and time.monotonic() < until:
        time.sleep(0.01)
    return codes


def test_a_wait_past_its_deadline_ends_the_process_and_says_what_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes: list[int] = []
    watcher = Watcher(rank=2, deadline_s=0.1, poll_s=0.01, leave=codes.append).start()
    with watcher.waiting("RECV_F", stage=1, micro_batch=3, peer=0):
        assert left(codes) == [EXIT_DEADLINE]
    watcher.stop()
    assert "rank 2, stage 1, RECV_F, micro-batch 3, peer rank 0: still waiting after" in capsys.readouterr().err


def test_a_failure_of_another_rank_ends_this_one_with_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    codes: list[int] = []
    here = Watcher(rank=0, store=store, poll_s=0.01, leave=codes.append).start()
    there = Watcher(rank=1, store=store, poll_s=0.01, leave=codes.append)
    there.report(ValueError("no such token"))
    assert left(codes) == [EXIT_PEER]
    here.stop()
    told = capsys.readouterr().err
    assert "rank 0 stops: rank 1: ValueError: no such token" in told
    assert "Its main thread was here:" in told
    assert "in left" in told  # the function above, in which this thread was


def test_only_the_first_failure_counts() -> None:
    store = dist.HashStore()
    Watcher(rank=1, store=store).report(ValueError("first"))
    Watcher(rank=2, store=store).report(ValueError("second"))
    assert b"first" in store.get("penstock/failure/1")


def test_a_lost_peer_is_raised_with_the_wait_and_the_first_failure() -> None:
    store = dist.HashStore()
    Watcher(rank=1, store=store).report(ValueError("bad batch"))
    watcher = Watcher(rank=0, store=store)

    def lose() -> None:
        with watcher.waiting("RECV_B", stage=0, micro_batch=1, peer=1):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(WaitError, match=r"RECV_B, micro-batch 1, peer rank 1.*Connection closed.*bad batch"):
        lose()


def test_an_ordinary_error_in_a_wait_is_left_alone() -> None:
    watcher = Watcher()

    def fail() -> None:
        with watcher.waiting("load"):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()


def test_a_deadline_must_be_positive() -> None:
    with pytest.raises(ValueError, match="deadline_s=0"):
        Watcher(deadline_s=0)
