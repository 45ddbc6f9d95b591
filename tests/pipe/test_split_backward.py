"""Split backward passes against plain ones: same gradients, same number of products, memory let go."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from penstock.pipe import PipelineModule
from penstock.pipe.split_backward import SplitBackward, reasons_against_splitting
from penstock.pipe.weight_work import WeightWork

WIDTH = 4

Layer = Callable[[Any], Any]


class Product(torch.autograd.Function):
    """A custom function that always computes both of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, x.T @ gradients[0]


class Layers(nn.Module):
    """Parameters that random graphs are built from."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH, 1))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.gru = nn.GRUCell(WIDTH, WIDTH)
        self.embedding = nn.Embedding(5, WIDTH)


Op = Callable[[Layers, list[Tensor], Tensor, Tensor], Tensor]

OPS: dict[str, Op] = {
    "linear 0": lambda m, w, x, y: m.linears[0](x),
    "linear 1": lambda m, w, x, y: m.linears[1](x),
    "linear 2 twice": lambda m, w, x, y: m.linears[2](torch.tanh(m.linears[2](x))),
    "norm": lambda m, w, x, y: m.norm(x),
    "matrix": lambda m, w, x, y: x @ m.matrix,
    "matrix transposed": lambda m, w, x, y: x @ m.matrix.T,
    "tied embedding": lambda m, w, x, y: x @ m.embedding.weight[:WIDTH],
    "embedding": lambda m, w, x, y: x + m.embedding(torch.arange(x.shape[0]) % 5),
    "computed weight": lambda m, w, x, y: x @ w[0],
    "mixed weights": lambda m, w, x, y: torch.addmm(m.scale.view(-1), x, w[0] * m.matrix),
    "convolution": lambda m, w, x, y: m.conv(x[:, None])[:, 0],
    "cell": lambda m, w, x, y: m.gru(x, y),
    "custom": lambda m, w, x, y: Product.apply(x, m.matrix),
    "in place": lambda m, w, x, y: m.linears[0](x).add_(m.scale.view(-1)).relu_(),
    "slice in place": lambda m, w, x, y: _slice_in_place(m, x),
    "drop rows": lambda m, w, x, y: x.index_copy(0, torch.tensor([0, 2]), m.linears[1](x[[0, 2]])),
    "add": lambda m, w, x, y: x + y,
    "multiply": lambda m, w, x, y: x * torch.sigmoid(y),
    "chunks": lambda m, w, x, y: torch.cat(m.linears[1](x).chunk(2, dim=1)[::-1], dim=1),
    "recomputed inside": lambda m, w, x, y: checkpoint(m.linears[0], x, use_reentrant=False),
    "detached": lambda m, w, x, y: x.detach() * m.scale.view(-1),
    "weights alone": lambda m, w, x, y: w[0][:3],
}


def _slice_in_place(m: Layers, x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, 0] = m.linears[1](x)[:, 0]
    return out


def build(names: list[tuple[str, int, int]], *, every: bool = False) -> Callable[[Layers, Tensor], list[Tensor]]:
    """A model that applies ops to earlier values; its outputs are their sum, or every one of them."""

    def forward(module: Layers, x: Tensor) -> list[Tensor]:
        weights = [module.scale * module.matrix / module.matrix.norm(dim=1, keepdim=True)]
        values = [x]
        for name, first, second in names:
            values.append(OPS[name](module, weights, values[first % len(values)], values[second % len(values)]))
        return values[1:] if every else [torch.stack(values[1:]).sum(0)]

    return forward


Gradients = dict[str, Tensor | None]


def plain(forward: Layer, module: nn.Module, x: Tensor, gradient: Tensor) -> Gradients:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = forward(leaf)
    torch.autograd.backward(outputs, [gradient + i for i in range(len(outputs))])
    return {"input": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}


def split(forward: Layer, module: nn.Module, x: Tensor, gradient: Tensor) -> Gradients:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = forward(leaf)
    (found,), work = SplitBackward().input_half(outputs, [gradient + i for i in range(len(outputs))], [leaf], None)
    del outputs
    assert leaf.grad is None
    work.run()
    return {"input": found} | {name: p.grad for name, p in module.named_parameters()}


def check(forward: Layer, module: nn.Module, *, bitwise: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(3, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    expected, found = plain(forward, module, x, gradient), split(forward, module, x, gradient)
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            assert other is value, name
        elif bitwise:
            assert torch.equal(other, value), name
        else:
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-12, msg=name)


def layers() -> Layers:
    torch.default_generator.manual_seed(0)
    return Layers().double()


@given(
    names=st.lists(
        st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7
    ),
    every=st.booleans(),
)
def test_any_graph_gets_the_gradients_of_a_plain_backward_pass(names: list[tuple[str, int, int]], every: bool) -> None:
    module, forward = layers(), build(names, every=every)
    check(lambda x: forward(module, x), module)


@pytest.mark.parametrize("name", sorted(OPS))
def test_each_op_bitwise(name: str) -> None:
    module, forward = layers(), build([(name, 0, 0)])
    check(lambda x: forward(module, x), module, bitwise=True)


def test_a_stack_of_layers_bitwise() -> None:
    torch.default_generator.manual_seed(0)
    block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True).double()
    check(lambda x: [block(x[None])[0]], block, bitwise=True)
    lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2).double()
    check(lambda x: [lstm(x)[0]], lstm, bitwise=True)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "convolution_backward"):
            # A convolution's backward pass computes what its mask asks for.
            self.seen[name] += sum(args[-1][:2]) if name == "convolution_backward" else 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in sorted(OPS) if name != "recomputed inside"])
def test_no_product_is_computed_twice(name: str) -> None:
    module, forward = layers(), build([("linear 1", 0, 0), (name, 1, 1), ("norm", 2, 2)])
    x = torch.ones(3, WIDTH, dtype=torch.float64)
    counts = []
    for run in (plain, split):
        with Products() as products:
            run(lambda x: forward(module, x), module, x, x)
        counts.append(products.seen)
    assert counts[0] == counts[1]


def test_input_half_leaves_the_weight_products_out() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    leaf = torch.ones(3, WIDTH, requires_grad=True)
    output = module(leaf)
    with Products() as first:
        _, work = SplitBackward().input_half([output], [torch.ones_like(output)], [leaf], None)
    with Products() as second:
        work.run()
    assert (first.seen["mm"], second.seen["mm"]) == (2, 2)
    assert all(p.grad is not None for p in module.parameters())


def test_what_cannot_wait_is_done_at_once_and_says_why() -> None:
    module = layers()
    x = torch.ones(3, WIDTH, dtype=torch.float64)
    whole = "ProductBackward computes all its gradients at once"
    assert reasons_against_splitting(lambda x: Product.apply(x, module.matrix), x) == (whole,)
    assert reasons_against_splitting(module.linears[0], x) == ()
    assert reasons_against_splitting(lambda x: module.norm(module.norm(x)), x) == (
        "NativeLayerNormBackward0 shares a weight with another use of it",
    )
    (reason,) = reasons_against_splitting(lambda x: checkpoint(module.linears[0], x, use_reentrant=False), x)
    assert reason.startswith("layers recompute activations themselves")
    assert module.matrix.grad is not None  # a function is not asked what it keeps; a module is put back
    module.zero_grad()
    assert reasons_against_splitting(nn.Sequential(module.linears[1]), torch.ones(2, WIDTH).double()) == ()
    assert module.linears[1].weight.grad is None


def test_layers_that_recompute_themselves_are_recomputed_once_from_the_second_time_on() -> None:
    module = layers()
    calls = []
    module.linears[0].register_forward_pre_hook(lambda *_: calls.append(1))
    splitting = SplitBackward()
    for _ in range(3):
        calls.clear()
        leaf = torch.ones(3, WIDTH, dtype=torch.float64, requires_grad=True)
        output = module.linears[1](checkpoint(module.linears[0], leaf, use_reentrant=False))
        (gradient,), work = splitting.input_half([output], [torch.ones_like(output)], [leaf], None)
        assert gradient is not None
        work.run()
    assert len(calls) == 2
    assert module.linears[0].weight.grad is not None


def test_compiled_layers_are_whole() -> None:
    module = layers()
    compiled = torch.compile(module.linears[0], backend="aot_eager")
    check(lambda x: [torch.tanh(compiled(x))], module, bitwise=True)
    (reason,) = reasons_against_splitting(compiled, torch.ones(3, WIDTH, dtype=torch.float64))
    assert reason == "CompiledFunctionBackward computes all its gradients at once"


def test_hooks_on_activations_and_parameters_act_once_on_the_gradient() -> None:
    module = layers()

    def forward(x: Tensor) -> list[Tensor]:
        hidden = module.linears[0](x)
        hidden.register_hook(lambda gradient: 3 * gradient)
        return [torch.tanh(hidden)]

    module.linears[0].weight.register_hook(lambda gradient: 2 * gradient)
    check(forward, module, bitwise=True)


def test_memory_goes_with_the_weight_work() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    leaf = torch.ones(3, WIDTH, requires_grad=True)
    hidden = module[0](leaf)
    kept = weakref.ref(hidden)
    output = module[1](hidden)
    del hidden
    _, work = SplitBackward().input_half([output], [torch.ones_like(output)], [leaf], None)
    del output
    assert kept() is not None
    work.run()
    assert kept() is None


def test_a_pass_without_inputs_waits_as_a_whole_and_a_cut_divides_it() -> None:
    torch.default_generator.manual_seed(0)
    stage = PipelineModule([nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)], num_stages=1).build_stage(0)
    x = torch.randn(4, 2)
    stage(x).sum().backward()
    expected = [p.grad for p in stage.parameters()]
    for cuts in (None, []):
        stage.zero_grad()
        output = stage(x, None, cuts)
        cut = cuts[0] if cuts else None
        with Products() as first:
            found, work = SplitBackward().input_half([output], [torch.ones_like(output)], [], cut)
        assert found == []
        assert first.seen["mm"] == (0 if cuts is None else 2)
        assert all(p.grad is None for p in stage.parameters())
        work.run()
        assert all(torch.equal(p.grad, e) for p, e in zip(stage.parameters(), expected, strict=True))  # type: ignore[arg-type]


def test_parameters_are_announced_before_the_last_part_that_adds_to_them() -> None:
    """A weight on both sides of a cut, in a joint part and in a part of its own gets more than one gradient."""
    module = layers()
    before = module.linears[0](torch.ones(3, WIDTH, dtype=torch.float64))
    leaf = before.detach().requires_grad_()
    hidden = module.linears[1](leaf) @ module.matrix.T @ module.matrix.T
    work = WeightWork()
    output = module.linears[0](hidden)
    (gradient,), work = SplitBackward().input_half([output], [torch.ones_like(output)], [leaf], None)
    assert gradient is not None
    work.add_pass([before], [gradient])
    names = {id(p): name for name, p in module.named_parameters()}
    added: list[str] = []
    announced: list[str] = []
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: added.append(names[id(p)]))

    def announce(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            announced.append(names[id(parameter)])
            added.append(f"announced {names[id(parameter)]}")

    work.run(announce)
    used = {"matrix", *(f"linears.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias"))}
    assert sorted(announced) == sorted(used)
    for name in used:
        assert added[added.index(f"announced {name}") :].count(name) == 1
    assert added.count("linears.0.weight") == 2
