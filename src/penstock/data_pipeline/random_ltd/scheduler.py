"""How many tokens the dropping layers keep at each step, and how many layer-tokens that comes to."""

import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn

from penstock.data_pipeline.random_ltd.agreement import check_agreement, told_of_rows
from penstock.data_pipeline.random_ltd.config import RandomLTDConfig, read_config
from penstock.data_pipeline.random_ltd.keep_schedule import PlannedTokens, kept_length
from penstock.data_pipeline.random_ltd.layer import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.layer_token_lr import layer_token_factor


class RandomLTDScheduler:
    """Sets the kept length of the attached layers as training goes on.

    The kept length is a function of the clock alone (the step, or with ``require_tokens`` the tokens read): a resumed
    run calls :meth:`update_seq` with its step and needs no history. The count of layer-tokens is history, and is in
    :meth:`state_dict`.

    Args:
        config: DeepSpeed's ``random_ltd`` section, or a :class:`RandomLTDConfig`.

    Attributes:
        config: The checked section.
        model_layer_num: Layers that could drop.
        random_ltd_layer_num: Layers that do.
        consumed_layer_tokens: Tokens computed so far, summed over samples and layers: ``global_batch_size`` times, at
            each step, the kept length of each dropping layer and the whole length of each other one.
    """

    def __init__(self, config: RandomLTDConfig | Mapping[str, Any]) -> None:
        self.config = read_config(config)
        self.model_layer_num = self.config.total_layer_num
        self.random_ltd_layer_num = self.config.random_ltd_layer_num
        self._layers: list[RandomLayerTokenDrop] = []
        self._planned = PlannedTokens(self.config)
        self._compared = False
        self._kept = kept_length(self.config, 0)
        self._step = -1
        self.consumed_layer_tokens = 0

    def attach(self, module: nn.Module) -> int:
        """Take charge of a :class:`RandomLayerTokenDrop`, or of all those inside a module.

        Returns:
            How many layers were attached that were not before.

        Raises:
            ValueError: There is none, or they are not the layers that the section speaks of.
        """
        found = [layer for layer in module.modules() if isinstance(layer, RandomLayerTokenDrop)]
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no layer that drops tokens; run convert_to_random_ltd on it first"
            )
        new = [layer for layer in found if not any(layer is known for known in self._layers)]
        numbered = [] if isinstance(module, RandomLayerTokenDrop) else found
        check_agreement(self.config, self._layers + new, numbered)
        self._layers += new
        self._apply()
        return len(new)

    def update_seq(self, global_steps: int, tokens: int | None = None) -> int:
        """Set the kept length for a step and count the step's layer-tokens, once if called again with the same step.

        Args:
            global_steps: The optimizer step, from 0.
            tokens: Tokens read before it, for a schedule by tokens; None takes whole sequences for granted.

        Returns:
            The kept length.

        Raises:
            ValueError: There is no such step.

        Warns:
            UserWarning: Once, if the rows of the last call were longer than the section says, or shorter than what the
                layers were to keep.
        """
        _check_step(global_steps, "global_steps")
        self._compare_with_rows()
        self._kept = self._kept_at(global_steps, tokens)
        if global_steps != self._step:
            self.consumed_layer_tokens += self._planned.of_step(self._kept)
            self._step = global_steps
        self._apply()
        return self.get_current_seq()

    def seq_at(self, step: int, tokens: int | None = None) -> int:
        """The kept length at a step, without going there; arguments and errors as for :meth:`update_seq`."""
        _check_step(step, "step")
        kept = self._kept_at(step, tokens)
        return self.config.full_length if kept is None else kept

    def get_current_seq(self) -> int:
        """The kept length set by the last :meth:`update_seq`; the whole length where nothing is dropped."""
        return self.config.full_length if self._kept is None else self._kept

    def kept_lengths(self) -> list[int]:
        """The kept lengths that occur in the run, in order: ``torch.compile`` makes a graph for each."""
        self._check_tokens_known()
        return self._planned.distinct()

    def get_random_ltd_layer_num(self) -> int:
        """How many layers drop tokens."""
        return self.random_ltd_layer_num

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """Layer-tokens of the steps ``0 .. train_iters - 1``; the scheduler stays where it is."""
        _check_step(train_iters, "train_iters")
        self._check_tokens_known()
        return self._planned.before(train_iters)

    def lr_factor_at(self, step: int) -> float:
        """The learning rate of a step over its peak, by layer-tokens.

        A function of the step alone, so ``torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.lr_factor_at)`` works
        and needs no state.

        Raises:
            ValueError: The section has no ``layer_token_lr_schedule`` that is enabled, or there is no such step.
        """
        _check_step(step, "step")
        section = self.config.layer_token_lr_schedule
        if not section.enabled:
            raise ValueError("set layer_token_lr_schedule.enabled and total_layer_tokens in the section")
        self._check_tokens_known()
        before = self._planned.before(step)
        return layer_token_factor(section, before, self._planned.before(step + 1) - before)

    def reset_to_init(self) -> None:
        """Go back to before the first step."""
        self._kept = kept_length(self.config, 0)
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
            "current_value": self.get_current_seq(),
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
        by_tokens = self.config.random_ltd_schedule.schedule_config.by_tokens
        # A whole sequence by the state is kept whole as a number too: no layer drops at its rows' length.
        self._kept = int(state["current_value"]) if by_tokens else kept_length(self.config, max(self._step, 0))
        self._apply()

    def _kept_at(self, step: int, tokens: int | None) -> int | None:
        if not self.config.random_ltd_schedule.schedule_config.by_tokens:
            return kept_length(self.config, step)
        if tokens is None:
            self._check_tokens_known()
            return self._planned.kept_at(step)
        return kept_length(self.config, tokens)

    def _check_tokens_known(self) -> None:
        if (
            self.config.random_ltd_schedule.schedule_config.by_tokens
            and "global_batch_size" not in self.config.model_fields_set
        ):
            raise ValueError(
                "require_tokens counts tokens, but how many a step reads is unknown; set global_batch_size in the "
                "section, or call update_seq(step, tokens=...)"
            )

    def _compare_with_rows(self) -> None:
        length = max((layer.row_length for layer in self._layers), default=0)
        if self._compared or not length:
            return
        text = told_of_rows(self.config, self._kept, length)
        if text is not None:
            self._compared = True
            warnings.warn(text, stacklevel=3)

    def _apply(self) -> None:
        for layer in self._layers:
            layer.reserved_length = self._kept


def _check_step(step: object, name: str) -> None:
    if isinstance(step, bool) or not isinstance(step, Integral) or int(step) < 0:
        raise ValueError(f"steps are whole numbers from 0, got {name}={step!r}")
