from typing import Any

from penstock._core.meter import CONTROL, Meter
from penstock.runtime.gather import gather_json
from support.pool import WorkerPool


def gather_job(rank: int, world_size: int) -> tuple[list[Any], int]:
    meter = Meter()
    values = [{"rank": rank, "text": "é" * rank * 10}, None, [1.5, "x"]]
    return gather_json(values[rank], meter=meter), meter.sent[CONTROL]


def test_every_rank_gets_the_values_of_all_whatever_their_sizes(pool: WorkerPool) -> None:
    for values, sent in pool.run(gather_job, 3):
        assert values == [{"rank": 0, "text": ""}, None, [1.5, "x"]]
        assert sent > 0


def test_alone_there_is_nothing_to_gather() -> None:
    assert gather_json({"a": 1}) == [{"a": 1}]
