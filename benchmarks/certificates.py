"""The certified bounds of `bilevel.implicit` on 10,000 cases whose errors are known.

Each case is a hyperparameter drawn at random, params placed exactly eps from the inner solution, and a linear
system left with a residual of exactly delta, both between 0.1 and 1e-4. A third of the cases has random
directions; a third the softest direction of the Hessian for both, where an error in params hides best from
the inner gradient; a third the directions in which the hypergradient changes most, with signs that make the
two errors add up. The truth is the hypergradient at the end of Newton's method, by dense linear algebra in
float64; central differences of the outer value there check it. Nothing is allowed for rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel
from benchmarks.measure import table
from bilevel.problem import SolveInfo

CASES = 10_000
WAYS = ("random", "softest", "worst")
NEWTON_STEPS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A problem with its constants and data; hyperparameters are uniform between two ends."""

    problem: bilevel.Problem
    train: object
    valid: object
    params: np.ndarray
    hparams: np.ndarray
    ends: tuple[float, float]


class Found(NamedTuple):
    """Of each case; ``unsolved``: how far the reference is off, by its inner gradient and by differences."""

    bound: np.ndarray
    error: np.ndarray
    value_bound: np.ndarray
    value_error: np.ndarray
    unsolved: np.ndarray
    unlike: np.ndarray


# --- Problems ---------------------------------------------------------------------------------------------


def penalty(w, log_l2):
    return 0.5 * jnp.sum(jnp.exp(log_l2) * w**2)


def squares(w, hparams, batch):
    x, y = batch
    return 0.5 * jnp.mean(jnp.square(x @ w - y))


def sigmoid(w, hparams, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def softmax(w, hparams, batch):
    x, y = batch
    z = x @ w
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, y[:, None], axis=1)[:, 0])


def penalised(loss):
    return lambda w, log_l2, batch: loss(w, log_l2, batch) + penalty(w, log_l2)


def linear_data(rng, rows: int, features: int, outputs: tuple = (), rough: bool = False):
    """Features, correlated and of scales from 0.3 to 3 if ``rough``, and a noisy linear model of them."""
    x = rng.standard_normal((rows, features))
    if rough:
        x = x @ (np.eye(features) + 0.3 * rng.standard_normal((features, features)))
        x *= np.geomspace(0.3, 3.0, features)
    w = rng.standard_normal((features, *outputs)) / np.sqrt(features)
    return x, x @ w + 0.5 * rng.standard_normal((rows, *outputs))


def ridge(rng, per_feature: bool, rough: bool) -> Instance:
    x, y = linear_data(rng, 240, 20, rough=rough)
    train, valid = (x[:40], y[:40]), (x[40:], y[40:])
    known = bilevel.ridge_smoothness(train[0], valid[0], jnp.exp)
    problem = bilevel.Problem(penalised(squares), squares, smoothness=known)
    return Instance(problem, train, valid, np.zeros(20), np.zeros(20 if per_feature else ()), (-6.0, 1.0))


def logistic(rng, classes: int | None) -> Instance:
    outputs = () if classes is None else (classes,)
    x, z = linear_data(rng, 100, 5, outputs)
    y = np.sign(z) if classes is None else np.argmax(z, axis=1)
    train, valid = (x[:60], y[:60]), (x[60:], y[60:])
    known = bilevel.logistic_smoothness(train[0], valid[0], jnp.exp, classes)
    loss = sigmoid if classes is None else softmax
    problem = bilevel.Problem(penalised(loss), loss, smoothness=known)
    shape = (5, *outputs)
    return Instance(problem, train, valid, np.zeros(shape), np.zeros(shape), (-4.0, 0.0))


