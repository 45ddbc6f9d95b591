"""SIGTERM as a request: the step under way is finished and saved before the process ends.

Schedulers (SLURM, Kubernetes, torchrun) send SIGTERM some seconds before they kill. Not every rank hears it at the same
step, and not every rank need hear it: each adds what it heard to the sum that every step makes anyway, so all learn at
the same step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""What a process that ended so returns, as shells report a signal."""


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        heard: SIGTERM came.
    """

    def __init__(self) -> None:
        self.heard = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request while the block runs; a second one ends the process as it would have before.

        Python tells signals to the main thread alone: in others the block runs as it is.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            self.heard = True
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
