"""Stages: exact recomputation, keyed randomness, canonical names, wrapping."""

import copy
import threading
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock._core.batch_key import BatchKey, current_batch_key
from penstock.pipe import LayerSpec, PipelineModule, Stage, TiedLayerSpec

KEY = BatchKey(seed=3, step=5, micro_batch=2, positions=(7, 8))


def _head(embedding: nn.Module, value: dict[str, Any]) -> torch.Tensor:
    return value["hidden"][0] @ embedding.get_parameter("weight").T


class Embed(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width))

    def forward(self, ids_BS: torch.Tensor) -> dict[str, Any]:
        return {"hidden": [self.weight[ids_BS]], "note": ("plain", 3)}


class Noisy(nn.Module):
    """Dropout, a keyed factor, and a dict that it changes in place."""

    calls = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        type(self).calls += 1
        key = current_batch_key()
        factor = 1.0 if key is None else 1.0 + sum(key.positions) / 100
        value["hidden"][0] = value["hidden"][0] + factor * self.inner(value["hidden"][0])
        return value


def _model(**options: Any) -> PipelineModule:
    return PipelineModule(
        [
            TiedLayerSpec("embed", Embed, 11, 4),
            *[LayerSpec(Noisy, 4) for _ in range(5)],
            TiedLayerSpec("embed", Embed, 11, 4, forward_fn=_head),
        ],
        **options,
    )


