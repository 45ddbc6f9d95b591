"""Cuts the arguments of a layer's call down to the kept tokens, by the layer's rule.

The rule is the table of :mod:`penstock.data_pipeline.random_ltd.layer_rule`. Nothing is guessed: an argument that the
table does not name is read by its shape only if that can be read in one way, and S is no other size that is at hand.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock.data_pipeline.random_ltd.flex_mask import gather_block_mask, is_block_mask
from penstock.data_pipeline.random_ltd.layer_rule import BY_SHAPE, LayerRule
from penstock.data_pipeline.random_ltd.layout import Layout


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """Which tokens one call of a layer keeps, and how its arguments follow.

    Attributes:
        indices: int32 ``[B, K]``, increasing along each row.
        length: Tokens of each row before dropping (S).
        width: Last dimension of the hidden states (D).
        rule: The layer's.
        on_route: Whether the layer before kept the same tokens, and may hand on what it made of them.
    """

    indices: Tensor
    length: int
    width: int
    rule: LayerRule
    on_route: bool = False

    def inputs(self, path: str, value: Any) -> Any:
        """An argument among the kept tokens.

        Args:
            path: The argument's name, or the path of an item inside one.
            value: A tensor, a block mask, a cache, a nest of tuples, lists and dicts of these, or anything else.

        Raises:
            ValueError: The rule does not fit the value, or its shape can be read in two ways or none.
        """
        kind = self.rule.kind_of(path)
        if kind == "pass" or value is None:
            return value
        if kind == "cache":
            return self._cache(path, value)
        if isinstance(value, tuple | list | dict):
            return map_nest(lambda name, item: self.inputs(f"{path}.{name}", item), value)
        if is_block_mask(value):
            return gather_block_mask(value, self.indices, self.length)
        if not isinstance(value, Tensor):
            self._check_plain(path, value)
            return value
        if kind == "causal":
            return self._causal(path, value)
        if kind == "offsets":
            return self._offsets(path, value)
        return self._tensor(path, value, kind)

    def _tensor(self, path: str, tensor: Tensor, kind: str) -> Tensor:
        rows, shape = self.indices.shape[0], tuple(tensor.shape)
        if kind == BY_SHAPE:
            if self.length not in shape:
                self._check_no_other_choice(path, tensor)
                return tensor
            if self.length in (rows, self.width):
                other = f"{rows} rows" if self.length == rows else f"the hidden states' width of {self.width}"
                raise ValueError(
                    f"{self._told(path, tensor)}: which of its dimensions are tokens cannot be told, since there are "
                    f"{self.length} tokens and {other}; {_remedy(path)}"
                )
        if kind == "cross" and len(shape) == 2 and shape[0] in (1, rows) and shape[0] != self.length:
            return tensor  # the padding of the other sequence
        candidates = self.rule.layouts(kind)
        fitting = [layout for layout in candidates if layout.fits(shape, rows, self.length)]
        if len(fitting) > 1:
            fitting = [layout for layout in fitting if not _has_odd_sections(layout, shape, rows)]
        if len(fitting) != 1:
            raise ValueError(f"{self._told(path, tensor)}: {_misfit(kind, candidates, fitting)}; {_remedy(path)}")
        return fitting[0].gather(tensor, self.indices)

    def _causal(self, path: str, mask: Tensor) -> Tensor:
        if mask.shape[-2:] != (self.length, self.length):
            raise ValueError(f"{self._told(path, mask)}: a causal mask is [..., {self.length}, {self.length}]")
        kept = self.indices.shape[1]
        return mask[..., :kept, :kept]

    def _offsets(self, path: str, offsets: Tensor) -> Tensor:
        if self.indices.shape[0] != 1 or offsets.dim() != 1 or offsets.is_floating_point():
            raise ValueError(
                f"{self._told(path, offsets)}: offsets of packed documents are whole numbers [documents + 1] beside "
                "hidden states of one row; pack the documents into one row, or declare the argument otherwise"
            )
        kept = self.indices[0].to(offsets.device, torch.int64)
        return torch.searchsorted(kept, offsets.to(torch.int64)).to(offsets.dtype)

    def _cache(self, path: str, cache: Any) -> None:
        """Nothing, in place of a cache that is empty: the layer would fill it with some of the tokens only."""
        if isinstance(cache, Tensor) and cache.shape == (self.length,):
            return  # cache_position: where the tokens would go
        length = getattr(cache, "get_seq_length", None)
        if callable(length):  # the layers before this one have filled their own part in this very pass
            held = length() if self.rule.cache_slot is None else length(self.rule.cache_slot)
        else:
            held = len(cache) if isinstance(cache, tuple | list | dict) else None
        if held is None or held > 0:
            raise ValueError(
                f"the argument {path!r} is a {type(cache).__name__} "
                f"{'that holds ' + str(held) + ' tokens' if held is not None else 'of unknown content'}: a layer that "
                "drops tokens cannot go on from it; use a cache in eval mode, where no layer drops"
            )

    def _check_no_other_choice(self, path: str, tensor: Tensor) -> None:
        """Refuse what another dropping layer made of tokens that it chose: they would meet others here."""
        rows, kept = self.indices.shape
        order = (rows, kept) if self.rule.batch_first else (kept, rows)
        if tuple(tensor.shape) == (*order, self.width) and not self.on_route:
            raise ValueError(
                f"{self._told(path, tensor)} has as many tokens as are kept, {kept}: what a layer makes of its kept "
                "tokens beside the hidden states does not go with those of another. Let the layers drop the same "
                "tokens (route='block'), or hand on one tensor of hidden states; if these are no tokens, declare it to "
                f"pass: arguments={{{path!r}: 'pass'}}"
            )

    def _check_plain(self, path: str, value: object) -> None:
        """Refuse an array, or an object with tensors of tokens inside: it would pass with all of them."""
        # Numbers and texts hold nothing, and torch.compile does not follow a look inside them.
        if isinstance(value, nn.Module | type | bool | int | float | str) or self.rule.kind_of(path) != BY_SHAPE:
            return
        for name, shape in _shapes_inside(value):
            if self.length in shape:
                whose = f" whose {name}" if name else " that"
                raise ValueError(
                    f"the argument {path!r} is a {type(value).__name__}{whose} has shape {shape}, "
                    f"with a dimension of {self.length} like the tokens of a row; hand its tensors to the layer as "
                    f"arguments, in tuples or in dicts, or declare it to pass: arguments={{{path!r}: 'pass'}}"
                )

    def _told(self, path: str, tensor: Tensor) -> str:
        return (
            f"the argument {path!r} of shape {tuple(tensor.shape)} beside {self.indices.shape[0]} rows of "
            f"{self.length} tokens"
        )


def map_nest(function: Callable[[str, Any], Any], value: Any) -> Any:
    """Apply ``function(name, item)`` to the items of a tuple, list or dict; their names are numbers, fields or keys."""
    if isinstance(value, dict):
        mapped = {name: function(str(name), item) for name, item in value.items()}
        if type(value) is dict:
            return mapped
        changed = copy.copy(value)  # of a class of its own, such as transformers' outputs with their attributes
        for name, item in mapped.items():
            changed[name] = item
        return changed
    names = getattr(value, "_fields", range(len(value)))
    items = [function(str(name), item) for name, item in zip(names, value, strict=True)]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _shapes_inside(value: object) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the arrays that an object is or holds: in attributes, and in collections that these are."""
    if isinstance(value, np.ndarray):
        yield "", value.shape
        return
    slots = (name for kind in type(value).__mro__ for name in _slots(kind))
    for name in (*slots, *getattr(value, "__dict__", ())):
        item = getattr(value, name, None)
        held = item.values() if isinstance(item, Mapping) else item if isinstance(item, tuple | list) else (item,)
        for one in held:
            if isinstance(one, Tensor | np.ndarray):
                yield name, tuple(one.shape)


def _slots(kind: type) -> tuple[str, ...]:
    names = getattr(kind, "__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _has_odd_sections(layout: Layout, shape: tuple[int, ...], rows: int) -> bool:
    """Whether a layout that begins with sections, as ``_ B S _``, would have only one, or sections without all rows."""
    return layout.words[0] == "_" and (shape[0] == 1 or shape[layout.words.index("B")] != rows)


def _misfit(kind: str, candidates: tuple[Layout, ...], fitting: list[Layout]) -> str:
    if fitting:
        return f"as {kind!r} it may be {' or '.join(repr(str(one)) for one in fitting)}"
    return f"it is none of {', '.join(repr(str(one)) for one in candidates)} ({kind})"


def _remedy(path: str) -> str:
    return (
        f"say how it is laid out, for example arguments={{{path!r}: 'B S ...'}} (B rows, S tokens, _ anything else), "
        "or 'pass' to hand it on as it is"
    )
