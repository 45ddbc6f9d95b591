"""The operations under the names that DeepSpeed gives them (``deepspeed.ops.random_ltd.dropping_utils``)."""

from penstock.data_pipeline.random_ltd.sampling import bert_sample_tokens, gpt_sample_tokens
from penstock.data_pipeline.random_ltd.token_ops import GatherTokens, ScatterTokens

__all__ = ["GatherTokens", "ScatterTokens", "bert_sample_tokens", "gpt_sample_tokens"]
