"""The README is true: its programs run, its commands parse, its imports and tests exist."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from penstock.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# What unpickles or evaluates, by module or by the name that is called. ``safetensors.torch.load`` reads no pickle.
UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = re.compile(
    r"torch\.load|(np|numpy)\.fromstring|read_pickle|(\w+\.)*(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?"
    r"|yaml\.(unsafe_|full_)load(_all)?|os\.system|os\.popen"
)


# At exit of a gloo program a thread of PyTorch 2.13 may still be letting go of the last collective, for which it needs
# the interpreter; one that finds the interpreter gone aborts the process ("terminate called without an active
# exception"), plain DDP programs too. What is tested is the example, so those threads are let through first.
LET_THREADS_END = "import atexit, time\natexit.register(time.sleep, 0.2)\n"


class Example(NamedTuple):
    """A program of the README, and how many processes it is for; 0 without a launcher."""

    name: str
    processes: int
    text: str


def examples() -> list[Example]:
    """Every Python block, each announced by ``<!-- example: NAME -->`` or ``<!-- example: NAME; torchrun N -->``."""
    announced = re.findall(
        r"<!-- example: (\w+)(?:; torchrun (\d+))? -->\n(?:<!-- --8<-- [^\n]*-->\n)?```python\n(.*?)```",
        README,
        re.DOTALL,
    )
    return [Example(name, int(processes or 0), text) for name, processes, text in announced]


def test_every_python_block_is_an_example_that_is_run() -> None:
    assert len(examples()) == README.count("```python") >= 7


@pytest.mark.timeout(90)
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_the_example_runs(example: Example, tmp_path: Path) -> None:
    file = tmp_path / f"{example.name}.py"
    file.write_text(example.text)
    (tmp_path / "sitecustomize.py").write_text(LET_THREADS_END)
    command = [sys.executable]
    if example.processes:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={example.processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
        assert f"# torchrun --nproc-per-node {example.processes} {file.name}" in example.text
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [*command, str(file)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=75)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's ranks too
        pytest.fail(f"the example did not end: {process.communicate()[0]}")
    assert process.returncode == 0, output
    assert output.strip(), "an example shows something"


def commands() -> list[str]:
    """The ``penstock ...`` commands of the table of verbs."""
    return re.findall(r"\| `(penstock [^`]+)` \|", README)


def test_the_table_of_verbs_is_complete() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {command.split()[1] for command in commands()} == verbs


@pytest.mark.parametrize("command", commands())
def test_the_command_parses(command: str) -> None:
    _, verb, *arguments = command.split()
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


def imports() -> Iterator[tuple[str, str]]:
    """Module and name of every ``from penstock... import ...`` in the tables."""
    for module, names in re.findall(r"`from (penstock[\w.]*) import ([\w, ]+)`", README):
        yield from ((module, name.strip()) for name in names.split(","))


@pytest.mark.parametrize(("module", "name"), sorted(set(imports())))
def test_the_import_exists(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name)


def test_the_tests_it_names_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README))
    assert len(named) >= 8
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"


def test_the_files_it_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def calls(tree: ast.AST) -> Iterator[tuple[int, str, ast.Call]]:
    """Line, dotted name and node of every call whose function is a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node.func), node


def offences(source: str) -> list[str]:
    """What in a source file unpickles, or evaluates text."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in UNPICKLING_MODULES]
    for line, name, call in calls(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        loads_array = name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False"
        # The one loader that is not PyYAML's own is a SafeLoader with one more number format.
        loads_yaml = name == "yaml.load" and keywords.get("Loader") not in ("yaml.SafeLoader", "_Loader")
        if name in ("eval", "exec") or loads_array or loads_yaml or UNPICKLING_CALLS.fullmatch(name):
            found.append(f"{line}: {name}(...)")
        if keywords.get("shell") == "True":
            found.append(f"{line}: {name}(shell=True)")
    return found


def test_nothing_stored_is_unpickled_and_no_text_is_evaluated() -> None:
    found = {path: offences(path.read_text()) for path in SOURCES}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x')",
        "import torch.distributed as dist\ndist.broadcast_object_list(x)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_an_offence_would_be_seen(source: str) -> None:
    assert offences(source)
