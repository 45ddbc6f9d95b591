"""Process ranks as points of a Cartesian grid with named axes."""

import math
from collections import namedtuple
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from penstock._core.counted import counted


class ProcessTopology:
    """Maps ranks to coordinates on named axes and back, by arithmetic.

    The first axis is the outermost: with axes ``["pipe", "data"]`` and sizes ``[2, 4]``, ranks 0 to 3 are the replicas
    of pipeline stage 0. Nothing is stored per rank, so a grid of any size costs the same.

    Args:
        axes: Names, outermost first.
        dims: The size of each axis.

    Attributes:
        axes: The names.
        dims: The sizes.
        ProcessCoord: The named tuple that :meth:`get_coord` returns.

    Raises:
        ValueError: Names and sizes that do not fit each other, a repeated name, a size below 1, or a name that cannot
            be a Python attribute.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes = list(axes)
        self.dims = [int(dim) for dim in dims]
        if len(self.axes) != len(self.dims) or not self.axes:
            raise ValueError(f"a topology needs one size for each axis, got axes {self.axes} and sizes {self.dims}")
        for axis, dim in zip(self.axes, self.dims, strict=True):
            if not axis.isidentifier() or iskeyword(axis) or axis.startswith("_"):
                raise ValueError(f"axis name {axis!r} in {self.axes} is not a plain identifier")
            if self.axes.count(axis) > 1:
                raise ValueError(f"axis {axis!r} is listed twice: {self.axes}")
            if dim < 1:
                raise ValueError(f"axis {axis!r} must have at least size 1, got {dim}")
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]
        self._strides = [math.prod(self.dims[i + 1 :]) for i in range(len(self.dims))]

    def world_size(self) -> int:
        """How many ranks the grid has."""
        return math.prod(self.dims)

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a point.

        Args:
            coord_kwargs: A coordinate for every axis.

        Raises:
            ValueError: An axis is missing or unknown, or a coordinate lies outside; use :meth:`filter_match` for a
                slice of the grid.
        """
        self._check_coordinates(coord_kwargs)
        missing = [axis for axis in self.axes if axis not in coord_kwargs]
        if missing:
            raise ValueError(
                f"get_rank() needs a coordinate on every axis, {', '.join(missing)} missing; "
                "filter_match() finds all ranks on a slice"
            )
        return sum(coord_kwargs[axis] * stride for axis, stride in zip(self.axes, self._strides, strict=True))

    def get_coord(self, rank: int) -> Any:
        """The coordinates of a rank, as a named tuple with a field for each axis.

        Raises:
            ValueError: No such rank.
        """
        if not 0 <= rank < self.world_size():
            raise ValueError(f"rank {rank} is outside {self!r}, which has ranks 0 to {self.world_size() - 1}")
        return self.ProcessCoord(*(rank // stride % dim for stride, dim in zip(self._strides, self.dims, strict=True)))

    def get_dim(self, axis: str) -> int:
        """The size of an axis; 0 where there is none of that name."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_axis_names(self) -> list[str]:
        """The axes' names, outermost first."""
        return list(self.axes)

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """All ranks whose coordinate on ``axis`` is ``idx``, ascending.

        Raises:
            ValueError: An unknown axis or a coordinate outside it.
        """
        return self.filter_match(**{axis: idx})

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """All ranks with the given coordinates, ascending; without any, all ranks.

        Raises:
            ValueError: An unknown axis or a coordinate outside it.
        """
        self._check_coordinates(filter_kwargs)
        ranks = np.zeros(1, dtype=np.int64)
        for axis, dim, stride in zip(self.axes, self.dims, self._strides, strict=True):
            steps = np.array([filter_kwargs[axis]]) if axis in filter_kwargs else np.arange(dim)
            ranks = (ranks[:, None] + steps[None, :] * stride).reshape(-1)
        return [int(rank) for rank in ranks]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ only in their coordinate on ``axis``.

        Groups are in the order of their first ranks, ranks ascend within each. An axis that does not exist has no
        groups: code for pipe, data and model axes then needs no case for their absence.
        """
        if axis not in self.axes:
            return []
        position = self.axes.index(axis)
        grid = np.arange(self.world_size()).reshape(self.dims)
        groups: list[list[int]] = np.moveaxis(grid, position, -1).reshape(-1, self.dims[position]).tolist()
        return groups

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """A rank's coordinates as text, for file names: ``model_00``.

        Args:
            rank: The rank.
            omit_axes: Axes to leave out.
            inner_sep: Between an axis and its coordinate, which has at least two digits.
            outer_sep: Between axes.
        """
        coord = self.get_coord(rank)
        kept = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in kept)

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The same grid as a torch ``DeviceMesh`` whose dimensions carry the axes' names.

        Collective: every rank of the world calls it.

        Args:
            device_type: ``"cpu"`` or ``"cuda"``.

        Raises:
            ValueError: The world has another size than the grid.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() != self.world_size():
            raise ValueError(
                f"{self!r} has {counted(self.world_size(), 'rank', 'ranks')}, but "
                f"{counted(torch.distributed.get_world_size(), 'process was', 'processes were')} started; "
                "start as many processes as the product of the axes, or change an axis"
            )
        return init_device_mesh(device_type, tuple(self.dims), mesh_dim_names=tuple(self.axes))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcessTopology):
            return NotImplemented
        return self.axes == other.axes and self.dims == other.dims

    def __hash__(self) -> int:
        return hash((tuple(self.axes), tuple(self.dims)))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={dim}" for axis, dim in zip(self.axes, self.dims, strict=True))
        return f"{type(self).__name__}({sizes})"

    def _check_coordinates(self, coordinates: dict[str, int]) -> None:
        for axis, index in coordinates.items():
            if axis not in self.axes:
                raise ValueError(f"unknown axis {axis!r}; {self!r} has axes {', '.join(self.axes)}")
            dim = self.get_dim(axis)
            if not 0 <= index < dim:
                raise ValueError(f"{axis}={index} is outside the axis {axis!r}, which has indices 0 to {dim - 1}")


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages and replicas; neighbouring ranks are replicas of one stage, whose gradients are the most bytes.

    Args:
        num_pp: Pipeline stages.
        num_dp: Replicas.
    """

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline stages, replicas and tensor-parallel ranks; the latter are neighbours.

    Args:
        num_pp: Pipeline stages.
        num_mp: Tensor-parallel ranks.
        num_dp: Replicas.
    """

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])
