"""The built-in schedules against literal tables."""

import pytest

from penstock.pipe.schedule import get_schedule

GPIPE_4_8 = """\
0F0,0F1,0F2,0F3,0F4,0F5,0F6,0F7,0B0,0B1,0B2,0B3,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1F3,1F4,1F5,1F6,1F7,1B0,1B1,1B2,1B3,1B4,1B5,1B6,1B7
2F0,2F1,2F2,2F3,2F4,2F5,2F6,2F7,2B0,2B1,2B2,2B3,2B4,2B5,2B6,2B7
3F0,3F1,3F2,3F3,3F4,3F5,3F6,3F7,3B0,3B1,3B2,3B3,3B4,3B5,3B6,3B7
"""
ONE_F_ONE_B_4_8 = """\
0F0,0F1,0F2,0F3,0B0,0F4,0B1,0F5,0B2,0F6,0B3,0F7,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1B0,1F3,1B1,1F4,1B2,1F5,1B3,1F6,1B4,1F7,1B5,1B6,1B7
2F0,2F1,2B0,2F2,2B1,2F3,2B2,2F4,2B3,2F5,2B4,2F6,2B5,2F7,2B6,2B7
3F0,3B0,3F1,3B1,3F2,3B2,3F3,3B3,3F4,3B4,3F5,3B5,3F6,3B6,3F7,3B7
"""
LOOPED_BFS_2_3 = """\
0F0,0F1,0F2,2F0,2F1,2F2,2B0,2B1,2B2,0B0,0B1,0B2
1F0,1F1,1F2,3F0,3F1,3F2,3B0,3B1,3B2,1B0,1B1,1B2
"""
INTERLEAVED_2_4 = """\
0F0,0F1,2F0,2F1,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,2B2,2B3,0B2,0B3
1F0,1F1,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,1B2,1B3
"""
# Two groups, of three and of two micro-batches.
INTERLEAVED_2_5 = """\
0F0,0F1,0F2,2F0,2F1,2F2,2B0,0F3,2B1,0F4,2B2,2F3,0B0,2F4,0B1,0B2,2B3,2B4,0B3,0B4
1F0,1F1,1F2,3F0,3B0,3F1,3B1,3F2,3B2,1F3,1B0,1F4,1B1,3F3,1B2,3F4,3B3,3B4,1B3,1B4
"""
ZB_H1_3_4 = """\
0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3
1F0,1F1,1I0,1F2,1I1,1W0,1F3,1I2,1W1,1I3,1W2,1W3
2F0,2I0,2F1,2I1,2F2,2I2,2W0,2F3,2I3,2W1,2W2,2W3
"""
ZB_H2_2_4 = """\
0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3
1F0,1I0,1F1,1I1,1F2,1I2,1W0,1F3,1I3,1W1,1W2,1W3
"""
ZB_V_2_4 = """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0F3,0I0,0W0,3F2,3I2,3W2,0I1,0W1,3F3,3I3,3W3,0I2,0W2,0I3,0W3
1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1F3,1I1,1W1,2F3,2I2,2W2,1I2,2I3,1I3,1W2,2W3,1W3
"""
V_HALF_3_4 = """\
0F0,0F1,5F0,5I0,0F2,5W0,5F1,5I1,0I0,0F3,5W1,5F2,5I2,0W0,0I1,5W2,0W1,5F3,5I3,0I2,5W3,0W2,0I3,0W3
1F0,4F0,1F1,4I0,4F1,1F2,1I0,4I1,4W0,4F2,1W0,1F3,1I1,4I2,4W1,4F3,1W1,1I2,4I3,4W2,1W2,1I3,4W3,1W3
2F0,3F0,2F1,3F1,3I0,2I0,2F2,3W0,3F2,3I1,2I1,2W0,2F3,3W1,3F3,3I2,2I2,2W1,3W2,3I3,2I3,2W2,3W3,2W3
"""
V_MIN_3_4 = """\
0F0,5F0,0F1,5I0,5W0,5F1,0F2,0I0,5I1,0W0,5W1,5F2,0F3,0I1,5I2,0W1,5W2,5F3,0I2,5I3,0W2,5W3,0I3,0W3
1F0,4F0,1F1,4I0,4W0,4F1,1I0,1F2,1W0,4I1,4F2,4W1,1I1,1F3,1W1,4I2,4F3,4W2,1I2,1W2,4I3,4W3,1I3,1W3
2F0,3F0,2F1,3F1,3I0,2I0,3W0,2W0,2F2,3F2,3I1,2I1,3W1,2W1,2F3,3F3,3I2,2I2,3W2,2W2,3I3,2I3,3W3,2W3
"""
V_MIN_2_3 = """\
0F0,3F0,3I0,0F1,3W0,0I0,0W0,3F1,3I1,0F2,3W1,0I1,0W1,3F2,3I2,3W2,0I2,0W2
1F0,2F0,2I0,1I0,1F1,2F1,2W0,1W0,2I1,1I1,1F2,2F2,2W1,1W1,2I2,1I2,2W2,1W2
"""
DUALPIPE_V_2_5 = """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,0F3,3B1,3F2,0B0,0F4,3B2,3F3,0B1,3B3,3F4,0B2,3B4,0I3,0W3,0I4,0W4
1F0,2F0,1F1,2F1,1F2,2B0,2F2,1B0,1F3,2B1,2F3,1B1,1F4,2B2,2F4,1B2,2B3,1B3,2I4,1I4,2W4,1W4
"""
SEQ1F1B_2_3 = """\
0F0,0F1,0F2,0B1,0F3,0B0,0F4,0B3,0F5,0B2,0B5,0B4
1F0,1F1,1B1,1F2,1B0,1F3,1B3,1F4,1B2,1F5,1B5,1B4
"""
LINE, LOOP, V = (0, 1), (0, 1, 0, 1), (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("name", "ranks", "count", "placement", "table"),
    [
        ("gpipe", 4, 8, (0, 1, 2, 3), GPIPE_4_8),
        ("gpipe", 1, 3, (0,), "0F0,0F1,0F2,0B0,0B1,0B2\n"),
        ("gpipe", 3, 2, (0, 1, 2), "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2F1,2B0,2B1\n"),
        ("1f1b", 4, 8, (0, 1, 2, 3), ONE_F_ONE_B_4_8),
        ("1f1b", 1, 3, (0,), "0F0,0B0,0F1,0B1,0F2,0B2\n"),
        ("1f1b", 4, 2, (0, 1, 2, 3), "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2F1,2B0,2B1\n3F0,3B0,3F1,3B1\n"),
        ("1f1b", 3, 3, (0, 1, 2), "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1B0,1F2,1B1,1B2\n2F0,2B0,2F1,2B1,2F2,2B2\n"),
        ("looped_bfs", 2, 3, LOOP, LOOPED_BFS_2_3),
        ("interleaved_1f1b", 2, 4, LOOP, INTERLEAVED_2_4),
        ("interleaved_1f1b", 2, 5, LOOP, INTERLEAVED_2_5),
        ("interleaved_1f1b", 2, 1, LOOP, "0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n"),
        ("zb_h1", 3, 4, (0, 1, 2), ZB_H1_3_4),
        ("zb_h1", 1, 2, (0,), "0F0,0I0,0W0,0F1,0I1,0W1\n"),
        ("zb_h2", 2, 4, LINE, ZB_H2_2_4),
        ("zb_v", 2, 4, V, ZB_V_2_4),
        ("zb_v", 2, 1, V, "0F0,3F0,3I0,3W0,0I0,0W0\n1F0,2F0,2I0,2W0,1I0,1W0\n"),
        ("v_half", 3, 4, (0, 1, 2, 2, 1, 0), V_HALF_3_4),
        ("v_min", 3, 4, (0, 1, 2, 2, 1, 0), V_MIN_3_4),
        ("v_min", 2, 3, V, V_MIN_2_3),
        ("dualpipe_v", 2, 5, V, DUALPIPE_V_2_5),
        ("dualpipe_v", 2, 2, V, "0F0,0F1,3F0,3I0,3W0,3F1,3B1,0B0,0B1\n1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\n"),
        ("seq1f1b", 2, 3, LINE, SEQ1F1B_2_3),
        ("forward_only", 2, 3, LINE, "0F0,0F1,0F2\n1F0,1F1,1F2\n"),
    ],
)
def test_literal_table(name: str, ranks: int, count: int, placement: tuple[int, ...], table: str) -> None:
    schedule = get_schedule(name, ranks, count)
    assert schedule.to_text() == table
    assert schedule.placement == placement
    assert (schedule.name, schedule.micro_batches, schedule.num_ranks) == (name, count, ranks)


def test_chunks_and_slices_are_chosen() -> None:
    assert get_schedule("forward_only", 2, 2, chunks=2).to_text() == "0F0,0F1,2F0,2F1\n1F0,1F1,3F0,3F1\n"
    assert get_schedule("interleaved_1f1b", 2, 1, chunks=3).to_text() == (
        "0F0,2F0,4F0,4B0,2B0,0B0\n1F0,3F0,5F0,5B0,3B0,1B0\n"
    )
    assert get_schedule("looped_bfs", 1, 2, chunks=1).to_text() == "0F0,0F1,0B0,0B1\n"
    sliced = get_schedule("seq1f1b", 1, 2, slices=3)
    assert sliced.to_text() == "0F0,0F1,0F2,0B2,0F3,0B1,0F4,0B0,0F5,0B5,0B4,0B3\n"
    assert (sliced.micro_batches, sliced.slices, sliced.units) == (2, 3, 6)
