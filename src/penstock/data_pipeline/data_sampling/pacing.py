"""A curriculum that waits for the validation loss: the next block enters when the loss has stopped improving.

The training set grows once the model has learnt what it can from what it has (Spitkovsky, Alshawi, Jurafsky, "From
baby steps to leapfrog", NAACL 2010; Cirik, Hovy, Morency, "Visualizing and understanding curriculum learning for long
short-term memory networks", 2016). When that was depends on the run, so births are a log, kept in the checkpoint. They
fall on multiples of ``every`` steps, and a report moves the *next* such multiple only: what a loader has prefetched by
less than that many steps stays true.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class PacingConfig(BaseModel):
    """When a paced curriculum grows.

    Attributes:
        every: Steps between the places at which the pool may grow; as often as the validation loss is measured.
        patience: How many reports in a row without improvement let the next block in.
        min_improvement: By what fraction of the best loss so far a loss has to be lower to count as improved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    every: int = Field(ge=1)
    patience: int = Field(default=1, ge=1)
    min_improvement: float = Field(default=0.01, ge=0, lt=1)


class Pacer:
    """Decides from validation losses when blocks enter, and remembers when they did.

    Args:
        config: The rule.
        blocks: How many blocks there are; the first is in from the start.

    Attributes:
        births: The step at which each block that is in, or about to be, enters.
    """

    def __init__(self, config: PacingConfig, blocks: int) -> None:
        self.config = config
        self.blocks = blocks
        self.births = [0]
        self._best: float | None = None
        self._waited = 0

    def report(self, step: int, loss: float) -> bool:
        """Take note of the validation loss after ``step`` steps.

        Returns:
            Whether another block will enter, at the next multiple of ``every`` steps.

        Raises:
            ValueError: The loss is not a finite number.
        """
        if loss - loss != 0.0:
            raise ValueError(f"step {step}: a curriculum cannot be paced by a validation loss of {loss}")
        margin = self.config.min_improvement
        if self._best is None or loss < self._best - margin * abs(self._best):
            self._best, self._waited = loss, 0
            return False
        self._waited += 1
        birth = (step // self.config.every + 1) * self.config.every
        if self._waited < self.config.patience or len(self.births) == self.blocks or birth <= self.births[-1]:
            return False
        self.births.append(birth)
        self._best, self._waited = None, 0  # harder samples move the loss: it is compared with itself from here on
        return True

    def state_dict(self) -> dict[str, Any]:
        """The log and what the next report is compared with, as plain values."""
        return {"births": list(self.births), "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: It is no log of such a curriculum.
        """
        births, best, waited = state.get("births"), state.get("best"), state.get("waited")
        well_formed = (
            isinstance(births, list)
            and 1 <= len(births) <= self.blocks
            and all(isinstance(birth, int) and birth % self.config.every == 0 for birth in births)
            and births[0] == 0
            and births == sorted(set(births))
            and isinstance(best, float | int | None)
            and isinstance(waited, int)
        )
        if not well_formed:
            raise ValueError(
                f"not a log of births on multiples of {self.config.every} steps for {self.blocks} blocks: {dict(state)}"
            )
        self.births, self._best, self._waited = list(births or []), best, int(waited or 0)
