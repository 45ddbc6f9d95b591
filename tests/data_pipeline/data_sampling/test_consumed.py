import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import Consumed

pairs = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=20, unique=True)


def account(entries: list[tuple[int, int]]) -> Consumed:
    found = Consumed()
    positions, samples = (np.array(column, dtype=np.int64) for column in zip(*entries, strict=True))
    found.enter(positions, samples)
    return found


@given(pairs, st.randoms(use_true_random=False), st.integers(1, 5))
def test_any_split_in_any_order_gives_the_same(entries: list[tuple[int, int]], random: object, parts: int) -> None:
    whole = account(entries)
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    together = Consumed()
    for part in range(parts):
        if shuffled[part::parts]:
            together.add(Consumed.from_state(account(shuffled[part::parts]).state_dict()))
    assert together.state_dict() == whole.state_dict()


@given(pairs, st.data())
def test_a_sample_left_out_repeated_or_exchanged_shows(entries: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = account(entries).digest
    place = data.draw(st.integers(0, len(entries) - 1))
    k, sample = entries[place]
    assert account([*entries, (k, sample)]).digest != whole
    changed = entries.copy()
    changed[place] = (k, sample + 1)
    assert account(changed).digest != whole
    if len(entries) > 1:
        assert account(entries[:place] + entries[place + 1 :]).digest != whole
        other = (place + 1) % len(entries)
        if entries[other][0] != k and entries[other][1] != sample:
            changed = entries.copy()
            changed[place], changed[other] = (k, entries[other][1]), (entries[other][0], sample)
            assert account(changed).digest != whole


def test_an_order_can_be_summed_in_parts() -> None:
    whole = Consumed.of(lambda k: k * 3, 0, 50)
    parts = Consumed.of(lambda k: k * 3, 0, 20)
    parts.add(Consumed.of(lambda k: k * 3, 20, 50))
    assert parts.state_dict() == whole.state_dict()
    assert whole.count == 50


def test_mistakes_are_named() -> None:
    for state in ({}, {"count": 1, "digest": "x"}, {"count": -1, "digest": "0" * 32}, {"count": 1, "digest": "g" * 32}):
        with pytest.raises(ValueError, match="not an account of consumed samples"):
            Consumed.from_state(state)
