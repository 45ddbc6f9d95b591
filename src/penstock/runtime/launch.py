"""Starts one process per rank on this machine, through torch's elastic launcher.

Under ``torchrun``, SLURM or Kubernetes the processes exist already and find each other by environment variables; then
:func:`launched` is true and nothing is started.
"""

import math
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Final

# glibc gives big blocks back to the kernel at every free and faults them in again at every malloc. A training step
# frees and allocates the same sizes over and over, so launched processes keep them.
_ALLOCATOR: Final = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def launched() -> bool:
    """Whether a launcher has started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], *, processes: int, shutdown_s: float) -> int:
    """Run ``python -m penstock ARGUMENTS`` in ``processes`` ranks on this machine and wait for them.

    When one rank fails the launcher ends the others.

    Args:
        arguments: The command line after ``penstock``.
        processes: How many ranks; at least 1.
        shutdown_s: When SIGTERM comes here it is passed on to the ranks, which then have this long, in seconds, to
            finish their step and save before they are killed.

    Returns:
        0 when all ranks ended well, else the exit code of the first that failed (1 if a signal ended it); where this
        process itself was sent a signal, 128 plus its number.
    """
    if processes < 1:
        raise ValueError(f"cannot launch {processes} processes; at least 1 is needed")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name, value in {"OMP_NUM_THREADS": str(_threads(processes)), **_ALLOCATOR}.items():
        os.environ.setdefault(name, value)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        local_addr="127.0.0.1",
        shutdown_timeout=math.ceil(shutdown_s),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "penstock", *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"penstock: rank {rank} failed first, {_ending(failure.exitcode)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _ending(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def _threads(processes: int) -> int:
    """Threads per process: the machine's processors shared out, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // processes)
