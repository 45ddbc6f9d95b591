"""``penstock order`` on small whole runs: what it prints is what was read, and what was not read is found out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import penstock
from penstock.cli.main import app
from penstock.data_pipeline.data_sampling import IndexedDatasetBuilder
from penstock.runtime.order_check import verify_run


class Rows(nn.Module):
    """A loss that depends on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight * rows.float()


def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return output.mean() * 1e-3


def order(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["order", *map(str, arguments)])


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "rows.npy", np.arange(200).reshape(40, 5))
    np.save(tmp_path / "m.npy", np.arange(40) % 10)
    metric = {"path": str(tmp_path / "m.npy"), "schedule_type": "fixed_discrete"}
    metric["schedule_config"] = {"difficulty": [3, 6, 9], "max_step": [1, 2]}
    return {
        "output": str(tmp_path / "run"),
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 30},
        "data": {"train": str(tmp_path / "rows.npy")},
        "sampling": {"strategy": "curriculum", "curriculum": {"metrics": {"m": metric}}},
    }


def train(config: dict[str, Any], steps: int, *, resume: bool = False) -> list[list[int]]:
    """Train, write a checkpoint, and give what the model saw: the rows' numbers, step by step."""
    seen: list[list[int]] = []
    model = Rows()
    model.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0][:, 0] // 5).tolist()))
    checkpoints = Path(config["output"]) / "checkpoints"
    with penstock.initialize(model, config, loss_fn=loss) as engine:
        if resume:
            engine.load_checkpoint(checkpoints)
        for _ in range(steps):
            engine.train_batch()
        engine.save_checkpoint(checkpoints)
    (Path(config["output"]) / "config.json").write_text(json.dumps(config))
    return [row for micro_batch in seen for row in micro_batch]  # type: ignore[misc]


def test_what_is_printed_was_read_and_the_run_proves_it(config: dict[str, Any], tmp_path: Path) -> None:
    seen = train(config, 5)
    config["sampling"]["skip_ranges"] = [[20, 24], [30, 31]]
    seen += train(config, 4, resume=True)
    run = Path(config["output"])
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    printed = order(tmp_path / "config.yaml", "--to", 36)
    assert printed.exit_code == 0
    lines = [line.split("\t") for line in printed.stdout.splitlines()]
    assert lines[0] == ["consumed", "position", "place", "sample"]
    assert [int(line[0]) for line in lines[1:]] == list(range(36))
    assert [int(line[1]) for line in lines[1:]] == list(range(36))
    assert [int(line[2]) for line in lines[1:]] == [*range(20), *range(24, 30), *range(31, 41)]
    assert [int(line[3]) for line in lines[1:]] == seen
    one_batch = order(run, "--from", 8).stdout.splitlines()[1:]
    assert [int(line.split("\t")[3]) for line in one_batch] == seen[8:12]
    assert len(list((run / "order").glob("*/order.bin"))) == 1  # sorted once for all of these
    accounts = verify_run(run)
    assert [(account.step, account.samples, account.proved) for account in accounts] == [(5, 20, True), (9, 36, True)]
    result = order("--verify", run)
    assert result.exit_code == 0
    assert "step 9  36 samples" in result.stdout
    assert "as the order says" in result.stdout


def test_other_samples_are_found_out(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.data_pipeline.data_sampling import DataSampler

    train(config, 2)
    honest = DataSampler.sample_at
    monkeypatch.setattr(DataSampler, "sample_at", lambda self, k: (honest(self, k) + (np.asarray(k) == 9)) % 40)
    train(config, 1, resume=True)
    monkeypatch.undo()
    run = Path(config["output"])
    assert [account.proved for account in verify_run(run)] == [True, False]
    result = order("--verify", run)
    assert result.exit_code == 1
    assert "step 3  12 samples" in result.stdout
    assert "NOT what the order says" in result.stdout


def test_mistakes_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({**config, "data": {}}))
    for arguments, message in (
        ((), "name either a configuration"),
        ((tmp_path / "config.yaml",), r"data\.train names none"),
        ((tmp_path / "config.yaml", "--set", f"data.train={tmp_path / 'rows.npy'}", "--from", 9, "--to", 3), "before"),
        (("--verify", tmp_path), "no complete checkpoint"),
    ):
        result = order(*arguments)
        assert result.exit_code == 2
        assert message.replace("\\", "") in result.stderr.replace("\n", " ")


def test_a_paced_run_keeps_its_births_and_proves_what_it_read(config: dict[str, Any]) -> None:
    config["sampling"]["curriculum"]["pacing"] = {"every": 2}
    checkpoints = Path(config["output"]) / "checkpoints"
    difficulties = []
    for start, losses in ((0, {2: 3.0, 4: 3.0}), (5, {6: 3.0, 8: 3.0})):
        with penstock.initialize(Rows(), config, loss_fn=loss) as engine:
            if start:
                engine.load_checkpoint(checkpoints)
            for step in range(start + 1, start + 6):
                engine.train_batch()
                assert engine.last is not None
                difficulties.append(engine.last.difficulty["m"])
                if step in losses:
                    # The second of two equal losses lets the next samples in, two steps later.
                    assert engine.report_validation(losses[step]) == (step in (4, 8))
            engine.save_checkpoint(checkpoints)
    assert difficulties == [3] * 6 + [6] * 4
    (Path(config["output"]) / "config.json").write_text(json.dumps(config))
    assert [account.proved for account in verify_run(Path(config["output"]))] == [True, True]
    printed = order(config["output"], "--from", 40, "--to", 48).stdout.splitlines()[1:]
    assert {int(line.split("\t")[3]) % 10 for line in printed} & {7, 8, 9}


def test_pacing_without_a_heldout_loss_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_document(np.arange(41 * 8) % 50)
    config["data"] = {"train": str(tmp_path / "corpus"), "sequence_length": 8}
    config["model"] = {"vocab_size": 50, "num_layers": 1, "hidden_size": 8, "num_heads": 2}
    config["sampling"]["curriculum"]["pacing"] = {"every": 2}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml")])
    assert result.exit_code == 2
    assert "waits for the held-out loss" in result.stderr.replace("\n", " ")
