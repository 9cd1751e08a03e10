"""Logistic regression on 5,000 drawn rows with one L2 penalty for each of 200 features, for minibatches.

With labels s of -1 and 1, weights of which three in four are zero, and loss and penalty those of
`benchmarks.problems.logistic` without the bias::

    inner(w, h) = mean(log(1 + exp(-s x w))) + 1/2 sum_j l2_j w_j^2                                 (1)

Features are correlated: x = z A with z normal, and A of geometric spectrum from 0.1 to 1. A search tries one
penalty for all features. No optimum is known.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.problems import logistic
from benchmarks.problems.task import Task, float32

ROWS, VALID, TEST, FEATURES, BATCH = 5000, 2000, 2000, 200, 64


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of all rows."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
    spread = (rotation * np.geomspace(0.1, 1.0, FEATURES)) @ rotation.T
    x = rng.standard_normal((ROWS + VALID + TEST, FEATURES)) @ spread
    weights = rng.standard_normal(FEATURES) * (rng.random(FEATURES) < 0.25)
    return x, np.where(rng.random(len(x)) < 1 / (1 + np.exp(-x @ weights)), 1.0, -1.0)


def make(seed: int) -> Task:
    """The seed draws everything."""
    x, y = draw(seed)
    parts = np.split(np.arange(len(x)), (ROWS, ROWS + VALID))
    train, valid, test = (float32({"x": x[rows], "y": y[rows]}) for rows in parts)
    return Task(
        name="sampled",
        problem=logistic.PROBLEM,
        params={"w": jnp.zeros(FEATURES, jnp.float32), "b": jnp.float32(0)},
        hparams={"l2": jnp.full(FEATURES, 1e-2, jnp.float32)},
        train=train,
        valid=valid,
        test=test,
        steps=400,
        rate=1.0,
        solver=bilevel.newton_cg(atol=1e-5),
        box={"l2": (1e-5, 1e1)},
        spread=lambda values: {"l2": np.full(FEATURES, values["l2"], np.float32)},
        optimum=None,
        batch=BATCH,
    )
