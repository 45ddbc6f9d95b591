"""A pipeline from one file: text is tokenized, a model learns, results and weights are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from penstock.data_pipeline import initialize_model, initialize_module, load_configuration, run_pipeline
from penstock.data_pipeline.__main__ import main
from penstock.data_pipeline.datasets import IndexedDataset
from penstock.data_pipeline.datasets.tokenize import tokenize_to_indexed, train_bpe
from support.loop_models import LanguageModel

TEXTS = ["abcabcabcabcabcabcabc" * 4, "the cat sat on the mat " * 8] * 4


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tokenizer = train_bpe(TEXTS, vocab_size=270)
    tokenize_to_indexed(TEXTS, tokenizer, tmp_path / "corpus")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
globals: {{seed: 7}}
logging: {{level: warning}}
components: {{model: {{test_pipeline_lm: "support.loop_models:LanguageModel"}}}}
data:
  dataset: {tmp_path}/corpus
  length: 8
  data_loader_params: {{batch_size: 4, shuffle: true, drop_last: true}}
model: {{name: test_pipeline_lm, args: {{vocab_size: 270}}}}
training: {{max_steps: 30, loss_fn: token_cross_entropy, optimizer: {{name: adamw, lr: 3e-2}}}}
results: {{path: {tmp_path}/out/results.jsonl, weights: {tmp_path}/out/model.safetensors}}
"""
    )
    return file


def _losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_train_then_evaluate_then_predict(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(config_file)]) == 0
    losses = _losses(out / "results.jsonl")
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1.0
    first = (out / "model.safetensors").read_bytes()
    assert main([str(config_file)]) == 0
    assert _losses(out / "results.jsonl") == losses  # the seed decides everything
    assert (out / "model.safetensors").read_bytes() == first

    changes = [
        "training={mode: eval, loss_fn: token_cross_entropy}",
        f"model.weights={out}/model.safetensors",
        f"results={{path: {out}/eval.json}}",
        "data.data_loader_params={batch_size: 5}",
    ]
    run_pipeline(load_configuration(config_file, changes))
    model = LanguageModel(270)
    model.load_state_dict(load_file(out / "model.safetensors"))
    stream = torch.tensor([token for row in IndexedDataset(tmp_path / "corpus") for token in row.tolist()])
    rows = torch.stack([stream[s : s + 9] for s in range(0, len(stream) - 8, 8)])
    expected = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).item() for part in rows.split(5)
    ]
    assert [row["loss"] for row in json.loads((out / "eval.json").read_text())] == pytest.approx(expected, rel=1e-6)

    results = run_pipeline(load_configuration(config_file, [*changes, "training={mode: predict, max_steps: 1}"]))
    assert results[0]["outputs"].shape == (5, 8, 270)


def test_mistakes_end_in_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--set", "training.max_step=3"]) == 2
    error = capsys.readouterr().err
    assert "run.yaml: training.max_step: unknown key 'max_step'; did you mean 'max_steps'" in error
    assert error.count("\n") == 1
    assert main([str(config_file), "--set", "training.optimizer.lrr=1", "--set", "data.length=100000"]) == 2
    assert main([str(config_file.with_name("none.yaml"))]) == 2
    with pytest.raises(ValueError, match="no such configuration"):
        main([str(config_file.with_name("none.yaml")), "--debug"])
    capsys.readouterr()
    assert main([str(config_file), "--set", "training.optimizer={name: sgd, lr: 1e38}"]) == 1
    assert "the loss is" in capsys.readouterr().err


def test_as_a_module(config_file: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "penstock.data_pipeline", str(config_file), "--set", "training.max_steps=2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train: 2 steps, last loss ")


def test_models_by_name_and_by_path(tmp_path: Path) -> None:
    by_path: Any = initialize_model({"name": "torch.nn:Linear", "args": {"in_features": 2, "out_features": 3}})
    assert by_path.out_features == 3
    for config, sentence in [
        ("no_such", "unknown model 'no_such'"),
        ({"name": "torch.nn:Linear", "args": {"in_feature": 2}}, "did you mean 'in_features'"),
        ({"name": "builtins:dict"}, "made a dict"),
        ({"nam": "x"}, "did you mean 'name'"),
        ({"name": "torch.nn:Identity", "weights": str(tmp_path / "none")}, "no such weights"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            initialize_model(config)  # type: ignore[arg-type]


def test_data_from_a_factory_and_an_engine_as_the_model() -> None:
    config: dict[str, Any] = {
        "logging": {"level": "error"},
        "data": {"dataset": {"name": "support.loop_models:make_numbers", "count": 8}},
        "model": {"name": "support.loop_models:CountingEngine", "args": {"micro_batches": 4}},
        "training": {"mode": "eval"},
    }
    assert [result["loss"] for result in run_pipeline(config)] == [1.5, 5.5]
    with pytest.raises(ValueError, match="its own device"):
        run_pipeline(config | {"globals": {"device": "cpu"}})
    with pytest.raises(ValueError, match="its own checkpoints"):
        run_pipeline(config | {"training": {"mode": "train"}, "results": {"weights": "w.safetensors"}})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "data: required"),
        ({"results": {"path": "out.csv"}}, "must end in .jsonl or .json"),
        ({"results": {"weights": "out.pt"}}, "must end in .safetensors"),
        ({"results": {"weights": "x.safetensors"}, "training": {"mode": "eval"}}, "results.weights has no meaning"),
        ({"globals": {"seed": -1}}, "globals.seed"),
        ({"logging": {"level": "loud"}}, "logging.level"),
        ({"components": {"modle": {"a": "torch.nn:Linear"}}}, "did you mean 'model'"),
    ],
)
def test_mistakes_in_a_configuration(config: dict[str, Any], sentence: str) -> None:
    whole = {"data": {"dataset": "x"}, "model": {"name": "y"}} | config if config else {}
    with pytest.raises(ValueError, match=sentence):
        initialize_module(whole)


def test_overrides_also_change_a_loaded_configuration() -> None:
    config = load_configuration({"data": {"dataset": "x"}, "model": {"name": "y"}})
    assert load_configuration(config) is config
    assert load_configuration(config, ["globals.seed=9", "model.name=z"]).model.name == "z"
