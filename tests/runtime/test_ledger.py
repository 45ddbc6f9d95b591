import io
import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock._core.meter import ACTIVATIONS, REPLICAS
from penstock.models import GPTConfig, gpt_flops, gpt_head_flops, gpt_layer_flops
from penstock.runtime.ledger import Ledger, chain, merge, peak_memory
from penstock.runtime.summary import render, summarize

GPT = GPTConfig(vocab_size=64, num_layers=3, hidden_size=16, num_heads=2, context_length=32)


def block(tokens: int, seq_len: int) -> int:
    return gpt_layer_flops(GPT, tokens, seq_len)


def test_flops_and_layer_tokens_of_a_dropping_gpt() -> None:
    """Two steps of a GPT whose middle block keeps 8 of 32 tokens, against the model's own formula for the whole."""
    formulas = {1: block, 2: block, 3: block, 5: lambda tokens, _: gpt_head_flops(GPT, tokens)}
    ledger = Ledger(layer_flops=formulas)
    for _ in range(2):
        for layer in formulas:
            ledger.count_layer(layer, rows=4, seq_len=32, kept=8 if layer == 2 else None)
    assert ledger.spent["flops"] == 2 * 3 * gpt_flops(GPT, 4, 32, dropping_layers=1, kept=8)
    assert ledger.plain["flops"] == 2 * 3 * gpt_flops(GPT, 4, 32)
    assert ledger.layer_tokens == {1: (256, 256), 2: (64, 256), 3: (256, 256), 5: (256, 256)}


def test_recomputation_costs_a_forward_pass_more_than_the_plain_run() -> None:
    ledger = Ledger(layer_flops={0: block, 1: block}, recomputed=[1])
    ledger.count_layer(0, rows=1, seq_len=10)
    ledger.count_layer(1, rows=1, seq_len=10)
    assert ledger.spent["flops"] == (3 + 4) * block(10, 10)
    assert ledger.plain["flops"] == (3 + 3) * block(10, 10)


def test_a_shorter_sequence_is_set_beside_the_full_one() -> None:
    ledger = Ledger(layer_flops={0: block})
    ledger.count_read(4, 4 * 8, plain_tokens=4 * 32)
    ledger.count_layer(0, rows=4, seq_len=8, kept=100, plain_seq_len=32)
    summary = summarize(ledger.state_dict())
    assert summary["raw_tokens"] == {"spent": 32, "plain": 128, "saved": 0.75}
    assert summary["layer_tokens"] == {"spent": 32, "plain": 128, "saved": 0.75}
    assert summary["flops"]["plain"] == 3 * block(128, 32)


