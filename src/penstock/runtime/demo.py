"""The run that ``penstock train`` makes without a configuration: a small GPT on this interpreter's own source files.

Two pipeline stages, two replicas, a difficulty curriculum, dropped tokens and 1-bit communication, on real text that
every machine has.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from penstock._core.files import CorruptFileError, read_manifest, write_manifest
from penstock.data_pipeline.data_sampling import DataAnalyzer, IndexedDataset
from penstock.data_pipeline.datasets.python_corpus import read_sources, standard_library_files
from penstock.data_pipeline.datasets.tokenize import save_tokenizer, tokenize_to_indexed, train_bpe
from penstock.data_pipeline.datasets.windows import TokenWindows

SEQUENCE_LENGTH: Final = 256
VOCAB_SIZE: Final = 4096
STEPS: Final = 240
MAX_CORPUS_BYTES: Final = 8_000_000
METRIC: Final = "vocabularyrarity"
_VERSION: Final = 1


def prepare_corpus(folder: str | os.PathLike[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Build the corpus, its tokenizer and its difficulty index in ``folder``, unless an intact one lies there.

    Args:
        folder: Where ``train.bin/.idx``, ``heldout.bin/.idx``, ``tokenizer.json`` and ``difficulty/`` go.
        say: Told what happens, a line at a time.

    Returns:
        The facts of the manifest: documents, tokens and bytes of both parts.
    """
    root = Path(folder)
    files = standard_library_files(max_bytes=MAX_CORPUS_BYTES)
    listing = hashlib.sha256("\n".join(f"{file.name} {file.size}" for file in files).encode()).hexdigest()
    recipe = {
        "version": _VERSION,
        "python": platform.python_version(),
        "files": listing,
        "vocab_size": VOCAB_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
    }
    try:
        facts = read_manifest(root)
        if facts.get("recipe") == recipe:
            return facts
    except CorruptFileError:
        pass  # nothing there yet, or a build that was interrupted: build it anew

    training = [file for file in files if not file.heldout]
    heldout = [file for file in files if file.heldout]
    say(f"corpus: {len(training)} source files of Python {platform.python_version()}, {len(heldout)} held out")
    tokenizer = train_bpe((text for _, text in read_sources(training)), vocab_size=VOCAB_SIZE)
    save_tokenizer(tokenizer, root / "tokenizer.json")
    parts = {}
    for name, part in (("train", training), ("heldout", heldout)):
        written = tokenize_to_indexed((text for _, text in read_sources(part)), tokenizer, root / name)
        parts[name] = {"documents": written.documents, "tokens": written.tokens, "bytes": written.text_bytes}
        say(f"corpus: {name}: {written.documents} documents, {written.tokens:,} tokens")
    say(f"corpus: measuring difficulty ({METRIC})")
    windows = TokenWindows(IndexedDataset(root / "train"), SEQUENCE_LENGTH)
    DataAnalyzer(windows, metrics=[METRIC], output_dir=root / "difficulty").run(overwrite=True)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    write_manifest(root, (name for name in names if name != "manifest.json"), recipe=recipe, parts=parts)
    return read_manifest(root, verify=False)


def demo_config(corpus: str | os.PathLike[str]) -> dict[str, Any]:
    """The demo's configuration, as a mapping for :func:`penstock.runtime.config.load_config`.

    Args:
        corpus: Where :func:`prepare_corpus` put the corpus.
    """
    root = Path(corpus)
    return {
        "seed": 1234,
        "model": {
            "name": "gpt",
            "vocab_size": VOCAB_SIZE,
            "num_layers": 4,
            "hidden_size": 192,
            "num_heads": 6,
            "context": SEQUENCE_LENGTH,
        },
        "pipe": {"stages": 2, "schedule": "1f1b"},
        "data_parallel": {"replicas": 2},
        "train": {
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "steps": STEPS,
            "eval_batches": 8,
            "checkpoint_every": STEPS // 2,
        },
        "data": {
            "train": str(root / "train"),
            "heldout": str(root / "heldout"),
            "tokenizer": str(root / "tokenizer.json"),
            "sequence_length": SEQUENCE_LENGTH,
        },
        "sampling": {
            "strategy": "curriculum",
            "curriculum": {
                "metrics": {
                    METRIC: {
                        "path": str(root / "difficulty"),
                        "difficulty_type": "percentile",
                        "min_difficulty": 30,
                        "max_difficulty": 100,
                        "schedule_type": "fixed_root",
                        "schedule_config": {
                            "total_curriculum_step": STEPS // 2,
                            "difficulty_step": 2,
                            "root_degree": 2,
                        },
                    }
                }
            },
        },
        "random_ltd": {"layers": "middle", "min_tokens": 128, "steps": STEPS * 3 // 4, "seq_per_step": 16},
        "optimizer": {
            "name": "onebit_adam",
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "freeze_step": STEPS // 4,
        },
        "schedule": {"warmup_steps": STEPS // 12, "decay": "cosine", "min_ratio": 0.1},
    }
