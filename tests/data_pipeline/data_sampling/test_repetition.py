import zlib
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.repetition import compression_ratio, repeated_ngrams, unique_ratio

samples = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=12)
kinds = st.sampled_from([np.uint8, np.uint16, np.int32, np.int64])


def flat(corpus: list[list[int]], kind: type) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([token for sample in corpus for token in sample], dtype=kind)
    return tokens, np.array([0, *accumulate(map(len, corpus))], dtype=np.int64)


@given(samples, kinds)
def test_unique_ratio_by_definition(corpus: list[list[int]], kind: type) -> None:
    expected = [len(set(s)) / len(s) if s else 1.0 for s in corpus]
    assert unique_ratio(*flat(corpus, kind)).tolist() == expected


@given(samples, kinds, st.integers(1, 4))
def test_repeated_ngrams_by_definition(corpus: list[list[int]], kind: type, n: int) -> None:
    expected = []
    for sample in corpus:
        grams = [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    assert repeated_ngrams(n)(*flat(corpus, kind)).tolist() == expected


@given(samples, kinds)
def test_compression_ratio_by_definition(corpus: list[list[int]], kind: type) -> None:
    sizes = [len(zlib.compress(np.array(s, dtype="<u4").tobytes(), 1)) / (4 * len(s)) if s else 1.0 for s in corpus]
    assert compression_ratio(*flat(corpus, kind)).tolist() == sizes


def test_repetition_is_told_from_variety() -> None:
    words = np.random.default_rng(0).integers(0, 60_000, 400)
    corpus = [np.tile(words[:20], 20).tolist(), words.tolist()]
    tokens, offsets = flat(corpus, np.uint16)
    assert compression_ratio(tokens, offsets)[0] < 0.2 * compression_ratio(tokens, offsets)[1]
    assert repeated_ngrams()(tokens, offsets)[0] == pytest.approx(1 - 20 / 398)


def test_tables_larger_than_one_sorting() -> None:
    corpus = [[i % 7, i % 5, i % 3] * (1 + i % 200) for i in range(3000)]
    expected = [len(set(s)) / len(s) for s in corpus]
    assert unique_ratio(*flat(corpus, np.uint16)).tolist() == expected


def test_what_has_no_ngrams_or_bits() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got n=0"):
        repeated_ngrams(0)
    with pytest.raises(ValueError, match="tokens of 32 bits"):
        compression_ratio(np.array([1 << 32]), np.array([0, 1]))
