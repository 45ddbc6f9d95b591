import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from penstock.data_pipeline.data_sampling import DataAnalyzer
from penstock.models.gpt import gpt_layers, gpt_loss
from penstock.pipe import PipelineModule
from penstock.runtime import model_loss
from penstock.runtime.config import load_config
from penstock.runtime.initialize import initialize
from penstock.runtime.model_loss import ModelLoss

CONFIG = {
    "model": {"vocab_size": 50, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "context": 8},
    "train": {"global_batch_size": 2, "micro_batch_size": 2, "steps": 1},
}
SAMPLES = [np.arange(n) % 50 for n in (5, 30, 0, 1, 2, 9, 17)]


def reference(logits: Any, tokens: np.ndarray, context: int) -> float:
    """Token by token: what precedes it in its window, and the loss of predicting it."""
    losses = []
    for place in range(1, len(tokens)):
        first = (place - 1) // context * context
        window = torch.from_numpy(tokens[first:place].astype(np.int64))[None]
        losses.append(F.cross_entropy(logits(window)[0, -1:].double(), torch.tensor([int(tokens[place])])).item())
    return float(np.mean(losses)) if losses else 0.0


def test_a_checkpoint_of_penstock(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    assert config.model is not None
    module = PipelineModule(gpt_layers(config.model.gpt_config()), num_stages=1, loss_fn=gpt_loss, base_seed=7)
    stage = module.build_stage(0).eval()
    with initialize(module, config, training_data=[np.arange(9) for _ in range(4)]) as engine:
        engine.save_checkpoint(tmp_path / "run" / "checkpoints")
    function = ModelLoss(tmp_path / "run")
    analysis = DataAnalyzer(SAMPLES, [], tmp_path / "a", metric_functions={"loss": function}).run()
    with torch.no_grad():
        expected = [reference(stage, sample, 8) for sample in SAMPLES]
    assert analysis.values("loss") == pytest.approx(expected, rel=1e-5)
    assert function.path.name == "step_00000000"
    assert ModelLoss(function.path).identity == function.identity
    copy = pickle.loads(pickle.dumps(function))
    assert copy(SAMPLES[0], np.array([0, 5])) == pytest.approx(expected[:1], rel=1e-5)
    with pytest.raises(ValueError, match="run from 50 to 50, but the model's vocabulary has 50"):
        function(np.array([50]), np.array([0, 1]))


@pytest.mark.parametrize("precision", ["float64", "bf16", "fp16"])
def test_a_checkpoint_of_any_precision(tmp_path: Path, precision: str) -> None:
    config = load_config({**CONFIG, "precision": precision})
    assert config.model is not None
    module = PipelineModule(gpt_layers(config.model.gpt_config()), num_stages=1, loss_fn=gpt_loss, base_seed=7)
    dtype = torch.float64 if precision == "float64" else torch.float32
    stage = module.build_stage(0).eval().to(dtype)
    with initialize(module, config, training_data=[np.arange(9) for _ in range(4)]) as engine:
        engine.save_checkpoint(tmp_path / "checkpoints")
    with torch.no_grad():
        expected = reference(stage, SAMPLES[1], 8)
    found = ModelLoss(tmp_path)(SAMPLES[1], np.array([0, len(SAMPLES[1])]))
    assert found == pytest.approx([expected], rel=1e-5)


def test_a_long_context_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 131,072 positions gets 8,192 at once, and the loss is made of few logits at a time."""
    monkeypatch.setattr(model_loss, "_LOGITS", 1000 * 50)
    (tmp_path / "config.json").write_text("{}")
    function = ModelLoss(tmp_path)
    table_VV = torch.randn((50, 50), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    asked: list[tuple[int, ...]] = []
    pieces: list[int] = []

    def logits(ids_BS: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(ids_BS.shape))
        return table_VV[ids_BS]

    def cross_entropy(found_NV: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        pieces.append(len(found_NV))
        return F.nll_loss(found_NV.log_softmax(-1), *rest, **options)

    monkeypatch.setattr(function, "_loaded", (logits, 131_072, 50))
    monkeypatch.setattr(model_loss.F, "cross_entropy", cross_entropy)
    tokens = np.random.default_rng(0).integers(0, 50, 20_000)
    offsets = np.array([0, 18_000, 18_600, 19_300, 20_000])
    found = function(tokens, offsets)
    table = table_VV.log_softmax(-1).numpy()
    for value, first, end in zip(found, offsets[:-1], offsets[1:], strict=True):
        assert value == pytest.approx(-table[tokens[first : end - 1], tokens[first + 1 : end]].mean(), rel=1e-5)
    assert max(width for _, width in asked) == 8192
    assert all(rows == 1 or rows * width <= 1000 for rows, width in asked)
    assert max(pieces) == 1000


def test_a_hugging_face_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokens = np.concatenate(SAMPLES)
    offsets = np.cumsum([0, *map(len, SAMPLES)])
    with torch.no_grad():
        expected = [reference(lambda ids: model(ids).logits, sample, 8) for sample in SAMPLES]
    assert ModelLoss(tmp_path / "gpt2")(tokens, offsets) == pytest.approx(expected, rel=1e-4)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model there"):
        ModelLoss(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        ModelLoss(tmp_path)
