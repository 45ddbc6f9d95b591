"""What a held-out loss is compared with: a unigram model on the same tokens, and bits per byte of text."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An evaluation on held-out text.

    Attributes:
        nats_per_token: Mean loss of the model.
        unigram_nats_per_token: Mean loss on the same tokens of a model that knows only how frequent each token is in
            the training text (add-one smoothed).
        tokens: Tokens that were predicted.
        bits_per_byte: The loss per byte of the text that these tokens spell; None without a byte-level tokenizer.
    """

    nats_per_token: float
    unigram_nats_per_token: float
    tokens: int
    bits_per_byte: float | None

    def sentence(self) -> str:
        """The evaluation in one line."""
        difference = self.unigram_nats_per_token - self.nats_per_token
        side = "below" if difference >= 0 else "above"
        bits = "" if self.bits_per_byte is None else f" ({self.bits_per_byte:.4f} bits per byte)"
        return (
            f"held-out loss {self.nats_per_token:.4f} nats per token{bits} on {self.tokens:,} tokens, "
            f"{abs(difference):.4f} {side} a unigram model's {self.unigram_nats_per_token:.4f} on the same tokens"
        )


def unigram_log_probabilities(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Log probability of every token under add-one smoothed counts of a corpus, in nats.

    Args:
        counts: How often each token of the vocabulary stands in the training text.
    """
    return np.asarray(np.log(counts + 1) - math.log(int(counts.sum()) + len(counts)), dtype=np.float64)


def held_out(
    nats_per_token: float,
    labels: npt.NDArray[np.integer[Any]],
    log_probabilities: npt.NDArray[np.float64],
    token_bytes: npt.NDArray[np.int64] | None,
) -> HeldOut:
    """Put a model's loss beside the unigram model's on the same labels.

    Args:
        nats_per_token: Mean loss of the model over ``labels``.
        labels: The tokens that were predicted, any shape.
        log_probabilities: From :func:`unigram_log_probabilities`.
        token_bytes: Bytes of text that each token of the vocabulary spells, or None.
    """
    flat = labels.reshape(-1).astype(np.int64)
    unigram = -float(log_probabilities[flat].mean())
    bits = None
    if token_bytes is not None and (size := int(token_bytes[flat].sum())):
        bits = nats_per_token * flat.size / math.log(2) / size
    return HeldOut(nats_per_token, unigram, int(flat.size), bits)


def bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """How many bytes of text each token of a byte-level tokenizer spells; special tokens spell none.

    None for a tokenizer that is not byte-level, whose tokens do not add up to the text.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        # In a byte-level vocabulary every character of a token stands for one byte.
        sizes[number] = 0 if number in special else len(token)
    return sizes
