"""What a step changes for a while and gives back: torch's random states, and the modules' modes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give back torch's random states: layers are seeded, and each rank has other layers.

    A user's shuffling draws from the same generators; it has to go on alike where the inputs and where the targets
    of a batch are read.
    """
    on_gpu = device.type == "cuda"
    state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)


@contextmanager
def evaluating(modules: Collection[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; each module inside gets back the mode that it had."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for inner, training in modes:
            inner.training = training
