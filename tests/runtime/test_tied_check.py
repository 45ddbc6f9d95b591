import pytest
import torch
from torch import nn

from penstock.runtime.tied_check import TiedCopiesError, check_copies
from support.pool import WorkerPool


def check_job(rank: int, world_size: int, drift: bool) -> str:
    same = nn.Parameter(torch.arange(6.0).view(2, 3))
    other = nn.Parameter(torch.ones(4))
    if drift and rank == 2:
        with torch.no_grad():
            other[3] = torch.nextafter(other[3], torch.tensor(2.0))
    try:
        check_copies([("layer_000.weight", same), ("layer_001.bias", other)], group=torch.distributed.group.WORLD)
    except TiedCopiesError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("drift", [False, True])
def test_one_bit_of_drift_is_found_and_named(pool: WorkerPool, drift: bool) -> None:
    answers = pool.run(check_job, 3, drift)
    if drift:
        assert set(answers) == {"tied weights ['layer_001.bias'] differ between rank 0 and rank 2"}
    else:
        assert set(answers) == {"equal"}
