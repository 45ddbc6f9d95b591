from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from penstock._core.meter import REPLICAS, Meter
from penstock.compression import OneBitAdam
from support.compression_reference import ReferenceOneBitAdam
from support.pool import WorkerPool

SHAPES = [(30, 64), (8,), (1200,)]  # whole cache lines in float64, so the bucket has no gaps
NUMEL = sum(int(np.prod(shape)) for shape in SHAPES)


def start() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).normal(size=NUMEL)


def gradient(x: np.ndarray[Any, Any], rank: int, step: int) -> np.ndarray[Any, Any]:
    """A noisy bowl, steeper in some directions; the last 8 elements of the first tensor are hardly ever seen."""
    noise = np.random.default_rng([rank, step]).normal(size=NUMEL)
    slope = np.linspace(0.1, 2.0, NUMEL) * (x - 0.5 * rank) + 0.3 * noise
    slope[1912:1920] *= 1e-9 if step < 20 else 1.0
    return slope


def train(rank: int, world_size: int, steps: int, options: dict[str, Any]) -> list[torch.Tensor]:
    x = torch.from_numpy(start())
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    parameters = [nn.Parameter(p.view(s).clone()) for p, s in zip(x.split(sizes), SHAPES, strict=True)]
    optimizer = OneBitAdam(parameters, **options)
    history = []
    for step in range(steps):
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        g = torch.from_numpy(gradient(flat.numpy(), rank, step))
        for p, part in zip(parameters, g.split(sizes), strict=True):
            p.grad = part.view(p.shape)
        assert optimizer.compressing == (step >= options["freeze_step"])
        optimizer.step()
        history.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
    return history


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("bias_correction", "variance_floor", "weight_decay"), [(True, 0.05, 0.1), (False, 0.0, 0.0), (True, 0.3, 0.0)]
)
def test_it_is_the_papers_algorithm(
    pool: WorkerPool, ranks: int, bias_correction: bool, variance_floor: float, weight_decay: float
) -> None:
    options: dict[str, Any] = {
        "lr": 1e-2,
        "betas": (0.9, 0.99),
        "eps": 1e-3 if variance_floor == 0 else 1e-8,
        "weight_decay": weight_decay,
        "freeze_step": 12,
        "bias_correction": bias_correction,
        "variance_floor": variance_floor,
    }
    steps = 30
    answers = pool.run(train, ranks, steps, options)
    reference = ReferenceOneBitAdam(start(), ranks, **options)
    for step in range(steps):
        reference.step([gradient(reference.x, rank, step) for rank in range(ranks)])
        tolerance = 1e-11 if step < 12 else 1e-5  # after the freeze a scale's float32 rounding may fall either way
        np.testing.assert_allclose(answers[0][step].numpy(), reference.x, rtol=tolerance, atol=tolerance)
        for history in answers[1:]:
            assert torch.equal(history[step], answers[0][step])  # replicas never drift


def odd_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1)).to(dtype)


def backward(model: nn.Module, rank: int, step: int) -> float:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 13, generator=torch.Generator().manual_seed(50 * step + rank)).to(dtype)
    y = x.sin().sum(1, keepdim=True)
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.item()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": [first], "weight_decay": 0.1}, {"params": rest}]


def stop_and_go_on(rank: int, world_size: int, stop: int) -> list[bool]:
    def fresh() -> tuple[nn.Module, OneBitAdam]:
        model = odd_model()
        return model, OneBitAdam(groups(model), lr=3e-3, freeze_step=5, bucket_bytes=400)

    model, optimizer = fresh()
    saved: dict[str, Any] = {}
    for step in range(12):
        if step == stop:
            saved = {
                "model": {k: v.clone() for k, v in model.state_dict().items()},
                "optimizer": {
                    "state": {
                        i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()
                    },
                    "param_groups": optimizer.state_dict()["param_groups"],
                },
                "errors": {k: v.clone() for k, v in optimizer.error_state().items()},
            }
        backward(model, rank, step)
        optimizer.step()
    resumed, other = fresh()
    for step in range(8):  # whatever it did before, past its own freeze
        backward(resumed, rank, step + 100)
        other.step()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    fits = other.load_error_state(saved["errors"])
    for step in range(stop, 12):
        backward(resumed, rank, step)
        other.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    errors = other.error_state()
    return [fits, same, all(torch.equal(e, errors[k]) for k, e in optimizer.error_state().items())]


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_a_resumed_run_is_bitwise_the_same(pool: WorkerPool, stop: int) -> None:
    assert pool.run(stop_and_go_on, 2, stop) == [[True, True, True]] * 2


def misfit(rank: int, world_size: int) -> list[bool]:
    model = odd_model()
    optimizer = OneBitAdam(model.parameters(), freeze_step=1)
    for step in range(3):
        backward(model, rank, step)
        optimizer.step()
    owed = any(bool(e.any()) for e in optimizer.error_state().values())
    fits = optimizer.load_error_state({"bucket_000.worker": torch.zeros(3)})
    return [owed, fits, any(bool(e.any()) for e in optimizer.error_state().values())]


def test_error_memories_of_another_layout_start_from_zero(pool: WorkerPool) -> None:
    assert pool.run(misfit, 2) == [[True, False, False]] * 2


def converge(rank: int, world_size: int, freeze_step: int) -> float:
    model = odd_model()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=freeze_step)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=400)
    for step in range(400):
        backward(model, rank, step)
        optimizer.step()
        scheduler.step()
    return sum(backward(model, rank, 1000 + i) for i in range(20)) / 20


