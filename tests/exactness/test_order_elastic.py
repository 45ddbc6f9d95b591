"""Whatever ranks, loader workers, stops and SIGKILLs a run goes through, it trains on the order of one process.

Ranks are processes in lock-step, as gradients' exchange keeps them. Every few steps the first one writes the sampler's
state as a checkpoint; what was done after the last checkpoint is lost with a killed process, and done again.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock._core.files import read_json
from penstock.data_pipeline.data_sampling import DataSampler
from support.order_ranks import BATCH, DEADLINE_S, EVERY, VALUES, rank_job

TESTS = Path(__file__).parents[1]
# Ranks are forked from a process that has no threads: a fork of this one may find a lock held for ever.
RANKS = multiprocessing.get_context("forkserver")
METRIC = {
    "values": VALUES,
    "min_difficulty": 3,
    "max_difficulty": 9,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 9, "difficulty_step": 1},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random", "num_samples": 13 * BATCH, "skip_ranges": [[20, 31]]},
    "curriculum": {"strategy": "curriculum", "num_samples": 13 * BATCH, "curriculum": {"metrics": {"m": METRIC}}},
}


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Start it with what ranks import, so that each is a fork and not a second of importing."""
    RANKS.set_forkserver_preload(["support.order_ranks"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it loads on its own path
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
        forkserver.ensure_running()


def run_segment(folder: Path, config: dict[str, Any], ranks: int, workers: int, steps: int, kill_after: int) -> None:
    """One start: it ends by itself after ``steps`` batches, or is killed when it has noted ``kill_after`` of them."""
    gate = RANKS.Barrier(ranks)
    processes = [
        RANKS.Process(target=rank_job, args=(folder, config, rank, ranks, workers, steps, gate))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    log, until = folder / "rank_0", time.monotonic() + DEADLINE_S
    while kill_after and any(process.is_alive() for process in processes) and time.monotonic() < until:
        if log.exists() and log.read_bytes().count(b"\n") >= kill_after:
            for process in processes:
                os.kill(int(process.pid or 0), signal.SIGKILL)
            break
        time.sleep(0.002)
    for process in processes:
        process.join(DEADLINE_S)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a rank hangs"


def trained_on(folder: Path, ranks: int, start: int) -> tuple[list[int], int]:
    """The samples of this segment that its last checkpoint counts, rank by rank, and where the checkpoint stands."""
    state = folder / "state.json"
    consumed = int(read_json(state)["consumed"]) if state.exists() else 0
    batches: dict[int, list[int]] = {}
    for rank in range(ranks):
        log = folder / f"rank_{rank}"
        for line in log.read_text().splitlines() if log.exists() else ():
            first, *samples = line.split()
            if samples and samples[-1] == "end" and start <= int(first) < consumed:
                batches.setdefault(int(first), []).extend(map(int, samples[:-1]))
        log.unlink(missing_ok=True)
    return [sample for first in sorted(batches) for sample in batches[first]], consumed


segments = st.lists(
    st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([0, 0, 1, 2]), st.integers(1, 7), st.integers(0, 7)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(starts=segments)
def test_any_ranks_workers_stops_and_kills_give_the_one_order(
    name: str, starts: list[tuple[int, int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, config = tmp_path_factory.mktemp("elastic"), CONFIGS[name]
    seen: list[int] = []
    consumed = 0
    for ranks, workers, steps, kill_after in [*starts, (2, 1, 99, 0)]:  # the last one goes on to the end
        run_segment(folder, config, ranks, workers, steps, kill_after)
        part, consumed = trained_on(folder, ranks, consumed)
        seen += part
        assert len(seen) == consumed
    whole = DataSampler(VALUES, {**config, "batch_size": BATCH})
    # The last checkpoint of the last segment is at a multiple of its interval, or at the end.
    assert consumed >= (13 - EVERY) * BATCH
    assert seen == whole.sample_at(np.arange(consumed)).tolist()
    if name == "random":
        places = np.concatenate([np.arange(20), np.arange(31, 31 + len(seen) - 20)])
        epochs = {epoch: [s for s, p in zip(seen, places, strict=True) if p // 13 == epoch] for epoch in (0, 3, 4, 5)}
        for epoch, samples in epochs.items():
            assert sorted(samples) == list(range(13)), epoch
