"""A layer that computes only some of the tokens while training (Yao et al., "Random-LTD", arXiv:2211.11586)."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from penstock.data_pipeline.random_ltd.choice import draw_tokens
from penstock.data_pipeline.random_ltd.config import RandomLTDConfig
from penstock.data_pipeline.random_ltd.layer_inputs import KeptTokens
from penstock.data_pipeline.random_ltd.layer_rule import LayerRule
from penstock.data_pipeline.random_ltd.route import ENTRY, Route, RoutePart, route_of, send
from penstock.data_pipeline.random_ltd.state_names import hide_inner_name
from penstock.data_pipeline.random_ltd.token_ops import drop_tokens, restore_tokens

HiddenStateOrder = Literal["batch_seq_dim", "seq_batch_dim"]

_INNER = "random_ltd_layer"
_FACTS = ("protected_tokens", "token_weights")


class RandomLayerTokenDrop(nn.Module):
    """Wraps a layer: in training it computes ``reserved_length`` random tokens of each row, the others pass by.

    The layer is called as it would be, with the hidden states as its first argument, by position or by name, or with
    one dict that has them under ``"hidden"``. Whatever else in the call has a sequence dimension follows the kept
    tokens by a table of argument names and layouts (:class:`penstock.data_pipeline.random_ltd.layer_rule.LayerRule`),
    which :meth:`describe` prints. It returns hidden states, a tuple or list whose first item they are, or the dict.

    Two arguments, or entries of the dict, are for the wrapper: ``protected_tokens``, bool ``[B or 1, S]``, are kept
    before all others (see :func:`penstock.data_pipeline.random_ltd.protected_tokens`), and ``token_weights``, floats
    ``[B or 1, S]``, draw heavy tokens more often. The layer itself is not given them as arguments. The choice is keyed
    by what it decides; see :mod:`penstock.data_pipeline.random_ltd.choice`.

    In eval mode, and while ``reserved_length`` is None or not smaller than the sequence, the call is the layer's own.

    The wrapper leaves no trace in a state dict: keys are those of the wrapped layer, for saving and for loading. An
    attribute that it has not is the wrapped layer's: models look at their layers' (``nn.TransformerEncoder`` does).

    Args:
        layer: What to wrap.
        layer_id: What names the layer in the key of its choices: its index among the model's layers.
        reserved_length: Tokens to keep; a :class:`RandomLTDScheduler` changes it.
        mask_name: Name of the layer's argument (or dict entry) that is an attention mask; the same as declaring it
            ``"mask"`` in ``arguments``.
        hidden_state_order: ``"batch_seq_dim"`` for ``[B, S, D]``, ``"seq_batch_dim"`` for ``[S, B, D]``.
        arguments: Kinds or layouts of arguments by name; the rest is known by name or read by shape.
        route: The layer's place in a route across several layers; None drops for this layer alone.

    Attributes:
        random_ltd_layer: The wrapped layer.
        rule: How its arguments follow the kept tokens.
        computed_tokens: Tokens that the layer computed in the last call, over all rows; 0 before the first.
        passed_tokens: Tokens of the last call that passed the layer by.
        row_length: Tokens of a row in the last call in training, dropped ones included; 0 before the first.
        section: What :func:`convert_to_random_ltd` was given, by which a scheduler sees that it is its own; or None.
    """

    def __init__(
        self,
        layer: nn.Module,
        layer_id: int = 0,
        *,
        reserved_length: int | None = None,
        mask_name: str | None = None,
        hidden_state_order: HiddenStateOrder = "batch_seq_dim",
        arguments: Mapping[str, str] | None = None,
        route: RoutePart | None = None,
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
        if route is not None and route not in get_args(RoutePart):
            raise ValueError(f"route must be one of {', '.join(get_args(RoutePart))}, or None; got {route!r}")
        self.random_ltd_layer = layer
        self.layer_id = layer_id
        self.reserved_length = reserved_length
        self.batch_first = hidden_state_order == "batch_seq_dim"
        declared = ({} if mask_name is None else {mask_name: "mask"}) | dict(arguments or {})
        self.rule = LayerRule.of(layer, declared, batch_first=self.batch_first)
        self.route = route
        self.computed_tokens = 0
        self.passed_tokens = 0
        self.row_length = 0
        self.section: RandomLTDConfig | None = None
        hide_inner_name(self, _INNER)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the kept tokens and put them back among the others."""
        protected, weights = (_fact(args, kwargs, name) for name in _FACTS)
        hidden = self._hidden_of(args, kwargs)
        first = args[0] if args else hidden
        if not self.training:
            return self._call_whole(hidden, args, kwargs)
        if self.route in ("inside", "end"):
            return self._call_on_route(hidden, first, args, kwargs)
        rows, length = self._rows_and_length(hidden)
        self.row_length = length
        kept = length if self.reserved_length is None else min(self.reserved_length, length)
        if kept == length or rows == 0:
            output = self._call_whole(hidden, args, kwargs)
            return output if self.route is None else send(output, Route())
        indices = draw_tokens(
            self.layer_id, rows, length, kept, hidden.device, protected_BS=protected, weights_BS=weights, hidden=hidden
        )
        passed, kept_hidden = drop_tokens(hidden, indices, self.batch_first)
        output = self._call_kept(kept_hidden, indices, length, args, kwargs)
        if self.route is None:
            return self._returned(output, passed, indices)
        return send(output, Route(passed, indices))

    def describe(self) -> str:
        """How each argument of the layer's call follows the kept tokens, one a line."""
        return self.rule.describe()

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
        place = "" if self.route is None else f", route={self.route}"
        return f"layer_id={self.layer_id}, reserved_length={self.reserved_length}{place}"

    def _call_whole(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows, length = self._rows_and_length(hidden)
        self.computed_tokens, self.passed_tokens = rows * length, 0
        return self.random_ltd_layer(*args, **kwargs)

    def _call_on_route(self, hidden: Tensor, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a layer that is in a route and does not begin it."""
        route = route_of(first, hidden)
        if route is None:
            raise ValueError(
                f"layer {self.layer_id} is in a route across several layers, but the hidden states did not come "
                "straight from the layer before it: what the model does between the two made a new tensor of them, "
                "or a pipeline's stage ended there. Use route='layer', or layers that pass on a dict with the hidden "
                "states under 'hidden'"
            )
        if isinstance(first, dict):
            args = ({name: item for name, item in first.items() if name != ENTRY}, *args[1:])
        if route.passed is None or route.indices is None:
            output = self._call_whole(hidden, args, kwargs)
            return send(output, route if self.route == "inside" else None)
        length = self._rows_and_length(route.passed)[1]
        output = self._call_kept(hidden, route.indices, length, args, kwargs)
        if self.route == "inside":
            return send(output, route)
        return self._returned(output, route.passed, route.indices)

    def _call_kept(
        self, kept_hidden: Tensor, indices: Tensor, length: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the layer with its hidden states replaced by the kept ones and everything else cut down to them."""
        rows, kept = indices.shape
        self.computed_tokens, self.passed_tokens = rows * kept, rows * (length - kept)
        tokens = KeptTokens(indices, length, kept_hidden.shape[-1], self.rule, on_route=self.route in ("inside", "end"))
        named = kwargs if args else {**kwargs, self._hidden_name(kwargs): kept_hidden}
        # A cache that cannot be gone on from is told before what is only a consequence of it.
        caches_first = sorted(kwargs, key=lambda name: self.rule.kind_of(name) != "cache")
        kept_kwargs = {
            name: kept_hidden if named[name] is kept_hidden else tokens.inputs(name, named[name])
            for name in caches_first
        }
        if not args:
            return self.random_ltd_layer(**kept_kwargs)
        value = args[0]
        if isinstance(value, dict):
            first = {
                name: kept_hidden if name == "hidden" else tokens.inputs(name, item) for name, item in value.items()
            }
        rest = (tokens.inputs(self.rule.name_of(at), item) for at, item in enumerate(args[1:], 1))
        output = self.random_ltd_layer(first if isinstance(value, dict) else kept_hidden, *rest, **kept_kwargs)
        if isinstance(value, dict) and isinstance(output, dict):
            # An entry that the layer passed through goes on as it came; one that it made is its own affair.
            return {
                name: value[name] if name != "hidden" and item is first.get(name, _MISSING) else item
                for name, item in output.items()
            }
        return output

    def _returned(self, output: Any, passed: Tensor, indices: Tensor) -> Any:
        """The layer's output with the tokens that passed by back in it."""
        if isinstance(output, Tensor):
            return restore_tokens(passed, output, indices, self.batch_first)
        if isinstance(output, dict) and isinstance(output.get("hidden"), Tensor):
            return {**output, "hidden": restore_tokens(passed, output["hidden"], indices, self.batch_first)}
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            items = [restore_tokens(passed, output[0], indices, self.batch_first), *output[1:]]
            if isinstance(output, list):
                return items
            return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
        raise ValueError(
            "random-LTD puts tokens back into hidden states that are the layer's whole output, the first item of a "
            f"tuple or list, or the entry 'hidden' of a dict; the layer returned {type(output).__name__}"
        )

    def _rows_and_length(self, hidden: Tensor) -> tuple[int, int]:
        return (hidden.shape[0], hidden.shape[1]) if self.batch_first else (hidden.shape[1], hidden.shape[0])

    def _hidden_name(self, kwargs: dict[str, Any]) -> str:
        named = self.rule.parameters[:1]
        return named[0] if named and named[0] in kwargs else "hidden_states"

    def _hidden_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found = args[0] if args else kwargs.get(self._hidden_name(kwargs))
        if isinstance(found, dict):
            found = found.get("hidden")
        if not isinstance(found, Tensor) or found.dim() < 3:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                "random-LTD finds the hidden states, of three dimensions, in the layer's first argument, in the "
                f"keyword of that name or hidden_states, or under 'hidden' in a dict given as the first argument; "
                f"found {what}"
            )
        return found


_MISSING = object()


def _fact(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor | None:
    """An argument that is for the wrapper, taken out of the keywords; or the entry of the dict, which travels on."""
    found: Tensor | None = kwargs.pop(name, None)
    if found is None and args and isinstance(args[0], dict):
        found = args[0].get(name)
    return found
