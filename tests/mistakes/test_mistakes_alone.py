"""Mistakes that one process can see: each is refused before a process group exists, with what, where and the remedy."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import penstock
from penstock._core.files import CorruptFileError
from penstock.cli.main import app
from penstock.data_pipeline import create_data_loader
from penstock.data_pipeline.data_sampling import DataSampler, IndexedDataset, IndexedDatasetBuilder
from penstock.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from penstock.pipe.schedule import get_schedule
from penstock.runtime.preparation import prepare
from support import run_jobs


class Mistake(NamedTuple):
    """What a user does, given an empty folder, and what the message must say (substrings, in any order)."""

    name: str
    do: Callable[[Path], object]
    says: tuple[str, ...]
    error: type[Exception] = ValueError


class _Exit(Exception):
    """A verb of the command line refused; holds what it printed."""


def start(folder: Path, **changes: Any) -> None:
    """Initialize the tiny GPT with changed settings: ``section=...`` or ``section__key=value``."""
    settings = run_jobs.config(steps=4)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            settings.setdefault(section, {})[key] = value
        else:
            settings[section] = value
    penstock.initialize(run_jobs.model(), settings, training_data=run_jobs.tokens()).close()


def start_plain(**changes: Any) -> None:
    settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2}, **changes}
    penstock.initialize(nn.Linear(2, 1), settings, loss_fn=nn.functional.mse_loss).close()


def with_layers(layers: list[Any], stages: int = 2, *, method: Any = "parameters", **arguments: Any) -> None:
    settings = {
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2},
        "pipe": {"stages": stages},
    }
    model = PipelineModule(layers, num_stages=stages, partition_method=method, loss_fn=nn.functional.mse_loss)
    penstock.initialize(model, settings, **arguments)


def measured_without_data() -> None:
    settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2}, "pipe": {"stages": 2}}
    layers = [LayerSpec(nn.Linear, 2, 2)] * 4
    prepare(PipelineModule(layers, partition_method="profile", loss_fn=nn.functional.mse_loss), settings, world_size=2)


def command(*words: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    raise _Exit(result.output)


def corpus(folder: Path, lengths: tuple[int, ...] = (30, 50, 40)) -> Path:
    prefix = folder / "corpus"
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for length in lengths:
            builder.add_item(np.arange(length) % run_jobs.VOCAB)
            builder.end_document()
    return prefix


def corpus_with(folder: Path, change: Callable[[bytearray], object], suffix: str = ".idx") -> Path:
    """A corpus of which one file was changed."""
    prefix = corpus(folder)
    file = Path(f"{prefix}{suffix}")
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)
    return prefix


def cut(count: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        del data[-count:]

    return change


def put(form: str, at: int, value: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        struct.pack_into(form, data, at, value)

    return change


def saved(folder: Path) -> Path:
    """A complete checkpoint of the tiny GPT."""
    with penstock.initialize(run_jobs.model(), run_jobs.config(steps=4), training_data=run_jobs.tokens()) as engine:
        engine.train_batch()
        return engine.save_checkpoint(folder)


def load(folder: Path, *, layers: int = 4, **changes: Any) -> None:
    with penstock.initialize(
        run_jobs.model(layers=layers), run_jobs.config(steps=4, **changes), training_data=run_jobs.tokens()
    ) as engine:
        engine.load_checkpoint(folder)


def load_with_a_changed_byte(folder: Path) -> None:
    file = saved(folder) / "layer_002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    load(folder / "step_00000001")


def load_without(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (saved(folder) / name).unlink()
        load(folder / "step_00000001" if name != "manifest.json" else folder)

    return do


def load_changed(**changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        saved(folder)
        load(folder, **changes)

    return do


def tied_shapes(folder: Path) -> None:
    first, other = (TiedLayerSpec("both", nn.Linear, 4, width, bias=False) for width in (4, 5))
    with_layers([first, LayerSpec(nn.ReLU), other])


def optimizer_instance(folder: Path) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    penstock.initialize(
        run_jobs.model(), run_jobs.config(steps=4), training_data=run_jobs.tokens(), optimizer=optimizer
    )


def train_on(items: list[Any]) -> Callable[[Path], None]:
    """Train a plain module, whose step takes two micro-batches, on an iterator of these."""

    def do(folder: Path) -> None:
        settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2}}
        with penstock.initialize(nn.Linear(2, 1), settings, loss_fn=nn.functional.mse_loss) as engine:
            engine.train_batch(iter(items))

    return do


def under_a_launcher(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "3")
        start(folder, pipe__stages=2, data_parallel__replicas=2)


def plain_optimizer_of_another_model(folder: Path) -> None:
    settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2}}
    other = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    penstock.initialize(nn.Linear(2, 1), settings, optimizer=other, loss_fn=nn.functional.mse_loss)


def config_file(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def existing_run(folder: Path) -> None:
    prefix = corpus(folder, (400,))
    saved(folder / "run" / "checkpoints")
    text = f"""
