import pytest

from penstock.pipe.program import Program
from penstock.pipe.schedule import Action, Channel, Schedule, forward_on, get_schedule, simulate, validate


def text(program: Program) -> str:
    return " ".join(str(action) for action, _ in program.steps)


def test_the_program_of_a_rank() -> None:
    program = Program.of(get_schedule("1f1b", 2, 3), 1)
    assert text(program) == ("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2")
    assert program.stages == (1,)
    assert program.messages == {Channel(0, 1, "F"): 3, Channel(1, 0, "B"): 3}
    assert program.last_backward == {1: Action(1, "B", 2)}
    assert not program.split


def test_the_last_backward_of_gpipe_is_where_its_order_ends() -> None:
    schedule = get_schedule("gpipe", 3, 4)
    for rank in range(3):
        last = [action for action in schedule.ranks[rank] if action.op == "B"][-1]
        assert Program.of(schedule, rank).last_backward == {rank: last}


def test_forward_only_keeps_the_placement() -> None:
    ranks = [
        [Action(0, "F", 0), Action(2, "F", 0), Action(2, "B", 0), Action(0, "B", 0)],
        [Action(1, "F", 0), Action(1, "B", 0)],
    ]
    program = Program.of(Schedule.from_ranks(ranks, "loop"), 0).forward_only(2)
    assert text(program) == "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2RECV_F1 2F1"
    assert program.stages == (0, 2)
    assert program.schedule.forward_only


@pytest.mark.parametrize(
    "placement", [(0, 1, 2, 3), (0, 1, 2, 3, 0, 1, 2, 3), (0, 1, 2, 3, 3, 2, 1, 0), (0, 0, 1, 2, 3)]
)
def test_forward_passes_fill_the_pipeline_wherever_stages_lie(placement: tuple[int, ...]) -> None:
    schedule = forward_on(placement, 16)
    assert schedule.placement == placement
    validate(schedule, capacity=max(4, len(placement) + 1))  # the engine's window
    busiest = max(placement.count(rank) for rank in placement)
    assert simulate(schedule).makespan <= busiest * 16 + len(placement) - 1


def test_gradients_are_final_after_the_last_weight_half() -> None:
    order = [Action.parse(f"0{text}") for text in ("F0", "F1", "F2", "I0", "B1", "I2", "W2", "W0")]
    program = Program.of(Schedule.from_ranks([order], "split"), 0)
    assert program.last_backward == {0: Action(0, "W", 0)}
    assert program.split == {(0, 0), (0, 2)}
