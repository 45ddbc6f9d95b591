"""Random layerwise token dropping: middle layers compute some of the tokens, the others pass them by."""

from penstock.data_pipeline.random_ltd.config import RandomLTDConfig
from penstock.data_pipeline.random_ltd.convert import (
    convert_to_random_ltd,
    describe_random_ltd,
    remove_random_ltd,
    save_without_random_ltd,
)
from penstock.data_pipeline.random_ltd.dropping_utils import (
    GatherTokens,
    ScatterTokens,
    bert_sample_tokens,
    gpt_sample_tokens,
)
from penstock.data_pipeline.random_ltd.layer import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.protect import protected_tokens
from penstock.data_pipeline.random_ltd.scheduler import RandomLTDScheduler
from penstock.data_pipeline.random_ltd.token_ops import drop_tokens, dropped_layer, restore_tokens

__all__ = [
    "GatherTokens",
    "RandomLTDConfig",
    "RandomLTDScheduler",
    "RandomLayerTokenDrop",
    "ScatterTokens",
    "bert_sample_tokens",
    "convert_to_random_ltd",
    "describe_random_ltd",
    "drop_tokens",
    "dropped_layer",
    "gpt_sample_tokens",
    "protected_tokens",
    "remove_random_ltd",
    "restore_tokens",
    "save_without_random_ltd",
]
