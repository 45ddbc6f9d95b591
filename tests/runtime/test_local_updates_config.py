from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock.compression import DiLoCo, LocalSGD, LocalUpdates, MuonAdamW, SparseLoCo, StreamingDiLoCo
from penstock.runtime.config import load_config
from penstock.runtime.optimizer_section import OPTIMIZERS


def base(**sections: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"train": {"global_batch_size": 4, "micro_batch_size": 4, "steps": 20}}
    result.update(sections)
    return result


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "dilocco", "period": 5}, "'diloco'"),
        ({"method": "diloco"}, "period"),
        ({"method": "diloco", "period": 21}, "period=21 is more than the run's 20 steps"),
        ({"method": "diloco", "period": 6}, "20 steps are not a multiple of local_updates.period=6: .* 18 or 24 steps"),
        ({"method": "local_sgd", "period": 5, "outer_lr": 0.5}, "outer_lr has no meaning for local_sgd"),
        ({"method": "sparseloco", "period": 5, "outer_momentum": 0.5}, "outer_momentum has no meaning for sparseloco"),
        ({"method": "diloco", "period": 5, "algorithm": "onebyte"}, "onebit"),
        (
            {"method": "diloco", "period": 5, "options": {"block_size": 8}},
            "options are those of the",
        ),
        ({"method": "streaming_diloco", "period": 2}, "fragments=4 take turns within period=2"),
        ({"method": "streaming_diloco", "period": 5, "overlap": 5}, "overlap=5 must be less than period=5"),
        ({"method": "diloco", "period": 5, "mixing": 1.0}, "mixing"),
        ({"method": "diloco", "period": 5, "outer_lrs": 1.0}, "outer_lr"),
    ],
)
def test_wrong_sections_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(base(local_updates=sections))


def test_what_does_not_go_together_is_refused() -> None:
    local = {"method": "diloco", "period": 5}
    with pytest.raises(ValueError, match=r"local_updates and optimizer.name=onebit_adam would both exchange"):
        load_config(base(local_updates=local, optimizer={"name": "onebit_adam", "freeze_step": 2}))
    with pytest.raises(ValueError, match=r"name it there: local_updates.algorithm: onebit"):
        load_config(base(local_updates=local, compression={"algorithm": "onebit"}))
    with pytest.raises(ValueError, match=r"optimizer.name: muon, or method: diloco for adamw"):
        penstock.initialize(nn.Linear(2, 2), base(local_updates={**local, "method": "muloco"}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "onebit_lamb"}, "onebit_lamb needs freeze_step"),
        ({"name": "zero_one_adam", "freeze_step": 5}, r"no meaning for zero_one_adam; .*options: \{var_freeze_step"),
        ({"name": "zero_one_adam", "gradient_clipping": 1.0}, "needs the averaged gradient, and zero_one_adam"),
        ({"name": "zero_one_adam", "options": {"var_freeze_steps": 5}}, "'var_freeze_step'"),
        ({"name": "zero_one_adam", "options": {"lr": 5}}, "lr is set from optimizer.lr"),
        ({"name": "zero_one_adam", "options": {"var_freeze_step": 0}}, "var_freeze_step must be at least 1"),
        ({"name": "onebit_lamb", "freeze_step": 5, "options": {"min_coeff": 20.0}}, "min_coeff=20.0"),
        ({"name": "adamw", "options": {"beta": 1}}, "option of adamw"),
        ({"name": "sgd"}, "'adamw'|known"),
    ],
)
def test_wrong_optimizers_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(base(optimizer=section))


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, generator=generator), torch.randn(2, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_trains_by_its_name(name: str) -> None:
    section: dict[str, Any] = {"name": name, "lr": 1e-2, "weight_decay": 0.0}
    if name.startswith("onebit"):
        section["freeze_step"] = 4
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    loss_fn = nn.functional.mse_loss
    config = base(optimizer=section, schedule={"decay": "constant"})
    with penstock.initialize(net, config, training_data=pairs(4), loss_fn=loss_fn) as engine:
        losses = [engine.train_batch() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("section", "method", "expected"),
    [
        ({"method": "local_sgd"}, LocalSGD, (1.0, 0.0, 1, 0, 0.0)),
        ({"method": "diloco"}, DiLoCo, (0.7, 0.9, 1, 0, 0.0)),
        ({"method": "diloco", "outer_lr": 0.5, "outer_momentum": 0.8}, DiLoCo, (0.5, 0.8, 1, 0, 0.0)),
        ({"method": "streaming_diloco"}, StreamingDiLoCo, (0.7, 0.9, 4, 1, 0.5)),
        ({"method": "streaming_diloco", "fragments": 2, "mixing": 0.0}, StreamingDiLoCo, (0.7, 0.9, 2, 1, 0.0)),
        ({"method": "sparseloco", "algorithm": "onebit"}, SparseLoCo, (1.0, 0.0, 1, 0, 0.0)),
    ],
)
def test_a_section_makes_its_method(section: dict[str, Any], method: type[LocalUpdates], expected: Any) -> None:
    net = nn.Linear(4, 2)
    config = base(local_updates={**section, "period": 5}, optimizer={"name": "adamw", "gradient_clipping": 1.0})
    with penstock.initialize(net, config, training_data=pairs(4), loss_fn=nn.functional.mse_loss) as engine:
        local = engine.parts.local_updates
        assert type(local) is method
        schedule = local.schedule
        assert (local.outer.lr, local.outer.momentum, schedule.fragments, schedule.overlap, local.mixing) == expected
        engine.train_batch()
        assert local.step == 1
    engine.optimizer.step()
    assert local.step == 1  # a closed engine leaves the optimizer as it was


def test_muon_steps_the_hidden_matrices_of_a_model() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
    net[3].weight = net[0].weight
    config = base(optimizer={"name": "muon"}, local_updates={"method": "muloco", "period": 5, "algorithm": "onebit"})
    with penstock.initialize(net, config, loss_fn=nn.functional.mse_loss) as engine:
        assert isinstance(engine.optimizer, MuonAdamW)
        kinds = {id(p): group["muon"] for group in engine.optimizer.param_groups for p in group["params"]}
    assert [kinds[id(p)] for p in net.parameters()] == [False, True, False, False, False]
