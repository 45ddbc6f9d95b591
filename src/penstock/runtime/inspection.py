"""What lies at a path, and whether it is intact."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock._core.counted import counted
from penstock._core.files import MANIFEST_NAME, CorruptFileError, read_json, read_manifest
from penstock.compression.archive import compressed_by
from penstock.data_pipeline.data_sampling.analysis import Analysis
from penstock.data_pipeline.datasets.indexed import IndexedDataset, bin_path, idx_path
from penstock.data_pipeline.datasets.open import check_one_dataset, is_saved_dataset, open_dataset, refuse_column
from penstock.data_pipeline.datasets.rearrange import check_tokens
from penstock.data_pipeline.datasets.tables import TABLE_SUFFIXES, TableColumn
from penstock.data_pipeline.datasets.text import kind_of
from penstock.runtime.checkpoint import Checkpoint, latest_complete, list_checkpoints
from penstock.runtime.metrics_log import read_metrics
from penstock.runtime.run_directory import CHECKPOINTS_NAME, METRICS_NAME
from penstock.runtime.units import quantity

_UNDERSTOOD = (
    "what can be inspected: a dataset (PREFIX of .bin/.idx or one of the two, Parquet, Arrow, JSON lines, .npy, or a "
    "directory by Hugging Face's save_to_disk), a .safetensors file, an analysis, a checkpoint, a directory of "
    "checkpoints, a run's directory, and any directory sealed with a manifest"
)


@dataclass
class Finding:
    """What :func:`inspect_path` found.

    Attributes:
        kind: ``dataset``, ``table``, ``array``, ``tensors``, ``analysis``, ``checkpoint``, ``checkpoints``, ``run`` or
            ``sealed directory``.
        facts: What is in it, for people, in order.
        problems: What is wrong with it; empty when it is intact.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def inspect_path(path: str | os.PathLike[str], *, verify: bool = False, column: str | None = None) -> Finding:
    """Look at what lies at a path, and verify it: every checksum where there are checksums.

    Args:
        path: Where to look.
        verify: Of a dataset, read every token too, and account for every byte.
        column: Of a table, which column; see :class:`TableColumn`.

    Raises:
        ValueError: There is nothing, or nothing that is understood, or no table of which a column could be named.
    """
    place = Path(path)
    is_pair = place.suffix in (".bin", ".idx") or bin_path(place).exists() or idx_path(place).exists()
    if not is_pair and not place.exists():
        raise ValueError(f"{place}: there is no such file, directory or dataset; {_UNDERSTOOD}")
    if not is_pair and (kind_of(place) in (*TABLE_SUFFIXES, ".npy") or is_saved_dataset(place)):
        return _rows(place, column, verify=verify)
    refuse_column(column, place)
    if is_pair:
        return _dataset(place, verify=verify)
    if place.suffix == ".safetensors":
        return _tensors(place)
    if not place.is_dir():
        raise ValueError(f"{place}: not understood; {_UNDERSTOOD}")
    if (place / CHECKPOINTS_NAME).is_dir() or (place / METRICS_NAME).is_file():
        return _run(place)
    if list_checkpoints(place.parent) and place.name.startswith("step_"):
        return _checkpoint(place)
    check_one_dataset(place)
    if not (place / MANIFEST_NAME).is_file():
        if place.name == CHECKPOINTS_NAME or list_checkpoints(place):
            return _checkpoints(place)
        raise ValueError(f"{place}: a directory without a manifest, and not a run's; {_UNDERSTOOD}")
    return _sealed(place)


