"""The planner: sizes against a whole stage, predictions against formulas, choices against all there are."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from penstock._core.batch_key import BatchKey
from penstock.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from penstock.pipe.planner import (
    WHOLE,
    Flow,
    LayerCosts,
    Prediction,
    Profile,
    best_bounds,
    kept_bytes,
    least_seconds,
    load_profiles,
    measure_layers,
    plan,
    plan_bounds,
    plan_lines,
    predict,
    save_profiles,
    select_recomputed,
)
from penstock.pipe.planner.bounds import all_bounds
from penstock.pipe.planner.report import ranges_of, size
from penstock.pipe.schedule import get_schedule, peak_memory

KEY = BatchKey(1, 0, 0)


class Pair(nn.Module):
    """Passes its first tensor on beside a new one, which nobody differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.linear(x)), torch.ones(3)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        return self.linear(value[0]).tanh()


class Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, gradient * x


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return Whole.apply(x, self.weight)


LAYERS = [
    LayerSpec(nn.Embedding, 7, 6),
    LayerSpec(nn.Linear, 6, 6),
    LayerSpec(nn.LayerNorm, 6),
    nn.ReLU(),
    LayerSpec(Pair),
    LayerSpec(Joined),
    LayerSpec(Custom),
    LayerSpec(nn.Linear, 10, 4),
]
TOKENS = torch.arange(5).repeat(2, 1)
TARGETS = torch.zeros(2, 5, 4)


def measured() -> list[LayerCosts]:
    module = PipelineModule(LAYERS, num_stages=1, loss_fn=nn.functional.mse_loss)
    stage = module.build_stage(0)
    names = [module.type_name(index) for index in range(len(LAYERS))]
    return measure_layers(
        stage,
        Flow.inputs(TOKENS),
        names=names,
        targets=TARGETS,
        loss_fn=module.loss_fn,
        key=KEY,
        more=lambda rounds: rounds < 2,
    )


