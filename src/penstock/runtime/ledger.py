"""What a run spends, counted where it is spent, beside what the plain run would have spent.

The *plain run* makes the same steps on the same samples at full sequence length, computes every token in every layer,
and exchanges whole gradients by all-reduce. What it would have spent is counted along the way by formula; where no
formula exists (its wall-clock, its memory) the column stays empty. Savings are never folded into an "effective" number.

Each process keeps a ledger of its own part; :func:`merge` adds them up.
"""

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from penstock._core.meter import REPLICAS, Meter

LayerFlops = Callable[[int, int], int]
"""Forward FLOPs of a layer from ``(tokens over all rows, tokens per row)``;
:func:`penstock.models.gpt_layer_flops` with its configuration bound is one."""

_BACKWARD: Final = 2  # a backward pass makes two matrix products for each one of the forward pass


class Ledger:
    """Counts one process's part of a run.

    Args:
        meter: Where the engine and the exchanges count bytes and seconds; None makes a new one.
        layer_flops: For each local canonical layer whose FLOPs are known, its formula.
        recomputed: Local layers whose forward pass is computed again in the backward pass (activation checkpointing).
            The plain run does not recompute.
        plain_bubble: The bubble fraction of a flushing schedule, ``(p-1)/(m+p-1)`` for ``p`` stages and ``m``
            micro-batches; None where there is nothing to compare with.

    Attributes:
        meter: Bytes by kind and seconds by activity.
        spent: ``steps``, ``samples``, ``tokens`` (raw, as read), ``flops``.
        plain: The same for the plain run, and ``replica_bytes``.
        layer_tokens: For each local layer, tokens computed and tokens of the plain run.
        seconds: ``steps``: wall-clock inside steps; ``bubble``: of these, waiting for activations or gradients.
    """

    def __init__(
        self,
        meter: Meter | None = None,
        *,
        layer_flops: Mapping[int, LayerFlops] | None = None,
        recomputed: Iterable[int] = (),
        plain_bubble: float | None = None,
    ) -> None:
        self.meter = Meter() if meter is None else meter
        self.spent: Counter[str] = Counter()
        self.plain: Counter[str] = Counter()
        self.layer_tokens: dict[int, tuple[int, int]] = {}
        self.seconds = {"steps": 0.0, "bubble": 0.0}
        self._layer_flops = dict(layer_flops or {})
        self._recomputed = frozenset(recomputed)
        self._plain_bubble = plain_bubble
        self._peaks: Counter[str] = Counter()

    def count_read(self, samples: int, tokens: int, *, plain_tokens: int | None = None) -> None:
        """Count what was read from the data. Called where data enters, on first stages, so that no sample counts twice.

        Args:
            samples: Sequences.
            tokens: Tokens in them, before any dropping.
            plain_tokens: Tokens that the plain run reads in as many samples; None for the same.
        """
        self.spent.update(samples=samples, tokens=tokens)
        self.plain.update(samples=samples, tokens=tokens if plain_tokens is None else plain_tokens)

    def count_layer(
        self, layer: int, rows: int, seq_len: int, *, kept: int | None = None, plain_seq_len: int | None = None
    ) -> None:
        """Count a layer's training on ``rows`` sequences: forward, backward and, where set, recomputation.

        Args:
            layer: Canonical index.
            rows: Sequences.
            seq_len: Tokens of each that reach the layer.
            kept: Tokens of each that it computes; None for all.
            plain_seq_len: Tokens of each in the plain run; None for ``seq_len``.
        """
        kept = seq_len if kept is None else min(kept, seq_len)
        plain_seq_len = seq_len if plain_seq_len is None else plain_seq_len
        before = self.layer_tokens.get(layer, (0, 0))
        self.layer_tokens[layer] = (before[0] + rows * kept, before[1] + rows * plain_seq_len)
        formula = self._layer_flops.get(layer)
        if formula is not None:
            passes = 1 + _BACKWARD + (layer in self._recomputed)
            self.spent["flops"] += passes * formula(rows * kept, kept)
            self.plain["flops"] += (1 + _BACKWARD) * formula(rows * plain_seq_len, plain_seq_len)

    def count_step(self, seconds: float, bubble_seconds: float = 0.0) -> None:
        """Count an optimizer step and its time.

        Args:
            seconds: Wall-clock of the step.
            bubble_seconds: Of these, measured waiting for activations and their gradients.
        """
        self.spent["steps"] += 1
        self.plain["steps"] += 1
        self.seconds["steps"] += seconds
        self.seconds["bubble"] += bubble_seconds

    def count_plain_exchange(self, gradient_bytes: int, replicas: int) -> None:
        """Count the all-reduce of whole gradients that the plain run makes in a step.

        Args:
            gradient_bytes: Bytes of this process's gradients in the precision of training.
            replicas: Ranks that hold the same parameters.
        """
        counted = Meter()
        counted.all_reduce(REPLICAS, gradient_bytes, replicas)
        self.plain["replica_bytes"] += counted.sent[REPLICAS]

    def state_dict(self) -> dict[str, Any]:
        """All counts as a JSON value, with the peak memory up to now."""
        self._peaks |= Counter(peak_memory())
        return {
            "ranks": 1,
            "spent": dict(self.spent),
            "plain": dict(self.plain),
            "layer_tokens": {str(layer): list(pair) for layer, pair in sorted(self.layer_tokens.items())},
            "seconds": dict(self.seconds),
            "slowest_s": self.seconds["steps"],
            "peak_memory": dict(self._peaks),
            "plain_bubble": self._plain_bubble,
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the counts that one process saved.

        Raises:
            ValueError: ``state`` is a sum over several processes.
        """
        if state["ranks"] != 1:
            raise ValueError(f"a process continues from its own ledger, not from the sum over {state['ranks']} ranks")
        self.spent = Counter(state["spent"])
        self.plain = Counter(state["plain"])
        self.layer_tokens = {int(layer): (kept, full) for layer, (kept, full) in state["layer_tokens"].items()}
        self.seconds = dict(state["seconds"])
        self._peaks = Counter(state["peak_memory"])
        self.meter.load_state_dict(state["meter"])


def merge(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the ledgers of a run's processes.

    Everything is summed but the number of steps, the slowest process's seconds and the peak memory of a process, where
    the largest counts.

    Args:
        states: From :meth:`Ledger.state_dict` or from this function; at least one.
    """
    states = list(states)
    if not states:
        raise ValueError("there is no ledger to add up")
    layers: dict[str, list[int]] = {}
    for state in states:
        for layer, (kept, full) in state["layer_tokens"].items():
            before = layers.setdefault(layer, [0, 0])
            layers[layer] = [before[0] + kept, before[1] + full]
    merged: dict[str, Any] = {
        "ranks": sum(state["ranks"] for state in states),
        "spent": _sum(state["spent"] for state in states),
        "plain": _sum(state["plain"] for state in states),
        "layer_tokens": dict(sorted(layers.items(), key=lambda item: int(item[0]))),
        "seconds": _sum(state["seconds"] for state in states),
        "slowest_s": max(state["slowest_s"] for state in states),
        "peak_memory": _largest(state["peak_memory"] for state in states),
        "plain_bubble": next((s["plain_bubble"] for s in states if s["plain_bubble"] is not None), None),
        "meter": {
            part: _sum(state["meter"].get(part, {}) for state in states)
            for part in ("sent", "received", "spared_sent", "spared_received", "seconds")
        },
    }
    for column in ("spent", "plain"):
        merged[column]["steps"] = max(state[column].get("steps", 0) for state in states)
    return merged


def chain(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Add the ledger of a run's later part, of all processes, to that of its earlier part on another layout.

    Args:
        earlier: From :func:`merge` or this function.
        later: From :func:`merge`.
    """
    whole = merge([earlier, later])
    whole["ranks"] = later["ranks"]
    whole["plain_bubble"] = later["plain_bubble"]
    whole["slowest_s"] = earlier["slowest_s"] + later["slowest_s"]
    for column in ("spent", "plain"):
        whole[column]["steps"] = earlier[column].get("steps", 0) + later[column].get("steps", 0)
    return whole


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far in bytes: ``rss`` (resident) and, on GPUs, ``cuda`` (allocated)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def _sum(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            total[key] = total.get(key, 0) + value
    return total


def _largest(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    largest: dict[str, int] = {}
    for table in tables:
        for key, value in table.items():
            largest[key] = max(largest.get(key, 0), value)
    return largest
