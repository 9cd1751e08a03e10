"""The map of a fixed point, repeated, with or without Anderson acceleration.

With the defect ``f_k = u(x_k) - x_k``, the plain iteration is ``x_{k+1} = u(x_k)``. Acceleration of depth m
takes, of the last m differences ``dF`` of defects and ``dU`` of images, the combination that makes the defect
smallest::

    x_{k+1} = u(x_k) - dU g,    g = argmin | f_k - dF g |                                        (1)

For a map that is linear this is as good as GMRES. Differences are dropped, and the plain step is taken, where
a defect has grown.

References:
  Anderson, "Iterative procedures for nonlinear integral equations", 1965, Journal of the ACM 12.
  Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, SIAM Journal on Numerical Analysis
  49.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_loops.measured import check_atol, info_of, measured_moves, tolerance
from bilevel.problem import Draw, FixedPoint, Point, PyTree, updated
from bilevel.vectors import axpy, combine, gram, products, put, where, zeros


class _Past(NamedTuple):
    """The last image and defect, ``size`` of the latter, and differences: ``stored`` of them so far."""

    image: PyTree
    defect: PyTree
    size: jax.Array
    images: PyTree
    defects: PyTree
    stored: jax.Array


@dataclasses.dataclass(frozen=True)
class Picard:
    """See `picard`."""

    max_steps: int
    atol: float | None
    anderson: int

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        if not isinstance(problem, FixedPoint):
            raise TypeError(
                "picard() repeats the map of a FixedPoint; for an inner loss take bilevel.lbfgs()."
            )
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw; the residual is the norm of ``update(params) - params``."""
        del key
        batch = draw.last

        def defect(params):
            return axpy(-1.0, params, updated(problem, params, hparams, batch, point.model_state)[0])

        atol = tolerance(self.atol, atol, point.params)
        past = _nothing(self.anderson, point.params) if self.anderson else ()
        move = _accelerated if self.anderson else _plain
        loop = measured_moves(
            defect, move, point.params, past, self.max_steps, atol, retries=bool(self.anderson)
        )
        return Point(loop.params, point.opt_state, point.model_state), state, info_of(loop)


def _plain(params, defect, size, past):
    del size
    return axpy(1.0, defect, params), past


def _nothing(depth: int, params) -> _Past:
    zero = jax.tree.map(jnp.zeros_like, params)
    infinite = jnp.full((), jnp.inf, jnp.result_type(*jax.tree.leaves(params)))
    return _Past(params, zero, infinite, zeros(depth, params), zeros(depth, params), jnp.int32(0))


def _accelerated(params, defect, size, past: _Past):
    """Eq. (1); from a defect that is not finite back to the last image, which came without acceleration."""
    lost = ~jnp.isfinite(size)
    image = axpy(1.0, defect, params)
    first = ~jnp.isfinite(past.size)
    depth = jax.tree.leaves(past.images)[0].shape[0]
    slot = past.stored % depth
    images = put(past.images, slot, axpy(-1.0, past.image, image))
    defects = put(past.defects, slot, axpy(-1.0, past.defect, defect))
    kept = ~(first | lost | (size > past.size))
    images, defects = where(kept, (images, defects), jax.tree.map(jnp.zeros_like, (images, defects)))
    weights = _least_squares(gram(defects, defects), products(defects, defect))
    moved = where(kept, axpy(-1.0, combine(weights, images), image), image)
    after = _Past(image, defect, size, images, defects, jnp.where(kept, past.stored + 1, 0))
    back = past._replace(images=images, defects=defects, stored=jnp.int32(0))
    return where(lost, (past.image, back), (moved, after))


def _least_squares(squares, right):
    """The g of Eq. (1) from its normal equations, directions that rounding has eaten left out."""
    scale = jnp.sqrt(jnp.diagonal(squares))
    scale = jnp.where(scale > 0, scale, 1)
    values, vectors = jnp.linalg.eigh(squares / (scale[:, None] * scale[None, :]))
    kept = values > 10 * values.size * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return vectors @ (inverse * (vectors.T @ (right / scale))) / scale


def picard(max_steps: int = 1000, atol: float | None = None, anderson: int = 0) -> Picard:
    """The map of a fixed point, repeated until it moves params no more.

    For contractions: a factor rho < 1 per step, and params within ``atol / (1 - rho)`` of the fixed point.

    Args:
      max_steps: steps at most.
      atol: Euclidean norm of ``update(params) - params``; default the square root of the dtype's rounding
        unit.
      anderson: combine so many earlier steps (Anderson acceleration), for ``2 anderson`` vectors of memory
        and products of such vectors; 5 to 10 where the map contracts slowly, 0: the plain map.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    return Picard(
        validation.whole_number("max_steps", max_steps, 1),
        check_atol(atol),
        validation.whole_number("anderson", anderson, 0),
    )
