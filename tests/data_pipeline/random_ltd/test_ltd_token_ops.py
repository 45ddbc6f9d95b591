import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from penstock.data_pipeline.random_ltd import GatherTokens, ScatterTokens, gpt_sample_tokens


def draw(batch: int, length: int, kept: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return gpt_sample_tokens(kept, length, batch, key=5)[0][0].to(dtype)


def batch_major(tensor: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return tensor if batch_first else tensor.transpose(0, 1)


def reference_gather(x: torch.Tensor, indices: torch.Tensor, batch_first: bool) -> torch.Tensor:
    rows = [one[at.long()] for one, at in zip(batch_major(x, batch_first), indices, strict=True)]
    return batch_major(torch.stack(rows), batch_first)


def reference_scatter(x: torch.Tensor, y: torch.Tensor, indices: torch.Tensor, batch_first: bool) -> torch.Tensor:
    out = x.clone()
    for row, at in enumerate(indices):
        for token, where in enumerate(at.tolist()):
            batch_major(out, batch_first)[row, where] = batch_major(y, batch_first)[row, token]
    return out


sizes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))


@settings(max_examples=60)
@given(
    sizes=sizes,
    share=st.floats(0, 1),
    batch_first=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    strided=st.booleans(),
)
def test_gather_and_scatter_move_the_right_tokens(sizes, share, batch_first, dtype, index_dtype, strided):
    batch, length, width = sizes
    kept = max(1, round(share * length))
    indices = draw(batch, length, kept, index_dtype)
    leading = (batch, length) if batch_first else (length, batch)
    kept_leading = (batch, kept) if batch_first else (kept, batch)
    x = torch.arange(2 * batch * length * width).reshape(*leading, 2 * width).to(dtype)
    x = x[..., ::2] if strided else x[..., :width].contiguous()
    y = -torch.arange(batch * kept * width).reshape(*kept_leading, width).to(dtype)
    before = x.clone()
    same, gathered = GatherTokens.apply(x, indices, batch_first)
    merged = ScatterTokens.apply(x, y, indices, batch_first)
    assert torch.equal(same, before)
    assert torch.equal(x, before)
    assert torch.equal(gathered, reference_gather(before, indices, batch_first))
    assert torch.equal(merged, reference_scatter(before, y, indices, batch_first))
    assert gathered.dtype == merged.dtype == dtype


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_gradients_alone_and_as_a_pair(batch_first, strided):
    indices = draw(2, 5, 3)
    x = torch.randn(2, 5, 4, dtype=torch.float64) if batch_first else torch.randn(5, 2, 4, dtype=torch.float64)
    y = torch.randn(2, 3, 4, dtype=torch.float64) if batch_first else torch.randn(3, 2, 4, dtype=torch.float64)
    if strided:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    x.requires_grad_()
    y.requires_grad_()

    def gather(x):
        return GatherTokens.apply(x, indices, batch_first)

    def scatter(x, y):
        return ScatterTokens.apply(x, y, indices, batch_first)

    def pair(x, y):
        handed_on, gathered = gather(x)
        return scatter(handed_on, (gathered * y).tanh())

    for function, inputs in ((gather, (x,)), (scatter, (x, y)), (pair, (x, y))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_gradients_equal_those_of_plain_indexing():
    indices = draw(3, 8, 5)
    rows = torch.arange(3)[:, None]
    ours = torch.randn(3, 8, 4, dtype=torch.float64, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    weights = torch.randn(3, 8, 4, dtype=torch.float64)

    handed_on, gathered = GatherTokens.apply(ours, indices, True)
    (ScatterTokens.apply(handed_on, gathered.sin(), indices, True) * weights + handed_on**2).sum().backward()

    merged = plain.clone()
    merged[rows, indices.long()] = plain[rows, indices.long()].sin()
    (merged * weights + plain**2).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-14, atol=1e-14)


def test_gather_adds_what_scatter_alone_would_set_to_zero():
    indices = torch.tensor([[1, 2]], dtype=torch.int32)
    x = torch.zeros(1, 4, 1, requires_grad=True)
    handed_on, gathered = GatherTokens.apply(x, indices, True)
    torch.autograd.backward((handed_on, gathered), (torch.full((1, 4, 1), 10.0), torch.tensor([[[1.0], [2.0]]])))
    assert x.grad.flatten().tolist() == [10, 11, 12, 10]

    x, y = torch.zeros(1, 4, 1, requires_grad=True), torch.zeros(1, 2, 1, requires_grad=True)
    ScatterTokens.apply(x, y, indices, True).backward(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))
    assert x.grad.flatten().tolist() == [1, 0, 0, 4]
    assert y.grad.flatten().tolist() == [2, 3]


