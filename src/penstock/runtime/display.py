"""What a run shows while it runs: one live line on a terminal, plain lines elsewhere, nothing on other ranks."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from penstock.runtime.units import duration, percent, quantity

_WINDOW: Final = 20
"""Steps over which speed and bubble are averaged."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished optimizer step; what is None is not shown.

    Attributes:
        step: Steps completed, this one included.
        loss: Mean loss of the global batch.
        tokens: Tokens read in this step, over all replicas.
        seconds: Wall-clock of this step.
        lr: Learning rate.
        difficulty: Current difficulty by metric.
        kept_tokens: Tokens that dropping layers keep, and tokens per sequence.
        bytes_sent: Bytes that the displaying process sent in this step.
        bubble_seconds: Seconds of this step spent waiting for activations or gradients.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    lr: float | None = None
    difficulty: Mapping[str, float] = field(default_factory=dict)
    kept_tokens: tuple[int, int] | None = None
    bytes_sent: int | None = None
    bubble_seconds: float | None = None


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
        self._recent: deque[StepReport] = deque(maxlen=_WINDOW)
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

    def step(self, report: StepReport) -> None:
        """Show a finished step."""
        if not self._enabled:
            return
        self._recent.append(report)
        if self._live is not None:
            self._live.update(self._task, completed=report.step, description=self._line())
        elif report.step % self._log_every == 0 or report.step == self._total:
            self.note(self._line())

    def note(self, text: str) -> None:
        """Print a line that stays: an evaluation, a checkpoint."""
        if self._enabled:
            # As it is: paths may hold brackets, and a log file's lines are not to be wrapped.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        now = self._recent[-1]
        seconds = sum(report.seconds for report in self._recent)
        parts = [f"step {now.step}/{self._total}", f"loss {now.loss:.4f}"]
        if seconds > 0:
            parts.append(f"{quantity(sum(report.tokens for report in self._recent) / seconds)} tokens/s")
        if now.lr is not None:
            parts.append(f"lr {now.lr:.2e}")
        parts += [f"{name} {value:g}" for name, value in now.difficulty.items()]
        if now.kept_tokens is not None:
            parts.append(f"kept {now.kept_tokens[0]}/{now.kept_tokens[1]}")
        if now.bytes_sent is not None:
            parts.append(f"sent {quantity(now.bytes_sent, 'B')}")
        if now.bubble_seconds is not None and seconds > 0:
            bubble = sum(report.bubble_seconds or 0.0 for report in self._recent)
            parts.append(f"bubble {percent(bubble / seconds)}")
        left = (self._total - now.step) * seconds / len(self._recent)
        parts.append(f"{duration(left)} left")
        return "  ".join(parts)
