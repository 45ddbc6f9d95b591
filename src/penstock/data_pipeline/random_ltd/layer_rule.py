"""The table that says how each argument of a layer's call follows the kept tokens.

A *kind* is a word of the table below or a layout (:mod:`penstock.data_pipeline.random_ltd.layout`). A word stands for
the layouts that such an argument has in practice; the shape picks one of them, and where two fit it is refused.

=============  ========================================================================================================
kind           what becomes of the argument, of B rows and S tokens, of which K are kept
=============  ========================================================================================================
``tokens``     per token, laid out like the hidden states: gathered
``positions``  position, segment or document ids: ``S``, ``B S`` (``S B``) or ``_ B S``
``rotary``     cosines and sines: ``S _``, ``S _ _``, ``B S _``, ``B S _ _``, ``B _ S _``, ``_ B S _`` (``S B _ _``)
``mask``       attention mask, boolean or additive: ``B _ Q S``, ``B Q S``, ``S S``, or ``B S`` for padding; or a
               FlexAttention ``BlockMask``
``causal``     a mask that is causal and nothing else: its first K queries and keys, without a gather
``padding``    ``B S``
``cross``      mask of a cross-attention: gathered in the queries only, ``B _ S _`` or ``B S _``
``offsets``    cumulative lengths of the documents packed in one row, ``[documents + 1]``: counted among the kept tokens
``cache``      keys and values of earlier calls: withheld while the layer's part is empty, refused otherwise
``pass``       handed on as it is
``by shape``   what is not in the table: numbers, texts and tensors without a dimension of S pass; a tensor with one is
               gathered if its shape can be read in one way only, and refused otherwise
=============  ========================================================================================================
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import nn

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.random_ltd.layout import Layout

BY_SHAPE: Final = "by shape"

LAYOUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "tokens": ("B S ...",),
    "positions": ("S", "B S", "_ B S"),
    "rotary": ("S _", "S _ _", "B S _", "B S _ _", "B _ S _", "_ B S _"),
    "mask": ("B _ Q S", "B Q S", "S S", "B S"),
    "padding": ("B S",),
    "cross": ("B _ S _", "B S _"),
    BY_SHAPE: ("B S ...", "B _ Q S", "S S"),
}
"""Layouts behind each word, beside hidden states ``B S D``."""

SEQUENCE_FIRST_LAYOUTS: Final[Mapping[str, tuple[str, ...]]] = {
    **LAYOUTS,
    "tokens": ("S B ...",),
    "positions": ("S", "B S", "S B"),
    "rotary": ("S _", "S B _", "S B _ _"),
    BY_SHAPE: ("S B ...", "B _ Q S", "S S", "B S"),
}
"""The same beside hidden states ``S B D``."""

KINDS: Final = ("causal", "offsets", "cache", "pass", *LAYOUTS)

KNOWN_ARGUMENTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("attention_mask", "attn_mask", "causal_mask", "mask", "src_mask", "tgt_mask", "block_mask"), "mask"
    ),
    **dict.fromkeys(
        ("key_padding_mask", "padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "token_mask"),
        "padding",
    ),
    **dict.fromkeys(("protected_tokens", "token_weights"), "padding"),
    **dict.fromkeys(
        ("position_ids", "positions", "input_pos", "token_type_ids", "document_ids", "segment_ids", "labels"),
        "positions",
    ),
    **dict.fromkeys(
        ("position_embeddings", "cos", "sin", "rotary", "rotary_pos_emb", "rotary_emb", "rope", "freqs", "freqs_cis"),
        "rotary",
    ),
    **dict.fromkeys(("encoder_attention_mask", "memory_mask"), "cross"),
    **dict.fromkeys(("encoder_hidden_states", "memory", "memory_key_padding_mask"), "pass"),
    **dict.fromkeys(("past_key_value", "past_key_values", "layer_past", "cache_position", "kv_cache"), "cache"),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), "offsets"),
    # The longest document among the kept tokens is no longer: the number stays an upper bound.
    **dict.fromkeys(("max_length_q", "max_length_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"), "pass"),
}
"""Kinds of arguments by the names that layers of PyTorch, of Hugging Face's transformers and of this package give them.
"""


@dataclass(frozen=True, slots=True)
class LayerRule:
    """How the arguments of one layer's calls follow the kept tokens; made by :meth:`of`.

    An argument is named by its parameter, an item inside a tuple or dict by a path: ``position_embeddings.0``. The
    longest part of the path that the user's table names decides, then :data:`KNOWN_ARGUMENTS`, then its shape.

    Attributes:
        parameters: Names of the layer's positional parameters, the hidden states first.
        declared: Kinds by path, given by the user.
        batch_first: Whether hidden states are ``B S D`` or ``S B D``.
        cache_slot: The layer's number in a cache of keys and values, where it has one (``layer_idx`` in transformers).
    """

    parameters: tuple[str, ...]
    declared: Mapping[str, str] = field(default_factory=dict)
    batch_first: bool = True
    cache_slot: int | None = None

    @classmethod
    def of(
        cls, layer: nn.Module, declared: Mapping[str, str] | None = None, *, batch_first: bool = True
    ) -> "LayerRule":
        """The rule of a layer, by the parameters of its ``forward``.

        Args:
            layer: The layer that is to drop tokens.
            declared: Kinds by path, before those that are known by name.
            batch_first: Whether hidden states are ``B S D`` or ``S B D``.

        Raises:
            ValueError: A kind is neither a word of the table nor a layout, or the layer has no such argument.
        """
        signature = inspect.signature(layer.forward).parameters.values()
        positional = tuple(
            one.name for one in signature if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        )
        named = {*positional, *(one.name for one in signature if one.kind is one.KEYWORD_ONLY)}
        # A layer that takes one argument may take a dict in it, whose entries are named like arguments.
        closed = len(named) > 1 and not any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in signature)
        for path, kind in (declared or {}).items():
            if kind not in KINDS:
                _layout(path, kind)
            if closed and path.partition(".")[0] not in named:
                raise ValueError(unknown_name(f"argument of {type(layer).__name__}", path, named))
        slots = (getattr(module, "layer_idx", None) for module in layer.modules())
        slot = next((one for one in slots if isinstance(one, int)), None)
        return cls(positional, dict(declared or {}), batch_first, slot)

    def name_of(self, position: int) -> str:
        """The name of a positional argument; its number where the layer has none for it."""
        return self.parameters[position] if position < len(self.parameters) else str(position)

    def kind_of(self, path: str) -> str:
        """The kind of the argument, or item of an argument, at a path."""
        for table in (self.declared, KNOWN_ARGUMENTS):
            prefix = path
            while prefix:
                if prefix in table:
                    return table[prefix]
                prefix = prefix.rpartition(".")[0]
        return BY_SHAPE

    def layouts(self, kind: str) -> tuple[Layout, ...]:
        """The layouts that a kind stands for."""
        words = LAYOUTS if self.batch_first else SEQUENCE_FIRST_LAYOUTS
        return tuple(Layout.parse(text) for text in words.get(kind, (kind,)))

    def describe(self) -> str:
        """The table as text, one argument a line: name, kind, and who says so."""
        names = dict.fromkeys((*self.parameters[1:], *self.declared))
        lines = [("argument", "kind", "by"), (self.parameters[0] if self.parameters else "0", "hidden states", "")]
        for name in names:
            kind = self.kind_of(name)
            source = "declared" if name in self.declared else "" if kind == BY_SHAPE else "name"
            lines.append((name, kind, source))
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def _layout(path: str, kind: str) -> Layout:
    try:
        return Layout.parse(kind)
    except ValueError as error:
        words = ", ".join(KINDS)
        raise ValueError(f"argument {path!r}: {error}; or one of the kinds {words}") from error
