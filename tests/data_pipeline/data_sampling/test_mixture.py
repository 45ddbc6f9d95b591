"""Mixtures: exact counts at every prefix, any position by itself, and corpora that repeat or do not."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.data_pipeline.data_sampling import DataSampler, IndexedDatasetBuilder
from penstock.data_pipeline.data_sampling.turns import FINEST, Turns, exact_shares
from penstock.runtime.config import load_config
from penstock.runtime.evaluation import training_counts

Stages = list[tuple[int, list[int]]]


@st.composite
def stages(draw: st.DrawFn) -> Stages:
    sources = draw(st.integers(1, 7))
    weights = st.lists(st.integers(0, 40), min_size=sources, max_size=sources).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 200), max_size=3)))
    return [(start, draw(weights)) for start in [0, *starts]]


@settings(max_examples=25, deadline=None)
@given(stages(), st.data())
def test_counts_are_within_one_of_the_sum_of_shares_at_every_prefix(stages: Stages, data: st.DataObject) -> None:
    length = stages[-1][0] + 150
    turns = Turns(stages)
    sources, ranks = turns(np.arange(length))
    counts, ideal = [0] * len(stages[0][1]), [Fraction(0)] * len(stages[0][1])
    for k in range(length):
        weights = [weights for start, weights in stages if start <= k][-1]
        ideal = [at + Fraction(weight, sum(weights)) for at, weight in zip(ideal, weights, strict=True)]
        assert ranks[k] == counts[sources[k]]
        counts[sources[k]] += 1
        assert all(abs(count - at) < 1 for count, at in zip(counts, ideal, strict=True))
    # Any position by itself, and asked for first.
    k = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=9)))
    assert [part.tolist() for part in Turns(stages)(k)] == [sources[k].tolist(), ranks[k].tolist()]
    assert Turns(stages).counts(int(k[0])).sum() == k[0]


def test_positions_far_away_need_no_turns_before_them() -> None:
    turns = Turns([(0, [0.7, 0.2, 0.1]), (10**12 + 3, [1, 0, 3])])
    far = 2 * 10**12
    # (10**12 + 3) * 0.7 + (10**12 - 3) / 4, and so on, each within one.
    ideals = [Fraction(7, 10) * (10**12 + 3) + Fraction(10**12 - 3, 4), Fraction(2, 10) * (10**12 + 3)]
    assert turns.counts(far).sum() == far
    assert all(abs(count - ideal) < 1 for count, ideal in zip(turns.counts(far), ideals, strict=False))
    assert sum(len(stretch.sources) for stretch in turns._stretches) < 100


def test_weights_are_exact_fractions_until_they_are_too_fine() -> None:
    assert exact_shares([0.7, 0.3]) == [7, 3]
    assert exact_shares([1 / 3, 1 / 3, 1 / 3]) == [1, 1, 1]
    assert exact_shares([0.123457, 0.876543]) == [123457, 876543]
    fine = exact_shares([10**9 + 7, 10**9, 1])
    assert sum(fine) == FINEST
    assert fine[2] == 1
    assert abs(fine[0] - fine[1]) <= 2


def mixture(**corpora: Any) -> dict[str, Any]:
    return {"batch_size": 4, "mixture": {"corpora": corpora}}


def test_each_corpus_is_read_whole_before_it_repeats_and_each_pass_is_shuffled_anew() -> None:
    data = {"a": np.arange(30), "b": 100 + np.arange(7)}
    config = mixture(a={"weight": 2}, b={"weight": 1, "repeat": True})
    sampler = DataSampler(data, config)
    assert sampler.num_samples in (44, 45, 46)  # 30 samples at two thirds: nobody says how long else
    seen = [int(sampler.data[index]) for index in sampler.sample_at(np.arange(45))]
    first, second = [x for x in seen if x < 100], [x for x in seen if x >= 100]
    assert sorted(first) == sorted(set(first))
    assert len(first) in (29, 30)
    assert sorted(second[:7]) == sorted(second[7:14]) == list(range(100, 107))
    assert second[:7] != second[7:14]
    replicas = [DataSampler(data, {**config, "num_samples": 40, "num_replicas": 2, "rank": rank}) for rank in (0, 1)]
    batches = [x for pair in zip(*replicas, strict=True) for half in pair for x in half]
    assert [int(sampler.data[index]) for index in batches] == seen[:40]


def test_a_corpus_that_is_used_up_is_refused_with_the_numbers() -> None:
    data = {"a": np.arange(30), "b": np.arange(7)}
    with pytest.raises(ValueError, match=r"60 samples take 20 of the corpus 'b', which has 7; set its repeat"):
        DataSampler(
            data, {**mixture(a={"weight": 2, "repeat": True}, b={"weight": 1}), "num_samples": 60, "batch_size": 1}
        )
    with pytest.raises(ValueError, match="no weight for the corpus 'b'"):
        DataSampler(data, mixture(a={"weight": 2}))
    with pytest.raises(ValueError, match="all weights are 0"):
        DataSampler(data, mixture(a={"weight": [[0, 1], [5, 0]]}, b={"weight": 0}))
    with pytest.raises(ValueError, match="needs its corpora by name"):
        DataSampler(np.arange(9), mixture(a={"weight": 1}))


def test_a_state_goes_on_in_the_same_order_and_no_other() -> None:
    data = {"a": np.arange(40), "b": np.arange(40)}
    config = {**mixture(a={"weight": [[0, 3], [4, 1]]}, b={"weight": 1}), "num_samples": 40}
    whole = list(DataSampler(data, config))
    sampler = DataSampler(data, config)
    sampler.mark_trained(3)
    resumed = DataSampler(data, config)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == whole[3:]
    # Four steps at 3 to 1, six at 1 to 1; step 4 is position 16.
    assert sampler.mixture is not None
    assert sampler.mixture.counts(16) == {"a": 12, "b": 4}
    assert sampler.mixture.counts(40) == {"a": 24, "b": 16}
    # Names in another order, as a configuration's copy may have them, are the same order of samples.
    named = {"b": data["b"], "a": data["a"]}
    corpora = dict(reversed(config["mixture"]["corpora"].items()))
    renamed = DataSampler(named, {**config, "mixture": {"corpora": corpora}})
    assert renamed.fingerprint() == sampler.fingerprint()
    assert list(renamed) == whole
    other = DataSampler(data, {**config, **mixture(a={"weight": [[0, 3], [5, 1]]}, b={"weight": 1})})
    with pytest.raises(ValueError, match="belongs to another order"):
        other.load_state_dict(sampler.state_dict())


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    for name, documents, token in (("web", 41, 1), ("code", 12, 2)):
        with IndexedDatasetBuilder(tmp_path / name, np.uint16) as builder:
            builder.add_items([np.full(8, token)] * documents, documents=True)
    corpora = {"web": {"weight": [[0, 9], [320, 1]]}, "code": {"weight": 1, "repeat": True}}
    return {
        "model": {"vocab_size": 8, "num_layers": 1, "hidden_size": 8, "num_heads": 1, "context": 8},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "steps": 12},
        "data": {"train": {"web": str(tmp_path / "web"), "code": str(tmp_path / "code")}},
        "sampling": {"mixture": {"corpora": corpora, "by": "tokens"}},
    }


def test_a_run_names_its_corpora_and_changes_weights_by_tokens(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["order", str(tmp_path / "run.json"), "--to", "48"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split("\t") for line in shown.output.splitlines()[1:]]
    names = [row[4] for row in rows]
    # 320 tokens are 40 windows of 8: there nine tenths are of the web, after it a half.
    assert names[:40].count("web") == 36
    assert names[40:].count("web") == 4
    assert len({row[3] for row in rows if row[4] == "web"}) == 40  # 40 windows, none of them twice
    long = {**config, "train": {**config["train"], "steps": 40}}
    (tmp_path / "run.json").write_text(json.dumps(long))
    refused = CliRunner().invoke(app, ["order", str(tmp_path / "run.json")])
    assert "take 96 of the corpus 'web', which has 40" in refused.output


def test_what_does_not_fit_a_mixture_is_refused(config: dict[str, Any]) -> None:
    one = {**config, "data": {"train": config["data"]["train"]["web"]}}
    with pytest.raises(ValueError, match="table of paths"):
        load_config(one)
    with pytest.raises(ValueError, match=r"give their weights in sampling\.mixture"):
        load_config({**config, "sampling": {}})
    with pytest.raises(ValueError, match="keep one of them"):
        load_config({**config, "batching": {"token_budget": {"max_tokens": 64}}})
    with pytest.raises(ValueError, match="leave one of them out"):
        load_config({**config, "sampling": {**config["sampling"], "strategy": "stratified", "labels": [0]}})


def test_the_unigram_model_counts_tables_and_mixtures(config: dict[str, Any], tmp_path: Path) -> None:
    counts = training_counts(load_config(config), 4)
    # At the end both weigh alike; 328 tokens of 1, 96 of 2.
    assert counts.tolist() == [0, 164, 164, 0]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"input_ids": [[1, 2, 5], [2, 2, 0]]}), tmp_path / "rows.parquet")
    table = {**config, "sampling": {}, "data": {"train": str(tmp_path / "rows.parquet")}}
    assert training_counts(load_config(table), 4).tolist() == [1, 1, 3, 0, 0, 1]
