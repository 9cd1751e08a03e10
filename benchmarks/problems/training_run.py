"""A short training run: digits of which many are labelled wrong, a small network, SGD with momentum.

scikit-learn's digits are split at random; a share of the training labels is replaced by one of the ten at
random, those of validation and test are right. The network has a layer of tanh units, and starts at a fresh
draw. Step t is one of ``optax.sgd(rate, momentum=0.9)`` on a minibatch, its rate the t-th entry of a table::

    inner, outer = mean cross-entropy

so that every schedule, whatever it is made of, is trained by the same program (`judged`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.digits import pictures

HIDDEN, BATCH, MOMENTUM, WRONG = 32, 32, 0.9, 0.2
TRAIN, VALID = 600, 600  # examples; the other 597 are the test


class Split(NamedTuple):
    """Batches of pictures ``x`` and labels ``y``."""

    train: dict
    valid: dict
    test: dict


class Losses(NamedTuple):
    """After training; shape (schedules, runs)."""

    valid: jax.Array
    test: jax.Array
    accuracy: jax.Array  # on the test


@functools.cache
def digits(seed: int, wrong: float = WRONG) -> Split:
    """A split of all digits, with a share of wrong training labels."""
    (x, y), rng = pictures(), np.random.default_rng(seed)
    order = rng.permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    replaced = rng.permutation(TRAIN)[: round(wrong * TRAIN)]
    y[replaced] = rng.integers(0, 10, len(replaced))
    cuts = np.split(np.arange(len(y)), [TRAIN, TRAIN + VALID])
    return Split(*({"x": jnp.asarray(x[i]), "y": jnp.asarray(y[i])} for i in cuts))


def start(hparams, batch, key):
    """Weights of variance one over the fan-in."""
    del hparams, batch
    sizes = (64, HIDDEN, 10)
    keys = jax.random.split(key, 2)
    return [
        {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def logits(params, x):
    first, last = params
    return jnp.tanh(x @ first["w"] + first["b"][None]) @ last["w"] + last["b"][None]


def loss(params, hparams, batch):
    del hparams
    made = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(made, batch["y"]).mean()


def inner(hparams):
    return optax.sgd(hparams["lr"], momentum=MOMENTUM)


PROBLEM = bilevel.Problem(loss, loss, start=start, constraints={"lr": bilevel.positive()})
INNER = bilevel.tuned(inner)


def trained(rates, train, key):
    """Params after a step at each of the rates, from a start and in an order of their own."""
    momentum = optax.trace(MOMENTUM)
    key_start, key_order = jax.random.split(key)
    params = start(None, None, key_start)
    rows = train["y"].shape[0]

    def step(carry, moment):
        params, state = carry
        j, rate = moment
        chosen = jax.random.choice(jax.random.fold_in(key_order, j), rows, (BATCH,))
        grad = jax.grad(loss)(params, None, jax.tree.map(lambda x: x[chosen], train))
        velocity, state = momentum.update(grad, state)
        return (jax.tree.map(lambda w, v: w - rate.astype(w.dtype) * v, params, velocity), state), None

    carry = params, momentum.init(params)
    return jax.lax.scan(step, carry, (jnp.arange(rates.shape[0]), rates))[0][0]


@jax.jit
def judged(tables, keys, split: Split) -> Losses:
    """Losses of each table of rates, shape (schedules, steps), in a run for each key."""

    def one(rates, key):
        params = trained(rates, split.train, key)
        right = jnp.argmax(logits(params, split.test["x"]), axis=1) == split.test["y"]
        return Losses(loss(params, None, split.valid), loss(params, None, split.test), jnp.mean(right))

    return jax.vmap(lambda rates: jax.vmap(lambda key: one(rates, key))(keys))(tables)
