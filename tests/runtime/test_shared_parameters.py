from penstock.runtime.shared_parameters import SharedParameters
from support.run_jobs import model


def test_over_the_stages_every_weight_counts_once() -> None:
    for stages in (1, 2, 4):
        module = model().partitioned(stages)
        counted: list[str] = []
        for index in range(stages):
            stage = module.build_stage(index)
            shared = SharedParameters.of(stage, module)
            counted += [shared.names[id(p)] for p in shared.counted_here]
            assert len(shared.own) + len(shared.shared) == len(list(stage.canonical_parameters()))
            holds_copy = index in (0, stages - 1) and stages > 1
            assert [name for name, _ in shared.shared] == (["layer_000.weight"] if holds_copy else [])
        single = [name for name, _ in module.partitioned(1).build_stage(0).canonical_parameters()]
        assert sorted(counted) == sorted(single)
