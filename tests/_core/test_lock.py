"""Locks between processes."""

import os
import signal
import threading
from pathlib import Path

import pytest

from penstock._core.lock import locked


def test_the_holder_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "below" / "x.lock"
    with locked(path, "is writing x"):
        with (
            pytest.raises(TimeoutError, match=rf"x.lock: process {os.getpid()} on .* is writing x;"),
            locked(path, "y"),
        ):
            pass
        assert path.is_file()  # who came too late has not removed it
    assert list(path.parent.iterdir()) == []


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "x.lock", ""):
            os.write(writing, b"held")
            signal.pause()
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(TimeoutError, match=rf"process {child} on "), locked(tmp_path / "x.lock", ""):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with locked(tmp_path / "x.lock", ""):
        pass


def test_those_who_wait_get_it_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock._core.lock._POLL_S", 0.001)
    inside: list[int] = []
    most = []

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "x.lock", "", wait_s=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 60
