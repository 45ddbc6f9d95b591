"""A small run over several processes in which one thing is wrong, for the table of mistakes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import penstock
from penstock.pipe.module import LayerSpec, PipelineModule
from penstock.runtime.engine import Engine
from penstock.runtime.process import Process

WIDTH = 4
FAULTY_STEP = 2
"""The step in which whatever goes wrong while training goes wrong; 1-bit Adam compresses by then."""
STEPS = 2000
"""More than any test waits for: the fault must end the run."""


def settings(*, stages: int = 2, replicas: int = 1, optimizer: str = "adamw", **changes: Any) -> dict[str, Any]:
    """A configuration of 4 micro-batches of one sample per replica and step, and a deadline of 5 s.

    ``changes`` replace whole sections, or with a dotted name one key.
    """
    result: dict[str, Any] = {
        "seed": 3,
        "deadline_s": 5,
        "pipe": {"stages": stages, "schedule": "1f1b", "partition_method": "uniform"},
        "data_parallel": {"replicas": replicas},
        "train": {"global_batch_size": 4 * replicas, "micro_batch_size": 1, "steps": STEPS},
        "optimizer": {"name": optimizer, "lr": 1e-3},
    }
    if optimizer == "onebit_adam":
        result["optimizer"]["freeze_step"] = 1
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            result.setdefault(section, {})[key] = value
        else:
            result[name] = value
    return result


def stamp(folder: str, rank: int) -> None:
    """Note the moment of the fault, the first time."""
    file = Path(folder) / f"fault_{rank}"
    if not file.exists():
        file.write_text(repr(time.time()))


def fault_time(folder: Path) -> float:
    """When the fault happened; of one that needs several ranks, when the last had done its part."""
    return max(float(file.read_text()) for file in folder.glob("fault_*"))


class Unwell(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ArithmeticError("the gradient is unwell")


class Fault:
    """Does to this process what ``kind`` says, from ``FAULTY_STEP`` on."""

    def __init__(self, kind: str, folder: str, rank: int) -> None:
        self.kind, self.folder, self.rank = kind, folder, rank
        self.step = 0

    def due(self, *kinds: str) -> bool:
        """Whether now is the time for one of these kinds; if so, notes it."""
        if self.step < FAULTY_STEP or self.kind not in kinds:
            return False
        stamp(self.folder, self.rank)
        return True

    def strike(self) -> None:
        """What a process can do to itself anywhere."""
        if self.due("raise"):
            raise ArithmeticError("the layer is unwell")
        if self.due("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.due("terminate"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.due("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        if self.due("exit"):
            sys.exit(3)
        if self.due("sleep"):
            time.sleep(120)


class Layer(nn.Module):
    """Linear, with the process's fault in one of its layers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, width)
        self.fault: Fault | None = None

    def forward(self, x: Any) -> Any:
        output = self.linear(x)
        if self.fault is None:
            return output
        self.fault.strike()
        if self.fault.due("raise in backward"):
            return Unwell.apply(output)
        if self.fault.due("value"):
            return {"hidden": [output, {1, 2}]}
        if self.fault.due("nan"):
            return output * float("nan")
        return output


class Pairs:
    """A dataset of pairs, of which ``fault`` may spoil the reading."""

    def __init__(self, fault: Fault, count: int = 64) -> None:
        self.fault, self.count = fault, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.fault.due("dataset"):
            raise OSError(f"sample {index} cannot be read")
        x = torch.full((WIDTH,), index / self.count)
        return x, -x


def train(
    rank: int,
    world_size: int,
    folder: str,
    config: dict[str, Any],
    *,
    faulty: int = -1,
    fault: str = "none",
    theirs: dict[str, Any] | None = None,
    layers: int = 4,
    samples: int = 64,
) -> None:
    """Train until something happens.

    Args:
        rank: This rank.
        world_size: All ranks.
        folder: For the time of the fault.
        config: For every rank.
        faulty: The rank with whom something is wrong.
        fault: What happens on it while training; see :class:`Fault` and below.
        theirs: The faulty rank's own configuration.
        layers: Layers of the faulty rank's model; the others' has 4.
        samples: Samples of the faulty rank's data; the others have 64.
    """
    mine = rank == faulty
    trouble = Fault(fault if mine else "none", folder, rank)
    if mine and fault == "absent":
        os._exit(9)
    if mine and fault == "version":
        for module in [m for name, m in sys.modules.items() if name.startswith("penstock.")]:
            if hasattr(module, "__version__"):
                module.__version__ = "0.0.1"
    if fault in ("none", "version", "absent"):
        _stamp_on_joining(folder, rank)  # the ranks differ from the start
    model = PipelineModule([LayerSpec(Layer) for _ in range(layers if mine else 4)], loss_fn=_loss(trouble))
    data = Pairs(trouble, samples if mine else 64)
    engine = penstock.initialize(model, theirs if mine and theirs else config, training_data=data)
    *_, (_, last) = engine.stage.canonical_modules()
    assert isinstance(last, Layer)
    last.fault = trouble
    iterator = _endless(trouble) if fault == "iterator" else None
    if fault in ("leave", "leave without close"):
        _leave(engine, trouble)
        return
    with engine:
        while engine.progress.step < STEPS:
            trouble.step = engine.progress.step
            if fault == "checkpoint" and trouble.step == FAULTY_STEP:
                _reload(engine, trouble)
            if fault == "eval" and trouble.due("eval"):
                engine.eval_batch(_endless(trouble))
            engine.train_batch(iterator)


def _stamp_on_joining(folder: str, rank: int) -> None:
    """What each rank checks alone, before it meets the others, is not part of what is timed."""
    join = Process.join

    def stamped(deadline_s: float) -> Process:
        stamp(folder, rank)
        return join(deadline_s)

    Process.join = stamped  # type: ignore[method-assign,assignment]


def _reload(engine: Engine, trouble: Fault) -> None:
    """Save and load again; meanwhile the faulty rank's last layer is damaged on the disk."""
    written = engine.save_checkpoint(Path(trouble.folder) / "checkpoints")
    if trouble.due("checkpoint"):
        file = written / f"layer_{engine.stage.stop - 1:03d}.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    engine.load_checkpoint(written)


def _leave(engine: Engine, trouble: Fault) -> None:
    """Train without the context manager; the faulty rank stops early, as if all were done."""
    while engine.progress.step < STEPS:
        trouble.step = engine.progress.step
        if trouble.due("leave"):
            engine.close()
            return
        if trouble.due("leave without close"):
            return
        engine.train_batch()


def _loss(trouble: Fault) -> Any:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if trouble.due("loss"):
            raise ArithmeticError("the loss is unwell")
        error = (output - targets).square()
        return error.mean(dim=1) if trouble.due("vector") else error.mean()

    return loss


def _endless(trouble: Fault) -> Iterator[tuple[Tensor, Tensor]]:
    while not trouble.due("iterator"):
        yield torch.ones(1, WIDTH), torch.zeros(1, WIDTH)
