"""Few-shot tasks from data that a machine has, or from a file of features.

Each task has ``shots`` labelled examples of all K classes, and 75 queries from few of them (`bilevel.em`).
Strengths are learned on validation tasks and judged on test tasks::

    digits         8 x 8 images of digits, K = 10, pixels from 0 to 1; their variances sum to 4.7. Images of
                   validation and test are kept apart, classes are the same                             (1)
    similarities   softmax of ``SHARPNESS`` times the cosine between an image of a digit and the mean image
                   of each class, over images kept apart from both others: what a model of images and words
                   would be asked for, with prototypes in the place of the words                        (2)
    file           rows of features and a label, such as embeddings; the classes of validation and test are
                   kept apart, and features divided by one number, so that variances sum to 5           (3)

Eq. (2) stands in for similarities of a vision-language model: its classifier is good by itself, and its
errors are those of nearest means, not of such a model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bilevel import em

QUERIES = 75
SHARPNESS = 6.0  # published: 30, for cosines of words, which lie closer together; here EM does not recover
VARIANCE = 5.0


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Tasks of one seed.

    Args:
      kind: of the likelihood, "gaussian" or "dirichlet".
      shots: labelled examples of each class.
      valid: ``(train, valid)`` of the tasks that strengths are learned on, as `bilevel.em.sample_tasks` has
        them.
      test: of those that they are judged on.
    """

    kind: str
    shots: int
    valid: tuple[Any, Any]
    test: tuple[Any, Any]


def drawn(kind: str, shots: int, valid, test, seed: int, counts, present: int) -> FewShot:
    """Tasks from two sets of rows, each ``(features, labels)``."""
    made = [
        em.sample_tasks(
            x.astype(np.float32), y.astype(np.int32), count, shots, present, QUERIES, 2 * seed + i
        )
        for i, ((x, y), count) in enumerate(zip((valid, test), counts, strict=True))
    ]
    return FewShot(kind, shots, *made)


def _digits(seed: int):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    return images[order] / 16, labels[order]


def digits(seed: int, shots: int, counts=(150, 400), present: int = 3) -> FewShot:
    """Eq. (1)."""
    images, labels = _digits(seed)
    half = len(labels) // 2
    valid, test = (images[:half], labels[:half]), (images[half:], labels[half:])
    return drawn("gaussian", shots, valid, test, seed, counts, present)


def similarities(seed: int, shots: int, counts=(150, 400), present: int = 3, named: int = 297) -> FewShot:
    """Eq. (2); ``named``: images that the prototypes are the means of."""
    images, labels = _digits(seed)
    middle = images[:named].mean(axis=0)
    prototypes = np.stack([images[:named][labels[:named] == k].mean(axis=0) for k in range(10)])

    def unit(x):
        return (x - middle) / np.linalg.norm(x - middle, axis=1, keepdims=True)

    logits = SHARPNESS * unit(images[named:]) @ unit(prototypes).T
    features = np.exp(logits - logits.max(axis=1, keepdims=True))
    features /= features.sum(axis=1, keepdims=True)
    labels, half = labels[named:], (len(labels) - named) // 2
    valid, test = (features[:half], labels[:half]), (features[half:], labels[half:])
    return drawn("dirichlet", shots, valid, test, seed, counts, present)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels, from 0 on, of a file.

    An npz file has arrays "feature" (n, ...) and "label" (n,); any other has lines of numbers with commas
    between them and a label at the end, which may be a word. Lines that begin with @ or # are left out.

    Raises:
      ValueError: nothing in it, or not rows of numbers.
    """
    if path.suffix == ".npz":
        with np.load(path) as file:
            missing = {"feature", "label"} - set(file.files)
            if missing:
                raise ValueError(f"{path} has no array {', '.join(sorted(missing))}, only {file.files}.")
            features, names = file["feature"], file["label"]
        features = features.reshape(len(features), -1).astype(np.float64)
    else:
        lines = [line.strip() for line in path.read_text().splitlines()]
        rows = [line.split(",") for line in lines if line and line[0] not in "@#"]
        if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
            raise ValueError(f"{path} must have rows of the same length, features and a label.")
        features = np.array([row[:-1] for row in rows], np.float64)
        names = np.array([row[-1].strip() for row in rows])
    return features, np.unique(names, return_inverse=True)[1]


def file(path: Path, seed: int, shots: int, counts=(150, 400), present: int = 3) -> FewShot:
    """Eq. (3): half of the classes, drawn by the seed, for validation, as many of the others for test."""
    features, labels = read(path)
    classes = np.random.default_rng(seed).permutation(labels.max() + 1)
    half = len(classes) // 2
    parts = []
    for chosen in (classes[:half], classes[half : 2 * half]):
        rows = np.isin(labels, chosen)
        parts.append((features[rows], np.searchsorted(np.sort(chosen), labels[rows])))
    size = np.sqrt(parts[0][0].var(axis=0).sum() / VARIANCE)
    valid, test = ((x / size, y) for x, y in parts)
    return drawn("gaussian", shots, valid, test, seed, counts, present)
