"""What a run shows while it runs: one live line on a terminal, plain lines elsewhere, nothing on other ranks."""

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from penstock.runtime.units import duration, percent, quantity

_WINDOW: Final = 20
"""Steps over which speed and bubble are averaged."""


class Step(Protocol):
    """What is shown of a finished step; :class:`penstock.runtime.engine.StepReport` is one."""

    @property
    def step(self) -> int:
        """The step, from 0."""

    @property
    def loss(self) -> float:
        """Mean loss of the global batch."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def tokens(self) -> int:
        """Tokens consumed after the step."""

    @property
    def kept_tokens(self) -> int | None:
        """Tokens that dropping layers kept per sequence; None without dropping."""

    @property
    def difficulty(self) -> Mapping[str, float]:
        """Curriculum difficulty by metric."""

    @property
    def seconds(self) -> float:
        """Wall-clock of the step."""

    @property
    def bubble_seconds(self) -> float:
        """Of these, waiting for neighbours in the pipeline."""


class Display:
    """Shows the progress of a run. Use as a context manager.

    On a terminal one line is kept up to date under whatever else is printed; elsewhere (a log file, a pipe) a line is
    printed every ``log_every`` steps and at the last one.

    Args:
        total_steps: Steps of the run.
        log_every: Steps between plain lines.
        enabled: False shows nothing; for all ranks but the first.
        console: Where to write; None is standard output.
    """

    def __init__(
        self, total_steps: int, *, log_every: int = 10, enabled: bool = True, console: Console | None = None
    ) -> None:
        if total_steps < 1 or log_every < 1:
            raise ValueError(f"need at least one step and log_every >= 1, got {total_steps} and {log_every}")
        self._total = total_steps
        self._log_every = log_every
        self._console = Console() if console is None else console
        self._enabled = enabled
        # The oldest entry is only the point from which the others' tokens and bytes are counted.
        self._recent: deque[tuple[Step, int]] = deque(maxlen=_WINDOW + 1)
        self._live: Progress | None = None
        if enabled and self._console.is_terminal:
            self._live = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console)
            self._task = self._live.add_task("starting", total=total_steps)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, report: Step, *, bytes_sent: int) -> None:
        """Show a finished step.

        Args:
            report: What the step did.
            bytes_sent: Bytes that this process has sent since the run began.
        """
        if not self._enabled:
            return
        self._recent.append((report, bytes_sent))
        done = report.step + 1
        if self._live is not None:
            self._live.update(self._task, completed=done, description=self._line())
        elif done % self._log_every == 0 or done == self._total:
            self.note(self._line())

    def note(self, text: str) -> None:
        """Print a line that stays: an evaluation, a checkpoint."""
        if self._enabled:
            # As it is: paths may hold brackets, and a log file's lines are not to be wrapped.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        reports = [report for report, _ in self._recent]
        (first, sent_before), (now, sent) = self._recent[0], self._recent[-1]
        counted = reports[1:]
        seconds = sum(report.seconds for report in counted)
        parts = [f"step {now.step + 1}/{self._total}", f"loss {now.loss:.4f}", f"lr {now.lr:.2e}"]
        if seconds > 0:
            parts.append(f"{quantity((now.tokens - first.tokens) / seconds)} tokens/s")
        parts += [f"{name} {value:g}" for name, value in now.difficulty.items()]
        if now.kept_tokens is not None:
            parts.append(f"kept {now.kept_tokens}")
        # Of the rank that prints; the closing summary is over all of them.
        if counted:
            parts.append(f"rank 0: sent {quantity((sent - sent_before) / len(counted), 'B')}/step")
        if seconds > 0:
            parts.append(f"bubble {percent(sum(report.bubble_seconds for report in counted) / seconds)}")
        left = self._total - now.step - 1
        parts.append(f"{duration(left * (seconds / len(counted) if counted else now.seconds))} left")
        return "  ".join(parts)
