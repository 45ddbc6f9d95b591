"""Which tensors of a value are encoded, and that a value comes back as it was but for what the codec rounds."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.pipe.codec import decode_value, encode_value
from penstock.pipe.value import flatten, structure_from_json, structure_to_json, unflatten


class Halves:
    """float16 and the number of elements, for tensors of more than 4 elements."""

    name = "halves"

    def encode(self, tensor: Tensor) -> list[Tensor] | None:
        if tensor.numel() <= 4:
            return None
        return [tensor.to(torch.float16), torch.tensor([tensor.numel()])]

    def decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        values, count = parts
        assert int(count) == out.numel()
        out.copy_(values.view(out.shape))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=4),
    st.booleans(),
)
def test_values_come_back(facts: list[tuple[torch.dtype, list[int], bool]], all_floats: bool) -> None:
    given_tensors = []
    for dtype, shape, grad in facts:
        count = torch.Size(shape).numel()
        tensor = torch.arange(count).mul(1.0 + 2**-20).view(shape).to(dtype)  # float16 has no room for the 2**-20
        given_tensors.append(tensor.requires_grad_(grad and dtype.is_floating_point))
    structure, tensors = flatten({"all": given_tensors, "name": "x"})
    packed, sent, spared = encode_value(Halves(), structure, tensors, all_floats=all_floats)
    packed = structure_from_json(structure_to_json(packed))  # as a frame carries it
    back = decode_value(
        Halves(), packed, [tensor.detach() for tensor in sent], [tensor.requires_grad for tensor in sent]
    )
    assert back.spared_bytes == spared == sum(t.nbytes for t in tensors) - sum(t.nbytes for t in sent)
    assert list(back.requires_grad) == [t.requires_grad for t in tensors]
    arrived = unflatten(back.structure, back.tensors)
    assert arrived["name"] == "x"
    for before, after in zip(given_tensors, arrived["all"], strict=True):
        rounded = before.is_floating_point() and before.numel() > 4 and (all_floats or before.requires_grad)
        expected = before.detach().to(torch.float16).to(before.dtype) if rounded else before.detach()
        assert after.dtype == before.dtype
        assert torch.equal(after, expected)


def test_a_value_that_was_not_encoded_is_told_apart() -> None:
    structure, tensors = flatten(torch.ones(8))
    with pytest.raises(ValueError, match="as it is where one encoded by 'halves' was expected"):
        decode_value(Halves(), structure, tensors, [False])
