import pytest

from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.runtime.config import load_config
from penstock.runtime.dropping import Dropping, block_indices
from support.run_jobs import LENGTH, config, model


def test_the_blocks_are_the_longest_run_of_one_class() -> None:
    assert block_indices(model(layers=4)) == range(1, 5)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_each_stage_wraps_its_share_and_all_keep_the_same(stages: int) -> None:
    module = model(layers=4).partitioned(stages)
    wrapped: set[int] = set()
    for index in range(stages):
        dropping = Dropping(load_config(config(steps=10)), module)
        stage = module.build_stage(index)
        dropping.wrap(stage)
        layers = {int(n): layer for n, layer in stage.layers.items() if isinstance(layer, RandomLayerTokenDrop)}
        assert all(layer.layer_id == number for number, layer in layers.items())
        wrapped |= set(layers)
        # Linear from 8 to the whole sequence in 10 steps, in multiples of 4.
        kept = [dropping.update(step) for step in range(12)]
        assert kept == [8 + (step * (LENGTH - 8) // 10) // 4 * 4 for step in range(10)] + [LENGTH, LENGTH]
        assert all(layer.reserved_length == LENGTH for layer in layers.values())
    assert wrapped == {2, 3}
