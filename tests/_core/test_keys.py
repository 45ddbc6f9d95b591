import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.keys import KeyedPermutation, derive, random_floats, random_words


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_is_a_bijection_and_inverts(size: int, key: int) -> None:
    permutation = KeyedPermutation(size, key)
    image = permutation(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(permutation.inverse(image), np.arange(size))


def test_every_image_of_an_element_is_equally_likely() -> None:
    # Over many keys, element 3 of 8 lands everywhere: chi-squared with 7 degrees of freedom, 24.3 is p = 0.001.
    counts = np.bincount([int(KeyedPermutation(8, derive(k))(3)) for k in range(4000)], minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


def test_pairs_of_neighbours_are_not_kept_together() -> None:
    # A random permutation of n keeps a neighbour pair adjacent in order with probability 1/n.
    size = 64
    kept = 0
    for k in range(500):
        image = KeyedPermutation(size, derive("pair", k))(np.arange(size))
        kept += int((np.diff(image) == 1).sum())
    expected = 500 * (size - 1) / size
    assert abs(kept - expected) < 5 * expected**0.5


def test_a_large_permutation_needs_no_table() -> None:
    permutation = KeyedPermutation(10**12, 7)
    index = np.array([0, 1, 10**12 - 1])
    assert np.array_equal(permutation.inverse(permutation(index)), index)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=r"takes 0\.\.4"):
        KeyedPermutation(5, 0)(index)


def test_an_empty_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        KeyedPermutation(0, 0)


def test_keys_depend_on_order_type_and_value() -> None:
    keys = {
        derive(1, 2),
        derive(2, 1),
        derive("1", 2),
        derive(12),
        derive("12"),
        derive("1", "2"),
        derive(-1),
    }
    assert len(keys) == 7


def test_words_follow_the_reference_of_splitmix64() -> None:
    # Reference: SplitMix64 seeded with s returns mix(s + golden), mix(s + 2 golden), ...; our word i hashes
    # the counter's own mixed state once more, in plain integers here.
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    words = random_words(42, np.arange(5))
    assert [int(w) for w in words] == [mix((mix((i * golden + 42) & mask) + golden) & mask) for i in range(5)]


def test_floats_are_uniform() -> None:
    u = random_floats(derive("uniform"), np.arange(100_000))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # Standard error of the mean is 1 / sqrt(12 n), of the variance about 1 / sqrt(180 n).
    assert abs(u.mean() - 0.5) < 5 / (12 * 100_000) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 / (180 * 100_000) ** 0.5
