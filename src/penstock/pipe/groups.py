"""The process groups of one rank of a pipeline."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

from penstock._core.counted import counted
from penstock._core.waiting import Watcher
from penstock._version import __version__
from penstock.pipe.agreement import agree
from penstock.pipe.connections import Connections
from penstock.pipe.module import PipelineModule
from penstock.pipe.route import Route
from penstock.pipe.topology import ProcessTopology

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

Group = dist.ProcessGroup | None
"""None stands for a group of one: nothing to communicate."""

_DEFAULT_TIMEOUT: Final = timedelta(minutes=30)


class PipeGroups:
    """This rank's place in the topology, and a process group for each kind of talk, so that none blocks another.

    Collective: every rank of the world makes one, at the same point of its program. Every point on
    other axes (a ``model`` axis) has a pipeline of its own.

    Args:
        topology: Which rank is where; needs a ``pipe`` axis, a ``data`` axis is optional.
        tied: For each tie key, the pipeline ranks that hold a copy (:func:`tied_ranks`).
        rank: This rank; None asks torch.distributed.
        timeout: torch's own limit on an operation of these groups; to be longer than the watcher's deadline, whose
            message says more.
        device: Where activations live. On a GPU they travel over NCCL, gradients of tied weights too.
        payload_backend: A backend for activations of a CPU ``device`` apart from their frames, as a GPU has them; None
            sends them inside.
        watcher: Told while ranks are waited for.
        store: The rendezvous store; None takes torch.distributed's own.

    Attributes:
        topology: As given.
        rank: This rank in the world.
        pipe_rank: Its place in its pipeline.
        num_pipe_ranks: Length of the pipeline.
        pipeline_ranks: Of this pipeline, by place, their ranks in the world.
        replica: Which data-parallel replica it belongs to.
        num_replicas: How many there are.
        model_rank: Its place on the ``model`` axis.
        num_model_ranks: The size of this axis; 1 where there is none.
        control: All ranks, gloo: losses and other small talk.
        pipeline: This pipeline's ranks, gloo: outputs of a prediction.
        replicas: The ranks that hold the same stages, for the gradient exchange.
        model: The ranks that divide the same layers among them.
        tied: For each tie key with copies on several ranks of this pipeline, this one among them: those ranks.
        connections: To other ranks; None for a world of one.
        routes: For the transport, by direction; none for a pipeline of one rank.
        store: The rendezvous store, None for a world of one.
        timeout: Torch's own limit on an operation in these groups.

    Raises:
        ValueError: The world has another size than the topology, an axis is missing, ranks differ in what they were
            given, ``GLOO_SOCKET_IFNAME`` names no interface; all before any group is made.
        WaitError: Ranks did not arrive within the watcher's deadline.
    """

    def __init__(
        self,
        topology: ProcessTopology,
        *,
        tied: Mapping[str, Sequence[int]] | None = None,
        rank: int | None = None,
        timeout: timedelta = _DEFAULT_TIMEOUT,
        device: torch.device | str = "cpu",
        payload_backend: str | None = None,
        watcher: Watcher | None = None,
        store: "Store | None" = None,
    ) -> None:
        world_size = topology.world_size()
        started = dist.get_world_size() if dist.is_initialized() else 1
        if started != world_size:
            raise ValueError(
                f"{topology!r} needs {counted(world_size, 'process', 'processes')}, "
                f"but {counted(started, 'is', 'are')} running; "
                "start as many as the product of the axes, or change an axis"
            )
        if "pipe" not in topology.get_axis_names():
            raise ValueError(f"{topology!r} has no 'pipe' axis; a pipeline of one stage has one of size 1")
        self.topology = topology
        self.rank = rank if rank is not None else (dist.get_rank() if world_size > 1 else 0)
        place = topology.get_coord(self.rank)
        self.pipe_rank: int = place.pipe
        self.num_pipe_ranks = topology.get_dim("pipe")
        pipelines = topology.get_axis_comm_lists("pipe")
        self.pipeline_ranks: tuple[int, ...] = next(tuple(ranks) for ranks in pipelines if self.rank in ranks)
        self.replica: int = getattr(place, "data", 0)
        self.num_replicas = topology.get_dim("data") or 1
        self.model_rank: int = getattr(place, "model", 0)
        self.num_model_ranks = topology.get_dim("model") or 1
        self.device = torch.device(device)
        self.store = None
        self.timeout = timeout
        self._groups: list[dist.ProcessGroup] = []
        sharing = _checked_ties(tied or {}, self.num_pipe_ranks)
        self.connections: Connections | None = None
        watcher = watcher or Watcher(rank=self.rank)
        if world_size > 1:
            self.store = store if store is not None else _default_store()
            facts = {
                "penstock version": __version__,
                "topology": repr(topology),
                "device": self.device.type,
                "payload backend": payload_backend,
                "tied weights": {key: list(ranks) for key, ranks in sorted(sharing.items())},
            }
            agree("topology", facts, store=self.store, rank=self.rank, world_size=world_size, watcher=watcher)
            self.connections = Connections(self.rank, store=self.store, watcher=watcher)
        with watcher.waiting("making process groups"):
            self._make(sharing, payload_backend)

    def _make(self, sharing: Mapping[str, tuple[int, ...]], payload_backend: str | None) -> None:
        """Make all groups: every rank makes those of every other too, in the same order, as torch demands."""
        on_gpu = self.device.type == "cuda"
        backend = "nccl" if on_gpu else "gloo"
        payload_backend = "nccl" if on_gpu else payload_backend
        pipelines = self.topology.get_axis_comm_lists("pipe")
        self.control = self._new([list(range(self.topology.world_size()))], "gloo", "control")
        self.pipeline = self._new(pipelines, "gloo", "pipeline")
        self.replicas = self._new(self.topology.get_axis_comm_lists("data"), backend, "replicas")
        self.model = self._new(self.topology.get_axis_comm_lists("model"), backend, "model")
        self.routes: dict[str, Route] = {}
        for direction in ("F", "B"):
            payload = self._new(pipelines, payload_backend, f"payload {direction}") if payload_backend else None
            if self.connections is not None and self.num_pipe_ranks > 1:
                self.routes[direction] = Route(direction, self.connections, self.pipeline_ranks, payload, self.device)
        # Keys with the same owners share a group.
        self.tied: dict[str, dist.ProcessGroup] = {}
        groups = {
            ranks: self._new([[pipeline[r] for r in ranks] for pipeline in pipelines], backend, f"tied {ranks}")
            for ranks in sorted(set(sharing.values()))
        }
        for key, ranks in sharing.items():
            group = groups[ranks]
            if group is not None:
                self.tied[key] = group

    def _new(self, rank_lists: Sequence[Sequence[int]], backend: str, name: str) -> Group:
        """Make a group of each list and return the one with this rank, None where it would be alone or in none."""
        mine = None
        for ranks in rank_lists:
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), timeout=self.timeout, backend=backend, group_desc=f"pipe {name}")
                if self.rank in ranks:
                    mine = group
                    self._groups.append(group)
        return mine

    def adopt(self, *groups: dist.ProcessGroup) -> None:
        """Destroy these groups in :meth:`close`, too; every rank adopts its own in the same order."""
        self._groups.extend(groups)

    def close(self) -> None:
        """Close the connections and destroy the groups. Collective."""
        if self.connections is not None:
            self.connections.close()
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups.clear()


def tied_ranks(module: PipelineModule, placement: Sequence[int] | None = None) -> dict[str, tuple[int, ...]]:
    """For each tie key of a model, the pipeline ranks that hold a copy, ascending.

    Args:
        module: Its number of stages must be known.
        placement: For each stage, its pipeline rank; None places stage ``s`` on rank ``s``.
    """
    where = range(module.num_stages or 0) if placement is None else placement
    return {
        key: tuple(sorted({where[module.stage_of(layer)] for layer in layers})) for key, layers in module.tied.items()
    }


def _checked_ties(tied: Mapping[str, Sequence[int]], num_pipe_ranks: int) -> dict[str, tuple[int, ...]]:
    for key, ranks in tied.items():
        outside = [rank for rank in ranks if not 0 <= rank < num_pipe_ranks]
        if outside:
            raise ValueError(
                f"tied weight {key!r} lies on pipeline rank {outside[0]}, but the pipeline has {num_pipe_ranks} ranks"
            )
    return {key: tuple(sorted(set(ranks))) for key, ranks in tied.items()}


def _default_store() -> "Store":
    # The one private call here: torch has no public way to the store that init_process_group made.
    return dist.distributed_c10d._get_default_store()