def _dataset(place: Path, *, verify: bool) -> Finding:
    found = Finding("dataset")
    try:
        dataset = IndexedDataset(place)
    except ValueError as error:  # damaged, or of another's dtype codes
        found.problems.append(str(error))
        return found
    found.facts = {
        "sequences": f"{len(dataset):,}",
        "documents": f"{dataset.num_documents:,}",
        "tokens": f"{dataset.num_tokens:,} ({dataset.dtype})",
        "size": quantity(bin_path(place).stat().st_size, "B"),
    }
    if len(dataset):
        lengths = dataset.lengths
        found.facts["lengths"] = f"{lengths.min():,} to {lengths.max():,}, {lengths.mean():.1f} on average"
    if verify:
        checked = check_tokens(dataset)
        found.facts["token numbers"] = f"{checked.smallest:,} to {checked.largest:,}"
        found.facts["empty"] = counted(checked.empty, "sequence", "sequences")
        found.problems += checked.problems
    return found


def _rows(place: Path, column: str | None, *, verify: bool) -> Finding:
    """A table or an array, as a run would open it."""
    found = Finding("array" if kind_of(place) == ".npy" else "table")
    try:
        rows = open_dataset(place, column=column)
    except CorruptFileError as error:
        found.problems.append(str(error))
        return found
    found.facts["rows"] = f"{len(rows):,}"
    pieces = [rows]
    if isinstance(rows, TableColumn):
        found.facts["column"] = f"{rows.column} ({'lists' if rows.is_tokens else 'single values'})"
        pieces = list(rows.streams()) if rows.is_tokens else []
        if rows.is_tokens and len(rows):
            lengths = rows.lengths
            found.facts["lengths"] = f"{lengths.min():,} to {lengths.max():,}, {lengths.mean():.1f} on average"
    if pieces:
        found.facts["tokens"] = f"{sum(piece.size for piece in pieces):,} ({pieces[0].dtype})"
    found.facts["size"] = quantity(
        sum(file.stat().st_size for file in [place, *place.rglob("*")] if file.is_file()), "B"
    )
    filled = [piece for piece in pieces if piece.size]
    if verify and filled:
        low, high = np.min([piece.min() for piece in filled]), np.max([piece.max() for piece in filled])
        found.facts["token numbers"] = f"{low:,} to {high:,}"
        if not low >= 0:  # not a number, too, which numpy's min passes on from any piece
            found.problems.append(f"{place}: the smallest token is {low}; token numbers begin at 0")
    return found


