"""DeMo: each replica keeps its own momentum and sends only the part of it that matters most.

Peng, Quesnelle, Kingma, "DeMo: decoupled momentum optimization", 2024 (arXiv:2411.19870), Algorithm 1. A replica's
momentum ``m = decay * m + g`` is cut into tiles, each transformed by a discrete cosine transform, and the largest
coefficients are sent and taken off ``m``. All replicas step along the mean of what was sent, or its sign. Momentum that
is sent when it is large enough and kept until then *is* an error memory: the one of an exchange whose memory decays.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES
from penstock.compression.optim._exchanging import ExchangingOptimizer
from penstock.compression.registry import create_compression_algorithm


class DeMo(ExchangingOptimizer):
    """SGD or signed SGD on the fast components of decoupled momenta.

    Use it as :class:`OneBitAdam`: same initial parameters everywhere, each replica's own gradient in ``.grad``.
    Parameters stay bitwise equal on all replicas; the momenta do not, and are this optimizer's error memories
    (:meth:`error_state`). One replica compresses as several do.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; with ``sign``, how far each element moves.
        compression_decay: Decay rate of the momentum.
        compression_topk: Coefficients sent of each tile.
        compression_chunk: Largest side of a tile.
        weight_decay: Decoupled.
        sign: Step along the sign, as the paper's experiments do; False steps along the mean itself.
        group: The replicas; None is the default group, or one replica where there is none.
        algorithm: Compressor of the momentum; None is ``dct_topk`` with the two numbers above.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Raises:
        ValueError: An argument is out of range, or the algorithm loses nothing, so that no momentum would be left.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        *,
        sign: bool = True,
        group: dist.ProcessGroup | None = None,
        algorithm: CompressionAlgorithm | str | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if not 0.0 <= compression_decay < 1.0:
            raise ValueError(f"compression_decay must be in [0, 1), got {compression_decay}")
        if algorithm is None:
            options = {"chunk": compression_chunk, "topk": compression_topk}
            algorithm = create_compression_algorithm("dct_topk", options)
        elif isinstance(algorithm, str):
            algorithm = create_compression_algorithm(algorithm)
        if algorithm.lossless:
            raise ValueError(f"DeMo sends a part of the momentum, but {algorithm} sends all of it; take dct_topk")
        self.compression_decay = compression_decay
        self.sign = sign
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay},
            states=(),
            compress_alone=True,
            group=group,
            algorithm=algorithm,
            bucket_bytes=bucket_bytes,
            meter=meter,
            watcher=watcher,
        )

    def _advance(self, step: int) -> None:
        for bucket in self._all_buckets():
            bucket.fill()
            assert bucket.memory is not None  # nothing lossless is taken, and one replica compresses, too
            bucket.memory.worker.mul_(self.compression_decay)
        self._exchange(compressed=True)
        self._refuse_non_finite(step, "parameters are as before this step")
        for bucket in self._all_buckets():
            param_group = self._group_of(bucket)
            lr = float(param_group["lr"])
            bucket.adopt_parameters()
            weights, directions = bucket.trainable(bucket.weights, bucket.exchanged_views)
            shrink = 1 - lr * param_group["weight_decay"]
            if weights:
                if shrink != 1.0:
                    torch._foreach_mul_(weights, shrink)
                torch._foreach_add_(weights, torch._foreach_sign(directions) if self.sign else directions, alpha=-lr)
            bucket.publish()
