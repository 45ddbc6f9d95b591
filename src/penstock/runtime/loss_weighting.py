"""Weights of micro-batches that hold different numbers of real tokens.

A loss function returns the mean over the tokens of its micro-batch. The mean over a global batch is not the mean of
these means unless all of them cover as many tokens: with padding or packed documents it is::

    sum over micro-batches of  tokens_i * loss_i   /   sum over micro-batches of  tokens_i

over all replicas. So micro-batch ``i`` of ``M`` gets the weight ``tokens_i * M / all tokens``; where all hold the same
number it is exactly 1.0 and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

from penstock.pipe.common_sum import CommonSums
from penstock.pipe.labels import IGNORED, count_labels
from penstock.pipe.micro_batch import MicroBatch


def weigh_by_tokens(
    batches: Sequence[MicroBatch],
    *,
    is_last: bool,
    counts: bool,
    total_micro_batches: int,
    step: int,
    training: bool,
    sums: CommonSums,
) -> list[MicroBatch]:
    """The micro-batches with their weights; every rank calls it.

    Args:
        batches: This replica's micro-batches.
        is_last: Whether this rank holds the last stage, where losses are computed.
        counts: Whether it is the one to count them, of several ranks that compute the same losses.
        total_micro_batches: Over all replicas.
        step: Optimizer step.
        training: Whether this rank trains or evaluates.
        sums: Of all ranks.

    Raises:
        ValueError: Not all ranks do the same, or no micro-batch of the global batch has a token.
    """
    labels = [count_labels(batch.targets) if is_last else 0 for batch in batches]
    here = sum(labels) if counts else 0
    total = sums.start([here], "number of real tokens in the global batch", step=step, training=training)
    tokens = int(total.wait()[0])
    if tokens == 0:
        raise ValueError(
            f"no label in the global batch of {total_micro_batches} micro-batches is real (all are {IGNORED}); "
            "leave such samples out, or look at how labels are made"
        )
    if not is_last:
        return list(batches)
    return [
        replace(batch, weight=batch.weight * (n * total_micro_batches / tokens))
        for batch, n in zip(batches, labels, strict=True)
    ]
