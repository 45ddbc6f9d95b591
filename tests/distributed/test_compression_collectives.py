from typing import Any

import numpy as np
import pytest
import torch

from penstock._core.meter import REPLICAS, Meter
from penstock._core.waiting import Watcher
from penstock.compression import (
    ErrorMemory,
    compressed_allreduce,
    create_compression_algorithm,
    start_compressed_allreduce,
)
from support.compression_reference import ReferenceAverage
from support.pool import WorkerPool

SIZES = [0, 1, 2, 63, 65, 200, 1024, 5000, 70_001]


def contribution(rank: int, step: int, numel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(numel, dtype=torch.float64, generator=generator).to(dtype)


def average_over_steps(rank: int, world_size: int, numel: int, steps: int) -> list[Any]:
    algorithm = create_compression_algorithm("onebit")
    results = []
    x = contribution(rank, 0, numel)
    memory = ErrorMemory.for_tensor(x)
    for step in range(steps):
        x = contribution(rank, step, numel)
        out = compressed_allreduce(x, algorithm, worker_error=memory.worker, server_error=memory.server)
        assert out is x
        results.append(x)
    return [results, memory.worker, memory.server]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_two_phases_match_the_reference_at_every_size(pool: WorkerPool, ranks: int) -> None:
    for numel in SIZES:
        reference = ReferenceAverage(numel, ranks)
        answers = pool.run(average_over_steps, ranks, numel, 4)
        for step in range(4):
            expected = reference([contribution(r, step, numel).numpy() for r in range(ranks)])
            for results, _, _ in answers:
                assert torch.equal(results[step], answers[0][0][step])  # the same bits everywhere
                np.testing.assert_allclose(results[step].numpy(), expected, rtol=1e-6)
        for rank, (_, worker, server) in enumerate(answers):
            np.testing.assert_allclose(worker.numpy(), reference.worker[rank], atol=1e-6)
            np.testing.assert_allclose(server.numpy(), reference.server[rank], atol=1e-6)


def test_nothing_is_lost_over_time(pool: WorkerPool) -> None:
    ranks, numel, steps = 3, 5000, 5
    answers = pool.run(average_over_steps, ranks, numel, steps)
    came_in = sum(contribution(r, s, numel) for r in range(ranks) for s in range(steps)) / ranks
    came_out = sum(answers[0][0])
    owed = sum(worker for _, worker, _ in answers) / ranks + torch.cat([server for _, _, server in answers])
    torch.testing.assert_close(came_out + owed, came_in, rtol=0, atol=1e-12)


def linear(rank: int, world_size: int, name: str, dtype: torch.dtype, average: bool) -> torch.Tensor:
    x = contribution(rank, 0, 999, dtype)
    return compressed_allreduce(x, create_compression_algorithm(name), average=average)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("none", torch.float64, 1e-15),
        ("none", torch.float32, 1e-6),
        ("fp16", torch.float32, 2e-3),
        ("bf16", torch.float32, 2e-2),
        ("bf16", torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("average", [True, False])
def test_linear_algorithms_sum(
    pool: WorkerPool, name: str, dtype: torch.dtype, tolerance: float, average: bool
) -> None:
    answers = pool.run(linear, 3, name, dtype, average)
    expected = sum(contribution(r, 0, 999, dtype).double() for r in range(3)) / (3 if average else 1)
    assert all(torch.equal(a, answers[0]) for a in answers)
    assert answers[0].dtype == dtype
    torch.testing.assert_close(answers[0].double(), expected, rtol=tolerance, atol=2 * tolerance)


def big_in_half(rank: int, world_size: int) -> torch.Tensor:
    return compressed_allreduce(torch.full((10,), 60_000.0), create_compression_algorithm("fp16"))


def test_an_average_in_half_precision_does_not_overflow(pool: WorkerPool) -> None:
    assert pool.run(big_in_half, 2)[0].tolist() == [60_000.0] * 10


def with_feedback_in_bf16(rank: int, world_size: int) -> list[torch.Tensor]:
    algorithm = create_compression_algorithm("bf16")
    sums = torch.zeros(100, dtype=torch.float64)
    memory = ErrorMemory.for_tensor(sums)
    for step in range(50):
        x = contribution(rank, step, 100)
        sums += compressed_allreduce(
            x, algorithm, worker_error=memory.worker, server_error=memory.server, average=False
        )
    return [sums, memory.worker]


def test_what_a_cast_loses_comes_back(pool: WorkerPool) -> None:
    answers = pool.run(with_feedback_in_bf16, 2)
    came_in = sum(contribution(r, s, 100) for r in range(2) for s in range(50))
    owed = answers[0][1] + answers[1][1]
    # Only the all-reduce's own rounding is left: at most 2**-9 of each of the 50 sums.
    assert (answers[0][0] + owed - came_in).abs().max() < 50 * 2.0**-9 * 6


def count_bytes(rank: int, world_size: int, name: str, numel: int) -> int:
    meter = Meter()
    compressed_allreduce(torch.ones(numel), create_compression_algorithm(name), meter=meter)
    assert meter.seconds["wait_replicas"] > 0
    assert meter.sent[REPLICAS] >= 0
    return meter.sent[REPLICAS] + meter.received[REPLICAS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_on_the_wire_follow_the_formula(pool: WorkerPool, ranks: int) -> None:
    numel = 2**20
    plain = sum(pool.run(count_bytes, ranks, "none", numel))
    half = sum(pool.run(count_bytes, ranks, "bf16", numel))
    signs = sum(pool.run(count_bytes, ranks, "onebit", numel))
    # Each rank sends and receives 2 (n-1)/n of the buffer; a chunk has a bit an element and 4 bytes a block of 1024.
    assert plain == ranks * 2 * 2 * (ranks - 1) * 4 * numel // ranks
    assert half == plain // 2
    assert signs == ranks * 2 * 2 * (ranks - 1) * (numel // ranks // 8 + numel // ranks // 1024 * 4)
    assert plain / signs > 28


def strided_and_in_flight(rank: int, world_size: int) -> list[torch.Tensor]:
    algorithm = create_compression_algorithm("onebit")
    a, b = contribution(rank, 0, 600).view(20, 30).t(), contribution(rank, 1, 100)
    with Watcher(rank=rank, deadline_s=20) as watcher:
        first = start_compressed_allreduce(a, algorithm, watcher=watcher)
        second = start_compressed_allreduce(b, algorithm, watcher=watcher)
        assert first.wait() is a
        assert second.wait() is b
        assert first.wait() is a
    return [a.contiguous(), b]


def test_several_in_flight_and_any_strides(pool: WorkerPool) -> None:
    answers = pool.run(strided_and_in_flight, 2)
    a = ReferenceAverage(600, 2)([contribution(r, 0, 600).view(20, 30).t().reshape(-1).numpy() for r in range(2)])
    b = ReferenceAverage(100, 2)([contribution(r, 1, 100).numpy() for r in range(2)])
    for got in answers:
        np.testing.assert_allclose(got[0].reshape(-1).numpy(), a, rtol=1e-6)
        np.testing.assert_allclose(got[1].numpy(), b, rtol=1e-6)


def with_one_nan(rank: int, world_size: int) -> list[torch.Tensor]:
    x = torch.ones(4096)
    if rank == 1:
        x[0] = torch.nan
    memory = ErrorMemory.for_tensor(x)
    algorithm = create_compression_algorithm("onebit")
    compressed_allreduce(x, algorithm, worker_error=memory.worker, server_error=memory.server)
    return [x, memory.worker, memory.server]


def test_one_ranks_nan_is_seen_by_all_and_remembered_by_none(pool: WorkerPool) -> None:
    for x, worker, server in pool.run(with_one_nan, 2):
        assert x[:1024].isnan().all()
        assert torch.equal(x[1024:], torch.ones(3072))
        assert worker.isfinite().all()
        assert server.isfinite().all()


def test_one_rank_sends_nothing_and_changes_nothing() -> None:
    x = torch.randn(100)
    kept = x.clone()
    assert torch.equal(compressed_allreduce(x, create_compression_algorithm("onebit")), kept)


def test_wrong_arguments_are_refused() -> None:
    algorithm = create_compression_algorithm("onebit")
    with pytest.raises(ValueError, match=r"torch.int64; use dist.all_reduce"):
        compressed_allreduce(torch.arange(3), algorithm)
    with pytest.raises(ValueError, match="go together"):
        compressed_allreduce(torch.ones(3), algorithm, worker_error=torch.zeros(3))
    memory = ErrorMemory.for_tensor(torch.ones(4))
    with pytest.raises(ValueError, match="for 4 elements with a chunk of 4, but the tensor has 3 and rank 0 of 1"):
        compressed_allreduce(torch.ones(3), algorithm, worker_error=memory.worker, server_error=memory.server)
