"""The optimizer steps before the global norm of the gradient is known, and takes the step back where it was wrong.

A norm over all stages is a barrier: no rank may step, and so none may begin the next step, before the last one has its
gradients. Almost always the answer is that nothing is to be changed. So each rank steps as soon as its own gradients
are final, the sum of squares is on its way in the background, and the answer is looked at when the next step has begun
(Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 4)::

    rank 0   ... W W  step  F F F   validate  ...
    rank 1   ... W W W  step  F F   validate  ...
    rank 2   ... W W W W  step  F   validate  ...
                        (sum of squares on its way)

Where the norm exceeds the limit or is not finite, the parameters and the optimizer's state are put back from copies,
bit for bit. The step is then made with clipped gradients, or not at all. A rank whose own share of the norm already
says so does not step early. (The paper sends partial sums down the pipeline; this sum needs no order among the ranks.)

The copies cost as much memory as the parameters and the optimizer's state (with AdamW in float32, 12 bytes per
parameter), and gradients live until the next step's first backward pass. AdamW's step could be inverted by arithmetic,
but not exactly.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.runtime.clipping import clip_, reduced, squares


class PostValidation:
    """One optimizer's steps on trust.

    Args:
        optimizer: Steps parameters of dense gradients; its state is tensors and numbers of each parameter.
        parameters: All of this rank.
        counted: Of these, the ones whose gradients are this rank's share of the norm.
        limit: Largest norm; None does not clip.
        group: The ranks of one pipeline replica; None for a single one.
        watcher: Told of the wait.
        meter: Counts the bytes of the sum, and the wait (``wait_validation``).

    Attributes:
        pending: Whether there is a step that was not validated yet.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        counted: Sequence[nn.Parameter],
        limit: float | None,
        group: dist.ProcessGroup | None,
        watcher: Watcher,
        meter: Meter,
    ) -> None:
        self.pending = False
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._counted = list(counted)
        self._limit = math.inf if limit is None else limit
        self._group = group
        self._watcher = watcher
        self._meter = meter
        self._copies = _Copies(optimizer)
        self._stepped = False
        self._total = torch.zeros((), dtype=torch.float64)
        self._work: dist.Work | None = None

    def step(self) -> None:
        """Step now, unless this rank's gradients alone forbid it; they must stay as they are until :meth:`validate`."""
        self._total = squares(self._counted)
        self._stepped = self._within(self._total.sqrt().item())
        self._work = reduced(self._total, group=self._group, meter=self._meter)
        self.pending = True
        if self._stepped:
            self._copies.take()
            self._optimizer.step()

    def validate(self) -> tuple[float, bool]:
        """Wait for the norm, and make the last step what it would have been had the norm been known. Collective.

        Returns:
            The norm, not finite where the step was taken back for good; and whether the weights, on all ranks, are
            those that :meth:`step` left.
        """
        if self._work is not None:
            with self._meter.timed("wait_validation"), self._watcher.waiting("gradient norm"):
                self._work.wait()
            self._work = None
        self.pending = False
        norm = self._total.sqrt().item()
        if self._within(norm):
            return norm, True
        if self._stepped:
            self._copies.put_back()
        if math.isfinite(norm):
            clip_(self._parameters, norm=norm, max_norm=self._limit)
            self._optimizer.step()
        return norm, False

    def _within(self, norm: float) -> bool:
        return norm <= self._limit and math.isfinite(norm)


class _Copies:
    """What an optimizer's step changes, as it was before; the memory is used again."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._states: dict[nn.Parameter, dict[str, object]] = {}
        self._changed: list[nn.Parameter] = []

    @torch.no_grad()
    def take(self) -> None:
        self._changed = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        sources: list[Tensor] = []
        targets: list[Tensor] = []

        def copy(tensor: Tensor, to: object) -> Tensor:
            if not isinstance(to, Tensor) or to.shape != tensor.shape or to.dtype != tensor.dtype:
                return tensor.clone()
            sources.append(tensor)
            targets.append(to)
            return to

        for parameter in self._changed:
            self._weights[parameter] = copy(parameter.detach(), self._weights.get(parameter))
            before = self._states.get(parameter, {})
            self._states[parameter] = {
                key: copy(value, before.get(key)) if isinstance(value, Tensor) else value
                for key, value in self._optimizer.state.get(parameter, {}).items()
            }
        if sources:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter in self._changed:
            parameter.copy_(self._weights[parameter])
            saved, state = self._states[parameter], self._optimizer.state[parameter]
            if not saved:
                del self._optimizer.state[parameter]  # it was the first step
                continue
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value
