"""The capacity of a channel's messages: long enough, the same on both ends, and not for ever."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.buffers import round_up
from penstock.pipe.capacity import AHEAD, EPOCH, Capacity


def capacities(steps: list[list[int]], ahead: int) -> list[int]:
    """Of each message, for an end that asks ``ahead`` messages before it knows the length."""
    capacity = Capacity()
    found = []
    for lengths in steps:
        capacity.begin()
        asked = [capacity.take() for _ in range(min(ahead, len(lengths)))]
        for index, length in enumerate(lengths):
            if ahead == 0:
                asked.append(capacity.take())
            capacity.saw(length)
            if ahead and index + ahead < len(lengths):
                asked.append(capacity.take())
        found += asked
    return found


lengths = st.lists(st.lists(st.integers(1, 100_000), max_size=40), max_size=8)


@given(lengths)
def test_both_ends_take_the_same_capacities(steps: list[list[int]]) -> None:
    assert capacities(steps, 0) == capacities(steps, AHEAD)


@given(lengths)
def test_a_repeated_length_fits(steps: list[list[int]]) -> None:
    repeated = [[length for length in step for _ in range(AHEAD + 1)] for step in steps]
    flat = [length for step in repeated for length in step]
    for length, capacity in list(zip(flat, capacities(repeated, 0), strict=True))[AHEAD :: AHEAD + 1]:
        assert capacity >= length


def test_capacity_shrinks_when_long_frames_stay_away() -> None:
    found = capacities([[100_000] + [10] * (2 * EPOCH + AHEAD)], AHEAD)
    assert found[:AHEAD] == [round_up(1)] * AHEAD
    assert found[AHEAD] == found[EPOCH] == round_up(100_000)
    assert found[-1] == round_up(10)