def _tensors(place: Path) -> Finding:
    from safetensors import SafetensorError, safe_open

    found = Finding("tensors")
    try:
        with safe_open(place, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            former = compressed_by(file.metadata() or {})
    except SafetensorError as error:
        found.problems.append(f"{place}: not a whole safetensors file ({error})")
        return found
    numbers: Counter[str] = Counter()
    for part in slices:
        numbers[part.get_dtype()] += math.prod(part.get_shape())
    found.facts = {
        "tensors": f"{len(slices):,}",
        "parameters": ", ".join([f"{numbers.total():,}", *(f"{n:,} of {dtype}" for dtype, n in numbers.most_common())]),
        "size": quantity(place.stat().st_size, "B"),
    }
    if former is not None:
        # What lies in the file is the algorithm's payloads, not the model's parameters.
        found.facts["numbers stored"] = found.facts.pop("parameters")
        found.facts["compressed by"] = f"{former}, of Penstock"
    return found


def _sealed(place: Path) -> Finding:
    """A directory with a manifest: an analysis, a checkpoint under any name, or something else that was sealed."""
    try:
        manifest = read_manifest(place, verify=False)
    except CorruptFileError as error:
        return Finding("sealed directory", problems=[str(error)])
    if "num_samples" in manifest:
        return _analysis(place)
    if "step" in manifest:
        return _checkpoint(place)
    found = Finding("sealed directory", {"files": f"{len(manifest['files']):,}"})
    try:
        read_manifest(place)
    except CorruptFileError as error:
        found.problems.append(str(error))
    return found


def _analysis(place: Path) -> Finding:
    found = Finding("analysis")
    try:
        analysis = Analysis.load(place)
        tokens = "not known" if analysis.num_tokens is None else f"{analysis.num_tokens:,}"
        found.facts = {"samples": f"{analysis.num_samples:,}", "tokens": tokens}
        for metric in analysis.metrics:
            values, order = analysis.values(metric), analysis.order(metric)
            if len(order):
                low, middle, high = (values[order[at]] for at in (0, len(order) // 2, len(order) - 1))
                found.facts[metric] = f"{low:.6g} to {high:.6g}, median {middle:.6g}"
        for name in analysis.totals:
            total = analysis.total(name)
            found.facts[name] = f"total {total:.6g}" if total.ndim == 0 else f"total of shape {total.shape}"
    except (CorruptFileError, IndexError) as error:
        found.problems.append(str(error))
    return found


def _checkpoint(place: Path) -> Finding:
    found = Finding("checkpoint")
    try:
        checkpoint = Checkpoint(place)
        found.facts = _checkpoint_facts(checkpoint)
        checkpoint.verify()
    except CorruptFileError as error:
        found.problems.append(str(error))
    return found


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, str]:
    size = sum(file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file())
    return {
        "step": f"{checkpoint.step:,}",
        "layers": f"{len(checkpoint.layers)}",
        "error memories": f"of {counted(len(checkpoint.ranks), 'rank', 'ranks')}",
        "size": quantity(size, "B"),
    }


def _checkpoints(place: Path) -> Finding:
    """A line for each checkpoint. One that was never sealed is no damage, as long as another is complete."""
    found = Finding("checkpoints")
    complete = False
    for entry in list_checkpoints(place):
        state = "incomplete"
        if entry.sealed:
            one = _checkpoint(entry.path)
            complete = complete or one.intact
            state = f"intact, {one.facts['size']}" if one.intact else "damaged"
            found.problems += one.problems
        found.facts[entry.path.name] = f"step {entry.step:,}, {state}"
    if not complete:
        found.problems.append(f"{place}: there is no complete checkpoint")
    return found


def _run(place: Path) -> Finding:
    found = Finding("run")
    passed_over: list[str] = []
    entries = list_checkpoints(place / CHECKPOINTS_NAME)
    checkpoint = latest_complete(place / CHECKPOINTS_NAME, passed_over.append)
    found.facts["checkpoints"] = f"{len(entries)}"
    if checkpoint is None:
        found.problems += passed_over or [f"{place / CHECKPOINTS_NAME}: there is no checkpoint"]
    else:
        try:
            facts = _checkpoint_facts(checkpoint)
            found.facts["newest complete"] = ", ".join(f"{name} {value}" for name, value in facts.items())
            checkpoint.verify()
        except CorruptFileError as error:
            found.problems.append(str(error))
        if passed_over:  # a resume does the same, so the run is intact
            found.facts["passed over"] = "; ".join(passed_over)
    _inspect_metrics(place / METRICS_NAME, found)
    for name in ("config.json", "summary.json"):
        if (place / name).is_file():
            try:
                read_json(place / name)
                found.facts[name] = "readable"
            except CorruptFileError as error:
                found.problems.append(str(error))
    return found


def _inspect_metrics(path: Path, found: Finding) -> None:
    if not path.is_file():
        return
    try:
        metrics = read_metrics(path)
    except ValueError as error:
        found.problems.append(str(error))
        return
    steps = [record["step"] for record in metrics.records]
    found.facts[METRICS_NAME] = f"{len(steps):,} steps" + (f", the last is {steps[-1]:,}" if steps else "")
    if metrics.records and "loss" in metrics.records[-1]:
        found.facts["last loss"] = json.dumps(metrics.records[-1]["loss"])
    if metrics.torn is not None:  # the writer was killed; a resume cuts it off
        found.facts["torn last line"] = f"{len(metrics.torn)} characters"
    if len(set(steps)) != len(steps):
        found.problems.append(f"{path}: {len(steps) - len(set(steps))} steps stand there more than once")