def quadratic(rng, uniform: bool) -> Instance:
    """Section 4.1 of the paper: entries uniform in [0, 1], or singular values between 1 and 2."""
    rows, size = (1000, 10) if uniform else (100, 4)
    a = rng.uniform(size=(3, rows, size))
    if not uniform:
        left, right = np.linalg.qr(rng.standard_normal(a.shape))[0], np.linalg.qr(a[:, :size])[0]
        a = left * np.linspace(1, 2, size) @ right
    truth = rng.uniform(size=(3, size))
    noise = 0.01 * rng.standard_normal((2, rows))
    train = a[1], a[2], a[1] @ truth[1] + a[2] @ truth[2] + noise[1]
    valid = a[0], a[0] @ truth[0] + noise[0]
    eigenvalues = np.linalg.eigvalsh(a[1].T @ a[1])
    known = bilevel.Smoothness(
        strong_convexity=float(eigenvalues[0]),
        inner=float(eigenvalues[-1]),
        outer=float(np.linalg.eigvalsh(a[0].T @ a[0])[-1]),
    )
    problem = bilevel.Problem(
        inner=lambda x, h, batch: 0.5 * jnp.sum(jnp.square(batch[0] @ x + batch[1] @ h - batch[2])),
        outer=lambda x, h, batch: 0.5 * jnp.sum(jnp.square(batch[0] @ x - batch[1])),
        smoothness=known,
    )
    return Instance(problem, train, valid, np.zeros(size), np.zeros(size), (0.0, 2.0))


# A quarter of the cases each, shared among the instances of a family.
FAMILIES: dict[str, dict[str, tuple[int, Callable]]] = {
    "ridge, one strength": {
        "independent features": (2, functools.partial(ridge, per_feature=False, rough=False)),
        "correlated features": (2, functools.partial(ridge, per_feature=False, rough=True)),
    },
    "ridge, 20 strengths": {
        "independent features": (2, functools.partial(ridge, per_feature=True, rough=False)),
        "correlated features": (2, functools.partial(ridge, per_feature=True, rough=True)),
    },
    "quadratic, section 4.1": {
        "singular values 1 to 2": (2, functools.partial(quadratic, uniform=False)),
        "uniform entries": (2, functools.partial(quadratic, uniform=True)),
    },
    "logistic, a strength per entry": {
        "sigmoid": (2, functools.partial(logistic, classes=None)),
        "softmax, 3 classes": (2, functools.partial(logistic, classes=3)),
    },
}

# --- One case ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Off:
    """A linear solver that leaves exactly the residual it is given."""

    residual: jax.Array

    def init(self, params):
        del params
        return ()

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        right = jax.tree.map(jnp.add, b, self.residual.reshape(b.shape))
        x, state, info = bilevel.dense().solve(matvec, right, state, key)
        return x, state, SolveInfo(jnp.linalg.norm(self.residual), info.steps, info.products)


def measured(instance: Instance, hparams, way, eps, delta, key) -> Found:
    """The bounds and the errors at a point ``eps`` off, with a linear residual of ``delta``."""
    problem, train, valid = instance.problem, instance.train, instance.valid
    _, unravel = ravel_pytree(instance.params)
    to_h, unravel_h = ravel_pytree(hparams)

    def inner(w, h):
        return problem.inner(unravel(w), unravel_h(h), train)

    def outer(w):
        return problem.outer(unravel(w), None, valid)

    def solution(h):
        def newton(_, w):
            return w - jnp.linalg.solve(jax.hessian(inner)(w, h), jax.grad(inner)(w, h))

        return jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros(instance.params.size))

    def hypergradient(w, h):
        v = jnp.linalg.solve(jax.hessian(inner)(w, h), jax.grad(outer)(w))
        return -jax.grad(lambda h: jnp.vdot(jax.grad(inner)(w, h), v))(h)

    w = solution(to_h)
    truth = hypergradient(w, to_h)
    hessian = jax.hessian(inner)(w, to_h)
    by_params = jax.jacobian(hypergradient)(w, to_h)
    by_residual = jnp.linalg.solve(hessian, jax.jacobian(jax.grad(inner), argnums=1)(w, to_h)).T
    softest = jnp.linalg.eigh(hessian)[1][:, 0]

    def direction(key, map_):
        random = jax.random.normal(key, w.shape)
        worst = jnp.linalg.svd(map_, full_matrices=False)[2][0]
        return jnp.stack([random / jnp.linalg.norm(random), softest, worst])[way]

    key_params, key_residual, key_sign = jax.random.split(key, 3)
    d, r = direction(key_params, by_params), direction(key_residual, by_residual)
    d = d * jax.random.rademacher(key_sign, (), d.dtype)
    # The hypergradient moves by by_params d, and by -(by_residual r) for a right-hand side that is off by r.
    agree = jnp.where(jnp.vdot(by_params @ d, by_residual @ r) <= 0, 1, -1)
    off = Off(delta * jnp.where(way == WAYS.index("worst"), agree, 1) * r)

    estimate = bilevel.hypergradient(problem, bilevel.implicit(off))(
        unravel(w + eps * d), hparams, train, valid
    )
    assert estimate.error_kind == "certified"
    along = jax.random.normal(key_sign, to_h.shape)
    step = 1e-3 / jnp.linalg.norm(along)
    at = [outer(solution(to_h + k * step * along)) for k in (-2, -1, 1, 2)]
    slope = (8 * (at[2] - at[1]) - (at[3] - at[0])) / (12 * step)
    return Found(
        bound=estimate.error,
        error=jnp.linalg.norm(ravel_pytree(estimate.grad)[0] - truth),
        value_bound=estimate.value_error,
        value_error=jnp.abs(estimate.value - outer(w)),
        unsolved=jnp.linalg.norm(jax.grad(inner)(w, to_h)),
        unlike=jnp.abs(slope - jnp.vdot(truth, along)) / (jnp.linalg.norm(truth) * jnp.linalg.norm(along)),
    )


