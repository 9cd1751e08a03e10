"""Bayesian search on the simplex with a cheap and an exact evaluation.

A Gaussian process over points x and the two fidelities, whose values are standardised for each::

    cov(f_a(x), f_b(x')) = s^2 exp(-|x - x'|^2 / (2 l^2)) (1 if a = b else rho)                       (1)

l, rho and the noise are those of the largest likelihood on a grid, s^2 is solved for. Next comes the point
and the fidelity with the largest expected improvement of the exact value, times the posterior correlation of
the fidelity with it, over its cost: Huang, Allen, Notz and Miller, "Sequential kriging optimization using
multiple-fidelity evaluations", 2006.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CHEAP, EXACT = 0, 1
LENGTHS, RHOS, NOISES = (0.1, 0.2, 0.35, 0.6, 1.0), (0.3, 0.6, 0.8, 0.9, 0.97, 0.995), (1e-3, 1e-2, 1e-1)
FIRST_CHEAP, FIRST_EXACT, CANDIDATES = 10, 3, 400


class Look(NamedTuple):
    """An evaluation, and what all have cost so far, in exact ones."""

    point: np.ndarray
    fidelity: int
    value: float
    cost: float


class Process(NamedTuple):
    """A fitted process: points, fidelities, and what solves for the posterior."""

    points: np.ndarray
    fidelity: np.ndarray
    inverse: np.ndarray
    solved: np.ndarray
    scale: float
    length: float
    rho: float


def covariance(x, a, y, b, length: float, rho: float) -> np.ndarray:
    """Eq. (1), without the scale."""
    square = np.sum((x[:, None] - y[None]) ** 2, axis=-1)
    return np.exp(-square / (2 * length**2)) * np.where(a[:, None] == b[None], 1, rho)


def fitted(points: np.ndarray, fidelity: np.ndarray, values: np.ndarray) -> Process:
    """To standardised values."""
    best = None
    rhos = RHOS if len(set(fidelity.tolist())) > 1 else RHOS[:1]
    for length, rho, noise in itertools.product(LENGTHS, rhos, NOISES):
        matrix = covariance(points, fidelity, points, fidelity, length, rho) + noise * np.eye(len(values))
        factor = np.linalg.cholesky(matrix)
        inner = np.linalg.solve(factor, values)
        scale = inner @ inner / len(values)
        likelihood = -0.5 * len(values) * math.log(scale) - np.log(np.diag(factor)).sum()
        if best is None or likelihood > best[0]:
            best = likelihood, factor, inner, scale, length, rho
    assert best is not None
    _, factor, inner, scale, length, rho = best
    inverse = np.linalg.inv(factor)
    return Process(points, fidelity, inverse, inverse.T @ inner, scale, length, rho)


def posterior(own: Process, points: np.ndarray):
    """Mean and deviation of the exact value at points, and its correlation with the cheap one."""
    rows = [
        covariance(points, np.full(len(points), a), own.points, own.fidelity, own.length, own.rho)
        for a in (CHEAP, EXACT)
    ]
    cheap, exact = (row @ own.inverse.T for row in rows)
    low, high = (np.maximum(1 - np.sum(part**2, axis=1), 1e-9) for part in (cheap, exact))
    both = own.rho - np.sum(cheap * exact, axis=1)
    return rows[EXACT] @ own.solved, np.sqrt(own.scale * high), np.abs(both) / np.sqrt(low * high)


def improvement(mean, deviation, best: float) -> np.ndarray:
    """Expected, below the best."""
    far = (best - mean) / deviation
    below = 0.5 * (1 + np.array([math.erf(x / math.sqrt(2)) for x in far]))
    return deviation * (far * below + np.exp(-0.5 * far**2) / math.sqrt(2 * math.pi))


def standardised(looks: list[Look]):
    fidelity, values = np.array([x.fidelity for x in looks]), np.array([x.value for x in looks])
    for a in set(fidelity.tolist()):
        own = fidelity == a
        values[own] = (values[own] - values[own].mean()) / (values[own].std() + 1e-12)
    return np.stack([x.point for x in looks]), fidelity, values


def search(
    evaluate: Callable[[np.ndarray, int], float],
    size: int,
    cheap: float | None,
    going: Callable[[list[Look]], bool],
    seed: int,
) -> list[Look]:
    """All evaluations while ``going``; at first random ones, exact ones where the cheap are lowest.

    Args:
      evaluate: ``(point, fidelity) -> value``, lower is better.
      size: entries of a point, which sum to one.
      cheap: what a cheap evaluation costs, in exact ones; None: there is none.
      going: of the evaluations so far.
      seed: of the points.
    """
    rng, looks, costs = np.random.default_rng(seed), [], {CHEAP: cheap or 0.0, EXACT: 1.0}

    def look(point, fidelity):
        spent = (looks[-1].cost if looks else 0.0) + costs[fidelity]
        looks.append(Look(point, fidelity, evaluate(point, fidelity), spent))

    begin = rng.dirichlet(np.ones(size), FIRST_EXACT if cheap is None else FIRST_CHEAP)
    if cheap is not None:
        for point in begin:
            look(point, CHEAP)
        begin = begin[np.argsort([x.value for x in looks])[:FIRST_EXACT]]
    for point in begin:
        look(point, EXACT)
    while going(looks):
        look(*proposed(looks, size, cheap, rng))
    return looks


def best(looks: list[Look]) -> Look:
    """The lowest exact one."""
    return min((x for x in looks if x.fidelity == EXACT), key=lambda x: x.value)


def proposed(looks: list[Look], size: int, cheap: float | None, rng) -> tuple[np.ndarray, int]:
    """Of random points and neighbours of the best, that of the largest gain for its cost."""
    points, fidelity, values = standardised(looks)
    near = rng.dirichlet(1 + 30 * best(looks).point, CANDIDATES // 4)
    candidates = np.concatenate([rng.dirichlet(np.ones(size), CANDIDATES), near])
    mean, deviation, correlation = posterior(fitted(points, fidelity, values), candidates)
    gain = improvement(mean, deviation, values[fidelity == EXACT].min())
    exact = int(np.argmax(gain))
    if cheap is not None:
        rated = gain * correlation / cheap
        other = int(np.argmax(rated))
        if rated[other] > gain[exact]:
            return candidates[other], CHEAP
    return candidates[exact], EXACT