model: {{vocab_size: {run_jobs.VOCAB}, num_layers: 2, hidden_size: 8, num_heads: 2, context: 8}}
train: {{global_batch_size: 2, micro_batch_size: 1, steps: 1}}
data: {{train: {prefix}}}
"""
    command("train", config_file(folder, text), "--output", folder / "run")


PAIR = (torch.ones(1, 2), torch.ones(1, 1))

MISTAKES = [
    # Configuration
    Mistake(
        "a global batch that replicas cannot share",
        lambda f: start(f, data_parallel__replicas=3),
        ("train.global_batch_size=8", "micro_batch_size * replicas = 1 * 3 = 3", "take a global batch of 6 or 9"),
    ),
    Mistake(
        "a global batch that is no multiple of the micro-batch",
        lambda f: start(f, train__micro_batch_size=3),
        ("global_batch_size=8 is not divisible by micro_batch_size=3", "make it a multiple"),
    ),
    Mistake(
        "an unknown key",
        lambda f: start(f, optimizer__learning_rat=0.1),
        ("optimizer.learning_rat", "unknown key", "known"),
    ),
    Mistake(
        "an almost known key",
        lambda f: start(f, train__global_batchsize=8),
        ("train.global_batchsize", "global_batch_size"),
    ),
    Mistake("an unknown section", lambda f: start(f, pipes={"stages": 2}), ("pipes", "pipe")),
    Mistake("a string for a number", lambda f: start(f, train__steps="many"), ("train.steps", "many")),
    Mistake("an unknown optimizer", lambda f: start(f, optimizer__name="adam"), ("'adam'", "adamw", "onebit_adam")),
    Mistake("an unknown schedule", lambda f: start(f, pipe__schedule="1fb1"), ("'1fb1'", "1f1b", "gpipe")),
    Mistake(
        "a schedule that cannot train",
        lambda f: start(f, pipe__schedule="forward_only"),
        ("forward_only", "no backward", "take '1f1b' or another"),
    ),
    Mistake(
        "an unknown compression",
        lambda f: start(f, compression={"algorithm": "one_bit"}),
        ("'one_bit'", "onebit", "fp16", "bf16"),
    ),
    Mistake(
        "an unknown partition method",
        lambda f: with_layers([LayerSpec(nn.Linear, 2, 2)] * 4, method="params"),
        ("'params'", "parameters", "uniform"),
    ),
    Mistake(
        "a partition by measured times without data to measure with",
        lambda f: measured_without_data(),
        ("'profile'", "training_data"),
    ),
    Mistake(
        "clipping with 1-bit Adam",
        lambda f: start(f, optimizer={"name": "onebit_adam", "freeze_step": 2, "gradient_clipping": 1.0}),
        ("optimizer", "gradient_clipping=1", "momentum", "remove gradient_clipping"),
    ),
    Mistake(
        "1-bit Adam without its warm-up",
        lambda f: start(f, optimizer={"name": "onebit_adam"}),
        ("onebit_adam needs freeze_step", "15 to 25 %"),
    ),
    Mistake(
        "two who exchange gradients",
        lambda f: start(f, optimizer={"name": "onebit_adam", "freeze_step": 2}, compression={"algorithm": "onebit"}),
        ("compression.algorithm=onebit", "optimizer.name=onebit_adam", "keep one"),
    ),
    Mistake(
        "sequences longer than the model's context",
        lambda f: start(f, model={"vocab_size": 61, "context": 16, "num_layers": 3}),
        ("data.sequence_length=24 is longer than model.context=16", "lower the former or raise the latter to 24"),
    ),
    Mistake(
        "more kept tokens than there are",
        lambda f: start(f, random_ltd={"min_tokens": 25, "steps": 4}),
        ("random_ltd.min_tokens=25 is more than the sequence length 24", "lower it"),
    ),
    Mistake(
        "a dropping block outside the model",
        lambda f: start(f, random_ltd={"min_tokens": 8, "steps": 4, "layers": [4]}),
        ("random_ltd.layers=[4]", "4 blocks are numbered 0..3"),
    ),
    Mistake(
        "an unknown sampling strategy",
        lambda f: start(f, sampling={"strategy": "curiculum"}),
        ("curiculum", "curriculum"),
    ),
    Mistake(
        "a precision there is not",
        lambda f: start(f, precision="fp8"),
        ("precision 'fp8'", "fp16"),
    ),
    # Processes
    Mistake(
        "more processes wanted than started",
        lambda f: start(f, pipe__stages=2, data_parallel__replicas=2),
        ("pipe.stages=2 * data_parallel.replicas=2 = 4 processes, but 1 was started", "start 4 or change one"),
    ),
    Mistake(
        "a world that is no whole number of pipelines",
        under_a_launcher,
        ("= 4 processes, but 3 were started",),
    ),
    # Models
    Mistake(
        "more stages than layers",
        lambda f: with_layers([LayerSpec(nn.Linear, 2, 2)] * 3, stages=4),
        ("4 pipeline stages need at least 4 layers, the model has 3", "use at most 3 stages"),
    ),
    Mistake("tied layers of different shapes", tied_shapes, ("'both'", "weight", "(4, 4)", "(5, 4)")),
    Mistake(
        "a plain module on two stages",
        lambda f: start_plain(pipe={"stages": 2}),
        ("pipe.stages=2, but a plain Linear cannot be divided", "PipelineModule(layers", "set pipe.stages: 1"),
    ),
    Mistake(
        "a plain module with token dropping",
        lambda f: start_plain(random_ltd={"min_tokens": 2, "steps": 2}),
        ("random_ltd", "convert_to_random_ltd"),
    ),
    Mistake(
        "an optimizer over a model that is not built yet",
        optimizer_instance,
        ("an optimizer instance cannot hold the parameters of a PipelineModule", "give a factory"),
    ),
    Mistake(
        "an optimizer over another model",
        plain_optimizer_of_another_model,
        ("the optimizer holds 2 parameters, of which 0 are among the 2 trainable ones", "build it over"),
    ),
    Mistake(
        "a list for a model",
        lambda f: penstock.initialize(
            [nn.Linear(2, 2)], {"train": {"global_batch_size": 1, "micro_batch_size": 1, "steps": 1}}
        ),  # type: ignore[arg-type]
        ("got list", "wrap a list of layers as PipelineModule(layers, ...)"),
    ),
    # Data
    Mistake(
        "a truncated index",
        lambda f: IndexedDataset(corpus_with(f, cut(3))),
        ("corpus.idx", "bytes"),
        CorruptFileError,
    ),
    Mistake(
        "truncated tokens",
        lambda f: IndexedDataset(corpus_with(f, cut(3), ".bin")),
        ("corpus.idx", "corpus.bin", "sequence 2", "237 bytes"),
        CorruptFileError,
    ),
    Mistake(
        "an unknown dtype code",
        lambda f: IndexedDataset(corpus_with(f, put("<B", 17, 99))),
        ("corpus.idx", "99", "uint16"),
        CorruptFileError,
    ),
    Mistake(
        "a file of another format",
        lambda f: IndexedDataset(corpus_with(f, put("<B", 0, 0x50))),
        ("corpus.idx", "not an indexed dataset", "PMIDIDX"),
        CorruptFileError,
    ),
    Mistake(
        "a future version",
        lambda f: IndexedDataset(corpus_with(f, put("<Q", 9, 2))),
        ("corpus.idx", "version 2", "version 1"),
        CorruptFileError,
    ),
    Mistake(
        "a number of sequences beyond the file",
        lambda f: IndexedDataset(corpus_with(f, put("<Q", 18, 1 << 50))),
        ("corpus.idx", str(1 << 50)),
        CorruptFileError,
    ),
    Mistake(
        "a missing file",
        lambda f: start(f, data={"train": str(f / "nothing"), "sequence_length": 24}) or create_data_loader(f / "no"),
        ("no", "there is no"),
    ),
    Mistake(
        "an empty dataset",
        lambda f: penstock.initialize(run_jobs.model(), run_jobs.config(steps=4), training_data=[]),
        ("the training data holds no samples",),
    ),
    Mistake(
        "an empty source for a sampler", lambda f: DataSampler([], {"batch_size": 1}), ("empty", "nothing to sample")
    ),
    Mistake(
        "a corpus shorter than a window",
        lambda f: penstock.initialize(run_jobs.model(), run_jobs.config(steps=4), training_data=corpus(f, (20,))),
        ("holds 20 tokens, fewer than one window of 24 + 1", "shorten the windows or add text"),
    ),
    Mistake(
        "a batch larger than the data",
        lambda f: DataSampler([1, 2, 3], {"batch_size": 4, "drop_last": True}),
        ("the run has 3 samples, less than one batch of 4", "lower batch_size"),
    ),
    Mistake(
        "an unknown parameter of a loader",
        lambda f: create_data_loader([1, 2], {"data_loader_params": {"batchsize": 2}}),
        ("data_loader_params", "'batchsize'", "batch_size"),
    ),
    Mistake(
        "two orders at once",
        lambda f: create_data_loader([1, 2], {"data_loader_params": {"shuffle": True}, "sampling": {"batch_size": 1}}),
        ("shuffle", "sampling", "remove them here"),
    ),
    Mistake(
        "an iterator that ends early",
        train_on([PAIR]),
        ("iterator of replica 0 ended after 1 of the 2 micro-batches of a step", "give it more data"),
    ),
    Mistake(
        "a batch that is no pair",
        train_on([torch.ones(1, 2)] * 2),
        ("a batch must be a pair (inputs, targets), got a Tensor", "tuple or dict"),
    ),
    Mistake("nothing to train on", lambda f: start_nothing(), ("nothing to train on", "data.train")),
    # Checkpoints
    Mistake(
        "a changed byte in a checkpoint",
        load_with_a_changed_byte,
        ("layer_002.safetensors", "SHA-256 differs"),
        CorruptFileError,
    ),
    Mistake(
        "a missing file of a checkpoint",
        load_without("layer_001.safetensors"),
        ("layer_001.safetensors", "missing"),
        CorruptFileError,
    ),
    Mistake(
        "an incomplete checkpoint", load_without("manifest.json"), ("no complete checkpoint to load", "step_00000001")
    ),
    Mistake(
        "no checkpoint", lambda f: load(f / "nowhere"), ("nowhere", "no complete checkpoint", "holds no checkpoints")
    ),
    Mistake("a checkpoint of a smaller model", load_changed(layers=5), ("step_00000001", "layer")),
    Mistake("a checkpoint of a bigger model", load_changed(layers=3), ("step_00000001", "layer")),
    Mistake(
        "a checkpoint of another precision",
        load_changed(precision="float32"),
        ("float64", "float32", "layer_000", "the checkpoint holds"),
    ),
    Mistake(
        "a resume with another order",
        load_changed(sampling={"seed": 12}),
        ("another order", "seed", "restore them"),
    ),
    # Command line
    Mistake(
        "a malformed --set",
        lambda f: command("train", "--set", "train.steps"),
        ("override 'train.steps' is not of the form a.b=value", "train.steps=100"),
        _Exit,
    ),
    Mistake(
        "a --set of an unknown key",
        lambda f: command(
            "train",
            config_file(f, "train: {global_batch_size: 1, micro_batch_size: 1, steps: 1}"),
            "--output",
            f,
            "--set",
            "train.step=1",
        ),
        ("train.step", "steps"),
        _Exit,
    ),
    Mistake(
        "a configuration that is no YAML",
        lambda f: command("train", config_file(f, "train: {steps: [1,"), "--output", f),
        ("run.yaml", "line"),
        _Exit,
    ),
    Mistake(
        "no configuration",
        lambda f: command("train", f / "no.yaml"),
        ("no.yaml",),
        _Exit,
    ),
    Mistake("a run that exists", existing_run, ("holds a run already", "--resume", "--overwrite"), _Exit),
    Mistake(
        "both --resume and --overwrite",
        lambda f: command("train", "--output", f, "--resume", "--overwrite"),
        ("--resume and --overwrite exclude each other",),
        _Exit,
    ),
    Mistake("eval of no run", lambda f: command("eval", f), ("no complete checkpoint",), _Exit),
    Mistake(
        "an unknown schedule to draw", lambda f: command("schedule", "1f1", "-p", 2, "-m", 2), ("'1f1'", "1f1b"), _Exit
    ),
    Mistake("no micro-batches", lambda f: get_schedule("1f1b", 2, 0), ("micro", "0")),
]


def start_nothing() -> None:
    settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 2}}
    with penstock.initialize(nn.Linear(2, 1), settings, loss_fn=nn.functional.mse_loss) as engine:
        engine.train_batch()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_refused_with_its_remedy(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_group(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process group was made before the mistake was seen")

    monkeypatch.setattr(dist, "init_process_group", no_group)
    with pytest.raises(mistake.error) as caught:
        mistake.do(tmp_path)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    for part in mistake.says:
        assert part in text, f"{part!r} is missing in: {text}"
    assert not dist.is_initialized()


def test_the_table_is_long_enough() -> None:
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) >= 30
