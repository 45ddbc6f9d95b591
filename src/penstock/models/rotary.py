"""Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864), from explicit position ids."""

import torch
from torch import Tensor


def rotary_angles(
    position_ids_BS: Tensor, head_size: int, *, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles.

    The angles are worked out from the ids at every call rather than looked up in a table: a token keeps its true
    position when others were dropped, and there is no buffer to place, size or save.

    Args:
        position_ids_BS: Integer positions, of any shape.
        head_size: Units of a head (D); even.
        theta: Base of the frequencies: pair ``i`` turns by ``theta ** (-2 * i / D)`` per position.
        dtype: Dtype of the result. The angles themselves are float32, or float64 for a float64 result.

    Returns:
        Two tensors of shape ``[*position_ids.shape, D // 2]``.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    pair = torch.arange(0, head_size, 2, device=position_ids_BS.device, dtype=exact)
    angles = position_ids_BS.to(exact).unsqueeze(-1) * theta ** (-pair / head_size)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``(x[i], x[i + D/2])`` of the last dimension by its angle.

    Args:
        x: ``[..., D]``.
        cos: ``[..., D // 2]``, broadcastable against a half of ``x``.
        sin: Like ``cos``.

    Returns:
        A tensor shaped like ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