def _run(module: PipelineModule, ids_BS: torch.Tensor, key: BatchKey | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss and canonical gradients of a run through all stages; gradients of tied copies are added up."""
    assert module.num_stages is not None
    stages = [module.build_stage(stage, dtype=torch.float64) for stage in range(module.num_stages)]
    value: Any = ids_BS
    for stage in stages:
        value = stage(value, key)
    loss = value.square().mean()
    loss.backward()
    gradients: dict[str, Any] = {}
    for stage in stages:
        for name, parameter in stage.canonical_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return loss.detach(), gradients


@given(stages=st.integers(1, 7), interval=st.integers(0, 8))
def test_neither_partition_nor_recomputation_changes_the_result(stages: int, interval: int) -> None:
    ids_BS = torch.arange(10).reshape(2, 5)
    loss, gradients = _run(_model(num_stages=1), ids_BS, KEY)
    torch.rand(stages)
    other, others = _run(_model(num_stages=stages, activation_checkpoint_interval=interval), ids_BS, KEY)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        # Only the tied sum is added in another order.
        torch.testing.assert_close(others[name], gradient, rtol=0 if name != "layer_000.weight" else 1e-12, atol=0)


def test_another_key_draws_otherwise() -> None:
    ids_BS = torch.arange(10).reshape(2, 5)
    losses = {
        _run(_model(num_stages=1), ids_BS, key)[0].item()
        for key in (
            KEY,
            BatchKey(4, 5, 2, (7, 8)),
            BatchKey(3, 6, 2, (7, 8)),
            BatchKey(3, 5, 1, (7, 8)),
            BatchKey(3, 5, 2, (1, 2)),
        )
    }
    assert len(losses) == 5


@pytest.mark.parametrize(("interval", "forwards"), [(0, 5), (1, 10), (2, 10), (7, 10)])
def test_recomputation_happens_once(interval: int, forwards: int) -> None:
    Noisy.calls = 0
    _run(_model(num_stages=1, activation_checkpoint_interval=interval), torch.arange(4)[None], KEY)
    assert Noisy.calls == forwards


def test_groups_of_layers_are_counted_from_the_start_of_the_stage() -> None:
    seen: list[tuple[int, int]] = []
    stage = _model(num_stages=2, partition_method=[0, 2, 7], activation_checkpoint_interval=2).build_stage(1)
    checkpointed = stage._checkpointed

    def spy(start: int, stop: int, value: Any, key: BatchKey | None) -> Any:
        seen.append((start, stop))
        return checkpointed(start, stop, value, key)

    stage._checkpointed = spy  # type: ignore[method-assign]
    stage({"hidden": [torch.randn(1, 3, 4)]}, KEY)
    assert seen == [(2, 4), (4, 6), (6, 7)]


def test_without_a_key_recomputation_restores_torchs_own_state() -> None:
    results = []
    for interval in (0, 2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            results.append(
                _run(_model(num_stages=1, activation_checkpoint_interval=interval), torch.arange(4)[None], None)
            )
    (loss, gradients), (other, others) = results
    assert torch.equal(loss, other)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name])


def test_recomputation_on_another_thread_finds_the_key() -> None:
    """On GPUs autograd recomputes on threads of its own."""
    ids_BS = torch.arange(4)[None]
    _, expected = _run(_model(num_stages=1), ids_BS, KEY)
    stage = _model(num_stages=1, activation_checkpoint_interval=2).build_stage(0, dtype=torch.float64)
    loss = stage(ids_BS, KEY).square().mean()
    assert current_batch_key() is None
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for name, parameter in stage.canonical_parameters():
        assert torch.equal(parameter.grad, expected[name])  # type: ignore[arg-type]


def test_eval_mode_draws_nothing_and_still_enters_the_key() -> None:
    stage = _model(num_stages=1, activation_checkpoint_interval=2).build_stage(0).eval()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        keyed, unkeyed = stage(torch.arange(4)[None], KEY), stage(torch.arange(4)[None])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(keyed, unkeyed)


def test_gradcheck_through_checkpointed_layers() -> None:
    stage = PipelineModule(
        [LayerSpec(nn.Linear, 3, 3), nn.Tanh(), nn.Dropout(0.4), LayerSpec(nn.Linear, 3, 2)],
        num_stages=1,
        activation_checkpoint_interval=3,
    ).build_stage(0, dtype=torch.float64)
    x_BD = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: stage(x, KEY), (x_BD,))


class Pair(NamedTuple):
    left: torch.Tensor
    right: list[Any]


def test_any_nest_passes_a_checkpoint() -> None:
    def swap(value: Any) -> Any:
        return Pair(value.right[0]["x"] * 2, [{"x": value.left}, None, "kept"])

    stage = PipelineModule([swap, swap], num_stages=1, activation_checkpoint_interval=1).build_stage(0)
    left, right = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    out = stage(Pair(left, [{"x": right}, 4]), KEY)
    assert isinstance(out, Pair)
    (out.left.sum() + out.right[0]["x"].sum()).backward()
    assert left.grad is not None
    assert right.grad is not None
    assert left.grad.tolist() == right.grad.tolist() == [2.0, 2.0]
    assert out.right[1:] == [None, "kept"]


def test_names_are_the_models() -> None:
    names = [
        [name for name, _ in _model(partition_method=[0, 2, 7]).build_stage(stage).canonical_parameters()]
        for stage in range(2)
    ]
    assert names[0] == ["layer_000.weight", "layer_001.inner.0.weight", "layer_001.inner.0.bias"]
    assert names[1][:2] == ["layer_002.inner.0.weight", "layer_002.inner.0.bias"]
    assert names[1][-1] == "layer_000.weight"


def test_a_stage_knows_its_place() -> None:
    model = _model(num_stages=3)
    stages = [model.build_stage(i) for i in range(3)]
    assert [(s.index, s.num_stages, s.is_first, s.is_last) for s in stages] == [
        (0, 3, True, False),
        (1, 3, False, False),
        (2, 3, False, True),
    ]
    assert [list(s.layers) for s in stages] == [[str(i) for i in range(s.start, s.stop)] for s in stages]


def test_tied_layers_on_one_stage_share_one_module() -> None:
    together = _model(num_stages=1).build_stage(0)
    modules = dict(together.canonical_modules())
    assert modules[0] is modules[6]
    assert sum(1 for name, _ in together.canonical_parameters() if name == "layer_000.weight") == 1
    ((name, parameter),) = together.tied["embed"]
    assert name == "layer_000.weight"
    assert parameter is modules[0].get_parameter("weight")
    middle = _model(partition_method=[0, 2, 5, 7]).build_stage(1)
    assert middle.tied == {}


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, extra: bool = False) -> None:
        super().__init__()
        self.inner = inner
        if extra:
            self.more = nn.Parameter(torch.zeros(1))

    def forward(self, value: Any) -> Any:
        return self.inner(value)


def test_wrapped_layers_keep_their_names_and_results() -> None:
    model = _model(num_stages=1)
    plain, wrapped = model.build_stage(0), model.build_stage(0)
    asked: list[int] = []

    def wrap(index: int, layer: nn.Module) -> nn.Module | None:
        asked.append(index)
        return Wrapper(layer) if index in (0, 2, 6) else None

    wrapped.wrap_layers(wrap)
    assert asked == list(range(7))
    assert [i for i in range(7) if isinstance(wrapped.layers[str(i)], Wrapper)] == [0, 2, 6]
    assert [n for n, _ in plain.canonical_parameters()] == [n for n, _ in wrapped.canonical_parameters()]
    assert not any(isinstance(module, Wrapper) for _, module in wrapped.canonical_modules())
    assert torch.equal(plain(torch.arange(4)[None], KEY), wrapped(torch.arange(4)[None], KEY))
    wrapped.wrap_layers(lambda index, layer: Wrapper(layer))
    assert torch.equal(plain(torch.arange(4)[None], KEY), wrapped(torch.arange(4)[None], KEY))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda layer: Wrapper(copy.deepcopy(layer)),
            "layer_000: the wrapper Wrapper lacks 1 of the layer's 1 .* brings 1",
        ),
        (lambda layer: Wrapper(layer, extra=True), "lacks 0 of the layer's 1 parameters and brings 1 of its own"),
    ],
)
def test_wrappers_with_other_parameters_are_refused(wrap: Any, message: str) -> None:
    stage = _model(num_stages=1).build_stage(0)
    with pytest.raises(ValueError, match=message):
        stage.wrap_layers(lambda index, layer: wrap(layer))


def test_a_copied_stage_is_whole() -> None:
    stage = _model(num_stages=1).build_stage(0)
    twin = copy.deepcopy(stage)
    assert isinstance(twin, Stage)
    ours, theirs = dict(stage.canonical_parameters()), dict(twin.canonical_parameters())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in theirs.values()}
    assert not {id(p) for p in ours.values()} & {id(p) for p in theirs.values()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_weights_are_the_cpus_and_recomputation_draws_the_same_again() -> None:
    ids_BS = torch.arange(10, device="cuda").reshape(2, 5)
    cpu = dict(_model(num_stages=1).build_stage(0).canonical_parameters())
    runs = []
    for interval in (0, 2):
        stage = _model(num_stages=1, activation_checkpoint_interval=interval).build_stage(0, device="cuda")
        for name, parameter in stage.canonical_parameters():
            assert torch.equal(parameter.cpu(), cpu[name])
        stage(ids_BS, KEY).square().mean().backward()
        runs.append({name: parameter.grad for name, parameter in stage.canonical_parameters()})
    for name, gradient in runs[0].items():
        torch.testing.assert_close(runs[1][name], gradient)
