"""Several corpora as one dataset."""

import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt


class Corpora:
    """Map-style datasets one after another in the order of their names; what a mixture is drawn from.

    Files of configurations may list the names in any order, and a sample's number is not to depend on that.

    Args:
        parts: The datasets by name, none of them empty.

    Attributes:
        names: Of the corpora.
        parts: The datasets.
        sizes: Samples of each.
        starts: Number of each one's first sample.

    Raises:
        ValueError: There are none, or one is empty or can only be iterated.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("a mixture needs at least one corpus")
        for name, part in parts.items():
            if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
                raise ValueError(f"the corpus {name!r} is a {type(part).__name__}, which has no samples by number")
            if not len(part):
                raise ValueError(f"the corpus {name!r} is empty")
        self.names = tuple(sorted(parts))
        self.parts = tuple(parts[name] for name in self.names)
        self.sizes = tuple(len(part) for part in self.parts)
        self.starts = (0, *accumulate(self.sizes))[:-1]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(index) % len(self)
        corpus = self.corpus_of(number)
        return self.parts[corpus][number - self.starts[corpus]]

    def corpus_of(self, index: int) -> int:
        """Which corpus a sample is of, by its place in ``names``."""
        return bisect.bisect_right(self.starts, index) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, where all corpora know theirs.

        Raises:
            AttributeError: One does not.
        """
        return np.concatenate([np.asarray(part.lengths, dtype=np.int64) for part in self.parts])

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {size:,}" for name, size in zip(self.names, self.sizes, strict=True))
        return f"Corpora({inside})"
