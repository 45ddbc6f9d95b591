import copy
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.data_pipeline.random_ltd import (
    RandomLayerTokenDrop,
    RandomLTDConfig,
    RandomLTDScheduler,
    convert_to_random_ltd,
)


def section(low=128, high=2048, steps=1000, multiple=16, **more):
    return {
        "enabled": True,
        "total_layer_num": 24,
        "random_ltd_layer_num": 22,
        "random_ltd_layer_id": list(range(1, 23)),
        "model_mask_name": "attention_mask",
        "model_type": "decoder",
        "hidden_state_order": "seq_batch_dim",
        "random_ltd_schedule": {
            "min_value": low,
            "max_value": high,
            "schedule_type": "fixed_linear",
            "schedule_config": {"require_steps": steps, "seq_per_step": multiple},
        },
        **more,
    }


def deepspeed_formula(step, low, high, steps, multiple):
    """Linear growth, rounded down twice: to a whole number and to a multiple."""
    value = math.floor(step / steps * (high - low) + low)
    return min(value - value % multiple, high)


def test_it_is_deepspeeds_formula_where_that_has_no_edges():
    scheduler = RandomLTDScheduler(section(steps=1024))  # a power of two: the formula's division is exact
    for step in range(1100):
        expected = deepspeed_formula(step, 128, 2048, 1024, 16)
        assert scheduler.update_seq(step) == scheduler.get_current_seq() == expected


@given(
    low=st.integers(1, 300),
    grow=st.integers(0, 3000),
    steps=st.integers(1, 2000),
    multiple=st.integers(1, 128),
    step=st.integers(0, 4000),
)
def test_never_below_the_minimum_never_above_the_maximum_and_there_at_the_end(low, grow, steps, multiple, step):
    scheduler = RandomLTDScheduler(section(low, low + grow, steps, multiple))
    value = scheduler.seq_at(step)
    assert low <= value <= low + grow
    assert scheduler.seq_at(step + 1) >= value
    assert value % multiple == 0 or value in (low, low + grow)
    if step >= steps:
        assert value == low + grow
    exact = low + min(step / steps, 1) * grow
    assert value > exact - multiple - 1 or value == low


def test_the_edges_that_deepspeed_has():
    assert deepspeed_formula(0, 100, 1000, 10, 16) == 96
    assert deepspeed_formula(10, 100, 1000, 10, 16) == 992
    scheduler = RandomLTDScheduler(section(100, 1000, 10, 16))
    assert scheduler.seq_at(0) == 100
    assert scheduler.seq_at(10) == 1000


def test_layer_tokens_are_counted_once_for_each_step():
    scheduler = RandomLTDScheduler(section(128, 256, 4, 32, global_batch_size=8))
    expected = 0
    for step in range(6):
        kept = [128, 160, 192, 224, 256, 256][step]
        expected += 8 * (22 * kept + 2 * 256)
        scheduler.update_seq(step)
        scheduler.update_seq(step)
        assert scheduler.consumed_layer_tokens == expected
    fresh = RandomLTDScheduler(section(128, 256, 4, 32, global_batch_size=8))
    assert fresh.get_total_layer_tokens(6) == expected
    assert fresh.consumed_layer_tokens == 0
    assert fresh.get_current_seq() == 128
    assert fresh.get_total_layer_tokens(0) == 0


def test_attached_layers_follow():
    model = nn.Sequential(*(RandomLayerTokenDrop(nn.Linear(2, 2), i) for i in (1, 5, 22)))
    scheduler = RandomLTDScheduler(section(128, 256, 4, 32))
    assert scheduler.attach(model) == 3
    assert scheduler.attach(model[0]) == 0
    assert [layer.reserved_length for layer in model] == [128] * 3
    scheduler.update_seq(2)
    assert [layer.reserved_length for layer in model] == [192] * 3
    scheduler.reset_to_init()
    assert [layer.reserved_length for layer in model] == [128] * 3
    with pytest.raises(ValueError, match="Linear has no layer that drops tokens"):
        scheduler.attach(nn.Linear(2, 2))


