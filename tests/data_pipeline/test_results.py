import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.data_pipeline import load_weights, process_and_save_results, save_weights


def test_numbers_are_json_and_tensors_lie_beside(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    results = [
        {"step": 0, "loss": torch.tensor(1.5), "n": np.int64(3), "flag": True, "note": None},
        {"step": 1, "loss": float("inf"), "bad": float("nan"), "outputs": {"a": shared.view(2, 3), "b": [shared[:2]]}},
        {"step": 2, "outputs": np.arange(2, dtype=np.int32), "half": torch.ones(1, 2, dtype=torch.bfloat16)},
    ]
    path = process_and_save_results(results, tmp_path / "out" / "r.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"step": 0, "loss": 1.5, "n": 3, "flag": True, "note": None}
    assert (rows[1]["loss"], rows[1]["bad"]) == ("inf", "nan")
    assert rows[1]["outputs"]["a"] == {"tensor": "000001.outputs.a", "shape": [2, 3], "dtype": "float32"}
    tensors = load_file(tmp_path / "out" / "r.safetensors")
    assert torch.equal(tensors["000001.outputs.a"], shared.view(2, 3))
    assert torch.equal(tensors[rows[1]["outputs"]["b"][0]["tensor"]], shared[:2])
    assert tensors["000002.outputs"].tolist() == [0, 1]
    assert rows[2]["half"]["dtype"] == "bfloat16"
    assert sorted(file.name for file in path.parent.iterdir()) == ["r.jsonl", "r.safetensors"]


def test_one_list_and_no_stale_tensors(tmp_path: Path) -> None:
    process_and_save_results([{"outputs": torch.zeros(3)}], tmp_path / "r.json")
    path = process_and_save_results([{"loss": 1.0}, {"loss": 2.0}], tmp_path / "r.json")
    assert json.loads(path.read_text()) == [{"loss": 1.0}, {"loss": 2.0}]
    assert not (tmp_path / "r.safetensors").exists()


def test_what_cannot_be_saved_leaves_the_former_file(tmp_path: Path) -> None:
    process_and_save_results([{"loss": 1.0}], tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"result 000000.x: cannot save a object"):
        process_and_save_results([{"x": object()}], tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == [{"loss": 1.0}]
    with pytest.raises(ValueError, match=r"written as .jsonl"):
        process_and_save_results([], tmp_path / "r.csv")


class _Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_weights_come_back_bitwise_and_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = _Tied(), _Tied()
    first.count += 7
    where = second.embedding.weight.data_ptr()
    load_weights(second, save_weights(first, tmp_path / "w.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert second.head.weight is second.embedding.weight
    assert second.embedding.weight.data_ptr() == where


def test_other_weights_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = _Tied()
    before = model.embedding.weight.clone()
    with pytest.raises(ValueError, match="no such weights"):
        load_weights(model, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_weights(model, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError, match=r"missing: count, embedding.weight, head.weight; not in the model: bias, weight"
    ):
        load_weights(model, save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"embedding.weight is \(5, 4\)"):
        load_weights(model, save_weights(_Tied(4), tmp_path / "w.safetensors"))
    assert torch.equal(model.embedding.weight, before)


def test_text_arrays_are_text_and_no_tensor_takes_anothers_place(tmp_path: Path) -> None:
    path = process_and_save_results([{"names": np.array([["a", "b"]])}], tmp_path / "r.json")
    assert json.loads(path.read_text()) == [{"names": [["a", "b"]]}]
    with pytest.raises(ValueError, match=r"result 000000\.a\.b: two entries"):
        process_and_save_results([{"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}], tmp_path / "r.json")
