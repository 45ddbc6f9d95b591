from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from penstock._core.meter import REPLICAS, Meter
from penstock.compression import ZeroOneAdam
from support.compression_optimizer_reference import ReferenceZeroOneAdam
from support.pool import WorkerPool

SHAPES = [(30, 64), (8,), (1200,)]  # whole cache lines in float64, so the bucket has no gaps
NUMEL = sum(int(np.prod(shape)) for shape in SHAPES)
SCHEDULE: dict[str, Any] = {
    "var_freeze_step": 12,
    "var_update_scaler": 3,
    "local_step_scaler": 6,
    "local_step_clipper": 4,
}
# From the rule by hand: every step for 3 updates, every 2nd for 3, every 4th up to step 12.
VARIANCE_STEPS = {1, 2, 3, 4, 6, 8, 12}
# Every step up to 12 + 6, the even ones up to 12 + 12, then every 4th.
EXCHANGE_STEPS = {*range(1, 19), 20, 22, 24, 28, 32, 36}


def start() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).normal(size=NUMEL)


def gradient(x: np.ndarray[Any, Any], rank: int, step: int) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([rank, step]).normal(size=NUMEL)
    return np.linspace(0.1, 2.0, NUMEL) * (x - 0.5 * rank) + 0.3 * noise


RESTS = {20, 21, 23, 25, 26, 27, 28, 29, 34}
"""Steps whose rate is zero in one case: the last, the first or one in the middle of a round, and a whole round."""


def rate(step: int, rests: bool = False) -> float:
    return 0.0 if rests and step in RESTS else 1e-2 / (1 + 0.05 * step)


def train(
    rank: int, world_size: int, steps: int, rests: bool, options: dict[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.from_numpy(start())
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    parameters = [nn.Parameter(p.view(s).clone()) for p, s in zip(x.split(sizes), SHAPES, strict=True)]
    optimizer = ZeroOneAdam(parameters, **options)

    def flat() -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    history = []
    for step in range(1, steps + 1):
        g = torch.from_numpy(gradient(flat().numpy(), rank, step))
        for p, part in zip(parameters, g.split(sizes), strict=True):
            p.grad = part.view(p.shape)
        optimizer.param_groups[0]["lr"] = rate(step, rests)
        optimizer.step()
        mine = flat()
        with optimizer.common_weights():
            common = flat()
        assert torch.equal(flat(), mine)
        assert optimizer.in_round == (step not in EXCHANGE_STEPS)
        history.append((mine, common))
    return history


@pytest.mark.parametrize(
    ("ranks", "bias_correction", "floor", "decay", "rests"),
    [(2, True, 0.05, 0.1, True), (3, False, 0.0, 0.0, False), (2, False, 0.3, 0.2, False)],
)
def test_it_is_the_papers_algorithm(
    pool: WorkerPool, ranks: int, bias_correction: bool, floor: float, decay: float, rests: bool
) -> None:
    common: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8 if floor else 1e-3, "weight_decay": decay}
    common |= {"bias_correction": bias_correction, "variance_floor": floor}
    steps = 36
    answers = pool.run(train, ranks, steps, rests, {**common, **SCHEDULE})
    schedule: dict[str, Any] = {"lr": lambda step: rate(step, rests), "variance_steps": VARIANCE_STEPS}
    reference = ReferenceZeroOneAdam(start(), ranks, exchange_steps=EXCHANGE_STEPS, **schedule, **common)
    for step in range(1, steps + 1):
        reference.step([gradient(reference.x[rank], rank, step) for rank in range(ranks)])
        tolerance = 1e-11 if step < 5 else 1e-5  # where scales are rounded to float32
        for rank in range(ranks):
            mine, common_weights = (tensor.numpy() for tensor in answers[rank][step - 1])
            np.testing.assert_allclose(mine, reference.x[rank], rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(common_weights, reference.common, rtol=tolerance, atol=tolerance)
            assert np.array_equal(common_weights, answers[0][step - 1][1].numpy())  # replicas never drift


def ended_early(rank: int, world_size: int, steps: int, options: dict[str, Any]) -> tuple[torch.Tensor, bool, int]:
    """Parameters after :meth:`synchronize` in the middle of a round, and what it sent when called again."""
    x, meter = torch.from_numpy(start()), Meter()
    parameter = nn.Parameter(x)
    optimizer = ZeroOneAdam([parameter], meter=meter, **options)
    for step in range(1, steps + 1):
        parameter.grad = torch.from_numpy(gradient(parameter.detach().numpy(), rank, step))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    before = meter.sent[REPLICAS]
    optimizer.synchronize()
    assert meter.sent[REPLICAS] > before
    after = meter.sent[REPLICAS]
    optimizer.synchronize()
    return parameter.detach(), optimizer.in_round, meter.sent[REPLICAS] - after


def test_a_round_that_is_ended_early_is_a_shorter_round(pool: WorkerPool) -> None:
    common: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "variance_floor": 0.0}
    common["bias_correction"] = True
    steps = 26  # between the exchanges after 24 and 28
    answers = pool.run(ended_early, 2, steps, {**common, **SCHEDULE})
    reference = ReferenceZeroOneAdam(
        start(), 2, lr=rate, variance_steps=VARIANCE_STEPS, exchange_steps=EXCHANGE_STEPS | {steps}, **common
    )
    for step in range(1, steps + 1):
        reference.step([gradient(reference.x[r], r, step) for r in range(2)])
    for parameters, in_round, sent in answers:
        np.testing.assert_allclose(parameters.numpy(), reference.common, rtol=1e-5, atol=1e-5)
        assert torch.equal(parameters, answers[0][0])
        assert not in_round
        assert sent == 0


def beside_a_group_that_rests(rank: int, world_size: int) -> list[torch.Tensor]:
    """The same parameter alone, and beside one whose rate is zero."""
    results = []
    for rests in (False, True):
        parameter, other = nn.Parameter(torch.from_numpy(start())), nn.Parameter(torch.ones(70))
        groups: list[dict[str, Any]] = [{"params": [parameter]}]
        groups += [{"params": [other], "lr": 0.0}] if rests else []
        optimizer = ZeroOneAdam(groups, lr=1e-2, **SCHEDULE)
        for step in range(1, 29):
            parameter.grad = torch.from_numpy(gradient(parameter.detach().numpy(), rank, step))
            other.grad = torch.full_like(other, rank + 1.0)
            optimizer.step()
        assert torch.equal(other.detach(), torch.ones(70))
        results.append(parameter.detach())
    return results


def test_a_group_with_a_rate_of_zero_does_not_hold_up_the_others(pool: WorkerPool) -> None:
    for alone, beside in pool.run(beside_a_group_that_rests, 2):
        assert torch.equal(alone, beside)
        assert not torch.allclose(alone, torch.from_numpy(start()), atol=0.1)


def odd_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1)).to(dtype)


