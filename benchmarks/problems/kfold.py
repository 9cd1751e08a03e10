"""Five-fold cross-validation of one L2 penalty of ridge regression, on the diabetes data.

The problem of `benchmarks.problems.ridge` lifted by `bilevel.lift`: five inner problems, one penalty, and the
mean of five outer losses. The folds are of 150 rows; the others are the test rows of every fold's model. The
optimum is found like there, from the mean of the folds' closed forms in float64.

The library counts examples by leading axes, and that is the one of the folds: an example is a fold here.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.problems import ridge
from benchmarks.problems.task import Task, float32, parts, standardised

FOLDS, ROWS = 5, 150
PROBLEM = bilevel.lift(ridge.PROBLEM)


def stack(batches: list[dict]) -> dict:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def make(seed: int) -> Task:
    """The seed draws the rows and the folds."""
    x, y = ridge.arrays()
    chosen, test = parts(len(y), (ROWS,), np.random.default_rng(seed))
    trains, valids, tests = [], [], []
    for fold in np.split(chosen, FOLDS):
        train = np.setdiff1d(chosen, fold)
        scaled = standardised(x, train), standardised(y, train)
        for rows, batches in ((train, trains), (fold, valids), (test, tests)):
            batches.append({"x": scaled[0][rows], "y": scaled[1][rows]})
    values = [ridge.closed_form(train, valid) for train, valid in zip(trains, valids, strict=True)]
    return Task(
        name="kfold",
        problem=PROBLEM,
        params=jnp.zeros((FOLDS, x.shape[1]), jnp.float32),
        hparams={"l2": jnp.float32(1.0)},
        train=float32(stack(trains)),
        valid=float32(stack(valids)),
        test=float32(stack(tests)),
        steps=200,
        rate=0.2,
        solver=bilevel.newton(atol=1e-5),
        box={"l2": (1e-4, 1e2)},
        spread=lambda numbers: {"l2": np.float32(numbers["l2"])},
        optimum=ridge.lowest(lambda l2: np.mean([value(l2) for value in values], axis=0)),
    )
