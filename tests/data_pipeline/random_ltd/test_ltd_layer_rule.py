import pytest
from torch import nn

from penstock.data_pipeline.random_ltd.layer_rule import LayerRule
from penstock.data_pipeline.random_ltd.layout import Layout


class Layer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, scale=1.0, position_embeddings=None):
        return hidden_states


class Open(nn.Module):
    def forward(self, x, **kwargs):
        return x


def test_the_table_can_be_read():
    rule = LayerRule.of(Layer(), {"scale": "_ S", "position_embeddings.1": "pass"})
    assert rule.describe().splitlines() == [
        "argument               kind           by",
        "hidden_states          hidden states",
        "attention_mask         mask           name",
        "scale                  _ S            declared",
        "position_embeddings    rotary         name",
        "position_embeddings.1  pass           declared",
    ]


def test_the_users_table_goes_before_the_known_names_and_inner_paths_before_outer_ones():
    rule = LayerRule.of(Open(), {"attention_mask": "causal", "extra": "B S", "extra.mask.0": "S S"})
    assert rule.kind_of("attention_mask") == "causal"
    assert rule.kind_of("extra.other") == "B S"
    assert rule.kind_of("extra.mask.0") == "S S"
    assert rule.kind_of("extra.mask.1") == "B S"
    assert rule.kind_of("position_ids") == "positions"
    assert rule.kind_of("nothing") == "by shape"
    assert [rule.name_of(at) for at in (0, 1)] == ["x", "1"]


def test_torchs_own_layers_are_known_by_name():
    rule = LayerRule.of(nn.TransformerEncoderLayer(8, 2), batch_first=False)
    kinds = {name: rule.kind_of(name) for name in rule.parameters[1:]}
    assert kinds == {"src_mask": "mask", "src_key_padding_mask": "padding", "is_causal": "by shape"}


@pytest.mark.parametrize(
    ("text", "shape", "fits"),
    [
        ("B S ...", (2, 6), True),
        ("B S ...", (1, 6, 9, 9), True),
        ("B S ...", (3, 6), False),
        ("B S ...", (2,), False),
        ("B S", (2, 6, 1), False),
        ("B _ Q S", (2, 8, 1, 6), True),
        ("B _ Q S", (2, 8, 6, 1), False),
        ("_ B S", (3, 2, 6), True),
    ],
)
def test_layouts(text, shape, fits):
    assert Layout.parse(text).fits(shape, 2, 6) is fits
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["", "B", "B D", "b s", "B B S", "S S S", "Q", "... S", "tokenz"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a layout.*or one of the kinds causal, offsets, cache, pass, tokens"):
        LayerRule.of(Layer(), {"scale": text})


def test_an_argument_that_the_layer_has_not_is_refused():
    with pytest.raises(ValueError, match=r"unknown argument of Layer 'atention_mask'; did you mean 'attention_mask'"):
        LayerRule.of(Layer(), {"atention_mask": "mask"})
