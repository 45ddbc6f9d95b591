"""A vocabulary in parts is the whole one: logits, losses and gradients of the same weights."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from penstock.models import GPTConfig, gpt_block_indices, gpt_flops, gpt_layers, gpt_loss, gpt_model
from penstock.models.gpt_modules import GPTBlock
from penstock.models.vocabulary import VocabularyPart
from penstock.runtime.batches import labelled
from penstock.runtime.ledger_rates import _flops
from penstock.runtime.preparation import prepare
from support.run_jobs import config, model

VOCAB, PARTS = 23, 3
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).masked_fill(IDS.eq(IDS[0, 0]), -100)


def shape(**changes):
    numbers = {"vocab_size": VOCAB, "num_layers": 2, "hidden_size": 12, "num_heads": 3, "context_length": 9}
    return GPTConfig(**{**numbers, "init_std": 0.5, **changes})


def both(**changes):
    """The whole model and one in parts, of the same weights; each weight as the parts' weights side by side."""
    whole, parts = gpt_model(shape(**changes)).double(), gpt_model(shape(vocabulary_parts=PARTS, **changes)).double()
    ends = [VOCAB * part // PARTS for part in range(PARTS + 1)]
    pairs, rest = [], list(parts.parameters())
    with torch.no_grad():
        for weight in whole.parameters():
            cut = ends if weight.shape[0] == VOCAB else [0, weight.shape[0]]
            copies, rest = rest[: len(cut) - 1], rest[len(cut) - 1 :]
            for copy, (start, stop) in zip(copies, pairwise(cut), strict=True):
                copy.copy_(weight[start:stop])
            pairs.append((weight, copies))
    assert not rest
    return whole, parts, pairs


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_losses_and_gradients_are_those_of_the_whole(tied, positions):
    whole, parts, pairs = both(tie_embeddings=tied, positions=positions)
    torch.testing.assert_close(parts(IDS), whole(IDS), rtol=1e-12, atol=1e-12)
    losses = parts({"input_ids": IDS, "labels": LABELS})
    expected = F.cross_entropy(whole(IDS).transpose(1, 2), LABELS, reduction="none")
    counts = LABELS != -100
    assert counts.any()
    assert not counts.all()
    torch.testing.assert_close(losses[counts], expected[counts], rtol=1e-12, atol=1e-12)
    gpt_loss(losses, LABELS).backward()
    F.cross_entropy(whole(IDS).flatten(0, 1), LABELS.flatten()).backward()
    for weight, copies in pairs:
        torch.testing.assert_close(torch.cat([copy.grad for copy in copies]), weight.grad, rtol=1e-10, atol=1e-12)


def test_in_16_bits_the_sums_are_taken_in_float32():
    _, parts, _ = both()
    losses = parts.bfloat16()({"input_ids": IDS, "labels": LABELS})
    assert losses.dtype == torch.float32


def test_no_label_that_counts_gives_no_number_as_for_the_whole():
    assert gpt_loss(torch.ones(1, 2), torch.full((1, 2), -100)).isnan()


def test_layers_and_their_flops_add_up():
    config = shape(vocabulary_parts=5)
    specs = gpt_layers(config)
    assert all(specs[index].typename is GPTBlock for index in gpt_block_indices(config))
    counted = sum(formula(18, 9) for formula in map(_flops, specs) if formula is not None)
    assert counted == gpt_flops(shape(), 2, 9)


def test_what_is_outside_the_vocabulary_is_refused():
    part = VocabularyPart(shape(vocabulary_parts=PARTS), 0)
    with pytest.raises(ValueError, match="ids 0 to 22"):
        part({"input_ids": IDS, "labels": LABELS + 1})
    with pytest.raises(ValueError, match=r"labels must be one for each token, \(2, 9\); got \(2, 8\)"):
        part({"input_ids": IDS, "labels": LABELS[:, 1:]})
    with pytest.raises(ValueError, match="vocabulary_parts=24 is more than the vocabulary's 23 tokens"):
        shape(vocabulary_parts=24)
    with pytest.raises(ValueError, match=r"but a batch has a tuple; give dicts"):
        labelled((IDS,), LABELS)


def test_rounding_what_travels_between_the_parts_is_refused():
    made = config(stages=2, pipe={"stages": 2, "activation_compression": "int8"})
    with pytest.raises(ValueError, match="would round the terms of the loss"):
        prepare(model(vocabulary_parts=2), made, world_size=2)
