"""``penstock train`` and ``penstock eval``: a whole run, from a configuration to a checkpoint and a summary."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from penstock._core.files import write_json
from penstock.data_pipeline.datasets import TokenWindows
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.tokenize import load_tokenizer
from penstock.models.gpt import gpt_layers, gpt_loss
from penstock.pipe.module import PipelineModule
from penstock.runtime import demo
from penstock.runtime.checkpoint import latest_complete, list_checkpoints
from penstock.runtime.config import TrainConfig, check_world, load_config
from penstock.runtime.display import Display
from penstock.runtime.engine import Engine
from penstock.runtime.engine_state import find, load_weights
from penstock.runtime.gather import gather_json
from penstock.runtime.heldout import HeldOut, bytes_per_token, held_out, unigram_log_probabilities
from penstock.runtime.initialize import initialize
from penstock.runtime.launch import launch, launched
from penstock.runtime.ledger import merge
from penstock.runtime.metrics_log import MetricsLog
from penstock.runtime.summary import render, summarize

DEFAULT_OUTPUT: Final = Path("runs/demo")
CONFIG_NAME: Final = "config.json"
SUMMARY_NAME: Final = "summary.json"
METRICS_NAME: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"


def train(
    config_path: Path | None,
    overrides: Sequence[str],
    output: Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train, and end with a checkpoint, an evaluation and a summary in the run's directory.

    Started alone it launches one process per rank on this machine; started by a launcher it joins the others.

    Args:
        config_path: YAML or JSON; None trains the demo.
        overrides: ``section.key=value`` texts.
        output: The run's directory; None takes the configuration's, or ``runs/demo`` for the demo.
        resume: Go on from the newest complete checkpoint in the directory, if there is one.
        overwrite: Start anew in a directory that holds a run.

    Returns:
        The exit code.

    Raises:
        ValueError: The configuration, the data or the directory do not allow it; the message says what to change.
    """
    if config_path is None and not launched():
        folder = output or DEFAULT_OUTPUT
        _check_directory(folder, resume=resume, overwrite=overwrite)
        demo.prepare_corpus(folder / "corpus", _say)
    config = _load(config_path, overrides, output)
    assert config.output is not None
    folder = Path(config.output)
    if not launched():
        _check_directory(folder, resume=resume, overwrite=overwrite)
        processes = config.pipe.stages * (config.data_parallel.replicas or 1)
        check_world(config, processes)
        if processes > 1:
            arguments = ["train", *([str(config_path)] if config_path else []), "--output", str(folder)]
            arguments += [part for override in overrides for part in ("--set", override)]
            arguments += ["--resume"] if resume else []
            arguments += ["--overwrite"] if overwrite else []
            return launch(arguments, processes=processes)
    _train(config, folder, resume=resume)
    return 0


def evaluate(run: Path, overrides: Sequence[str] = ()) -> HeldOut:
    """Evaluate the newest complete checkpoint of a run on its held-out data, in this one process.

    Args:
        run: A run's directory, or one checkpoint of it.
        overrides: ``section.key=value`` texts, for example another ``data.heldout``.

    Raises:
        ValueError: There is no run, no complete checkpoint, or no held-out data.
    """
    checkpoint = find(run if (run / "manifest.json").is_file() else run / CHECKPOINTS)
    config = load_config(checkpoint.read_state()["config"], overrides)
    alone = {"pipe": config.pipe.model_copy(update={"stages": 1, "partition_method": "parameters"})}
    config = config.model_copy(
        update={**alone, "data_parallel": config.data_parallel.model_copy(update={"replicas": 1}), "sampling": {}}
    )
    with initialize(_model(config), config, training_data=_windows(config, config.data.heldout)) as engine:
        load_weights(engine.parts, checkpoint)
        return _evaluate(engine)


def _load(config_path: Path | None, overrides: Sequence[str], output: Path | None) -> TrainConfig:
    if config_path is None:
        folder = output or DEFAULT_OUTPUT
        source: Any = demo.demo_config(folder / "corpus")
        config = load_config({**source, "output": str(folder)}, overrides)
    else:
        config = load_config(config_path, [*overrides, *([f"output={json.dumps(str(output))}"] if output else [])])
    if config.output is None:
        raise ValueError("the run needs a directory: set output in the configuration, or pass --output DIR")
    if config.model is None:
        raise ValueError("the configuration needs a model section; penstock train builds the reference GPT")
    if config.data.train is None:
        raise ValueError("the configuration needs data.train, a .bin/.idx prefix; `penstock tokenize` makes one")
    return config


