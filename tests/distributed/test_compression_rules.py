"""Rules and masks under DDP's hook, in the optimizers that exchange momentum, and in runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import penstock
from penstock.compression import (
    DDPCompression,
    OneBitAdam,
    OneBitLamb,
    ParameterRules,
    ZeroOneAdam,
    create_compression_algorithm,
    ddp_compression_hook,
)
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens

RULES = ParameterRules(full_precision=("embed*",), min_dimensions=2)
SEEN = torch.tensor([True, False] * 6).unsqueeze(1)


def network() -> nn.ModuleDict:
    torch.default_generator.manual_seed(3)
    layers = {"embed": nn.Linear(20, 30), "first": nn.Linear(30, 12, bias=False), "second": nn.Linear(12, 25)}
    return nn.ModuleDict(layers).double()


def gradients_of_a_step(made: nn.ModuleDict, wrapped: Any, rank: int, step: int) -> dict[str, Tensor]:
    """Only every second row of ``first`` gets a gradient."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    made.zero_grad()
    wrapped(torch.randn(8, 20, dtype=torch.float64, generator=generator)).square().mean().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


class Chain(nn.Module):
    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers["first"](torch.tanh(self.layers["embed"](x))))
        out: Tensor = self.layers["second"](hidden * SEEN.view(-1))
        return out


def under_ddp(rank: int, world_size: int) -> list[Any]:
    layers = network()
    wrapped = DistributedDataParallel(Chain(layers), bucket_cap_mb=0.002)
    state = DDPCompression(
        create_compression_algorithm("onebit", {"block_size": 64}),
        rules=RULES,
        masks={"first.weight": SEEN},
        named_parameters=layers.named_parameters(),
    )
    wrapped.register_comm_hook(state, ddp_compression_hook)
    got = [gradients_of_a_step(layers, wrapped, rank, step) for step in range(4)]
    saved = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.state_dict().items()}
    state.load_state_dict(saved)
    again = state.state_dict()  # before any bucket has asked for its memory
    kept = again.keys() == saved.keys() and all(
        torch.equal(saved[key], again[key]) for key in saved if isinstance(saved[key], Tensor)
    )
    return [got, sum(int((value == 0).sum()) for key, value in saved.items() if key.endswith("worker")), saved, kept]


def test_ddps_buckets_are_parted_by_rules_and_cut_by_masks(pool: WorkerPool) -> None:
    (ours, zeros, saved, kept), (theirs, *_) = pool.run(under_ddp, 2)
    for step, (got, other) in enumerate(zip(ours, theirs, strict=True)):
        parts = []
        for rank in range(2):
            layers = network()
            parts.append(gradients_of_a_step(layers, Chain(layers), rank, step))
        for name, gradient in got.items():
            assert torch.equal(gradient, other[name])
            mean = (parts[0][name] + parts[1][name]) / 2
            if name in ("first.weight", "second.weight"):
                assert not torch.allclose(gradient, mean)
            else:
                torch.testing.assert_close(gradient, mean, rtol=1e-12, atol=1e-15)
        assert (got["first.weight"][1::2] == 0).all()
        assert (got["first.weight"][::2] != 0).all()
    # Nothing is owed where the mask is zero: to half of the rows of 30 elements.
    assert zeros == 6 * 30
    assert sum(value.numel() for key, value in saved.items() if key.endswith("worker")) == 12 * 30 + 25 * 12
    assert kept


