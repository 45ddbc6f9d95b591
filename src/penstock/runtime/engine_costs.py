"""Measures what the engine itself costs: messages, actions, and a run's steps around them.

The layers here compute next to nothing.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from penstock._core.batch_key import BatchKey
from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression import LocalGradients
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.frame import Address
from penstock.pipe.groups import PipeGroups
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.module import LayerSpec, PipelineModule
from penstock.pipe.planner import Flow, measure_layers
from penstock.pipe.schedule import Channel
from penstock.pipe.stage import Stage
from penstock.pipe.transport import Transport
from penstock.pipe.value import flatten
from penstock.runtime.config import TrainConfig
from penstock.runtime.rehearsal import gathered, update

_MESSAGE_BYTES: Final = (1 << 12, 1 << 22)
_MESSAGES: Final = 9
_OVERHEAD_STEPS: Final = 7
_OVERHEAD_BATCHES: Final = (8, 32)
_ROUNDS: Final = 14
_TURNS: Final = 20
_MICRO_BATCHES: Final = 8


@dataclass(frozen=True)
class EngineCosts:
    """Measures messages and actions; every rank of the run makes one and calls the same.

    Attributes:
        groups: Of the run's ranks.
        watcher: Told of every wait.
        device: Where this rank computes.
        meter: Counts the bytes.
    """

    groups: PipeGroups
    watcher: Watcher
    device: torch.device
    meter: Meter

    def message(self) -> tuple[float, float]:
        """Latency and seconds per byte of a message between neighbouring ranks, which all talk at once."""
        if self.groups.num_pipe_ranks == 1:
            return 0.0, 0.0
        medians = []
        for size in _MESSAGE_BYTES:
            tensor = torch.zeros(size // 4, device=self.device)
            found = gathered(self._round_trip(tensor), self.groups, self.watcher)
            medians.append(statistics.median(s for s in found if s is not None) / 2)
        small, large = medians
        rate = max(0.0, (large - small) / (_MESSAGE_BYTES[1] - _MESSAGE_BYTES[0]))
        return max(0.0, small - rate * _MESSAGE_BYTES[0]), rate

    def _round_trip(self, tensor: Tensor) -> float | None:
        """Median seconds to the next rank and back; None on every other rank and on a last one without a partner."""
        rank, ranks = self.groups.pipe_rank, self.groups.num_pipe_ranks
        low = rank - rank % 2
        if low + 1 == ranks:
            return None
        there, back = Channel(low, low + 1, "F"), Channel(low + 1, low, "B")
        transport = Transport(rank, self.groups.routes, watcher=self.watcher, meter=self.meter)
        transport.begin({there: _MESSAGES, back: _MESSAGES})
        structure, tensors = flatten(tensor)
        seconds = []
        for number in range(_MESSAGES):
            forth, home = Address("F", 1, 0, number), Address("B", 0, 0, number)
            if rank == low:
                start = time.perf_counter()
                transport.send(there, forth, structure, tensors)
                transport.receive(back, home)
                seconds.append(time.perf_counter() - start)
            else:
                transport.receive(there, forth)
                transport.send(back, home, structure, tensors)
        transport.drain()
        return statistics.median(seconds[1:]) if rank == low else None

    def action(self) -> tuple[float, float]:
        """What the engine takes for an action, and how much of it while the action runs.

        From steps of stages with next to nothing to compute; the rest of it lies between actions.
        """
        ranks = self.groups.num_pipe_ranks
        module = PipelineModule([LayerSpec(_Shift) for _ in range(ranks)], num_stages=ranks, loss_fn=_mean)
        stage = module.build_stage(self.groups.pipe_rank, device=self.device)
        (first, _), (last, span) = (self._steps(stage, batches) for batches in _OVERHEAD_BATCHES)
        each = max(0.0, (last - first) / (_OVERHEAD_BATCHES[1] - _OVERHEAD_BATCHES[0]))
        own = _own_time(stage, self.device)
        action = self._mean(max(0.0, each - own) / 2)
        return action, self._mean(min(action, max(0.0, span - own / 2)))

    def _steps(self, stage: Stage, micro_batches: int) -> tuple[float, float]:
        """Median seconds of a step, and of its actions on this rank."""
        engine = PipelineEngine(
            stage,
            schedule="gpipe",
            micro_batches=micro_batches,
            groups=self.groups,
            exchange=LocalGradients(stage.parameters(), replicas=1),
            loss_fn=_mean,
            watcher=self.watcher,
            device=self.device,
        )
        row = torch.zeros(1, 8, device=self.device)
        batches = [MicroBatch(row, row, i) for i in range(micro_batches)]
        seconds, spans = [], []
        for step in range(_OVERHEAD_STEPS):
            gathered(0.0, self.groups, self.watcher)
            engine.recorded = []
            seconds.append(engine.train_step(batches, step=step).seconds)
            spans.append(statistics.mean(end - start for start, end in engine.recorded))
        return statistics.median(seconds[1:]), statistics.median(spans[1:])

    def _mean(self, value: float) -> float:
        """Of all ranks' values."""
        return float(statistics.mean(gathered(value, self.groups, self.watcher)))


def step_overhead(config: TrainConfig) -> float:
    """Seconds of a step of the run that are no passes and no update. Collective; the processes are those of the run.

    Steps of an engine whose layers compute next to nothing, and of its passes and its update alone, take turns.

    Args:
        config: The run's.
    """
    from penstock.runtime.initialize import initialize  # which measures with what is above

    ranks, replicas = config.pipe.stages, config.data_parallel.replicas or 1
    module = PipelineModule([LayerSpec(_Shift) for _ in range(ranks)], num_stages=ranks, loss_fn=_mean)
    settings = {
        "deadline_s": config.deadline_s,
        "pipe": {"stages": ranks},
        "data_parallel": {"replicas": replicas},
        "train": {"global_batch_size": replicas * _MICRO_BATCHES, "micro_batch_size": 1, "steps": 2 * _TURNS},
    }
    row = torch.zeros(1, 8)
    pairs = [(row, row)] * _MICRO_BATCHES
    whole, inside = [], []
    with initialize(module, settings) as engine:
        parts = engine.parts
        mine = [MicroBatch(row, row, index) for index in parts.cut.indices()]
        for step in range(_TURNS):
            start = time.perf_counter()
            engine.train_batch(iter(pairs))
            middle = time.perf_counter()
            parts.pipeline.train_step(mine, step=step)
            update(engine.stage, engine.optimizer, None)
            whole.append(middle - start)
            inside.append(time.perf_counter() - middle)
        found = gathered([statistics.median(whole), statistics.median(inside)], parts.groups, parts.watcher)
    return max(0.0, float(statistics.mean(a - b for a, b in found)))


class _Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def _mean(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).mean()


def _own_time(stage: Stage, device: torch.device) -> float:
    """Seconds that the stage itself takes, forward and backward."""
    key = BatchKey(0, 0, 0)
    row = torch.zeros(1, 8, device=device)
    flow = Flow(row, (not stage.is_first,))
    (layer,) = measure_layers(
        stage, flow, names=("",), targets=row, loss_fn=_mean, key=key, more=lambda done: done < _ROUNDS
    )
    return layer.forward + layer.backward
