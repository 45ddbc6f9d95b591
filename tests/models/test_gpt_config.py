import pytest

from penstock.models import GPTConfig

SMALL = {"vocab_size": 50, "num_layers": 2, "hidden_size": 12, "num_heads": 3, "context_length": 16}


def test_sizes_follow_from_the_numbers():
    config = GPTConfig(**SMALL, mlp_ratio=2.5)
    assert config.head_size == 4
    assert config.mlp_size == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_layers": -1}, "num_layers .* got -1"),
        ({"context_length": 2.5}, "context_length .* got 2.5"),
        ({"hidden_size": 13}, "hidden_size=13 is not a multiple of num_heads=3; the nearest multiples are 12 and 15"),
        ({"hidden_size": 9}, r"a head has 3 \(hidden_size=9 / num_heads=3\)"),
        ({"positions": "alibi"}, "'rope' or 'learned', got 'alibi'"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"mlp_ratio": 0.0}, "leaves 0 units"),
        ({"init_std": 0.0}, "init_std must be positive"),
        ({"norm_eps": -1.0}, "norm_eps must be positive"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


def test_learned_positions_take_odd_heads():
    assert GPTConfig(**{**SMALL, "hidden_size": 9, "positions": "learned"}).head_size == 3
