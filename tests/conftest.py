import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch
from hypothesis import HealthCheck, settings

from support.pool import WorkerPool

torch.set_num_threads(1)

# The machines are shared: a slow example says nothing, and a failing one must be found again.
settings.register_profile("penstock", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Warm gloo workers, shared by all tests of the session."""
    workers = WorkerPool()
    yield workers
    workers.close()
