"""The verbs that work on files, on small ones made here; what they print is checked against what was put in."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from penstock._core.files import write_manifest
from penstock.cli.main import app
from penstock.cli.tokenize import _Display
from penstock.data_pipeline.data_sampling import DataAnalyzer, IndexedDataset, IndexedDatasetBuilder
from penstock.data_pipeline.datasets.tokenize_files import TokenizeProgress
from penstock.pipe.schedule import Schedule, get_schedule
from penstock.runtime import main_job
from penstock.runtime.checkpoint import CheckpointWriter
from penstock.runtime.heldout import HeldOut
from penstock.runtime.metrics_log import MetricsLog

LENGTHS = [3, 1, 7, 5]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    prefix = tmp_path / "data"
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for length in LENGTHS:
            builder.add_item(np.arange(length))
            builder.end_document()
    return prefix


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    for step in (2, 4):
        writer = CheckpointWriter(directory / "checkpoints", step)
        writer.write_layer(0, {"weight:layer_000.w": torch.ones(3)})
        writer.write_rank(0, {"worker": torch.ones(3)})
        writer.seal({"step": step}, writer.written)
    with MetricsLog(directory / "metrics.jsonl") as log:
        for step in range(4):
            log.write({"step": step, "loss": 4.0 - step})
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("p", "m"), [(4, 8), (1, 3), (3, 2)])
def test_schedule_prints_the_table_and_the_published_bubble(name: str, p: int, m: int) -> None:
    result = run("schedule", name, "--stages", p, "--micro-batches", m)
    assert result.exit_code == 0
    assert f"bubble fraction   {(p - 1) / (m + p - 1):.6f}" in result.output
    peaks = [min(p - rank, m) if name == "1f1b" else m for rank in range(p)]
    assert f"peak activations  {', '.join(map(str, peaks))} " in result.output
    # F takes a unit and B two, and the last micro-batch leaves the last stage p - 1 units after the first enters it.
    assert f"makespan          {3 * (m + p - 1)}\n" in result.output
    assert result.output.startswith("rank 0 | F0")


def test_schedule_as_csv_travels_both_ways() -> None:
    result = run("schedule", "1f1b", "-p", 3, "-m", 5, "--csv")
    assert Schedule.from_text(result.output).ranks == get_schedule("1f1b", 3, 5).ranks


def test_schedule_refuses_impossible_sizes() -> None:
    result = run("schedule", "1f1b", "-p", 0, "-m", 5)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")


def test_inspect_a_dataset(dataset: Path) -> None:
    for name in (dataset, f"{dataset}.bin", f"{dataset}.idx"):
        result = run("inspect", name)
        assert result.exit_code == 0, result.output
        assert "sequences  4\n" in result.output
        assert f"tokens     {sum(LENGTHS)} (uint16)" in result.output
        assert "lengths    1 to 7, 4.0 on average" in result.output
        assert result.output.endswith("intact\n")


def test_inspect_names_no_column_where_there_is_no_table(dataset: Path, tmp_path: Path, run_directory: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "a.npy", np.arange(3))
    for path in (dataset, f"{dataset}.bin", tmp_path / "t.safetensors", tmp_path / "a.npy", run_directory):
        refused = run("inspect", path, "--column", "nope")
        assert refused.exit_code == 2
        assert "column='nope' names a column of a table, but" in " ".join(refused.output.split())


def test_inspect_verifies_every_token(dataset: Path) -> None:
    good = run("inspect", dataset, "--verify")
    assert good.exit_code == 0
    assert "token numbers  0 to 6\n" in good.output
    with Path(f"{dataset}.bin").open("ab") as file:
        file.write(b"\0\0")
    assert run("inspect", dataset).exit_code == 0
    bad = run("inspect", dataset, "--verify")
    assert bad.exit_code == 1
    assert "some bytes belong to no sequence" in bad.output


def test_inspect_tables_and_arrays(tmp_path: Path) -> None:
    rows = [[3, 1], [4], [], [1, 5, 9]]
    table = pa.table({"id": [1, 2, 3, 4], "words": rows})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    for name in ("a.parquet", "b.jsonl"):
        good = run("inspect", tmp_path / name, "--column", "words", "--verify")
        assert good.exit_code == 0, good.output
        for line in (
            "rows           4\n",
            "column         words (lists)\n",
            "lengths        0 to 3, 1.5 on average\n",
            "tokens         6 (int64)\n",
            "token numbers  1 to 9\n",
        ):
            assert line in good.output
        unclear = run("inspect", tmp_path / name)
        assert unclear.exit_code == 2
        assert "which column? It has id, words" in unclear.output
    assert "column  id (single values)" in run("inspect", tmp_path / "a.parquet", "--column", "id").output
    np.save(tmp_path / "c.npy", np.array([[2, -1], [0, 7]]))
    assert run("inspect", tmp_path / "c.npy").exit_code == 0
    negative = run("inspect", tmp_path / "c.npy", "--verify")
    assert negative.exit_code == 1
    assert "the smallest token is -1" in negative.output
    floats = pa.table({"words": pa.chunked_array([[[1.0, 2.0]], [[float("nan"), 2.0]]])})
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), floats.schema) as writer:
        writer.write_table(floats)  # two record batches
    unreadable = run("inspect", tmp_path / "d.arrow", "--verify")
    assert unreadable.exit_code == 1
    assert "the smallest token is nan" in unreadable.output
    np.save(tmp_path / "e.npy", np.int64(3))
    single = run("inspect", tmp_path / "e.npy")
    assert single.exit_code == 2
    assert "a single number, not an array" in single.output
    for name, kept in (("a.parquet", 300), ("c.npy", 130), ("b.jsonl", -3)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
        cut = run("inspect", tmp_path / name)
        assert cut.exit_code == 1, cut.output
        assert f"problem: {tmp_path / name}" in cut.output


def test_inspect_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict({name: datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}) for name in "ab"})
    parts.save_to_disk(str(tmp_path / "d"))
    assert "tokens         3 (int" in run("inspect", tmp_path / "d" / "a", "--verify").output
    for verb in (("inspect",), ("analyze", tmp_path / "out")):
        whole = run(verb[0], tmp_path / "d", *verb[1:])
        assert whole.exit_code == 2
        assert "several datasets by save_to_disk; name one: a, b" in whole.output


def test_split_and_merge(dataset: Path, tmp_path: Path) -> None:
    parts = ["--part", f"{tmp_path}/a=1", "--part", f"{tmp_path}/b=1"]
    cut = run("split", dataset, *parts)
    assert cut.exit_code == 0, cut.output
    assert cut.output.splitlines() == [
        f"{tmp_path}/a.bin: 3 documents, 11 tokens",
        f"{tmp_path}/b.bin: 1 documents, 5 tokens",
    ]
    assert run("split", dataset, *parts).exit_code == 2
    assert "of the form PREFIX=SHARE" in run("split", dataset, "--part", "a").output
    whole = run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c")
    assert whole.exit_code == 0, whole.output
    assert (tmp_path / "c.bin").read_bytes() == Path(f"{dataset}.bin").read_bytes()
    assert (tmp_path / "c.idx").read_bytes() == Path(f"{dataset}.idx").read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_inspect_a_truncated_dataset(dataset: Path, suffix: str) -> None:
    file = Path(f"{dataset}{suffix}")
    file.write_bytes(file.read_bytes()[:-3])
    result = run("inspect", dataset)
    assert result.exit_code == 1
    assert f"problem: {dataset}" in result.output
    assert result.output.endswith("not intact\n")


def test_inspect_an_analysis(dataset: Path, tmp_path: Path) -> None:
    result = run("analyze", dataset, tmp_path / "difficulty", "--metric", "seqlen")
    assert result.exit_code == 0, result.output
    assert f"seqlen of 4 samples, {sum(LENGTHS)} tokens" in result.output
    assert DataAnalyzer.load(tmp_path / "difficulty").values("seqlen").tolist() == LENGTHS
    good = run("inspect", tmp_path / "difficulty")
    assert good.exit_code == 0
    assert "seqlen   1 to 7, median 5" in good.output
    values = tmp_path / "difficulty" / "seqlen.values.npy"
    data = bytearray(values.read_bytes())
    data[-1] ^= 1
    values.write_bytes(data)
    bad = run("inspect", tmp_path / "difficulty")
    assert bad.exit_code == 1
    assert "seqlen.values.npy: its SHA-256 differs" in bad.output


def test_analyze_windows_with_both_metrics(dataset: Path, tmp_path: Path) -> None:
    result = run("analyze", dataset, tmp_path / "difficulty", "--length", 4)
    assert result.exit_code == 0, result.output
    analysis = DataAnalyzer.load(tmp_path / "difficulty")
    assert analysis.metrics == ("seqlen", "vocabularyrarity")
    assert analysis.values("seqlen").tolist() == [5, 5, 5]  # (16 - 1) // 4 windows of 4 + 1 tokens
    assert run("analyze", dataset, tmp_path / "d", "--metric", "seqlength").exit_code == 2


def longest(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(offsets) * 10


def in_all(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.array([len(offsets) - 1, len(tokens)])


def test_analyze_with_functions_and_a_picture(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_metrics", sys.modules[__name__])
    arguments = ["analyze", dataset, tmp_path / "d", "-m", "my_metrics:longest", "-m", "uniqueratio"]
    result = run(*arguments, "--total", "my_metrics:in_all", "--picture", tmp_path / "p.svg", "--resume")
    assert result.exit_code == 0, result.output
    assert "longest, in_all of" in result.output
    assert DataAnalyzer.load(tmp_path / "d").total("in_all").tolist() == [len(LENGTHS), sum(LENGTHS)]
    assert "total of shape (2,)" in run("inspect", tmp_path / "d").output
    assert DataAnalyzer.load(tmp_path / "d").values("longest").tolist() == [10 * n for n in LENGTHS]
    assert (tmp_path / "p.svg").is_file()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for extra, message in (
        (["-m", "loss"], "the metric loss needs a model"),
        (["--model", tmp_path], "give --metric loss too"),
        (["--picture", "x.txt"], "a picture ends in"),
        (["-m", "json:dumps", "-m", "pickle:dumps"], "--metric json:dumps and --metric pickle:dumps would both be"),
        (["-m", "loss", "--model", tmp_path / "m", "-m", "json:loss"], "--metric loss and --metric json:loss would"),
        (["--total", "json:dumps", "--total", "pickle:dumps"], "--total json:dumps and --total pickle:dumps would"),
        (["--engine", "spark"], "'spark' is not one of"),
    ):
        wrong = run("analyze", dataset, tmp_path / "e", *extra)
        assert wrong.exit_code == 2
        assert message in " ".join(wrong.output.split())
    assert not (tmp_path / "e").exists()


def test_inspect_a_checkpoint(run_directory: Path) -> None:
    checkpoint = run_directory / "checkpoints" / "step_00000004"
    good = run("inspect", checkpoint)
    assert good.exit_code == 0
    assert good.output.splitlines()[:3] == [
        f"{checkpoint}: checkpoint",
        "  step            4",
        "  layers          1",
    ]
    file = checkpoint / "layer_000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    bad = run("inspect", checkpoint)
    assert bad.exit_code == 1
    assert "layer_000.safetensors: its SHA-256 differs" in bad.output
    (checkpoint / "manifest.json").unlink()
    assert "not a complete checkpoint" in run("inspect", checkpoint).output


def test_inspect_a_run(run_directory: Path) -> None:
    good = run("inspect", run_directory)
    assert good.exit_code == 0, good.output
    assert "newest complete  step 4, layers 1, error memories of 1 rank," in good.output
    assert "metrics.jsonl    4 steps, the last is 3" in good.output
    assert "last loss        1.0" in good.output


def test_inspect_a_directory_of_checkpoints(run_directory: Path) -> None:
    checkpoints = run_directory / "checkpoints"
    (checkpoints / "step_00000006.partial").mkdir()
    good = run("inspect", checkpoints)
    assert good.exit_code == 0, good.output
    lines = good.output.splitlines()
    assert lines[0] == f"{checkpoints}: checkpoints"
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["step_00000002", "step", "2,", "intact,"],
        ["step_00000004", "step", "4,", "intact,"],
        ["step_00000006.partial", "step", "6,", "incomplete"],
    ]
    (checkpoints / "step_00000002" / "manifest.json").unlink()
    assert run("inspect", checkpoints).exit_code == 0
    state = checkpoints / "step_00000004" / "state.json"
    state.write_text(state.read_text().replace("4", "5"))
    bad = run("inspect", checkpoints)
    assert bad.exit_code == 1
    assert "step 4, damaged" in bad.output
    assert "state.json: its SHA-256 differs" in bad.output
    (checkpoints / "step_00000004" / "manifest.json").unlink()
    none = run("inspect", checkpoints)
    assert none.exit_code == 1
    assert "there is no complete checkpoint" in none.output


def test_inspect_an_empty_directory_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert run("inspect", tmp_path / "checkpoints").exit_code == 1


def test_a_run_killed_in_the_middle_of_writing_is_intact(run_directory: Path) -> None:
    """Its newest complete checkpoint and the lines before the torn one are what a resume goes on from."""
    (run_directory / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    with (run_directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    result = run("inspect", run_directory)
    assert result.exit_code == 0, result.output
    assert "newest complete  step 2" in result.output
    assert "passed over" in result.output
    assert "torn last line   15 characters" in result.output


@pytest.mark.parametrize("damage", ["checkpoint", "metrics", "twice", "config", "none left"])
def test_a_damaged_run_is_not_intact(run_directory: Path, damage: str) -> None:
    metrics = run_directory / "metrics.jsonl"
    checkpoints = run_directory / "checkpoints"
    if damage == "checkpoint":
        state = checkpoints / "step_00000004" / "state.json"
        state.write_text(state.read_text().replace("4", "5"))
    elif damage == "metrics":
        metrics.write_text("{\n" + metrics.read_text())
    elif damage == "twice":
        metrics.write_text(metrics.read_text() * 2)
    elif damage == "config":
        (run_directory / "config.json").write_text("{")
    else:
        for step in (2, 4):
            (checkpoints / f"step_{step:08d}" / "manifest.json").unlink()
    result = run("inspect", run_directory)
    assert result.exit_code == 1
    named = {
        "checkpoint": "state.json",
        "metrics": "line 1",
        "twice": "4 steps stand",
        "config": "config.json",
        "none left": "step_00000002",
    }
    assert named[damage] in result.output


def test_inspect_any_sealed_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    write_manifest(tmp_path, ["a.txt"])
    good = run("inspect", tmp_path)
    assert good.output.splitlines() == [f"{tmp_path}: sealed directory", "  files  1", "intact"]
    (tmp_path / "a.txt").write_text("two")
    bad = run("inspect", tmp_path)
    assert bad.exit_code == 1
    assert "a.txt: its SHA-256 differs" in bad.output


def test_inspect_tensors_and_strangers(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5), "b": torch.arange(2)}, tmp_path / "x.safetensors")
    shown = run("inspect", tmp_path / "x.safetensors").output
    assert "tensors     2\n" in shown
    assert "parameters  7, 5 of F32, 2 of I64\n" in shown
    assert "compressed" not in shown
    assert run("compress", tmp_path / "x.safetensors", "-a", "fp16", "-o", tmp_path / "s.safetensors").exit_code == 0
    assert "compressed by   fp16, of Penstock\n" in run("inspect", tmp_path / "s.safetensors").output
    (tmp_path / "y.safetensors").write_bytes(b"no")
    assert run("inspect", tmp_path / "y.safetensors").exit_code == 1
    (tmp_path / "z.txt").write_text("hello")
    for stranger in (tmp_path / "z.txt", tmp_path):
        result = run("inspect", stranger)
        assert result.exit_code == 2
        assert "what can be inspected" in result.output


def test_tokenize_trains_a_tokenizer_and_round_trips(tmp_path: Path) -> None:
    texts = [f"the {word} of the pipe number {i}" for i, word in enumerate(["water", "gate", "turbine"] * 10)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    result = run("tokenize", tmp_path / "corpus.jsonl", tmp_path / "out", "--field", "body", "--vocab-size", 300)
    assert result.exit_code == 0, result.output
    assert "30 documents" in result.output
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "out.tokenizer.json"))
    with_end = [tokenizer.decode(row.tolist()) for row in IndexedDataset(tmp_path / "out")]
    assert with_end == texts
    again = run(
        "tokenize",
        tmp_path / "corpus.jsonl",
        tmp_path / "two",
        "--field",
        "body",
        "--tokenizer",
        tmp_path / "out.tokenizer.json",
    )
    assert again.exit_code == 0
    assert (tmp_path / "two.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()


def test_tokenize_overwrites_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("water through the gate")
    arguments = ["tokenize", tmp_path / "corpus.txt", tmp_path / "out", "--vocab-size", 257]
    made = [tmp_path / f"out{suffix}" for suffix in (".bin", ".idx", ".tokenizer.json")]
    for one in made:
        one.write_bytes(b"dear")
        result = run(*arguments)
        assert result.exit_code == 2
        assert str(one) in result.output
        assert "--overwrite" in result.output
        assert one.read_bytes() == b"dear"
        one.unlink()
    assert run(*arguments).exit_code == 0
    before = [one.read_bytes() for one in made]
    assert run(*arguments).exit_code == 2
    assert run(*arguments, "--overwrite").exit_code == 0
    assert [one.read_bytes() for one in made] == before
    # A tokenizer that is given is read and not written.
    for one in made[:2]:
        one.unlink()
    assert run(*arguments[:3], "--tokenizer", made[2]).exit_code == 0


@pytest.mark.parametrize(("name", "option"), [("text", ""), ("body", " --field body")])
def test_analyze_says_that_text_must_become_tokens(tmp_path: Path, name: str, option: str) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text(json.dumps({name: "water"}) + "\n")
    result = run("analyze", file, tmp_path / "difficulty")
    assert result.exit_code == 2
    assert f"tokenize it first: penstock tokenize {file} PREFIX{option};" in result.output
    assert "--column" in result.output
    assert not (tmp_path / "difficulty").exists()


def test_tokenize_takes_several_files_and_another_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    arguments = ["tokenize", tmp_path / "b.jsonl", tmp_path / "a.txt", tmp_path / "out", "--workers", 1]
    result = run(*arguments, "--split", "line", "--vocab-size", 257, "--end-of-text", "")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}.bin: 3 documents, 11 tokens from 11 bytes" in result.output
    assert IndexedDataset(tmp_path / "out").lengths.tolist() == [5, 3, 3]
    again = run("tokenize", tmp_path / "a.txt", tmp_path / "a2", "-t", tmp_path / "out.tokenizer.json", "--workers", 0)
    assert again.exit_code == 2
    assert "at least one worker" in again.output


def test_tokenize_tells_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    display = _Display()  # of no terminal: plain lines, one at most every ten seconds
    display.update(TokenizeProgress("encoding", 100, 4000, 1000, 3000))
    display._began -= 20
    display._said -= 20
    display.update(TokenizeProgress("encoding", 200, 9000, 2000, 3000))
    display.update(TokenizeProgress("encoding", 201, 9001, 2001, 3000))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "going on after 100 documents, 4,000 tokens"
    # 5000 tokens and 1000 bytes in 20 seconds, and 1000 bytes to go
    assert said[1:] == ["encoding  200 documents  9,000 tokens  250 tokens/s  0:20 left"]


def test_tokenize_names_a_missing_field(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "x"}\n')
    result = run("tokenize", tmp_path / "corpus.jsonl", tmp_path / "out")
    assert result.exit_code == 2
    assert "corpus.jsonl" in result.output
    assert "--field" in result.output


def test_compress_and_back(tmp_path: Path) -> None:
    tensors = {"a": torch.linspace(-1, 1, 4096), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    shown = run("compress", tmp_path / "model.safetensors")
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in ("none", "fp16", "bf16", "onebit"))
    made = run("compress", tmp_path / "model.safetensors", "-a", "fp16", "-o", tmp_path / "small.safetensors")
    assert made.exit_code == 0, made.output
    back = run("compress", tmp_path / "small.safetensors", "--decompress", "-o", tmp_path / "back.safetensors")
    assert back.exit_code == 0, back.output
    restored = load_file(tmp_path / "back.safetensors")
    assert torch.equal(restored["a"], tensors["a"].half().float())
    assert torch.equal(restored["ids"], tensors["ids"])
    assert run("compress", tmp_path / "model.safetensors", "-a", "fp17").exit_code == 2


def test_train_hands_its_arguments_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def fake(config: object, overrides: object, output: object, *, resume: bool, overwrite: bool) -> int:
        seen.extend([config, overrides, output, resume, overwrite])
        return 7

    monkeypatch.setattr(main_job, "train", fake)
    result = run("train", "run.yaml", "--set", "train.steps=3", "--set", "seed=1", "-o", tmp_path, "--resume")
    assert result.exit_code == 7
    assert seen == [Path("run.yaml"), ["train.steps=3", "seed=1"], tmp_path, True, False]


def test_train_names_what_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {global_batch_size: 4, micro_batch_size: 3, steps: 1}\n")
    result = run("train", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert "global_batch_size=4 is not divisible by micro_batch_size=3" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000004"])
def test_eval_prints_the_evaluation_and_of_what(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    newest = run_directory / "checkpoints" / "step_00000004"

    def fake(run: Path, overrides: list[str]) -> HeldOut:
        assert (run, overrides) == (newest, ["data.heldout=x"])
        return HeldOut(nats_per_token=3.25, unigram_nats_per_token=6.5, tokens=12345, bits_per_byte=None)

    monkeypatch.setattr(main_job, "evaluate", fake)
    result = run("eval", run_directory / place, "--set", "data.heldout=x")
    assert result.output.splitlines() == [
        f"checkpoint              {newest}",
        "step                    4",
        "nats per token          3.2500",
        "unigram nats per token  6.5000",
        "tokens                  12,345",
    ]


def test_eval_names_the_checkpoints_that_there_are(run_directory: Path, tmp_path: Path) -> None:
    checkpoints = run_directory / "checkpoints"
    missing = run("eval", checkpoints / "step_00000009")
    assert missing.exit_code == 2
    assert f"in {checkpoints} there are step_00000002, step_00000004" in missing.output
    for step in (2, 4):
        (checkpoints / f"step_{step:08d}" / "manifest.json").unlink()
    broken = run("eval", run_directory)
    assert broken.exit_code == 2
    assert "step_00000002" in broken.output
    assert "step_00000004" in broken.output
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint (it holds none)" in run("eval", tmp_path / "empty").output
    assert "there is no such directory" in run("eval", tmp_path / "absent").output
