"""Reference models as lists of layers for a pipeline, and as plain modules."""

from penstock.models.bert import BERT, bert_block_indices, bert_layers, bert_loss, bert_model, mask_tokens
from penstock.models.bert_config import BERTConfig
from penstock.models.bert_modules import BERTBlock
from penstock.models.flops import bert_layer_flops, gpt_flops, gpt_head_flops, gpt_layer_flops
from penstock.models.gpt import GPT, GPTConfig, gpt_block_indices, gpt_layers, gpt_loss, gpt_model
from penstock.models.gpt_modules import FinalNorm, GPTBlock, LearnedPositions, OutputHead, TokenEmbedding
from penstock.models.hf_layers import hf_layers
from penstock.models.hf_weights import hf_names, load_hf_weights
from penstock.models.vocabulary import OutputPart, VocabularyPart

__all__ = [
    "BERT",
    "GPT",
    "BERTBlock",
    "BERTConfig",
    "FinalNorm",
    "GPTBlock",
    "GPTConfig",
    "LearnedPositions",
    "OutputHead",
    "OutputPart",
    "TokenEmbedding",
    "VocabularyPart",
    "bert_block_indices",
    "bert_layer_flops",
    "bert_layers",
    "bert_loss",
    "bert_model",
    "gpt_block_indices",
    "gpt_flops",
    "gpt_head_flops",
    "gpt_layer_flops",
    "gpt_layers",
    "gpt_loss",
    "gpt_model",
    "hf_layers",
    "hf_names",
    "load_hf_weights",
    "mask_tokens",
]
