import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.datasets import (
    IGNORED,
    IndexedDataset,
    IndexedDatasetBuilder,
    PackedDocuments,
    cumulative_lengths,
    document_mask,
)
from penstock.data_pipeline.datasets.bins import best_fit
from penstock.models.gpt import GPTConfig, gpt_model


def by_the_book(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, one item after another."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if capacity - sum(b) >= length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_bins_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit(lengths, capacity)
    found = [[lengths[i] for i in bins.items[a:b]] for a, b in zip(bins.starts[:-1], bins.starts[1:], strict=True)]
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    # Which of two equally full bins takes an item is left open; how full the bins get is not.
    assert sorted(map(sum, found)) == sorted(map(sum, by_the_book(lengths, capacity)))
    if lengths:
        assert bins.padding == pytest.approx(1 - sum(lengths) / (len(found) * capacity))


def test_a_million_items_are_packed_in_a_few_steps() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(np.int64).clip(1, 2048)
    bins = best_fit(lengths, 2048)
    sums = np.add.reduceat(lengths[bins.items], bins.starts[:-1])
    assert int(sums.max()) <= 2048
    assert bins.padding < 1e-4


def test_items_that_do_not_fit_are_refused() -> None:
    for lengths in ([5], [0], [[1]]):
        with pytest.raises(ValueError, match="items of 1 to capacity=4 can be packed"):
            best_fit(lengths, 4)


def corpus(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_items(documents, documents=True)
    return IndexedDataset(prefix)


@given(st.lists(st.lists(st.integers(1, 40), max_size=20), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=40)
def test_every_next_token_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int
) -> None:
    source = corpus(tmp_path_factory.mktemp("packed") / "d", documents)
    expected = sorted(pair for document in documents for pair in pairwise(document))
    if not expected:
        with pytest.raises(ValueError, match="no document has two tokens"):
            PackedDocuments(source, length)
        return
    packed = PackedDocuments(source, length)
    found = []
    for inputs, labels in packed:  # type: ignore[attr-defined]
        ids, owners = inputs["input_ids"].tolist(), inputs["document_ids"].tolist()
        counted = [(a, b) for a, b in zip(ids, labels.tolist(), strict=True) if b != IGNORED]
        found += counted
        assert owners == sorted(owners)
        firsts = {owner: owners.index(owner) for owner in owners}
        assert inputs["position_ids"].tolist() == [place - firsts[owner] for place, owner in enumerate(owners)]
        for place in range(length - 1):
            if labels[place] != IGNORED and owners[place] == owners[place + 1]:
                assert labels[place] == ids[place + 1]
    assert sorted(found) == expected
    copy = pickle.loads(pickle.dumps(packed))
    assert torch.equal(copy[-1][0]["input_ids"], packed[-1][0]["input_ids"])


def packed_batch(tmp_path: Path) -> tuple[PackedDocuments, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(1)
    source = corpus(tmp_path / "d", [rng.integers(1, 50, n).tolist() for n in (9, 4, 7, 3, 12, 5)])
    packed = PackedDocuments(source, 16)
    rows = [packed[i][0] for i in range(len(packed))]
    return packed, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_reference_model_sees_one_document_at_a_time(tmp_path: Path, positions: str) -> None:
    config = GPTConfig(vocab_size=50, num_layers=2, hidden_size=16, num_heads=2, context_length=16, positions=positions)  # type: ignore[arg-type]
    model = gpt_model(config).double().eval()
    _, batch = packed_batch(tmp_path)
    with torch.no_grad():
        together = model(batch)
        for row, owners in enumerate(batch["document_ids"]):
            for owner in owners.unique():
                places = (owners == owner).nonzero().flatten()
                alone = model(batch["input_ids"][row, places][None])[0]
                torch.testing.assert_close(together[row, places], alone)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_hugging_face_model_sees_one_document_at_a_time(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "Llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes))
    model = model.double().eval()
    _, batch = packed_batch(tmp_path)
    mask = document_mask(batch["document_ids"])
    with torch.no_grad():
        together = model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
        for row, owners in enumerate(batch["document_ids"]):
            for owner in owners.unique():
                places = (owners == owner).nonzero().flatten()
                alone = model(batch["input_ids"][row, places][None]).logits[0]
                torch.testing.assert_close(together[row, places], alone)


def test_lengths_for_kernels_over_sequences_of_varying_length() -> None:
    owners = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    ends, longest = cumulative_lengths(owners)
    assert ends.tolist() == [0, 2, 5, 6, 8, 10]
    assert ends.dtype == torch.int32
    assert longest == 3


def test_packing_is_a_setting_of_a_run(tmp_path: Path) -> None:
    import penstock
    from penstock.models.gpt import gpt_layers, gpt_loss
    from penstock.pipe import PipelineModule

    rng = np.random.default_rng(2)
    corpus(tmp_path / "d", [rng.integers(1, 50, n).tolist() for n in rng.integers(2, 30, 40)])
    shape = GPTConfig(vocab_size=50, num_layers=2, hidden_size=16, num_heads=2, context_length=16)
    config = {
        "data": {"train": str(tmp_path / "d"), "sequence_length": 16, "cut": "packed"},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 2},
    }
    model = PipelineModule(gpt_layers(shape), num_stages=1, loss_fn=gpt_loss)
    with penstock.initialize(model, config) as engine:
        assert float(engine.train_batch()) == pytest.approx(np.log(50), rel=0.1)


def test_what_cannot_be_packed_or_masked_is_refused_with_the_remedy() -> None:
    for wrong in ("data/code", [[1, 2, 3], [4, 5]]):
        with pytest.raises(ValueError, match=f"packing takes an IndexedDataset.*, got {type(wrong).__name__}; write"):
            PackedDocuments(wrong, 4)  # type: ignore[arg-type]
    for take in (document_mask, cumulative_lengths):
        with pytest.raises(ValueError, match=r"\[batch, length\], got \[5\]; of one row take document_ids\[None\]"):
            take(torch.zeros(5, dtype=torch.int64))
