"""Which tokens a layer keeps: uniform without replacement, sorted, keyed by sample and layer.

Every token of a row gets a random 64-bit word, and the tokens with the smallest words are kept, so every subset of the
kept size is equally likely. With a key, the words of a row are a pure function of (key, layer, the sample's position in
the run, token): neither the split into micro-batches, replicas and stages nor the order of the calls has a say.
"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock._core.keys import U64Array, derive, random_rows, random_words

_PURPOSE = "random_ltd"
_UPPER = 1 if sys.byteorder == "little" else 0  # which half of a word in memory
_LONGEST_ON_GPU = 32768  # one program of the kernel holds a row


def gpt_sample_tokens(
    reserved_length: int,
    seq_length: int,
    batch_size: int,
    layers: int = 1,
    device: torch.device | str = "cpu",
    attn_mask: Tensor | None = None,
    *,
    key: int | None = None,
    positions: Sequence[int] | None = None,
    layer_ids: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw the tokens that decoder layers keep.

    Args:
        reserved_length: Tokens to keep in each row (K), from 1 to ``seq_length``.
        seq_length: Tokens of each row (S).
        batch_size: Rows (B).
        layers: Layers to draw for (L), each on its own.
        device: Where the indices are to lie.
        attn_mask: A causal mask ``[B or 1, heads or 1, S, S]``, or None.
        key: Makes the draw a function of its arguments. Without one, torch's default CPU generator is asked for a
            key, so ``torch.manual_seed`` decides.
        positions: With ``key``: each row's sample position in the run's order, B integers (default ``0..B-1``).
        layer_ids: With ``key``: what names each layer, L integers (default ``0..L-1``).

    Returns:
        The indices, int32 ``[L, B, K]``, increasing along the last dimension; and the mask among K tokens,
        ``attn_mask[:, :, :K, :K]`` (a view; a causal mask is the same among any K tokens in order), or None.

    Raises:
        ValueError: A size is out of range or shapes do not agree.
    """
    indices = _sample(
        reserved_length, seq_length, batch_size, layers, device, key=key, positions=positions, layer_ids=layer_ids
    )
    if attn_mask is None:
        return indices, None
    _check_mask(attn_mask, seq_length, batch_size)
    return indices, attn_mask[:, :, :reserved_length, :reserved_length]


