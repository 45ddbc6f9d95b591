"""``penstock plan``: from measurements in a file to a choice, pictures, and a configuration that a run takes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.pipe.planner import LayerCosts, Profile, save_profiles
from penstock.pipe.schedule import load_timeline
from penstock.runtime.config import load_config
from penstock.runtime.main_job import reference_model
from penstock.runtime.planning import bytes_of

BLOCK = LayerCosts("GPTBlock", 1e-3, 2e-3, 1e-3, 1e-3, kept=1000, output=100, parameters=500, state=1000)
HEAD = LayerCosts("OutputHead", 4e-3, 8e-3, 4e-3, 4e-3, kept=4000, whole=("a custom function",), state=10)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration, and the measurements of its layers: embedding, four blocks, norm, head."""
    config = tmp_path / "run.yaml"
    values = {
        "model": {"vocab_size": 16, "num_layers": 4, "hidden_size": 8, "num_heads": 2, "context": 8},
        "pipe": {"stages": 2},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 3},
        "data": {"train": str(tmp_path / "corpus")},
    }
    config.write_text(yaml.safe_dump(values))
    profile = tmp_path / "profile.json"
    layers = of_model(config, (BLOCK, *[BLOCK] * 4, BLOCK, HEAD))
    save_profiles([Profile(size, layers) for size in (1, 2)], profile)
    return config, profile


def of_model(config: Path, costs: Sequence[LayerCosts]) -> tuple[LayerCosts, ...]:
    """Costs that were measured on the layers of a configuration's model."""
    model = reference_model(load_config(config))
    facts = zip(costs, map(model.type_name, range(7)), model.parameter_counts, strict=True)
    return tuple(replace(cost, name=name, trained=count) for cost, name, count in facts)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)])


def test_the_choice_is_printed_drawn_and_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, profile = files
    pytest.importorskip("matplotlib")
    outputs = {name: tmp_path / f"step.{name}" for name in ("svg", "png", "html", "trace", "timeline")}
    options = itertools.chain(*((f"--{name}", path) for name, path in outputs.items()))
    result = run(config, "--profile", profile, "--memory", "1MiB", "--write", tmp_path / "planned.yaml", *options)
    assert result.exit_code == 0, result.output
    assert "whole: layer 6: a custom function" in result.output
    assert "predicted step" in result.output
    timeline = load_timeline(outputs["timeline"])
    assert timeline.unit == "s"
    assert f"of which passes {1e3 * timeline.makespan:.2f} ms" in result.output
    assert outputs["svg"].read_text().startswith("<svg")
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in outputs["html"].read_text()
    assert "traceEvents" in outputs["trace"].read_text()
    planned = load_config(tmp_path / "planned.yaml")
    assert planned.pipe.schedule == timeline.schedule.name
    assert planned.train.micro_batch_size * timeline.schedule.micro_batches == 8
    assert len(planned.pipe.partition_method) == timeline.schedule.num_stages + 1


def test_a_searched_schedule_is_written_beside_the_configuration(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ortools")
    config, profile = files
    written = tmp_path / "planned.yaml"
    result = run(config, "--profile", profile, "--micro-batch-size", 2, "--search", 2, "--write", written)
    assert result.exit_code == 0, result.output
    planned = load_config(written)
    assert planned.pipe.schedule.endswith("planned.schedule.json") == ("choice: search" in result.output)


def test_layers_to_recompute_are_written_for_the_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, profile = files
    blocks = (BLOCK, *[replace(BLOCK, kept=kept) for kept in (1000, 8000, 1000, 8000)], BLOCK, HEAD)
    save_profiles([Profile(1, of_model(config, blocks))], profile)
    written = tmp_path / "planned.yaml"
    options = ("--micro-batch-size", 1, "--memory", "34kB", "--write", written)
    result = run(config, "--profile", profile, *options)
    assert result.exit_code == 0, result.output
    planned = load_config(written).pipe
    assert planned.activation_checkpoint_interval == 0
    assert planned.activation_checkpoint_layers
    assert set(planned.activation_checkpoint_layers) <= {2, 4}
    shown = ",".join(map(str, planned.activation_checkpoint_layers))
    assert f"recomputing layers {shown}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "lots"), "'lots' is no size; write it like 8GiB"),
        (("--memory", "3kB"), "nothing fits in 3,000 bytes per rank"),
        (("--micro-batch-size", "3"), "micro-batches of 3 do not divide the 8 samples"),
        (("--set", "model=null"), "needs a model section"),
        (("--set", "data.train=null"), "set data.train"),
        (("--set", "tensor_parallel.size=2"), "layers are measured whole"),
        (("--set", "pipe.stages=9"), "9 pipeline ranks cannot share 7 layers"),
        (("--set", "batching.sizes=[[100, 16]]"), "steps that are all alike"),
        (("--micro-batch-size", "4"), "no measurements of micro-batches of 4, but of 1, 2; take one of these"),
        (("--set", "model.num_layers=2"), "is of another model, 7 layers"),
        (("--set", "model.hidden_size=16"), "trainable parameters; measure again"),
        (("--search", "-5"), "--search"),
    ],
)
def test_mistakes_are_refused(files: tuple[Path, Path], arguments: tuple[str, ...], message: str) -> None:
    config, profile = files
    result = run(config, "--profile", profile, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_comparison_needs_a_run_that_recorded(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("--compare", tmp_path)
    assert result.exit_code == 2
    assert "holds no recorded steps; train with --set pipe.record_timeline=5 first" in result.output
    assert "leave out CONFIG" in run(files[0], "--compare", tmp_path).output
    assert "give a configuration" in run().output


def test_what_a_plan_leaves_out_is_said(files: tuple[Path, Path]) -> None:
    config, profile = files
    result = run(config, "--profile", profile, "--set", "data_parallel.replicas=2")
    assert "not in the step: the exchange of gradients over 2 replicas" in result.output
    result = run(config, "--profile", profile, "--set", "data_parallel={replicas: 2, sharding: fsdp2}")
    assert "divided over the replicas" in result.output
    assert "zb_" not in result.output
    result = run(config, "--profile", profile, "--micro-batch-size", 2, "--set", "compile.enabled=true", "--top", 99)
    assert "choice: " in result.output
    assert "zb_" not in result.output  # nor other sizes than the one asked for
    assert not any(line.endswith(" of 1") or " of 1 " in line for line in result.output.splitlines())


@pytest.mark.parametrize(
    ("text", "value"), [("1000000", 10**6), ("8GiB", 8 * 2**30), ("500 MB", 5 * 10**8), ("1.5k", 1500), ("2B", 2)]
)
def test_sizes_are_read(text: str, value: Any) -> None:
    assert bytes_of(text) == value
