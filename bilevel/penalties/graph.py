"""Values that should be alike where examples are: the quadratic form of a graph's Laplacian.

With weights W between examples and values r_i::

    penalty = s / 2 sum_ij W_ij |r_i - r_j|^2 = s trace(R^T L R),                                    (1)

where L is the Laplacian of (W + W^T) / 2. `nearest` makes weights of a Gaussian kernel over the k nearest
others, which sum to one in each row::

    W_ij = exp(-|x_i - x_j|^2 / (2 width^2)) / sum_(l in N_i) ...,   j in N_i                        (2)

References:
  Belkin, Niyogi and Sindhwani, "Manifold regularization: a geometric framework for learning from labeled and
  unlabeled examples", JMLR 7, 2006.
  RoMA, 2026, uses (1) with (2) for the routing weights of mixtures of experts; only a summary of it was read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.penalties.strengths import scalar

# Differences of large sums: short products, the default of some devices, would leave nothing of them.
_EXACT = jax.lax.Precision.HIGHEST


class Neighbours(NamedTuple):
    """Weights of a sparse graph: ``weights[i, a]`` is W_ij, ``j = indices[i, a]``; both have shape (n, k)."""

    indices: jax.Array
    weights: jax.Array


def laplacian(values, strength, weights) -> jax.Array:
    """Eq. (1).

    Args:
      values: r, shape (n,) or (n, ...).
      strength: s, a scalar.
      weights: W, an array of shape (n, n), or `Neighbours`; it need not be symmetric. An array costs digits
        where neighbours differ little, as the penalty is then a small difference of large sums; `Neighbours`
        sum squares of differences, and nothing cancels.

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> chain = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
      >>> print(penalties.laplacian(jnp.array([0.0, 1.0, 3.0]), 1.0, chain))
      5.0
    """
    values = jnp.asarray(values)
    rows = values.shape[:1]
    values = values.reshape(*rows, -1) if rows else values
    sparse = isinstance(weights, Neighbours)
    matrix = weights.weights if sparse else jnp.asarray(weights)
    if not rows or matrix.ndim != 2 or matrix.shape[:1] != rows or (not sparse and matrix.shape != rows * 2):
        raise ValueError(
            "weights must be Neighbours of the rows of values, or have a row and a column for each, got "
            f"shape {matrix.shape} for values of shape {values.shape}."
        )
    strength = scalar("strength", strength)
    if sparse:
        apart = jnp.sum(jnp.square(values[:, None] - values[weights.indices]), -1)
        return strength * jnp.sum(matrix * apart) / 2
    # Differences do not change with the mean, and rounding is less without it.
    values = values - jnp.mean(values, 0, keepdims=True)
    degrees = jnp.sum(matrix, 0) + jnp.sum(matrix, 1)
    own = jnp.vdot(degrees, jnp.sum(jnp.square(values), 1), precision=_EXACT) / 2
    others = jnp.vdot(values, jnp.matmul(matrix, values, precision=_EXACT), precision=_EXACT)
    return strength * (own - others)


def nearest(x, k: int, width) -> Neighbours:
    """The graph of Eq. (2), differentiable by width and x while no other neighbours become the nearest.

    Args:
      x: shape (n, features). Memory: n^2 distances.
      k: neighbours of each, less than n.
      width: of the kernel, in units of x; a positive scalar.

    Returns:
      `Neighbours`.

    Raises:
      TypeError, ValueError: another shape, k that is no whole number or too large, a width that can be read
        and is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> graph = penalties.nearest(jnp.array([[0.0], [1.0], [3.0]]), k=1, width=1.0)
      >>> print(graph.indices.ravel(), graph.weights.ravel())
      [1 0 1] [1. 1. 1.]
    """
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, features), got {x.shape}.")
    n, k = x.shape[0], validation.whole_number("k", k, 1)
    if k >= n:
        raise ValueError(f"k must be less than the number of examples, {n}, got {k}.")
    width = scalar("width", width, positive=True)
    indices = _nearest(jax.lax.stop_gradient(x), k)
    squares = jnp.sum(jnp.square(x[:, None] - x[indices]), -1)
    return Neighbours(indices, jax.nn.softmax(-squares / (2 * jnp.square(width))))


def _nearest(x, k: int) -> jax.Array:
    """Indices of the k nearest others of each row."""
    x = x - jnp.mean(x, 0, keepdims=True)
    products = jnp.matmul(x, x.T, precision=_EXACT)
    sizes = jnp.diagonal(products)
    squares = sizes[:, None] + sizes[None, :] - 2 * products
    others = ~jnp.eye(len(x), dtype=bool)
    return jax.lax.top_k(jnp.where(others, -squares, -jnp.inf), k)[1]
