import torch
from torch import nn

from penstock.runtime.clipping import clip_, global_norm
from support.pool import WorkerPool


def parameters(seed: int) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    result = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(1))]
    for parameter in result[:2]:
        parameter.grad = torch.randn_like(parameter)
    return result


def test_clipping_is_torchs() -> None:
    for limit in (0.1, 100.0):
        mine, theirs = parameters(0), parameters(0)
        norm = global_norm(mine)
        expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
        assert abs(norm - expected.item()) < 1e-6
        clip_(mine, norm=norm, max_norm=limit)
        for a, b in zip(mine, theirs, strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=0)


def norm_job(rank: int, world_size: int) -> float:
    return global_norm(parameters(rank), group=torch.distributed.group.WORLD)


def test_the_norm_is_over_all_ranks(pool: WorkerPool) -> None:
    everything = torch.cat(
        [p.grad.double().flatten() for rank in range(3) for p in parameters(rank) if p.grad is not None]
    )
    for norm in pool.run(norm_job, 3):
        assert abs(norm - everything.norm().item()) < 1e-12
