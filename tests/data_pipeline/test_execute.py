"""The loop, against loops written out in plain torch."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from penstock.data_pipeline import NonFiniteLossError, create_data_loader, execute_data_pipeline
from support.loop_models import CountingEngine, make_mlp, make_points


def _loader(count: int = 20, batch_size: int = 4, seed: int = 3) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(make_points(count), batch_size=batch_size, shuffle=True, generator=generator)


def _bits(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("spec", ["instance", "factory", "table"])
def test_training_is_bitwise_a_plain_loop(accumulation: int, clip: float | None, spec: str) -> None:
    reference, model = make_mlp(dropout=0.3), make_mlp(dropout=0.3)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    torch.manual_seed(9)
    expected, norms = [], []
    loader = _loader()
    reference.train()
    for _ in range(2):
        batches = list(loader)
        for start in range(0, len(batches), accumulation):
            group = batches[start : start + accumulation]
            losses = []
            for x, y in group:
                loss = F.mse_loss(reference(x), y)
                (loss / len(group)).backward()
                losses.append(loss.item())
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(reference.parameters(), clip).item())
            optimizer.step()
            optimizer.zero_grad()
            expected.append(sum(losses) / len(losses))

    specs: dict[str, Any] = {
        "instance": torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        "factory": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        "table": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    }
    torch.manual_seed(9)
    results = execute_data_pipeline(
        model,
        _loader(),
        {
            "mode": "train",
            "epochs": 2,
            "loss_fn": F.mse_loss,
            "optimizer": specs[spec],
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": clip,
        },
    )
    assert _same(_bits(model), _bits(reference))
    assert [result["loss"] for result in results] == pytest.approx(expected, rel=1e-12)
    assert [result.get("grad_norm") for result in results] == (norms if clip else [None] * len(expected))
    assert [result["step"] for result in results] == list(range(len(expected)))
    assert sum(result["batches"] for result in results) == 10
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_changes_nothing_and_uses_the_evaluation_mode() -> None:
    model: Any = make_mlp(dropout=0.5)
    model[1].eval()  # a user's frozen batch norm
    before, modes = _bits(model), [module.training for module in model.modules()]
    results = execute_data_pipeline(model, _loader(), {"mode": "eval", "loss_fn": "mse"})
    assert _same(_bits(model), before)
    assert [module.training for module in model.modules()] == modes
    reference = copy.deepcopy(model).eval()
    assert [result["loss"] for result in results] == [F.mse_loss(reference(x), y).item() for x, y in _loader()]
    assert torch.is_grad_enabled()


def test_prediction_needs_no_targets_and_returns_plain_outputs() -> None:
    model = make_mlp()
    points = make_points(6).tensors[0]
    for batches in ([points[:4], points[4:]], DataLoader(TensorDataset(points), batch_size=4)):
        results = execute_data_pipeline(model, batches, {"mode": "predict"})
        outputs = torch.cat([result["outputs"] for result in results])
        assert torch.equal(outputs, torch.cat([copy.deepcopy(model).eval()(part) for part in (points[:4], points[4:])]))
        assert not outputs.requires_grad
        assert all("loss" not in result for result in results)


def test_a_mapping_goes_by_keyword_and_the_model_may_hold_the_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            outputs = {"logits": self.weight * x}
            return outputs if labels is None else {"loss": ((self.weight * x - labels) ** 2).mean(), **outputs}

    batches = [{"x": torch.tensor([1.0, 2.0]), "labels": torch.tensor([0.0, 0.0])}]
    assert execute_data_pipeline(Own(), batches, {"mode": "eval"})[0]["loss"] == 10.0
    outputs = execute_data_pipeline(Own(), batches, {"mode": "predict"})[0]["outputs"]
    assert outputs["logits"].tolist() == [2.0, 4.0]
    results = execute_data_pipeline(
        Own(), batches, {"mode": "eval", "loss_fn": lambda outputs, labels: (outputs["logits"] - labels).sum()}
    )
    assert results[0]["loss"] == 6.0


def test_length_of_a_run() -> None:
    model = make_mlp()
    loader = _loader(20, 4)
    assert len(execute_data_pipeline(model, loader, {"mode": "eval", "loss_fn": "mse"})) == 5
    assert len(execute_data_pipeline(model, loader, {"mode": "eval", "loss_fn": "mse", "max_steps": 3})) == 3
    twelve = execute_data_pipeline(model, loader, {"mode": "eval", "loss_fn": "mse", "max_steps": 12})
    assert [result["epoch"] for result in twelve] == [0] * 5 + [1] * 5 + [2] * 2
    both = execute_data_pipeline(model, loader, {"mode": "eval", "loss_fn": "mse", "max_steps": 12, "epochs": 2})
    assert len(both) == 10


def test_a_step_is_not_prepared_before_it_is_wanted() -> None:
    taken = 0

    class Counted:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal taken
            for _ in range(100):
                taken += 1
                yield torch.zeros(2, 3)

    execute_data_pipeline(make_mlp(), Counted(), {"mode": "predict", "max_steps": 2})
    assert taken == 2


def test_callbacks_and_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, bool, bool]] = []
    model = make_mlp().eval()
    config = {
        "optimizer": "sgd",
        "loss_fn": "mse",
        "log_every": 2,
        "callbacks": [lambda result: seen.append((result["step"], model.training, torch.is_grad_enabled()))],
    }
    logger = logging.getLogger("penstock.data_pipeline")
    logger.propagate = True
    with caplog.at_level("INFO", logger=logger.name):
        execute_data_pipeline(model, _loader(), config)
    # Between steps the model is as the caller left it.
    assert seen == [(step, False, True) for step in range(5)]
    assert [line.split(" loss")[0] for line in caplog.messages] == ["train step 1", "train step 3"]


class _Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def test_a_loss_that_is_no_number_stops_before_the_weights_change() -> None:
    model = _Exploding()
    batches = [torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(1.0)]
    with pytest.raises(NonFiniteLossError, match="inf at step 1"):
        execute_data_pipeline(model, batches, {"optimizer": {"name": "sgd", "lr": 0.5}})
    assert model.weight.item() == 0.5
    assert model.training


def test_the_sampler_hears_what_was_trained_on_and_each_epoch_is_announced() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.trained: list[int] = []
            self.epochs: list[int] = []

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1], [2, 3], [4, 5]])

        def __len__(self) -> int:
            return 3

        def mark_trained(self, batches: int = 1) -> None:
            self.trained.append(batches)

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    sampler = Sampler()
    loader: DataLoader[Any] = DataLoader(make_points(6), batch_sampler=sampler)
    execute_data_pipeline(make_mlp(), loader, {"mode": "eval", "loss_fn": "mse", "epochs": 2})
    assert (sampler.trained, sampler.epochs) == ([], [0, 1])
    config = {"optimizer": "sgd", "loss_fn": "mse", "gradient_accumulation_steps": 2}
    execute_data_pipeline(make_mlp(), loader, config)
    assert sampler.trained == [2, 1]


def test_a_sampler_that_goes_on_where_training_stands() -> None:
    def loader(**sampling: Any) -> DataLoader[Any]:
        return create_data_loader(make_points(10), {"sampling": {"strategy": "random", "batch_size": 2, **sampling}})

    config: dict[str, Any] = {"optimizer": "sgd", "loss_fn": "mse"}
    two_epochs = loader(epochs=2)
    sampler: Any = two_epochs.batch_sampler
    assert len(execute_data_pipeline(make_mlp(), two_epochs, config | {"max_steps": 3})) == 3
    assert sampler.consumed == 6
    assert len(execute_data_pipeline(make_mlp(), two_epochs, config)) == 7
    assert sampler.consumed == 20
    with pytest.raises(ValueError, match="trained on to the end"):
        execute_data_pipeline(make_mlp(), two_epochs, config)
    assert len(execute_data_pipeline(make_mlp(), loader(), config | {"max_steps": 9})) == 5
    with pytest.raises(ValueError, match="set epochs or num_samples in sampling"):
        execute_data_pipeline(make_mlp(), loader(), config | {"epochs": 2})
    # Stopped and gone on, the run sees the very samples of an unbroken one.
    order = list(loader(epochs=2).batch_sampler or [])
    broken: Any = loader(epochs=2).batch_sampler
    first = [batch for batch, _ in zip(broken, range(4), strict=False)]
    broken.mark_trained(4)
    assert first + list(broken) == order


def test_an_engine_takes_what_it_needs() -> None:
    engine = CountingEngine(micro_batches=2)
    batches = [1.0, 3.0, 5.0, 7.0, 100.0]
    results = execute_data_pipeline(engine, batches, {"mode": "train", "epochs": 2})
    # The fifth batch of each pass fills no global batch.
    assert [(r["step"], r["epoch"], r["loss"], r["batches"]) for r in results] == [
        (0, 0, 2.0, 2),
        (1, 0, 6.0, 2),
        (2, 1, 2.0, 2),
        (3, 1, 6.0, 2),
    ]
    assert [r["loss"] for r in execute_data_pipeline(engine, batches[:4], {"mode": "eval"})] == [2.0, 6.0]
    outputs = [r["outputs"] for r in execute_data_pipeline(engine, batches[:4], {"mode": "predict"})]
    assert [[tensor.tolist() for tensor in step] for step in outputs] == [[[1.0], [3.0]], [[5.0], [7.0]]]
    own = execute_data_pipeline(engine, None, {"max_steps": 3})
    assert [r["loss"] for r in own] == [7.0] * 3
    assert len(execute_data_pipeline(engine, batches, {"max_steps": 5})) == 5


class _Deaf(CountingEngine):
    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        return torch.tensor(1.0)


class _Broken(CountingEngine):
    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        raise StopIteration


def test_mistakes_around_an_engine() -> None:
    with pytest.raises(ValueError, match="its own optimizer, gradient_accumulation_steps"):
        execute_data_pipeline(CountingEngine(), [1.0], {"optimizer": "sgd", "gradient_accumulation_steps": 2})
    with pytest.raises(ValueError, match="without a data_loader"):
        execute_data_pipeline(CountingEngine(), None, {"mode": "eval", "max_steps": 1})
    with pytest.raises(ValueError, match="without a data_loader"):
        execute_data_pipeline(CountingEngine(), None)
    with pytest.raises(ValueError, match="ended after 1 batches of a step"):
        execute_data_pipeline(CountingEngine(), [1.0])
    with pytest.raises(ValueError, match="takes nothing from the data_loader"):
        execute_data_pipeline(_Deaf(), [1.0])
    assert len(execute_data_pipeline(_Deaf(), [1.0], {"max_steps": 3})) == 3
    with pytest.raises(ValueError, match="stopped although"):
        execute_data_pipeline(_Broken(), [1.0, 2.0])
    with pytest.raises(NonFiniteLossError, match="nan at step 0"):
        execute_data_pipeline(CountingEngine(1), [float("nan")])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mod": "train"}, "did you mean 'mode'"),
        ({"mode": "training"}, "'train', 'eval' or 'predict'"),
        ({"mode": "eval", "optimizer": "sgd"}, "optimizer has no meaning in eval"),
        ({"mode": "eval", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps has no meaning"),
        ({"mode": "predict", "loss_fn": "mse"}, "loss_fn has no meaning in predict"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"loss_fn": "mse"}, "needs an optimizer.*got nothing"),
        ({"loss_fn": "mse", "optimizer": "adamww"}, "did you mean 'adamw'"),
        ({"loss_fn": "mse", "optimizer": {"name": "sgd", "lrr": 1}}, "did you mean 'lr'"),
        ({"loss_fn": "mse", "optimizer": {"lr": 1}}, "which one"),
        ({"loss_fn": "mse", "optimizer": lambda parameters: 3}, "made a int"),
        ({"loss_fn": "msee", "optimizer": "sgd"}, "did you mean 'mse'"),
        ({"optimizer": "sgd"}, "a loss of shape .4, 1."),
        (
            {"loss_fn": lambda outputs, targets: outputs - targets, "optimizer": "sgd"},
            "loss_fn returned a loss of shape",
        ),
        ({"loss_fn": lambda outputs, targets: 1.0, "optimizer": "sgd"}, "loss_fn returned a loss of float"),
        ({"loss_fn": "mse", "optimizer": "sgd", "device": "cuda:99"}, "CUDA devices"),
        ({"loss_fn": "mse", "optimizer": "sgd", "device": "gpu"}, "not a device"),
        ({"callbacks": [3]}, "callbacks.0"),
    ],
)
def test_mistakes_in_the_configuration(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        execute_data_pipeline(make_mlp(), _loader(), config)


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="cannot drive a int"):
        execute_data_pipeline(3, [], {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a data_loader"):
        execute_data_pipeline(make_mlp(), None, {"mode": "predict"})
    with pytest.raises(ValueError, match="no batch in epoch 0"):
        execute_data_pipeline(make_mlp(), [], {"mode": "predict"})
    with pytest.raises(ValueError, match=r"no batch in epoch 1.*read only once"):
        execute_data_pipeline(make_mlp(), iter([torch.zeros(2, 3)]), {"mode": "predict", "max_steps": 2})
    with pytest.raises(ValueError, match="a batch of 3 parts"):
        execute_data_pipeline(make_mlp(), [(1, 2, 3)], {"mode": "predict"})
    with pytest.raises(ValueError, match="needs targets"):
        execute_data_pipeline(make_mlp(), [torch.zeros(2, 3)], {"mode": "eval", "loss_fn": "mse"})
    with pytest.raises(ValueError, match="not a loss and hold none"):
        execute_data_pipeline(nn.Identity(), [["text"]], {"mode": "eval"})
    with pytest.raises(ValueError, match="nothing to train"):
        execute_data_pipeline(nn.Identity(), [torch.zeros(2)], {"optimizer": "sgd"})
    stranger = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        execute_data_pipeline(make_mlp(), _loader(), {"optimizer": stranger, "loss_fn": "mse"})


def test_gradients_from_before_have_no_say_and_a_failed_step_leaves_none() -> None:
    fresh, used = make_mlp(), make_mlp()
    used.eval()(torch.ones(1, 3)).sum().backward()  # in evaluation mode: the batch norm's statistics stay
    config = {"optimizer": {"name": "sgd", "lr": 0.1}, "loss_fn": "mse"}
    for model in (fresh, used):
        execute_data_pipeline(model, _loader(), config)
    assert _same(_bits(fresh), _bits(used))
    broken = _Exploding()
    with pytest.raises(NonFiniteLossError):
        execute_data_pipeline(broken, [torch.tensor(float("nan"))], {"optimizer": {"name": "sgd", "lr": 0.5}})
    assert broken.weight.grad is None
