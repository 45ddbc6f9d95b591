"""Puts random-LTD into a stage: which layers are blocks, which of them drop tokens, and their schedule."""

from functools import partial

from torch import nn

from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, RandomLTDScheduler
from penstock.data_pipeline.random_ltd.protect import MarkProtectedTokens
from penstock.pipe.layer_spec import LayerSpec
from penstock.pipe.local_stages import AnyStages
from penstock.pipe.module import PipelineModule
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
        ValueError: The section names blocks that the model does not have, the sequence length is unknown, or there
            is no layer before the blocks to find protected tokens in.
    """

    def __init__(self, config: TrainConfig, module: PipelineModule) -> None:
        assert config.random_ltd is not None
        blocks = block_indices(module)
        length = config.sequence_length
        if length is None:
            raise ValueError("random_ltd needs data.sequence_length (or model.context): the tokens kept at the end")
        given = config.random_ltd
        section = given.scheduler_config(len(blocks), length)
        section |= {"sequence_length": length, "global_batch_size": config.train.global_batch_size}
        self.layers = frozenset(blocks[number] for number in given.layer_ids(len(blocks)))
        self._config = config
        self._blocks = blocks
        self._scheduler = RandomLTDScheduler(section)
        self._mark: partial[MarkProtectedTokens] | None = None
        if given.protect_tokens or given.document_separator is not None:
            if 0 in self.layers:
                raise ValueError(
                    "random_ltd.protect_tokens and document_separator are looked for in what the model's first layer "
                    "takes, token ids; here that layer is a block which drops tokens itself. Give the model a first "
                    "layer that embeds token ids and returns a dict, or take block 0 out of random_ltd.layers"
                )
            self._mark = partial(
                MarkProtectedTokens, token_ids=given.protect_tokens, separator_id=given.document_separator
            )

    @property
    def unreached(self) -> str | None:
        """What of the schedule the run ends before; None if nothing."""
        section, config = self._config.random_ltd, self._config
        assert section is not None
        clock = "steps" if section.tokens is None else "tokens"
        needed = section.steps if section.tokens is None else section.tokens
        length = config.total_steps if section.tokens is None else config.tokens_of_run
        assert needed is not None  # one of the two is given
        assert length is not None  # that of the sequences is known
        if section.start >= length:
            return f"random_ltd.start={section.start}: the run has {length} {clock}, so no token is dropped"
        rest = section.start + needed if section.end is None else min(section.start + needed, section.end)
        if rest > length:
            return (
                f"random_ltd.{clock}={needed} (from {section.start}): the run has {length} {clock} and ends before all "
                f"of max_tokens are kept; lower it to {length - section.start} or less to train on these too"
            )
        return None

    def wrap(self, stage: AnyStages) -> None:
        """Make the stage's share of the layers drop tokens, and its first layer mark the protected ones."""
        section = self._scheduler.config

        def wrapped(index: int, layer: nn.Module) -> nn.Module | None:
            if index in self.layers:
                options = section.layer_options(index - self._blocks.start)
                options["layer_id"] = self._blocks[options["layer_id"]]
                dropper = RandomLayerTokenDrop(layer, **options)
                self._scheduler.attach(dropper)
                return dropper
            return self._mark(layer) if index == 0 and self._mark is not None else None

        stage.wrap_layers(wrapped)

    def update(self, step: int, tokens: int) -> int:
        """Set the kept length for a step, before which so many tokens were read; returns it."""
        return self._scheduler.update_seq(step, tokens)

    def layer_tokens(self, tokens: int, kept: int, *, rows: int) -> int:
        """Tokens that the blocks compute in a step of ``tokens`` in ``rows`` sequences that keep ``kept`` each."""
        dropped = max(0, tokens - rows * kept)
        return tokens * len(self._blocks) - dropped * len(self.layers)

    def planned_layer_tokens(self, steps: int) -> int:
        """Layer-tokens of a run's first steps, of full sequences."""
        return self._scheduler.get_total_layer_tokens(steps)
