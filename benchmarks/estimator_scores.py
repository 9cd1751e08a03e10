"""Every estimator against the exact hypergradient of a real network, in a random subspace.

A network of 64, 32 and 10 units (2,410 params) reads 400 of the digits; hyperparameters are the logarithms of
a weight decay for each layer and of a scale of the subspace for each layer. In a subspace of `DIM`
coordinates (`bilevel.maps.dense_subspace`; Aghajanyan et al., 2020, arXiv:2012.13255) Newton's method solves
the inner problem to rounding, and a dense solve the system of the hypergradient: float64, checked by central
differences of the problem solved anew. What is told of each other estimator is the relative error and the
cosine of its answer, and its work, in inner gradients or products of that cost. Unrolling starts where
training would, at zero coordinates, and takes so many steps of gradient descent at ``RATE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table
from benchmarks.problems import digits
from bilevel import maps, penalties

HIDDEN, DIM, TRAIN, VALID, RATE = 32, 64, 400, 600, 0.5
STARTING = {"decay": {"hidden": 1e-3, "read": 1e-3}, "scale": {"hidden": 3.0, "read": 3.0}}
STEP = 1e-4  # of differences, relative


def loss(params, hparams, batch):
    del hparams
    return digits.cross_entropy(predict(params, batch), batch["y"])


def predict(params, batch):
    """Smooth, so that there is an exact answer."""
    return digits.logits(params, batch["x"], jnp.tanh)


INNER = bilevel.composite(
    predict=lambda params, hparams, batch: predict(params, batch),
    loss=lambda made, hparams, batch: digits.cross_entropy(made, batch["y"]),
    penalty=lambda params, hparams: penalties.l2(params, hparams["decay"]),
)


def problem(dim: int, hidden: int):
    """In the subspace, from a random network."""
    base = jax.tree.map(lambda x: x.astype(jnp.float64), digits.network(jax.random.key(0), hidden))
    subspace = maps.dense_subspace(base, dim, scales=lambda hparams: hparams["scale"])
    return bilevel.reparametrize(bilevel.Problem(INNER, loss, constraints=bilevel.positive()), subspace)


def estimators() -> Mapping[str, Any]:
    """By name; those that unroll run from the start."""
    step = optax.sgd(RATE)
    return {
        "cg(5)": bilevel.implicit(bilevel.cg(max_steps=5, tol=0.0)),
        "cg(20)": bilevel.implicit(bilevel.cg(max_steps=20, tol=0.0)),
        "cg(60)": bilevel.implicit(bilevel.cg(max_steps=60, tol=0.0)),
        "cg(20), Gauss-Newton": bilevel.implicit(bilevel.cg(max_steps=20, tol=0.0), curvature="gauss_newton"),
        "nystrom(20, 0.001)": bilevel.implicit(bilevel.nystrom(20, 1e-3)),
        "nystrom(20, 0.1)": bilevel.implicit(bilevel.nystrom(20, 0.1)),
        "neumann(20)": bilevel.implicit(bilevel.neumann(20, RATE)),
        "neumann(200)": bilevel.implicit(bilevel.neumann(200, RATE)),
        "look_back(200)": bilevel.look_back(200, step),
        "unrolled(100)": bilevel.unrolled(step, 100),
        "unrolled(1000)": bilevel.unrolled(step, 1000),
        "one_step": bilevel.one_step(step),
    }


def exact(own, hparams, train, valid):
    """The inner solution, and the hypergradient there."""
    solve = bilevel.argmin(own, bilevel.newton(100))
    fn = bilevel.hypergradient(own, bilevel.implicit(bilevel.dense()))

    @jax.jit
    def both(hparams, z):
        z = solve(hparams, train, init=z)
        return z, fn(z, hparams, train, valid).grad, own.outer(z, hparams, valid)

    z, grad, _ = both(hparams, jnp.zeros(DIM, jnp.float64))
    return z, grad, lambda hparams: both(hparams, z)[2]


def relative(grad, hparams) -> np.ndarray:
    """Of the logarithms, as a vector."""
    return np.array([float(g * h) for g, h in zip(*map(jax.tree.leaves, (grad, hparams)), strict=True)])


def main() -> None:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        study()
    finally:
        jax.config.update("jax_enable_x64", before)


def study() -> None:
    own = problem(DIM, HIDDEN)
    train, valid, _ = digits.split(0, TRAIN, VALID)
    train, valid = ({**part, "x": part["x"].astype(jnp.float64)} for part in (train, valid))
    hparams = jax.tree.map(jnp.float64, STARTING)
    z, grad, value = exact(own, hparams, train, valid)
    truth = relative(grad, hparams)
    leaves, treedef = jax.tree.flatten(hparams)

    def difference(i: int) -> float:
        up, down = (
            value(jax.tree.unflatten(treedef, [h * np.exp(s * (i == j)) for j, h in enumerate(leaves)]))
            for s in (STEP, -STEP)
        )
        return float(up - down) / (2 * STEP)

    off = np.linalg.norm([difference(i) for i in range(len(leaves))] - truth) / np.linalg.norm(truth)
    print(f"  {DIM} coordinates, {TRAIN} digits; the exact one against differences: {off:.1e}")
    rows = []
    for name, estimator in estimators().items():
        begin = jnp.zeros_like(z) if name.startswith("unrolled") else z
        estimate = jax.jit(bilevel.hypergradient(own, estimator))(begin, hparams, train, valid)
        found = relative(estimate.grad, hparams)
        error = np.linalg.norm(found - truth) / np.linalg.norm(truth)
        cosine = found @ truth / (np.linalg.norm(found) * np.linalg.norm(truth))
        counts = estimate.counts
        work = float(counts.inner_grad + counts.hvp + counts.cross) / TRAIN
        rows.append((name, f"{error:.1e}", f"{cosine:+.3f}", f"{work:.0f}"))
    table(("", "relative error", "cosine", "work"), rows)


if __name__ == "__main__":
    main()
