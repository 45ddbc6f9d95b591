import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock._core.files import (
    CorruptFileError,
    atomic_file,
    read_json,
    read_manifest,
    write_bytes,
    write_json,
    write_manifest,
)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new, but the disk is full")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_files_written_by_threads_at_once_have_ordinary_permissions(tmp_path: Path) -> None:
    before, interval = os.umask(0o027), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: write_bytes(tmp_path / str(i), b""), range(1000)))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
        left = os.umask(0o027)
    finally:
        os.umask(before)
        sys.setswitchinterval(interval)
    assert left == 0o027


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def sealed(folder: Path) -> Path:
    write_bytes(folder / "w.bin", b"weights")
    write_manifest(folder, ["w.bin"], step=7)
    return folder


def test_a_manifest_lists_sizes_and_checksums(tmp_path: Path) -> None:
    manifest = read_manifest(sealed(tmp_path))
    assert manifest["step"] == 7
    assert manifest["files"] == {"w.bin": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "w.bin").unlink(), "listed in the manifest but missing"),
        (lambda f: (f / "w.bin").write_bytes(b"weight"), "6 bytes, but the manifest lists 7"),
        (lambda f: (f / "w.bin").write_bytes(b"weighty"), "SHA-256 differs"),
        (lambda f: (f / "manifest.json").unlink(), "the file is missing"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../x": {}}}'), "malformed entry"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"w.bin": 3}}'), "malformed entry"),
    ],
)
def test_every_harm_is_found(tmp_path: Path, harm: object, message: str) -> None:
    folder = sealed(tmp_path)
    harm(folder)  # type: ignore[operator]
    with pytest.raises(CorruptFileError, match=message):
        read_manifest(folder)
