"""Hypergradients beside closed forms: ridge regression, and logistic regression solved by Newton steps.

The implicit estimators get the inner solution, the others enough momentum steps to reach it. Errors are
Euclidean and relative; where several values of the hyperparameters are listed the worst is shown.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table, verdict

ASKED, ASKED_DEFAULT = 1e-9, 1e-6
# What the documentation of `bilevel.implicit` says of float32: no residual below this times cond(H).
FLOOR = 1e-7
STEPS = 1000


# --- Ridge regression, penalty exp(log_l2) / 2 |w|^2: one for all, or one per feature ---------------------


def least_squares(w, batch):
    a, b = batch
    residual = a @ w - b
    return 0.5 * jnp.vdot(residual, residual) / b.size


RIDGE = bilevel.Problem(
    inner=lambda w, log_l2, batch: least_squares(w, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2),
    outer=lambda w, log_l2, batch: least_squares(w, batch),
)


@functools.cache
def ridge_data():
    """40 training and 200 validation rows of 20 features, of which 4 matter."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal(20) * (np.arange(20) < 4)
    a = rng.standard_normal((40, 20))
    b = a @ w + 0.5 * rng.standard_normal(40)
    v = rng.standard_normal((200, 20))
    return (a, b), (v, v @ w + 0.5 * rng.standard_normal(200))


def ridge(log_l2):
    """Solution, Hessian and hypergradient by numpy."""
    (a, b), (v, c) = ridge_data()
    hessian = a.T @ a / b.size + np.diag(np.broadcast_to(np.exp(log_l2), a.shape[1]))
    w = np.linalg.solve(hessian, a.T @ b / b.size)
    adjoint = np.linalg.solve(hessian, v.T @ (v @ w - c) / c.size)
    grad = -np.exp(log_l2) * w * adjoint
    return w, hessian, grad if np.ndim(log_l2) else grad.sum()


RIDGE_POINTS = {
    "scalar": [np.asarray(t) for t in (-6.0, -2.0, 0.0, 2.0)],
    "vector": [np.full(20, -6.0), np.linspace(-6.0, 2.0, 20), np.linspace(1.0, -3.0, 20)],
}


def estimators():
    """Each with what is asked of it in float64."""
    sgd = optax.sgd(0.2, momentum=0.7)
    return {
        "implicit(cg(tol=1e-13))": (bilevel.implicit(bilevel.cg(max_steps=200, tol=1e-13)), ASKED),
        "implicit(dense())": (bilevel.implicit(bilevel.dense()), ASKED),
        f"unrolled, {STEPS} steps": (bilevel.unrolled(sgd, STEPS), ASKED),
        f"forward, {STEPS} steps": (bilevel.forward(sgd, STEPS), ASKED),
        "implicit()": (bilevel.implicit(), ASKED_DEFAULT),
    }


