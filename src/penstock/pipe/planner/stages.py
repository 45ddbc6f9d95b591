"""From layers to stages: what a division of the model costs and keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock.pipe.planner.profile import LayerCosts, Profile
from penstock.pipe.schedule import Costs, Schedule, peak_memory


@dataclass(frozen=True)
class StageCosts:
    """What each stage of a division costs.

    Attributes:
        costs: Seconds of each op and transfer.
        activations: Bytes that one micro-batch keeps on each stage from F to B or W.
        workspace: Bytes that recomputing a group of layers takes on each stage besides.
        static: Bytes of parameters, buffers, gradients and optimizer state of each stage.
        updates: Seconds of each stage's share of the optimizer step.
    """

    costs: Costs
    activations: tuple[int, ...]
    workspace: tuple[int, ...]
    static: tuple[int, ...]
    updates: tuple[float, ...]

    @classmethod
    def of(cls, profile: Profile, bounds: Sequence[int], interval: int = 0) -> "StageCosts":
        """Add up layers.

        Args:
            profile: Of the model.
            bounds: Stage ``s`` holds layers ``bounds[s]`` to ``bounds[s + 1] - 1``.
            interval: Layers recomputed together in the backward pass; 0 keeps all activations.
        """
        ranges = list(pairwise(bounds))
        layers = [profile.layers[start:stop] for start, stop in ranges]
        again = [sum(layer.forward for layer in stage) if interval else 0.0 for stage in layers]
        costs = Costs(
            forward=[profile.action + sum(layer.forward for layer in stage) for stage in layers],
            backward=[
                profile.action + sum(layer.backward for layer in stage) + more
                for stage, more in zip(layers, again, strict=True)
            ],
            input_gradient=[
                profile.action + sum(layer.input_gradient for layer in stage) + more
                for stage, more in zip(layers, again, strict=True)
            ],
            weight_gradient=[profile.action + sum(layer.weight_gradient for layer in stage) for stage in layers],
            transfer=[profile.transfer(stop - 1) for _, stop in ranges[:-1]],
        )
        return cls(
            costs=costs,
            activations=tuple(kept_bytes(profile.layers, start, stop, interval) for start, stop in ranges),
            workspace=tuple(
                max((kept_bytes(profile.layers, *group) for group in _groups(start, stop, interval)), default=0)
                for start, stop in ranges
            ),
            static=tuple(_static(stage) for stage in layers),
            updates=tuple(sum(layer.update for layer in stage) for stage in layers),
        )

    def memory(self, schedule: Schedule) -> tuple[int, ...]:
        """The peak of each rank: what lies there always, the activations that the schedule keeps, and recomputation."""
        kept = peak_memory(schedule, self.activations)
        mine = [schedule.stages_of(rank) for rank in range(schedule.num_ranks)]
        return tuple(
            round(kept[rank]) + sum(self.static[s] for s in stages) + max(self.workspace[s] for s in stages)
            for rank, stages in enumerate(mine)
        )


def kept_bytes(layers: Sequence[LayerCosts], start: int, stop: int, interval: int = 0) -> int:
    """Bytes that one micro-batch keeps on a stage of layers ``start`` to ``stop - 1`` until its backward pass.

    A stage holds its input and its output, of which the first one's input, the batch, and the last one's output, the
    loss, count nothing besides what layers keep. Where layers are recomputed, it holds the input of each group.
    """
    output = layers[stop - 1]
    if interval:
        inputs = [layers[first - 1].output for first, _ in _groups(start, stop, interval) if first > 0]
        return sum(inputs) + (0 if stop == len(layers) else output.output)
    total = sum(layer.kept for layer in layers[start:stop]) - sum(layer.shared for layer in layers[start + 1 : stop])
    return total + (layers[start].input_beyond if start > 0 else 0) + output.output_beyond


def _groups(start: int, stop: int, interval: int) -> Iterator[tuple[int, int]]:
    if interval:
        for first in range(start, stop, interval):
            yield first, min(first + interval, stop)


def _static(layers: Sequence[LayerCosts]) -> int:
    """Layers of one tie key share their parameters on a stage."""
    ties = {layer.tie: layer for layer in layers if layer.tie is not None}
    return sum(layer.parameters + layer.state for layer in (*ties.values(), *(x for x in layers if x.tie is None)))
