"""Tokens per second of the difficulty analysis, beside DeepSpeed's two analyzers in the same run.

200,000 samples of 260 tokens on average, two metrics: the number of tokens and the vocabulary's rarity. Every
contender is a process of its own, on the same memory-mapped corpus and with two workers; the contenders take turns.
What is timed is from the dataset to the finished files; starting up (imports, and a first analysis of a few samples) is
told apart. DeepSpeed's analyzers are spared the counting of tokens: they are given the counts that Penstock's time
includes. Then Penstock alone, on corpora of 10 million to 2 billion tokens. Run::

    python -m benchmarks.data.analyzer                       # Penstock alone
    python -m benchmarks.data.analyzer --peer /path/python   # an interpreter that has deepspeed (same torch)
    python -m benchmarks.data.analyzer --sizes 10 100 2000   # millions of tokens of the second part
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data._results import shown, spread, write_results

SAMPLES, MEAN_LENGTH, VOCABULARY, WORKERS = 200_000, 260, 50_257, 2
REPEATS = 3


def make_corpus(prefix: Path, samples: int) -> None:
    """Samples of 200 to 320 tokens whose frequencies fall as in text."""
    from penstock.data_pipeline.datasets import IndexedDatasetBuilder

    rng = np.random.default_rng(1)
    block = (rng.pareto(0.8, 1 << 22) * 5).astype(np.int64) % VOCABULARY
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for first in range(0, samples, 10_000):
            lengths = rng.integers(MEAN_LENGTH - 60, MEAN_LENGTH + 61, min(10_000, samples - first)).tolist()
            builder.add_document(np.roll(block, first)[: sum(lengths)], lengths=lengths)


class PeakMemory:
    """The largest private memory of this process while the block runs, in MB; mapped files do not count."""

    def __enter__(self) -> "PeakMemory":
        self.start, self.peak = _private_mb(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, _private_mb())


def _private_mb() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) / 1024


def penstock(prefix: str, output: Path) -> dict[str, Any]:
    """One analysis by Penstock."""
    begin = time.perf_counter()
    from penstock.data_pipeline.data_sampling import DataAnalyzer, IndexedDataset

    DataAnalyzer([[1, 2], [3]], output_dir=output / "first").run()
    startup = time.perf_counter() - begin
    with PeakMemory() as memory:
        begin = time.perf_counter()
        found = DataAnalyzer(IndexedDataset(prefix), output_dir=output / "analysis").run()
        seconds = time.perf_counter() - begin
    return _facts(found.num_tokens, seconds, startup, output / "analysis") | {
        "memory_mb": memory.peak - memory.start,
        "mean_rarity": float(np.mean(found.values("vocabularyrarity"))),
    }


def deepspeed(prefix: str, output: Path, distributed: bool) -> dict[str, Any]:
    """One analysis by a peer, with metric functions over whole batches."""
    begin = time.perf_counter()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch
    from deepspeed import comm
    from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DataAnalyzer, DistributedDataAnalyzer
    from deepspeed.utils import logger

    from penstock.data_pipeline.datasets import IndexedDataset

    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    comm.init_distributed(dist_backend="gloo", verbose=False)
    corpus = IndexedDataset(prefix)
    counts = np.bincount(corpus.tokens, minlength=1 << 16)
    surprise = torch.from_numpy(np.log(counts.sum()) - np.log(np.maximum(counts, 1)))

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(corpus)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(corpus[index].astype(np.int64))

    def seqlen(rows: list[Any]) -> Any:
        return torch.tensor([len(row) for row in rows])

    def rarity(rows: list[Any]) -> Any:
        means = torch.stack([part.mean() for part in surprise[torch.cat(rows)].split([len(row) for row in rows])])
        return (means * 1000).round().long()

    options: dict[str, Any] = {
        "dataset": Rows(),
        "num_threads": WORKERS,
        "batch_size": 1024,
        "metric_names": ["seqlen", "vocabularyrarity"],
        "metric_functions": [seqlen, rarity],
        "metric_types": ["single_value_per_sample"] * 2,
        "save_path": str(output / "analysis"),
        "collate_fn": list,
    }
    startup = time.perf_counter() - begin
    begin = time.perf_counter()
    if distributed:
        DistributedDataAnalyzer(**options, num_workers=1, worker_id=0, device="cpu").run_map_reduce()
    else:
        DataAnalyzer(**options, num_threads_reduce=WORKERS, metric_dtypes=[torch.int64] * 2).run_map_reduce()
    seconds = time.perf_counter() - begin
    return _facts(int(counts.sum()), seconds, startup, output / "analysis")


def _facts(tokens: int, seconds: float, startup: float, output: Path) -> dict[str, Any]:
    files = sum(path.is_file() for path in output.rglob("*"))
    return {
        "seconds": seconds,
        "startup_s": startup,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "files": files,
    }


def contend(python: str, name: str, prefix: Path) -> dict[str, Any]:
    """Run one contender in a fresh process."""
    with tempfile.TemporaryDirectory(dir=prefix.parent) as output:
        command = [python, "-m", "benchmarks.data.analyzer", "--contender", name, str(prefix), output]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 2000])
    parser.add_argument("--contender", nargs=3)
    arguments = parser.parse_args()
    if arguments.contender:
        name, prefix, output = arguments.contender
        run = penstock if name == "penstock" else deepspeed
        extra = {} if name == "penstock" else {"distributed": name == "DistributedDataAnalyzer"}
        print(json.dumps(run(prefix, Path(output), **extra)))
        return
    has_peer = subprocess.run(
        [arguments.peer, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('deepspeed') is None)"]
    )
    names = ["penstock"] + ([] if has_peer.returncode else ["DataAnalyzer", "DistributedDataAnalyzer"])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        make_corpus(Path(place) / "corpus", SAMPLES)
        for _ in range(arguments.repeats):
            for name in names:
                python = sys.executable if name == "penstock" else arguments.peer
                runs[name].append(contend(python, name, Path(place) / "corpus"))
    scale = []
    for millions in arguments.sizes:
        with tempfile.TemporaryDirectory() as place:
            make_corpus(Path(place) / "corpus", millions * 1_000_000 // MEAN_LENGTH)
            found = [contend(sys.executable, "penstock", Path(place) / "corpus") for _ in range(arguments.repeats)]
            scale.append({"million_tokens": millions, "runs": found})
    report(runs, scale)


def report(runs: dict[str, list[dict[str, Any]]], scale: list[dict[str, Any]]) -> None:
    """Write the tables."""
    rates = {name: [run["tokens_per_s"] / 1e6 for run in found] for name, found in runs.items()}
    mine = spread(rates["penstock"])["median"]
    lines = [
        "# Difficulty analysis",
        "",
        f"{SAMPLES:,} samples, {runs['penstock'][0]['tokens'] / 1e6:.1f} M tokens, two metrics, two cores; median of "
        f"{len(runs['penstock'])} runs (smallest to largest). The peers are given the token counts.",
        "",
        "| analyzer | M tokens/s | Penstock is faster by | start-up, s | files |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        label = "Penstock" if name == "penstock" else f"DeepSpeed {name}"
        factor = "" if name == "penstock" else f"{mine / spread(rates[name])['median']:.1f}x"
        startup = spread([run["startup_s"] for run in found])["median"]
        lines.append(f"| {label} | {shown(rates[name])} | {factor} | {startup:.1f} | {found[0]['files']} |")
    if len(runs) == 1:
        lines += ["", "DeepSpeed is not installed here: give an interpreter that has it with `--peer`."]
    if scale:
        lines += ["", "Penstock alone:", "", "| M tokens | M tokens/s | private memory, MB |", "|---|---|---|"]
    for row in scale:
        rate = shown([run["tokens_per_s"] / 1e6 for run in row["runs"]])
        lines.append(f"| {row['million_tokens']:,} | {rate} | {shown([run['memory_mb'] for run in row['runs']], 0)} |")
    write_results("analyzer", {"runs": runs, "scale": scale}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
