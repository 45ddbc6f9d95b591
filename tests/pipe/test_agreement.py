import threading
from typing import Any

import pytest
import torch.distributed as dist

from penstock._core.waiting import WaitError, Watcher
from penstock.pipe.agreement import agree, compare


def test_equal_statements_agree_and_silence_is_no_disagreement() -> None:
    assert compare([{"a": 1, "b": [1, {"x": None}]}, {"a": 1}, {"b": [1, {"x": None}], "c": 2}]) is None
    assert compare([]) is None


@pytest.mark.parametrize(
    ("stated", "verdict"),
    [
        ([1, 1, 2], "m: rank 2 has 2, but ranks 0, 1 have 1"),
        ([2, 1, 1], "m: rank 0 has 2, but ranks 1, 2 have 1"),
        ([1, 2], "m: rank 1 has 2, but rank 0 has 1"),
        ([1, 2, 3], "m: rank 1 has 2; rank 2 has 3, but rank 0 has 1"),
        ([1, 1.0], "m: rank 1 has 1.0, but rank 0 has 1"),
    ],
)
def test_who_differs_is_named(stated: list[Any], verdict: str) -> None:
    assert compare([{"same": 0, "m": value} for value in stated]) == verdict


def on_threads(facts: list[dict[str, Any] | None], rounds: int = 1, deadline_s: float = 5.0) -> list[str]:
    """Each rank on a thread; None stays away. Returns what each rank raised, as text."""
    store = dist.HashStore()
    said = [""] * len(facts)

    def rank(number: int, own: dict[str, Any]) -> None:
        try:
            for _ in range(rounds):
                agree(
                    "things",
                    own,
                    store=store,
                    rank=number,
                    world_size=len(facts),
                    watcher=Watcher(rank=number, deadline_s=deadline_s),
                )
        except (ValueError, WaitError) as error:
            said[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=rank, args=(i, own)) for i, own in enumerate(facts) if own is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_ranks_that_agree_go_on_and_may_agree_again() -> None:
    assert on_threads([{"m": 1}] * 3, rounds=3) == [""] * 3


def test_every_rank_hears_the_same_verdict() -> None:
    said = on_threads([{"m": 1}, {"m": 1}, {"m": 4}])
    assert len(set(said)) == 1
    assert said[0].startswith("ValueError: ")
    assert "m: rank 2 has 4, but ranks 0, 1 have 1" in said[0]


def test_ranks_that_stay_away_are_named() -> None:
    said = on_threads([{"m": 1}, None, {"m": 1}, None], deadline_s=0.3)
    assert said[0] == "WaitError: rank 0, agreement on things: ranks 1, 3 did not arrive within 0.3 s"
    assert said[2] == "WaitError: rank 2, agreement on things: ranks 1, 3 did not arrive within 0.3 s"


def test_rank_zero_staying_away_is_noticed() -> None:
    said = on_threads([None, {"m": 1}], deadline_s=0.2)
    assert said[1] == "WaitError: rank 1, agreement on things: rank 0 did not arrive within 0.2 s"
