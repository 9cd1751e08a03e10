"""Several objectives: a population over their weights, and the front that its members are on.

Of objectives f_1 ... f_k, all to be minimised, one point dominates another where it is nowhere worse and
somewhere better; the front are the points that none dominates. A scalarisation makes one outer loss of them,
and every choice of weights on the simplex has an optimum on the front::

    sum_i w_i f_i                                           reaches the convex parts of the front    (1)
    mu log sum_i exp(w_i (f_i - ideal_i) / mu)              reaches all of it as mu goes to zero     (2)

(2) is a smooth maximum, at most mu log k above the maximum, whose optimum has ``w_i (f_i - ideal_i)`` equal
for all i, or is at an end of the front. Weights are a hyperparameter under `bilevel.fixed`, so that a
population sweeps them in one program.

References:
  Das and Dennis, "Normal-boundary intersection", 1998 (the lattice of weights); Lin et al., "Smooth
  Tchebycheff scalarization for multi-objective optimization", 2024, arXiv:2402.19078, Eq. (2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.plots import BLUE, SMALL, figure
from bilevel.trees import readable

# More are a slip of the pen.
_MOST = 100_000


def weights(objectives: int, divisions: int) -> np.ndarray:
    """Weights spread evenly over the simplex: all multiples of ``1 / divisions`` that sum to one.

    Args:
      objectives: k, at least 2.
      divisions: steps from one corner of the simplex to another; with two objectives there are one more
        weights than that, with k ``comb(divisions + k - 1, k - 1)``.

    Returns:
      Shape (number of weights, k), in the order of the first objective's weight; with the corners.

    Raises:
      TypeError, ValueError: a number of the wrong kind, too small, or that makes more than 100,000 weights.

    Example:
      >>> import bilevel
      >>> bilevel.pareto.weights(2, 4)[:, 0]
      array([0.  , 0.25, 0.5 , 0.75, 1.  ])
      >>> bilevel.pareto.weights(3, 12).shape
      (91, 3)
    """
    k = validation.whole_number("objectives", objectives, 2)
    divisions = validation.whole_number("divisions", divisions, 1)
    count = math.comb(divisions + k - 1, k - 1)
    if count > _MOST:
        raise ValueError(f"divisions = {divisions} makes {count} weights of {k} objectives; take fewer.")
    return _lattice(k, divisions) / divisions


def _lattice(k: int, total: int) -> np.ndarray:
    """All k whole numbers of at least 0 with this sum, one choice a row."""
    if k == 1:
        return np.array([[total]])
    parts = [(first, _lattice(k - 1, total - first)) for first in range(total + 1)]
    return np.concatenate([np.insert(rest, 0, first, axis=1) for first, rest in parts])


def chebyshev(objectives, weights, ideal=0.0, smoothing: float = 0.01) -> jax.Array:
    """Eq. (2) of the module: the largest weighted distance to an ideal point, smoothed.

    Unlike a weighted sum it has optima on the concave parts of a front too. What the objectives are measured
    in matters: divide them by their scales.

    Args:
      objectives: shape (k,), such as the losses of an outer loss, stacked.
      weights: of each, shape (k,), not negative. What has more weight ends lower.
      ideal: values that no objective falls below, shape () or (k,); default zero, right for losses.
      smoothing: mu, in units of the weighted objectives. Larger ones are easier to follow by gradient, with
        optima that are drawn to the middle; where it is too large concave parts are out of reach again. Zero
        is the maximum itself, whose gradient jumps at its optimum.

    Raises:
      TypeError, ValueError: ``smoothing`` is no number or negative; shapes that do not fit; weights that can
        be read and are negative.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> print(f"{bilevel.pareto.chebyshev(jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5])):.3f}")
      1.500
    """
    mu = validation.number("smoothing", smoothing, minimum=0.0)
    given, objectives = weights, jnp.asarray(objectives)
    weights, ideal = jnp.asarray(weights), jnp.asarray(ideal)
    if objectives.ndim != 1 or weights.shape != objectives.shape:
        raise ValueError(
            "objectives and weights must both have shape (k,), of k objectives, got "
            f"{objectives.shape} and {weights.shape}; take jax.vmap for many points."
        )
    if all(map(readable, jax.tree.leaves(given))) and np.any(np.asarray(given) < 0):
        raise ValueError(f"weights must not be negative, got {np.min(np.asarray(given)):g}.")
    distance = weights * (objectives - ideal)
    return mu * jax.nn.logsumexp(distance / mu) if mu else jnp.max(distance)


def front(objectives) -> np.ndarray:
    """Which points no other dominates.

    Args:
      objectives: shape (n, k), a point a row, lower is better. A point with a value that is not finite is
        never on the front; of equal ones all are.

    Returns:
      Booleans, shape (n,).

    Raises:
      TypeError, ValueError: not an array of that shape.

    Example:
      >>> import bilevel
      >>> bilevel.pareto.front([[1.0, 3.0], [2.0, 2.0], [2.0, 3.0], [3.0, 1.0]])
      array([ True,  True, False,  True])
    """
    points = _points(objectives)
    finite = np.isfinite(points).all(axis=1)
    others = points[finite]

    def dominated(point) -> bool:
        return bool(np.any((others <= point).all(axis=1) & (others < point).any(axis=1)))

    return np.array([good and not dominated(p) for p, good in zip(points, finite, strict=True)], bool)


def hypervolume(objectives, reference) -> float:
    """Volume that points dominate, up to a reference point: one number for how good a front is.

    Exact, by slices along the last objective; with n points on the front the cost is about ``n^(k - 1)``.

    Args:
      objectives: as in `front`; points that are not better than the reference everywhere add nothing.
      reference: a value of each objective, shape (k,), that is worse than what matters.

    Raises:
      TypeError, ValueError: not arrays of these shapes.

    Example:
      >>> import bilevel
      >>> bilevel.pareto.hypervolume([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], reference=[4.0, 4.0])
      6.0
    """
    points = _points(objectives)
    corner = np.asarray(reference, float)
    if corner.shape != points.shape[1:] or not np.isfinite(corner).all():
        raise ValueError(f"reference must be {points.shape[1]} finite numbers, got {reference!r:.80}.")
    inside = points[front(points) & (points < corner).all(axis=1)]
    return float(_volume(inside, corner))


def _volume(points: np.ndarray, corner: np.ndarray) -> float:
    """Of points below the corner; slab by slab of the last axis, each as thick as to the next point."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return corner[0] - points.min()
    points = points[np.argsort(points[:, -1], kind="stable")]
    thickness = np.diff(np.append(points[:, -1], corner[-1]))
    slabs = (_volume(points[: i + 1, :-1], corner[:-1]) for i in range(len(points)))
    return float(sum(thick * area for thick, area in zip(thickness, slabs, strict=True) if thick))


