"""A small network on digits with one weight decay for each of its two layers.

64 inputs, 32 hidden tanh units, 10 classes, and 60 training rows, so few that decay matters::

    inner = mean(cross-entropy) + in / 2 |w_in|^2 + out / 2 |w_out|^2        outer = mean(cross-entropy)  (1)

The inner loss is not convex: the solution depends on the start, which all arms share, and on the way there.
No optimum is known.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.task import Task, float32, parts

TRAIN, VALID, HIDDEN, CLASSES, BATCH = 60, 400, 32, 10, 20
LAYERS = ("in", "out")


def cross_entropy(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"]["w"] + params["in"]["b"][None])
    logits = hidden @ params["out"]["w"] + params["out"]["b"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def inner(params, hparams, batch):
    decay = sum(hparams[layer] * jnp.sum(params[layer]["w"] ** 2) for layer in LAYERS)
    return cross_entropy(params, batch) + 0.5 * decay


def outer(params, hparams, batch):
    del hparams
    return cross_entropy(params, batch)


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())


def start(rng: np.random.Generator) -> dict:
    """Normal weights of variance 1 / inputs, no biases."""
    shapes = {"in": (64, HIDDEN), "out": (HIDDEN, CLASSES)}
    return {
        layer: {"w": rng.standard_normal(shape) / np.sqrt(shape[0]), "b": np.zeros(shape[1])}
        for layer, shape in shapes.items()
    }


def make(seed: int) -> Task:
    """The seed draws the split and the start."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = parts(len(y), (TRAIN, VALID), rng)
    train, valid, test = (float32({"x": x[part] / 16, "y": y[part]}) for part in rows)
    return Task(
        name="mlp",
        problem=PROBLEM,
        params=float32(start(rng)),
        hparams={layer: jnp.float32(1e-4) for layer in LAYERS},
        train=train,
        valid=valid,
        test=test,
        steps=400,
        rate=0.3,
        solver=bilevel.lbfgs(max_steps=1000, atol=1e-4),
        box=dict.fromkeys(LAYERS, (1e-5, 1e-1)),
        spread=lambda values: {layer: np.float32(values[layer]) for layer in LAYERS},
        optimum=None,
        batch=BATCH,
    )
