"""What steps read where that changes during a run: sizes, sequence lengths, the learning rate, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.token_budget import TokenBudget, TokenBudgetConfig
from penstock.runtime.batch_sizes import BatchSizes
from penstock.runtime.batching_section import SequenceLengthSection
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.feed import Feed
from penstock.runtime.sequence_lengths import SequenceLengths

changes = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 9)), max_size=4, unique_by=lambda pair: pair[0]).map(
    sorted
)


@given(changes, st.integers(1, 9), st.integers(1, 7), st.integers(0, 60))
def test_batch_sizes_step_by_step(pairs: list[tuple[int, int]], base: int, length: int, steps: int) -> None:
    sizes = BatchSizes(base, pairs, length)
    tokens = 0
    for _ in range(steps):
        expected = base
        for start, size in pairs:
            if tokens >= start:
                expected = size
        assert sizes.at(tokens) == expected
        tokens += expected * length
    assert sizes.tokens_after(steps) == tokens
    assert sizes.steps_within(tokens) == steps
    assert sizes.steps_within(tokens + sizes.at(tokens) * length - 1) == steps


def test_steps_of_growing_batches_take_the_order_in_turn() -> None:
    feed = Feed(4, 2, sizes=BatchSizes(4, [(8, 8)], 1), lr_scaling="sqrt")
    samples = 0
    seen: list[int] = []
    factors = []
    for number in range(4):
        step = feed.step(number, samples=samples, tokens=samples)
        assert len(step.batches) == 2
        seen += [k for batch in step.batches for k in batch.positions.tolist()]
        factors.append(step.lr_factor)
        samples += step.samples
    assert seen == list(range(24))
    assert factors == [1, 1, math.sqrt(2), math.sqrt(2)]
    assert feed.positions(3, 7).tolist() == [3, 4, 5, 6]


def test_weights_of_budgeted_micro_batches_make_a_mean_over_tokens() -> None:
    lengths = np.array([9, 1, 4, 4, 2, 7, 3, 3, 5])
    budget = TokenBudget(lengths, lambda k: k % 9, 9, 3, 0, TokenBudgetConfig(max_tokens=9))
    feed = Feed(4, 3, budget=budget, lr_scaling="linear")
    samples = 0
    while samples < 9:
        step = feed.step(0, samples=samples, tokens=0)
        tokens = [int(lengths[batch.positions].sum()) for batch in step.batches]
        counted = [count for count, batch in zip(tokens, step.batches, strict=True) if batch.weight]
        assert step.tokens == sum(counted)
        for count, batch in zip(tokens, step.batches, strict=True):
            assert batch.weight in (0, pytest.approx(3 * count / sum(counted)))
        assert step.lr_factor == step.samples / 4
        assert step.batches[0].first == samples
        samples += step.samples


def section(mode: str, levels: list[int], steps: list[int]) -> SequenceLengthSection:
    details = {"difficulty": levels, "max_step": steps}
    return SequenceLengthSection.model_validate(
        {"mode": mode, "schedule_type": "fixed_discrete", "schedule_config": details}
    )


def test_sequences_are_cut_off_or_cut_up() -> None:
    rows_BS = torch.arange(24).reshape(2, 12)
    cut = SequenceLengths.of(section("truncate", [5, 12], [3]), 12)
    assert cut.shaped({"ids": rows_BS, "weight": torch.ones(2)}, 3)["ids"].tolist() == rows_BS[:, :5].tolist()
    assert cut.shaped(rows_BS, 4) is rows_BS
    assert (cut.rows(2, 3), cut.at(3), cut.at(4)) == (2, 5, 12)
    up = SequenceLengths.of(section("reshape", [4, 12], [3]), 12)
    assert up.shaped((rows_BS, 7), 0)[0].tolist() == rows_BS.reshape(6, 4).tolist()
    assert (up.rows(2, 0), up.rows(2, 9)) == (6, 2)
    # What the layers compute, and what the plain run would have.
    for lengths, tokens, expected in ((cut, 20, (2, 5, 12)), (up, 48, (6, 4, 4))):
        feed = Feed(4, 2, lengths=lengths)
        shapes = feed.shapes(feed.step(0, samples=0, tokens=0), tokens)
        assert [(s.rows, s.length, s.plain_length) for s in shapes] == [expected] * 2


BASE: dict[str, Any] = {
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 6},
    "data": {"sequence_length": 10},
}


def test_the_length_of_a_run_follows_its_sizes() -> None:
    config = load_config({**BASE, "batching": {"sizes": [[160, 16]]}})
    assert config.tokens_of_run == 2 * 80 + 4 * 160
    by_tokens = {**BASE["train"], "steps": None, "total_tokens": 700}
    assert load_config({**BASE, "train": by_tokens, "batching": {"sizes": [[160, 16]]}}).total_steps == 2 + 3
    assert load_config({**BASE, "batching": {"token_budget": {"max_tokens": 33}}}).tokens_per_step == 4 * 33


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batching": {"sizes": [[100, 10]]}},
            "10 samples cannot be divided into a step's 4 micro",
        ),
        ({"batching": {"sizes": [[100, 8], [50, 12]]}}, "with rising tokens"),
        ({"batching": {"sizes": [[100, 8]], "token_budget": {"max_tokens": 9}}}, "keep one of them"),
        ({"batching": {"lr_scaling": "sqrt"}}, "has no effect where all steps have as many samples"),
        ({"batching": {"sizes": [[100, 8]]}, "data": {}}, "keyed by tokens; set data.sequence_length"),
        ({"data": {"sequence_length": 10, "cut": "powers"}}, "set batching.token_budget"),
        (
            {"batching": {"token_budget": {"max_tokens": 9}}, "random_ltd": {"min_tokens": 2, "steps": 3}},
            "batches of different lengths; keep one of them",
        ),
        (
            {
                "batching": {"token_budget": {"max_tokens": 9}},
                "sampling": {
                    "strategy": "curriculum",
                    "curriculum": {
                        "pacing": {"every": 2},
                        "metrics": {
                            "m": {
                                "values": [1, 2],
                                "schedule_type": "fixed_discrete",
                                "schedule_config": {"difficulty": [1, 2], "max_step": [1]},
                            }
                        },
                    },
                },
            },
            "a paced curriculum decides",
        ),
        (
            {"batching": {"sequence_length": {"mode": "truncate", "schedule_type": "fixed_linear"}}},
            "needs schedule_config",
        ),
    ],
)
def test_combinations_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({**BASE, **changes})


def test_lengths_that_do_not_fit_the_data() -> None:
    with pytest.raises(ValueError, match="ends at 16 tokens, but the data's sequences have 12"):
        SequenceLengths.of(section("truncate", [4, 16], [3]), 12)
    with pytest.raises(ValueError, match="rows of 12 tokens cannot be cut into equal parts of 5"):
        SequenceLengths.of(section("reshape", [4, 5, 12], [3, 4]), 12)
    with pytest.raises(ValueError, match=r"set data\.sequence_length"):
        SequenceLengths.of(section("truncate", [4, 5], [3]), None)
    with pytest.raises(ValueError, match="begins at 0"):
        section("truncate", [0, 5], [3])
