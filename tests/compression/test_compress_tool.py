import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

import penstock.compression
from penstock.cli.main import app
from penstock.compression import create_compression_algorithm, tool
from penstock.compression.archive import read_compressed, write_compressed
from penstock.compression.tensor_file import TensorFile, TensorFileWriter
from penstock.compression.tool import app_function, main, measure, parse_option


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(300, 70, generator=generator),
        "odd/name: é": torch.randn(13, generator=generator).bfloat16(),
        "ids": torch.arange(10),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(100, generator=generator, dtype=torch.float64),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["none", "fp16", "bf16", "onebit"])
def test_to_a_file_and_back(model_file: Path, tmp_path: Path, name: str) -> None:
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    assert main([str(model_file), "--algorithm", name, "--output", str(packed)]) == 0
    assert main([str(packed), "--decompress", "--output", str(back)]) == 0
    before, after = load_file(model_file), load_file(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert after[key].shape == tensor.shape
        if name == "none" or not tensor.is_floating_point():
            assert torch.equal(after[key], tensor)
        else:
            tolerance = {"fp16": 1e-3, "bf16": 1e-2, "onebit": 0.65}[name]
            assert (after[key].double() - tensor.double()).norm() <= tolerance * tensor.double().norm()
    assert read_compressed(packed)[1] == {"format": "pt"}
    if name == "onebit":
        assert packed.stat().st_size < model_file.stat().st_size / 10


@pytest.mark.parametrize(
    ("name", "kept"), [("fp16", {"large", "mask"}), ("bf16", {"mask"}), ("onebit", {"mask", "lost"})]
)
def test_a_value_that_would_spoil_its_tensor_keeps_it_as_it_is(tmp_path: Path, name: str, kept: set[str]) -> None:
    tensors = {
        "large": torch.tensor([1e6, 1.0]),
        "mask": torch.tensor([0.0, -torch.inf]),
        "lost": torch.tensor([torch.nan, 1.0]),
        "plain": torch.tensor([0.3, -0.7]),
    }
    packed = tmp_path / "packed.safetensors"
    write_compressed(packed, tensors, create_compression_algorithm(name))
    after, _ = read_compressed(packed)
    for key in kept:
        torch.testing.assert_close(after[key], tensors[key], rtol=0, atol=0, equal_nan=True)
    assert all(tensor.isfinite().tolist() == tensors[key].isfinite().tolist() for key, tensor in after.items())
    assert not torch.equal(after["plain"], tensors["plain"])


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [1 << 62, 1 << 62, 0], [0, 1 << 70]])
def test_an_impossible_shape_is_damage(tmp_path: Path, shape: list[int]) -> None:
    packed, other = tmp_path / "packed.safetensors", tmp_path / "other.safetensors"
    write_compressed(packed, {"empty": torch.zeros(0, 3)}, create_compression_algorithm("onebit"))
    entry = {"name": "empty", "shape": shape, "dtype": "float32", "compressed": True}
    rewrite_header(packed, other, tensors=[entry])
    with pytest.raises(ValueError, match="'empty' has the impossible shape"):
        read_compressed(other)


@pytest.mark.parametrize("name", ["none", "bf16"])
def test_shared_and_transposed_tensors_are_written_whole(tmp_path: Path, name: str) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    tensors = {"tied": weight, "head": weight, "turned": weight.t(), "ids": torch.arange(6).view(2, 3).t()}
    write_compressed(tmp_path / "packed", tensors, create_compression_algorithm(name))
    after, _ = read_compressed(tmp_path / "packed")
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())