def _check_directory(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if not resume and not overwrite and list_checkpoints(folder / CHECKPOINTS):
        raise ValueError(
            f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, "
            "or name another directory by --output"
        )


def _model(config: TrainConfig) -> PipelineModule:
    assert config.model is not None
    tokenizer = config.data.tokenizer
    shape = config.model.gpt_config(
        vocab_size=None if tokenizer is None else load_tokenizer(tokenizer).get_vocab_size(),
        context=config.sequence_length,
    )
    return PipelineModule(
        gpt_layers(shape),
        num_stages=config.pipe.stages,
        loss_fn=gpt_loss,
        base_seed=config.seed,
        partition_method=config.pipe.partition_method,
        activation_checkpoint_interval=config.pipe.activation_checkpoint_interval,
    )


def _train(config: TrainConfig, folder: Path, *, resume: bool) -> None:
    with initialize(_model(config), config) as engine:
        chief = engine.rank == 0
        checkpoints = folder / CHECKPOINTS
        if resume and latest_complete(checkpoints) is not None:
            loaded = engine.load_checkpoint(checkpoints)
            if chief:
                _say(f"resuming from {loaded}")
        elif chief:
            # Also on a resume that finds no complete checkpoint: what is left there is of no use to the new run.
            for entry in list_checkpoints(checkpoints):
                shutil.rmtree(entry.path)
        if chief:
            write_json(folder / CONFIG_NAME, config.to_dict())
        log = MetricsLog(folder / METRICS_NAME, resume_step=engine.progress.step) if chief else None
        display = Display(config.total_steps, log_every=config.train.log_every, enabled=chief)
        with display:
            _loop(engine, display, log, checkpoints)
        if log is not None:
            log.close()
        result = _evaluate(engine) if config.data.heldout is not None else None
        _finish(engine, folder, result)


def _loop(engine: Engine, display: Display, log: MetricsLog | None, checkpoints: Path) -> None:
    train = engine.config.train
    total = engine.config.total_steps
    while engine.progress.step < total:
        engine.train_batch()
        report = engine.last
        assert report is not None
        sent = sum(engine.parts.meter.sent.values())
        record = {**asdict(report), "bytes_sent": sent}
        done = engine.progress.step
        if train.eval_every and done % train.eval_every == 0 and done < total and engine.config.data.heldout:
            record["heldout_loss"] = _evaluate(engine).nats_per_token
        display.update(report, bytes_sent=sent)
        if log is not None:
            log.write(record)
        if done == total or (train.checkpoint_every and done % train.checkpoint_every == 0):
            engine.save_checkpoint(checkpoints, keep=train.keep_checkpoints)


def _windows(config: TrainConfig, path: str | None) -> TokenWindows:
    if path is None:
        raise ValueError("there is no held-out data: set data.heldout to a .bin/.idx prefix")
    length = config.sequence_length
    assert length is not None  # the model needed it
    return TokenWindows(IndexedDataset(path), length)


def _evaluate(engine: Engine) -> HeldOut:
    """The loss on the first held-out windows that fill ``train.eval_batches`` global batches (or all, if fewer)."""
    config, cut = engine.config, engine.parts.cut
    windows = _windows(config, config.data.heldout)
    batches = min(config.train.eval_batches, len(windows) // cut.global_batch_size)
    if not batches:
        raise ValueError(
            f"{config.data.heldout}: {len(windows)} held-out windows do not fill one global batch of "
            f"{cut.global_batch_size}; hold out more text or lower train.global_batch_size"
        )

    def pairs(batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in cut.indices():
            tokens = windows.batch(np.asarray(cut.positions(index, batch * cut.global_batch_size)))
            tokens_BT = torch.from_numpy(tokens.astype(np.int64))
            yield tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    losses = [engine.eval_batch(pairs(batch)) for batch in range(batches)]
    labels = windows.batch(np.arange(batches * cut.global_batch_size))[:, 1:]
    assert config.data.train is not None
    training = IndexedDataset(config.data.train)
    vocab_size = 1 + max(int(labels.max()), _largest(training.tokens))
    sizes = None
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        sizes, vocab_size = bytes_per_token(tokenizer), max(vocab_size, tokenizer.get_vocab_size())
    unigram = unigram_log_probabilities(training.tokens, vocab_size)
    return held_out(sum(losses) / len(losses), labels, unigram, sizes)


def _largest(tokens: Any) -> int:
    return max(int(tokens[start : start + (1 << 22)].max()) for start in range(0, len(tokens), 1 << 22))


def _finish(engine: Engine, folder: Path, result: HeldOut | None) -> None:
    parts = engine.parts
    states = gather_json(parts.rates.ledger.state_dict(), group=parts.groups.control, meter=parts.meter)
    if engine.rank != 0:
        return
    summary = summarize(merge(states))
    if result is not None:
        summary["heldout"] = asdict(result)
    write_json(folder / SUMMARY_NAME, summary)
    from rich.console import Console

    console = Console()
    console.print(render(summary))
    if result is not None:
        console.print(
            f"held-out loss {result.nats_per_token:.4f} nats per token"
            + (f" ({result.bits_per_byte:.4f} bits per byte)" if result.bits_per_byte is not None else "")
            + f" on {result.tokens:,} tokens; a unigram model has {result.unigram_nats_per_token:.4f} on the same "
            f"tokens, {result.unigram_nats_per_token - result.nats_per_token:.4f} more"
        )
    console.print(f"checkpoint, metrics and summary are in {folder}")


def _say(text: str) -> None:
    print(text, flush=True)
