from pathlib import Path

import pytest

from penstock._core.files import read_manifest
from penstock.data_pipeline.data_sampling import DataSampler
from penstock.data_pipeline.datasets import TokenWindows
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.runtime import demo
from penstock.runtime.config import load_config
from penstock.runtime.main_job import reference_model
from penstock.runtime.preparation import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MAX_CORPUS_BYTES", 1_500_000)
        demo.prepare_corpus(folder, print)
    return folder


def test_the_corpus_is_sealed_and_its_counts_are_right(corpus: Path) -> None:
    facts = read_manifest(corpus)
    for name in ("train", "heldout"):
        dataset = IndexedDataset(corpus / name)
        assert facts["parts"][name]["tokens"] == len(dataset.tokens)
        assert facts["parts"][name]["documents"] == dataset.num_documents


def test_no_file_is_in_both_parts(corpus: Path) -> None:
    def documents(name: str) -> set[bytes]:
        dataset = IndexedDataset(corpus / name)
        return {dataset[i].tobytes() for i in range(len(dataset))}

    assert not documents("train") & documents("heldout")


def test_an_intact_corpus_is_used_again_and_a_damaged_one_is_built_anew(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MAX_CORPUS_BYTES", 1_500_000)
    said: list[str] = []
    before = (corpus / "train.bin").stat().st_mtime_ns
    demo.prepare_corpus(corpus, said.append)
    assert not said
    assert (corpus / "train.bin").stat().st_mtime_ns == before
    whole = (corpus / "train.bin").read_bytes()
    (corpus / "train.bin").write_bytes(whole[:-2])
    demo.prepare_corpus(corpus, said.append)
    assert said
    assert (corpus / "train.bin").read_bytes() == whole


def test_the_configuration_is_in_order(corpus: Path) -> None:
    config = load_config({**demo.demo_config(corpus), "output": str(corpus.parent / "run")})
    model = reference_model(config)
    assert 2_000_000 <= model.total_parameters <= 3_000_000
    prepared = prepare(model, config, world_size=4)
    assert prepared.dropping is not None
    assert isinstance(prepared.order, DataSampler)
    assert isinstance(prepared.dataset, TokenWindows)
    easy, hard = prepared.order.difficulty_at(0), prepared.order.difficulty_at(10**9)
    assert easy == {demo.METRIC: 30}
    assert hard == {demo.METRIC: 100}
