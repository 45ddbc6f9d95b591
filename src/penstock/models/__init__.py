"""Reference models as lists of layers for a pipeline, and as plain modules."""

from penstock.models.flops import gpt_flops, gpt_head_flops, gpt_layer_flops
from penstock.models.gpt import GPT, GPTConfig, gpt_block_indices, gpt_layers, gpt_loss, gpt_model
from penstock.models.gpt_modules import FinalNorm, GPTBlock, LearnedPositions, OutputHead, TokenEmbedding

__all__ = [
    "GPT",
    "FinalNorm",
    "GPTBlock",
    "GPTConfig",
    "LearnedPositions",
    "OutputHead",
    "TokenEmbedding",
    "gpt_block_indices",
    "gpt_flops",
    "gpt_head_flops",
    "gpt_layer_flops",
    "gpt_layers",
    "gpt_loss",
    "gpt_model",
]