def three_of_four(**more):
    """A section for four layers of which three drop, all of whose rows have 8 tokens."""
    schedule = {"min_value": 4, "max_value": 8, "schedule_config": {"require_steps": 4, "seq_per_step": 1}}
    ids = more.pop("ids", [1, 2, 3])
    keys = {"total_layer_num": 4, "random_ltd_layer_num": len(ids), "random_ltd_layer_id": ids}
    return {**keys, "random_ltd_schedule": schedule, **more}


def four_linear(section=None):
    return convert_to_random_ltd(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), nn.Linear, section)


@pytest.mark.parametrize(
    ("model", "section", "message"),
    [
        (four_linear, three_of_four(), r"4 layers drop tokens, .* lists 3: random_ltd_layer_id=\[1, 2, 3\]"),
        (lambda: four_linear()[:2], three_of_four(), r"layers \[0\] drop tokens, .*random_ltd_layer_id=\[1, 2, 3\]"),
        (
            lambda: four_linear(three_of_four()),
            three_of_four(ids=[0, 1, 2, 3]),
            r"random_ltd_layer_id=\[0, 1, 2, 3\], but the model was converted with random_ltd_layer_id=\[1, 2, 3\]",
        ),
        (
            lambda: four_linear(three_of_four()),
            three_of_four(route="block"),
            "route=block, .*converted with route=layer",
        ),
    ],
)
def test_layers_that_were_converted_otherwise_are_refused(model, section, message):
    scheduler = RandomLTDScheduler(section)
    with pytest.raises(ValueError, match=message):
        scheduler.attach(model())
    assert scheduler.attach(four_linear(section)) == len(section["random_ltd_layer_id"])


def test_a_part_of_the_layers_and_layers_one_by_one_can_be_attached():
    section = three_of_four(route="block")
    model, scheduler = four_linear(section), RandomLTDScheduler({**section, "global_batch_size": 8})
    assert [scheduler.attach(part) for part in (model[:2], model[2], model)] == [1, 1, 1]
    assert RandomLTDScheduler(three_of_four()).attach(RandomLayerTokenDrop(nn.Linear(2, 2), 9)) == 1


@pytest.mark.parametrize(
    ("length", "more", "message"),
    [
        (9, {}, "rows have 9 tokens, but max_value=8: .* Set max_value to that length; or, .* sequence_length"),
        (9, {"sequence_length": 8}, "rows have 9 tokens, but sequence_length=8"),
        (5, {}, "to keep 6 tokens, but rows have 5: none is dropped"),
        (5, {"sequence_length": 8}, None),  # rows vary
        (7, {}, None),
        (8, {}, None),
        (9, {"sequence_length": 9}, None),
    ],
)
def test_rows_that_do_not_go_with_the_section_are_told_once(length, more, message):
    scheduler, model = RandomLTDScheduler(three_of_four(**more)), four_linear(three_of_four(**more))
    scheduler.attach(model)
    scheduler.update_seq(2)  # 6 tokens
    model.eval()(torch.zeros(1, 99, 2))  # eval mode drops nothing, however long its rows are
    scheduler.update_seq(2)
    model.train()(torch.zeros(1, length, 2))
    with pytest.warns(UserWarning, match=message) if message else nullcontext():
        scheduler.update_seq(2)
    scheduler.update_seq(3)


def test_switched_off_it_keeps_everything():
    layer = RandomLayerTokenDrop(nn.Linear(2, 2), reserved_length=5)
    scheduler = RandomLTDScheduler(section(128, 256, 4, 32, enabled=False))
    scheduler.attach(layer)
    scheduler.update_seq(0)
    assert layer.reserved_length is None
    assert scheduler.get_current_seq() == 256


