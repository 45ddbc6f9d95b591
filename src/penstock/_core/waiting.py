"""No silent hang: every blocking wait has a deadline, and one rank's failure ends all of them with its message.

A :class:`Watcher` runs one thread per process. The main thread says what it is about to wait for::

    with watcher.waiting("RECV_F", stage=1, micro_batch=3, peer=0):
        work.wait()

The thread prints that sentence and leaves the process when the deadline passes, or when another rank has put its
failure into the rendezvous store. It leaves by ``os._exit``: gloo cannot be relied on to abort work in flight.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

EXIT_DEADLINE: Final = 75
"""Exit code of a process that waited longer than its deadline."""
EXIT_PEER: Final = 76
"""Exit code of a process that stopped because another rank failed."""

_FAILURE_KEY = "penstock/failure"
_GRACE_S = 2.0


class WaitError(RuntimeError):
    """A wait ended in an error instead of what was waited for; names rank, stage, micro-batch, action and peer."""


class Wait:
    """What a process is blocked on, for the length of a ``with`` block; made by :meth:`Watcher.waiting`."""

    __slots__ = ("_outer", "_watcher", "action", "deadline_s", "micro_batch", "peer", "rank", "since", "stage")

    def __init__(
        self,
        watcher: "Watcher",
        action: str,
        stage: int | None,
        micro_batch: int | None,
        peer: int | None,
        deadline_s: float,
    ) -> None:
        self.rank = watcher.rank
        self.action = action
        self.stage = stage
        self.micro_batch = micro_batch
        self.peer = peer
        self.deadline_s = deadline_s
        self.since = 0.0
        self._watcher = watcher
        self._outer: Wait | None = None

    def __enter__(self) -> None:
        watcher = self._watcher
        self.since = time.monotonic()
        self._outer = watcher._wait
        watcher._wait = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # torch.distributed reports lost peers and timeouts as RuntimeError.
            if isinstance(error, RuntimeError) and not isinstance(error, WaitError):
                cause = self._watcher._failure_of_a_peer(patience_s=_GRACE_S)
                detail = f"; the first failure was {cause}" if cause else ""
                raise WaitError(f"{self}: failed: {error}{detail}") from error
        finally:
            self._watcher._wait = self._outer

    def __str__(self) -> str:
        parts = [f"rank {self.rank}"]
        if self.stage is not None:
            parts.append(f"stage {self.stage}")
        parts.append(self.action)
        if self.micro_batch is not None:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.peer is not None:
            parts.append(f"peer rank {self.peer}")
        return ", ".join(parts)


class Watcher:
    """Watches over the waits of one process. Use as a context manager, or call :meth:`start` and :meth:`stop`.

    Args:
        rank: This process's rank.
        deadline_s: How long a wait may last, in seconds, unless the wait names its own limit.
        store: The rendezvous store through which ranks tell each other of failures; None for a single process.
        poll_s: How often the thread looks, in seconds.
        leave: Called with an exit code to end the process; tests replace it.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        deadline_s: float = 600.0,
        store: "Store | None" = None,
        poll_s: float = 0.25,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        if not deadline_s > 0:
            raise ValueError(f"the deadline of a wait must be positive, got deadline_s={deadline_s}")
        self.rank = rank
        self.deadline_s = deadline_s
        # A clone has a connection of its own: the thread must not queue behind the main thread's blocking calls.
        self._store = None if store is None else store.clone()  # type: ignore[attr-defined]
        self._report_store = None if store is None else store.clone()  # type: ignore[attr-defined]
        # Each rank's n-th watcher on a store talks to the others' n-th: a failure that an earlier engine got over in
        # this process does not end a later one.
        self._failure_key = f"{_FAILURE_KEY}/{0 if store is None else store.add(f'penstock/watchers/{rank}', 1)}"
        self._poll_s = poll_s
        self._leave = leave
        self._wait: Wait | None = None
        self._reported = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.report(error)
        self.stop()

    def start(self) -> Self:
        """Start the thread."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="penstock-watcher", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; the process is on its own again."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None

    def waiting(
        self,
        action: str,
        *,
        stage: int | None = None,
        micro_batch: int | None = None,
        peer: int | None = None,
        deadline_s: float | None = None,
    ) -> Wait:
        """Say what the ``with`` block waits for; a RuntimeError inside it is raised again as a :class:`WaitError`.

        Nested waits are watched one at a time, the innermost first.
        """
        return Wait(self, action, stage, micro_batch, peer, self.deadline_s if deadline_s is None else deadline_s)

    def report(self, error: BaseException) -> None:
        """Tell the other ranks of this rank's failure, so that they stop and print it. The first report counts."""
        if self._reported:
            return
        self._reported = True
        text = "".join(traceback.format_exception_only(error)).strip()
        self._publish(text)

    def _publish(self, text: str) -> None:
        if self._report_store is None:
            return
        record = json.dumps({"rank": self.rank, "error": text})
        try:
            self._report_store.compare_set(self._failure_key, "", record)
        except RuntimeError as lost:  # the store went with its host: the others see that for themselves
            print(f"penstock: rank {self.rank}: could not report to the store: {lost}", file=sys.stderr)

    def _failure_of_a_peer(self, *, patience_s: float = 0.0) -> str | None:
        """The first failure that another rank reported, or None; looks for at most ``patience_s`` seconds."""
        if self._report_store is None or self._reported:
            return None
        until = time.monotonic() + patience_s
        while True:
            text = self._read_failure(self._report_store)
            if text is not None or time.monotonic() >= until:
                return text
            time.sleep(0.05)

    def _read_failure(self, store: "Store") -> str | None:
        try:
            if not store.check([self._failure_key]):
                return None
            record = json.loads(store.get(self._failure_key))
        except RuntimeError as lost:
            return f"the rendezvous store is gone ({str(lost).splitlines()[0]})"
        if record["rank"] == self.rank:
            return None
        return f"rank {record['rank']}: {record['error']}"

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            wait = self._wait
            if wait is not None:
                waited = time.monotonic() - wait.since
                if waited > wait.deadline_s:
                    text = f"{wait}: still waiting after {waited:.1f} s (deadline {wait.deadline_s:g} s)"
                    self._publish(text)
                    self._end(text, EXIT_DEADLINE)
                    return
            if self._store is not None and not self._reported:
                failure = self._read_failure(self._store)
                if failure is not None:
                    # The main thread may be about to print the same with more detail: give it a moment.
                    if self._stop.wait(_GRACE_S):
                        return
                    context = f" while {wait}" if wait is not None else ""
                    # A rank that waits for nobody may be the one that the others waited for: say what it was doing.
                    busy = "" if wait is not None else f"\nIts main thread was here:\n{_main_thread()}"
                    self._end(f"rank {self.rank} stops{context}: {failure}{busy}", EXIT_PEER)
                    return

    def _end(self, text: str, code: int) -> None:
        print(f"penstock: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._leave(code)


def _main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "  (it has ended)"
