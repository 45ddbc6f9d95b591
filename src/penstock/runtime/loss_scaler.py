"""Dynamic loss scaling for float16: gradients too small for the format are lifted into its range, and back.

The loss is multiplied by a scale before the backward pass and every gradient divided by it afterwards. A step whose
gradients overflowed is skipped, and after enough of those the scale is halved; after a long enough run without one it
is doubled (Micikevicius et al., "Mixed Precision Training", ICLR 2018). Scales are powers of two, so scaling and
unscaling change no bit of a gradient that stays in range.
"""

from typing import Any

from penstock.runtime.config_sections import FP16Section


class LossScaler:
    """The scale, and how it follows what happens to the gradients.

    The rules are those of DeepSpeed's ``fp16`` section, so a configuration gives the same sequence of scales.

    Args:
        section: The rules.

    Attributes:
        scale: What the next step's loss is multiplied by.
        skipped: Steps that were skipped so far.
    """

    def __init__(self, section: FP16Section) -> None:
        self._section = section
        self.scale = section.initial_scale
        self.skipped = 0
        self._patience = section.hysteresis
        self._good_steps = 0

    def update(self, *, overflowed: bool) -> None:
        """Account for one step.

        Args:
            overflowed: Whether a gradient on any rank was NaN or infinite; the same on every rank.

        Raises:
            FloatingPointError: It overflowed at the smallest scale allowed, so lowering it cannot help.
        """
        section = self._section
        if overflowed:
            self.skipped += 1
            self._good_steps = 0
            if not section.dynamic or (self._patience <= 1 and self.scale <= section.min_loss_scale):
                raise FloatingPointError(
                    f"gradients are not finite at a loss scale of {self.scale:g}, "
                    + (
                        f"the smallest allowed (min_loss_scale={section.min_loss_scale:g})"
                        if section.dynamic
                        else "fixed by fp16.loss_scale"
                    )
                    + "; lower the learning rate, look at the data, or train in bf16, which has float32's range"
                )
            if self._patience > 1:
                self._patience -= 1
            else:
                self.scale = max(self.scale / 2, section.min_loss_scale)
            return
        if section.consecutive_hysteresis:
            self._patience = section.hysteresis
        self._good_steps += 1
        if section.dynamic and self._good_steps == section.loss_scale_window:
            self._good_steps = 0
            self._patience = section.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as a JSON value."""
        return {
            "scale": self.scale,
            "skipped": self.skipped,
            "patience": self._patience,
            "good_steps": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; a fixed scale stays the configuration's."""
        if self._section.dynamic:
            self.scale = float(state["scale"])
        self.skipped = int(state["skipped"])
        self._patience = int(state["patience"])
        self._good_steps = int(state["good_steps"])
