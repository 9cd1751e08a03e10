"""Ridge regression on the diabetes data with one L2 penalty.

With 60 training rows of 10 standardised features, and targets in standard deviations::

    inner(w, l2) = 1/2 mean((x w - y)^2) + l2 / 2 |w|^2        outer(w) = 1/2 mean((x w - y)^2)      (1)

The solution is in closed form: with the eigenvectors V and eigenvalues s of ``x'x / n`` and ``c = x'y / n``,
``w(l2) = V (V'c / (s + l2))``. The optimum is the lowest outer value on a fine grid of l2 from 1e-6 to 1e4,
refined around the lowest point, in float64. The outer loss of l2 may have several local minima; on some
splits the best l2 is close to zero, and the loss flat there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.problems.task import Task, float32, parts, standardised

TRAIN, VALID, BATCH = 60, 120, 15
RANGE = (1e-6, 1e4)


def squares(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def inner(w, hparams, batch):
    return squares(w, batch) + 0.5 * hparams["l2"] * jnp.sum(w**2)


def outer(w, hparams, batch):
    del hparams
    return squares(w, batch)


def strength(hparams):
    """Of the penalty, for each entry of params."""
    return hparams["l2"]


PROBLEM = bilevel.Problem(inner, outer, constraints={"l2": bilevel.positive()})


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Features and targets, unscaled, float64."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True, scaled=False)


def closed_form(train, valid) -> Callable[[np.ndarray], np.ndarray]:
    """The outer loss, Eq. (1), of many values of l2 at once."""
    x, y = train["x"], train["y"]
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / len(y))
    target = vectors.T @ (x.T @ y) / len(y)

    def values(l2: np.ndarray) -> np.ndarray:
        w = vectors @ (target[:, None] / (eigenvalues[:, None] + l2))
        return 0.5 * np.mean((valid["x"] @ w - valid["y"][:, None]) ** 2, axis=0)

    return values


def lowest(values: Callable[[np.ndarray], np.ndarray]) -> float:
    """The lowest value in ``RANGE``: a grid of 200 points a decade, and twice a finer one around its best."""
    grid = np.geomspace(*RANGE, 2001)
    for _ in range(3):
        found = values(grid)
        best = int(np.argmin(found))
        grid = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 201)
    return float(found.min())


def make(seed: int) -> Task:
    """The seed draws the split."""
    x, y = arrays()
    train, valid, test = parts(len(y), (TRAIN, VALID), np.random.default_rng(seed))
    x, y = standardised(x, train), standardised(y, train)
    train, valid, test = ({"x": x[rows], "y": y[rows]} for rows in (train, valid, test))
    return Task(
        name="ridge",
        problem=PROBLEM,
        params=jnp.zeros(x.shape[1], jnp.float32),
        hparams={"l2": jnp.float32(1.0)},
        train=float32(train),
        valid=float32(valid),
        test=float32(test),
        steps=200,
        rate=0.2,
        solver=bilevel.newton(atol=1e-5),
        box={"l2": (1e-4, 1e2)},
        spread=lambda values: {"l2": np.float32(values["l2"])},
        optimum=lowest(closed_form(train, valid)),
        batch=BATCH,
        smoothness=bilevel.ridge_smoothness(train["x"], valid["x"], strength),
    )
