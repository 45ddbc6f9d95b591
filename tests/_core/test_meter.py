import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.meter import REPLICAS, Meter


@given(st.integers(1, 64), st.integers(0, 10**6))
def test_bytes_of_collectives_are_those_of_the_bandwidth_optimal_algorithms(ranks: int, share: int) -> None:
    # A ring all-reduce of n chunks sends each chunk n - 1 times to be summed and n - 1 times to be spread.
    nbytes = share * ranks
    meter = Meter()
    meter.all_reduce("reduce", nbytes, ranks)
    meter.all_gather("gather", share, ranks)
    assert meter.sent["reduce"] == 2 * (ranks - 1) * share
    assert meter.sent["gather"] == (ranks - 1) * share
    assert meter.received == meter.sent


def test_totals_survive_a_round_trip_and_go_on() -> None:
    meter = Meter()
    meter.count(REPLICAS, sent=3, received=5)
    with meter.timed("compute"):
        pass
    other = Meter()
    other.load_state_dict(meter.state_dict())
    other.count(REPLICAS, sent=1)
    assert other.sent == {REPLICAS: 4}
    assert other.received == {REPLICAS: 5}
    assert other.seconds == meter.seconds


def test_time_counts_also_when_the_block_fails() -> None:
    meter = Meter()

    def fail() -> None:
        with meter.timed("compute"):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert "compute" in meter.seconds