def fixed_gradients(rank: int, step: int, named: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for name, parameter in named.items():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "first.weight":
            parameter.grad *= SEEN


def train_two(rank: int, world_size: int, make: Any, options: dict[str, Any]) -> list[Any]:
    """Weights with the momentum of all uncompressed, and with rules and masks; what is owed, and where."""
    results: list[Any] = []
    for algorithm, chosen in (("none", {}), ("onebit", {"rules": RULES, "masks": {"first.weight": SEEN}})):
        layers = network()
        named = dict(layers.named_parameters())
        optimizer = make(list(named.items()), lr=1e-2, algorithm=algorithm, **options, **chosen)
        for step in range(12):
            fixed_gradients(rank, step, named)
            optimizer.step()
        results.append({name: p.detach().clone() for name, p in named.items()})
    errors = optimizer.error_state()
    return [*results, {key: value.clone() for key, value in errors.items() if isinstance(value, Tensor)}]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (OneBitAdam, {"freeze_step": 3}),
        (OneBitLamb, {"freeze_step": 3}),
        (ZeroOneAdam, {"var_freeze_step": 3, "local_step_scaler": 4, "local_step_clipper": 2}),
    ],
)
def test_momentum_follows_rules_and_masks(pool: WorkerPool, make: Any, options: dict[str, Any]) -> None:
    start = dict(network().named_parameters())
    answers = pool.run(train_two, 2, make, options)
    for plain, ruled, errors in answers:
        for name, weight in ruled.items():
            assert torch.equal(weight, answers[0][1][name])
            if name in ("first.weight", "second.weight"):
                assert not torch.allclose(weight, plain[name], rtol=1e-4)
            else:  # LAMB multiplies a momentum by a scale and divides it again
                torch.testing.assert_close(weight, plain[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(ruled["first.weight"][1::2], start["first.weight"][1::2])  # rows without gradients stay
        owed = [value for key, value in errors.items() if key.endswith("worker")]
        assert len(owed) == 1  # only the two matrices, in one bucket
        assert int((owed[0][: 12 * 30].view(12, 30)[1::2] != 0).sum()) == 0
        assert int((owed[0][: 12 * 30] != 0).sum()) == 6 * 30


def in_a_run(rank: int, world_size: int, settings: dict[str, Any]) -> list[Any]:
    with penstock.initialize(model(layers=2), settings, training_data=tokens()) as engine:
        losses = [engine.train_batch() for _ in range(4)]
        names = {id(p): name for p, name in ((p, engine.parts.shared.names[id(p)]) for p in engine.stage.parameters())}
        sizes = {names[id(p)]: p.numel() for p in engine.stage.parameters()}
        owed = sum(v.numel() for k, v in engine.optimizer.error_state().items() if k.endswith("worker"))  # type: ignore[attr-defined]
        return [losses, sizes, owed]


def test_a_run_takes_rules_for_momentum(pool: WorkerPool) -> None:
    made = config(replicas=2, precision="float32", dropping=False, steps=4)
    made["optimizer"] |= {"name": "onebit_adam", "freeze_step": 2, "min_dimensions": 2, "full_precision": ["*qkv*"]}
    (losses, sizes, owed), (others, *_) = pool.run(in_a_run, 2, made)
    assert losses == others
    vectors = sum(size for name, size in sizes.items() if name.endswith("bias") or "norm" in name)
    full = vectors + sum(size for name, size in sizes.items() if "qkv" in name and not name.endswith("bias"))
    assert any("qkv" in name for name in sizes)
    assert vectors > 0
    assert owed == sum(sizes.values()) - full  # all matrices fill whole cache lines here


def test_names_are_asked_for() -> None:
    parameters = dict(network().named_parameters())
    algorithm = create_compression_algorithm("onebit")
    with pytest.raises(ValueError, match=r"OneBitAdam\(model.named_parameters\(\), ...\)"):
        OneBitAdam(parameters.values(), rules=RULES)
    OneBitAdam(parameters.values(), rules=ParameterRules(min_dimensions=2))  # goes without names
    with pytest.raises(ValueError, match=r"unknown parameter in masks: 'firt.weight'.*did you mean 'first.weight'"):
        ZeroOneAdam(parameters.items(), masks={"firt.weight": SEEN})
    with pytest.raises(ValueError, match=r"mask of first.weight has shape \(12,\).*\(12, 30\)"):
        OneBitLamb(parameters.items(), masks={"first.weight": SEEN.view(-1)})
    with pytest.raises(ValueError, match=r"give named_parameters=model.named_parameters\(\)"):
        DDPCompression(algorithm, rules=RULES)
    with pytest.raises(ValueError, match=r"did you mean 'first\.weight'"):
        DDPCompression(algorithm, masks={"firt.weight": SEEN}, named_parameters=parameters.items())
