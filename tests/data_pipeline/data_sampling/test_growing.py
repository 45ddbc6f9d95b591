"""The growing order against a simulator that draws one sample after another and knows nothing of segments' tables."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.growing import GrowingOrder, apportion


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(1, 40), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    return sizes, np.cumsum([0, *gaps]).tolist()


def largest_remainders(weights: list[int], total: int) -> list[int]:
    """The textbook, in fractions."""
    quotas = [Fraction(weight * total, sum(weights)) for weight in weights]
    shares = [int(quota) for quota in quotas]
    while sum(shares) < total:
        gaps = [quota - share for quota, share in zip(quotas, shares, strict=True)]
        shares[gaps.index(max(gaps))] += 1
    return shares


@given(st.lists(st.integers(1, 10**18), min_size=1, max_size=20), st.floats(0, 1))
def test_apportion_is_exact(weights: list[int], fraction: float) -> None:
    total = int(sum(weights) * Fraction(fraction))
    shares = apportion(weights, total)
    assert shares == largest_remainders(weights, total)
    assert sum(shares) == total
    assert all(0 <= share <= weight for share, weight in zip(shares, weights, strict=True))


def check_order(sizes: list[int], births: list[int], drawn: list[int]) -> None:
    """Replay the draws one by one and check every rule of the order."""
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
    seen: set[int] = set()
    groups: list[set[int]] = []  # what lies together: a block, or the merged ones
    born = 0
    expected: dict[int, int] | None = None  # shares of the segment by group
    got: Counter[int] = Counter()
    for k, slot in enumerate(drawn):
        pool = sum(sizes[: sum(birth <= k for birth in births)])
        assert 0 <= slot < pool, f"position {k} drew slot {slot} of a pool of {pool}"
        birth = born < len(births) and births[born] == k
        if birth:
            start = sum(sizes[:born])
            groups.append(set(range(start, start + sizes[born])))
            born += 1
        ended = len(seen) == sum(map(len, groups))
        if ended:
            groups, seen = [set().union(*groups)], set()
        if ended or birth:
            if expected is not None:
                assert got == Counter(expected), f"shares up to position {k}"
            unseen = [len(group - seen) for group in groups]
            until = births[born] if born < len(births) else k + sum(unseen)
            length = min(sum(unseen), until - k)
            expected = {g: n for g, n in enumerate(largest_remainders(unseen, length)) if n}
            got = Counter()
        assert slot not in seen, f"position {k} repeats slot {slot} (block {block_of[slot]}) within a pass"
        seen.add(slot)
        got[next(g for g, group in enumerate(groups) if slot in group)] += 1


@given(pools(), st.integers(0, 2**32))
def test_each_rule_holds_position_by_position(pool: tuple[list[int], list[int]], seed: int) -> None:
    sizes, births = pool
    order = GrowingOrder(sizes, births, seed)
    length = births[-1] + 3 * sum(sizes)
    check_order(sizes, births, order(np.arange(length)).tolist())


@given(pools(), st.integers(0, 2**32), st.data())
def test_any_positions_in_any_order_give_the_same(
    pool: tuple[list[int], list[int]], seed: int, data: st.DataObject
) -> None:
    sizes, births = pool
    whole = GrowingOrder(sizes, births, seed)(np.arange(births[-1] + 3 * sum(sizes)))
    asked = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12))
    assert GrowingOrder(sizes, births, seed)(np.array(asked, dtype=np.int64)).tolist() == whole[asked].tolist()


@given(pools(), st.integers(0, 2**32))
def test_epochs_after_the_last_birth_hold_each_sample_once(pool: tuple[list[int], list[int]], seed: int) -> None:
    sizes, births = pool
    total = sum(sizes)
    order = GrowingOrder(sizes, births, seed)
    # The pass under way at the last birth ends after at most `total` draws; then whole passes follow each other.
    drawn = order(np.arange(births[-1], births[-1] + 4 * total)).tolist()
    starts = [s for s in range(total + 1) if all(len(set(drawn[s + i * total :][:total])) == total for i in range(3))]
    assert starts


def test_a_pass_ends_exactly_at_a_birth() -> None:
    # Both samples of block 0 appear twice before position 4. The second pass would end there, but block 1 joins it.
    order = GrowingOrder([2, 3], [0, 4], seed=3)
    drawn = order(np.arange(14)).tolist()
    assert sorted(drawn[0:2]) == sorted(drawn[2:4]) == [0, 1]
    assert sorted(drawn[4:7]) == [2, 3, 4]
    assert sorted(drawn[7:12]) == [0, 1, 2, 3, 4]
    # The same at the end of a pass over two blocks: slots 2 and 3, born at 2, complete the pass of 0 and 1.
    drawn = GrowingOrder([1, 1, 2], [0, 1, 2], seed=3)(np.arange(8)).tolist()
    assert drawn[:2] == [0, 1]
    assert sorted(drawn[2:4]) == [2, 3]
    assert sorted(drawn[4:8]) == [0, 1, 2, 3]


def test_a_tiny_pool_repeats_for_long_without_a_table() -> None:
    order = GrowingOrder([3, 1000], [0, 10**15], seed=1)
    assert len(order._segments) <= 4
    start = 10**15 // 3 * 3 - 3000  # a pass begins here
    passes = order(np.arange(start, start + 3000)).reshape(-1, 3)
    assert (np.sort(passes, axis=1) == [0, 1, 2]).all()
    assert len({tuple(row) for row in passes.tolist()}) == 6
    # One of the three was drawn in the pass that the birth interrupts: 1,002 are unseen.
    rest = order(np.arange(10**15, 10**15 + 1002)).tolist()
    assert len(set(rest)) == 1002


def test_seeds_differ() -> None:
    first, second = (GrowingOrder([50, 50], [0, 30], seed)(np.arange(200)).tolist() for seed in (1, 2))
    assert first != second
    assert first[100:] != first[:100]


def test_the_pool_is_a_prefix() -> None:
    order = GrowingOrder([2, 3, 4], [0, 5, 6], seed=0)
    assert order.pool_at(np.array([0, 4, 5, 6, 100])).tolist() == [2, 2, 5, 9, 9]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="size of at least 1"):
        GrowingOrder([0], [0], 0)
    with pytest.raises(ValueError, match="births must start at 0 and rise"):
        GrowingOrder([1, 1], [0, 0], 0)