@given(nbytes=st.integers(0, 10**12), replicas=st.integers(1, 64), steps=st.integers(1, 5))
def test_the_plain_exchange_is_a_ring_all_reduce(nbytes: int, replicas: int, steps: int) -> None:
    ledger = Ledger()
    for _ in range(steps):
        ledger.count_plain_exchange(nbytes, replicas)
    assert ledger.plain["replica_bytes"] == steps * (2 * (replicas - 1) * nbytes // replicas)


def rank(layer: int, *, first: bool, seconds: float) -> Ledger:
    """One of two stages, as an engine counts it in a step of 4 sequences of 16 tokens."""
    ledger = Ledger(layer_flops={layer: block}, plain_bubble=0.2)
    if first:
        ledger.count_read(4, 64)
    ledger.count_layer(layer, rows=4, seq_len=16, kept=4)
    ledger.count_plain_exchange(1000, 2)
    ledger.meter.count(REPLICAS, sent=40, received=30)
    ledger.meter.count(ACTIVATIONS, sent=7, received=8)
    ledger.count_step(seconds, seconds / 4)
    return ledger


def test_summary_over_ranks() -> None:
    states = [rank(1, first=True, seconds=2.0).state_dict(), rank(2, first=False, seconds=4.0).state_dict()]
    summary = summarize(merge(states))
    assert (summary["steps"], summary["ranks"]) == (1, 2)
    assert summary["samples"] == {"spent": 4, "plain": 4, "saved": 0.0}
    assert summary["raw_tokens"]["spent"] == 64
    assert summary["layer_tokens"] == {"spent": 32, "plain": 128, "saved": 0.75}
    assert summary["layers"]["2"] == {"spent": 16, "plain": 64, "saved": 0.75}
    assert summary["flops"]["spent"] == 2 * 3 * block(16, 4)
    assert summary["bytes_sent"] == {
        "replicas": {"spent": 80, "plain": 2000, "saved": 0.96},
        "activations": {"spent": 14, "plain": 14, "saved": 0.0},
    }
    assert summary["bytes_received"]["replicas"]["spent"] == 60
    assert summary["bubble_fraction"] == {"spent": 0.25, "plain": 0.2, "saved": pytest.approx(-0.25)}
    assert summary["bubble_s"]["spent"] == 1.5
    assert summary["wall_s"] == {"spent": 4.0, "plain": None, "saved": None}
    assert summary["peak_memory_bytes"]["rss"]["spent"] > 1 << 20


def test_merging_does_not_depend_on_the_grouping() -> None:
    states = [rank(layer, first=layer == 1, seconds=float(layer)).state_dict() for layer in (1, 2, 11)]
    together = merge(states)
    assert merge([merge(states[:2]), states[2]]) == together
    assert merge([together]) == together
    assert list(together["layer_tokens"]) == ["1", "2", "11"]
    with pytest.raises(ValueError, match="no ledger"):
        merge([])


def test_peak_memory_and_time_are_those_of_the_worst_process() -> None:
    low, high = (rank(1, first=True, seconds=s).state_dict() for s in (3.0, 1.0))
    low["peak_memory"], high["peak_memory"] = {"rss": 5, "cuda": 9}, {"rss": 7}
    merged = merge([low, high])
    assert merged["peak_memory"] == {"rss": 7, "cuda": 9}
    assert merged["slowest_s"] == 3.0
    assert merged["seconds"]["steps"] == 4.0


def test_stop_and_resume_counts_as_one_run() -> None:
    whole = rank(1, first=True, seconds=2.0)
    first, second = rank(1, first=True, seconds=2.0), Ledger(layer_flops={1: block}, plain_bubble=0.2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for ledger in (whole, second):
        ledger.count_layer(1, rows=4, seq_len=16)
        ledger.meter.count(REPLICAS, sent=5)
        ledger.meter.add_seconds("compute", 0.5)
        ledger.count_step(1.0)
    a, b = whole.state_dict(), second.state_dict()
    assert a.pop("peak_memory").keys() == b.pop("peak_memory").keys()
    assert a == b
    with pytest.raises(ValueError, match="sum over 2 ranks"):
        second.load_state_dict(merge([first.state_dict(), first.state_dict()]))


def test_peak_memory_never_falls() -> None:
    before = peak_memory()["rss"]
    block = bytearray(32 << 20)
    for page in range(0, len(block), 4096):
        block[page] = 1
    del block
    assert peak_memory()["rss"] >= before


def text_of(ledger_state: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render(summarize(ledger_state)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_spent_beside_plain() -> None:
    ledger = Ledger(layer_flops={0: partial(gpt_layer_flops, GPT)})
    ledger.count_plain_exchange(3_000_000, 2)
    ledger.meter.count(REPLICAS, sent=100_000, received=100_000)
    ledger.count_read(10, 12_345)
    ledger.count_step(2.0, 0.5)
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:5]
        for line in text_of(ledger.state_dict()).splitlines()
        if "│" in line
    }
    assert [cell.strip() for cell in lines["sent, between replicas"]] == ["100 kB", "3 MB", "96.7 % (30.0x fewer)"]
    assert [cell.strip() for cell in lines["raw tokens read"]] == ["12.3 k", "12.3 k", "0.0 %"]
    assert [cell.strip() for cell in lines["wall-clock"]] == ["2.0 s", "", ""]
    assert [cell.strip() for cell in lines["bubble, of all steps' time"]] == ["25.0 %", "", ""]


def test_what_costs_more_than_the_plain_run_is_said_to() -> None:
    ledger = Ledger(plain_bubble=0.2)
    ledger.count_step(2.0, 0.5)
    assert "20.0 % │ 25.0 % more" in text_of(ledger.state_dict())


def test_an_empty_ledger_renders() -> None:
    assert "optimizer steps" in text_of(Ledger().state_dict())


def test_a_run_resumed_on_another_layout_adds_to_what_it_spent_before() -> None:
    def part(steps: int, seconds: float, ranks: int) -> dict[str, object]:
        ledgers = [Ledger(plain_bubble=0.5 / ranks) for _ in range(ranks)]
        for ledger in ledgers:
            ledger.count_read(4, 40)
            ledger.meter.count(REPLICAS, sent=7)
            for _ in range(steps):
                ledger.count_step(seconds)
        return merge(ledger.state_dict() for ledger in ledgers)

    whole = chain(part(3, 0.5, 4), part(2, 0.25, 2))
    assert whole["ranks"] == 2
    assert whole["spent"] == {"samples": 24, "tokens": 240, "steps": 5}
    assert whole["slowest_s"] == 3 * 0.5 + 2 * 0.25
    assert whole["meter"]["sent"] == {REPLICAS: 42}
    assert whole["plain_bubble"] == 0.25
    assert summarize(whole)["wall_s"]["spent"] == 2.0
