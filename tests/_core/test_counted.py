import pytest

from penstock._core.counted import counted


@pytest.mark.parametrize(("number", "expected"), [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks")])
def test_one_is_singular_and_nothing_else_is(number: int, expected: str) -> None:
    assert counted(number, "rank", "ranks") == expected
