"""The largest elements of each chunk, with two bits for each value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.compression.algorithm import Payload, PayloadField
from penstock.compression.algorithms._integer import pack_codes, unpack_codes
from penstock.compression.algorithms._sparse import TopKByChunk


class TopKInt2(TopKByChunk):
    """The largest elements of each chunk as a sign and one of two magnitudes: 14 bits each with their place.

    Sarfi et al., "Communication efficient LLM pre-training with SparseLoCo", 2025 (arXiv:2508.15706) sends 1-3 % of
    the elements with 2-bit values. Here the two magnitudes are the means of those above and not above the chunk's
    mean.

    Args:
        chunk_size: Elements of a chunk, at most 65536; 4096 is the largest with 12 bits a place.
        keep: Elements sent of a chunk.
    """

    name = "topk_int2"

    def __init__(self, *, chunk_size: int = 4096, keep: int = 64) -> None:
        super().__init__(chunk_size=chunk_size, keep=keep)

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """``magnitudes`` float32 ``[chunks, 2]``, ``codes`` uint8 ``[ceil(sent / 4)]`` and ``places``, uint8."""
        return [
            PayloadField("magnitudes", torch.float32, (-(-numel // self.chunk_size), 2)),
            PayloadField("codes", torch.uint8, (-(-self._sent(numel) // 4),)),
            self._places_field(numel),
        ]

    def contraction(self, shape: Sequence[int] | int) -> float:
        """``1 / chunk_size``: of ``k`` sent magnitudes ``v`` their mean alone keeps ``|v|_1**2 / k >= |v|_2**2 / k``.

        For normal elements, 64 of 4096, it is about 0.11.
        """
        numel = shape if isinstance(shape, int) else torch.Size(shape).numel()
        return (1 - 1e-5) / max(1, min(self.chunk_size, numel))

    def _pack_values(self, values: Tensor) -> Payload:
        parts = self._sent_chunks(values.numel())
        magnitudes = torch.empty(sum(rows for _, rows, _ in parts), 2, dtype=values.dtype, device=values.device)
        large = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
        row = 0
        for first, rows, keep in parts:
            sizes = values[first : first + rows * keep].view(rows, keep).abs()
            # A mean of equal numbers may be rounded to below all of them; the smallest is never above.
            middle = torch.maximum(sizes.mean(dim=1, keepdim=True), sizes.amin(dim=1, keepdim=True))
            above = (sizes > middle).to(sizes.dtype)
            count = above.sum(dim=1)
            magnitudes[row : row + rows, 0] = (sizes * (1 - above)).sum(dim=1) / (keep - count)
            magnitudes[row : row + rows, 1] = (sizes * above).sum(dim=1) / count.clamp(min=1)
            large[first : first + rows * keep] = above.view(-1)
            row += rows
        codes = torch.empty(-(-values.numel() // 4), dtype=torch.uint8, device=values.device)
        numbers = torch.where(torch.signbit(values), -1.0 - large.float(), large.float())
        if values.numel():
            pack_codes(numbers.view(1, -1), codes.view(1, -1), bits=2)
        return {"magnitudes": magnitudes.float(), "codes": codes}

    def _unpack_values(self, payload: Payload, out: Tensor) -> None:
        if not out.numel():
            return
        numbers = unpack_codes(payload["codes"].view(1, -1), torch.empty_like(out).view(1, -1), bits=2).view(-1)
        row = 0
        for first, rows, keep in self._sent_chunks(out.numel()):
            mine = numbers[first : first + rows * keep].view(rows, keep)
            large = (mine == 1) | (mine == -2)
            low, high = payload["magnitudes"][row : row + rows].to(out.dtype).split(1, dim=1)
            sizes = torch.where(large, high, low)
            out[first : first + rows * keep].view(rows, keep).copy_(torch.where(mine < 0, -sizes, sizes))
            row += rows

    def _sent_chunks(self, sent: int) -> list[tuple[int, int, int]]:
        """``(first, rows, keep)`` of the whole chunks and of the rest."""
        rows, rest = divmod(sent, self.keep)
        parts = [(0, rows, self.keep)] if rows else []
        return [*parts, (rows * self.keep, 1, rest)] if rest else parts
