import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.keys import derive, random_words
from penstock.data_pipeline.data_sampling.permutation import permute


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_is_a_bijection(size: int, key: int) -> None:
    assert np.sort(permute(np.arange(size), size, key)).tolist() == list(range(size))


@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=20), st.integers(0, 2**32), st.data())
def test_each_element_has_its_own_permutation(sizes: list[int], seed: int, data: st.DataObject) -> None:
    index = [data.draw(st.integers(0, size - 1)) for size in sizes]
    keys = random_words(seed, np.arange(len(sizes)))
    together = permute(np.array(index), np.array(sizes), keys)
    alone = [int(permute(np.array([i]), n, int(key))[0]) for i, n, key in zip(index, sizes, keys, strict=True)]
    assert together.tolist() == alone
    assert all(0 <= place < size for place, size in zip(alone, sizes, strict=True))


def test_every_arrangement_comes_about_equally_often() -> None:
    for size, arrangements in ((2, 2), (3, 6), (4, 24)):
        draws = 200 * arrangements
        counts = Counter(tuple(permute(np.arange(size), size, derive("test", s)).tolist()) for s in range(draws))
        assert len(counts) == arrangements
        chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
        assert chi_square < 2.2 * arrangements + 12  # above the 99.9 % point of each


def test_neighbours_part_and_places_are_even() -> None:
    size, hundredths = 100_003, 100
    placed = permute(np.arange(size), size, derive("even"))
    assert abs(np.corrcoef(placed[:-1], placed[1:])[0, 1]) < 0.02
    # Of the first tenth of indices, each hundredth of the places gets about a hundredth.
    counts = np.bincount(placed[: size // 10] * hundredths // size, minlength=hundredths)
    assert ((counts - 100) ** 2 / 100).sum() < 160  # 99 degrees of freedom


def test_large_sizes_reach_everywhere() -> None:
    size = 2**62
    placed = permute(np.arange(1000), size, derive("large"))
    assert len(set(placed.tolist())) == 1000
    assert placed.min() < size // 100
    assert placed.max() > size // 100 * 99


def permute_one(index: int, size: int, key: int) -> int:
    """The network written down anew with Python's integers: stored runs resume only if it never changes."""
    mask64 = 2**64 - 1
    low_count = int(math.sqrt(size)) + 1
    high_count = -(-size // low_count)

    def scramble(half: int, number: int) -> int:
        x = (half * 0x9E3779B97F4A7C15 + (key ^ (number * 0xD1B54A32D192ED03 & mask64))) & mask64
        x = (x ^ x >> 32) * 0xBF58476D1CE4E5B9 & mask64
        return x >> 32

    x = index
    while True:
        high, low = divmod(x, low_count)
        for number in range(8):
            if number % 2 == 0:
                low = (low + (scramble(high, number) * low_count >> 32)) % low_count
            else:
                high = (high + (scramble(low, number) * high_count >> 32)) % high_count
        x = low + high * low_count
        if x < size:
            return (x + key) % size


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_against_plain_integers(size: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert permute(np.array([index]), size, key).tolist() == [permute_one(index, size, key)]


def test_places_are_even_for_few_elements_too() -> None:
    keys = random_words(derive("few"), np.arange(20_000))
    for size in (3, 5, 6, 7):
        for index in range(size):
            counts = np.bincount(permute(np.full(len(keys), index), size, keys), minlength=size)
            expected = len(keys) / size
            assert ((counts - expected) ** 2 / expected).sum() < 30  # 6 degrees of freedom at most
