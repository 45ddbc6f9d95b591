import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from penstock.data_pipeline.datasets.tokenize import train_bpe
from penstock.runtime.heldout import bytes_per_token, held_out, unigram_log_probabilities


def test_the_unigram_model_counts_and_adds_one() -> None:
    log_p = unigram_log_probabilities(np.array([3, 0, 1, 0]))
    assert np.exp(log_p) == pytest.approx([4 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_the_evaluation_is_over_the_labels_given() -> None:
    log_p = np.log(np.array([0.5, 0.25, 0.25]))
    result = held_out(1.0, np.array([[0, 1], [2, 0]], dtype=np.uint16), log_p, np.array([3, 1, 2]))
    assert result.tokens == 4
    assert result.unigram_nats_per_token == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4)
    # 4 nats over 3 + 1 + 2 + 3 bytes
    assert result.bits_per_byte == pytest.approx(4 / math.log(2) / 9)
    assert "below a unigram model" in held_out(0.5, np.array([0]), log_p, None).sentence()
    assert "above a unigram model" in held_out(9.0, np.array([0]), log_p, None).sentence()


def test_tokens_spell_the_bytes_of_the_text() -> None:
    texts = ["def f(x):\n    return x  # ünïcode ✓\n" * 5, "for i in range(10): pass"]
    tokenizer = train_bpe(texts, vocab_size=300)
    sizes = bytes_per_token(tokenizer)
    assert sizes is not None
    for text in [*texts, "entirely new 文字"]:
        assert sizes[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(text.encode())
    assert sizes[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_other_tokenizers_give_no_bytes() -> None:
    assert bytes_per_token(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
