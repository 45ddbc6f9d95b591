"""Layers divided over ranks: losses, norms, weights and checkpoints are those of one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock._core.meter import Meter
from penstock.models import BERTConfig, bert_layers, bert_loss
from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
from penstock.models.gpt_modules import TokenEmbedding
from penstock.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from penstock.pipe.topology import PipeModelDataParallelTopology
from penstock.runtime.preparation import prepare
from penstock.runtime.sharding.tensors import full_tensor
from support.pool import WorkerPool
from support.run_jobs import config, model, resume_job, tokens

STEPS = 4
SHARDED: dict[str, Any] = {"data_parallel": {"replicas": 2, "sharding": "fsdp2"}}


def settings(stages: int, replicas: int, size: int, **changes: Any) -> dict[str, Any]:
    batch = {"global_batch_size": 4, "micro_batch_size": 1, "steps": STEPS}
    made = config(stages=stages, replicas=replicas, steps=STEPS, train=batch, **changes)
    made["optimizer"]["gradient_clipping"] = 0.5
    made["tensor_parallel"] = {"size": size}
    return made


def divided(rank: int, world_size: int, made: dict[str, Any]) -> Any:
    """Losses, norms and whole weights of a run, how many numbers lie here and would at best, and the ledger."""
    torch.set_num_threads(1)
    with penstock.initialize(model(layers=3), made, training_data=tokens()) as engine:
        losses, norms = [], []
        for _ in range(2):
            losses.append(engine.train_batch())
            assert engine.last is not None
            norms.append(engine.last.gradient_norm)
        weights = {
            name: full_tensor(p.detach(), groups=engine.parts.groups, meter=Meter()).clone()
            for name, p in engine.stage.canonical_parameters()
        }
        held = sum(part(p).numel() for p in engine.stage.parameters())
        divisions = engine.parts.groups.num_model_ranks
        ways = {id(p): divisions for p in engine.stage.parameters()}  # of which a tied weight has no more
        if engine.config.data_parallel.sharded:
            tied = {id(p) for named in engine.stage.tied.values() for _, p in named}
            ways = {key: divisions * (1 if key in tied else engine.parts.groups.num_replicas) for key in ways}
        whole = sum(p.numel() / ways[id(p)] for p in engine.stage.parameters())
        summary = engine.summary()
        consumed = (engine.progress.samples, engine.progress.tokens)
    return losses, norms, weights, (held, whole), summary, consumed


def part(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.timeout(150)  # eight processes, of which most may have to be started
@pytest.mark.parametrize(
    ("stages", "replicas", "size", "changes"),
    [
        (2, 2, 2, {}),
        (2, 2, 2, {**SHARDED, "pipe": {"stages": 2, "schedule": "zb_h1"}}),
        (1, 1, 2, {"pipe": {"activation_checkpoint_interval": 1}}),
        (2, 1, 2, {"pipe": {"stages": 2, "schedule": "zb_h1"}}),
    ],
)
def test_a_divided_run_equals_one_process(
    pool: WorkerPool, stages: int, replicas: int, size: int, changes: dict[str, Any]
) -> None:
    answers = pool.run(divided, stages * replicas * size, settings(stages, replicas, size, **changes), deadline_s=110)
    alone = divided(0, 1, settings(1, 1, 1))
    for losses, norms, weights, (held, expected), summary, consumed in answers:
        assert losses == answers[0][0]
        assert losses == pytest.approx(alone[0], rel=1e-11)
        assert norms == pytest.approx(alone[1], rel=1e-10)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[2][name], rtol=1e-9, atol=1e-12)
        # All but the norms is divided; the vocabulary of 61 not evenly.
        assert held <= expected * 1.1
        assert consumed == alone[5]
        for key in ("samples", "raw_tokens", "layer_tokens"):
            assert summary[key]["spent"] == alone[4][key]["spent"]
        assert summary["bytes_sent"]["model"]["spent"] > 0


def bert_batches(step: int) -> Iterator[Any]:
    """Masked rows, some of them padded."""
    generator = torch.Generator().manual_seed(step)
    for index in range(4):
        ids = torch.randint(1, 61, (1, 12), generator=generator)
        mask = torch.arange(12)[None] < 12 - 3 * index
        yield {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(~mask | (ids % 3 > 0), -100)


def divided_bert(rank: int, world_size: int, made: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    shape = BERTConfig(vocab_size=61, num_layers=2, hidden_size=16, num_heads=4, context_length=12, dropout=0.1)
    module = PipelineModule(bert_layers(shape), loss_fn=bert_loss)
    with penstock.initialize(module, made) as engine:
        losses = [engine.train_batch(bert_batches(step)) for step in range(3)]
        weights = {
            name: full_tensor(p.detach(), groups=engine.parts.groups, meter=Meter()).clone()
            for name, p in engine.stage.canonical_parameters()
        }
        held = sum(part(p).numel() for p in engine.stage.parameters())
        whole = sum(p.numel() for p in engine.stage.parameters())
    return losses, weights, held / whole


def test_a_divided_bert_equals_one_process(pool: WorkerPool) -> None:
    made = settings(2, 1, 2, dropping=False)
    answers = pool.run(divided_bert, 4, made)
    alone = divided_bert(0, 1, settings(1, 1, 1, dropping=False))
    for losses, weights, share in answers:
        assert losses == pytest.approx(alone[0], rel=1e-11)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[1][name], rtol=1e-9, atol=1e-12)
        assert share < 0.6  # the norms, positions and biases of sums are whole


def test_a_divided_run_resumes_to_the_bit_and_into_other_layouts(pool: WorkerPool, tmp_path: Path) -> None:
    made = settings(2, 1, 2)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    uninterrupted = pool.run(resume_job, 4, made, str(tmp_path / "whole"), False, 4, 2, deadline_s=100)
    first = pool.run(resume_job, 4, made, str(tmp_path / "stopped"), False, 2, 2)
    second = pool.run(resume_job, 4, made, str(tmp_path / "stopped"), True, 4, 4)
    assert [a + b for a, b in zip(first, second, strict=True)] == uninterrupted
    halfway = str(tmp_path / "stopped" / "step_00000002")
    alone = settings(1, 1, 1)
    elsewhere = one_way(halfway, tmp_path / "alone", alone)
    assert elsewhere == pytest.approx(uninterrupted[0][2:], rel=1e-10)
    # And back: what one process wrote goes on in parts.
    back = pool.run(resume_from, 2, settings(1, 1, 2), str(tmp_path / "alone" / "step_00000003"))
    for losses in back:
        assert losses == pytest.approx(uninterrupted[0][3:], rel=1e-10)


def test_a_run_divided_over_both_axes_resumes_to_the_bit_and_into_one_process(pool: WorkerPool, tmp_path: Path) -> None:
    made = settings(1, 2, 2, **SHARDED)
    first = pool.run(resume_job, 4, made, str(tmp_path), False, 3, 2)
    halfway = str(tmp_path / "step_00000002")
    again = pool.run(resume_from, 4, made, halfway)
    assert [losses[0] for losses in again] == [losses[2] for losses in first]
    alone = one_way(halfway, tmp_path / "alone", settings(1, 1, 1))
    assert alone == pytest.approx(again[0], rel=1e-10)
    for losses in pool.run(resume_from, 4, made, str(tmp_path / "alone" / "step_00000003")):
        assert losses == pytest.approx(alone[1:], rel=1e-10)


def one_way(checkpoint: str, folder: Path, made: dict[str, Any]) -> list[float]:
    """Go on from a checkpoint to the end, with one of this process's own after step 3."""
    losses = []
    with penstock.initialize(model(), made, training_data=tokens()) as engine:
        engine.load_checkpoint(checkpoint)
        while engine.progress.step < STEPS:
            losses.append(engine.train_batch())
            if engine.progress.step == 3:
                engine.save_checkpoint(folder)
    return losses


