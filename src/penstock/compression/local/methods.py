"""Local updates as their papers set them."""

from typing import Unpack

import torch
from torch.optim import Optimizer

from penstock.compression.local.local_updates import LocalOptions, LocalUpdates
from penstock.compression.local.outer_step import OuterStep
from penstock.compression.optim.muon_adamw import MuonAdamW


class LocalSGD(LocalUpdates):
    """Parameters are averaged every ``period`` steps.

    Stich, "Local SGD converges fast and communicates little", ICLR 2019 (arXiv:1805.09767). With ``period=1`` and SGD
    inside it is data parallelism. On one replica it is the inner optimizer, bit for bit.

    Args:
        optimizer: The inner optimizer.
        period: Steps between two exchanges (H).
        options: The keyword arguments of :class:`LocalUpdates` but ``outer``.
    """

    def __init__(self, optimizer: Optimizer, period: int, **options: Unpack[LocalOptions]) -> None:
        super().__init__(optimizer, period, outer=OuterStep(), **options)


class DiLoCo(LocalUpdates):
    """Every ``period`` steps, the replicas' average way is a gradient for an outer optimizer with Nesterov momentum.

    Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023 (arXiv:2311.08105),
    with AdamW inside. Compression of the ways (``algorithm="int8"``, say) comes with error feedback.

    Args:
        optimizer: The inner optimizer.
        period: Steps between two exchanges (H); 30 to 500 are usual.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum.
        nesterov: Look ahead along the momentum.
        options: The other keyword arguments of :class:`LocalUpdates`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: int,
        *,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        **options: Unpack[LocalOptions],
    ) -> None:
        super().__init__(optimizer, period, outer=OuterStep(outer_lr, outer_momentum, nesterov), **options)


class DiLoCoOptions(LocalOptions, total=False):
    """The keyword arguments of :class:`DiLoCo`."""

    outer_lr: float
    outer_momentum: float
    nesterov: bool


class StreamingDiLoCo(DiLoCo):
    """DiLoCo in fragments that take turns, each on its way while training goes on.

    Douillard et al., "Streaming DiLoCo with overlapping communication: towards a distributed free lunch", 2025
    (arXiv:2501.18512). The most that is sent at once is one fragment, and nobody waits for it for ``overlap`` steps.
    The paper sends ways in 4 bits (``algorithm="int4"``).

    Args:
        optimizer: The inner optimizer.
        period: Steps between two exchanges of the same fragment (H).
        options: The keyword arguments of :class:`DiLoCo`, with ``fragments`` 4, ``overlap`` (the paper's tau) 1 and
            ``mixing`` (the paper's alpha) 0.5 where they are not given.
    """

    def __init__(self, optimizer: Optimizer, period: int, **options: Unpack[DiLoCoOptions]) -> None:
        options.setdefault("fragments", 4)
        options.setdefault("overlap", 1)
        options.setdefault("mixing", 0.5)
        super().__init__(optimizer, period, **options)


class MuLoCo(DiLoCo):
    """DiLoCo with Muon inside, whose ways stand two bits an element with error feedback.

    Therien, Huang, Rish, Belilovsky, "MuLoCo: Muon is a practical inner optimizer for DiLoCo", 2025
    (arXiv:2505.23725).

    Args:
        optimizer: :class:`MuonAdamW`, or ``torch.optim.Muon`` where all parameters are matrices.
        period: Steps between two exchanges (H).
        options: The keyword arguments of :class:`DiLoCo`, with ``algorithm`` ``"int2"`` where it is not given.

    Raises:
        ValueError: The optimizer is another one.
    """

    def __init__(self, optimizer: Optimizer, period: int, **options: Unpack[DiLoCoOptions]) -> None:
        if not isinstance(optimizer, MuonAdamW | torch.optim.Muon):
            raise ValueError(
                f"MuLoCo is DiLoCo with Muon inside, but the optimizer is {type(optimizer).__name__}; take MuonAdamW, "
                f"or DiLoCo for {type(optimizer).__name__}"
            )
        options.setdefault("algorithm", "int2")
        super().__init__(optimizer, period, **options)


class SparseLoCo(LocalUpdates):
    """The largest one to three percent of each replica's way, in two bits; what is left over does the momentum's work.

    Sarfi, Therien, Lidin, Belilovsky, "Communication efficient LLM pre-training with SparseLoCo", 2025
    (arXiv:2508.15706): ``e = error_decay * e + way``, the largest of ``e`` are sent and taken off it, and the anchor
    moves by ``outer_lr`` times their average. There is no outer momentum.

    Args:
        optimizer: The inner optimizer.
        period: Steps between two exchanges (H).
        outer_lr: Outer learning rate.
        options: The keyword arguments of :class:`LocalUpdates` but ``outer``, with ``algorithm`` ``"topk_int2"`` and
            ``error_decay`` (the paper's beta) 0.95 where they are not given.
    """

    def __init__(
        self, optimizer: Optimizer, period: int, *, outer_lr: float = 1.0, **options: Unpack[LocalOptions]
    ) -> None:
        options.setdefault("algorithm", "topk_int2")
        options.setdefault("error_decay", 0.95)
        super().__init__(optimizer, period, outer=OuterStep(outer_lr), **options)
