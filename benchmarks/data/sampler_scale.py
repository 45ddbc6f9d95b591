"""Start, speed and memory of the curriculum sampler from a million to a billion samples::

python -m benchmarks.data.sampler_scale [--sizes 1000000 50000000 1000000000] [--folder DIR]

A synthetic metric of 2 bytes per sample (lengths, uniform in 1..2048), one difficulty schedule of 248 births, global
batches of 512. For each size the index is built once (its time and memory are reported), then fresh processes start the
sampler on it and ask for batches; DeepSpeed's sampler, where it is installed, does the same with the same metric and
schedule. Everything is in the page cache: the files were just written or read.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512
STEPS = 6000
WARM_UP = 1000
LEVELS = 2048
RUNS = 3
PEER_LIMIT = 50_000_000
PEER_ONCE = 10_000_000  # above this its run takes minutes, and is not repeated
CHUNK = 1 << 22


def write_metric(path: Path, count: int) -> None:
    """The metric of all samples, written chunk by chunk."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(count,))
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        part[:] = rng.integers(1, LEVELS + 1, size=len(part), dtype=np.uint16)
    values.flush()


def schedule() -> dict[str, Any]:
    """From 64 to 2048 in steps of 8: 249 difficulties."""
    return {
        "min_difficulty": 64,
        "max_difficulty": LEVELS,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": STEPS, "difficulty_step": 8},
    }


def anonymous_mb() -> float:
    """Memory of this process beyond mapped files, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def penstock_job(folder: Path, count: int, *, build: bool) -> dict[str, float]:
    """In a fresh process: make the sampler, and unless it is to build the index, time its batches."""
    from penstock.data_pipeline.data_sampling import DataSampler

    metric = {"path": str(folder / "metric.npy"), **schedule()}
    config = {
        "strategy": "curriculum",
        "batch_size": BATCH,
        "curriculum": {"metrics": {"seqlen": metric}, "cache": str(folder / "cache")},
    }
    before = anonymous_mb()
    with _Peak() if build else contextlib.nullcontext() as peak:
        start = time.perf_counter()
        sampler = DataSampler(range(count), config)
        started = time.perf_counter() - start
    if peak is not None:
        return {"build_s": started, "build_mb": peak.mb - before}
    seconds = []
    batches = iter(sampler)
    busy = []
    for _ in range(min(WARM_UP + STEPS, len(sampler))):
        start, cpu = time.perf_counter(), time.thread_time()
        next(batches)
        busy.append(time.thread_time() - cpu)
        seconds.append(time.perf_counter() - start)
        sampler.mark_trained()
    return {"start_ms": 1e3 * started, **_times(seconds, busy), "memory_mb": anonymous_mb() - before}


def peer_index(folder: Path, count: int) -> None:
    """DeepSpeed's two files: the samples of each value, and the values."""
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

    values = np.load(folder / "metric.npy")
    order = np.argsort(values, kind="stable").astype(np.int32)
    bounds = np.searchsorted(values[order], np.arange(1, LEVELS + 2))
    samples = MMapIndexedDatasetBuilder(str(folder / "peer_samples.bin"), dtype=np.int32)
    metrics = MMapIndexedDatasetBuilder(str(folder / "peer_metric.bin"), dtype=np.int32)
    for level in range(LEVELS):
        samples.add_item_numpy(order[bounds[level] : bounds[level + 1]])
        samples.end_document()
        metrics.add_item_numpy(np.array([level + 1], dtype=np.int32))
        metrics.end_document()
    samples.finalize(str(folder / "peer_samples.idx"))
    metrics.finalize(str(folder / "peer_metric.idx"))