def test_options_travel_with_the_file(model_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    options = ["--option", "block_size=8", "--option", "scale=rms"]
    assert main([str(model_file), "--algorithm", "onebit", *options, "--output", str(packed)]) == 0
    after, _ = read_compressed(packed)
    block = load_file(model_file)["weight"].view(-1)[:8]
    torch.testing.assert_close(after["weight"].view(-1)[:8], block.sign() * block.square().mean().sqrt())


def test_the_table_has_a_line_for_each_algorithm(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app_function(model_file, console=Console(width=120)) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors: 5 floating tensors of 7" in shown
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert {"none", "fp16", "bf16", "onebit"} <= lines.keys()
    assert "ms back" in shown


def test_measurements_follow_the_formulas() -> None:
    tensors = [torch.tensor([3.0, 1.0, -2.0, -2.0]), torch.tensor([5.0]), torch.arange(3)]
    algorithm = create_compression_algorithm("onebit")
    apart = measure(tensors, algorithm, fused=False)
    assert apart.bytes_in == 20
    assert apart.bytes_out == 2 * 16
    assert apart.relative_error == pytest.approx((2 / 43) ** 0.5)
    assert apart.ratio == pytest.approx(20 / 32)
    together = measure(tensors, algorithm)
    assert together.bytes_out == 16
    mean = 13 / 5
    errors = [3 - mean, 1 - mean, -2 + mean, -2 + mean, 5 - mean]
    assert together.relative_error == pytest.approx((sum(e * e for e in errors) / 43) ** 0.5)
    assert measure([], algorithm).ratio == 1.0
    assert measure([torch.zeros(8)], algorithm).relative_error == 0.0


def test_a_fused_measurement_does_not_depend_on_the_size_of_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = [(7,), (0, 3), (40, 5), (), (130,), (8, 16)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    algorithm = create_compression_algorithm("onebit", {"block_size": 16})
    whole = measure(tensors, algorithm)
    assert whole.bytes_in == 8 * 466
    for elements in (16, 64, 464, 466):
        monkeypatch.setattr(tool, "_FUSED_ELEMENTS", elements)
        cut = measure(tensors, algorithm)
        assert cut.relative_error == pytest.approx(whole.relative_error, rel=1e-6)
        assert cut.bytes_out == sum(algorithm.bytes_for(min(elements, 466 - k)) for k in range(0, 466, elements))


def test_options_are_numbers_where_they_can_be() -> None:
    assert parse_option("block_size=64") == ("block_size", 64)
    assert parse_option("x=0.5") == ("x", 0.5)
    assert parse_option("scale=l1") == ("scale", "l1")
    assert parse_option("stochastic=true") == ("stochastic", True)
    assert parse_option("stochastic=False") == ("stochastic", False)


def test_nothing_is_lost_by_writing(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model_file.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(model_file)
    for itself in (model_file, link, tmp_path / "." / model_file.name):
        assert main([str(model_file), "-a", "onebit", "-o", str(itself), "--overwrite"]) == 2
        assert "the output is the input itself" in capsys.readouterr().err
    other = tmp_path / "other"
    other.write_bytes(b"dear")
    assert main([str(model_file), "-a", "onebit", "-o", str(other)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(model_file), "-a", "onebit", "-o", str(tmp_path), "--overwrite"]) == 2
    assert "not a file that can be replaced" in capsys.readouterr().err
    assert (model_file.read_bytes(), other.read_bytes()) == (before, b"dear")
    assert main([str(model_file), "-a", "onebit", "-o", str(other), "--overwrite"]) == 0
    assert f"{other.stat().st_size:,} bytes, from {len(before):,}" in " ".join(capsys.readouterr().out.split())
    for arguments in (["--decompress", "-o", str(model_file)], ["--decompress", "-o", str(other), "--overwrite"]):
        packed = other.read_bytes()
        assert main([str(other), *arguments]) == 2
        assert (model_file.read_bytes(), other.read_bytes()) == (before, packed)
    assert main([str(other), "--decompress", "-o", str(model_file), "--overwrite"]) == 0
    assert load_file(model_file)["ids"].tolist() == list(range(10))


@pytest.mark.parametrize("name", ["none", "onebit"])
def test_a_compressed_file_is_not_compressed_again(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    packed = tmp_path / "packed.safetensors"
    assert main([str(model_file), "-a", name, "-o", str(packed)]) == 0
    for arguments in ([], ["-a", "bf16", "-o", str(tmp_path / "twice")]):
        assert main([str(packed), *arguments]) == 2
        message = capsys.readouterr().err
        assert f"already compressed, with {name}; turn it back first" in message
        assert "--decompress" in message
    rewrite_header(packed, packed, version="?")
    assert main([str(packed)]) == 2
    assert "already compressed, with an unknown algorithm" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_both_programs_have_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    verb = typer.main.get_command(app).commands["compress"]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", capsys.readouterr().out.partition("options:")[2]))
    assert shown - {"-h", "--help"} >= {name for option in verb.params[1:] for name in option.opts}


def rewrite_header(source: Path, target: Path, **changes: object) -> None:
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["penstock.compression"])
    save_file(load_file(source), target, metadata={"penstock.compression": json.dumps({**header, **changes})})


def test_broken_and_foreign_files_are_named(model_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    write_compressed(packed, load_file(model_file), create_compression_algorithm("onebit"))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"torn.safetensors: not a whole safetensors file"):
        read_compressed(torn)
    with pytest.raises(ValueError, match=r"absent.safetensors: no such file"):
        read_compressed(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: .* not one written by"):
        read_compressed(model_file)
    other = tmp_path / "other.safetensors"
    entry = {"name": "weight", "shape": [1 << 40], "dtype": "float32", "compressed": True}
    for changes, message in [
        ({"version": 2}, "format version 2"),
        ({"algorithm": "zip"}, "unknown compression algorithm 'zip'"),
        ({"tensors": [entry]}, "scales of tensor 'weight' do not fit shape"),  # and no terabytes are allocated
        ({"tensors": [{**entry, "dtype": "object"}]}, "unknown dtype 'object'"),
        ({"tensors": [{**entry, "compressed": False}]}, "'weight' is missing or not of shape"),
        ({"tensors": [{**entry, "name": "empty", "shape": [0, 1 << 62, 1 << 62]}] * 6}, "names a tensor twice"),
        ({"tensors": [{"name": 3}]}, "description of the compressed tensors is damaged"),
        ({"tensors": [{**entry, "shape": [-1]}]}, "description of the compressed tensors is damaged"),
        ({"options": {"block_size": 7}}, "multiple of 8"),
    ]:
        rewrite_header(packed, other, **changes)
        with pytest.raises(ValueError, match=message):
            read_compressed(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "onebt"], "did you mean 'onebit'"),
        (["--output", "x"], "--output needs exactly one --algorithm, got 0"),
        (["--option", "block_size=8"], "--option needs exactly one --algorithm, got 0"),
        (["--algorithm", "onebit", "--option", "block_size"], "an option is NAME=VALUE"),
        (["--algorithm", "onebit", "--option", "block_size=many"], "positive multiple of 8"),
        (["--algorithm", "onebit", "--option", "block_size=1e3"], "positive multiple of 8"),
        (["--algorithm", "onebit", "--output", "/dev/null/x"], "/dev/null"),
        (["--decompress"], "give --output FILE"),
        (["--decompress", "--output", "x", "--algorithm", "none"], "leave out --algorithm"),
    ],
)
def test_wrong_arguments_end_with_a_remedy(
    model_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(model_file), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_the_module_runs_as_a_program(model_file: Path) -> None:
    assert penstock.compression.main is main
    command = [sys.executable, "-W", "error", "-m", "penstock.compression", str(model_file), "--algorithm", "onebit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "onebit" in done.stdout
    assert done.stderr == ""


def test_the_table_says_how_much_arrives_and_the_picture_is_drawn(tmp_path: Path, model_file: Path) -> None:
    picture = tmp_path / "algorithms.svg"
    output = io.StringIO()
    console = Console(width=200, file=output)
    assert app_function(model_file, algorithms=["topk", "onebit", "powersgd"], picture=picture, console=console) == 0
    text = output.getvalue()
    assert "arrives" in text
    assert "at least" in text
    assert "0.016" in text  # topk: 64 of 4096, whatever the values
    assert "algorithms.svg: error against ratio" in text
    assert "onebit" in picture.read_text()
    with pytest.raises(ValueError, match="there is such a file already"):
        app_function(model_file, picture=picture, console=console)
    with pytest.raises(ValueError, match="leave out --algorithm, --option and --plot"):
        app_function(model_file, decompress=True, output=tmp_path / "x", picture=picture, console=console)


def test_what_could_not_be_drawn_is_refused_before_anything_is_measured(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=r"x\.foo: a picture is a \.png, \.svg or \.pdf"):
        app_function(model_file, picture=tmp_path / "x.foo")
    monkeypatch.setattr(tool, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="a picture needs matplotlib"):
        app_function(model_file, picture=tmp_path / "x.svg")


def test_directories_are_made_where_there_are_none(tmp_path: Path, model_file: Path) -> None:
    output, picture = tmp_path / "new" / "small.safetensors", tmp_path / "drawn" / "x.svg"
    assert app_function(model_file, algorithms=["int8"], output=output, picture=picture) == 0
    assert read_compressed(output)[1] == {"format": "pt"}
    assert "int8" in picture.read_text()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", penstock.compression.known_algorithms())
def test_short_floats_come_back_by_every_algorithm(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "packed.safetensors"
    algorithm = create_compression_algorithm(name)
    write_compressed(path, {"x": x.to(dtype)}, algorithm)
    # What a receiver of the same numbers in float32 sees, as near as the dtype comes.
    whole = torch.empty_like(x)
    algorithm.decompress(algorithm.compress(x.to(dtype).float()), whole)
    found = read_compressed(path)[0]["x"]
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps * 2
    torch.testing.assert_close(found.float(), whole, rtol=step, atol=step * float(x.abs().max()))


def test_what_is_not_finite_and_what_is_not_floating_is_said(tmp_path: Path) -> None:
    file, output = tmp_path / "x.safetensors", io.StringIO()
    save_file({"fine": torch.ones(8), "spoilt": torch.tensor([1.0, float("nan")]), "ids": torch.arange(3)}, file)
    assert app_function(file, algorithms=["onebit"], console=Console(width=200, file=output)) == 0
    assert "such a tensor is written as it is: spoilt\n" in output.getvalue()
    save_file({"ids": torch.arange(3)}, file)
    with pytest.raises(ValueError, match="none of its 1 tensors is floating, so there is nothing to compress"):
        app_function(file)


def test_shapes_are_read_without_the_tensors(model_file: Path) -> None:
    tensors = load_file(model_file)
    expected = sorted(tuple(x.shape) for x in tensors.values() if x.is_floating_point())
    assert sorted(TensorFile(model_file).floating_shapes()) == expected


def test_contraction_is_what_is_left_of_the_energy() -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    powersgd = create_compression_algorithm("powersgd", {"rank": 40})
    found = measure([x, torch.arange(3)], powersgd)  # a matrix stays a matrix; no rank below 22 would be smaller
    assert (found.relative_error, found.contraction, found.ratio) == (0.0, 1.0, 1.0)
    onebit = measure([x], create_compression_algorithm("onebit"))
    left = 1 - sum(float(part.abs().sum()) ** 2 / part.numel() for part in x.view(-1).split(1024)) / float(
        (x * x).sum()
    )
    assert onebit.contraction == pytest.approx(1 - left, rel=1e-4)
    assert onebit.guarantee == pytest.approx(1 / 1024, rel=1e-4)
    assert measure([x], create_compression_algorithm("fp16")).guarantee is None


def test_a_file_written_tensor_by_tensor_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "strided": torch.randn(6, 4).t(),
        "half": torch.randn(3).bfloat16(),
        "one": torch.tensor(3),
    }
    path = tmp_path / "all.safetensors"
    with TensorFileWriter(path) as writer:
        writer.metadata["made"] = "here"
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        with pytest.raises(ValueError, match="'odd' was written already"):
            writer.add("odd", torch.zeros(1))
        with pytest.raises(ValueError, match="complex128, which a safetensors file cannot hold"):
            writer.add("complex", torch.zeros(1, dtype=torch.complex128))
    assert writer.nbytes == path.stat().st_size
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    mine = TensorFile(path)
    assert dict(mine.metadata) == {"made": "here"}
    assert len(mine) == 7
    with pytest.raises(KeyError):
        mine["absent"]
    unfinished = TensorFileWriter(tmp_path / "half.safetensors")
    unfinished.add("a", torch.zeros(1))
    unfinished.__exit__(RuntimeError, RuntimeError(), None)  # as when the block fails
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"]
