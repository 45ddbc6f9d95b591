"""How many tokens the dropping layers keep at each step, and how many layer-tokens that comes to."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from penstock.data_pipeline.random_ltd.config import KeepSchedule, RandomLTDConfig, read_config
from penstock.data_pipeline.random_ltd.layer import RandomLayerTokenDrop


def kept_length(schedule: KeepSchedule, step: int) -> int:
    """The kept length at a step: linear from the minimum to the maximum, rounded down to a multiple.

    DeepSpeed's formula in whole numbers, with two repairs: rounding never goes below the minimum, and the maximum is
    reached at ``require_steps`` even when it is not a multiple of ``seq_per_step``.
    """
    low, high, pace = schedule.min_value, schedule.max_value, schedule.schedule_config
    if step >= pace.require_steps:
        return high
    grown = low + max(step, 0) * (high - low) // pace.require_steps
    return max(low, grown - grown % pace.seq_per_step)


class RandomLTDScheduler:
    """Sets the kept length of the attached layers as training goes on.

    The kept length is a function of the step alone: a resumed run calls :meth:`update_seq` with its step and needs no
    history. The count of layer-tokens is history, and is in :meth:`state_dict`.

    Args:
        config: DeepSpeed's ``random_ltd`` section, or a :class:`RandomLTDConfig`.

    Attributes:
        config: The checked section.
        model_layer_num: Layers that could drop.
        random_ltd_layer_num: Layers that do.
        consumed_layer_tokens: Tokens computed so far, summed over samples and layers: ``global_batch_size`` times, at
            each step, the kept length of each dropping layer and ``max_value`` of each other one.
    """

    def __init__(self, config: RandomLTDConfig | Mapping[str, Any]) -> None:
        self.config = read_config(config)
        self.model_layer_num = self.config.total_layer_num
        self.random_ltd_layer_num = self.config.random_ltd_layer_num
        self._layers: list[RandomLayerTokenDrop] = []
        self._current = self.seq_at(0)
        self._step = -1
        self.consumed_layer_tokens = 0

    def attach(self, module: nn.Module) -> int:
        """Take charge of a :class:`RandomLayerTokenDrop`, or of all those inside a module.

        Returns:
            How many layers were attached that were not before.

        Raises:
            ValueError: There is none.
        """
        found = [layer for layer in module.modules() if isinstance(layer, RandomLayerTokenDrop)]
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no layer that drops tokens; run convert_to_random_ltd on it first"
            )
        new = [layer for layer in found if not any(layer is known for known in self._layers)]
        self._layers += new
        self._apply()
        return len(new)

    def update_seq(self, global_steps: int) -> int:
        """Set the kept length for a step and count the step's layer-tokens, once if called again with the same step.

        Returns:
            The kept length.
        """
        self._current = self.seq_at(global_steps)
        if global_steps != self._step:
            self.consumed_layer_tokens += self._layer_tokens(self._current)
            self._step = global_steps
        self._apply()
        return self._current

    def seq_at(self, step: int) -> int:
        """The kept length at a step, without going there."""
        schedule = self.config.random_ltd_schedule
        return kept_length(schedule, step) if self.config.enabled else schedule.max_value

    def get_current_seq(self) -> int:
        """The kept length set by the last :meth:`update_seq`."""
        return self._current

    def get_random_ltd_layer_num(self) -> int:
        """How many layers drop tokens."""
        return self.random_ltd_layer_num

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """Layer-tokens of the steps ``0 .. train_iters - 1``; the scheduler stays where it is."""
        steps = min(train_iters, self.config.random_ltd_schedule.schedule_config.require_steps)
        growing = sum(self._layer_tokens(self.seq_at(step)) for step in range(steps))
        return growing + max(train_iters - steps, 0) * self._layer_tokens(self.config.random_ltd_schedule.max_value)

    def reset_to_init(self) -> None:
        """Go back to before the first step."""
        self._current = self.seq_at(0)
        self._step = -1
        self.consumed_layer_tokens = 0
        self._apply()

    def get_state(self) -> dict[str, int]:
        """Same as :meth:`state_dict`."""
        return self.state_dict()

    def set_state(self, state: Mapping[str, int]) -> None:
        """Same as :meth:`load_state_dict`."""
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, int]:
        """The state under DeepSpeed's names; plain integers."""
        schedule = self.config.random_ltd_schedule
        return {
            "consumed_layer_tokens": self.consumed_layer_tokens,
            "current_steps": self._step,
            "current_value": self._current,
            "min_value": schedule.min_value,
            "max_value": schedule.max_value,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the state.

        Raises:
            ValueError: A name is missing, or the state belongs to a schedule with other limits.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"the random-LTD state lacks {', '.join(missing)}; it is incomplete or of another kind")
        schedule = self.config.random_ltd_schedule
        if (state["min_value"], state["max_value"]) != (schedule.min_value, schedule.max_value):
            raise ValueError(
                f"the state was saved under min_value={state['min_value']}, max_value={state['max_value']}, but the "
                f"config says {schedule.min_value} and {schedule.max_value}; resume with the same schedule, or call "
                f"update_seq(step) to go on under the new one"
            )
        self.consumed_layer_tokens = int(state["consumed_layer_tokens"])
        self._step = int(state["current_steps"])
        self._current = int(state["current_value"])
        self._apply()

    def _layer_tokens(self, kept: int) -> int:
        whole_layers = self.model_layer_num - self.random_ltd_layer_num
        full = self.config.random_ltd_schedule.max_value
        return self.config.global_batch_size * (kept * self.random_ltd_layer_num + full * whole_layers)

    def _apply(self) -> None:
        for layer in self._layers:
            layer.reserved_length = self._current if self.config.enabled else None
