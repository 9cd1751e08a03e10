"""Tiny problems with known answers; numpy formulas, so that no test compares JAX with itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel


def least_squares(w, batch):
    a, b = batch
    residual = a @ w - b
    return 0.5 * jnp.vdot(residual, residual) / b.size


# --- Ridge regression: penalties exp(hparams) / 2 |w|^2, one for all or one per feature -----------------


def ridge_train(w, log_l2, batch):
    return least_squares(w, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2)


def ridge_valid(w, log_l2, batch):
    del log_l2
    return least_squares(w, batch)


RIDGE = bilevel.Problem(inner=ridge_train, outer=ridge_valid)
# Of the scalar problem on the instance below, found by bisection on the closed form.
RIDGE_LOG_L2, RIDGE_VALUE = -3.6631908703, 0.182080575976


@dataclasses.dataclass(frozen=True, eq=False)
class Ridge:
    """An instance and its closed forms; ``log_l2`` is a scalar or has one entry per feature."""

    a: np.ndarray
    b: np.ndarray
    v: np.ndarray
    c: np.ndarray

    @property
    def train(self):
        return jnp.asarray(self.a), jnp.asarray(self.b)

    @property
    def valid(self):
        return jnp.asarray(self.v), jnp.asarray(self.c)

    def hessian(self, log_l2):
        penalty = np.broadcast_to(np.exp(log_l2), self.a.shape[1])
        return self.a.T @ self.a / self.b.size + np.diag(penalty)

    def solution(self, log_l2):
        return np.linalg.solve(self.hessian(log_l2), self.a.T @ self.b / self.b.size)

    def value_at(self, w):
        return 0.5 * np.sum((self.v @ w - self.c) ** 2) / self.c.size

    def value(self, log_l2):
        return self.value_at(self.solution(log_l2))

    def outer_grad(self, w):
        return self.v.T @ (self.v @ w - self.c) / self.c.size

    def cross(self, w, log_l2, v):
        """d_hparams (d_params inner . v)."""
        products = np.exp(log_l2) * w * v
        return products.sum() if np.ndim(log_l2) == 0 else products

    def hypergradient(self, log_l2, w=None):
        """Eq. (2) of bilevel.problem; at other params than the inner solution where they are given."""
        w = self.solution(log_l2) if w is None else w
        return -self.cross(w, log_l2, np.linalg.solve(self.hessian(log_l2), self.outer_grad(w)))

    def penalty(self, log_l2, multiplier):
        """The same by first derivatives at two minimisers, Eq. (2) of bilevel.estimators.penalty."""
        m, n = multiplier, self.c.size
        pulled = self.hessian(log_l2) + self.v.T @ self.v / (m * n)
        y = np.linalg.solve(pulled, self.a.T @ self.b / self.b.size + self.v.T @ self.c / (m * n))
        w = self.solution(log_l2)
        return m * (self.cross(y, log_l2, y) - self.cross(w, log_l2, w)) / 2

    def neumann(self, log_l2, terms, step_size, w=None):
        """The same with a truncated series in place of the inverse Hessian."""
        w = self.solution(log_l2) if w is None else w
        hessian, power = self.hessian(log_l2), self.outer_grad(w)
        total = np.zeros_like(power)
        for _ in range(terms):
            total += step_size * power
            power = power - step_size * hessian @ power
        return -self.cross(w, log_l2, total)


@functools.cache
def ridge() -> Ridge:
    """The reference instance: 20 features of which 4 matter, 40 training and 200 validation rows."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal(20) * (np.arange(20) < 4)
    a = rng.standard_normal((40, 20))
    b = a @ w + 0.5 * rng.standard_normal(40)
    v = rng.standard_normal((200, 20))
    c = v @ w + 0.5 * rng.standard_normal(200)
    return Ridge(a, b, v, c)


# --- Jointly quadratic, on any pytrees -------------------------------------------------------------------


def quadratic_train(params, hparams, batch):
    w, h = ravel_pytree(params)[0], ravel_pytree(hparams)[0]
    return 0.5 * jnp.vdot(w, batch["hessian"] @ w) + jnp.vdot(w, batch["cross"] @ h + batch["shift"])


def quadratic_valid(params, hparams, batch):
    w, h = ravel_pytree(params)[0], ravel_pytree(hparams)[0]
    distance = w - batch["target"]
    return 0.5 * jnp.vdot(distance, distance) + 0.5 * jnp.vdot(h, h), {"distance": jnp.abs(distance).max()}


