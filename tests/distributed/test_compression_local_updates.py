from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from penstock._core.meter import REPLICAS, Meter
from penstock.compression import (
    DiLoCo,
    LocalSGD,
    LocalUpdates,
    MuLoCo,
    MuonAdamW,
    OuterStep,
    SparseLoCo,
    StreamingDiLoCo,
    create_compression_algorithm,
)
from support.compression_local_reference import Average, ReferenceLocal, SparseAverage, mean
from support.compression_reference import ReferenceAverage
from support.pool import WorkerPool

SIZES = [1024, 64, 960, 512]  # whole cache lines in float64, so buckets have no gaps
NUMEL = sum(SIZES)
HALVES = [slice(0, 1088), slice(1088, NUMEL)]
LR = 0.05


def start() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).normal(size=NUMEL)


def gradient(x: np.ndarray[Any, Any], rank: int, step: int) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([rank, step]).normal(size=NUMEL)
    return np.linspace(0.1, 2.0, NUMEL) * (x - 0.5 * rank) + 0.3 * noise


def train(rank: int, world_size: int, steps: int, options: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parameters = [nn.Parameter(p.clone()) for p in torch.from_numpy(start()).split(SIZES)]
    optimizer = torch.optim.SGD(parameters, lr=LR)
    keywords = dict(options)
    outer = OuterStep(*(keywords.pop(name) for name in ("outer_lr", "outer_momentum", "nesterov")))
    if keywords.pop("halves", False):
        keywords["fragments"] = [parameters[:2], parameters[2:]]
    history = []
    with LocalUpdates(optimizer, outer=outer, **keywords) as local:
        for step in range(steps):
            flat = torch.cat([p.detach() for p in parameters])
            g = torch.from_numpy(gradient(flat.numpy(), rank, step))
            for p, part in zip(parameters, g.split(SIZES), strict=True):
                p.grad = part
            optimizer.step()
            mine = torch.cat([p.detach() for p in parameters])
            with local.common_weights():
                common = torch.cat([p.detach() for p in parameters])
            assert torch.equal(torch.cat([p.detach() for p in parameters]), mine)
            history.append((mine, common))
    return history


CASES: dict[str, dict[str, Any]] = {
    "averaging": {"period": 3},
    "averaging, compressed": {"period": 3, "algorithm": "onebit"},
    "diloco": {"period": 4, "outer_lr": 0.7, "outer_momentum": 0.9},
    "diloco without nesterov": {"period": 4, "outer_lr": 0.5, "outer_momentum": 0.5, "nesterov": False},
    "diloco, compressed": {"period": 4, "outer_lr": 0.7, "outer_momentum": 0.9, "algorithm": "onebit"},
    "fragments in turn": {"period": 4, "outer_lr": 0.7, "outer_momentum": 0.9, "halves": True},
    "streaming": {"period": 6, "outer_lr": 0.7, "outer_momentum": 0.9, "halves": True, "overlap": 1, "mixing": 0.5},
    "streaming, far behind, compressed": {
        "period": 6,
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
        "halves": True,
        "overlap": 5,
        "mixing": 0.25,
        "algorithm": "onebit",
    },
    "averages on the way": {"period": 5, "overlap": 4, "mixing": 0.5},
    "sparse": {
        "period": 4,
        "algorithm": create_compression_algorithm("topk_int2", {"chunk_size": 256, "keep": 8}),
        "error_decay": 0.95,
    },
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_papers_algorithm(pool: WorkerPool, ranks: int, case: str) -> None:
    options = {"outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": True, **CASES[case]}
    steps = 26
    answers = pool.run(train, ranks, steps, options)
    fragments = HALVES if options.pop("halves", False) else [slice(0, NUMEL)]
    algorithm = options.pop("algorithm", None)
    decay = options.pop("error_decay", 1.0)
    averages: list[Average] = [mean for _ in fragments]
    if case == "sparse":
        averages = [SparseAverage(NUMEL, ranks, chunk=256, keep=8, beta=decay)]
    elif algorithm is not None:
        averages = [ReferenceAverage(part.stop - part.start, ranks) for part in fragments]
    reference = ReferenceLocal(start(), ranks, lr=LR, fragments=fragments, averages=averages, **options)
    tolerance = 1e-12 if algorithm is None else 1e-5  # a scale's float32 rounding may fall either way
    for step in range(steps):
        reference.step([gradient(reference.x[rank], rank, step) for rank in range(ranks)])
        for rank in range(ranks):
            mine, common = (tensor.numpy() for tensor in answers[rank][step])
            np.testing.assert_allclose(mine, reference.x[rank], rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(common, reference.anchor, rtol=tolerance, atol=tolerance)
            assert np.array_equal(common, answers[0][step][1].numpy())  # what all agree on is the same bits


def odd_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1)).to(dtype)


def backward(model: nn.Module, rank: int, step: int) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 13, generator=torch.Generator().manual_seed(50 * step + rank)).to(dtype)
    model.zero_grad()
    (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()


def beside_ddp(rank: int, world_size: int) -> list[float]:
    ours, theirs = odd_model(), DistributedDataParallel(odd_model())
    mine = torch.optim.SGD(ours.parameters(), lr=0.1)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1)
    with LocalSGD(mine, period=1):
        for step in range(10):
            backward(ours, rank, step)
            mine.step()
            backward(theirs, rank, step)
            other.step()
    return [float((p - q).abs().max()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]


def test_averaging_at_every_step_is_data_parallel_sgd(pool: WorkerPool) -> None:
    for differences in pool.run(beside_ddp, 3):
        assert max(differences) < 1e-12


def averaging_twice(rank: int, world_size: int) -> list[float]:
    models = [odd_model(), odd_model()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    sgd = LocalSGD(optimizers[0], period=4)
    outer = DiLoCo(optimizers[1], period=4, outer_lr=1.0, outer_momentum=0.0, algorithm="none")
    with sgd, outer:
        for step in range(12):
            for model, optimizer in zip(models, optimizers, strict=True):
                backward(model, rank, step)
                optimizer.step()
    return [float((p - q).abs().max()) for p, q in zip(*(m.parameters() for m in models), strict=True)]


def test_diloco_with_a_plain_outer_step_is_averaging(pool: WorkerPool) -> None:
    for differences in pool.run(averaging_twice, 2):
        assert max(differences) < 1e-12


def synchronized(rank: int, world_size: int, options: dict[str, Any]) -> list[Any]:
    model = odd_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StreamingDiLoCo(optimizer, period=5, fragments=2, **options) as local:
        for step in range(8):
            backward(model, rank, step)
            optimizer.step()
        apart = [p.detach().clone() for p in model.parameters()]
        local.synchronize()
        for step in range(8, 16):
            backward(model, rank, step)
            optimizer.step()
        local.synchronize()
    with local.common_weights():
        common = [p.detach().clone() for p in model.parameters()]
    return [apart, [p.detach() for p in model.parameters()], common]


@pytest.mark.parametrize("overlap", [0, 3])
def test_synchronize_ends_what_is_on_its_way_and_makes_all_equal(pool: WorkerPool, overlap: int) -> None:
    first, second = pool.run(synchronized, 2, {"overlap": overlap, "algorithm": "onebit"})
    assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    for mine, theirs, common in zip(first[1], second[1], first[2], strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, common)


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def stop_and_go_on(rank: int, world_size: int, stop: int, options: dict[str, Any], dtype: torch.dtype) -> list[bool]:
    def fresh() -> tuple[nn.Module, MuonAdamW, LocalUpdates]:
        model = odd_model(dtype)
        optimizer = MuonAdamW(model.parameters(), lr=1e-2)
        return model, optimizer, LocalUpdates(optimizer, outer=OuterStep(0.7, 0.9), bucket_bytes=400, **options)

    model, optimizer, local = fresh()
    saved: list[Any] = []
    with local:
        for step in range(20):
            if step == stop:
                saved = [copied(part.state_dict()) for part in (model, optimizer, local)]
            backward(model, rank, step)
            optimizer.step()
    resumed, inner, other = fresh()
    with other:
        for step in range(9):  # whatever it did before, with something on its way
            backward(resumed, rank, step + 100)
            inner.step()
        for part, state in zip((resumed, inner, other), saved, strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        for step in range(stop, 20):
            backward(resumed, rank, step)
            inner.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    states = [part.state_dict() for part in (local, other)]
    keys = states[0].keys() == states[1].keys()
    tensors = [k for k, v in states[0].items() if isinstance(v, torch.Tensor)]
    return [same, keys, all(torch.equal(states[0][k], states[1][k]) for k in tensors)]


@pytest.mark.parametrize(
    ("stop", "options", "dtype"),
    [
        (7, {"period": 5}, torch.float32),
        (9, {"period": 5, "algorithm": "onebit", "error_decay": 0.9}, torch.float32),
        (9, {"period": 6, "fragments": 3, "overlap": 4, "mixing": 0.5, "algorithm": "onebit"}, torch.float32),
        (9, {"period": 6, "fragments": 3, "overlap": 5, "mixing": 0.5}, torch.bfloat16),
    ],
)
def test_a_resumed_run_is_bitwise_the_same(
    pool: WorkerPool, stop: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert pool.run(stop_and_go_on, 2, stop, options, dtype) == [[True, True, True]] * 2


def owe(rank: int, world_size: int, states: list[dict[str, Any]] | None) -> tuple[dict[str, Any], bool]:
    model = odd_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    local = DiLoCo(optimizer, period=2, algorithm="onebit", bucket_bytes=400)
    fits = True
    with local:
        if states is not None:
            fits = local.load_rank_states(states)
        else:
            for step in range(5):
                backward(model, rank, step)
                optimizer.step()
        return {name: copied(value) for name, value in local.rank_state().items()}, fits


def owed(states: list[dict[str, Any]]) -> torch.Tensor:
    """What the next average is still to get."""
    names = sorted({name.partition(".")[0] for name in states[0] if name.endswith(".worker")})
    return torch.cat(
        [
            sum(s[f"{name}.worker"] for s in states) / len(states) + torch.cat([s[f"{name}.server"] for s in states])
            for name in names
        ]
    )


def test_another_number_of_replicas_owes_the_same(pool: WorkerPool) -> None:
    old = [state for state, _ in pool.run(owe, 3, None)]
    answers = pool.run(owe, 2, old)
    assert all(fits for _, fits in answers)
    assert all(state["step"] == 5 for state, _ in answers)
    assert owed(old).any()
    torch.testing.assert_close(owed([state for state, _ in answers]), owed(old), rtol=1e-5, atol=1e-7)


def bytes_by_step(rank: int, world_size: int, options: dict[str, Any]) -> list[int]:
    model = nn.Linear(512, 512)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    meter, sent = Meter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StreamingDiLoCo(optimizer, meter=meter, **options):
        for _ in range(options["period"] * 2):
            before = meter.sent[REPLICAS]
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            sent.append(meter.sent[REPLICAS] - before)
    return sent


def test_what_is_sent_at_which_step(pool: WorkerPool) -> None:
    numel = 512 * 512 + 512
    sent, _ = pool.run(bytes_by_step, 2, {"period": 10, "fragments": 1, "overlap": 0})
    assert sent == [0] * 9 + [4 * numel] + [0] * 9 + [4 * numel]
    sent, _ = pool.run(bytes_by_step, 2, {"period": 10, "fragments": 2, "overlap": 4})
    assert [step for step, count in enumerate(sent, start=1) if count] == [5, 10, 15, 20]
    assert sent[4] + sent[9] == 4 * numel
    sent, _ = pool.run(bytes_by_step, 2, {"period": 30, "fragments": 1, "algorithm": "onebit"})
    assert sum(sent) / 60 < 4 * numel / 30 / 28  # bytes a step, against an all-reduce's


def bytes_at_thirty(rank: int, world_size: int) -> dict[str, float]:
    """Bytes sent per step by each method at a period of 30, over those of a float32 all-reduce at every step."""
    plain = 2 * 4 * (1024 * 1024 + 1024) * (world_size - 1) / world_size
    result = {}
    methods: dict[str, Any] = {
        "diloco": lambda optimizer, meter: DiLoCo(optimizer, 30, meter=meter),
        "diloco int8": lambda optimizer, meter: DiLoCo(optimizer, 30, algorithm="int8", meter=meter),
        "muloco": lambda optimizer, meter: MuLoCo(optimizer, 30, meter=meter),
        "sparseloco": lambda optimizer, meter: SparseLoCo(optimizer, 30, meter=meter),
    }
    for name, method in methods.items():
        torch.manual_seed(0)
        model, meter = nn.Linear(1024, 1024), Meter()
        optimizer = MuonAdamW(model.parameters()) if name == "muloco" else torch.optim.SGD(model.parameters(), lr=0.1)
        local = method(optimizer, meter)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(rank))
        local.step = 29
        with local:
            optimizer.step()
        result[name] = meter.sent[REPLICAS] / 30 / plain
    return result


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_million_parameters_take_few_bytes_a_step(pool: WorkerPool, ranks: int) -> None:
    for share in pool.run(bytes_at_thirty, ranks):
        assert share["diloco"] == pytest.approx(1 / 30, rel=1e-3)
        assert share["diloco int8"] <= 1 / 100
        assert share["muloco"] <= 1 / 400
        assert share["sparseloco"] <= 1 / 1000


def any_algorithm(rank: int, world_size: int, name: str) -> list[Any]:
    model = odd_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with DiLoCo(optimizer, period=2, algorithm=name) as local:
        for step in range(6):
            backward(model, rank, step)
            optimizer.step()
        assert local.step == 6
    return [[p.detach() for p in model.parameters()], optimizer is local.optimizer]


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8", "bf16", "topk", "powersgd", "dct_topk"])
def test_any_algorithm_compresses_the_ways(pool: WorkerPool, name: str) -> None:
    first, second = pool.run(any_algorithm, 2, name)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first[0], second[0], strict=True))
    start = odd_model(torch.float32).parameters()
    assert not all(torch.equal(mine, before) for mine, before in zip(first[0], start, strict=True))


def one_nan(rank: int, world_size: int) -> list[Any]:
    model = odd_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said, finite = "", False
    with DiLoCo(optimizer, period=4) as local:
        try:
            for step in range(8):
                backward(model, rank, step)
                if step == 5 and rank == 1:
                    next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
                optimizer.step()
        except FloatingPointError as error:
            said = str(error)
        with local.common_weights():
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return [said, finite]


def test_a_nan_on_one_replica_raises_on_all_when_it_is_exchanged(pool: WorkerPool) -> None:
    for said, finite in pool.run(one_nan, 2):
        assert "after step 8: some replica's parameters were not finite" in said
        assert finite


def differing_start(rank: int, world_size: int) -> str:
    model = nn.Linear(3, 3)
    nn.init.constant_(model.weight, float(rank))
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DiLoCo(optimizer, period=4):
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return ""


def test_replicas_that_start_apart_are_told(pool: WorkerPool) -> None:
    assert all("start from different weights" in said for said in pool.run(differing_start, 2))


def converge(rank: int, world_size: int, method: str) -> float:
    model = odd_model(torch.float32)
    if method == "muloco":
        optimizer: torch.optim.Optimizer = MuonAdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        local: LocalUpdates = MuLoCo(optimizer, period=5, algorithm="onebit")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        local = DiLoCo(optimizer, period=5)
    with local:
        for step in range(200):
            backward(model, rank, step)
            optimizer.step()
        local.synchronize()
    x = torch.randn(2000, 13, generator=torch.Generator().manual_seed(1))
    losses = torch.tensor([float((model(x) - x.sin().sum(1, keepdim=True)).square().mean())])
    dist.all_reduce(losses)
    return float(losses) / world_size


@pytest.mark.parametrize("method", ["diloco", "muloco"])
def test_they_learn(pool: WorkerPool, method: str) -> None:
    first, second = pool.run(converge, 2, method)
    assert first == second < 3.0  # of a variance of 6