@pytest.mark.parametrize("used", ["first", "second"])
def test_one_output_of_gather_may_go_unused(used):
    x = torch.randn(2, 5, 3, requires_grad=True)
    indices = draw(2, 5, 2)
    handed_on, gathered = GatherTokens.apply(x, indices, True)
    (handed_on if used == "first" else gathered).sum().backward()
    expected = torch.ones(2, 5, 3)
    if used == "second":
        expected = torch.zeros(2, 5, 3)
        expected[torch.arange(2)[:, None], indices.long()] = 1
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_incoming_gradients_are_never_changed(batch_first):
    shape = (2, 5, 3) if batch_first else (5, 2, 3)
    kept_shape = (2, 4, 3) if batch_first else (4, 2, 3)
    indices = draw(2, 5, 4)
    x, y = torch.randn(shape, requires_grad=True), torch.randn(kept_shape, requires_grad=True)
    grads = torch.randn(shape), torch.randn(kept_shape)
    copies = [grad.clone() for grad in grads]
    torch.autograd.backward(GatherTokens.apply(x, indices, batch_first), grads)
    ScatterTokens.apply(x, y, indices, batch_first).backward(grads[0])
    for grad, copy in zip(grads, copies, strict=True):
        assert torch.equal(grad, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_keep_the_dtype(dtype):
    x = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True)
    indices = draw(2, 5, 2)
    handed_on, gathered = GatherTokens.apply(x, indices, True)
    merged = ScatterTokens.apply(handed_on, 2 * gathered, indices, True)
    merged.sum().backward()
    expected = torch.ones(2, 5, 3, dtype=dtype)
    expected[torch.arange(2)[:, None], indices.long()] = 2
    assert torch.equal(x.grad, expected)


def test_a_layer_of_another_dtype_is_converted_and_gets_its_own_gradient():
    x, y = torch.zeros(1, 3, 2, requires_grad=True), torch.ones(1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    merged = ScatterTokens.apply(x, y, torch.tensor([[0, 2]]), True)
    assert merged.dtype == torch.float32
    merged.sum().backward()
    assert y.grad.dtype == torch.bfloat16


def test_only_indices_are_saved_for_the_backward_pass():
    kept = []
    x, y = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    indices = draw(2, 5, 2)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        handed_on, _ = GatherTokens.apply(x, indices, True)
        ScatterTokens.apply(handed_on, y, indices, True)
    assert [(one.dtype, tuple(one.shape)) for one in kept] == [(torch.int32, (2, 2))] * 2


def test_in_place_changes_are_right_or_refused():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    indices = draw(2, 5, 2)

    def doubled_in_place(x):
        handed_on, gathered = GatherTokens.apply(x * 1.0, indices, True)
        gathered.mul_(2)
        merged = ScatterTokens.apply(handed_on, gathered, indices, True)
        return merged.mul_(3)

    assert gradcheck(doubled_in_place, (x,))
    # A view out of a function of several outputs: torch could not follow the change, and says so.
    handed_on, _ = GatherTokens.apply(x * 1.0, indices, True)
    with pytest.raises(RuntimeError, match="view"):
        handed_on.mul_(2)


def test_two_backward_passes_are_bitwise_equal():
    x = torch.randn(4, 64, 16, requires_grad=True)
    indices = draw(4, 64, 32)
    grads = []
    for _ in range(2):
        handed_on, gathered = GatherTokens.apply(x, indices, True)
        merged = ScatterTokens.apply(handed_on, gathered.tanh(), indices, True)
        grads.append(torch.autograd.grad((merged**2).sum(), x)[0])
    assert torch.equal(*grads)


def test_nothing_to_gather_from():
    x = torch.randn(0, 5, 3, requires_grad=True)
    indices = torch.zeros(0, 2, dtype=torch.int32)
    handed_on, gathered = GatherTokens.apply(x, indices, True)
    assert gathered.shape == (0, 2, 3)
    ScatterTokens.apply(handed_on, gathered, indices, True).sum().backward()
    assert x.grad.shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("shape", "indices", "message"),
    [
        ((2, 5, 3), torch.zeros(3, 2, dtype=torch.int32), r"\(3, 2\) do not go with .* 2 rows of 5 tokens"),
        ((2, 5, 3), torch.zeros(2, 6, dtype=torch.int32), "2 rows of 5 tokens"),
        ((2, 5, 3), torch.zeros(2, 2), "int32 or int64, got torch.float32"),
        ((5,), torch.zeros(2, 2, dtype=torch.int32), "two dimensions or more"),
        ((2, 5, 3), torch.tensor([[0, 5], [0, 1]]), r"must lie in \[0, 5\), got 0..5"),
        ((2, 5, 3), torch.tensor([[0, 1], [-1, 1]]), "got -1..1"),
    ],
)
def test_mistakes_are_named(shape, indices, message):
    with pytest.raises(ValueError, match=message):
        GatherTokens.apply(torch.zeros(shape), indices, True)


def test_tokens_of_another_shape_do_not_go_back():
    with pytest.raises(ValueError, match=r"must have shape \(2, 2, 3\).*got \(2, 2, 4\)"):
        ScatterTokens.apply(torch.zeros(2, 5, 3), torch.zeros(2, 2, 4), torch.tensor([[0, 1], [0, 1]]), True)
