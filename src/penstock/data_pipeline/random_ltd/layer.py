"""A layer that computes only some of the tokens while training (Yao et al., "Random-LTD", arXiv:2211.11586)."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from penstock._core.batch_key import current_batch_key
from penstock._core.keys import derive
from penstock.data_pipeline.random_ltd.layer_inputs import KeptTokens
from penstock.data_pipeline.random_ltd.sampling import gpt_sample_tokens
from penstock.data_pipeline.random_ltd.token_ops import gather_tokens, scatter_tokens

HiddenStateOrder = Literal["batch_seq_dim", "seq_batch_dim"]

_INNER = "random_ltd_layer"


class RandomLayerTokenDrop(nn.Module):
    """Wraps a layer: in training it computes ``reserved_length`` random tokens of each row, the others pass by.

    The layer is called as it would be, with the hidden states as the first argument (or as the keyword
    ``hidden_states``), or with one dict that has them under ``"hidden"``. Whatever else in the call has a sequence
    dimension follows the kept tokens, by the rule in :mod:`penstock.data_pipeline.random_ltd.layer_inputs`. It returns
    hidden states, a tuple or list whose first item they are, or the dict.

    The choice is keyed by what it decides. Under an engine it is a function of the run's seed, ``layer_id`` and each
    sample's position in the run's order (see :class:`penstock._core.batch_key.BatchKey`; without positions, of the
    step, the micro-batch and the row), so that it does not depend on how the batch is split and is the same when
    activation checkpointing computes it again. Outside an engine each call draws one key from torch's default
    generator, as dropout does: ``torch.manual_seed`` decides, and ``torch.utils.checkpoint`` replays it.

    In eval mode, and while ``reserved_length`` is None or not smaller than the sequence, the call is the layer's own.

    The wrapper leaves no trace in a state dict: keys are those of the wrapped layer, for saving and for loading. An
    attribute that it has not is the wrapped layer's: models look at their layers' (``nn.TransformerEncoder`` does).

    Args:
        layer: What to wrap.
        layer_id: What names the layer in the key of its choices: its index among the model's layers.
        reserved_length: Tokens to keep; a :class:`RandomLTDScheduler` changes it.
        mask_name: Name of the layer's keyword argument (or dict entry) that is an attention mask, if its shape alone
            would leave doubt.
        hidden_state_order: ``"batch_seq_dim"`` for ``[B, S, D]``, ``"seq_batch_dim"`` for ``[S, B, D]``.

    Attributes:
        random_ltd_layer: The wrapped layer.
        computed_tokens: Tokens that the layer computed in the last call, over all rows; 0 before the first.
        passed_tokens: Tokens of the last call that passed the layer by.
    """

    def __init__(
        self,
        layer: nn.Module,
        layer_id: int = 0,
        *,
        reserved_length: int | None = None,
        mask_name: str | None = None,
        hidden_state_order: HiddenStateOrder = "batch_seq_dim",
    ) -> None:
        super().__init__()
        if isinstance(layer, RandomLayerTokenDrop):
            raise ValueError("the layer drops tokens already; wrapping it twice would drop twice")
        if hidden_state_order not in get_args(HiddenStateOrder):
            raise ValueError(
                f"hidden_state_order must be one of {', '.join(get_args(HiddenStateOrder))}, got {hidden_state_order!r}"
            )
        if reserved_length is not None and reserved_length < 1:
            raise ValueError(f"reserved_length must be at least 1 token, or None for all; got {reserved_length}")
        self.random_ltd_layer = layer
        self.layer_id = layer_id
        self.reserved_length = reserved_length
        self.mask_name = mask_name
        self.batch_first = hidden_state_order == "batch_seq_dim"
        self.computed_tokens = 0
        self.passed_tokens = 0
        self.register_state_dict_post_hook(_drop_inner_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner_name)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the kept tokens and put them back among the others."""
        hidden = _hidden_of(args, kwargs)
        batch_dim, seq_dim = (0, 1) if self.batch_first else (1, 0)
        batch, length = hidden.shape[batch_dim], hidden.shape[seq_dim]
        kept = length if self.reserved_length is None else min(self.reserved_length, length)
        if not self.training or kept == length or batch == 0:
            self.computed_tokens, self.passed_tokens = batch * length, 0
            return self.random_ltd_layer(*args, **kwargs)
        self.computed_tokens, self.passed_tokens = batch * kept, batch * (length - kept)
        tokens = KeptTokens(self._draw(hidden, batch, length, kept), length, self.batch_first)
        handed_on, kept_hidden = gather_tokens(hidden, tokens.indices, self.batch_first)
        kept_args, kept_kwargs = self._kept_call(tokens, kept_hidden, args, kwargs)
        output = self.random_ltd_layer(*kept_args, **kept_kwargs)
        value = args[0] if args and isinstance(args[0], dict) else None
        return _restore(tokens, handed_on, output, value, kept_args[0] if value is not None else None)

    def __getattr__(self, name: str) -> Any:
        """What neither the wrapper nor ``nn.Module`` knows, the wrapped layer may."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == _INNER:  # not there yet, or gone: looking inside would come back here
                raise
            return getattr(self.random_ltd_layer, name)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the wrapper."""
        return f"layer_id={self.layer_id}, reserved_length={self.reserved_length}"

    def _draw(self, hidden: Tensor, batch: int, length: int, kept: int) -> Tensor:
        batch_key = current_batch_key()
        if batch_key is None:
            return gpt_sample_tokens(kept, length, batch, device=hidden.device)[0][0]
        key, positions = batch_key.seed, batch_key.positions
        if not positions:
            key = derive(key, "random_ltd", batch_key.step, batch_key.micro_batch)
            positions = tuple(range(batch))
        elif len(positions) != batch:
            raise ValueError(
                f"the micro-batch has {batch} rows but its key lists {len(positions)} positions; "
                f"check hidden_state_order, or give one position for each row"
            )
        indices, _ = gpt_sample_tokens(
            kept, length, batch, device=hidden.device, key=key, positions=positions, layer_ids=(self.layer_id,)
        )
        return indices[0]

    def _kept_call(
        self, tokens: KeptTokens, kept_hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with every sequence dimension cut down to the kept tokens."""

        def by_name(named: dict[str, Any], hidden_name: str) -> dict[str, Any]:
            return {
                name: kept_hidden
                if name == hidden_name
                else tokens.inputs(value, is_mask=self.mask_name is not None and name == self.mask_name)
                for name, value in named.items()
            }

        if not args:
            return (), by_name(kwargs, "hidden_states")
        first = by_name(args[0], "hidden") if isinstance(args[0], dict) else kept_hidden
        return (first, *(tokens.inputs(value) for value in args[1:])), by_name(kwargs, "")


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = args[0] if args else kwargs.get("hidden_states")
    if isinstance(found, dict):
        found = found.get("hidden")
    if not isinstance(found, Tensor) or found.dim() < 3:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            "random-LTD finds the hidden states, of three dimensions, in the layer's first argument, in its keyword "
            f"hidden_states, or under 'hidden' in a dict given as the first argument; found {what}"
        )
    return found


def _restore(
    tokens: KeptTokens,
    hidden: Tensor,
    output: Any,
    value: dict[str, Any] | None,
    kept_value: dict[str, Any] | None,
) -> Any:
    """The layer's output with the tokens that passed by back in it."""
    if isinstance(output, Tensor):
        return scatter_tokens(hidden, output, tokens.indices, tokens.batch_first)
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        merged = scatter_tokens(hidden, output[0], tokens.indices, tokens.batch_first)
        items = [merged, *output[1:]]
        if isinstance(output, list):
            return items
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    if isinstance(output, dict) and isinstance(output.get("hidden"), Tensor):
        merged = scatter_tokens(hidden, output["hidden"], tokens.indices, tokens.batch_first)
        before, given = value or {}, kept_value or {}
        # An entry that the layer passed through goes on as it came; one that it made is its own affair.
        rest = {name: before[name] if item is given.get(name, _MISSING) else item for name, item in output.items()}
        return {**rest, "hidden": merged}
    raise ValueError(
        "random-LTD puts tokens back into hidden states that are the layer's whole output, the first item of a tuple "
        f"or list, or the entry 'hidden' of a dict; the layer returned {type(output).__name__}"
    )


_MISSING = object()


def _drop_inner_name(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Take the inner name out of the keys just collected; their order stays."""
    inner = f"{prefix}{_INNER}."
    for key in [key for key in state_dict if key.startswith(inner)]:
        state_dict[prefix + key.removeprefix(inner)] = state_dict.pop(key)
    metadata = getattr(state_dict, "_metadata", {})
    for name in [name for name in metadata if f"{name}.".startswith(inner)]:
        metadata[(prefix + f"{name}.".removeprefix(inner)).removesuffix(".")] = metadata.pop(name)


def _add_inner_name(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Give the keys of a clean state dict the inner name that torch looks them up under."""
    inner = f"{prefix}{_INNER}."
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(inner)]:
        state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
