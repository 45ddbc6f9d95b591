from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from penstock.compression import DeMo
from support.pool import WorkerPool

Array = npt.NDArray[np.float64]
SHAPES = [(32, 48), (64,), (16, 16)]
CHUNK, TOPK, DECAY, LR, WEIGHT_DECAY = 16, 6, 0.95, 1e-2, 0.1


def cosines(size: int) -> Array:
    """The orthonormal DCT-II as a matrix."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    basis = np.sqrt(2 / size) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))
    basis[0] /= np.sqrt(2)
    return basis


def fast_part(m: Array) -> Array:
    """What the largest coefficients of each tile stand for, tile by tile."""
    matrix = np.atleast_2d(m)
    height, width = (min(CHUNK, size) for size in matrix.shape)
    rows, columns = cosines(height), cosines(width)
    result = np.zeros_like(matrix)
    for i in range(0, matrix.shape[0], height):
        for j in range(0, matrix.shape[1], width):
            c = rows @ matrix[i : i + height, j : j + width] @ columns.T
            kept = np.zeros_like(c).reshape(-1)
            places = np.argsort(-np.abs(c).reshape(-1))[:TOPK]
            kept[places] = c.reshape(-1)[places].astype(np.float32)
            result[i : i + height, j : j + width] = rows.T @ kept.reshape(c.shape) @ columns
    return result.reshape(m.shape)


def gradient(x: Array, rank: int, step: int, index: int) -> Array:
    return 0.3 * (x - 0.5 * rank) + np.random.default_rng([rank, step, index]).normal(size=x.shape)


def first(index: int) -> Array:
    return np.random.default_rng(index).normal(size=SHAPES[index])


def train(rank: int, world_size: int, steps: int, sign: bool) -> list[list[torch.Tensor]]:
    parameters = [nn.Parameter(torch.from_numpy(first(index))) for index in range(len(SHAPES))]
    optimizer = DeMo(parameters, LR, DECAY, TOPK, CHUNK, WEIGHT_DECAY, sign=sign)
    history = []
    for step in range(steps):
        for index, p in enumerate(parameters):
            p.grad = torch.from_numpy(gradient(p.detach().numpy(), rank, step, index))
        optimizer.step()
        history.append([p.detach().clone() for p in parameters])
    return history


@pytest.mark.parametrize(("ranks", "sign"), [(1, True), (2, False), (3, True)])
def test_it_is_the_papers_algorithm(pool: WorkerPool, ranks: int, sign: bool) -> None:
    steps = 8
    answers = pool.run(train, ranks, steps, sign)
    xs = [first(index) for index in range(len(SHAPES))]
    momenta = [[np.zeros(shape) for shape in SHAPES] for _ in range(ranks)]
    for step in range(steps):
        for index, x in enumerate(xs):
            total = np.zeros_like(x)
            for rank in range(ranks):
                m = DECAY * momenta[rank][index] + gradient(x, rank, step, index)
                q = fast_part(m)
                momenta[rank][index] = m - q
                total += q
            mean = total / ranks
            # A sign near zero may fall either way: such elements are taken from the run.
            ours = answers[0][step][index].numpy()
            expected = x * (1 - LR * WEIGHT_DECAY) - LR * (np.sign(mean) if sign else mean)
            clear = np.abs(mean) > 1e-6
            np.testing.assert_allclose(ours[clear], expected[clear], rtol=1e-6, atol=1e-8)
            assert clear.mean() > 0.9
            xs[index] = ours.copy()
        for history in answers[1:]:
            for mine, theirs in zip(answers[0][step], history[step], strict=True):
                assert torch.equal(mine, theirs)


def stop_and_go_on(rank: int, world_size: int) -> list[bool]:
    def fresh() -> tuple[nn.Module, DeMo]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1))
        return model, DeMo(model.parameters(), lr=1e-3, compression_topk=4, compression_chunk=16)

    def steps(model: nn.Module, optimizer: DeMo, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(32, 13, generator=torch.Generator().manual_seed(50 * step + rank))
            model.zero_grad()
            (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, 0, 5)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    errors = {name: e.clone() for name, e in optimizer.error_state().items()}
    state = optimizer.state_dict()
    state["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()}
    steps(model, optimizer, 5, 9)
    resumed, other = fresh()
    steps(resumed, other, 20, 23)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    fits = other.load_error_state(errors)
    steps(resumed, other, 5, 9)
    return [fits, all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bitwise_the_same(pool: WorkerPool, ranks: int) -> None:
    assert pool.run(stop_and_go_on, ranks) == [[True, True]] * ranks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_decay": 1.0}, r"compression_decay must be in \[0, 1\), got 1.0"),
        ({"compression_topk": 0}, "topk"),
        ({"compression_chunk": 1000}, "chunk"),
        ({"algorithm": "none"}, "sends all of it; take dct_topk"),
        ({"lr": -1.0}, "lr must not be negative"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeMo([nn.Parameter(torch.ones(3))], **options)
