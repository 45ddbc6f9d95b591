"""``penstock tokenize`` beside the ``tokenizers`` library alone, on the same cores and the same documents.

The library is given the documents in memory, in batches on all its threads: to ``encode_batch``, which also finds where
each token lies in the text, and to ``encode_batch_fast``, which does not. What they find is thrown away, or its token
numbers are taken out as an array, without which nobody can go on.
Penstock starts from a JSON-lines file and ends with a ``.bin/.idx`` on disk, its processes' start and all writing
included. The corpus is the standard library's source files, repeated. The contenders take turns.

Usage: ``python -m benchmarks.data.tokenize [megabytes]``
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from benchmarks.data._results import shown, spread, write_results
from penstock.data_pipeline.datasets import IndexedDataset
from penstock.data_pipeline.datasets.python_corpus import read_sources, standard_library_files
from penstock.data_pipeline.datasets.tokenize import train_bpe
from penstock.data_pipeline.datasets.tokenize_files import tokenize_files

MEGABYTES = 50
REPEATS = 5
BATCH = 1024  # documents, some 20 MB: the library's threads wait for one another after each batch
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library_alone(encode: Callable[[list[str]], list[Any]], texts: list[str]) -> None:
    """Encode everything and keep nothing."""
    for first in range(0, len(texts), BATCH):
        encode(texts[first : first + BATCH])


def arrays_of(encodings: list[Any]) -> list[Any]:
    """The token numbers of each document."""
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(contenders: dict[str, Callable[[], object]]) -> dict[str, dict[str, list[float]]]:
    """Wall-clock and CPU seconds of each, in turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in contenders}
    for _ in range(REPEATS):
        for name, run in contenders.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            run()
            found[name]["wall_s"].append(time.perf_counter() - wall)
            found[name]["cpu_s"].append(cpu_seconds() - cpu)
    return found


def main() -> None:
    """Measure and write the results."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES
    once = [text for _, text in read_sources(standard_library_files())]
    tokenizer = train_bpe(once, vocab_size=32_768)
    texts = once * max(1, round(megabytes * 1e6 / sum(map(len, once))))
    alone = Tokenizer.from_str(tokenizer.to_str())
    alone.encode_special_tokens = True
    with tempfile.TemporaryDirectory() as folder:
        corpus, prefix = Path(folder) / "corpus.jsonl", Path(folder) / "tokens"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = measure(
            {
                "tokenizers, encode_batch": lambda: library_alone(alone.encode_batch, texts),
                "tokenizers, encode_batch_fast": lambda: library_alone(alone.encode_batch_fast, texts),
                "tokenizers, encode_batch_fast and arrays": lambda: library_alone(
                    lambda some: arrays_of(alone.encode_batch_fast(some)), texts
                ),
                "penstock tokenize": lambda: tokenize_files(
                    [corpus], prefix, tokenizer, workers=WORKERS, overwrite=True
                ),
            }
        )
        dataset = IndexedDataset(prefix)
        written, documents = dataset.num_tokens, len(dataset)
    # Penstock's tokens without the ends of documents, which the library alone does not add.
    tokens = written - documents
    rates = {name: [tokens / seconds / 1e6 for seconds in times["wall_s"]] for name, times in found.items()}
    medians = {name: spread(values)["median"] for name, values in rates.items()}
    ours = medians["penstock tokenize"]
    lines = [
        "# Tokenizing",
        "",
        f"{documents:,} documents, {sum(map(len, texts)) / 1e6:.0f} MB, {tokens:,} tokens; {WORKERS} cores; "
        f"tokenizers {tokenizers.__version__}. Medians of {REPEATS} runs in turns (smallest to largest).",
        "",
        "| | million tokens/s | CPU seconds | Penstock beside it |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {shown(rates[name], 3)} | {shown(found[name]['cpu_s'])} | {100 * ours / medians[name]:.0f} % |"
        for name in found
    ]
    facts = {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "cores": WORKERS,
        "documents": documents,
        "tokens": tokens,
        "measured": found,
    }
    write_results("tokenize", facts, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
