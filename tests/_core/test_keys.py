import numpy as np

from penstock._core.keys import derive, random_floats, random_rows, random_words


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

    def word(key: int, counter: int) -> int:
        return mix((mix((counter * golden + key) & mask) + golden) & mask)

    assert random_words(42, np.arange(5)).tolist() == [word(42, i) for i in range(5)]
    starts = [0, 7, 2**64 - 2]  # the last row's counters wrap
    expected = [[word(2**63 + 5, (start + i) & mask) for i in range(4)] for start in starts]
    assert random_rows(2**63 + 5, np.array(starts, dtype=np.uint64), 4).tolist() == expected


def test_floats_are_uniform() -> None:
    u = random_floats(derive("uniform"), np.arange(100_000))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # Standard error of the mean is 1 / sqrt(12 n), of the variance about 1 / sqrt(180 n).
    assert abs(u.mean() - 0.5) < 5 / (12 * 100_000) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 / (180 * 100_000) ** 0.5
