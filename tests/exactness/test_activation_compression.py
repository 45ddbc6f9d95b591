"""Compressed activations: the run is the single-process run whose values are rounded where the pipeline is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock._core.meter import ACTIVATIONS
from penstock.pipe.value import map_tensors
from penstock.runtime.activation_codec import rotate
from support.pool import WorkerPool
from support.run_jobs import LENGTH, config, model, tokens

STEPS = 3
BOUNDS = {2: [0, 3, 7], 4: [0, 2, 3, 5, 7]}
ELEMENTS = LENGTH * 16  # of an activation
Rounding = Callable[[Tensor], Tensor]


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def by_block(x: Tensor, size: int, top: float, nearest: Rounding) -> Tensor:
    parts = []
    for block in x.reshape(-1).split(size):
        largest = block.abs().max()
        scale = (largest / top).float().to(x.dtype)  # it travels in float32
        parts.append(nearest(block * (top / largest)) * scale if largest > 0 else torch.zeros_like(block))
    return torch.cat(parts).view(x.shape)


def fp8(x: Tensor) -> Tensor:
    return by_block(x, 1024, 448.0, lambda y: y.float().to(torch.float8_e4m3fn).to(y.dtype))


def int8(x: Tensor) -> Tensor:
    return by_block(x, 256, 127.0, torch.round)


def rotated_int4(x: Tensor) -> Tensor:
    return rotate(by_block(rotate(x), 128, 7.0, torch.round), back=True).view(x.shape)


ROUNDINGS = {"bf16": (bf16, bf16), "fp8": (fp8, fp8), "int8": (int8, int8), "int4": (rotated_int4, int8)}


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Rounding, backward: Rounding) -> Tensor:
        ctx.backward_rounding = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.backward_rounding(gradients[0]), None, None


class RoundedInput(nn.Module):
    """A layer behind a cut."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.roundings = ROUNDINGS[name]

    def forward(self, value: Any) -> Any:
        return self.layer(map_tensors(self.seen, value))

    def seen(self, tensor: Tensor) -> Tensor:
        return _Rounded.apply(tensor, *self.roundings) if tensor.requires_grad else tensor


def run(settings: dict[str, Any], rounded: dict[int, str]) -> Any:
    """Evaluated and trained losses, gradients' norms, final weights, and the bytes between stages."""
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        engine.stage.wrap_layers(lambda index, layer: RoundedInput(layer, rounded[index]) if index in rounded else None)
        row = torch.from_numpy(tokens(1)[0])[None]
        batch = row[:, :-1].contiguous(), row[:, 1:].contiguous()
        evaluated = engine.eval_batch(iter([batch] * engine.parts.cut.micro_batches))
        evaluation_bytes = engine.parts.meter.sent[ACTIVATIONS]
        losses, norms = [], []
        for _ in range(STEPS):
            losses.append(engine.train_batch())
            assert engine.last is not None
            norms.append(engine.last.gradient_norm)
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
        meter = engine.parts.meter
        counted = meter.sent[ACTIVATIONS] - evaluation_bytes, meter.spared_sent[ACTIVATIONS]
    return evaluated, losses, norms, weights, counted


def job(rank: int, world_size: int, settings: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    return run(settings, {})


def settings(ranks: int, schedule: str = "1f1b", stages: int = 0, **pipe: Any) -> dict[str, Any]:
    made = config(stages=ranks, schedule=schedule, steps=STEPS + 1)  # as long as the warm-up
    made["optimizer"]["gradient_clipping"] = 0.5
    if stages:
        made["pipe"]["partition_method"] = BOUNDS[stages]
    made["pipe"] |= pipe
    return made


@pytest.mark.parametrize(
    ("name", "schedule", "stages", "cuts"),
    [
        ("bf16", "1f1b", 2, [3]),
        ("fp8", "1f1b", 2, [3]),
        ("int8", "interleaved_1f1b", 4, [2, 3, 5]),
        ("int4", "zb_v", 4, [2, 5]),  # stages 1 and 2 lie on the same rank: nothing is rounded between them
        ("int8", "zb_h1", 2, [3]),
    ],
)
def test_it_equals_one_process_that_rounds_at_the_cuts(
    pool: WorkerPool, name: str, schedule: str, stages: int, cuts: list[int]
) -> None:
    made = settings(2, schedule, stages, activation_compression=name)
    answers = pool.run(job, 2, made)
    plain = run(settings(1), {})
    alone = run(settings(1), dict.fromkeys(cuts, name))
    for evaluated, losses, norms, weights, _ in answers:
        assert evaluated == pytest.approx(plain[0], rel=1e-12)  # evaluation rounds nothing
        assert losses == pytest.approx(alone[1], rel=1e-9)
        assert norms == pytest.approx(alone[2], rel=1e-9)
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[3][key], rtol=1e-8, atol=1e-11)
    assert alone[1] != pytest.approx(plain[1], rel=1e-9)  # it does make a difference


def test_bytes_are_counted_as_sent(pool: WorkerPool) -> None:
    plain = pool.run(job, 2, settings(2, stages=2))
    small = pool.run(job, 2, settings(2, stages=2, activation_compression="int8"))
    messages = 8 * STEPS
    payload = ELEMENTS + 4 * 2  # two blocks of 256 elements
    for (*_, (before, nothing)), (*_, (after, spared)) in zip(plain, small, strict=True):
        assert nothing == 0
        assert spared == messages * (8 * ELEMENTS - payload)
        # Frames start their tensors at multiples of 64 bytes, and say more about encoded ones.
        assert abs(before - after - spared) <= messages * 256
    assert small[0][4][0] < 0.4 * plain[0][4][0]


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        ({"stages": 2, "activation_compression": "int7"}, "did you mean 'int"),
        ({"activation_compression": "int8"}, "from one pipeline rank to the next, and this run has 1"),
    ],
)
def test_what_cannot_be_is_refused(pipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        penstock.initialize(model(), {**config(dropping=False), "pipe": pipe}, training_data=tokens())
