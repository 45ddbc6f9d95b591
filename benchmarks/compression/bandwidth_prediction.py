"""What ``penstock network`` would say of the contenders of :mod:`benchmarks.compression.bandwidth`, to be held to it.

On every shaped network the ranks are measured as that program measures them (collectives, algorithms) and, in place of
the user's ``--step-time``, the step of the benchmark without any exchange.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
import torch.distributed as dist

from penstock._core.waiting import Watcher
from penstock.compression import create_compression_algorithm, known_algorithms
from penstock.compression.network.cost import Shapes, predict
from penstock.compression.network.link import Link
from penstock.compression.network.probe import Codec, Network, measure_codec, measure_network

NETWORK: Final = "network"
"""Stands for a contender's name in the key of the cell that these measurements make."""
_DEADLINE_S: Final = 250.0
_LINKS: Final = ("all_reduce", "all_to_all", "all_gather")
_APART: Final = {"DiLoCo float32": "none", "DiLoCo int8": "int8", "SparseLoCo": "topk_int2"}


def measure_ranks() -> dict[str, Any]:
    """Collectives between the ranks, and each algorithm here while all ranks time theirs; a JSON value."""
    device = torch.device("cpu")
    with Watcher(rank=dist.get_rank(), deadline_s=_DEADLINE_S) as watcher:
        network = measure_network(device, watcher)
        codecs = {
            name: asdict(measure_codec(create_compression_algorithm(name), device)) for name in known_algorithms()
        }
    return {NETWORK: asdict(network), "codecs": codecs}


def cell_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell from what all ranks measured: the slowest one's compute, medians of the algorithms' times."""
    codecs = {
        name: {key: statistics.median(rank["codecs"][name][key] for rank in ranks) for key in codec}
        for name, codec in ranks[0]["codecs"].items()
    }
    return {NETWORK: ranks[0][NETWORK], "codecs": codecs, "compute_s": max(rank["median"] for rank in ranks)}


def predicted_step_s(contender: str, cell: Mapping[str, Any], shapes: Shapes, *, period: int) -> float | None:
    """Seconds of a contender's step as predicted; None for one of which nothing is predicted.

    Args:
        contender: One of the benchmark's.
        cell: From :func:`cell_of`.
        shapes: The model's parameters.
        period: Steps between two exchanges of those that train apart.
    """
    kind, _, name = contender.partition(" ")
    apart = contender in _APART
    algorithm = {"penstock": name, "DDP": "none", "1-bit": "onebit"}.get(kind) or _APART.get(contender)
    if algorithm is None or algorithm not in cell["codecs"]:
        return None
    measured = cell[NETWORK]
    links = [Link(**measured[link]) for link in _LINKS]
    return predict(
        create_compression_algorithm(algorithm),
        Codec(**cell["codecs"][algorithm]),
        Network(measured["ranks"], *links),
        shapes,
        cell["compute_s"],
        period=period if apart else 1,
    ).step_s