def relative(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def ridge_errors(estimator, points, dtype) -> list[tuple[float, float]]:
    """Error and reported error at each point."""
    fn = jax.jit(bilevel.hypergradient(RIDGE, estimator))
    train, valid = jax.tree.map(lambda x: jnp.asarray(x, dtype), ridge_data())
    out = []
    for log_l2 in points:
        w, _, grad = ridge(log_l2)
        start = np.zeros_like(w) if estimator.trajectory else w
        est = fn(jnp.asarray(start, dtype), jnp.asarray(log_l2, dtype), train, valid)
        assert est.grad.dtype == dtype
        out.append((relative(est.grad, grad), float(est.error)))
    return out


def ridge_table(dtype):
    rows = []
    for name, (estimator, asked) in estimators().items():
        found = {kind: ridge_errors(estimator, points, dtype) for kind, points in RIDGE_POINTS.items()}
        worst = {kind: max(error for error, _ in errors) for kind, errors in found.items()}
        row = [name, f"{worst['scalar']:.1e}", f"{worst['vector']:.1e}"]
        if dtype == jnp.float64:
            row += [f"{asked:.0e}", verdict(max(worst.values()), asked)]
        else:
            row += [f"{max(reported for errors in found.values() for _, reported in errors):.1e}"]
        rows.append(row)
    last = ("asked, at most", "") if dtype == jnp.float64 else ("est.error",)
    table((f"ridge, {np.dtype(dtype).name}", "scalar log-L2", "vector log-L2", *last), rows)


# --- Logistic regression on breast cancer, one penalty per feature ----------------------------------------


def log_loss(w, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


LOGISTIC = bilevel.Problem(
    inner=lambda w, log_l2, batch: log_loss(w, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2),
    outer=lambda w, log_l2, batch: log_loss(w, batch),
)


@functools.cache
def cancer_data():
    """Standardised training and validation halves, labels -1 and 1."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(y.size)
    x, y = x[order], 2.0 * y[order] - 1
    half = y.size // 2
    x = (x - x[:half].mean(axis=0)) / x[:half].std(axis=0)
    return (x[:half], y[:half]), (x[half:], y[half:])


def log_loss_grad(w, x, y):
    p = 1 / (1 + np.exp(np.clip(y * (x @ w), -500, 500)))
    return -(x.T @ (p * y)) / y.size, p


def logistic(log_l2, steps=100):
    """Solution by damped Newton steps, Hessian, ``(d_params outer, v)`` and hypergradient, in numpy."""
    (x, y), (v, c) = cancer_data()
    w, penalty = np.zeros(x.shape[1]), np.exp(log_l2)

    def loss(w):
        return np.mean(np.logaddexp(0, -y * (x @ w))) + 0.5 * np.sum(penalty * w**2)

    for _ in range(steps):
        grad, p = log_loss_grad(w, x, y)
        hessian = (x.T * (p * (1 - p))) @ x / y.size + np.diag(penalty)
        grad = grad + penalty * w
        step, size = np.linalg.solve(hessian, grad), 1.0
        while size > 1e-3 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
    assert np.linalg.norm(grad) <= 1e-13
    b = log_loss_grad(w, v, c)[0]
    adjoint = np.linalg.solve(hessian, b)
    return w, hessian, (b, adjoint), -penalty * w * adjoint


SOLVERS = {
    "implicit()": None,
    "cg(300, tol=0)": bilevel.cg(max_steps=300, tol=0.0),
    "dense()": bilevel.dense(),
}


def logistic_row(fns, log_l2, dtype) -> tuple[list[str], list[float]]:
    """A row of the table, and the reported errors relative to the documented bound."""
    train, valid = jax.tree.map(lambda x: jnp.asarray(x, dtype), cancer_data())
    log_l2 = np.full(30, log_l2)
    w, hessian, (b, adjoint), grad = logistic(log_l2)
    condition = np.linalg.cond(hessian)
    # What rounding the products with H alone leaves of the residual; at most eps cond(H).
    rounding = jnp.finfo(dtype).eps * np.linalg.norm(hessian, 2) * np.linalg.norm(adjoint) / np.linalg.norm(b)
    row = [f"{log_l2[0]:.0f}", f"{condition:.1e}", f"{FLOOR * condition:.1e}", f"{rounding:.1e}"]
    shares = []
    for fn in fns:
        est = fn(jnp.asarray(w, dtype), jnp.asarray(log_l2, dtype), train, valid)
        row += [f"{est.error:.1e}", f"{relative(est.grad, grad):.1e}"]
        shares.append(float(est.error) / (FLOOR * condition))
    return row, shares


def logistic_table(dtype):
    print(
        f"  logistic regression, {np.dtype(dtype).name}: pairs are the reported est.error (relative residual)"
    )
    print(f"  and the true relative error of {', '.join(SOLVERS)}")
    fns = [jax.jit(bilevel.hypergradient(LOGISTIC, bilevel.implicit(solver))) for solver in SOLVERS.values()]
    header = ["log-L2", "cond(H)", "1e-7 cond", "eps|H||v|/|b|"]
    for short in ("default", "cg", "dense"):
        header += [f"{short}: est.", "true"]
    found = [logistic_row(fns, t, dtype) for t in (-1.0, -3.0, -5.0, -7.0, -9.0, -12.0, -15.0, -18.0)]
    table(header, [row for row, _ in found])
    shares = np.array([shares for _, shares in found])[:, 1:]  # without the default, which stops earlier
    print("  documented: rounding leaves up to about 1e-7 cond(H) (the table's third column);", end=" ")
    print(f"cg(300) and dense() leave {shares.min():.2f} to {shares.max():.2f} of it")


def main():
    print("  relative errors against closed forms in float64")
    with jax.enable_x64(True):
        ridge_table(jnp.float64)
    print()
    ridge_table(jnp.float32)
    print()
    logistic_table(jnp.float32)


if __name__ == "__main__":
    main()
