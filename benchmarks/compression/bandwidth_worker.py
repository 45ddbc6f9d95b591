"""One rank of one cell of :mod:`benchmarks.compression.bandwidth`: steps of a contender, timed and counted.

The model is sixteen square layers, 25 M parameters. Its compute is a sleep after each layer's turn in the backward
pass, the same for every contender: a processor that is busy elsewhere, as a GPU would be, which leaves this one to
the exchange. (The outer products that make the gradients come on top, the same for every contender.)
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compression.bandwidth_prediction import NETWORK, measure_ranks
from penstock.compression import (
    DDPCompression,
    DiLoCo,
    OneBitAdam,
    SparseLoCo,
    create_compression_algorithm,
    ddp_compression_hook,
)
from penstock.compression.local import LocalUpdates

LAYERS: Final = 16
WIDTH: Final = 1250
PARAMETERS: Final = LAYERS * (WIDTH + 1) * WIDTH
SHAPES: Final = [shape for _ in range(LAYERS) for shape in ((WIDTH, WIDTH), (WIDTH,))]
COMPUTE_S: Final = 0.1
PERIOD: Final = 30
"""Steps between two meetings of the methods that train apart."""
WARMUP: Final = 3
_AT_LEAST, _AT_MOST, _ABOUT_S = 3, 12, 6.0

Run = tuple[nn.Module, torch.optim.Optimizer, Any]


class _Compute(torch.autograd.Function):
    """The identity, whose backward pass takes a layer's share of the compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(COMPUTE_S / LAYERS)
        return gradients[0]


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return _Compute.apply(self.linear(x))  # type: ignore[no-untyped-call, no-any-return]


def make(contender: str) -> Run:
    """A model, its optimizer and what to enter while it trains, for a contender's name."""
    torch.manual_seed(0)
    model = nn.Sequential(*(_Layer() for _ in range(LAYERS)))
    kind, _, name = contender.partition(" ")
    if kind == "1-bit":
        # One step of warm-up: from then on the momentum is compressed.
        return model, OneBitAdam(model.parameters(), lr=1e-6, freeze_step=1), nullcontext()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    if contender == NETWORK:
        return model, optimizer, nullcontext()  # its compute alone
    if kind == "DiLoCo":
        return model, optimizer, DiLoCo(optimizer, PERIOD, algorithm=None if name == "float32" else name)
    if kind == "SparseLoCo":
        return model, optimizer, SparseLoCo(optimizer, PERIOD)
    # With several buckets torch's PowerSGD sums one rank's bucket with another's, and gloo ends the process.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1000 if contender == "torch PowerSGD" else None)
    if kind == "penstock":
        algorithm = create_compression_algorithm(name)
        wrapped.register_comm_hook(DDPCompression(algorithm, warmup_steps=1), ddp_compression_hook)
    elif contender == "torch fp16 hook":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif contender == "torch PowerSGD":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return wrapped, optimizer, nullcontext()


def measure(contender: str) -> dict[str, Any]:
    """Steps of a contender after warm-up: seconds and bytes of each, the kernel's count."""
    model, optimizer, context = make(contender)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(8, WIDTH, generator=generator)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with context:
        # A period is what repeats: it is timed as one, and shared out over its steps.
        period = PERIOD if isinstance(context, LocalUpdates) else 1
        unit: Callable[[], None] = lambda: [step() for _ in range(period)] and None  # noqa: E731
        for _ in range(WARMUP if period == 1 else 1):
            last = _timed(unit)
        # All ranks make as many steps as the slowest has time for.
        slowest = torch.tensor(last)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        least, most = (_AT_LEAST, _AT_MOST) if period == 1 else (1, 2)
        rounds = int(min(max(_ABOUT_S // float(slowest), least), most))
        dist.barrier()
        before, cpu = _sent(), time.process_time()
        seconds = [_timed(unit) / period for _ in range(rounds)]
        cpu = time.process_time() - cpu
        dist.barrier()
        sent = _sent() - before
    return {"seconds": seconds, "bytes": sent / (rounds * period), "cpu_s": cpu / (rounds * period)}


def _timed(unit: Callable[[], None]) -> float:
    start = time.perf_counter()
    unit()
    return time.perf_counter() - start


def _sent() -> int:
    return int(Path("/sys/class/net/veth0/statistics/tx_bytes").read_text())


def main(contender: str) -> None:
    """Join the others, measure, and print what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = measure(contender)
    result["median"] = statistics.median(result["seconds"])
    if contender == NETWORK:
        result |= measure_ranks()
    print(json.dumps(result), flush=True)
    dist.barrier()
    os._exit(0)  # torch's PowerSGD leaves threads behind that do not end


if __name__ == "__main__":
    main(sys.argv[1])
