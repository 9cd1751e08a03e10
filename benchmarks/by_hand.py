"""The usual fixed schedule as one hand-written JAX program, without `bilevel`.

Per outer step 20 gradient steps, 20 conjugate gradient steps from zero, and one Adam step of rate 0.1 in the
unconstrained units of the hyperparameters. ``python -m benchmarks.by_hand PROBLEM FILE STEPS`` runs it on
arrays saved by `save` in a process that imports nothing else, and prints where its seconds went.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

STEPS, INNER_STEPS, CG_STEPS, OUTER_RATE = 500, 20, 20, 0.1


# --- Hyper-cleaning of digits, and logistic regression with a penalty per feature ------------------------


def cleaning_outer(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def cleaning_inner(params, hparams, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    l2 = jnp.sum(hparams["l2"] * jnp.sum(params["w"] ** 2, axis=0)) + 1e-3 * jnp.sum(params["b"] ** 2)
    return jnp.mean(hparams["weight"] * losses) + 0.5 * l2


def cleaning_free(hparams):
    weight = hparams["weight"]
    return {"weight": jnp.log(weight) - jnp.log1p(-weight), "l2": jnp.log(hparams["l2"])}


def cleaning_natural(free):
    return {"weight": jax.nn.sigmoid(free["weight"]), "l2": jnp.exp(free["l2"])}


def logistic_outer(params, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ params["w"] + params["b"])))


def logistic_inner(params, hparams, batch):
    return logistic_outer(params, batch) + 0.5 * jnp.sum(hparams["l2"] * params["w"] ** 2)


def logistic_free(hparams):
    return {"l2": jnp.log(hparams["l2"])}


def logistic_natural(free):
    return {"l2": jnp.exp(free["l2"])}


# inner, outer, to unconstrained units and back, the rate of gradient descent: of five tried, the one that is
# fastest without diverging (the penalties of logistic regression grow beyond what larger ones bear)
SETTINGS = {
    "cleaning": (cleaning_inner, cleaning_outer, cleaning_free, cleaning_natural, 0.5),
    "logistic": (logistic_inner, logistic_outer, logistic_free, logistic_natural, 0.1),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, steps, params, hparams, train, valid):
    """``(params, hparams, value of each outer step)``."""
    inner, outer, to_free, natural, rate = SETTINGS[name]
    adam, free = optax.adam(OUTER_RATE), to_free(hparams)

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    def add(a, x, y):
        return jax.tree.map(lambda x, y: a * x + y, x, y)

    def outer_step(carry, _):
        params, free, adam_state = carry
        hparams = natural(free)
        gradient = jax.grad(inner)
        params = jax.lax.fori_loop(
            0, INNER_STEPS, lambda _, p: add(-rate, gradient(p, hparams, train), p), params
        )
        value, b = jax.value_and_grad(outer)(params, valid)

        def cg_step(_, carry):
            x, r, p, rr = carry
            ap = jax.jvp(lambda w: gradient(w, hparams, train), (params,), (p,))[1]
            alpha = rr / jnp.maximum(dot(p, ap), 1e-30)
            x, r = add(alpha, p, x), add(-alpha, ap, r)
            new = dot(r, r)
            return x, r, add(new / jnp.maximum(rr, 1e-30), p, r), new

        zero = jax.tree.map(jnp.zeros_like, b)
        v, *_ = jax.lax.fori_loop(0, CG_STEPS, cg_step, (zero, b, b, dot(b, b)))

        def slope(free):
            return jax.jvp(lambda p: inner(p, natural(free), train), (params,), (v,))[1]

        grad = jax.tree.map(jnp.negative, jax.grad(slope)(free))
        updates, adam_state = adam.update(grad, adam_state)
        return (params, optax.apply_updates(free, updates), adam_state), value

    (params, free, _), values = jax.lax.scan(outer_step, (params, free, adam.init(free)), length=steps)
    return params, natural(free), values


# --- In a process of its own --------------------------------------------------------------------------------


def save(path, *trees) -> None:
    """Dictionaries of arrays, and single arrays, for `load`."""
    flat = {}
    for i, tree in enumerate(trees):
        for name, leaf in tree.items():
            flat[f"{i}.{name}"] = np.asarray(leaf)
    np.savez(path, **flat)


def load(path) -> list:
    """The trees that were saved."""
    trees: dict = {}
    with np.load(path) as arrays:
        for name in arrays:
            number, leaf = name.split(".")
            trees.setdefault(int(number), {})[leaf] = jnp.asarray(arrays[name])
    return [trees[i] for i in sorted(trees)]


def report(began: float, imported: float, call) -> None:
    """Where the seconds of this process went; the second call tells compilation from running."""
    loaded = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter()
    jax.block_until_ready(call())
    again = time.perf_counter() - first
    parts = {
        "imports": imported - began,
        "data": loaded - imported,
        "compilation": first - loaded - again,
        "run": again,
    }
    print(json.dumps(parts))


if __name__ == "__main__":
    _IMPORTED = time.perf_counter()
    _NAME, _TREES, _STEPS = sys.argv[1], load(sys.argv[2]), int(sys.argv[3])
    report(_BEGAN, _IMPORTED, lambda: run(_NAME, _STEPS, *_TREES))