@pytest.mark.parametrize("step", [-1, -3, 1.5, "2", True])
def test_a_step_that_cannot_be_is_refused_and_not_counted(step):
    scheduler = RandomLTDScheduler(section())
    with pytest.raises(ValueError, match=f"steps are whole numbers from 0, got global_steps={step!r}"):
        scheduler.update_seq(step)
    with pytest.raises(ValueError, match=f"steps are whole numbers from 0, got train_iters={step!r}"):
        scheduler.get_total_layer_tokens(step)
    for ask in (scheduler.seq_at, RandomLTDScheduler(layer_token_lr()).lr_factor_at):
        with pytest.raises(ValueError, match=f"steps are whole numbers from 0, got step={step!r}"):
            ask(step)
    assert scheduler.consumed_layer_tokens == 0


def test_state_goes_round():
    scheduler, layer = RandomLTDScheduler(section()), RandomLayerTokenDrop(nn.Linear(2, 2))
    for step in range(500):
        scheduler.update_seq(step)
    other = RandomLTDScheduler(section())
    other.attach(layer)
    other.load_state_dict(scheduler.state_dict())
    assert other.state_dict() == other.get_state() == scheduler.state_dict()
    assert layer.reserved_length == scheduler.get_current_seq() > 128
    scheduler.update_seq(500)
    other.update_seq(500)
    assert other.consumed_layer_tokens == scheduler.consumed_layer_tokens


@pytest.mark.parametrize(("sequence_length", "step", "kept"), [(None, 9, 8), (16, 9, 8), (None, 2, 6)])
def test_a_schedule_that_drops_to_the_end_does_so_when_its_state_is_loaded(sequence_length, step, kept):
    section = three_of_four() if sequence_length is None else three_of_four(sequence_length=sequence_length)
    scheduler, model = RandomLTDScheduler(section), four_linear(section)
    scheduler.update_seq(step)
    other = RandomLTDScheduler(section)
    other.attach(model)
    other.load_state_dict(scheduler.state_dict())
    assert [model[number].reserved_length for number in (1, 2, 3)] == [kept] * 3


@pytest.mark.parametrize("by", ["steps", "tokens"])
def test_a_very_long_schedule_is_counted_without_its_steps(by):
    """The sum over the steps before each length is reached, which lie evenly for a linear growth by whole steps."""
    a_step, steps = (1 if by == "steps" else 256), 10**9
    more = {f"require_{by}": 2 * steps * a_step, "end": 5 * steps * a_step, "seq_per_step": 64}
    config = by_tokens(1, low=128, high=256) if by == "tokens" else pace(128, 256)
    config["random_ltd_schedule"]["schedule_config"] = more
    config["global_batch_size"] = 1
    scheduler = RandomLTDScheduler(config)
    kept = [128, 192, 256, 256, 256, 256]
    expected = [sum(steps * (22 * one + 2 * 256) for one in kept[:number]) for number in range(7)]
    assert [scheduler.get_total_layer_tokens(number * steps) for number in range(7)] == expected
    assert scheduler.kept_lengths() == [128, 192, 256]


def test_a_state_of_another_schedule_is_refused():
    scheduler = RandomLTDScheduler(section())
    with pytest.raises(ValueError, match="max_value=2048, but the config says 128 and 1024"):
        RandomLTDScheduler(section(high=1024)).set_state(scheduler.state_dict())
    with pytest.raises(ValueError, match="lacks current_steps"):
        scheduler.set_state({name: 0 for name in scheduler.state_dict() if name != "current_steps"})


def test_deepspeeds_section_is_read_as_it_is():
    config = RandomLTDConfig.model_validate(section())
    assert config.random_ltd_layer_id == tuple(range(1, 23))
    assert config.hidden_state_order == "seq_batch_dim"
    more = section(
        global_batch_size=4, micro_batch_size=2, layer_token_lr_schedule={"enabled": False, "warmup_type": "linear"}
    )
    assert RandomLTDScheduler(more).config.global_batch_size == 4


def pace(low=128, high=2048, schedule_type="fixed_linear", section_keys=None, **more):
    """The section with a changed schedule_config."""
    config = section(low, high, **(section_keys or {}))
    config["random_ltd_schedule"]["schedule_type"] = schedule_type
    config["random_ltd_schedule"]["schedule_config"] = {"require_steps": 1000, "seq_per_step": 16, **more}
    return config