QUADRATIC = bilevel.Problem(inner=quadratic_train, outer=quadratic_valid)


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
    """Data of a jointly quadratic problem: the Hessian and the cross derivative are constant."""

    train: dict
    valid: dict

    @classmethod
    def random(cls, size: int, hsize: int, seed: int, smallest=0.5, largest=2.0) -> Quadratic:
        """Eigenvalues of the Hessian spread evenly over ``[smallest, largest]``."""
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.standard_normal((size, size)))[0]
        hessian = q @ np.diag(np.linspace(smallest, largest, size)) @ q.T
        train = {
            "hessian": (hessian + hessian.T) / 2,
            "cross": rng.standard_normal((size, hsize)),
            "shift": rng.standard_normal(size),
        }
        return cls(train, {"target": rng.standard_normal(size)})

    def solution(self, h):
        return -np.linalg.solve(self.train["hessian"], self.train["cross"] @ h + self.train["shift"])

    def hypergradient(self, h):
        v = np.linalg.solve(self.train["hessian"], self.solution(h) - self.valid["target"])
        return h - self.train["cross"].T @ v

    def penalty(self, h, multiplier):
        """By first derivatives at two minimisers."""
        m, shift = multiplier, self.train["cross"] @ h + self.train["shift"]
        pulled = self.train["hessian"] + np.eye(shift.size) / m
        y = np.linalg.solve(pulled, self.valid["target"] / m - shift)
        return h + m * self.train["cross"].T @ (y - self.solution(h))

    def neumann(self, w, h, terms, step_size):
        """At any w, with the T-term series in place of the inverse Hessian."""
        power = w - self.valid["target"]
        total = np.zeros_like(power)
        for _ in range(terms):
            total += step_size * power
            power = power - step_size * self.train["hessian"] @ power
        return h - self.train["cross"].T @ total


# --- Logistic regression, one penalty per feature ---------------------------------------------------------


def logistic(w, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def logistic_train(w, log_l2, batch):
    return logistic(w, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2)


def logistic_valid(w, log_l2, batch):
    # The term in log_l2 alone gives the hypergradient a direct part.
    return logistic(w, batch) + 0.01 * jnp.sum(log_l2**2)


LOGISTIC = bilevel.Problem(inner=logistic_train, outer=logistic_valid)


@functools.cache
def logistic_data():
    """Training and validation data: 60 and 40 rows, 5 features, labels -1 and 1."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal(5)
    x = rng.standard_normal((100, 5))
    y = np.where(x @ w + rng.standard_normal(100) > 0, 1.0, -1.0)
    return (x[:60], y[:60]), (x[60:], y[60:])


def logistic_solution(log_l2, train, steps=12):
    """The inner solution by Newton steps, in numpy; converges quadratically from zero."""
    x, y = train
    w, penalty = np.zeros(x.shape[1]), np.exp(log_l2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(y * (x @ w)))
        grad = -(x.T @ (p * y)) / y.size + penalty * w
        hessian = (x.T * (p * (1 - p))) @ x / y.size + np.diag(penalty)
        w = w - np.linalg.solve(hessian, grad)
    return w


def logistic_value(log_l2, train, valid):
    """Outer loss at the inner solution, in numpy."""
    x, y = valid
    w = logistic_solution(log_l2, train)
    return np.mean(np.logaddexp(0, -y * (x @ w))) + 0.01 * np.sum(log_l2**2)


# --- A two-layer network with a weight decay per layer -----------------------------------------------------


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def network_train(params, log_decay, batch):
    x, y = batch
    decay = sum(jnp.exp(log_decay[name]) * jnp.sum(params[name] ** 2) for name in ("in", "out"))
    return jnp.mean((network(params, x) - y) ** 2) + 0.5 * decay


def network_valid(params, log_decay, batch):
    del log_decay
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


NETWORK = bilevel.Problem(inner=network_train, outer=network_valid)


@functools.cache
def network_data():
    """``(params, hparams, train, valid)``; 24 and 16 rows of 3 features, 4 hidden units."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((40, 3))
    y = np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.3 * rng.standard_normal(40)
    params = {"in": 0.5 * rng.standard_normal((3, 4)), "out": 0.5 * rng.standard_normal(4)}
    hparams = {"in": np.float64(-3.0), "out": np.float64(-2.0)}
    return params, hparams, (x[:24], y[:24]), (x[24:], y[24:])


def central_difference(fn, x, direction, step):
    """Derivative of a scalar numpy function along a direction; error ``O(step^4)``."""
    near = fn(x + step * direction) - fn(x - step * direction)
    far = fn(x + 2 * step * direction) - fn(x - 2 * step * direction)
    return (8 * near - far) / (12 * step)


def agrees(estimate, hparams, step: float = 1e-4, rtol: float = 1e-6) -> None:
    """Assert that a hypergradient agrees with differences of its value, along a direction, in float64.

    ``estimate``: of hparams, with ``value`` and ``grad``.
    """
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), hparams))
    along = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))
    expected = central_difference(lambda x: estimate(unravel(x)).value, flat, along, step)
    np.testing.assert_allclose(ravel_pytree(estimate(unravel(flat)).grad)[0] @ along, expected, rtol=rtol)
