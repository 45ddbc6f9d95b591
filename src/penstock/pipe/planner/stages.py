"""From layers to stages: what a division of the model costs and keeps."""

from collections.abc import Collection, Iterator, Sequence
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
    def of(
        cls, profile: Profile, bounds: Sequence[int], interval: int = 0, recomputed: Collection[int] = ()
    ) -> "StageCosts":
        """Add up layers.

        Args:
            profile: Of the model.
            bounds: Stage ``s`` holds layers ``bounds[s]`` to ``bounds[s + 1] - 1``.
            interval: Layers recomputed together in the backward pass; 0 forms no groups.
            recomputed: Without groups, the layers that are recomputed, each by itself.
        """
        ranges = list(pairwise(bounds))
        layers = [profile.layers[start:stop] for start, stop in ranges]
        groups = [list(_groups(start, stop, interval, recomputed)) for start, stop in ranges]
        again = [sum(layer.forward for a, b in stage for layer in profile.layers[a:b]) for stage in groups]
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
            activations=tuple(kept_bytes(profile.layers, start, stop, interval, recomputed) for start, stop in ranges),
            workspace=tuple(
                max((kept_bytes(profile.layers, *group) for group in stage), default=0) for stage in groups
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


def kept_bytes(
    layers: Sequence[LayerCosts], start: int, stop: int, interval: int = 0, recomputed: Collection[int] = ()
) -> int:
    """Bytes that one micro-batch keeps on a stage of layers ``start`` to ``stop - 1`` until its backward pass.

    A stage holds its input and its output, of which the first one's input, the batch, and the last one's output, the
    loss, count nothing besides what layers keep. Where layers are recomputed, it holds the input of each group, and
    what the loss keeps, which is not computed again.
    """
    total, before = 0, False  # whether the layer before is recomputed
    groups = dict(_groups(start, stop, interval, recomputed))
    at = start
    while at < stop:
        after = groups.get(at)
        inside = layers[at - 1] if at > start else None
        if after is None:
            total += layers[at].kept - (layers[at].shared if inside is not None and not before else 0)
            if inside is None and at > 0:
                total += layers[at].input_beyond
        elif inside is not None and not before:
            total += inside.output_beyond
        elif at > 0:
            total += layers[at - 1].output
        before, at = after is not None, after or at + 1
    last = layers[stop - 1]
    if not before:
        return total + last.output_beyond
    return total + (last.loss_kept if stop == len(layers) else last.output)


def _groups(start: int, stop: int, interval: int, recomputed: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """Bounds of the layers that are recomputed together."""
    for first in range(start, stop, interval or 1):
        if interval or first in recomputed:
            yield first, min(first + (interval or 1), stop)


def _static(layers: Sequence[LayerCosts]) -> int:
    """Layers of one tie key share their parameters on a stage."""
    ties = {layer.tie: layer for layer in layers if layer.tie is not None}
    return sum(layer.parameters + layer.state for layer in (*ties.values(), *(x for x in layers if x.tie is None)))
