"""``penstock train`` and ``penstock eval``: a whole run, from a configuration to a checkpoint and a summary."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from penstock._core.files import write_json
from penstock._core.waiting import Watcher
from penstock.data_pipeline.datasets import TokenWindows
from penstock.data_pipeline.datasets.indexed import IndexedDataset, idx_path
from penstock.data_pipeline.datasets.tokenize import load_tokenizer
from penstock.models.gpt import gpt_layers, gpt_loss
from penstock.pipe.module import LayerSpec, PipelineModule
from penstock.runtime import demo
from penstock.runtime.batching_section import BatchingSection
from penstock.runtime.checkpoint import Checkpoint, latest_complete, list_checkpoints
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.config_sections import CompressionSection, DataParallelSection, PipeSection
from penstock.runtime.display import Display
from penstock.runtime.earlier_cuts import as_cut_before
from penstock.runtime.engine import Engine
from penstock.runtime.engine_state import find, load_weights
from penstock.runtime.evaluation import evaluate as evaluate_engine
from penstock.runtime.evaluation import heldout_loss, heldout_windows
from penstock.runtime.gather import gather_json
from penstock.runtime.heldout import HeldOut
from penstock.runtime.initialize import initialize
from penstock.runtime.launch import launch, launched
from penstock.runtime.metrics_log import MetricsLog
from penstock.runtime.optimizer_section import OptimizerSection
from penstock.runtime.preparation import prepare
from penstock.runtime.process import Process
from penstock.runtime.run_directory import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    CORPUS_NAME,
    METRICS_NAME,
    SUMMARY_NAME,
)
from penstock.runtime.run_facts import flat
from penstock.runtime.stopping import EXIT_CODE
from penstock.runtime.summary import render

DEFAULT_OUTPUT: Final = Path("runs/demo")
_DEMO_DEADLINE_S: Final = 300.0
_TOKENS_CHECKED: Final = 1 << 24


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
    config_path = _source(config_path, output, resume=resume)
    if launched():
        return _join(config_path, overrides, output, resume=resume, overwrite=overwrite)
    config, folder = _load(config_path, overrides, output)
    _check_directory(folder, resume=resume, overwrite=overwrite)
    if config_path is None:
        demo.prepare_corpus((output or DEFAULT_OUTPUT) / CORPUS_NAME, _say)
    # What can be refused is refused here, once, and not by every process.
    processes = config.pipe.stages * config.tensor_parallel.size * (config.data_parallel.replicas or 1)
    ready = prepare(reference_model(config), config, world_size=processes)
    if ready.order is not None and ready.order.paced and (config.data.heldout is None or not config.train.eval_every):
        raise ValueError(
            "sampling.curriculum.pacing waits for the held-out loss, but there is none during training; set "
            "data.heldout and train.eval_every"
        )
    _check_vocabulary(config)
    if processes == 1:
        return _train(config, folder, resume=resume)
    arguments = ["train", *([str(config_path)] if config_path else []), "--output", str(folder)]
    arguments += [part for override in overrides for part in ("--set", override)]
    return launch(
        [*arguments, *(["--resume"] if resume else ["--overwrite"])], processes=processes, shutdown_s=config.deadline_s
    )


def evaluate(run: Path, overrides: Sequence[str] = ()) -> HeldOut:
    """Evaluate the newest complete checkpoint of a run on its held-out data, in this one process.

    Args:
        run: A run's directory, or one checkpoint of it.
        overrides: ``section.key=value`` texts, for example another ``data.heldout``.

    Raises:
        ValueError: There is no run, no complete checkpoint, or no held-out data.
    """
    checkpoint = find(run if (run / "manifest.json").is_file() else run / CHECKPOINTS_NAME)
    trained = load_config(checkpoint.read_state()["config"], overrides)
    config = trained.model_copy(
        update={
            "pipe": PipeSection(),
            "data_parallel": DataParallelSection(replicas=1),
            "optimizer": OptimizerSection(),
            "local_updates": None,
            "compression": CompressionSection(),
            "random_ltd": None,
            "sampling": {},
            "batching": BatchingSection(),
            "data": trained.data.model_copy(update={"cut": "windows", "train": None}),
        }
    )
    windows = heldout_windows(config)
    with initialize(reference_model(config), config, training_data=windows) as engine:
        load_weights(engine.parts, checkpoint)
        return evaluate_engine(engine, windows, trained)


def _join(
    config_path: Path | None, overrides: Sequence[str], output: Path | None, *, resume: bool, overwrite: bool
) -> int:
    """Train as one of the processes that a launcher started."""
    process = None
    if config_path is None:
        process = Process.join(_DEMO_DEADLINE_S)
        with Watcher(rank=process.rank, deadline_s=_DEMO_DEADLINE_S, store=process.store) as watcher:
            if process.rank == 0:
                demo.prepare_corpus((output or DEFAULT_OUTPUT) / CORPUS_NAME, _say)
            with watcher.waiting("the demo's corpus"):
                gather_json("prepared")
    config, folder = _load(config_path, overrides, output)
    # Nothing is written before all ranks have met, so all of them see the directory as it was.
    _check_directory(folder, resume=resume, overwrite=overwrite)
    code = _train(config, folder, resume=resume)
    if process is not None:
        process.leave()
    return code


def _source(config_path: Path | None, output: Path | None, *, resume: bool) -> Path | None:
    """The configuration to read: the one named, or when a run is resumed without one, the run's own."""
    own = (output or DEFAULT_OUTPUT) / CONFIG_NAME
    return own if config_path is None and resume and own.is_file() else config_path