def backward(model: nn.Module, rank: int, step: int) -> float:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 13, generator=torch.Generator().manual_seed(50 * step + rank)).to(dtype)
    model.zero_grad()
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss.item()


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def rest(optimizer: ZeroOneAdam, step: int) -> None:
    """The 25th step, the first of a round, has a rate of zero: no parameter moves, but momenta go apart."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step == 24 else 3e-3


def stop_and_go_on(rank: int, world_size: int, stop: int, dtype: torch.dtype) -> list[bool]:
    def fresh() -> tuple[nn.Module, ZeroOneAdam]:
        model = odd_model(dtype)
        return model, ZeroOneAdam(model.parameters(), lr=3e-3, weight_decay=0.1, bucket_bytes=400, **SCHEDULE)

    model, optimizer = fresh()
    saved: dict[str, Any] = {}
    for step in range(40):
        if step == stop:  # a checkpoint as an engine writes it: common weights, one state, each rank's errors
            with optimizer.common_weights():
                saved["model"] = copied(model.state_dict())
            saved["optimizer"] = copied(optimizer.state_dict())
            for state in saved["optimizer"]["state"].values():  # the first replica's: the engine keeps but one
                for tensor in state.values():
                    dist.broadcast(tensor, 0)
            saved["errors"] = copied(optimizer.error_state())
        backward(model, rank, step)
        rest(optimizer, step)
        optimizer.step()
    resumed, other = fresh()
    for step in range(27):  # whatever it did before
        backward(resumed, rank, step + 100)
        other.step()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    fits = other.load_error_state(saved["errors"])
    for step in range(stop, 40):
        backward(resumed, rank, step)
        rest(other, step)
        other.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    errors = other.error_state()
    equal = [
        torch.equal(e, errors[k]) if isinstance(e, torch.Tensor) else e == errors[k]
        for k, e in optimizer.error_state().items()
    ]
    return [fits, same, all(equal) and (optimizer.in_round == ("steps" in errors))]


@pytest.mark.parametrize(
    ("stop", "dtype"), [(2, torch.float32), (11, torch.float32), (25, torch.float32), (27, torch.bfloat16)]
)
def test_a_resumed_run_is_bitwise_the_same(pool: WorkerPool, stop: int, dtype: torch.dtype) -> None:
    assert pool.run(stop_and_go_on, 2, stop, dtype) == [[True, True, True]] * 2


def one_nan(rank: int, world_size: int, at: int) -> list[Any]:
    model = odd_model()
    optimizer = ZeroOneAdam(model.parameters(), **SCHEDULE)
    said, untouched = "", False
    for step in range(1, 22):
        backward(model, rank, step)
        before = [p.detach().clone() for p in model.parameters()]
        if step == at and rank == 1:
            next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
        try:
            optimizer.step()
        except FloatingPointError as error:
            said = str(error)
            untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            break
    return [said, untouched]


@pytest.mark.parametrize(("at", "told"), [(2, 2), (5, 5), (19, 20)])
def test_a_nan_is_told_by_all_when_it_is_exchanged(pool: WorkerPool, at: int, told: int) -> None:
    for said, untouched in pool.run(one_nan, 2, at):
        assert f"step {told}: a gradient holds a NaN or infinity" in said
        assert ("go back to a checkpoint" in said) == (at == 19)
        if at != 19:  # else one replica has moved along the NaN already
            assert untouched


def bytes_by_step(rank: int, world_size: int) -> list[int]:
    model = nn.Linear(512, 512, bias=False)
    nn.init.ones_(model.weight)
    meter, sent = Meter(), []
    optimizer = ZeroOneAdam(model.parameters(), meter=meter, **SCHEDULE)
    for _ in range(20):
        before = meter.sent[REPLICAS]
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        sent.append(meter.sent[REPLICAS] - before)
    return sent


def test_what_is_sent_at_which_step(pool: WorkerPool) -> None:
    (sent, _) = pool.run(bytes_by_step, 2)
    plain = 4 * 512 * 512
    for step, count in enumerate(sent, start=1):
        if step in VARIANCE_STEPS:
            assert count == plain
        elif step in EXCHANGE_STEPS:
            assert 0 < count < plain / 28
        else:
            assert count == 0
