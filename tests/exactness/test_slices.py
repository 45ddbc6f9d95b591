"""Sequences in slices: the results of whole ones, and what cannot be sliced is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
from penstock.pipe import LayerSpec, PipelineModule, current_slice, takes_slices
from support.pool import WorkerPool

STEPS, VOCAB, LENGTH = 3, 31, 14


def settings(schedule: str, stages: int, **pipe: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "deadline_s": 30,
        "precision": "float64",
        "pipe": {"stages": stages, "schedule": schedule, **pipe},
        "train": {"global_batch_size": 6, "micro_batch_size": 2, "steps": STEPS},
        "optimizer": {"lr": 1e-2, "gradient_clipping": 0.5},
        "schedule": {"decay": "constant"},
    }


def gpt(positions: str, dropout: float = 0.0) -> PipelineModule:
    shape = GPTConfig(
        vocab_size=VOCAB,
        num_layers=3,
        hidden_size=16,
        num_heads=2,
        context_length=LENGTH,
        positions=positions,  # type: ignore[arg-type]
        dropout=dropout,
        init_std=0.3,
    )
    return PipelineModule(gpt_layers(shape), loss_fn=gpt_loss)


def batches(step: int, packed: bool) -> list[Any]:
    """Rows of different lengths from batch to batch, with labels that do not count, all of them in one slice."""
    generator = torch.Generator().manual_seed(step)
    made: list[Any] = []
    for index in range(3):
        length = LENGTH - 2 * index
        row_BS = torch.randint(VOCAB, (2, length + 1), generator=generator)
        labels_BS = row_BS[:, 1:].clone()
        labels_BS[0, 1] = -100
        if index == 1:
            labels_BS[:, length // 2 :] = -100
        inputs: Any = row_BS[:, :-1].contiguous()
        if packed:
            inputs = {"input_ids": inputs, "document_ids": (torch.arange(length) // 4).expand(2, length).contiguous()}
        made.append((inputs, labels_BS))
    return made


def train(
    rank: int, world_size: int, made: dict[str, Any], positions: str, packed: bool
) -> tuple[list[float], dict[str, Tensor]]:
    torch.set_num_threads(1)
    with penstock.initialize(gpt(positions), made) as engine:
        losses = [engine.train_batch(iter(batches(step, packed))) for step in range(STEPS)]
        losses.append(engine.eval_batch(iter(batches(9, packed))))
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
    return losses, weights


@pytest.mark.parametrize(
    ("stages", "slices", "positions", "packed"),
    [(1, 2, "rope", False), (2, 3, "learned", False), (3, 4, "rope", True)],
)
def test_slices_give_what_whole_sequences_do(
    pool: WorkerPool, stages: int, slices: int, positions: str, packed: bool
) -> None:
    losses, weights = train(0, 1, settings("1f1b", 1), positions, packed)
    for found, local in pool.run(train, stages, settings("seq1f1b", stages, slices=slices), positions, packed):
        assert found == pytest.approx(losses, rel=1e-12)
        for name, weight in local.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-10, atol=1e-12)


def test_steps_on_trust_begin_with_slices(pool: WorkerPool) -> None:
    made = settings("seq1f1b", 3, slices=2)
    trusting = {**made, "optimizer": {**made["optimizer"], "post_validation": True}}
    whole = pool.run(train, 3, made, "rope", False)
    for (losses, weights), (wanted, theirs) in zip(pool.run(train, 3, trusting, "rope", False), whole, strict=True):
        assert losses == wanted
        assert all(torch.equal(weights[name], weight) for name, weight in theirs.items())


def test_every_slice_draws_its_own_dropout() -> None:
    drawn: list[Tensor] = []

    @takes_slices
    class Draws(nn.Linear):
        def forward(self, x_BSD: Tensor) -> Tensor:
            assert current_slice() is not None
            drawn.append(torch.rand(4))
            return super().forward(x_BSD)

    model = PipelineModule([LayerSpec(Draws, 4, 4)], loss_fn=nn.functional.mse_loss)
    with penstock.initialize(model, settings("seq1f1b", 1)) as engine:
        engine.train_batch(iter([(torch.ones(2, 6, 4).double(), torch.ones(2, 6, 4).double())] * 3))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 6


class Mixes(nn.Linear):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD.cumsum(1))


def test_what_cannot_be_sliced_is_refused() -> None:
    made = settings("seq1f1b", 1)
    mixing = PipelineModule([LayerSpec(nn.Linear, 4, 4), LayerSpec(Mixes, 4, 4)], loss_fn=nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"layer_001 \(Mixes\) may mix tokens.*takes_slices"):
        penstock.initialize(mixing, made)
    with pytest.raises(ValueError, match="activation checkpointing would compute them again"):
        penstock.initialize(gpt("rope"), settings("seq1f1b", 1, activation_checkpoint_interval=1))
    with pytest.raises(ValueError, match="chooses among all tokens"):
        penstock.initialize(
            gpt("rope"), {**made, "random_ltd": {"layers": "middle", "min_tokens": 4, "steps": 2, "seq_per_step": 2}}
        )
    with pytest.raises(ValueError, match="give a loss_fn"):
        penstock.initialize(PipelineModule([LayerSpec(nn.Linear, 4, 4)]), made)
    tokenwise = PipelineModule([LayerSpec(nn.Linear, 4, 4)], loss_fn=nn.functional.mse_loss)
    with (
        penstock.initialize(tokenwise, made) as engine,
        pytest.raises(ValueError, match="its inputs have 1 tokens, too few for 2 slices"),
    ):
        engine.train_batch(iter([(torch.ones(2, 1, 4), torch.ones(2, 1, 4))] * 3))
