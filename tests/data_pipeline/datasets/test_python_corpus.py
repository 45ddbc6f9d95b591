"""The corpus that every machine has."""

import ast
from pathlib import Path

import pytest

from penstock.data_pipeline.datasets import read_sources, standard_library_files


def test_the_running_interpreter_has_a_corpus() -> None:
    files = standard_library_files()
    names = [file.name for file in files]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py", "dataclasses.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "__pycache__"} & set(name.split("/"))]
    total = sum(file.size for file in files)
    assert 4e6 < total < 16e6
    assert 0.02 < sum(file.heldout for file in files) / len(files) < 0.09
    assert standard_library_files() == files


def test_the_text_is_the_program() -> None:
    files = [file for file in standard_library_files() if file.name in ("argparse.py", "json/decoder.py")]
    for name, text in read_sources(files):
        assert "\r" not in text
        assert [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)], name


def _tree(root: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("#" * size)


def test_a_file_stays_on_its_side_whatever_else_there_is(tmp_path: Path) -> None:
    _tree(tmp_path / "few", {f"f{i}.py": 10 for i in range(40)})
    _tree(tmp_path / "many", {f"f{i}.py": 10 + i for i in range(80)} | {"pkg/f1.py": 3})
    few = {file.name: file.heldout for file in standard_library_files(tmp_path / "few", heldout_fraction=0.3)}
    many = {file.name: file.heldout for file in standard_library_files(tmp_path / "many", heldout_fraction=0.3)}
    assert set(few.values()) == {True, False}
    assert all(many[name] == side for name, side in few.items())
    none = standard_library_files(tmp_path / "few", heldout_fraction=0.0)
    assert not any(file.heldout for file in none)


def test_the_cap_holds_and_a_smaller_cap_only_takes_away(tmp_path: Path) -> None:
    _tree(tmp_path, {f"f{i:02}.py": 100 for i in range(50)})
    large = {file.name for file in standard_library_files(tmp_path, max_bytes=3000)}
    small = {file.name for file in standard_library_files(tmp_path, max_bytes=1050)}
    assert (len(large), len(small)) == (30, 10)
    assert small < large
    assert small != {f"f{i:02}.py" for i in range(10)}  # a sample, not the head of the alphabet


def test_odd_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "b.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\xe9\n".encode("latin-1"))
    (tmp_path / "c.py").write_bytes(b"\xff\xfe bad bytes")
    (tmp_path / "d.py").write_bytes(b"# coding: no-such-encoding\n")
    (tmp_path / "e.py").write_bytes(b"  \n\n")
    (tmp_path / "f.py").write_bytes(b"")
    (tmp_path / "g.py").symlink_to(tmp_path / "missing.py")
    (tmp_path / "h.py").mkdir()
    (tmp_path / "_sysconfigdata_x.py").write_text("secret = 1")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("x = 2")
    texts = dict(read_sources(standard_library_files(tmp_path)))
    assert texts == {"a.py": "x = 1\n", "b.py": "# -*- coding: latin-1 -*-\n# café\n"}


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python source"):
        standard_library_files(tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(ValueError, match="heldout_fraction"):
        standard_library_files(tmp_path, heldout_fraction=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        standard_library_files(tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match=r"smallest source file .5 bytes"):
        standard_library_files(tmp_path, max_bytes=4)
