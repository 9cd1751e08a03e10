"""Steps of conjugate gradients along a run, to hypergradients of relative error 1e-3.

Quadratic inner problems with ``H = Q diag(spectrum) Q^T + diag(exp(hparams))``, a geometric spectrum and one
log penalty per parameter. The hyperparameters move by 0.05 in each coordinate and outer step, against the
sign of the exact hypergradient. Every solve stops by its residual, at the largest tolerance (of ten a decade)
whose hypergradients are all within 1e-3 along the run; each variant has its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import table, verdict
from bilevel.problem import Draw, Point

SIZE, OUTER_STEPS, STRIDE = 200, 40, 0.05
CONDITIONS = (10, 100, 1e3, 1e4, 1e5)
RANK, REFRESH = 30, 10
ERROR = 1e-3
TOLERANCES = 10 ** -np.arange(1.0, 5.0, 0.1)
FOLLOWED = "warm, follow=True"
KEY = jax.random.key(0)


def asked(condition) -> float:
    """Of the steps of cold starts."""
    return 0.6 if condition <= 100 else 0.5


def hessian(hparams, batch):
    return batch["hessian"] + jnp.diag(jnp.exp(hparams))


PROBLEM = bilevel.Problem(
    inner=lambda w, hparams, batch: (
        0.5 * jnp.vdot(w, hessian(hparams, batch) @ w) - jnp.vdot(batch["shift"], w)
    ),
    outer=lambda w, hparams, batch: 0.5 * jnp.sum((w - batch["target"]) ** 2),
)


def instance(condition):
    """``(train, valid, hparams)``; the condition number is that of H at the start."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    spectrum = np.geomspace(1 / condition, 1, SIZE)
    # Half of the smallest eigenvalue is the penalty's.
    penalty = 0.5 / condition
    matrix = (q * (spectrum - penalty)) @ q.T
    w = rng.standard_normal(SIZE)
    noise = 0.3 * rng.standard_normal(SIZE)
    train = {"hessian": (matrix + matrix.T) / 2, "shift": matrix @ w + np.sqrt(1 / condition) * noise}
    return jax.tree.map(jnp.asarray, (train, {"target": w}, np.full(SIZE, np.log(penalty))))


@jax.jit
def path(train, valid, hparams):
    """``(hparams, params, hypergradient)`` of each outer step, exact."""

    def outer_step(hparams, _):
        matrix = hessian(hparams, train)
        w = jnp.linalg.solve(matrix, train["shift"])
        exact = -jnp.exp(hparams) * w * jnp.linalg.solve(matrix, w - valid["target"])
        return hparams - STRIDE * jnp.sign(exact), (hparams, w, exact)

    return jax.lax.scan(outer_step, hparams, length=OUTER_STEPS)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(solver, warm, tol, train, valid, points):
    """``(errors, steps, products)`` at each outer step."""
    estimator = bilevel.implicit(Stopping(solver, tol))
    start = solver.init(points[0][0])

    def outer_step(state, point):
        (hparams, w, exact), key = point
        draw = Draw(lambda j: train, 1, False)
        estimate, state = estimator.estimate(PROBLEM, state, Point(w), hparams, draw, valid, key)
        error = jnp.linalg.norm(estimate.grad - exact) / jnp.linalg.norm(exact)
        if not warm:
            state = start._replace(preconditioner=state.preconditioner)
        return state, (error, estimate.solve.steps, estimate.solve.products)

    return jax.lax.scan(outer_step, start, (points, jax.random.split(KEY, OUTER_STEPS)))[1]


class Stopping:
    """A solver with a tolerance that may be traced."""

    def __init__(self, solver, tol):
        self.init, self.inside, self.tol = solver.init, solver, tol

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        del rtol
        return self.inside.solve(matvec, b, state, key, rtol=self.tol, atol=atol)


def measure(solver, warm, data):
    """Steps and products per outer step, and the tolerance that they took, by bisection."""
    loose, tight = -1, len(TOLERANCES) - 1
    found = run(solver, warm, TOLERANCES[tight], *data)
    assert np.max(found[0]) <= ERROR
    while tight - loose > 1:
        middle = (loose + tight) // 2
        tried = run(solver, warm, TOLERANCES[middle], *data)
        if np.max(tried[0]) <= ERROR:
            tight, found = middle, tried
        else:
            loose = middle
    return np.mean(found[1]), np.mean(found[2]), TOLERANCES[tight]


def rows_of(condition):
    train, valid, hparams = instance(condition)
    data = train, valid, path(train, valid, hparams)
    plain = bilevel.cg(max_steps=5000)
    preconditioner = bilevel.nystrom(RANK, damping=1 / condition, refresh=REFRESH)
    variants = {
        "cold": (plain, False),
        "warm": (plain, True),
        "warm, nystrom": (bilevel.cg(max_steps=5000, preconditioner=preconditioner), True),
        FOLLOWED: (bilevel.cg(max_steps=5000, follow=True), True),
    }
    found = {name: measure(*variant, data) for name, variant in variants.items()}
    cold_steps, cold_products, _ = found["cold"]
    # What is asked, is asked without following.
    best = min(steps for name, (steps, _, _) in found.items() if name != FOLLOWED) / cold_steps
    rows = []
    for name, (steps, products, tol) in found.items():
        row = ["", name, f"{tol:.0e}", f"{steps:.1f}", f"{steps / cold_steps:.2f}",
               f"{products:.1f}", f"{products / cold_products:.2f}", "", ""]  # fmt: skip
        rows.append(row)
    rows[0][0] = f"{condition:g}"
    rows[-1][-2:] = f"{asked(condition)}", verdict(best, asked(condition))
    return rows


def main():
    print(f"  {SIZE} parameters, {OUTER_STEPS} outer steps, nystrom(rank={RANK}, refresh={REFRESH}), means:")
    with jax.enable_x64(True):
        rows = [row for condition in CONDITIONS for row in rows_of(condition)]
    header = ("condition", "start", "tol", "steps", "of cold", "products", "of cold", "asked of best", "")
    table(header, rows)


if __name__ == "__main__":
    main()