def peer_job(folder: Path, count: int) -> dict[str, float]:
    """The same with DeepSpeed's sampler, on one process of gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29763", rank=0, world_size=1)
    from deepspeed import comm
    from deepspeed.runtime.data_pipeline.data_sampling.data_sampler import DeepSpeedDataSampler

    comm.init_distributed(dist_backend="gloo", verbose=False)
    clusters = tempfile.mkdtemp(dir=folder)
    metric = {
        "index_to_sample_path": str(folder / "peer_samples"),
        "index_to_metric_path": str(folder / "peer_metric"),
        "difficulty_type": "value",
        "clustering_type": "schedule_based",
        **schedule(),
    }
    learning = {"enabled": True, "data_cluster_path": clusters, "curriculum_metrics": {"seqlen": metric}}
    sampling = {"enabled": True, "num_epochs": 1, "curriculum_learning": learning}
    config = {"enabled": True, "seed": 1, "data_sampling": sampling}
    before = anonymous_mb()
    start = time.perf_counter()
    sampler = DeepSpeedDataSampler(config, count, BATCH, 0, 1, dist.group.WORLD, 1, 0)
    started = time.perf_counter() - start
    seconds = []
    batches = iter(sampler)
    busy = []
    for _ in range(min(WARM_UP + STEPS, count // BATCH)):
        start, cpu = time.perf_counter(), time.thread_time()
        next(batches)
        busy.append(time.thread_time() - cpu)
        seconds.append(time.perf_counter() - start)
    return {"start_ms": 1e3 * started, **_times(seconds, busy), "memory_mb": anonymous_mb() - before}


def _times(seconds: list[float], busy: list[float]) -> dict[str, float]:
    """Milliseconds a batch: of those after the warm-up, and the slowest of the warm-up."""
    warm = min(WARM_UP, len(seconds) // 2)
    found, cpu = 1e3 * np.array(seconds[warm:]), 1e3 * np.array(busy[warm:])
    return {
        "median_ms": float(np.median(found)),
        "p999_ms": float(np.quantile(found, 0.999)),
        "worst_ms": float(found.max()),
        "cpu_p999_ms": float(np.quantile(cpu, 0.999)),
        "warm_up_worst_ms": 1e3 * max(seconds[:warm]),
        "batches": len(found),
    }


class _Peak:
    """The most memory beyond mapped files while the block runs, looked at every 20 ms."""

    def __enter__(self) -> "_Peak":
        self.mb, self._done = anonymous_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, anonymous_mb())


def _child(job: str, folder: Path, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data.sampler_scale", "--job", job, str(folder), str(count)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} of {count} samples failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run_job(job: str, folder: Path, count: int) -> None:
    if job == "peer-index":
        peer_index(folder, count)
        found: dict[str, float] = {}
    else:
        found = peer_job(folder, count) if job == "peer" else penstock_job(folder, count, build=job == "build")
    print(json.dumps(found))


def _warm(folder: Path) -> None:
    for path in (folder / "cache").glob("*/order.bin"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def measure(sizes: list[int], folder: Path) -> list[dict[str, Any]]:
    """All figures, the contenders in turn."""
    try:
        import deepspeed  # noqa: F401

        peer = True
    except ImportError:
        peer = False
        print("deepspeed is not installed here: its rows are left out")
    results: list[dict[str, Any]] = []
    for count in sizes:
        here = folder / str(count)
        here.mkdir(parents=True, exist_ok=True)
        write_metric(here / "metric.npy", count)
        built = _child("build", here, count)
        with_peer = peer and count <= PEER_LIMIT
        if with_peer and not (here / "peer_metric.idx").exists():
            _child("peer-index", here, count)
        _warm(here)
        runs: dict[str, list[dict[str, float]]] = {"penstock": [], **({"deepspeed": []} if with_peer else {})}
        for run in range(RUNS):
            for name, found in runs.items():
                if run and name == "deepspeed" and count > PEER_ONCE:
                    continue
                found.append(_child("penstock" if name == "penstock" else "peer", here, count))
        for name, found in runs.items():
            medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
            spread = {key: [min(run[key] for run in found), max(run[key] for run in found)] for key in found[0]}
            results.append({"samples": count, "sampler": name, **medians, "spread": spread} | _built(name, built))
            print(json.dumps(results[-1]))
    return results


def _built(name: str, built: dict[str, float]) -> dict[str, float]:
    return built if name == "penstock" else {}


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"# The curriculum sampler by number of samples: batches of {BATCH}, medians of {RUNS} processes in turn",
        "",
        "| samples | sampler | start ms | median ms | 99.9 % ms | worst ms | 99.9 % CPU ms | warm-up's worst ms | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['samples']:,} | {row['sampler']} | {row['start_ms']:.1f} | {row['median_ms']:.4f} | "
        f"{row['p999_ms']:.2f} | {row['worst_ms']:.2f} | {row['cpu_p999_ms']:.2f} | {row['warm_up_worst_ms']:.2f} | "
        f"{row['memory_mb']:.1f} |"
        for row in results
    ]
    built = [row for row in results if row.get("build_s", 0) > 0]
    lines += ["", "| samples | index built in s | memory while it is built, MB |", "|---|---|---|"]
    lines += [f"| {row['samples']:,} | {row['build_s']:.1f} | {row['build_mb']:.0f} |" for row in built]
    lines += [
        "",
        "Start is making the sampler with its index stored. Milliseconds are per global batch, after a warm-up of "
        f"{WARM_UP} batches in which the process gets to know the pages of the mapped index; CPU is the thread's own "
        "time, without other programs'. Memory is what the process holds beyond mapped files at the end, over what it "
        "held before the sampler was made.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write ``results/data/sampler_scale``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 50_000_000, 1_000_000_000])
    parser.add_argument("--folder", type=Path, help="keep the synthetic data here (14 GB at a billion with the peer's)")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        _run_job(arguments.job[0], Path(arguments.job[1]), int(arguments.job[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(arguments.sizes, arguments.folder or Path(temporary))
    out = Path(__file__).parent.parent / "results" / "data"
    out.mkdir(parents=True, exist_ok=True)
    (out / "sampler_scale.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "sampler_scale.md").write_text(_table(results))
    print(_table(results))


if __name__ == "__main__":
    main()
