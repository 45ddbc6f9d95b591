"""Processes for tests that need several ranks.

``WorkerPool`` keeps worker processes warm (importing torch takes seconds) and gives each job a fresh gloo group.
``run_fresh`` makes processes for one job and is for tests in which a process is to fail, be killed or leave by itself.

A job is a module-level function ``fn(rank, world_size, *args)`` of a test file; it is found again in the worker by
file and name, and its arguments and result must be picklable (plain values and CPU tensors).
"""

import atexit
import datetime
import importlib.util
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from support.nursery import PRELOADED, Birth, Nursery

_TESTS = Path(__file__).resolve().parents[1]
_modules: dict[str, ModuleType] = {}


class WorkerError(AssertionError):
    """One or more ranks raised or ran out of time; the message holds every rank's traceback in full."""


def _load(file: str, name: str) -> Callable[..., Any]:
    module = _modules.get(file)
    if module is None:
        spec = importlib.util.spec_from_file_location(f"worker_{Path(file).stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _modules[file] = module
    return getattr(module, name)


def _where(fn: Callable[..., Any]) -> tuple[str, str]:
    file = fn.__code__.co_filename
    if "<locals>" in fn.__qualname__ or fn.__qualname__ != fn.__name__:
        raise ValueError(f"{fn.__qualname__} must be a module-level function to run in a worker")
    return file, fn.__name__


def _join(port: int, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=datetime.timedelta(seconds=timeout_s))
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return store


def _worker(connection: Connection) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(_TESTS))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        file, name, rank, world_size, port, timeout_s, args, kwargs = job
        try:
            _join(port, rank, world_size, timeout_s)
            dist.barrier()  # a job that communicates nothing may end before another rank is through connecting
            try:
                result = _load(file, name)(rank, world_size, *args, **kwargs)
            finally:
                dist.destroy_process_group()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


@dataclass
class _Member:
    process: mp.process.BaseProcess
    connection: Connection


class WorkerPool:
    """Warm gloo workers, started when first needed."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._members: list[_Member] = []

    def run(
        self, fn: Callable[..., Any], world_size: int, *args: Any, deadline_s: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Run ``fn(rank, world_size, *args, **kwargs)`` on every rank; returns the results in rank order."""
        file, name = _where(fn)
        while len(self._members) < world_size:
            self._members.append(self._start())
        members = self._members[:world_size]
        # The store lives here, so that it outlives any worker.
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        for rank, member in enumerate(members):
            member.connection.send((file, name, rank, world_size, store.port, deadline_s, args, kwargs))
        answers: dict[int, tuple[bool, Any]] = {}
        until = time.monotonic() + deadline_s
        failed_at: float | None = None
        while len(answers) < world_size:
            limit = until if failed_at is None else min(until, failed_at + 5.0)
            pending = {members[r].connection: r for r in range(world_size) if r not in answers}
            ready = wait(list(pending), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = pending[connection]  # type: ignore[index]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    members[rank].process.join()
                    answers[rank] = (
                        False,
                        f"the process ended with exit code {members[rank].process.exitcode}",
                    )
                if not answers[rank][0] and failed_at is None:
                    failed_at = time.monotonic()
        if len(answers) == world_size and all(ok for ok, _ in answers.values()):
            return [answers[rank][1] for rank in range(world_size)]
        self.close()  # a failed job may leave work in flight: start afresh
        lines = []
        for rank in range(world_size):
            ok, value = answers.get(rank, (False, f"no answer within {deadline_s:g} s"))
            lines.append(f"--- rank {rank}: {'finished' if ok else value}")
        raise WorkerError(f"{name} failed on {world_size} ranks\n" + "\n".join(lines))

    def _start(self) -> _Member:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Member(process, ours)

    def close(self) -> None:
        """End every worker."""
        for member in self._members:
            member.process.kill()
            member.process.join()
            member.connection.close()
        self._members.clear()


@dataclass(frozen=True)
class Ended:
    """How a fresh process ended: ``seconds`` after the start, at the time ``at`` (of ``time.time``)."""

    rank: int
    code: int
    stdout: str
    stderr: str
    seconds: float
    at: float


_NO_PORT = "none"


def fresh_main(argv: Sequence[str]) -> None:
    """What a fresh process does: the job that its arguments name."""
    file, name, rank, world_size, port, timeout_s, args_file = argv
    torch.set_num_threads(1)
    if port != _NO_PORT:
        _join(int(port), int(rank), int(world_size), float(timeout_s))
    args, kwargs = torch.load(args_file, weights_only=False)
    _load(file, name)(int(rank), int(world_size), *args, **kwargs)
    if port != _NO_PORT:
        dist.destroy_process_group()


@cache
def _nursery() -> Nursery:
    nursery = Nursery("support.pool", fresh_main.__name__)
    atexit.register(nursery.close)
    return nursery


def run_fresh(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 60.0,
    kill: dict[int, float | Callable[[], bool]] | None = None,
    env: dict[str, str] | None = None,
    launched: bool = False,
    **kwargs: Any,
) -> list[Ended]:
    """Run ``fn`` in fresh processes and wait for all to end.

    Args:
        fn: As for :meth:`WorkerPool.run`.
        world_size: How many ranks.
        args: Arguments for ``fn``.
        deadline_s: A process still alive after this many seconds fails the test (and is killed).
        kill: ``{rank: when}`` sends SIGKILL to a rank, so many seconds after the start or once ``when()`` is true.
        env: Extra environment variables.
        launched: Give the processes a launcher's environment variables (as ``torchrun`` does, which keeps the store)
            in place of a process group.
        kwargs: Keyword arguments for ``fn``.
    """
    file, name = _where(fn)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launched:
        environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= env or {}
    with tempfile.TemporaryDirectory() as folder:
        args_file = Path(folder) / "args.pt"
        torch.save((args, kwargs), args_file)
        nursery = _nursery()
        start, began = time.monotonic(), time.time()
        logs = [(Path(folder) / f"out{rank}", Path(folder) / f"err{rank}") for rank in range(world_size)]
        job = (str(world_size), _NO_PORT if launched else str(store.port), str(deadline_s), str(args_file))
        processes = [
            nursery.fork(
                Birth(
                    argv=(file, name, str(rank), *job),
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else environment,
                    stdout=str(out),
                    stderr=str(err),
                )
            )
            for rank, (out, err) in enumerate(logs)
        ]
        ended: dict[int, tuple[int, float]] = {}
        to_kill = dict(kill or {})
        hung: list[int] = []
        while len(ended) < world_size:
            now = time.monotonic() - start
            for rank, process in enumerate(processes):
                when = to_kill.get(rank)
                if when is not None and (when() if callable(when) else now >= when):
                    del to_kill[rank]
                    nursery.kill(process, signal.SIGKILL)
                code = nursery.poll(process)
                if rank not in ended and code is not None:
                    ended[rank] = code, now
                elif rank not in ended and rank not in hung and now > deadline_s:
                    hung.append(rank)
                    nursery.kill(process, signal.SIGKILL)
            time.sleep(0.005)
        results = [
            Ended(rank, code, *(log.read_text() for log in logs[rank]), seconds, began + seconds)
            for rank, (code, seconds) in sorted(ended.items())
        ]
    if hung:
        text = "\n".join(f"--- rank {r.rank} ({r.code})\n{r.stdout}{r.stderr}" for r in results)
        raise WorkerError(f"{name}: ranks {hung} were still alive after {deadline_s:g} s\n{text}")
    return results