def cases(instance: Instance, count: int, seed: int) -> tuple[Found, np.ndarray]:
    """``count`` cases, and which way each was placed."""
    rng = np.random.default_rng(seed)
    hparams = rng.uniform(*instance.ends, (count, *instance.hparams.shape))
    way = np.arange(count) % len(WAYS)
    eps, delta = 10.0 ** -rng.uniform(1, 4, (2, count))
    keys = jax.random.split(jax.random.key(seed), count)
    # One after the other: batched factorisations side by side can block one another on a CPU of two cores.
    every = jax.jit(functools.partial(jax.lax.map, lambda case: measured(instance, *case)))
    return jax.tree.map(np.asarray, every((hparams, way, eps, delta, keys))), way


def study(family: str, count: int):
    """``(part, Found, way)`` of each kind of instance in a family, ``count`` cases in all."""
    parts = FAMILIES[family]
    instances = sum(number for number, _ in parts.values())
    for index, (part, (number, make)) in enumerate(parts.items()):
        found = [
            cases(make(np.random.default_rng([index, i])), count // instances, 100 * index + i)
            for i in range(number)
        ]
        yield part, *(jax.tree.map(lambda *xs: np.concatenate(xs), *found))


# --- The report -------------------------------------------------------------------------------------------


def ratios(bound, error) -> np.ndarray:
    return bound / np.maximum(error, np.finfo(np.float64).tiny)


def below(ratio) -> int:
    """How many bounds do not hold; one that is no number does not."""
    return int(np.sum(~(ratio >= 1)))


def short(*numbers) -> tuple[str, ...]:
    return tuple(f"{number:.3g}" for number in numbers)


def main() -> None:
    rows, total, violations, unsolved, unlike = [], 0, 0, 0.0, 0.0
    with jax.enable_x64(True):
        for family in FAMILIES:
            for part, found, way in study(family, CASES // len(FAMILIES)):
                grad, value = ratios(found.bound, found.error), ratios(found.value_bound, found.value_error)
                medians = short(*(np.median(grad[way == k]) for k in range(len(WAYS))))
                rows.append(
                    (f"{family}: {part}", grad.size, below(grad), *short(grad.min(), np.median(grad)))
                    + (*medians, below(value), *short(value.min(), np.median(value)))
                )
                total, violations = total + grad.size, violations + below(grad) + below(value)
                unsolved = max(unsolved, found.unsolved.max())
                unlike = max(unlike, found.unlike.max())
    columns = ("family", "cases", "below", "least", "median", *WAYS, "value: below", "least", "median")
    print("  bound / error of the hypergradient, medians also by direction, and of the outer value")
    table(columns, rows)
    print(
        f"  {total} cases, {violations} bounds below the error (asked: 0, {'MISSED' if violations else 'ok'})"
    )
    print(f"  the reference: inner gradient at most {unsolved:.1e}, against differences at most {unlike:.1e}")


if __name__ == "__main__":
    main()