def bert_sample_tokens(
    reserved_length: int,
    seq_length: int,
    batch_size: int,
    layers: int = 1,
    device: torch.device | str = "cpu",
    attn_mask: Tensor | None = None,
    *,
    key: int | None = None,
    positions: Sequence[int] | None = None,
    layer_ids: Sequence[int] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Draw the tokens that encoder layers keep, and gather the mask of each layer.

    Args:
        reserved_length: As in :func:`gpt_sample_tokens`.
        seq_length: As in :func:`gpt_sample_tokens`.
        batch_size: As in :func:`gpt_sample_tokens`.
        layers: As in :func:`gpt_sample_tokens`.
        device: As in :func:`gpt_sample_tokens`.
        attn_mask: Required: ``[B or 1, heads or 1, S or 1, S]``.
        key: As in :func:`gpt_sample_tokens`.
        positions: As in :func:`gpt_sample_tokens`.
        layer_ids: As in :func:`gpt_sample_tokens`.

    Returns:
        The indices, int32 ``[L, B, K]``, and for each layer the mask among its kept tokens,
        ``[B, heads or 1, K or 1, K]``.

    Raises:
        ValueError: There is no mask, a size is out of range or shapes do not agree.
    """
    if attn_mask is None:
        raise ValueError("bert_sample_tokens needs attn_mask; without a mask, use gpt_sample_tokens")
    _check_mask(attn_mask, seq_length, batch_size, broadcast_queries=True)
    indices = _sample(
        reserved_length, seq_length, batch_size, layers, device, key=key, positions=positions, layer_ids=layer_ids
    )
    return indices, [gather_mask(attn_mask, layer_indices) for layer_indices in indices]


def keyed_indices(
    key: int, positions: Sequence[int], layer_ids: Sequence[int], seq_length: int, reserved_length: int
) -> npt.NDArray[np.int32]:
    """The kept tokens as a pure function: row ``[l, b]`` depends on ``layer_ids[l]`` and ``positions[b]`` only.

    Returns:
        int32 of shape ``[len(layer_ids), len(positions), reserved_length]``, increasing along the last dimension.
    """
    kept = np.empty((len(layer_ids), len(positions), reserved_length), dtype=np.int32)
    for at, layer in enumerate(layer_ids):
        # A word is a bijection of its counter, so the words of a row are distinct.
        smallest(random_rows(*_streams(key, positions, layer), seq_length), reserved_length, out=kept[at])
    return kept


def smallest(words: U64Array, count: int, out: npt.NDArray[np.int32]) -> None:
    """Where the ``count`` smallest words of each row are, in order of place; the words of a row must be distinct.

    No sort is needed: everything up to the ``count``-th smallest is looked for in order. The upper halves of the words
    decide, in half the time, unless two are tied just there; then the whole words of that row do.

    Args:
        words: ``[B, S]``, contiguous.
        count: From 1 to S.
        out: ``[B, count]``; filled.
    """
    upper = words.view(np.uint32)[:, _UPPER::2].copy()
    in_parts = upper.copy()
    in_parts.partition(count - 1, axis=1)
    among = upper <= in_parts[:, count - 1, None]
    for row, row_words in enumerate(words):
        places = among[row].nonzero()[0]
        if places.size != count:
            places = (row_words <= np.partition(row_words, count - 1)[count - 1]).nonzero()[0]
        out[row] = places


def gather_mask(mask: Tensor, indices_BK: Tensor) -> Tensor:
    """The part of an attention mask that lies among each row's kept tokens.

    Args:
        mask: ``[B or 1, heads or 1, S or 1, S]``; a dimension of 1 before the last is left as it is.
        indices_BK: int32 or int64.

    Returns:
        ``[B, heads or 1, K or 1, K]`` of the mask's dtype.
    """
    batch, kept = indices_BK.shape
    at = indices_BK.to(device=mask.device, dtype=torch.int64)
    mask = mask.expand(batch, -1, -1, -1)
    if mask.shape[2] != 1:
        mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, at[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], kept))


def _streams(key: int, positions: Sequence[int], layer: int) -> tuple[int, U64Array]:
    """The key of a layer's words, and the counter of each row's first one.

    A row's tokens are counted from a random place, so that rows do not share words.
    """
    rows = np.asarray(positions, dtype=np.int64)
    return derive(key, _PURPOSE, "token", layer), random_words(derive(key, _PURPOSE, "row", layer), rows)


def _drawn_on_gpu(
    key: int,
    positions: Sequence[int],
    layer_ids: Sequence[int],
    seq_length: int,
    reserved_length: int,
    device: torch.device,
) -> Tensor:
    """As :func:`keyed_indices`, drawn where they are used."""
    from penstock.data_pipeline.random_ltd.kernels import gpu_sampling

    streams = np.empty((len(layer_ids), len(positions), 2), dtype=np.uint64)
    for at, layer in enumerate(layer_ids):
        streams[at, :, 1], streams[at, :, 0] = _streams(key, positions, layer)
    return gpu_sampling.sample(streams, seq_length, reserved_length, device)


def _sample(
    reserved_length: int,
    seq_length: int,
    batch_size: int,
    layers: int,
    device: torch.device | str,
    *,
    key: int | None,
    positions: Sequence[int] | None,
    layer_ids: Sequence[int] | None,
) -> Tensor:
    if batch_size < 1 or layers < 1 or seq_length < 1:
        raise ValueError(
            f"batch_size, layers and seq_length must be at least 1, "
            f"got batch_size={batch_size}, layers={layers}, seq_length={seq_length}"
        )
    if not 1 <= reserved_length <= seq_length:
        raise ValueError(f"reserved_length={reserved_length} is not between 1 and seq_length={seq_length}")
    if key is None and (positions is not None or layer_ids is not None):
        raise ValueError("positions and layer_ids say where a keyed draw lies; pass key= too, or neither of them")
    positions = range(batch_size) if positions is None else positions
    layer_ids = range(layers) if layer_ids is None else layer_ids
    if len(positions) != batch_size or len(layer_ids) != layers:
        raise ValueError(
            f"expected one position for each of {batch_size} rows and one id for each of {layers} layers, "
            f"got {len(positions)} positions and {len(layer_ids)} layer_ids"
        )
    if key is None:
        key = int(torch.randint(0, 2**63 - 1, (), device="cpu"))
    device = torch.device(device)
    if device.type == "cuda" and seq_length <= _LONGEST_ON_GPU:
        return _drawn_on_gpu(key, positions, layer_ids, seq_length, reserved_length, device)
    return torch.from_numpy(keyed_indices(key, positions, layer_ids, seq_length, reserved_length)).to(device)


def _check_mask(mask: Tensor, seq_length: int, batch_size: int, *, broadcast_queries: bool = False) -> None:
    queries = (1, seq_length) if broadcast_queries else (seq_length,)
    fits = mask.dim() == 4 and mask.shape[3] == seq_length and mask.shape[2] in queries
    if not fits or mask.shape[0] not in (1, batch_size):
        raise ValueError(
            f"attn_mask must be [batch or 1, heads or 1, {' or '.join(map(str, queries))}, {seq_length}] "
            f"for a batch of {batch_size}, got {tuple(mask.shape)}"
        )
