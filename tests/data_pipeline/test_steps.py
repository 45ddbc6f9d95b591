import contextlib
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penstock.data_pipeline import configure_globals, optimize_model, set_model_mode, setup_logging
from penstock.data_pipeline.steps import to_device


def test_the_mode_holds_inside_and_comes_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with set_model_mode(model, "train"), torch.no_grad():
        assert model[1].training
    for mode in ("eval", "predict"):
        with contextlib.suppress(KeyError), set_model_mode(model, mode):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise KeyError
        assert (model.training, model[0].training, model[1].training) == (True, True, False)
        assert torch.is_grad_enabled()
    with torch.no_grad(), set_model_mode(model, "train"):
        assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="known: train, eval, predict"), set_model_mode(model, "test"):  # type: ignore[arg-type]
        pass


def test_a_plain_call_sets_the_mode_for_good() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    set_model_mode(model, "eval")
    assert not any(module.training for module in model.modules())
    set_model_mode(model, "train")
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_globals_are_seeded() -> None:
    threads = torch.get_num_threads()
    draws = []
    for _ in range(2):
        assert configure_globals(seed=5, threads=threads) == torch.device("cpu")
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    for arguments, sentence in [
        ({"seed": -1}, "2\\*\\*32"),
        ({"threads": 0}, "at least 1"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            configure_globals(**arguments)  # type: ignore[arg-type]


def test_logging_can_be_set_up_twice_and_says_a_line_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("penstock.data_pipeline")
    try:
        for _ in range(2):
            assert setup_logging("warning", str(tmp_path / "logs" / "run.log")) is logger
        logger.warning("hello %d", 3)
        logger.info("not said")
        assert capsys.readouterr().err.count("hello 3") == 1
        text = (tmp_path / "logs" / "run.log").read_text()
        assert text.count("hello 3") == 1
        assert "not said" not in text
        with pytest.raises(ValueError, match="unknown logging level 'loud'"):
            setup_logging("loud")
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def test_one_step_clips_by_the_global_norm() -> None:
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimize_model(optimizer, max_grad_norm=1.0) == 5.0
    assert (a.item(), b.item()) == pytest.approx((1 - 0.6, 1 - 0.8), rel=1e-5)
    assert a.grad is None
    b.grad = torch.tensor([0.1])
    assert optimize_model(optimizer) is None


def test_nests_are_moved_whole() -> None:
    value = {"a": [torch.zeros(1), (torch.ones(2), "text")], "b": None}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert (moved["a"][1][1], moved["b"], type(moved["a"][1])) == ("text", None, tuple)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_from_a_gpu_are_there_when_they_are_read() -> None:
    value = torch.arange(1 << 22, device="cuda").double()
    assert torch.equal(to_device((value * 2).sqrt(), torch.device("cpu")), (value.cpu() * 2).sqrt())