def plot(objectives, names=None):
    """Points by their objectives, the front marked: one panel for each pair; a matplotlib Figure.

    Args:
      objectives: as in `front`.
      names: of the objectives, for the axes.

    Raises:
      ImportError: matplotlib is missing; TypeError, ValueError: as `front`, or names that do not fit.
    """
    points = _points(objectives)
    k, on = points.shape[1], front(points)
    names = [f"objective {i + 1}" for i in range(k)] if names is None else list(names)
    if len(names) != k:
        raise ValueError(f"names must be {k}, one for each objective, got {len(names)}.")
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    fig = figure(figsize=(3.6 * len(pairs), 3.2))
    for ax, (i, j) in zip(fig.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        ax.scatter(points[~on, i], points[~on, j], s=16, color="0.65", label="dominated")
        order = np.flatnonzero(on)[np.argsort(points[on, i], kind="stable")]
        # With more than two objectives the front is a surface: no line through its points.
        ax.plot(points[order, i], points[order, j], "o-" if k == 2 else "o", color=BLUE, ms=4, lw=1,
                label="front")  # fmt: skip
        ax.set(xlabel=names[i], ylabel=names[j])
    fig.axes[0].legend(**SMALL)
    return fig


def _points(objectives) -> np.ndarray:
    try:
        points = np.asarray(objectives, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"objectives must be an array, got {objectives!r:.80}: {error}.") from None
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError(
            f"objectives must have shape (points, objectives), at least two objectives, got {points.shape}."
        )
    return points
