"""What a study needs to know of a problem, and how the data sets are split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.problem import InnerSolver


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem with its data, a start, and settings for the arms that need some.

    Args:
      name: its key in ``PROBLEMS``.
      problem: a constant of its module, so that programs are compiled once for all seeds.
      params: where every training begins.
      hparams: where the gradient arms begin; natural units.
      train: training arrays, used whole.
      valid: validation arrays; the outer loss on them is what all arms minimise.
      test: arrays that no arm sees.
      steps: outer steps of a gradient arm, where the time does not end it before.
      rate: a step size of plain gradient descent on the inner loss, chosen by hand: the usual fixed schedule.
      solver: trains accurately, whatever the hyperparameters in the box.
      box: lower and upper end of each number that a search tries, in natural units, searched on a log scale.
      spread: hyperparameters from such numbers; where there are many, several share one.
      optimum: lowest outer value, where it is known; of this seed.
      batch: rows of a minibatch at both levels; None where the data only make sense whole.
      smoothness: the problem's constants, where they are known; of this seed.
    """

    name: str
    problem: bilevel.Problem
    params: Any
    hparams: Any
    train: Any
    valid: Any
    test: Any
    steps: int
    rate: float
    solver: InnerSolver
    box: Mapping[str, tuple[float, float]]
    spread: Callable[[Mapping[str, float]], Any]
    optimum: float | None
    batch: int | None = None
    smoothness: bilevel.Smoothness | None = None


def parts(rows: int, sizes: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled row numbers in parts of these sizes, and the rest."""
    return np.split(rng.permutation(rows), np.cumsum(sizes))


def standardised(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Columns less the mean and over the standard deviation of the rows ``by``."""
    return (x - x[by].mean(0)) / x[by].std(0)


def float32(tree):
    """Floating arrays as float32 on the device, others as they are."""

    def leaf(x):
        x = np.asarray(x)
        return jnp.asarray(x, np.float32 if x.dtype.kind == "f" else np.int32)

    return jax.tree.map(leaf, tree)
