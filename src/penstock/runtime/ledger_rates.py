"""Gives a ledger its formulas, and enters each training step in it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from penstock._core.meter import Meter
from penstock.models.bert_config import BERTConfig
from penstock.models.bert_modules import BERTBlock, BERTTransform
from penstock.models.flops import bert_layer_flops, gpt_head_flops, gpt_layer_flops
from penstock.models.gpt import GPTConfig
from penstock.models.gpt_modules import GPTBlock, OutputHead, tied_logits
from penstock.models.vocabulary import OutputPart, part_scores
from penstock.pipe.layer_spec import LayerSpec, TiedLayerSpec
from penstock.pipe.local_stages import AnyStages
from penstock.pipe.module import PipelineModule
from penstock.runtime.batches import Cut
from penstock.runtime.dropping import Dropping
from penstock.runtime.feed import Shape
from penstock.runtime.ledger import LayerFlops, Ledger


@dataclass(frozen=True)
class Rates:
    """What one step of this rank costs.

    Attributes:
        ledger: Where steps are entered.
        layers: Canonical indices of the local layers.
        dropping_layers: Those that drop tokens.
        gradient_bytes: Bytes of the local gradients.
        cut: This rank's part of a global batch.
    """

    ledger: Ledger
    layers: tuple[int, ...]
    dropping_layers: frozenset[int]
    gradient_bytes: int
    cut: Cut

    @classmethod
    def of(
        cls,
        module: PipelineModule | None,
        stage: AnyStages,
        dropping: Dropping | None,
        cut: Cut,
        meter: Meter,
        ranks: int,
        gradient_bytes: int,
    ) -> "Rates":
        """The rates of one of ``ranks`` pipeline ranks; FLOPs are counted for the layers of the reference models.

        Of ranks that compute parts of the same layers one enters the whole of them.
        """
        layers = tuple(index for index, _ in stage.canonical_modules())
        formulas: dict[int, LayerFlops] = {}
        if module is not None:
            for index in layers:
                formula = _flops(module.specs[index])
                if formula is not None:
                    formulas[index] = formula
        ledger = Ledger(
            meter,
            layer_flops=formulas,
            recomputed=layers if stage.activation_checkpoint_interval else tuple(sorted(stage.recomputed)),
            plain_bubble=(ranks - 1) / (cut.micro_batches + ranks - 1),
        )
        dropping_layers = frozenset() if dropping is None else dropping.layers
        return cls(ledger, layers, dropping_layers, gradient_bytes, cut)

    def enter(
        self, shapes: Sequence[Shape], *, tokens: int, kept: int | None, seconds: float, bubble_seconds: float
    ) -> None:
        """Enter one step.

        Args:
            shapes: The sequences of each micro-batch of the global batch.
            tokens: Tokens of the global batch, without padding.
            kept: Tokens of each sequence that dropping layers computed; None without dropping.
            seconds: Wall-clock of the step.
            bubble_seconds: Of these, waiting for neighbours in the pipeline.
        """
        cut, ledger = self.cut, self.ledger
        here = Counter(shapes[index] for index in cut.indices())
        if cut.enters:
            # Each replica enters its share: padding is spread over them as the computed tokens are.
            everywhere = sum(shape.rows * shape.length for shape in shapes)
            computed = sum(count * shape.rows * shape.length for shape, count in here.items())
            plain = sum(count * shape.rows * shape.plain_length for shape, count in here.items())
            read = tokens * computed // everywhere
            ledger.count_read(
                sum(count * shape.rows for shape, count in here.items()), read, plain_tokens=read + plain - computed
            )
        for layer in self.layers if cut.counts else ():
            for shape, count in here.items():
                ledger.count_layer(
                    layer,
                    count * shape.rows,
                    shape.length,
                    kept=kept if layer in self.dropping_layers else None,
                    plain_seq_len=shape.plain_length,
                )
        ledger.count_step(seconds, bubble_seconds)
        ledger.count_plain_exchange(self.gradient_bytes, cut.replicas)


def _flops(spec: object) -> LayerFlops | None:
    """The formula of a reference layer; None for any other."""
    if not isinstance(spec, LayerSpec) or not spec.module_args:
        return None
    config = spec.module_args[0]
    if not isinstance(config, GPTConfig | BERTConfig):
        return None
    if isinstance(config, BERTConfig):
        if spec.typename is BERTBlock:
            return partial(bert_layer_flops, config)
        if spec.typename is BERTTransform:
            return lambda tokens, _: 2 * config.hidden_size**2 * tokens
    elif spec.typename is GPTBlock:
        return partial(gpt_layer_flops, config)
    forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
    if isinstance(config, GPTConfig) and (spec.typename is OutputPart or forward_fn is part_scores):
        width = 2 * config.hidden_size * len(config.tokens_of_part(spec.module_args[1]))
        return lambda tokens, _: width * tokens
    if spec.typename is OutputHead or forward_fn is tied_logits:
        return lambda tokens, _: gpt_head_flops(config, tokens)
    return None
