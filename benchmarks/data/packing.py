"""Padding of packed rows: best fit, beside first fit, one document a row, and cutting the stream into rows.

The documents are the sources of this Python's standard library, tokenized by a byte-level BPE of 8192 tokens trained on
them, and a synthetic corpus of a million documents whose lengths are spread as the web's are (log-normal). Run::

    python -m benchmarks.data.packing
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.data._results import write_results
from penstock.data_pipeline.datasets import IndexedDataset, read_sources, standard_library_files
from penstock.data_pipeline.datasets.bins import best_fit
from penstock.data_pipeline.datasets.tokenize import tokenize_to_indexed, train_bpe

LENGTHS = (512, 2048)
REPEATS = 3


def library_lengths() -> npt.NDArray[np.int64]:
    """Tokens of each source file."""
    texts = [text for _, text in read_sources(standard_library_files(max_bytes=8_000_000))]
    with tempfile.TemporaryDirectory() as place:
        tokenize_to_indexed(texts, train_bpe(texts, vocab_size=8192), Path(place) / "d")
        return IndexedDataset(Path(place) / "d").lengths.astype(np.int64)


def pieces(documents: npt.NDArray[np.int64], row: int) -> npt.NDArray[np.int64]:
    """Documents longer than a row are cut; the same pieces for all that pack."""
    whole, rest = np.divmod(documents, row)
    return np.concatenate([np.full(int(whole.sum()), row), rest[rest > 0]])


def first_fit(lengths: npt.NDArray[np.int64], row: int) -> int:
    """Rows of first fit in the order given: a tree over rows holds the most room below each node."""
    size = 1 << max(1, (len(lengths) - 1).bit_length())
    room = [row] * (2 * size)
    used = 0
    for length in lengths.tolist():
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        used = max(used, node - size + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def measure(name: str, documents: npt.NDArray[np.int64], row: int) -> dict[str, Any]:
    """Padding of each way, and how many documents are cut though they would fit a row."""
    parts = np.random.default_rng(0).permutation(pieces(documents, row))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        bins = best_fit(parts, row)
        seconds.append(time.perf_counter() - begin)
    tokens = int(documents.sum())
    ends = np.cumsum(documents)
    fitting = documents <= row
    cut = ((ends - documents) // row != (ends - 1) // row) & fitting
    begin = time.perf_counter()
    rows = first_fit(parts, row)
    return {
        "corpus": name,
        "row": row,
        "documents": len(documents),
        "tokens": tokens,
        "rows_fewest": -(-tokens // row),
        "rows_best_fit": len(bins),
        "padding": {
            "best_fit": bins.padding,
            "first_fit": 1 - tokens / (rows * row),
            "one_a_row": 1 - tokens / (len(parts) * row),
            "cut_stream": 1 - tokens / (-(-tokens // row) * row),
        },
        "fitting_documents_cut_by_the_stream": float(cut.sum() / fitting.sum()),
        "best_fit_s": sorted(seconds),
        "first_fit_s": time.perf_counter() - begin,
    }


def main() -> None:
    """Measure and write the results."""
    rng = np.random.default_rng(0)
    web = np.maximum(rng.lognormal(6.0, 1.2, 1_000_000).astype(np.int64), 2)
    corpora = {"standard library": library_lengths(), "log-normal": web}
    found = [measure(name, lengths, row) for name, lengths in corpora.items() for row in LENGTHS]
    lines = [
        "# Packing",
        "",
        "Padding in percent of the rows; the stream has none to speak of, but cuts documents that would fit a row.",
        "",
        "| corpus | documents | row | best fit | first fit | one a row | rows over the fewest possible | "
        "fitting documents that the stream cuts | best fit takes, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        padding = {name: f"{100 * share:.3f} %" for name, share in one["padding"].items()}
        lines.append(
            f"| {one['corpus']} | {one['documents']:,} | {one['row']:,} | {padding['best_fit']} | "
            f"{padding['first_fit']} | {padding['one_a_row']} | {one['rows_best_fit'] - one['rows_fewest']:,} of "
            f"{one['rows_fewest']:,} | {100 * one['fitting_documents_cut_by_the_stream']:.1f} % | "
            f"{one['best_fit_s'][REPEATS // 2]:.2f} |"
        )
    write_results("packing", {"measured": found}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
