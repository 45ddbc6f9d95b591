"""Topologies against a brute-force list of all coordinates, and against torch's device meshes."""

import itertools
import math
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology
from support.pool import WorkerPool

NAMES = ["pipe", "data", "model", "x", "y"]
dims = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def _grid(sizes: list[int]) -> list[tuple[int, ...]]:
    """Coordinates of every rank: the reference is ``itertools.product``, whose last axis turns fastest."""
    return list(itertools.product(*map(range, sizes)))


@given(dims)
def test_ranks_and_coordinates(sizes: list[int]) -> None:
    axes = NAMES[: len(sizes)]
    topology = ProcessTopology(axes, sizes)
    points = _grid(sizes)
    assert topology.world_size() == len(points)
    assert topology.get_axis_names() == axes
    for rank, point in enumerate(points):
        assert topology.get_rank(**dict(zip(axes, point, strict=True))) == rank
        assert tuple(topology.get_coord(rank)) == point
        assert topology.get_coord(rank) == topology.ProcessCoord(*point)
        assert getattr(topology.get_coord(rank), axes[-1]) == point[-1]


@given(dims, st.data())
def test_slices_and_groups(sizes: list[int], data: st.DataObject) -> None:
    axes = NAMES[: len(sizes)]
    topology = ProcessTopology(axes, sizes)
    points = _grid(sizes)
    fixed = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    wanted = {i: data.draw(st.integers(0, sizes[i] - 1)) for i in sorted(fixed)}
    expected = [r for r, point in enumerate(points) if all(point[i] == v for i, v in wanted.items())]
    assert topology.filter_match(**{axes[i]: v for i, v in wanted.items()}) == expected
    for i, axis in enumerate(axes):
        assert topology.get_dim(axis) == sizes[i]
        for index in range(sizes[i]):
            assert topology.get_axis_list(axis, index) == [r for r, point in enumerate(points) if point[i] == index]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, point in enumerate(points):
            groups.setdefault(point[:i] + point[i + 1 :], []).append(rank)
        assert topology.get_axis_comm_lists(axis) == sorted(groups.values())


def test_an_absent_axis_has_no_size_and_no_groups() -> None:
    topology = PipeDataParallelTopology(2, 2)
    assert topology.get_dim("model") == 0
    assert topology.get_axis_comm_lists("model") == []


def test_named_topologies_put_the_chattiest_axis_innermost() -> None:
    two = PipeDataParallelTopology(num_pp=2, num_dp=3)
    assert (two.axes, two.dims) == (["pipe", "data"], [2, 3])
    assert two.get_rank(pipe=1, data=0) == 3
    three = PipeModelDataParallelTopology(num_pp=2, num_mp=3, num_dp=4)
    assert (three.axes, three.dims) == (["pipe", "data", "model"], [2, 4, 3])
    assert three.get_rank(pipe=1, data=2, model=1) == 12 + 6 + 1
    assert three == ProcessTopology(["pipe", "data", "model"], [2, 4, 3])
    assert len({three, ProcessTopology(["pipe", "data", "model"], [2, 4, 3]), two}) == 2


@pytest.mark.parametrize(
    ("axes", "rank", "options", "text"),
    [
        (["a", "b"], 2, {}, "a_01-b_00"),
        (["a", "b"], 3, {"inner_sep": "+", "outer_sep": "__"}, "a+01__b+01"),
        (["pipe", "data"], 3, {}, ""),
        (["pipe", "data"], 3, {"omit_axes": ["pipe"]}, "data_01"),
        (["pipe", "data"], 2, {"omit_axes": []}, "pipe_01-data_00"),
        (["pipe", "data", "model"], 5, {}, "model_01"),
    ],
)
def test_rank_as_text(axes: list[str], rank: int, options: dict[str, Any], text: str) -> None:
    assert ProcessTopology(axes, [2] * len(axes)).get_rank_repr(rank, **options) == text


def test_long_coordinates_are_not_cut() -> None:
    assert ProcessTopology(["model"], [200]).get_rank_repr(123) == "model_123"


def test_a_hundred_thousand_ranks_cost_no_table() -> None:
    topology = PipeModelDataParallelTopology(num_pp=100, num_mp=10, num_dp=10_000)
    assert topology.world_size() == 10_000_000
    assert topology.get_coord(9_999_999) == (99, 9_999, 9)
    assert topology.filter_match(pipe=99, data=9_999) == list(range(9_999_990, 10_000_000))
    assert not any(isinstance(v, dict | list) and len(v) > 3 for v in vars(topology).values())
    assert len(PipeDataParallelTopology(10, 10_000).get_axis_comm_lists("pipe")) == 10_000


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        (["pipe"], [2, 2], r"one size for each axis, got axes \['pipe'\] and sizes \[2, 2\]"),
        ([], [], "one size for each axis"),
        (["pipe", "pipe"], [2, 2], "'pipe' is listed twice"),
        (["pipe", "data"], [2, 0], "'data' must have at least size 1, got 0"),
        (["my axis"], [2], "'my axis' .* is not a plain identifier"),
        (["class"], [2], "'class' .* is not a plain identifier"),
    ],
)
def test_bad_axes(axes: list[str], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessTopology(axes, sizes)


def test_bad_coordinates_name_axes_and_sizes() -> None:
    topology = PipeDataParallelTopology(2, 4)
    with pytest.raises(ValueError, match="every axis, data missing; filter_match"):
        topology.get_rank(pipe=1)
    with pytest.raises(ValueError, match=r"unknown axis 'modle'.*pipe=2, data=4.*has axes pipe, data"):
        topology.filter_match(modle=0)
    with pytest.raises(ValueError, match="data=4 is outside the axis 'data', which has indices 0 to 3"):
        topology.get_rank(pipe=0, data=4)
    with pytest.raises(ValueError, match=r"pipe=-1 is outside"):
        topology.get_axis_list("pipe", -1)
    with pytest.raises(ValueError, match=r"rank 8 is outside .* ranks 0 to 7"):
        topology.get_coord(8)


def _mesh_agrees(rank: int, world_size: int) -> None:
    topology = PipeDataParallelTopology(num_pp=2, num_dp=world_size // 2)
    mesh = topology.device_mesh("cpu")
    assert mesh.mesh_dim_names == ("pipe", "data")
    assert tuple(mesh.get_coordinate() or ()) == tuple(topology.get_coord(rank))
    for axis in topology.get_axis_names():
        group = dist.get_process_group_ranks(mesh.get_group(axis))
        assert group in topology.get_axis_comm_lists(axis)
        assert rank in group


def test_device_mesh_is_the_same_grid(pool: WorkerPool) -> None:
    pool.run(_mesh_agrees, 4)


def _wrong_world(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="processes were started") as caught:
        PipeDataParallelTopology(num_pp=2, num_dp=2).device_mesh("cpu")
    return str(caught.value)


def test_device_mesh_needs_the_right_world(pool: WorkerPool) -> None:
    for message in pool.run(_wrong_world, 2):
        assert "pipe=2, data=2) has 4 ranks, but 2 processes were started" in message


@given(dims)
def test_world_size_is_the_product(sizes: list[int]) -> None:
    assert ProcessTopology(NAMES[: len(sizes)], sizes).world_size() == math.prod(sizes)