def by_tokens(tokens, **more):
    config = pace(**more)
    del config["random_ltd_schedule"]["schedule_config"]["require_steps"]
    config["random_ltd_schedule"]["schedule_config"]["require_tokens"] = tokens
    return config


def layer_token_lr(**more):
    return section(128, 256, 4, 32, layer_token_lr_schedule={"enabled": True, "total_layer_tokens": 60_000, **more})


@given(step=st.integers(0, 1100), degree=st.sampled_from([1.0, 2.0, 3.0, 0.5]))
def test_growth_by_a_root_is_deepspeeds_formula(step, degree):
    scheduler = RandomLTDScheduler(pace(schedule_type="fixed_root", root_degree=degree))
    exact = (min(step, 1000) / 1000) ** (1 / degree) * 1920 + 128
    assert scheduler.seq_at(step) == math.floor(exact) - math.floor(exact) % 16


def test_a_schedule_by_tokens():
    scheduler = RandomLTDScheduler(by_tokens(8_000_000))
    steps = RandomLTDScheduler(pace())
    for step in (0, 1, 499, 500, 999, 1000, 5000):
        # The same progress is reached whatever a step reads.
        assert scheduler.update_seq(7, tokens=8000 * step) == steps.seq_at(step) == scheduler.get_current_seq()
    with pytest.raises(ValueError, match=r"set global_batch_size in the section, or call update_seq\(step, tokens="):
        scheduler.update_seq(8)
    known = RandomLTDScheduler(by_tokens(1000 * 4 * 2048, section_keys={"global_batch_size": 4}))
    assert [known.seq_at(step) for step in range(0, 1100, 50)] == [steps.seq_at(step) for step in range(0, 1100, 50)]
    four = RandomLTDScheduler(section(global_batch_size=4))
    assert known.get_total_layer_tokens(1100) == four.get_total_layer_tokens(1100)


@given(start=st.integers(0, 50), length=st.integers(1, 60), steps=st.integers(1, 40), batch=st.integers(1, 3))
def test_start_and_end_of_dropping_and_the_count_of_a_run(start, length, steps, batch):
    config = pace(128, 256, start=start, end=start + length, require_steps=steps, section_keys={"sequence_length": 512})
    config["global_batch_size"] = batch
    scheduler, layer = RandomLTDScheduler(config), RandomLayerTokenDrop(nn.Linear(2, 2))
    scheduler.attach(layer)
    total, seen = 0, set()
    for step in range(start + length + steps + 3):
        kept = scheduler.update_seq(step)
        seen.add(kept)
        inside = start <= step < start + length
        assert layer.reserved_length == (kept if inside else None)
        assert kept <= 256 if inside else kept == 512
        if inside:
            assert kept == RandomLTDScheduler(pace(128, 256, require_steps=steps)).seq_at(step - start)
        total += batch * (22 * kept + 2 * 512)
        assert scheduler.get_total_layer_tokens(step + 1) == scheduler.consumed_layer_tokens == total
    assert scheduler.kept_lengths() == sorted(seen)
    assert scheduler.get_total_layer_tokens(10**9) > total


def test_the_learning_rate_by_layer_tokens():
    steps = [128, 160, 192, 224, 256, 256, 256]
    consumed = [0]
    for kept in steps:
        consumed.append(consumed[-1] + 22 * kept + 2 * 256)
    warm, total = consumed[2], consumed[6]
    keys = {"total_layer_tokens": total, "warmup_layer_tokens": warm}
    linear = RandomLTDScheduler(layer_token_lr(**keys))
    expected = [consumed[1] / warm, 1.0, *(1 - (one - warm) / (total - warm) for one in consumed[2:6]), 0.0]
    assert [linear.lr_factor_at(step) for step in range(7)] == pytest.approx(expected, abs=1e-12)
    assert linear.consumed_layer_tokens == 0
    cosine = RandomLTDScheduler(layer_token_lr(decay_type="cosine", min_ratio=0.25, **keys))
    half = (1 + math.cos(math.pi * (consumed[4] - warm) / (total - warm))) / 2
    assert cosine.lr_factor_at(4) == pytest.approx(0.25 + 0.75 * half)
    assert cosine.lr_factor_at(99) == 0.25
    log = RandomLTDScheduler(layer_token_lr(decay_type="constant", warmup_type="log", **keys))
    assert log.lr_factor_at(0) == pytest.approx(math.log(1 + consumed[1]) / math.log(1 + warm))
    assert log.lr_factor_at(1) == log.lr_factor_at(50) == 1.0
    with pytest.raises(ValueError, match=r"set layer_token_lr_schedule\.enabled"):
        RandomLTDScheduler(section()).lr_factor_at(0)


