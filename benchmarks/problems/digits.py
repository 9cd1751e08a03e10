"""scikit-learn's digits, dealt into parts, and a network with one hidden layer for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


@functools.cache
def pictures():
    """1,797 rows of 64 pixels from 0 to 16, and their labels."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def batch(rows) -> dict:
    """Pictures ``x``, pixels from 0 to 1, and labels ``y``."""
    x, y = pictures()
    return {"x": jnp.asarray(x[rows] / 16, jnp.float32), "y": jnp.asarray(y[rows], jnp.int32)}


@functools.cache
def split(seed: int, *sizes: int) -> list[dict]:
    """Batches of these sizes and one of the rest, dealt by the seed."""
    order = np.random.default_rng(seed).permutation(len(pictures()[1]))
    return [batch(rows) for rows in np.split(order, np.cumsum(sizes))]


def network(key, hidden: int) -> dict:
    """Weights of variance one over the fan-in."""
    one, two = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(one, (64, hidden)) / 8, "b": jnp.zeros(hidden)},
        "read": {"w": jax.random.normal(two, (hidden, 10)) / np.sqrt(hidden), "b": jnp.zeros(10)},
    }


def logits(params, x, activation=jax.nn.relu):
    """Of a `network`."""
    hidden = activation(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["read"]["w"] + params["read"]["b"][None]


def cross_entropy(made, labels):
    """The mean over rows."""
    return optax.softmax_cross_entropy_with_integer_labels(made, labels).mean()
