"""Logistic regression on the breast cancer data with one L2 penalty for each of the 30 features.

With labels s of -1 and 1, and 150 training rows of standardised features::

    inner(w, b, l2) = mean(log(1 + exp(-s (x w + b)))) + 1/2 sum_j l2_j w_j^2                       (1)

and outer the same without the penalty. The data are ten measurements, each as a mean, a standard error and a
worst value: a search tries one penalty for each of these three groups. As a function of 30 penalties the
outer loss is not convex, and no optimum is known.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.problems.task import Task, float32, parts, standardised

TRAIN, VALID, BATCH = 150, 150, 30
GROUPS = ("mean", "error", "worst")  # in the order of the columns, ten each


def logistic_loss(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jax.nn.softplus(-batch["y"] * logits))


def inner(params, hparams, batch):
    return logistic_loss(params, batch) + 0.5 * jnp.sum(hparams["l2"] * params["w"] ** 2)


def outer(params, hparams, batch):
    del hparams
    return logistic_loss(params, batch)


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())


def make(seed: int) -> Task:
    """The seed draws the split."""
    from sklearn.datasets import load_breast_cancer

    x, labels = load_breast_cancer(return_X_y=True)
    train, valid, test = parts(len(labels), (TRAIN, VALID), np.random.default_rng(seed))
    x, y = standardised(x, train), 2.0 * labels - 1
    return Task(
        name="logistic",
        problem=PROBLEM,
        params={"w": jnp.zeros(x.shape[1], jnp.float32), "b": jnp.float32(0)},
        hparams={"l2": jnp.full(x.shape[1], 1e-2, jnp.float32)},
        train=float32({"x": x[train], "y": y[train]}),
        valid=float32({"x": x[valid], "y": y[valid]}),
        test=float32({"x": x[test], "y": y[test]}),
        steps=300,
        rate=0.2,
        solver=bilevel.newton(atol=1e-5),
        box=dict.fromkeys(GROUPS, (1e-5, 1e1)),
        spread=lambda values: {"l2": np.repeat(np.float32([values[name] for name in GROUPS]), 10)},
        optimum=None,
        batch=BATCH,
    )
