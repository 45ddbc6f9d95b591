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
    copy = pickle.loads(pickle.dumps(function))
    assert copy(SAMPLES[0], np.array([0, 5])) == pytest.approx(expected[:1], rel=1e-5)
    with pytest.raises(ValueError, match="run from 50 to 50, but the model's vocabulary has 50"):
        function(np.array([50]), np.array([0, 1]))


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
