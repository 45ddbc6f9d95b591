"""Runs of samples as flat tokens: nothing left out, and none larger than asked for."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import IndexedDataset, IndexedDatasetBuilder, ragged
from penstock.data_pipeline.data_sampling.ragged import ragged_batches, shard_bounds


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 7), st.data())
@settings(max_examples=25)
def test_batches_hold_all_samples_and_no_more_tokens_than_asked_for(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch_tokens: int, chunk: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "d"
    with IndexedDatasetBuilder(path, np.uint16) as builder:
        builder.add_items([[number] * length for number, length in enumerate(lengths)], documents=True)
    dataset = IndexedDataset(path)
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "_BOUNDS_CHUNK", chunk)  # lengths are looked at by so many at a time
        batches = list(ragged_batches(dataset, start, stop, batch_tokens=batch_tokens))
        bounds = shard_bounds(dataset, batch_tokens)
    assert [a.stop for a in batches[:-1]] == [b.start for b in batches[1:]]
    assert [token for batch in batches for token in batch.tokens.tolist()] == [
        number for number in range(start, stop) for _ in range(lengths[number])
    ]
    assert [length for batch in batches for length in np.diff(batch.offsets).tolist()] == lengths[start:stop]
    for batch in batches:
        size = sum(lengths[number] + 1 for number in range(batch.start, batch.stop))
        assert size <= batch_tokens or len(batch) == 1
        # Full: the next sample, if its length was looked at together with these, has no room.
        if batch.stop < stop and (batch.stop - start) % chunk:
            assert size + lengths[batch.stop] + 1 > batch_tokens
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    assert all(a < b for a, b in pairwise(bounds))
