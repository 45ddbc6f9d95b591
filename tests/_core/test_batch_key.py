import torch

from penstock._core.batch_key import BatchKey, current_batch_key, entered


def test_keys_nest_and_leave() -> None:
    outer, inner = BatchKey(1, 0, 0), BatchKey(1, 0, 1)
    assert current_batch_key() is None
    with entered(outer):
        with entered(inner):
            assert current_batch_key() is inner
        assert current_batch_key() is outer
    assert current_batch_key() is None


def test_a_layer_draws_the_same_again_and_another_does_not() -> None:
    key = BatchKey(seed=5, step=2, micro_batch=1)
    key.seed_layer(3)
    first = torch.rand(4)
    key.seed_layer(4)
    other = torch.rand(4)
    key.seed_layer(3)
    assert torch.equal(first, torch.rand(4))
    assert not torch.equal(first, other)
