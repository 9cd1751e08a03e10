"""Newton's method with conjugate gradients: no matrix, no step size.

At params w with gradient g and Hessian H, the step solves the Newton system only as far as it is worth::

    |H x + g| <= rtol |g|,    x by conjugate gradients from zero, at most cg_steps of them            (1)
    w <- w + x / 4^k,         the first k = 0, 1, ... with sufficient decrease                       (2)

CG ends at a direction without positive curvature with what it has; at the very first one the step goes along
-g, as far as if the curvature had the other sign: always downhill, also where the loss is not convex. No
trial is longer than 1,000 max(1, |w|), which matters only where the loss is all but flat.

Each step costs one gradient and a product with H per CG step, and a further gradient for each trial that is
turned down; five vectors of memory. The error falls by about rtol per step near the solution.

References:
  Nocedal and Wright, "Numerical optimization", 2006, section 7.1 (line search Newton-CG).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_loops.measured import check_atol, loss_of, needs_a_loss, size_of_gradient, tolerance
from bilevel.problem import Draw, Point, PyTree, SolveInfo
from bilevel.vectors import axpy, vdot, where

# A trial step is divided by four at most so often ...
_CUTS = 12
# ... and at first at most so many times as long as params.
_LONGEST = 1e3


class _Search(NamedTuple):
    """``params``, with ``value`` and ``size``, was accepted last; the trial goes along ``direction``."""

    params: PyTree
    value: jax.Array
    size: jax.Array
    direction: PyTree
    slope: jax.Array
    cuts: jax.Array
    steps: jax.Array
    products: jax.Array
    indefinite: jax.Array
    done: jax.Array


class _Direction(NamedTuple):
    """The loop of one system ``H x = -gradient``."""

    x: PyTree
    residual: PyTree
    direction: PyTree
    rr: jax.Array
    steps: jax.Array
    ended: jax.Array
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class NewtonCG:
    """See `newton_cg`."""

    max_steps: int
    atol: float | None
    cg_steps: int
    rtol: float

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        needs_a_loss("newton_cg", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        loss = loss_of(problem, point, hparams, draw.last)
        atol = tolerance(self.atol, atol, point.params)

        def body(at):
            first = at.products == 0
            fraction = jnp.exp2(-2.0 * at.cuts).astype(at.size.dtype)
            trial = axpy(fraction, at.direction, at.params)  # Eq. (2)
            value, grad = jax.value_and_grad(loss)(trial)
            size = jnp.where(jnp.isfinite(value), size_of_gradient(grad), jnp.inf)
            # Sufficient decrease of the loss; where that drowns in its rounding, of the gradient.
            noise = 30 * jnp.finfo(value.dtype).eps * jnp.abs(at.value)
            drowns = -fraction * at.slope <= noise
            lower = (value <= at.value + 1e-4 * fraction * at.slope) & (value < at.value)
            shorter = drowns & (value <= at.value + noise) & (size < at.size)
            accept = first | ((lower | shorter) & jnp.isfinite(size))
            steps = jnp.where(accept & ~first, at.steps + 1, at.steps)
            small = accept & ((size <= atol) | ~jnp.isfinite(size) | (steps >= self.max_steps))
            done = small | (~accept & (drowns | (at.cuts >= _CUTS)))
            again = accept & ~done
            found = self._direction(loss, trial, grad, again)
            return _Search(
                params=where(accept, trial, at.params),
                value=jnp.where(accept, value, at.value),
                size=jnp.where(accept, size, at.size),
                direction=where(again, found.x, at.direction),
                slope=jnp.where(again, vdot(grad, found.x), at.slope),
                cuts=jnp.where(accept, 0, at.cuts + 1),
                steps=steps,
                products=at.products + 1 + found.steps,
                indefinite=at.indefinite | found.negative,
                done=done,
            )

        zero, no = jnp.int32(0), jnp.bool_(False)
        nothing = jax.tree.map(jnp.zeros_like, point.params)
        size = jnp.full_like(jnp.sqrt(vdot(nothing, nothing)), jnp.inf)
        value = jnp.full_like(jax.eval_shape(loss, point.params), jnp.inf)
        start = _Search(point.params, value, size, nothing, jnp.zeros_like(size), zero, zero, zero, no, no)
        end = jax.lax.while_loop(lambda at: ~at.done, body, start)
        info = SolveInfo(end.size, end.steps, end.products, end.indefinite)
        return Point(end.params, point.opt_state, point.model_state), state, info

    def _direction(self, loss, params, grad, wanted) -> _Direction:
        """Eq. (1); no step where it is not wanted."""
        gg = vdot(grad, grad)
        target = self.rtol**2 * gg
        longest = _LONGEST * jnp.maximum(1, jnp.sqrt(vdot(params, params))).astype(gg.dtype)

        def going(at):
            return wanted & (at.steps < self.cg_steps) & (at.rr > target) & ~at.ended

        def step(at):
            hd = jax.jvp(jax.grad(loss), (params,), (at.direction,))[1]
            curvature = vdot(at.direction, hd)
            ended = ~(curvature > 0)
            # Downhill along the gradient where the very first direction bends down, as far as if it bent up.
            usable = jnp.where(at.steps == 0, jnp.abs(curvature), curvature)
            alpha = jnp.where(usable > 0, at.rr / jnp.where(usable > 0, usable, 1), 0)
            r = axpy(-alpha, hd, at.residual)
            rr = vdot(r, r)
            x = axpy(alpha, at.direction, at.x)
            length = vdot(x, x)
            kept = jnp.isfinite(rr) & jnp.isfinite(length)  # else the system is singular to rounding
            return _Direction(
                x=where(kept, x, at.x),
                residual=r,
                direction=axpy(rr / at.rr, at.direction, r),
                rr=rr,
                steps=at.steps + 1,
                ended=ended | ~kept | (length > longest**2),
                negative=curvature < 0,
            )

        minus = jax.tree.map(jnp.negative, grad)
        nothing = jax.tree.map(jnp.zeros_like, grad)
        no = jnp.bool_(False)
        end = jax.lax.while_loop(going, step, _Direction(nothing, minus, minus, gg, jnp.int32(0), no, no))
        # The gradient replaces no step at all, and one that rounding has turned uphill.
        downhill = vdot(grad, end.x) < 0
        x = where(downhill, end.x, minus)
        length = jnp.sqrt(vdot(x, x))
        factor = longest / jnp.where(length > 0, length, 1)
        factor = jnp.where(downhill, jnp.minimum(1, factor), factor)
        return end._replace(x=jax.tree.map(lambda x: (factor * x).astype(x.dtype), x))


def newton_cg(
    max_steps: int = 50, atol: float | None = None, cg_steps: int = 50, rtol: float = 0.1
) -> NewtonCG:
    """Newton's method with conjugate gradients and backtracking: no step size, no matrix.

    For losses on whole arrays with any number of params: it needs products with the Hessian only, and adapts
    to scale and conditioning by itself. One step per outer step, from where the last one ended, follows
    hyperparameters that move slowly: ``alternating(..., inner=newton_cg(max_steps=1, atol=0.0))``.

    Args:
      max_steps: steps at most; a step is divided by four at most 12 times, then it ends there.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      cg_steps: products with the Hessian per step, at most.
      rtol: residual of the Newton system at which CG stops, relative to the gradient. Smaller makes fewer
        and dearer steps.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    References:
      Nocedal and Wright, "Numerical optimization", 2006, section 7.1.
    """
    rtol = validation.number("rtol", rtol, minimum=0.0)
    if rtol >= 1:
        raise ValueError(f"rtol must be below 1, got {rtol}: a step that solves nothing leads nowhere.")
    return NewtonCG(
        validation.whole_number("max_steps", max_steps, 1),
        check_atol(atol),
        validation.whole_number("cg_steps", cg_steps, 1),
        rtol,
    )
