"""Pipeline modules: metadata, checks, and weights that do not depend on the partition."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from penstock.pipe.topology import PipeDataParallelTopology, ProcessTopology


def _head(embedding: nn.Module, value: torch.Tensor) -> torch.Tensor:
    assert isinstance(embedding, nn.Embedding)
    return value @ embedding.weight.T


class Ladder(nn.Module):
    """Reads values from a tensor while it is built, which a meta tensor cannot give."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.rates = torch.linspace(0, 1, depth).tolist()
        self.weight = nn.Parameter(torch.randn(depth))

    def forward(self, value: Any) -> Any:
        return value * self.weight


class NumpyDrawn(nn.Module):
    """Draws its weights with numpy and ``random``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([np.random.rand(), random.random()]))

    def forward(self, value: Any) -> Any:
        return value


def _layers() -> list[Any]:
    return [
        TiedLayerSpec("embed", nn.Embedding, 10, 4),
        LayerSpec(nn.Linear, 4, 4),
        nn.ReLU(),
        torch.tanh,
        LayerSpec(nn.Linear, 4, 4, bias=False),
        NumpyDrawnSpec,
        TiedLayerSpec("embed", nn.Embedding, 10, 4, forward_fn=_head),
    ]


NumpyDrawnSpec = LayerSpec(NumpyDrawn)


def _weights(module: PipelineModule) -> dict[str, torch.Tensor]:
    """Canonical parameters of all stages; copies of a tied one must be equal."""
    found: dict[str, torch.Tensor] = {}
    assert module.num_stages is not None
    for stage in range(module.num_stages):
        for name, parameter in module.build_stage(stage).canonical_parameters():
            assert torch.equal(found.setdefault(name, parameter.detach()), parameter)
    return found


def test_metadata() -> None:
    module = PipelineModule(_layers(), num_stages=2)
    assert module.num_layers == 7
    assert module.parameter_counts == (40, 20, 0, 0, 16, 2, 40)
    assert module.total_parameters == 78
    assert module.tied == {"embed": (0, 6)}
    assert module.layer_name(3) == "layer_003"
    assert module.layer_name(12345) == "layer_12345"
    assert module.num_stages == 2
    # 40 + 20 against 16 + 2 + 40; the layers without weights could lie on either side, and make it 3 and 4.
    assert module.bounds == (0, 3, 7)
    assert [module.stage_of(layer) for layer in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="layer 7 does not exist; the model has layers 0 to 6"):
        module.stage_of(7)


def test_construction_allocates_nothing_and_draws_nothing() -> None:
    state = torch.random.get_rng_state()
    # A terabyte in float32.
    module = PipelineModule([LayerSpec(nn.Linear, 500_000, 500_000, bias=False), LayerSpec(nn.ReLU)], num_stages=2)
    assert module.total_parameters == 250_000_000_000
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_layer_that_cannot_be_built_on_meta_is_counted_all_the_same() -> None:
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        assert PipelineModule([LayerSpec(Ladder, 5)]).parameter_counts == (5,)
        assert torch.equal(state, torch.random.get_rng_state())


def test_frozen_parameters_do_not_count() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    assert PipelineModule([layer]).parameter_counts == (3,)


@given(st.data())
def test_weights_do_not_depend_on_the_partition(data: st.DataObject) -> None:
    whole = _weights(PipelineModule(_layers(), num_stages=1))
    cuts = sorted(data.draw(st.sets(st.integers(1, 6))))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    divided = _weights(PipelineModule(_layers(), partition_method=[0, *cuts, 7]))
    assert divided.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, divided[name]), name


def test_layers_of_one_kind_differ_and_seeds_matter() -> None:
    def drawn(**options: Any) -> list[torch.Tensor]:
        return list(_weights(PipelineModule([LayerSpec(nn.Linear, 3, 3, bias=False)] * 2, 1, **options)).values())

    first, second = drawn()
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(base_seed=1)[0])
    assert torch.equal(first, drawn(base_seed=1234)[0])


def test_building_leaves_the_random_states_alone() -> None:
    module = PipelineModule(_layers(), num_stages=1)
    before = (torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index, union-attr]
    module.build_stage(0)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


def test_seed_layers_is_deepspeeds() -> None:
    layers = [LayerSpec(nn.Linear, 3, 3) for _ in range(3)]
    stage = PipelineModule(layers, 1, seed_layers=True, base_seed=7).build_stage(0)
    for index, module in stage.canonical_modules():
        with torch.random.fork_rng():
            torch.manual_seed(7 + index)
            expected = nn.Linear(3, 3)
        assert torch.equal(module.get_parameter("weight"), expected.weight)


def test_seed_fn_is_called_with_base_seed_and_index() -> None:
    calls: list[int] = []

    def seed(value: int) -> None:
        calls.append(value)
        torch.manual_seed(0)

    layers = [
        TiedLayerSpec("e", nn.Embedding, 3, 3),
        LayerSpec(nn.Linear, 3, 3),
        TiedLayerSpec("e", nn.Embedding, 3, 3),
    ]
    module = PipelineModule(layers, 2, seed_layers=True, seed_fn=seed, base_seed=100, partition_method=[0, 1, 3])
    calls.clear()
    module.build_stage(1)
    # The tied copy uses its owner's index, so that the copies are equal.
    assert calls == [101, 100]


def test_dtype_and_device() -> None:
    module = PipelineModule(_layers(), num_stages=1)
    single, double = module.build_stage(0), module.build_stage(0, dtype=torch.float64)
    for (name, a), (other, b) in zip(single.canonical_parameters(), double.canonical_parameters(), strict=True):
        assert (name, b.dtype) == (other, torch.float64)
        assert torch.equal(a.double(), b)
    assert module.build_stage(0, device="meta").device.type == "meta"


def test_instances_are_copied_and_keep_their_weights() -> None:
    layer = nn.Linear(2, 2)
    module = PipelineModule([layer, nn.ReLU()], num_stages=1)
    first, second = (dict(module.build_stage(0).canonical_parameters())["layer_000.weight"] for _ in range(2))
    assert torch.equal(first, layer.weight)
    assert len({first.data_ptr(), second.data_ptr(), layer.weight.data_ptr()}) == 3


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.own = nn.Parameter(torch.randn(2))

    def forward(self, value: Any) -> Any:
        return self.inner(value)


def test_modules_among_a_specs_arguments_are_copied_too() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    module = PipelineModule([LayerSpec(Around, layer)], num_stages=1)
    stage = module.build_stage(0, dtype=torch.float64)
    found = dict(stage.canonical_parameters())["layer_000.inner.weight"]
    assert torch.equal(found, before.double())
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="layer_001 and layer_000 share the parameter 'weight'"):
        PipelineModule([LayerSpec(Around, layer), LayerSpec(Around, inner=layer)])


def test_an_existing_module_may_be_tied() -> None:
    embedding = nn.Embedding(4, 2)
    specs = [TiedLayerSpec("e", nn.Sequential, embedding, tied_weight_attr="0.weight") for _ in range(2)]
    module = PipelineModule(specs, num_stages=2)
    assert module.total_parameters == 8
    copies = [module.build_stage(stage).tied["e"] for stage in range(2)]
    assert [[name for name, _ in copy] for copy in copies] == [["layer_000.0.weight"]] * 2
    assert all(torch.equal(copy[0][1], embedding.weight) for copy in copies)
    assert copies[0][0][1] is not copies[1][0][1]


def test_stages_may_be_known_later() -> None:
    module = PipelineModule(_layers())
    assert (module.num_stages, module.bounds) == (None, None)
    with pytest.raises(ValueError, match=r"not known yet: give .* or call partitioned"):
        module.build_stage(0)
    three = module.partitioned(3)
    assert (three.num_stages, len(three.bounds or ())) == (3, 4)
    assert (module.num_stages, module.bounds) == (None, None)
    assert three.partitioned(2).bounds == (0, 3, 7)
    with pytest.raises(ValueError, match="stage 3 does not exist; the model has stages 0 to 2"):
        three.build_stage(3)


def test_topology_gives_the_stages() -> None:
    module = PipelineModule(_layers(), topology=PipeDataParallelTopology(2, 4))
    assert module.num_stages == 2
    assert PipelineModule(_layers(), 2, PipeDataParallelTopology(2, 4)).num_stages == 2
    with pytest.raises(ValueError, match="num_stages is 3, but the topology's pipe axis has size 2"):
        module.partitioned(3)


def test_explicit_bounds_give_the_stages() -> None:
    module = PipelineModule(_layers(), partition_method=[0, 1, 2, 7])
    assert (module.num_stages, module.bounds) == (3, (0, 1, 2, 7))
    with pytest.raises(ValueError, match="2 stages need 3 partition bounds"):
        module.partitioned(2)


def _tie(*specs: TiedLayerSpec) -> Callable[[], PipelineModule]:
    return lambda: PipelineModule(specs)


_SHARED = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineModule([]), "needs at least one layer"),
        (lambda: PipelineModule(nn.Linear(2, 2)), "takes a list of layers, got Linear"),  # type: ignore[arg-type]
        (lambda: PipelineModule([nn.Linear]), r"layer_000 is the class Linear; write LayerSpec\(Linear, ...\)"),
        (lambda: PipelineModule([nn.ReLU(), 3]), r"layer_001 is 3 \(int\); a layer is"),  # type: ignore[list-item]
        (lambda: PipelineModule([_SHARED, nn.ReLU(), _SHARED]), "layer_002 and layer_000 share the parameter 'weight'"),
        (lambda: PipelineModule([nn.ReLU()], 2), "2 pipeline stages need at least 2 layers, the model has 1"),
        (lambda: PipelineModule([nn.ReLU()], 0), "num_stages must be at least 1, got 0"),
        (lambda: PipelineModule([nn.ReLU()], "2"), "num_stages must be an integer, got '2'"),  # type: ignore[arg-type]
        (lambda: PipelineModule([nn.ReLU()], activation_checkpoint_interval=0.5), "got 0.5"),  # type: ignore[arg-type]
        (lambda: PipelineModule([nn.ReLU()], partition_method="uniforn"), "did you mean 'uniform'"),
        (lambda: PipelineModule([nn.ReLU()], 1, partition_method="profile").stage_of(0), "initialize has measured"),
        (lambda: PipelineModule([nn.ReLU()], partition_method=[0, 2]), "end at the number of layers, 1"),
        (lambda: PipelineModule([nn.ReLU()], 2, PipeDataParallelTopology(1, 2)), "pipe axis has size 1"),
        (lambda: PipelineModule([nn.ReLU()], topology=ProcessTopology(["data"], [2])), "no 'pipe' axis"),
        (lambda: PipelineModule([nn.ReLU()], loss_fn="mse"), "loss_fn must be a callable"),  # type: ignore[arg-type]
        (lambda: PipelineModule([nn.ReLU()], seed_fn=torch.manual_seed), "only with seed_layers=True"),
        (lambda: PipelineModule([nn.ReLU()], activation_checkpoint_interval=-1), "got -1"),
        (
            lambda: PipelineModule([nn.ReLU(), LayerSpec(nn.Linear, 3)]),
            r"layer_001: cannot build LayerSpec\(Linear, 3\): TypeError: .*out_features",
        ),
        (_tie(TiedLayerSpec("e", nn.ReLU)), r"'e': ReLU has no parameter 'weight', its parameters are \(none\)"),
        (_tie(TiedLayerSpec("e", nn.Linear, 2, 2)), r"also has bias.*set tied_weight_attr=\['weight', 'bias'\]"),
        (
            _tie(TiedLayerSpec("e", nn.Embedding, 4, 2), TiedLayerSpec("e", nn.Embedding, 5, 2)),
            r"layer_001 \(Embedding\) and layer_000 .*have different parameters.*\(5, 2\).*\(4, 2\)",
        ),
        (
            _tie(TiedLayerSpec("e", nn.Embedding, 4, 2), TiedLayerSpec("e", nn.Linear, 2, 4, bias=False)),
            "build different modules; .*use forward_fn",
        ),
    ],
)
def test_mistakes_are_refused_on_construction(make: Callable[[], PipelineModule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_function_and_a_module_without_weights_may_be_used_twice() -> None:
    relu = nn.ReLU()
    assert PipelineModule([relu, torch.tanh, relu, torch.tanh], 4).total_parameters == 0


@given(st.integers(1, 7))
def test_stages_hold_consecutive_layers_each_once(stages: int) -> None:
    module = PipelineModule(_layers(), num_stages=stages)
    assert module.bounds is not None
    built = [module.build_stage(stage) for stage in range(stages)]
    assert [(s.start, s.stop) for s in built] == list(itertools.pairwise(module.bounds))
    assert [i for s in built for i, _ in s.canonical_modules()] == list(range(7))


def test_a_single_layer_in_eval_mode_stays_in_it() -> None:
    frozen = nn.Sequential(nn.Dropout()).eval()
    mixed = PipelineModule([nn.Linear(2, 2), frozen], num_stages=1).build_stage(0)
    beside_a_spec = PipelineModule([LayerSpec(nn.Linear, 2, 2), frozen], num_stages=1).build_stage(0)
    for stage in (mixed, beside_a_spec):
        assert [layer.training for _, layer in stage.canonical_modules()] == [True, False]
