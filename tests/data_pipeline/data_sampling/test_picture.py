from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import DataAnalyzer
from penstock.data_pipeline.data_sampling.picture import bin_edges, draw_distributions, histogram


@given(st.lists(st.integers(-300, 300), min_size=1) | st.lists(st.floats(-9, 9), min_size=1))
def test_every_sample_is_in_one_of_at_most_sixty_bins(numbers: list[float]) -> None:
    values = np.array(numbers)
    edges = bin_edges(values, np.argsort(values))
    assert 2 <= len(edges) <= 61
    assert histogram(values, edges).sum() == len(values)
    if values.dtype.kind == "i":
        assert len(set(np.diff(edges).tolist())) == 1
        assert (edges % 1 == 0.5).all()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_of_each_metric(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    corpus = [[1, 2, 3][: 1 + n % 3] * (1 + n % 5) for n in range(50)]
    analysis = DataAnalyzer(corpus, ["seqlen", "uniqueratio"], tmp_path / "a").run()
    draw_distributions(analysis, tmp_path / f"p{suffix}")
    data = (tmp_path / f"p{suffix}").read_bytes()
    assert len(data) > 2000
    if suffix == ".svg":
        assert b"<!-- uniqueratio -->" in data


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = DataAnalyzer([], ["seqlen"], tmp_path / "a").run()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_distributions(empty, tmp_path / "p.png")
    with pytest.raises(ValueError, match="a picture ends in"):
        draw_distributions(empty, tmp_path / "p.txt")
