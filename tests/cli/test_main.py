import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from penstock import __version__
from penstock.cli.main import app

VERBS = ("train", "eval", "inspect", "tokenize", "analyze", "schedule", "compress")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"penstock {__version__}\n")


def test_help_names_every_verb() -> None:
    output = run("--help").output
    assert all(f"  {verb} " in output for verb in VERBS)
    assert "Example: penstock train" in output


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_has_an_example_of_it(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert f"    penstock {verb} " in result.output or f"    penstock {verb}\n" in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_parse(verb: str) -> None:
    """Every example line of a verb is taken by its own parser."""
    group = typer.main.get_command(app)
    command = group.commands[verb]  # type: ignore[attr-defined]
    lines = [line.strip() for line in command.help.splitlines()]
    examples = [line for line in lines if line.startswith(f"penstock {verb}")]
    assert examples
    for example in examples:
        words = example.partition(" > ")[0].split()[2:]
        command.make_context(verb, words)


def test_an_unknown_verb_is_refused() -> None:
    result = run("trian")
    assert result.exit_code == 2
    assert "trian" in result.output


@pytest.mark.parametrize("arguments", [("schedule", "1f1", "-p", "4", "-m", "8"), ("inspect", "/nowhere/at/all")])
def test_a_mistake_is_one_line_and_exit_code_2(arguments: Sequence[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output


def test_debug_raises_the_error_itself_here_and_in_launched_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_DEBUG", "0")
    mistake = ("schedule", "1f1", "-p", "4", "-m", "8")
    assert isinstance(run(*mistake).exception, SystemExit)
    assert isinstance(run("--debug", *mistake).exception, ValueError)
    assert isinstance(run(*mistake).exception, ValueError)  # as a child sees it: by the environment


def test_a_system_error_without_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.runtime import inspection

    def lose(path: object, **options: object) -> None:
        raise ConnectionResetError("peer")

    monkeypatch.setattr(inspection, "inspect_path", lose)
    assert isinstance(run("inspect", "x").exception, ConnectionResetError)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.runtime import inspection

    def missing(path: Path, **options: object) -> None:
        path.read_bytes()

    monkeypatch.setattr(inspection, "inspect_path", missing)
    result = run("inspect", "/nowhere/x")
    assert (result.exit_code, result.output) == (2, "error: /nowhere/x: No such file or directory\n")


def test_notes_say_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.runtime import inspection

    def fail(path: object, **options: object) -> None:
        error = ValueError("the loss is a vector")
        error.add_note("rank 1, stage 1")
        raise error

    monkeypatch.setattr(inspection, "inspect_path", fail)
    assert run("inspect", "x").output == "error: the loss is a vector\n  rank 1, stage 1\n"


def test_the_command_line_starts_without_torch() -> None:
    """``penstock --help`` must be quick: no verb imports what it works with before it runs."""
    code = (
        "import sys; import penstock.cli.main; "
        "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'pyarrow', 'tokenizers', 'yaml') if m in sys.modules]; "
        "print(heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout == "[]\n"


def test_as_a_module() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "penstock", "schedule", "nope", "-p", "1", "-m", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert out.returncode == 2
    assert "error: unknown schedule 'nope'" in out.stderr
    assert "Traceback" not in out.stderr
