"""Which tokens a layer keeps: uniformly drawn, with some protected, or by weight.

Under an engine the choice is a function of the run's seed, the layer and each sample's position in the run's order
(:class:`penstock._core.batch_key.BatchKey`; without positions, of the step, the micro-batch and the row). Outside an
engine each call draws one key from torch's default CPU generator, as dropout does.

**Protected tokens** are kept; the others are drawn for the places that are left. A row that protects more than K keeps
K of its protected ones, drawn uniformly (on the CPU a warning says so): how many there will be depends on the data, and
a run should not end over one row of it. Keeping more than K for that row's sake would make the choice of the rows
beside it depend on how the batch was split.

**Weights** draw without replacement, one token after another in proportion to the weights of those that are left
(Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006): token ``t`` with weight ``w`` gets an
exponential number divided by ``w``, and the smallest K are kept. Tokens of weight 0 are kept only where there are no
others left; which of them, is drawn uniformly. The middle layers then train mostly on heavy tokens:
gradients are no longer those of a uniform sample, and no factor makes them so, since a layer's output is not a sum over
its tokens.
"""

import warnings
from typing import Final

import numpy as np
import torch
from torch import Tensor

from penstock._core.batch_key import current_batch_key
from penstock._core.keys import derive, random_floats
from penstock.data_pipeline.random_ltd.sampling import gpt_sample_tokens

_PURPOSE = "random_ltd"
_LAST: Final = 1e300  # in the order of drawing: after all tokens of a weight above 0


def draw_tokens(
    layer_id: int,
    rows: int,
    length: int,
    kept: int,
    device: torch.device,
    *,
    protected_BS: Tensor | None = None,
    weights_BS: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Draw the tokens that one call of a layer keeps.

    Args:
        layer_id: What names the layer, or the first layer of a route, in the key.
        rows: B.
        length: S.
        kept: K, in ``1..S``.
        device: Where the indices are to lie.
        protected_BS: bool ``[B or 1, S]``; True is kept.
        weights_BS: Floats ``[B or 1, S]``, finite and not negative; those of 0 are drawn last.
        hidden: The hidden states that the choice is for. In a compiled graph they keep two choices apart that are alike
            in everything else.

    Returns:
        int32 ``[B, K]``, increasing along each row.

    Raises:
        ValueError: Shapes do not agree, or a weight is negative or not finite (on a GPU, an assertion on the device
            says so, which does not wait).
    """
    if torch.compiler.is_compiling():
        beside = None if hidden is None else hidden.detach()
        drawn: Tensor = _draw_op(layer_id, rows, length, kept, device, protected_BS, weights_BS, beside)
        return drawn
    return _draw(layer_id, rows, length, kept, device, protected_BS, weights_BS, None)


def _draw(
    layer_id: int,
    rows: int,
    length: int,
    kept: int,
    device: torch.device,
    protected_BS: Tensor | None,
    weights_BS: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    key, positions = _key_and_positions(rows)
    if protected_BS is None and weights_BS is None:
        indices, _ = gpt_sample_tokens(
            kept, length, rows, device=device, key=key, positions=positions, layer_ids=(layer_id,)
        )
        return indices[0]
    drawn = order = torch.from_numpy(_exponentials(key, positions, layer_id, length)).to(device)
    if weights_BS is not None:
        weights = _per_token("token_weights", weights_BS, rows, length).to(drawn)
        _check_rows((weights.isfinite() & (weights >= 0)).all(1), "token_weights must be finite and not negative")
        order = torch.where(weights > 0, (drawn / weights).clamp(max=_LAST), _LAST * (2 + drawn))
    if protected_BS is not None:
        protected = _per_token("protected_tokens", protected_BS, rows, length).to(device)
        if protected.dtype != torch.bool:
            raise ValueError(f"protected_tokens must be bool, got {protected.dtype}")
        _warn_of_too_many(protected, kept)
        order = torch.where(protected, -1 / (1 + drawn), order)  # below 0, and among themselves as they were drawn
    return order.topk(kept, dim=1, largest=False).indices.sort(dim=1).values.to(torch.int32)


# A graph must ask for the key when it runs, not when it is traced. As an operator that draws random numbers the choice
# is not made a second time in the backward pass; that two equal calls are not merged takes the hidden states, since
# torch spares from merging only the random operators that it knows.
_draw_op = torch.library.custom_op(
    "penstock::draw_kept_tokens",
    _draw,
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)


@_draw_op.register_fake
def _(
    layer_id: int,
    rows: int,
    length: int,
    kept: int,
    device: torch.device,
    protected_BS: Tensor | None,
    weights_BS: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    return torch.empty((rows, kept), dtype=torch.int32, device=device)


def _key_and_positions(rows: int) -> tuple[int, tuple[int, ...]]:
    batch_key = current_batch_key()
    if batch_key is None:
        return int(torch.randint(0, 2**63 - 1, (), device="cpu")), tuple(range(rows))
    if not batch_key.positions:
        return derive(batch_key.seed, _PURPOSE, batch_key.step, batch_key.micro_batch), tuple(range(rows))
    if len(batch_key.positions) != rows:
        raise ValueError(
            f"the micro-batch has {rows} rows but its key lists {len(batch_key.positions)} positions; "
            f"check hidden_state_order, or give one position for each row"
        )
    return batch_key.seed, batch_key.positions


def _exponentials(key: int, positions: tuple[int, ...], layer_id: int, length: int) -> np.ndarray:
    """Independent exponential numbers ``[B, S]``, each a function of the key, the layer, its row's position and t."""
    rows = [random_floats(derive(key, _PURPOSE, "weighted", layer_id, row), np.arange(length)) for row in positions]
    return -np.log1p(-np.stack(rows))


def _per_token(name: str, tensor: Tensor, rows: int, length: int) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[0] not in (1, rows) or tensor.shape[1] != length:
        raise ValueError(
            f"{name} must be [batch or 1, tokens], here [{rows} or 1, {length}]; got {tuple(tensor.shape)}"
        )
    return tensor.detach().expand(rows, length)


def _warn_of_too_many(protected_BS: Tensor, kept: int) -> None:
    if protected_BS.device.type != "cpu":
        return  # a look would wait for the GPU
    if int(protected_BS.sum(1).max()) > kept:
        warnings.warn(
            f"a row protects more tokens than the {kept} of {protected_BS.shape[1]} that are kept, so that some of "
            "them are dropped; keep more, or protect fewer",
            stacklevel=2,
        )


def _check_rows(fine_B: Tensor, what: str) -> None:
    if fine_B.device.type != "cpu":
        torch._assert_async(fine_B.all(), what)
    elif not bool(fine_B.all()):
        raise ValueError(f"row {int(fine_B.logical_not().nonzero()[0])}: {what}")
