"""A quadratic inner problem of known conditioning with one log penalty for each of its 50 parameters.

With a matrix A of geometric spectrum from 1e-3 to 1, of condition number 1000 (the large one: 400 parameters,
and from 1e-4)::

    inner(w, h) = 1/2 w' (A + diag(exp h)) w - b' w        outer(w) = 1/2 |w - target|^2            (1)

Any w is the solution for some h where every ``(b - A w)_i`` has the sign of ``w_i``. So the target is drawn
first, and b made such that penalties from 1e-3 to 1 reach it, except in the last coordinate: that one is an
eigenvector of A, its w ends below 1 for all penalties, and its target is 2. The optimum is thus known, 1/2,
and approached as that penalty goes to zero. The test batch is the target with noise: a shifted goal, as no
data are drawn here. Examples are rows of the matrix.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.problems.task import Task, float32

SIZE, CONDITION, NOISE = 50, 1e3, 0.3
LARGE_SIZE, LARGE_CONDITION = 400, 1e4
OPTIMUM = 0.5


def inner(w, hparams, batch):
    quadratic = jnp.vdot(w, batch["matrix"] @ w) + jnp.sum(jnp.exp(hparams["log_penalty"]) * w**2)
    return 0.5 * quadratic - jnp.vdot(batch["shift"], w)


def outer(w, hparams, batch):
    del hparams
    return 0.5 * jnp.sum((w - batch["target"]) ** 2)


PROBLEM = bilevel.Problem(inner, outer)


def smoothness(matrix: np.ndarray) -> bilevel.Smoothness:
    """The Hessian's extreme eigenvalues; the cross derivative is ``diag(exp h) w``, the outer Hessian 1."""
    eigenvalues = np.linalg.eigvalsh(matrix)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    return bilevel.Smoothness(
        strong_convexity=lambda h: low + jnp.exp(jnp.min(h["log_penalty"])),
        inner=lambda h: high + jnp.exp(jnp.max(h["log_penalty"])),
        outer=1.0,
        cross=lambda h: jnp.exp(jnp.max(h["log_penalty"])),
    )


def instance(seed: int, size: int = SIZE, condition: float = CONDITION):
    """``(matrix, shift, target, log_penalty)`` in float64, the last where all targets but one are reached."""
    rng = np.random.default_rng(seed)
    spectrum = rng.permutation(np.geomspace(1 / condition, 1, size))
    matrix, q = np.zeros((size, size)), np.linalg.qr(rng.standard_normal((size - 1, size - 1)))[0]
    matrix[:-1, :-1] = (q * spectrum[:-1]) @ q.T
    matrix[-1, -1] = spectrum[-1]
    target = rng.standard_normal(size)
    log_penalty = np.log(10.0) * rng.uniform(-3, 0, size)
    shift = matrix @ target + np.exp(log_penalty) * target
    target[-1], shift[-1], log_penalty[-1] = 2.0, matrix[-1, -1], -np.inf
    return (matrix + matrix.T) / 2, shift, target, log_penalty


def make(seed: int, large: bool = False) -> Task:
    """The seed draws the matrix, the target and the penalties that reach it."""
    size, condition = (LARGE_SIZE, LARGE_CONDITION) if large else (SIZE, CONDITION)
    matrix, shift, target, _ = instance(seed, size, condition)
    noisy = target + NOISE * np.random.default_rng((seed, 1)).standard_normal(size)
    return Task(
        name="quadratic_large" if large else "quadratic",
        problem=PROBLEM,
        params=jnp.zeros(size, jnp.float32),
        hparams={"log_penalty": jnp.full(size, np.log(1e-1), jnp.float32)},
        train=float32({"matrix": matrix, "shift": shift}),
        valid=float32({"target": target}),
        test=float32({"target": noisy}),
        steps=500,
        rate=0.5,
        solver=bilevel.newton(atol=1e-5),
        box={"penalty": (1e-4, 1e1)},
        spread=lambda values: {"log_penalty": np.full(size, np.log(values["penalty"]), np.float32)},
        optimum=OPTIMUM,
        smoothness=smoothness(matrix),
    )
