"""FlexAttention over packed rows is attention over each document by itself."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from penstock.data_pipeline.datasets import document_mask_mod


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_stays_inside_documents() -> None:
    lengths = [[50, 70, 8], [1, 127]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 128, 16, generator=generator) for _ in range(3))
    mask = create_block_mask(document_mask_mod(ids), 2, None, 128, 128, device="cpu")
    found = flex_attention(q, k, v, block_mask=mask)
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            alone = scaled_dot_product_attention(q[row, :, part], k[row, :, part], v[row, :, part], is_causal=True)
            torch.testing.assert_close(found[row, :, part], alone)
            start += size
