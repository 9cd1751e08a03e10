"""Generalised minimal residuals: for systems that are not symmetric, such as those of fixed points.

From the residual r of the best solution so far, each step adds one vector to an orthonormal basis V of the
space spanned by ``r, A r, A^2 r, ...`` and takes from it the correction that makes the residual smallest::

    A V_k = V_{k+1} H_k,   y = argmin | |r| e_1 - H_k y |,   x <- x + V_k y                  (1)

The small least-squares problem is kept solved by rotations Q with ``Q H_k`` triangular, so that the residual
is known at each step. After ``restart`` vectors the basis is dropped and built again from what is left.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from bilevel import validation
from bilevel.problem import PyTree, SolveInfo
from bilevel.vectors import (
    axpy,
    combine,
    norm,
    products,
    put,
    row,
    scaled,
    threshold,
    unit_of,
    vdot,
    where,
    zeros,
)


class _Basis(NamedTuple):
    vectors: PyTree  # V, rows not yet reached are zero
    rotations: jax.Array  # Q
    triangle: jax.Array  # Q H
    steps: jax.Array  # k
    left: jax.Array  # norm of the residual of Eq. (1)
    more: jax.Array  # whether the space can grow


class _Loop(NamedTuple):
    x: PyTree
    residual: PyTree
    left: jax.Array  # its norm
    steps: jax.Array
    passes: jax.Array
    falling: jax.Array


class GMRESState(NamedTuple):
    """The last solution, where the next solve starts."""

    x: PyTree


@dataclasses.dataclass(frozen=True)
class GMRES:
    """See `gmres`."""

    max_steps: int
    tol: float | None
    atol: float
    restart: int

    def init(self, params):
        """Zeros: the first solve starts cold."""
        return GMRESState(jax.tree.map(jnp.zeros_like, params))

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """``A x = b`` from the last solution; ``rtol``, ``atol`` replace the settings."""
        del key
        # In the unit of b: squares of very small or large numbers leave the range of their dtype.
        unit = unit_of(b)
        b, warm = scaled(b, 1 / unit), scaled(state.x, 1 / unit)
        bb = vdot(b, b)
        rtol, atol = self.tol if rtol is None else rtol, self.atol if atol is None else atol
        target = jnp.sqrt(threshold(bb, rtol, atol / unit))
        longest = min(self.restart, self.max_steps)

        def going(loop):
            more = (loop.left > target) & (loop.steps < self.max_steps) & loop.falling
            return more | (loop.passes == 0)

        def one_pass(loop):
            # The first pass takes no step and only measures the start: one program for both.
            first = loop.passes == 0
            limit = jnp.where(first, 0, jnp.minimum(longest, self.max_steps - loop.steps))
            basis = _krylov(matvec, loop.residual, loop.left, longest, limit, target)
            x = axpy(1.0, combine(_coefficients(basis, loop.left), basis.vectors), loop.x)
            # The best multiple of x, so that no start is worse than zero.
            ax = matvec(x)
            square = vdot(ax, ax)
            usable = jnp.isfinite(square) & (square > 0)  # a start that is not finite is dropped
            alpha = jnp.where(usable, vdot(ax, b) / jnp.where(usable, square, 1), 0)
            x = where(usable, jax.tree.map(lambda s: (alpha * s).astype(s.dtype), x), cold)
            residual = where(usable, axpy(-alpha, ax, b), b)
            # But of a correction that is not finite the matrix is the cause.
            left = jnp.where(usable | first | (square == 0), norm(residual), jnp.nan)
            falling = first | (left < loop.left)
            return _Loop(
                where(falling, x, loop.x),
                where(falling, residual, loop.residual),
                jnp.where(falling | jnp.isnan(left), left, loop.left),
                loop.steps + basis.steps,
                loop.passes + 1,
                falling,
            )

        cold = jax.tree.map(jnp.zeros_like, b)
        start = _Loop(warm, b, jnp.sqrt(bb), jnp.int32(0), jnp.int32(0), jnp.bool_(True))
        end = jax.lax.while_loop(going, one_pass, start)
        info = SolveInfo(end.left * unit, end.steps, end.steps + end.passes, jnp.bool_(False))
        x = scaled(end.x, unit)
        return x, GMRESState(x), info


def _krylov(matvec, residual, left, longest, limit, target):
    """The basis of Eq. (1): up to ``limit`` steps, until the residual is below the target."""
    eps = jnp.finfo(left.dtype).eps

    def going(basis):
        return (basis.steps < limit) & (basis.left > target) & basis.more

    def step(basis):
        k = basis.steps
        image = matvec(row(basis.vectors, k))
        length = norm(image)
        # Gram-Schmidt, twice: after once the vectors are orthogonal to few digits where most of it cancels.
        first = products(basis.vectors, image)
        image = axpy(-1.0, combine(first, basis.vectors), image)
        second = products(basis.vectors, image)
        image = axpy(-1.0, combine(second, basis.vectors), image)
        height = norm(image)
        more = height > 10 * eps * length  # else the space is invariant, and Eq. (1) exact
        height = jnp.where(more, height, 0)
        unit = jax.tree.map(
            lambda a: jnp.where(more, a / jnp.where(more, height, 1), 0).astype(a.dtype), image
        )
        column = (first + second).at[k + 1].set(height)
        rotations = _rotate(basis.rotations, basis.rotations @ column, k)
        triangle = basis.triangle.at[:, k].set((rotations @ column)[:longest])
        return _Basis(
            put(basis.vectors, k + 1, unit),
            rotations,
            triangle,
            k + 1,
            left * jnp.abs(rotations[k + 1, 0]),
            more,
        )

    safe = jnp.where(left > 0, left, 1)
    vectors = zeros(longest + 1, residual)
    start = _Basis(
        put(vectors, 0, jax.tree.map(lambda r: (r / safe).astype(r.dtype), residual)),
        jnp.eye(longest + 1, dtype=left.dtype),
        jnp.zeros((longest, longest), left.dtype),
        jnp.int32(0),
        left,
        jnp.bool_(True),
    )
    return jax.lax.while_loop(going, step, start)


def _rotate(rotations, column, k):
    """Rows k and k + 1 turned so that entry k + 1 of the column vanishes."""
    length = jnp.hypot(column[k], column[k + 1])
    safe = jnp.where(length > 0, length, 1)
    cosine = jnp.where(length > 0, column[k] / safe, 1)
    sine = jnp.where(length > 0, column[k + 1] / safe, 0)
    upper, lower = rotations[k], rotations[k + 1]
    return rotations.at[k].set(cosine * upper + sine * lower).at[k + 1].set(cosine * lower - sine * upper)


def _coefficients(basis, left):
    """The y of Eq. (1), zero beyond the steps taken; one entry more, for the last vector."""
    longest = len(basis.triangle)
    diagonal = jnp.diagonal(basis.triangle)
    # A diagonal of zero, to rounding, comes of a singular matrix: that direction is left out.
    rounding = jnp.finfo(left.dtype).eps * jnp.max(jnp.abs(basis.triangle))
    out = (jnp.arange(longest, dtype=jnp.int32) >= basis.steps) | (jnp.abs(diagonal) <= rounding)
    triangle = basis.triangle + jnp.diag(jnp.where(out, 1 - diagonal, 0))
    right = jnp.where(out, 0, left * basis.rotations[:longest, 0])
    return jnp.append(solve_triangular(triangle, right), 0)


def gmres(max_steps: int = 50, tol: float | None = None, atol: float = 0.0, restart: int = 20) -> GMRES:
    """Generalised minimal residuals, for systems that need not be symmetric: those of fixed points.

    Stops at ``|r| <= max(tol |b|, atol)``, after ``max_steps`` steps, or where a whole cycle does not lower
    the residual. Inside a method every solve starts at the best multiple of the solution before. One product
    per step, one per cycle for its residual, which is measured, and one for the start; memory of
    ``restart + 1`` vectors. Of a symmetric positive definite matrix, `bilevel.cg` needs four. Negative
    curvature is not reported: it is no fault of a fixed point.

    Args:
      max_steps: steps at most, over all cycles.
      tol: relative to the right-hand side; default the square root of the dtype's rounding unit
        (1.5e-8 in float64, 3.5e-4 in float32).
      atol: absolute.
      restart: steps in a cycle. With fewer than the problem needs the residual may stop falling.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    References:
      Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
      systems", 1986.
    """
    return GMRES(
        validation.whole_number("max_steps", max_steps, 1),
        None if tol is None else validation.number("tol", tol, minimum=0.0),
        validation.number("atol", atol, minimum=0.0),
        validation.whole_number("restart", restart, 1),
    )
