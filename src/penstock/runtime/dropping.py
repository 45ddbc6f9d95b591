"""Puts random-LTD into a stage: which layers are blocks, which of them drop tokens, and their schedule."""

from torch import nn

from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, RandomLTDScheduler
from penstock.pipe.layer_spec import LayerSpec
from penstock.pipe.module import PipelineModule
from penstock.pipe.stage import Stage
from penstock.runtime.config import TrainConfig


def block_indices(module: PipelineModule) -> range:
    """Canonical indices of a model's blocks: its longest run of layers of one class, the first if several are equal."""
    names = [spec.name if isinstance(spec, LayerSpec) else type(spec).__name__ for spec in module.specs]
    best = range(0)
    start = 0
    for stop in range(1, len(names) + 1):
        if stop == len(names) or names[stop] != names[start]:
            if stop - start > len(best):
                best = range(start, stop)
            start = stop
    return best


class Dropping:
    """The token dropping of a run: which canonical layers drop, and how many tokens they keep at each step.

    Args:
        config: The run's configuration, with a ``random_ltd`` section that is enabled.
        module: The whole model.

    Attributes:
        layers: Canonical indices of the layers that drop.

    Raises:
        ValueError: The section names blocks that the model does not have, or the sequence length is unknown.
    """

    def __init__(self, config: TrainConfig, module: PipelineModule) -> None:
        assert config.random_ltd is not None
        blocks = block_indices(module)
        length = config.sequence_length
        if length is None:
            raise ValueError("random_ltd needs data.sequence_length (or model.context): the tokens kept at the end")
        section = config.random_ltd.scheduler_config(len(blocks), length)
        self.layers = frozenset(blocks[number] for number in config.random_ltd.layer_ids(len(blocks)))
        self._scheduler = RandomLTDScheduler(section)
        self._mask_name = config.random_ltd.model_mask_name
        self._order = config.random_ltd.hidden_state_order

    def wrap(self, stage: Stage) -> None:
        """Make the stage's share of the layers drop tokens."""

        def wrapped(index: int, layer: nn.Module) -> nn.Module | None:
            if index not in self.layers:
                return None
            dropper = RandomLayerTokenDrop(
                layer, layer_id=index, mask_name=self._mask_name, hidden_state_order=self._order
            )
            self._scheduler.attach(dropper)
            return dropper

        stage.wrap_layers(wrapped)

    def update(self, step: int) -> int:
        """Set the kept length for a step; returns it."""
        return self._scheduler.update_seq(step)
