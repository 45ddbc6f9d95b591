import copy
import pickle

import pytest
import torch
from torch import nn

from penstock.data_pipeline.random_ltd import (
    RandomLayerTokenDrop,
    RandomLTDScheduler,
    convert_to_random_ltd,
    describe_random_ltd,
    remove_random_ltd,
    save_without_random_ltd,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden):
        return hidden + self.linear(hidden)


class Wide(Block):
    pass


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.inner = Block()


class Model(nn.Module):
    def __init__(self, layers=12):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config(ids, total=12):
    return {
        "total_layer_num": total,
        "random_ltd_layer_num": len(ids),
        "random_ltd_layer_id": list(ids),
        "random_ltd_schedule": {
            "min_value": 8,
            "max_value": 32,
            "schedule_config": {"require_steps": 10, "seq_per_step": 8},
        },
    }


def wrapped(model):
    return [name for name, module in model.named_modules() if isinstance(module, RandomLayerTokenDrop)]


def test_by_class():
    model = Model(3)
    assert convert_to_random_ltd(model, Block) is model
    assert wrapped(model) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.layer_id for block in model.blocks] == [0, 1, 2]
    assert [block.reserved_length for block in model.blocks] == [None] * 3


def test_by_exact_name_so_that_1_is_not_10():
    model = convert_to_random_ltd(Model(), "blocks.1")
    assert wrapped(model) == ["blocks.1"]


def test_by_several_names_and_classes():
    model = Model(3)
    model.blocks.append(Wide())
    convert_to_random_ltd(model, ("blocks.0", Wide))
    assert wrapped(model) == ["blocks.0", "blocks.3"]


def test_the_config_chooses_by_number():
    model = convert_to_random_ltd(Model(), Block, config([1, 10]))
    assert wrapped(model) == ["blocks.1", "blocks.10"]
    assert [model.blocks[i].layer_id for i in (1, 10)] == [1, 10]
    assert model.blocks[1].reserved_length == 8
    assert wrapped(convert_to_random_ltd(Model(), Block, {**config([1]), "enabled": False})) == []


def test_the_outermost_layer_is_wrapped_and_a_shared_one_once():
    model = nn.Sequential(Nested(), Nested())
    model.append(model[0])
    convert_to_random_ltd(model, Block)
    assert wrapped(model) == ["0", "1"]
    assert model[2] is model[0]
    assert model[1].layer_id == 1


def test_the_model_itself_may_be_the_layer():
    model = convert_to_random_ltd(Block(), Block)
    assert isinstance(model, RandomLayerTokenDrop)


@pytest.mark.parametrize("convert_type", [Block, "blocks.2", (Block,)])
def test_the_state_dict_loads_in_the_original(convert_type):
    torch.manual_seed(0)
    model, original = convert_to_random_ltd(Model(), convert_type), Model()
    state = save_without_random_ltd(model)
    assert list(state) == list(original.state_dict()) == list(model.state_dict())
    original.load_state_dict(state, strict=True)
    x = torch.randn(2, 16, 3)
    assert torch.equal(original(x), model(x))
    other = convert_to_random_ltd(Model(), convert_type)
    other.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


def test_a_converted_model_can_be_sent_to_another_process():
    model = convert_to_random_ltd(Model(3), Block, config([1], total=3))
    other = pickle.loads(pickle.dumps(model))
    assert list(other.state_dict()) == list(Model(3).state_dict())
    other.load_state_dict(Model(3).state_dict(), strict=True)
    other(torch.randn(2, 16, 3))
    assert other.blocks[1].computed_tokens == 16


def test_the_inside_of_a_parallel_wrapper_is_converted():
    model = nn.DataParallel(Model(3))
    assert convert_to_random_ltd(model, "blocks.1") is model
    assert wrapped(model.module) == ["blocks.1"]
    assert list(save_without_random_ltd(model)) == list(Model(3).state_dict())


def test_a_route_joins_layers_of_consecutive_ids():
    model = convert_to_random_ltd(Model(), Block, {**config([1, 2, 3, 6, 8, 9]), "route": "block"})
    layers = [model.blocks[i] for i in (1, 2, 3, 6, 8, 9)]
    assert [layer.route for layer in layers] == ["begin", "inside", "end", None, "begin", "end"]
    assert [layer.layer_id for layer in layers] == [1, 1, 1, 6, 8, 8]
    x = torch.randn(2, 16, 3)
    assert model(x).shape == (2, 16, 2)
    assert [layer.computed_tokens for layer in layers] == [16] * 6