def bytes_kept(stage: Any, value: Any, targets: Tensor | None) -> tuple[int, Any]:
    """What a forward pass of a whole stage keeps, counted on itself: every storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def tensors(value: Any) -> list[Tensor]:
        return list(value) if isinstance(value, tuple) else [value]

    if not stage.is_first:
        for tensor in tensors(value):
            keep(tensor)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(value, KEY)
        if targets is not None:
            output = nn.functional.mse_loss(output, targets)
    if targets is None:
        for tensor in tensors(output):
            keep(tensor)
    detached = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors(output))
    return sum(kept.values()), detached if isinstance(output, tuple) else detached[0]


@pytest.mark.parametrize("bounds", [[0, 8], [0, 1, 8], [0, 3, 5, 8], [0, 4, 6, 8], [0, 2, 3, 4, 5, 6, 7, 8]])
def test_the_layers_sizes_add_up_to_what_a_stage_keeps(bounds: list[int]) -> None:
    layers = measured()
    module = PipelineModule(LAYERS, num_stages=len(bounds) - 1, partition_method=bounds)
    value: Any = TOKENS
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        stage = module.build_stage(number)
        expected, value = bytes_kept(stage, value, TARGETS if stage.is_last else None)
        assert kept_bytes(layers, start, stop) == expected


def test_recomputed_groups_keep_their_inputs() -> None:
    layers = measured()
    row = 2 * 5 * 4  # bytes of a number at each position of each row
    assert kept_bytes(layers, 1, 5, interval=1) == 4 * 6 * row + (6 * row + 3 * 4)
    assert kept_bytes(layers, 1, 5, interval=2) == 2 * 6 * row + (6 * row + 3 * 4)
    # The loss comes after the last group: its inputs, the output and the targets, stay.
    assert kept_bytes(layers, 6, 8, interval=1) == 2 * 10 * row + 2 * 4 * row
    assert kept_bytes(layers, 0, 2, interval=4) == 6 * row


class Counted:
    """Bytes that a stage's graph holds: what is saved outside the recomputed layers, and what goes into those."""

    def __init__(self, stage: Any, value: Tensor, targets: Tensor | None) -> None:
        own = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        held: dict[int, Tensor] = {}

        def hold(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        if not stage.is_first:
            hold(value)
        for index, module in zip(range(stage.start, stage.stop), stage.layers.values(), strict=True):
            if index in stage.recomputed:
                if index > 0:
                    hold(value)
                value = module(value)
            else:
                with saved_tensors_hooks(hold, lambda tensor: tensor):
                    value = module(value)
        if targets is None:
            hold(value)
        else:
            with saved_tensors_hooks(hold, lambda tensor: tensor):
                nn.functional.mse_loss(value, targets)
        self.value = value.detach().requires_grad_()
        self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("recomputed", [(), (0,), (2, 3), (1, 4), (5,), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("bounds", [[0, 6], [0, 3, 6]])
def test_recomputed_layers_keep_their_inputs_alone(bounds: list[int], recomputed: tuple[int, ...]) -> None:
    specs = [
        LayerSpec(nn.Embedding, 7, 6),
        *(LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.LayerNorm, 6), LayerSpec(nn.Tanh)),
        *(LayerSpec(nn.GELU), LayerSpec(nn.Linear, 6, 4)),
    ]
    module = PipelineModule(
        specs, num_stages=len(bounds) - 1, partition_method=bounds, activation_checkpoint_layers=recomputed
    )
    layers = measure_layers(
        PipelineModule(specs, num_stages=1).build_stage(0),
        Flow.inputs(TOKENS),
        names=[module.type_name(index) for index in range(len(specs))],
        targets=TARGETS,
        loss_fn=nn.functional.mse_loss,
        key=KEY,
        more=lambda rounds: rounds < 1,
    )
    value = TOKENS
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        stage = module.build_stage(number)
        counted = Counted(stage, value, TARGETS if stage.is_last else None)
        value = counted.value
        assert kept_bytes(layers, start, stop, recomputed=recomputed) == counted.bytes


def test_layers_that_cannot_wait_are_named_with_the_reason() -> None:
    layers = measured()
    whole = [layer.name for layer in layers if layer.whole]
    assert whole == ["Custom"]
    assert "Whole" in layers[6].whole[0]


def layer(f: float = 1.0, b: float = 2.0, **more: Any) -> LayerCosts:
    return LayerCosts("Block", f, b, b / 2, b / 2, **more)


def uniform(count: int = 8, **more: Any) -> Profile:
    return Profile(1, tuple(layer(output=10, kept=100) for _ in range(count)), **more)


def test_predictions_are_those_of_the_formulas() -> None:
    layers = tuple(layer(output=10, kept=100, parameters=7, state=9, update=0.25) for _ in range(8))
    profile = Profile(1, layers, latency=0.01, seconds_per_byte=0.001, action=0.1, step=0.5)
    found = predict(profile, get_schedule("gpipe", 4, 6), (0, 2, 4, 6, 8))
    f, b, hop = 2 * 1.0 + 0.1, 2 * 2.0 + 0.1, 0.01 + 10 * 0.001
    assert found.timeline.makespan == pytest.approx((6 + 3) * (f + b) + 6 * hop)
    assert found.seconds == pytest.approx(found.timeline.makespan + 2 * 0.25 + 0.5)
    assert found.memory == (6 * 200 + 2 * 16,) * 4
    late = predict(replace(profile, reading=0.125), get_schedule("gpipe", 4, 6), (0, 2, 4, 6, 8))
    assert late.seconds == pytest.approx(found.seconds + 6 * 0.125)
    assert found.bubble == pytest.approx(1 - 6 * (f + b) / found.timeline.makespan)
    again = predict(profile, get_schedule("gpipe", 4, 6), (0, 2, 4, 6, 8), interval=1)
    assert again.timeline.makespan == pytest.approx((6 + 3) * (f + b + 2.0) + 6 * hop)
    split = predict(replace(profile, latency=0.0, seconds_per_byte=0.0), get_schedule("zb_h1", 2, 6), (0, 4, 8), 2)
    assert split.timeline.busy == pytest.approx((6 * (4.1 + 8.1 + 4.1),) * 2)


def test_tied_layers_count_once_on_a_stage() -> None:
    tied = layer(parameters=100, state=200, tie="embedding")
    profile = Profile(1, (tied, layer(parameters=5), tied))
    assert predict(profile, get_schedule("1f1b", 1, 1), (0, 3)).memory == (305,)
    assert predict(profile, get_schedule("1f1b", 2, 1), (0, 1, 3)).memory == (300, 305)


@given(
    loads=st.lists(st.floats(0.1, 10), min_size=2, max_size=7),
    stages=st.integers(1, 4),
    micro_batches=st.integers(1, 5),
)
@settings(max_examples=15)
def test_few_divisions_are_all_tried(loads: list[float], stages: int, micro_batches: int) -> None:
    stages = min(stages, len(loads))
    profile = Profile(1, tuple(layer(load, 2 * load) for load in loads))
    schedule = get_schedule("1f1b", stages, micro_batches)
    best = min(
        predict(profile, schedule, (0, *cuts, len(loads))).seconds
        for cuts in itertools.combinations(range(1, len(loads)), stages - 1)
    )
    assert predict(profile, schedule, plan_bounds(profile, schedule)).seconds == pytest.approx(best)


@given(loads=st.lists(st.floats(0.1, 10), min_size=4, max_size=9), stages=st.integers(2, 4))
def test_a_search_finds_the_shortest_longest_stage(loads: list[float], stages: int) -> None:
    def longest(bounds: tuple[int, ...]) -> float:
        return max(sum(loads[a:b]) for a, b in itertools.pairwise(bounds))

    expected = min(longest(bounds) for bounds in all_bounds(len(loads), stages))
    assert longest(best_bounds(loads, stages, longest, all_up_to=0)) == pytest.approx(expected)


def test_a_search_moves_several_cuts_at_once() -> None:
    # From 2, 2, 2 layers only moving both cuts helps: the score has a ridge.
    aim = (0, 1, 3, 6)

    def score(bounds: tuple[int, ...]) -> float:
        return {aim: 0.0, (0, 2, 4, 6): 1.0}.get(bounds, 2.0)

    assert best_bounds([1.0] * 6, 3, score, all_up_to=0) == aim


@given(
    times=st.lists(st.tuples(st.floats(0.1, 5.0), st.integers(0, 3)), min_size=8, max_size=10),
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"]),
    micro_batches=st.integers(1, 6),
    interval=st.integers(0, 2),
)
@settings(max_examples=15)
def test_the_bound_holds_and_passes_over_nothing_better(
    times: list[tuple[float, int]], schedule: str, micro_batches: int, interval: int
) -> None:
    layers = tuple(layer(f, f * (1 + kind), output=kind, state=kind, update=0.1 * kind) for f, kind in times)
    profile = Profile(1, layers, latency=0.1, seconds_per_byte=0.05, action=0.02, step=0.3, reading=0.01)
    table = get_schedule(schedule, 2, micro_batches)
    seconds = {}
    for bounds in all_bounds(len(layers), table.num_stages):
        seconds[bounds] = predict(profile, table, bounds, interval).seconds
        assert least_seconds(profile, table, bounds, interval) <= seconds[bounds] * (1 + 1e-9)
    if all(kind for _, kind in times):
        assert seconds[plan_bounds(profile, table, interval)] == pytest.approx(min(seconds.values()))


def test_divisions_that_cannot_be_better_are_not_scored() -> None:
    scored = []

    def score(bounds: tuple[int, ...]) -> float:
        scored.append(bounds)
        return float(bounds[1])

    found = best_bounds([1.0] * 8, 2, score, least=lambda bounds: bounds[1] - 0.5)
    assert found == (0, 1, 8)
    assert scored == [(0, 4, 8), (0, 1, 8)]


def test_a_heavy_head_gets_a_stage_with_few_layers() -> None:
    heavy = Profile(1, (*(layer() for _ in range(8)), layer(6.0, 12.0)))
    assert plan_bounds(heavy, get_schedule("1f1b", 2, 32)) == (0, 7, 9)


@given(
    times=st.lists(st.tuples(st.floats(0.1, 5.0), st.integers(50, 400)), min_size=2, max_size=6),
    share=st.floats(0.0, 1.2),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
)
@settings(max_examples=40)
def test_layers_are_recomputed_only_as_far_as_the_memory_asks(
    times: list[tuple[float, int]], share: float, schedule: str
) -> None:
    layers = tuple(layer(seconds, 2 * seconds, kept=kept, output=40) for seconds, kept in times)
    profile, table = Profile(1, layers), get_schedule(schedule, 1, 3)
    every = range(len(layers))

    def peak(chosen: tuple[int, ...]) -> int:
        return max(predict(profile, table, (0, len(layers)), recomputed=chosen).memory)

    low, high = peak(tuple(every)), peak(())
    memory = round(low + share * (high - low))
    subsets = [chosen for size in range(len(layers) + 1) for chosen in itertools.combinations(every, size)]
    fitting = [sum(layers[i].forward for i in chosen) for chosen in subsets if peak(chosen) <= memory]
    found = select_recomputed(profile, table, (0, len(layers)), memory)
    if found is None:
        assert not fitting or memory < low
        return
    assert peak(found) <= memory
    # At most one layer's time above the best, which all subsets tell.
    again = sum(layers[i].forward for i in found)
    assert again <= min(fitting) + max(x.forward for x in layers) + 1e-9
    assert all(peak(tuple(i for i in found if i != out)) > memory for out in found)


def test_under_a_limit_some_layers_are_recomputed_and_the_rest_is_kept() -> None:
    # Two cheap layers keep as much as two dear ones: recomputing those suffices.
    layers = tuple(layer(f, 2 * f, kept=1000, output=10, state=1) for f in (0.1, 1.0, 1.0, 0.1, 1.0, 1.0))
    profile = Profile(1, layers)
    whole = plan([profile], ranks=2, samples=8, schedules=["1f1b"]).best
    found = plan([profile], ranks=2, samples=8, schedules=["1f1b"], memory=max(whole.memory) - 500)
    assert found.best.recomputed
    assert set(found.best.recomputed) <= {0, 3}
    layouts = [(p.schedule.name, p.bounds, p.interval, p.recomputed) for p in predictions(found)]
    assert len(layouts) == len(set(layouts))
    full = [p for p in predictions(found) if p.interval == 1]
    assert whole.seconds < found.best.seconds < min(p.seconds for p in full)
    text = "\n".join(plan_lines(found))
    assert f"recomputing layers {','.join(map(str, found.best.recomputed))}" in text


def predictions(found: Any) -> list[Prediction]:
    return list(found.predictions)


def test_candidates_are_ranked_and_honest_about_memory() -> None:
    layers = tuple(layer(output=10, kept=100, parameters=10, state=10) for _ in range(8))
    profiles = [
        Profile(size, tuple(replace(x, forward=x.forward * size, kept=x.kept * size) for x in layers))
        for size in (1, 2, 3)
    ]
    free = plan(profiles, ranks=2, samples=8)
    seconds = [found.seconds for found in free.predictions]
    assert seconds == sorted(seconds)
    assert {found.micro_batch_size for found in free.predictions} == {1, 2}  # 3 does not divide 8
    assert {found.interval for found in free.predictions} == {0, 1}
    assert len({found.schedule.name for found in free.predictions}) == 10
    limit = max(free.best.memory) - 1
    short = plan(profiles, ranks=2, samples=8, memory=limit)
    assert all(max(found.memory) <= limit for found in short.predictions)
    assert short.too_large > 0
    assert short.best.seconds >= free.best.seconds
    for found in free.predictions:
        stages = [
            kept_bytes(profiles[found.micro_batch_size - 1].layers, a, b, found.interval)
            for a, b in itertools.pairwise(found.bounds)
        ]
        assert max(found.memory) >= max(peak_memory(found.schedule, [float(kept) for kept in stages]))
    tight = plan(profiles, ranks=2, samples=8, memory=300)
    assert tight.best.interval == 1
    text = "\n".join(plan_lines(tight))
    assert "recomputing every layer" in text
    assert f"{tight.too_large} do not fit in 300 B per rank" in text


def test_a_searched_schedule_is_never_slower() -> None:
    pytest.importorskip("ortools")
    profiles = [Profile(1, (*(layer(kept=10, output=1) for _ in range(4)), layer(3.0, 3.0, kept=10)))]
    free = plan(profiles, ranks=2, samples=4)
    searched = plan(profiles, ranks=2, samples=4, search_effort_s=1.0)
    assert searched.best.seconds <= free.best.seconds


def test_a_search_gives_each_rank_the_memory_that_its_own_weights_leave() -> None:
    pytest.importorskip("ortools")
    # The first rank is full of weights, the second keeps many activations: a fat vocabulary before its blocks.
    layers = (layer(kept=10, parameters=600, state=300), layer(kept=500, parameters=50, state=50))
    free, found = (
        plan([Profile(1, layers)], ranks=2, samples=4, memory=1000, schedules=["1f1b"], search_effort_s=effort)
        for effort in (0.0, 0.5)
    )
    assert max(found.best.memory) <= 1000
    assert len(found.predictions) == len(free.predictions) + 1


def test_a_search_splits_passes_only_where_schedules_that_do_were_asked_for() -> None:
    pytest.importorskip("ortools")
    found = plan([uniform(4)], ranks=2, samples=4, schedules=WHOLE, intervals=(0,), search_effort_s=0.1)
    assert {action.op for p in found.predictions for actions in p.schedule.ranks for action in actions} == {"F", "B"}
    with pytest.raises(ValueError, match=r"search_effort_s must be 0, which does not search, or more; got -5"):
        plan([uniform(4)], ranks=2, samples=4, search_effort_s=-5)


def test_no_choice_has_a_stage_that_a_run_would_refuse() -> None:
    # Most of the time goes by in layers without parameters.
    costs = [(1, True), (8, False), (16, True), (2, False), (8, False), (1, True), (16, False)]
    layers = tuple(layer(float(f), 2.0 * f, kept=1, state=int(trained)) for f, trained in costs)
    profiles = [Profile(rows, layers) for rows in (1, 2, 4, 8)]
    for found in plan(profiles, ranks=2, samples=16).predictions:
        assert all(any(x.state for x in layers[a:b]) for a, b in itertools.pairwise(found.bounds))
    with pytest.raises(ValueError, match="leaves one without trainable parameters"):
        plan(profiles, ranks=4, samples=16)


def test_one_rank_has_one_schedule() -> None:
    found = plan([uniform()], ranks=1, samples=4)
    assert [p.schedule.name for p in predictions(found)] == ["1f1b", "1f1b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 9, "samples": 4}, "9 pipeline ranks cannot share 8 layers; take 1 to 8"),
        ({"ranks": 2, "samples": 4, "memory": 5}, r"nothing fits in 5 bytes per rank: the least of \d+ layouts takes"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([uniform()], **arguments)


def test_sizes_that_do_not_divide_the_samples_are_refused() -> None:
    with pytest.raises(
        ValueError, match="5 samples per pipeline and step cannot be divided into micro-batches of 2, 3"
    ):
        plan([replace(uniform(), micro_batch_size=n) for n in (2, 3)], ranks=2, samples=5)


def test_stages_without_parameters_are_avoided() -> None:
    layers = (layer(state=1), layer(state=1), layer(5.0, 5.0), layer(5.0, 5.0))
    assert plan_bounds(Profile(1, layers), get_schedule("1f1b", 2, 4)) == (0, 1, 4)


def test_profiles_are_kept_in_files(tmp_path: Path) -> None:
    profiles = [Profile(2, (layer(whole=("it cannot",), tie="t"), layer()), 1e-4, 1e-9, 1e-5, 1e-3, 4)]
    save_profiles(profiles, tmp_path / "profile.json")
    assert load_profiles(tmp_path / "profile.json") == profiles
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json: is no penstock.profile file"):
        load_profiles(tmp_path / "other.json")
    text = (tmp_path / "profile.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace('"forward": 1.0', '"forward": -1.0'))
    with pytest.raises(ValueError, match=r"bad.json: Block: forward must be finite and not negative, got -1.0"):
        load_profiles(tmp_path / "bad.json")


def test_sizes_are_written_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**20, 5 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "3 MiB", "5 TiB"]


def test_runs_of_layers_are_drawn_together() -> None:
    assert [ranges_of(numbers) for numbers in ((4,), (0, 1, 2, 5), (1, 3, 4))] == ["4", "0-2,5", "1,3-4"]


def test_tied_layers_are_measured_where_they_share() -> None:
    tied = [
        TiedLayerSpec("e", nn.Embedding, 7, 6),
        LayerSpec(nn.Linear, 6, 6),
        TiedLayerSpec("e", nn.Embedding, 7, 6, forward_fn=lambda module, x: x @ module.weight.T),
    ]
    module = PipelineModule(tied, num_stages=1)
    stage = module.build_stage(0)
    found = measure_layers(
        stage,
        Flow.inputs(TOKENS),
        names=["a", "b", "c"],
        targets=TOKENS,
        loss_fn=lambda y, t: nn.functional.cross_entropy(y.flatten(0, 1), t.flatten()),
        key=KEY,
        more=lambda rounds: rounds < 1,
    )
    assert [layer.name for layer in found] == ["a", "b", "c"]
    assert found[2].kept > 0
    assert found[0].output == found[1].output == 2 * 5 * 6 * 4
    assert found[2].output == 0