def resume_from(rank: int, world_size: int, made: dict[str, Any], checkpoint: str) -> list[float]:
    torch.set_num_threads(1)
    with penstock.initialize(model(), made, training_data=tokens()) as engine:
        engine.load_checkpoint(checkpoint)
        return [engine.train_batch() for _ in range(STEPS - engine.progress.step)]


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Misnamed(Plain):
    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        return {"inner": "columns"}


class Misstyled(Plain):
    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        return {"": "colums"}


def gpt(**changes: Any) -> list[LayerSpec]:
    shape = {"vocab_size": 61, "num_layers": 2, "hidden_size": 18, "num_heads": 3, "context_length": 24, **changes}
    return gpt_layers(GPTConfig(**shape))


def weight_read_outside(embedding: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ embedding.weight.T


TIED = [
    TiedLayerSpec(
        "e", TokenEmbedding, GPTConfig(vocab_size=9, num_layers=1, hidden_size=4, num_heads=2, context_length=8)
    ),
    TiedLayerSpec(
        "e",
        TokenEmbedding,
        GPTConfig(vocab_size=9, num_layers=1, hidden_size=4, num_heads=2, context_length=8),
        forward_fn=weight_read_outside,
    ),
]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (gpt(), r"layer_001 \(GPTBlock\): tensor_parallel.size=2 cannot divide num_heads=3 evenly; take a size that"),
        (gpt(vocab_size=1, num_heads=2, hidden_size=8), "more than the vocabulary of 1 tokens"),
        (gpt(mlp_ratio=0.06, num_heads=2, hidden_size=16), "more than the MLP's 1 inner units"),
        ([LayerSpec(Plain)], r"none of the model's layers \(Plain\) says how it is divided"),
        ([LayerSpec(Misnamed)], "names 'inner', but the layer has no such submodule"),
        ([LayerSpec(Misstyled)], "did you mean 'columns'"),
        (TIED, "'weight_read_outside' uses it as a whole"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(PipelineModule(layers, loss_fn=gpt_loss), settings(1, 1, 2, random_ltd=None), world_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**SHARDED, "compression": {"algorithm": "int8"}},
            "would share scales with parts that differ",
        ),
        ({"optimizer": {"post_validation": True}}, "set post_validation: false"),
        ({"pipe": {"partition_method": "profile"}}, "profile measures whole layers"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name=muon looks at whole matrices"),
        ({"local_updates": {"method": "diloco", "period": 2}}, "local_updates exchanges whole ones"),
    ],
)
def test_what_needs_whole_layers_is_refused(changes: dict[str, Any], message: str) -> None:
    made = {**config(steps=STEPS), "tensor_parallel": {"size": 2}, **changes}
    with pytest.raises(ValueError, match=message):
        prepare(model(), made, world_size=4)


def test_models_optimizers_and_processes_that_do_not_fit_are_refused() -> None:
    made = settings(2, 1, 2, random_ltd=None)
    with pytest.raises(ValueError, match="a plain Linear is one layer"):
        prepare(torch.nn.Linear(2, 2), settings(1, 1, 2, random_ltd=None), world_size=2)
    with pytest.raises(ValueError, match="leave the optimizer argument out"):
        prepare(model(), made, world_size=4, optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match=r"tensor_parallel.size=2 = 4 processes, but 2 were started; start 4"):
        prepare(model(), made, world_size=2)


def test_the_models_topology_gives_the_axis() -> None:
    shape = GPTConfig(vocab_size=61, num_layers=2, hidden_size=16, num_heads=2, context_length=24)
    given = PipelineModule(gpt_layers(shape), loss_fn=gpt_loss, topology=PipeModelDataParallelTopology(2, 2, 1))
    plain = config(dropping=False)
    del plain["pipe"]["stages"]
    assert prepare(given, plain, world_size=4).config.tensor_parallel.size == 2
    with pytest.raises(ValueError, match=r"has model=2, but the configuration says tensor_parallel.size=4"):
        prepare(given, {**plain, "tensor_parallel": {"size": 4}}, world_size=8)