def test_the_layers_come_back():
    original = Model()
    layers = list(original.blocks)
    model = convert_to_random_ltd(original, Block, config([1, 10]))
    assert remove_random_ltd(model) is model
    assert list(model.blocks) == layers
    assert describe_random_ltd(model) == "no layer drops tokens"
    shared = nn.Sequential(Block(), Block())
    shared.append(shared[0])
    remove_random_ltd(convert_to_random_ltd(shared, Block))
    assert shared[2] is shared[0]
    assert isinstance(shared[0], Block)
    block = Block()
    assert remove_random_ltd(convert_to_random_ltd(block, Block)) is block
    parallel = nn.DataParallel(convert_to_random_ltd(Model(), Block))
    assert wrapped(remove_random_ltd(parallel)) == []


def test_what_was_converted_can_be_read():
    section = {**config([1, 2]), "model_mask_name": "mask", "route": "block"}
    model = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2) for _ in range(12)))
    convert_to_random_ltd(model, nn.TransformerEncoderLayer, {**section, "model_mask_name": "src_mask"})
    assert describe_random_ltd(model).splitlines() == [
        "1: TransformerEncoderLayer (begin of route 1), keeps 8 tokens of each row",
        "2: TransformerEncoderLayer (end of route 1), keeps 8 tokens of each row",
        "argument              kind           by",
        "src                   hidden states",
        "src_mask              mask           declared",
        "src_key_padding_mask  padding        name",
        "is_causal             by shape",
    ]
    RandomLTDScheduler({**section, "model_mask_name": "src_mask", "enabled": False}).attach(model)
    assert "2: TransformerEncoderLayer (end of route 1), keeps all tokens" in describe_random_ltd(model).splitlines()


def test_arguments_given_in_the_call_go_before_those_of_the_config():
    section = {**config([1]), "arguments": {"src_mask": "causal", "src_key_padding_mask": "pass"}}
    model = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2) for _ in range(12)))
    convert_to_random_ltd(model, nn.TransformerEncoderLayer, section, arguments={"src_mask": "S S"})
    assert model[1].rule.kind_of("src_mask") == "S S"
    assert model[1].rule.kind_of("src_key_padding_mask") == "pass"


def test_training_with_dropping_changes_the_output_and_eval_does_not():
    torch.manual_seed(0)
    original = Model()
    model = convert_to_random_ltd(Model(), Block, config([3]))
    model.load_state_dict(original.state_dict())
    x = torch.randn(2, 16, 3)
    assert not torch.equal(model(x), original(x))
    model.eval()
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert_to_random_ltd(Model(), nn.Conv2d), "no layer of Conv2d; its modules are of Block, Linear"),
        (lambda: convert_to_random_ltd(Model(), "blocks.12"), "unknown layer 'blocks.12'; did you mean 'blocks.2"),
        (lambda: convert_to_random_ltd(Model(3), Block, config([1])), "total_layer_num=12, but the model has 3"),
        (
            lambda: convert_to_random_ltd(Model(), ("blocks.1", "blocks.2"), config([1, 2])),
            "has 2 such layers: blocks.1, blocks.2. random_ltd_layer_id chooses .*: match or name all of those",
        ),
        (
            lambda: convert_to_random_ltd(Model(30), "Block"),
            r"'Block' is the class of blocks.0, .*blocks.11, ... and 18 more; pass the class itself",
        ),
        (lambda: convert_to_random_ltd(convert_to_random_ltd(Model(), Block), Block), "converted .* already"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_torchs_own_encoder_can_be_converted(batch_first, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = copy.deepcopy(plain)
    order = "batch_seq_dim" if batch_first else "seq_batch_dim"
    schedule = {"min_value": 4, "max_value": 6, "schedule_config": {"require_steps": 10, "seq_per_step": 1}}
    section = {
        "total_layer_num": 2,
        "random_ltd_layer_num": 2,
        "random_ltd_layer_id": [0, 1],
        "hidden_state_order": order,
    }
    convert_to_random_ltd(model, nn.TransformerEncoderLayer, {**section, "random_ltd_schedule": schedule})
    x = torch.randn((3, 6, 8) if batch_first else (6, 3, 8))
    mask = nn.Transformer.generate_square_subsequent_mask(6) if masked else None
    padding = torch.zeros(3, 6).masked_fill(torch.arange(6) >= 5, -torch.inf)
    out = model(x, mask=mask, src_key_padding_mask=padding)
    assert out.shape == x.shape
    out.sum().backward()
    assert model.layers[0].computed_tokens == 12
    assert model.layers[0].linear1 is model.layers[0].random_ltd_layer.linear1  # looked up in the layer itself
    assert torch.equal(model.eval()(x, mask=mask), plain.eval()(x, mask=mask))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.layers[0].nothing
