import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from penstock.models import GPTConfig, gpt_flops, gpt_head_flops, gpt_layer_flops, gpt_model

CONFIG = GPTConfig(vocab_size=50, num_layers=3, hidden_size=16, num_heads=2, context_length=32)


def attention_flops(rows, length, causal):
    pairs = length * (length + 1) // 2 if causal else length * length
    return 2 * 2 * rows * pairs * CONFIG.hidden_size


def test_a_block_by_counting_products():
    width, rows, length = CONFIG.hidden_size, 4, 10
    products = width * 3 * width + width * width + 2 * width * 4 * width
    expected = 2 * products * rows * length + attention_flops(rows, length, causal=True)
    assert gpt_layer_flops(CONFIG, rows * length, length) == expected


def test_the_model_agrees_with_torchs_counter():
    rows, length = 2, 32
    model = gpt_model(CONFIG).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(rows, length, dtype=torch.int64))
    counted = counter.get_total_flops()
    # torch's counter knows attention on the CPU only in some versions, and then without the causal saving.
    attention = {
        "causal": CONFIG.num_layers * attention_flops(rows, length, causal=True),
        "full": CONFIG.num_layers * attention_flops(rows, length, causal=False),
    }
    without = gpt_flops(CONFIG, rows, length) - attention["causal"]
    assert counted in (without, without + attention["full"])


def test_dropping_layers_compute_the_kept_tokens():
    full, half = gpt_layer_flops(CONFIG, 4 * 32, 32), gpt_layer_flops(CONFIG, 4 * 16, 16)
    head = gpt_head_flops(CONFIG, 4 * 32)
    assert gpt_flops(CONFIG, 4, 32) == 3 * full + head
    assert gpt_flops(CONFIG, 4, 32, dropping_layers=2, kept=16) == full + 2 * half + head
    assert gpt_flops(CONFIG, 4, 32, dropping_layers=2, kept=99) == 3 * full + head


def test_more_dropping_layers_than_layers():
    with pytest.raises(ValueError, match="dropping_layers=4 is not between 0 and num_layers=3"):
        gpt_flops(CONFIG, 1, 8, dropping_layers=4, kept=4)
