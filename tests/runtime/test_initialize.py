"""The engine over a plain module and over a pipeline of one stage, beside loops written in plain torch."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.models.gpt import gpt_loss, gpt_model
from penstock.models.gpt_config import GPTConfig
from penstock.pipe.module import PipelineModule
from penstock.runtime.preparation import prepare
from support.run_jobs import LENGTH, config, model, tokens, train


def settings(**train_keys: Any) -> dict[str, Any]:
    return {"train": {"global_batch_size": 6, "micro_batch_size": 2, "steps": 10, **train_keys}}


def pairs(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(2, 4, generator=generator), torch.randn(2, 3, generator=generator)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_a_plain_module_is_trained_in_place_as_a_loop_would() -> None:
    mine, theirs = net(), net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    reference = pairs()
    with penstock.initialize(
        mine, settings(), optimizer=torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9), loss_fn=F.mse_loss
    ) as engine:
        data = pairs()
        for _ in range(5):
            loss = engine.train_batch(data)
            optimizer.zero_grad()
            losses = [F.mse_loss(theirs(x), y) for x, y in itertools.islice(reference, 3)]
            (sum(losses) / 3).backward()  # type: ignore[union-attr]
            optimizer.step()
            assert loss == pytest.approx(sum(x.item() for x in losses) / 3, rel=1e-6)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_that_returns_its_loss_takes_a_dict() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, *, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.linear(features)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    module = Classifier()
    batch = ({"features": torch.randn(2, 4), "labels": torch.tensor([0, 2])}, None)
    with penstock.initialize(module, settings()) as engine:
        first = engine.eval_batch(itertools.repeat(batch))
        assert first == pytest.approx(F.cross_entropy(module.linear(batch[0]["features"]), batch[0]["labels"]).item())
        for _ in range(3):
            engine.train_batch(itertools.repeat(batch))
        assert engine.eval_batch(itertools.repeat(batch)) < first


def test_the_gpt_without_dropping_is_a_plain_loop() -> None:
    run = config(dropping=False, steps=6)
    shape = GPTConfig(vocab_size=61, num_layers=4, hidden_size=16, num_heads=2, context_length=LENGTH)
    plain = gpt_model(shape).double()
    decayed = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    section = run["optimizer"]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": section["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=section["lr"],
        betas=(0.9, 0.95),
    )
    data = tokens()
    with penstock.initialize(model(dropout=0.0), run, training_data=data) as engine:
        order, schedule = engine.parts.order, engine.parts.schedule
        assert order is not None
        assert schedule is not None
        for step in range(6):
            rows = torch.tensor([data[i].tolist() for i in order.sample_at(range(8 * step, 8 * step + 8))])
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_for_step(8 * LENGTH * step, 8 * LENGTH)
            optimizer.zero_grad()
            expected = gpt_loss(plain(rows[:, :-1]), rows[:, 1:])
            expected.backward()
            optimizer.step()
            assert engine.train_batch() == pytest.approx(expected.item(), rel=1e-10)
        assert engine.progress.tokens == 6 * 8 * LENGTH
        assert engine.last is not None
        assert engine.last.samples == 48


def test_evaluation_leaves_training_as_it_was() -> None:
    losses, _, _ = train(config(steps=4), 4)
    rows = torch.tensor([row.tolist() for row in tokens(8)])
    batch = [(rows[i : i + 1, :-1], rows[i : i + 1, 1:]) for i in range(8)]
    with penstock.initialize(model(), config(steps=4), training_data=tokens()) as engine:
        mixed = []
        for _ in range(4):
            assert engine.eval_batch(iter(batch)) == engine.eval_batch(iter(batch))
            outputs = engine.predict_batch(iter([inputs for inputs, _ in batch]))
            assert [tuple(o.shape) for o in outputs] == [(1, LENGTH, 61)] * 8
            assert engine.predict_batch(iter([inputs for inputs, _ in batch]), pipe_ranks=[]) == []
            mixed.append(engine.train_batch())
            assert engine.stage.training
        with pytest.raises(ValueError, match=r"ranks=\[1\] are no pipeline ranks: there are 1"):
            engine.predict_batch(iter([inputs for inputs, _ in batch]), pipe_ranks=[1])
    assert mixed == losses


@pytest.mark.parametrize("name", ["adamw", "onebit_adam"])
def test_checkpoints_hold_everything(tmp_path: Path, name: str) -> None:
    run = config(steps=8, precision="float32", optimizer=name)
    with penstock.initialize(model(), run, training_data=tokens()) as engine:
        straight = [engine.train_batch() for _ in range(8)]
    with penstock.initialize(model(), run, training_data=tokens()) as engine:
        first = [engine.train_batch() for _ in range(3)]
        engine.save_checkpoint(tmp_path)
    with penstock.initialize(model(), run, training_data=tokens()) as engine:
        engine.load_checkpoint(tmp_path)
        second = [engine.train_batch() for _ in range(5)]
        assert engine.ledger.spent["steps"] == 8
    assert first + second == straight


def test_buffers_are_in_the_checkpoint(tmp_path: Path) -> None:
    data = pairs()

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    with penstock.initialize(build(), settings(), loss_fn=F.mse_loss) as engine:
        for _ in range(2):
            engine.train_batch(data)
        engine.save_checkpoint(tmp_path)
        before = {name: value.clone() for name, value in engine.stage.state_dict().items()}
    with penstock.initialize(build(), settings(), loss_fn=F.mse_loss) as engine:
        engine.load_checkpoint(tmp_path)
        for name, value in engine.stage.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_clipping_bounds_the_gradient() -> None:
    seen: list[float] = []
    run = {**settings(), "optimizer": {"lr": 0.1, "gradient_clipping": 0.01}}
    module = net()
    with penstock.initialize(module, run, loss_fn=F.mse_loss) as engine:

        def look(optimizer: Any, args: Any, kwargs: Any) -> None:
            grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            seen.append(torch.cat(grads).norm().item())

        engine.optimizer.register_step_pre_hook(look)
        engine.train_batch(pairs())
        assert engine.last is not None
        assert engine.last.gradient_norm is not None
        assert engine.last.gradient_norm > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-4)]


def test_a_users_optimizer_keeps_its_rate_unless_a_schedule_is_named() -> None:
    for extra, expected in (({}, 0.5), ({"schedule": {"warmup_steps": 5}}, 0.1)):
        module = net()
        with penstock.initialize(
            module, {**settings(), **extra}, optimizer=lambda g: torch.optim.SGD(g, lr=0.5), loss_fn=F.mse_loss
        ) as engine:
            engine.train_batch(pairs())
            assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_the_summary_counts_what_was_read() -> None:
    with penstock.initialize(model(), config(steps=5), training_data=tokens()) as engine:
        for _ in range(3):
            engine.train_batch()
        summary = engine.summary()
    assert summary["steps"] == 3
    assert summary["samples"] == {"spent": 24, "plain": 24, "saved": 0.0}
    assert summary["raw_tokens"]["spent"] == 24 * LENGTH
    # Blocks 1 and 2 of four keep 8, 8 and 12 tokens of 24; embedding, two blocks, norm and head compute all.
    assert summary["layer_tokens"]["spent"] == 8 * (2 * (8 + 8 + 12) + 5 * 3 * LENGTH)
    assert summary["layer_tokens"]["plain"] == 8 * 7 * 3 * LENGTH


def test_what_the_configuration_says_of_the_pipe_holds_for_a_model_that_was_given() -> None:
    made = config(stages=2)
    made["pipe"] |= {"partition_method": [0, 2, 7], "activation_checkpoint_interval": 3}
    module = prepare(model(), made, world_size=2, training_data=tokens()).module
    assert module is not None
    assert module.bounds == (0, 2, 7)
    assert module.build_stage(1).activation_checkpoint_interval == 3
    own = PipelineModule(model().specs, partition_method=[0, 4, 7], activation_checkpoint_interval=2)
    module = prepare(own, config(stages=2), world_size=2, training_data=tokens(), loss_fn=gpt_loss).module
    assert module is not None
    assert (module.bounds, module.activation_checkpoint_interval) == ((0, 4, 7), 2)