def test_the_rate_falls_later_than_by_steps_while_tokens_are_dropped():
    total = RandomLTDScheduler(section(128, 256, 4, 32)).get_total_layer_tokens(8)
    scheduler = RandomLTDScheduler(layer_token_lr(total_layer_tokens=total))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.lr_factor_at)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 2.0
    assert all(rate > 2.0 * (1 - step / 8) for step, rate in enumerate(rates) if step)
    assert optimizer.param_groups[0]["lr"] == 0.0


def changed(**paths):
    new = copy.deepcopy(section())
    for path, value in paths.items():
        *parents, last = path.split("__")
        inside = new
        for parent in parents:
            inside = inside[parent]
        if value is None:
            del inside[last]
        else:
            inside[last] = value
    return new


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(random_ltd_layer_nums=3), "unknown key 'random_ltd_layer_nums'; did you mean 'random_ltd_layer_num'"),
        (changed(random_ltd_schedule__min_vlaue=3), "random_ltd_schedule: unknown key 'min_vlaue'.*'min_value'"),
        (
            {"random_ltd": section()},
            "'random_ltd' is a table around the section, .*pass what stands under 'random_ltd'",
        ),
        (changed(total_layer_num=None), "total_layer_num: Field required"),
        (changed(random_ltd_layer_num=21), "random_ltd_layer_num=21 but random_ltd_layer_id lists 22 layers"),
        (changed(total_layer_num=22), "random_ltd_layer_id=22 is not a layer: .* 0..21"),
        (changed(random_ltd_layer_id=[1] * 22), r"lists \[1\] more than once"),
        (changed(random_ltd_schedule__min_value=4096), "min_value=4096 is larger than max_value=2048"),
        (changed(random_ltd_schedule__min_value=0), "min_value: .*greater than or equal to 1"),
        (changed(random_ltd_schedule__schedule_config__require_steps=0), "schedule_config.require_steps"),
        (changed(random_ltd_schedule__schedule_config__seq_per_step=2.5), "seq_per_step: .*integer"),
        (changed(random_ltd_schedule__schedule_type="fixed_sine"), "schedule_type: .*'fixed_linear' or 'fixed_root'"),
        (changed(random_ltd_schedule__schedule_type="fixed_root"), "fixed_root needs root_degree"),
        (changed(random_ltd_schedule__schedule_config__root_degree=2), "fixed_linear has none"),
        (changed(random_ltd_schedule__schedule_config__require_steps=None), "exactly one of require_steps and"),
        (changed(random_ltd_schedule__schedule_config__require_tokens=5), "exactly one of require_steps and"),
        (pace(start=7, end=7), "end=7 is not after start=7"),
        (section(sequence_length=1024), "max_value=2048 is more than sequence_length=1024"),
        (changed(model_type="other"), "model_type: .*'decoder' or 'encoder'"),
        (section(layer_token_lr_schedule={"enabled": True}), r"needs total_layer_tokens.*get_total_layer_tokens"),
        (layer_token_lr(total_layer_tokens=5, warmup_layer_tokens=6), "warmup_layer_tokens=6 is more than"),
        (layer_token_lr(warmup_type="log"), "warmup_type='log' without a warm-up; set warmup_layer_tokens"),
        (layer_token_lr(decay_type="constant", min_ratio=0.1), "min_ratio=0.1 with decay_type='constant'"),
        (layer_token_lr(warmup_type="cubic"), "warmup_type: .*'linear' or 'log'"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        RandomLTDScheduler(config)