def _load(config_path: Path | None, overrides: Sequence[str], output: Path | None) -> tuple[TrainConfig, Path]:
    """The configuration of the run and its directory."""
    if config_path is None:
        folder = (output or DEFAULT_OUTPUT).resolve()
        source: Any = demo.demo_config(folder / CORPUS_NAME)
        config = load_config({**source, "output": str(folder)}, overrides)
    else:
        config = load_config(config_path, [*overrides, *([f"output={json.dumps(str(output))}"] if output else [])])
    if config.output is None:
        raise ValueError("the run needs a directory: set output in the configuration, or pass --output DIR")
    if config.model is None:
        raise ValueError("the configuration needs a model section; penstock train builds the reference GPT")
    if not config.data.train:
        raise ValueError("the configuration needs data.train, a .bin/.idx prefix; `penstock tokenize` makes one")
    return config, Path(config.output)


def _check_directory(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if not resume and not overwrite and list_checkpoints(folder / CHECKPOINTS_NAME):
        raise ValueError(
            f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, "
            "or name another directory by --output"
        )


def reference_model(config: TrainConfig) -> PipelineModule:
    """The model of a configuration's model section."""
    assert config.model is not None
    tokenizer = config.data.tokenizer
    shape = config.model.gpt_config(
        vocab_size=None if tokenizer is None else load_tokenizer(tokenizer).get_vocab_size(),
        context=config.sequence_length,
    )
    return PipelineModule(
        gpt_layers(shape),
        loss_fn=gpt_loss,
        base_seed=config.seed,
        partition_method=config.pipe.partition_method,
        activation_checkpoint_interval=config.pipe.activation_checkpoint_interval,
        activation_checkpoint_layers=config.pipe.activation_checkpoint_layers,
    )


def _check_vocabulary(config: TrainConfig) -> None:
    """Compare tokens with the vocabulary; of a large corpus only its beginning, the embedding looks at the rest.

    Raises:
        ValueError: A token lies outside.
    """
    model = reference_model(config).specs[0]
    assert isinstance(model, LayerSpec)
    vocab_size = model.module_args[0].vocab_size
    train = config.data.train
    named = {"data.train": train} if not isinstance(train, dict) else {f"data.train.{k}": v for k, v in train.items()}
    corpora: list[tuple[str, str, Any]] = [
        (name, path, IndexedDataset(path).tokens)
        for name, path in named.items()
        if path is not None and idx_path(path).is_file()
    ]
    if config.data.heldout is not None:
        heldout = heldout_windows(config).source
        tokens = heldout.tokens if isinstance(heldout, IndexedDataset) else heldout
        corpora.append(("data.heldout", config.data.heldout, tokens))
    for name, path, tokens in corpora:
        largest = int(tokens[:_TOKENS_CHECKED].max(initial=0))
        if largest >= vocab_size:
            raise ValueError(
                f"{name}: {path} holds the token {largest}, but the model's vocabulary is {vocab_size}; set "
                "model.vocab_size, or data.tokenizer to the one that made the tokens"
            )


def _train(config: TrainConfig, folder: Path, *, resume: bool) -> int:
    """Train, evaluate and summarize; after SIGTERM only save. Returns the exit code."""
    windows = None if config.data.heldout is None else heldout_windows(config)
    checkpoints = folder / CHECKPOINTS_NAME
    if resume:
        config = as_cut_before(config, checkpoints)
    with initialize(reference_model(config), config) as engine:
        chief = engine.rank == 0
        if resume and latest_complete(checkpoints) is not None:
            loaded = engine.load_checkpoint(checkpoints)
            if chief:
                _say(f"resuming from {loaded}")
                _name_changes(Checkpoint(loaded).read_state()["config"], config)
        elif chief:
            # Also on a resume that finds no complete checkpoint: what is left there is of no use to the new run.
            for entry in list_checkpoints(checkpoints):
                entry.remove()
            if resume:
                _say(f"there is nothing to resume in {folder}: starting at step 0")
        if chief:
            write_json(folder / CONFIG_NAME, engine.config.to_dict())  # with the cuts, where they were measured
        log = MetricsLog(folder / METRICS_NAME, resume_step=engine.progress.step) if chief else None
        display = Display(config.total_steps, log_every=config.train.log_every, enabled=chief)
        with display, engine.stop_request.listening():
            _loop(engine, display, log, checkpoints, windows)
        if log is not None:
            log.close()
        if engine.progress.step < config.total_steps:
            if chief:
                _say(f"stopped by SIGTERM after step {engine.progress.step}, saved; go on by --resume")
            return EXIT_CODE
        result = None if windows is None else evaluate_engine(engine, windows)
        _finish(engine, folder, result)
    return 0


def _loop(
    engine: Engine, display: Display, log: MetricsLog | None, checkpoints: Path, windows: TokenWindows | None
) -> None:
    train = engine.config.train
    total = engine.config.total_steps
    while engine.progress.step < total and not engine.stopping:
        engine.train_batch()
        if engine.progress.step == total:
            engine.synchronize()  # fragments take turns: most have learnt something since their last exchange
        report = engine.last
        assert report is not None
        sent = sum(engine.parts.meter.sent.values())
        record: dict[str, Any] = {**asdict(report), "bytes_sent": sent}
        if not math.isfinite(report.loss):  # a skipped step's; JSON has no such number
            record["loss"] = None
        done = engine.progress.step
        if (
            windows is not None
            and train.eval_every
            and done % train.eval_every == 0
            and done < total
            and not engine.stopping
        ):
            record["heldout_loss"] = heldout_loss(engine, windows)[0]
            display.note(f"step {done}  held-out loss {record['heldout_loss']:.4f}")
            if engine.report_validation(record["heldout_loss"]):
                display.note(f"step {done}  the held-out loss stalls: more difficult samples will enter")
        display.update(report, bytes_sent=sent)
        if log is not None:
            log.write(record)
        if done == total or engine.stopping or (train.checkpoint_every and done % train.checkpoint_every == 0):
            engine.save_checkpoint(checkpoints, keep=train.keep_checkpoints)


def _finish(engine: Engine, folder: Path, result: HeldOut | None) -> None:
    summary: dict[str, Any] = engine.summary()
    if engine.rank != 0:
        return
    if result is not None:
        summary["heldout"] = asdict(result)
    write_json(folder / SUMMARY_NAME, summary)
    console = Console()
    console.print(render(summary))
    if result is not None:
        console.print(result.sentence(), soft_wrap=True)
    console.print(f"checkpoint, metrics and summary are in {folder}", soft_wrap=True)


def _name_changes(stored: dict[str, Any], config: TrainConfig) -> None:
    """Say which settings a resumed run has changed; some, such as its length, change the learning rate from here on."""
    before, now = flat(stored), flat(config.to_dict())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            _say(f"changed since then: {key}: {now.get(key)}, was {before.get(key)}")


def _say(text: str) -> None:
    print(text, flush=True)
