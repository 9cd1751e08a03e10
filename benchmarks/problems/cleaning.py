"""Data hyper-cleaning on digits: which training labels are wrong?

Half of 800 training labels are replaced by other classes; softmax regression has one weight for each
training example and one L2 penalty for each class::

    inner = mean_i weight_i ce_i + 1/2 sum_c l2_c |w_c|^2 + 1e-3 / 2 |b|^2        outer = mean_i ce_i  (1)

Outer also reports the accuracy. A search tries one penalty for all classes, with all weights 1/2: it cannot
tell the examples apart. No optimum is known.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.task import Task, float32, parts

TRAIN, VALID, CLASSES = 800, 300, 10


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"][None]


def cross_entropy(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])


def inner(params, hparams, batch):
    l2 = jnp.sum(hparams["l2"] * jnp.sum(params["w"] ** 2, axis=0)) + 1e-3 * jnp.sum(params["b"] ** 2)
    return jnp.mean(hparams["weight"] * cross_entropy(params, batch)) + 0.5 * l2


def outer(params, hparams, batch):
    del hparams
    right = jnp.argmax(logits(params, batch), axis=1) == batch["y"]
    return jnp.mean(cross_entropy(params, batch)), {"accuracy": jnp.mean(right, dtype=jnp.float32)}


PROBLEM = bilevel.Problem(
    inner, outer, constraints={"weight": bilevel.interval(0, 1), "l2": bilevel.positive()}
)


def corrupted(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the labels replaced by one of the other classes, all alike likely."""
    labels, wrong = labels.copy(), rng.permutation(len(labels))[: len(labels) // 2]
    labels[wrong] = (labels[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return labels


def hparams(l2: float):
    weight = np.full(TRAIN, 0.5, np.float32)
    return {"weight": weight, "l2": np.full(CLASSES, l2, np.float32)}


def make(seed: int) -> Task:
    """The seed draws the split and the wrong labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    train, valid, test = parts(len(y), (TRAIN, VALID), rng)
    x = x / 16
    return Task(
        name="cleaning",
        problem=PROBLEM,
        params=float32({"w": np.zeros((x.shape[1], CLASSES)), "b": np.zeros(CLASSES)}),
        hparams=float32(hparams(1e-3)),
        train=float32({"x": x[train], "y": corrupted(y[train], rng)}),
        valid=float32({"x": x[valid], "y": y[valid]}),
        test=float32({"x": x[test], "y": y[test]}),
        steps=300,
        rate=0.5,
        solver=bilevel.lbfgs(max_steps=500, atol=3e-5),
        box={"l2": (1e-5, 1.0)},
        spread=lambda values: hparams(values["l2"]),
        optimum=None,
    )
