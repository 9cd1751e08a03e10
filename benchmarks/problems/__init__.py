"""The problems of the studies: ``PROBLEMS[name].make(seed)`` is a `Task`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from benchmarks.problems import cleaning, kfold, logistic, mlp, quadratic, ridge, sampled
from benchmarks.problems.task import Task


@dataclasses.dataclass(frozen=True)
class Listing:
    """A problem as it is listed.

    Args:
      make: the task of a seed.
      about: what is tuned, in a line.
      hparams: how many numbers.
      source: of the data, and the licence.
    """

    make: Callable[[int], Task]
    about: str
    hparams: int
    source: str


_UCI = "UCI repository (CC BY 4.0), with scikit-learn"
_DIABETES = "Efron et al. 2004, with scikit-learn (BSD-3)"
_DRAWN = "drawn from the seed"

PROBLEMS = {
    "ridge": Listing(ridge.make, "ridge regression, one L2 penalty", 1, f"diabetes: {_DIABETES}"),
    "logistic": Listing(
        logistic.make, "logistic regression, an L2 penalty per feature", 30, f"breast cancer: {_UCI}"
    ),
    "cleaning": Listing(
        cleaning.make, "hyper-cleaning: weights of 800 examples, half of them mislabelled, and L2", 810,
        f"digits: {_UCI}",
    ),
    "mlp": Listing(mlp.make, "a network of 64-32-10 units, weight decay per layer", 2, f"digits: {_UCI}"),
    "kfold": Listing(
        kfold.make, "five-fold cross-validation of one L2 penalty", 1, f"diabetes: {_DIABETES}"
    ),
    "quadratic": Listing(
        quadratic.make, "quadratic of condition 1,000, a penalty per parameter", 50, _DRAWN
    ),
    "quadratic_large": Listing(
        functools.partial(quadratic.make, large=True), "quadratic of condition 10,000, the same", 400, _DRAWN
    ),
    "sampled": Listing(
        sampled.make, "logistic regression on 5,000 rows, an L2 penalty per feature", 200, _DRAWN
    ),
}  # fmt: skip
LARGE = ("quadratic_large", "sampled")

__all__ = ["LARGE", "PROBLEMS", "Listing", "Task"]