def test_it_converges_like_adam(pool: WorkerPool) -> None:
    plain = sum(pool.run(converge, 2, 10_000)) / 2
    one_bit = sum(pool.run(converge, 2, 80)) / 2
    torch.manual_seed(0)
    untrained = sum(backward(odd_model(), 0, 1000 + i) for i in range(20)) / 20
    assert plain < 0.15 * untrained
    assert one_bit < 2 * plain


def one_replica_has_no_gradient(rank: int, world_size: int) -> torch.Tensor:
    p = nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    optimizer = OneBitAdam([p], lr=0.1, freeze_step=2)
    for _ in range(4):
        p.grad = torch.ones_like(p) if rank == 0 else None
        optimizer.step()
    return p.detach()


def test_a_missing_gradient_counts_as_zeros(pool: WorkerPool) -> None:
    ours, theirs = pool.run(one_replica_has_no_gradient, 2)
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.bfloat16
    # A constant gradient: momentum over deviation is 1 at every step of Adam, and the signs are exact.
    torch.testing.assert_close(ours.float(), torch.full((40,), 0.6), atol=0.03, rtol=0)


def one_nan(rank: int, world_size: int, freeze_step: int) -> list[Any]:
    model = odd_model()
    optimizer = OneBitAdam(model.parameters(), freeze_step=freeze_step)
    for step in range(4):
        backward(model, rank, step)
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    backward(model, rank, 4)
    if rank == 1:
        next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
    said = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        said = str(error)
    untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    untouched &= all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    backward(model, rank, 5)
    optimizer.step()
    return [said, untouched, all(bool(p.isfinite().all()) for p in model.parameters())]


@pytest.mark.parametrize("freeze_step", [2, 100])
def test_a_nan_on_one_replica_raises_on_all_and_spoils_nothing(pool: WorkerPool, freeze_step: int) -> None:
    for said, untouched, finite in pool.run(one_nan, 2, freeze_step):
        assert "step 5: a gradient holds a NaN or infinity on some replica (group 0)" in said
        assert untouched
        assert finite


def bytes_by_step(rank: int, world_size: int) -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    meter = Meter()
    optimizer = OneBitAdam(model.parameters(), freeze_step=1, meter=meter)
    sent = []
    for _ in range(2):
        before = meter.sent[REPLICAS] + meter.received[REPLICAS]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        sent.append(meter.sent[REPLICAS] + meter.received[REPLICAS] - before)
    return sent


@pytest.mark.parametrize("ranks", [2, 4])
def test_after_warm_up_a_million_parameters_take_a_twenty_eighth_of_the_bytes(pool: WorkerPool, ranks: int) -> None:
    for plain, one_bit in pool.run(bytes_by_step, ranks):
        assert plain == 2 * 2 * (ranks - 1) * 4 * 4 * (512 * 512 + 512) // ranks
        assert 28 * one_bit <= plain


def bound_to_pairs(rank: int, world_size: int) -> list[Any]:
    """Two pairs of replicas in one world, as two pipeline stages are: each pair trains by itself."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    meter = Meter()
    model, alone = odd_model(), odd_model()
    optimizer, single = OneBitAdam(model.parameters(), freeze_step=2), OneBitAdam(alone.parameters(), freeze_step=2)
    optimizer.bind_exchange(group=pairs[rank // 2], replicas=2, meter=meter, watcher=None)
    single.bind_exchange(group=None, replicas=1, meter=None, watcher=None)
    for step in range(5):
        backward(model, rank, step)
        optimizer.step()
        backward(alone, rank, step)
        single.step()
    said = ""
    try:
        optimizer.bind_exchange(group=None, replicas=4, meter=None, watcher=None)
    except ValueError as error:
        said = str(error)
    flat = [torch.cat([p.detach().view(-1) for p in m.parameters()]) for m in (model, alone)]
    return [*flat, meter.sent[REPLICAS], single.error_state(), said]


def test_an_engine_says_who_the_replicas_are(pool: WorkerPool) -> None:
    answers = pool.run(bound_to_pairs, 4)
    together, alone, sent, memories, said = zip(*answers, strict=True)
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[2], together[3])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(alone[0], alone[1])
    assert min(sent) > 0
    assert memories == ({},) * 4
    assert all("before the first step, but 5 were made" in text for text in said)


def owe(rank: int, world_size: int, states: list[dict[str, Any]] | None, name: str) -> tuple[dict[str, Any], bool]:
    model = odd_model()
    optimizer = OneBitAdam(groups(model), lr=3e-3, freeze_step=2, bucket_bytes=400, algorithm=name)
    fits = True
    if states is None:
        for step in range(5):
            backward(model, rank, step)
            optimizer.step()
    else:
        fits = optimizer.load_error_states(states)
    return {name: memory.clone() for name, memory in optimizer.error_state().items()}, fits


def owed(states: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the next average is still to get, by bucket: without a second phase, each replica's share was divided."""
    names = {name.partition(".")[0] for name in states[0]}
    return {
        name: sum(s[f"{name}.worker"] for s in states) / len(states) + torch.cat([s[f"{name}.server"] for s in states])
        if f"{name}.server" in states[0]
        else sum(s[f"{name}.worker"] for s in states)
        for name in names
    }


@pytest.mark.parametrize(("before", "after", "name"), [(3, 2, "onebit"), (2, 4, "randomk")])
def test_another_number_of_replicas_owes_the_same(pool: WorkerPool, before: int, after: int, name: str) -> None:
    old = [state for state, _ in pool.run(owe, before, None, name)]
    answers = pool.run(owe, after, old, name)
    assert all(fits for _, fits in answers)
    then, now = owed(old), owed([state for state, _ in answers])
    assert then.keys() == now.keys()
    for name, debt in then.items():
        assert debt.any()
        torch.testing.assert_close(now[name], debt, rtol=1e-5, atol=1e-7)
