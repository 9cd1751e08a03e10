"""What the task "searches" searches: the problems of the studies with an axis for every number, and a lasso.

Of "logistic" that is a penalty for each feature, of "cleaning" a weight for each of 800 rows and a penalty
for each class. "lasso" has one penalty, on a wide design: 200 rows, 2,000 features, 20 of them used; other
200 rows validate. Features and targets have mean zero on the training rows: no arm needs an intercept.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks import lasso
from benchmarks.problems import PROBLEMS, Task
from benchmarks.problems.task import float32

WEIGHTS = (1e-3, 1.0)
L1 = (1e-2, 1.0)


def task_of(problem: str, seed: int) -> Task:
    """With one number to search for each hyperparameter."""
    return AXES[problem](make_lasso(seed) if problem == "lasso" else PROBLEMS[problem].make(seed))


def per_feature(task: Task) -> Task:
    names = [f"feature {i}" for i in range(len(task.hparams["l2"]))]
    return dataclasses.replace(
        task,
        box=dict.fromkeys(names, (1e-5, 1e1)),
        spread=lambda values: {"l2": np.float32([values[name] for name in names])},
    )


def per_example(task: Task) -> Task:
    rows, classes = ([f"{name} {i}" for i in range(len(task.hparams[name]))] for name in ("weight", "l2"))

    def spread(values):
        weight, l2 = (np.float32([values[name] for name in names]) for names in (rows, classes))
        return {"weight": weight, "l2": l2}

    box = dict.fromkeys(rows, WEIGHTS) | dict.fromkeys(classes, task.box["l2"])
    return dataclasses.replace(task, box=box, spread=spread)


def make_lasso(seed: int) -> Task:
    """The seed draws the data."""
    train, valid, test = lasso.halves(seed)
    x, y = train["x"].mean(axis=0), train["y"].mean()
    centred = [{**part, "x": part["x"] - x, "y": part["y"] - y} for part in (train, valid, test)]
    step_size = lasso.step_size_of(centred[0])
    train, valid, test = (float32(part) for part in centred)
    return Task(
        name="lasso",
        problem=lasso.lasso(step_size),
        params=jnp.zeros(len(x), jnp.float32),
        hparams={"l1": jnp.float32(1.0)},
        train=train,
        valid=valid,
        test=test,
        steps=200,
        rate=1.0,  # of its own step, which knows the curvature
        solver=bilevel.picard(5000, atol=3e-6, anderson=10),
        box={"l1": L1},
        spread=lambda values: {"l1": np.float32(values["l1"])},
        optimum=None,
    )


def _as_it_is(task: Task) -> Task:
    return task


AXES = {
    "ridge": _as_it_is,
    "lasso": _as_it_is,
    "logistic": per_feature,
    "mlp": _as_it_is,
    "cleaning": per_example,
}
