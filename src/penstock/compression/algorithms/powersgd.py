"""A matrix as the product of two thin ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock._core.keys import derive
from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField


class PowerSGD(CompressionAlgorithm):
    """One power iteration: ``P = orthonormal(M Q)``, ``Q = M' P``; a receiver sees ``P Q'``.

    Vogels, Karimireddy, Jaggi, "PowerSGD: practical low-rank gradient compression for distributed optimization",
    NeurIPS 2019. ``P Q' = P P' M`` is a projection, so nothing ever grows; how much is left depends on the matrix.
    Both products are linear in ``M``: an exchange sums ``M Q`` over the ranks, orthonormalises, sums ``M' P``, and
    starts the next step from the ``Q`` of this one (warm start). Tensors of more than two axes count as matrices
    ``[shape[0], rest]``. Vectors, and matrices that would not become smaller, are sent as they are.

    Args:
        rank: Columns of ``P`` and ``Q``; a matrix with a shorter side takes that.
        seed: Of the first ``Q``.
    """

    name = "powersgd"
    shaped = True

    def __init__(self, *, rank: int = 4, seed: int = 0) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank must be a positive whole number, got {rank!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.rank = rank
        self.seed = seed

    def factors(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Rows, columns and rank for a tensor of this shape; None where it is sent as it is."""
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        return (rows, columns, rank) if (rows + columns) * rank < rows * columns else None

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """For a vector: ``values`` float32."""
        return [PayloadField("values", torch.float32, (numel,))]

    def layout_for(self, shape: Sequence[int]) -> list[PayloadField]:
        """``p`` float32 ``[rows, rank]`` and ``q`` float32 ``[columns, rank]``, or ``values``."""
        factors = self.factors(shape)
        if factors is None:
            return self.payload_layout(math.prod(shape))
        rows, columns, rank = factors
        return [PayloadField("p", torch.float32, (rows, rank)), PayloadField("q", torch.float32, (columns, rank))]

    def contraction(self, shape: Sequence[int] | int) -> float:
        """1 for what is sent as it is; 0 otherwise: ``Q`` may be at right angles to all that matters, never worse."""
        factors = None if isinstance(shape, int) else self.factors(shape)
        return 1.0 - 2.0**-48 if factors is None else 0.0

    def compress(self, tensor: Tensor) -> Payload:
        """From the first ``Q``, with no memory of former calls; see :meth:`compress_from`."""
        return self.compress_from(tensor, self.start(tensor.shape, tensor.device))

    def compress_from(self, tensor: Tensor, start: Tensor | None) -> Payload:
        """One power iteration from ``start`` ``[columns, rank]``, which is overwritten by the new ``Q``."""
        factors = self.factors(tensor.shape)
        if factors is None or start is None:
            return {"values": tensor.detach().reshape(-1).float()}
        matrix = tensor.detach().reshape(factors[0], factors[1])
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        matrix = matrix.to(dtype)
        p = orthonormal(matrix @ start.to(dtype)).float()
        q = (matrix.T @ p.to(dtype)).float()
        if bool(torch.isfinite(q).all()):
            follow_start(start, q)
        return {"p": p, "q": q}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """``P Q'``."""
        if "values" in payload:
            return out.copy_(payload["values"].view(out.shape))
        p, q = payload["p"], payload["q"]
        if out.dtype == torch.float64:
            p, q = p.double(), q.double()
        return out.copy_((p @ q.T).view(out.shape))

    def start(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """The first ``Q`` for a tensor of this shape, ``[columns, rank]``, the same on all ranks; None for none."""
        factors = self.factors(shape)
        if factors is None:
            return None
        _, columns, rank = factors
        generator = torch.Generator().manual_seed(derive("powersgd", self.seed, columns, rank) & ((1 << 63) - 1))
        return torch.randn(columns, rank, generator=generator).to(device)


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis ``[n, r]`` of the columns of ``[n, r]``; all NaN where there is a NaN or infinity."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(matrix, math.nan)
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def follow_start(start: Tensor, q: Tensor) -> None:
    """The next iteration starts from the columns of ``q`` ``[columns, rank]``; one of zeros leaves the last start's.

    Where a matrix has no more directions than some of the columns, or is zero for a step, ``q`` has columns of zeros,
    from which no iteration would ever find a direction again.
    """
    start.copy_(torch.where((q != 0).any(dim=0), q.to(start.dtype), start))
