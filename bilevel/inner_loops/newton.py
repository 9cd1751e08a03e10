"""Newton's method for small problems."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import linear_solvers, validation
from bilevel.inner_loops.measured import check_atol, loss_of, needs_a_loss, size_of_gradient, tolerance
from bilevel.problem import Draw, Point, SolveInfo
from bilevel.vectors import widened

_HALVINGS = 30


class _Search(NamedTuple):
    """``params`` was accepted last, with what follows; the trial goes along Newton's or the ``steepest``."""

    params: jax.Array
    value: jax.Array
    grad: jax.Array
    size: jax.Array
    direction: jax.Array
    slope: jax.Array
    halvings: jax.Array
    steps: jax.Array
    gradients: jax.Array
    indefinite: jax.Array
    steepest: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class Newton:
    """See `newton`."""

    max_steps: int
    atol: float | None
    damping: float

    def init(self, problem, point, hparams):
        """No state; refuses what does not fit."""
        del hparams
        needs_a_loss("newton", problem)
        size = sum(x.size for x in jax.tree.leaves(point.params))
        if size > linear_solvers.DENSE_LIMIT:
            raise ValueError(
                f"bilevel.newton() would form a Hessian of {size} x {size}; it takes at most "
                f"{linear_solvers.DENSE_LIMIT} parameters. Take bilevel.lbfgs(), which needs gradients only."
            )
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        narrow, unravel = ravel_pytree(point.params)
        flat = widened(narrow)
        tree_loss = loss_of(problem, point, hparams, draw.last)
        atol = tolerance(self.atol, atol, point.params)

        def loss(flat):
            return tree_loss(unravel(flat.astype(narrow.dtype)))

        def direction(flat, grad):
            hessian = jax.jacfwd(jax.grad(loss))(flat) + self.damping * jnp.eye(flat.size, dtype=flat.dtype)
            return _step(hessian, grad)

        def body(at):
            first = at.gradients == 0
            step_size = jnp.exp2(-at.halvings.astype(flat.dtype))
            trial = at.params + step_size * at.direction
            value, grad = jax.value_and_grad(loss)(trial)
            size = size_of_gradient(grad)
            # Sufficient decrease of the loss or, where that drowns in its rounding, of the gradient.
            noise = 1e3 * jnp.finfo(value.dtype).eps * jnp.abs(at.value)
            shorter = (value <= at.value + noise) & (size <= (1 - 1e-4 * step_size) * at.size)
            lower = (value <= at.value + 1e-4 * step_size * at.slope) & (value < at.value)
            accept = (lower | shorter) & jnp.isfinite(size) & jnp.isfinite(value)
            size = jnp.where(jnp.isfinite(value), size, jnp.inf)
            accept = accept | first
            steps = jnp.where(accept & ~first, at.steps + 1, at.steps)
            small = accept & ((size <= atol) | (first & ~jnp.isfinite(size)))
            failed = ~accept & (at.halvings >= _HALVINGS)
            turn = failed & ~at.steepest
            done = small | (accept & (steps >= self.max_steps)) | (failed & at.steepest)
            again = accept & ~done
            new, convex = jax.lax.cond(
                again, direction, lambda flat, grad: (at.direction, jnp.bool_(True)), trial, grad
            )
            # Where the loss is next to flat Newton's step is too long for any halving: down the gradient
            # then, at first as far as the origin is.
            new = jnp.where(turn, -jnp.maximum(jnp.linalg.norm(at.params), 1) / at.size * at.grad, new)
            grad = jnp.where(accept, grad, at.grad)
            return _Search(
                params=jnp.where(accept, trial, at.params),
                value=jnp.where(accept, value, at.value),
                grad=grad,
                size=jnp.where(accept, size, at.size),
                direction=new,
                slope=jnp.where(again | turn, jnp.vdot(new, grad), at.slope),
                halvings=jnp.where(accept | turn, 0, at.halvings + 1),
                steps=steps,
                gradients=at.gradients + 1 + jnp.where(again, flat.size, 0),
                indefinite=at.indefinite | (again & ~convex),
                steepest=turn | (at.steepest & ~accept),
                done=done,
            )

        zero, no = jnp.int32(0), jnp.bool_(False)
        inf = jnp.asarray(jnp.inf, flat.dtype)
        value = jnp.asarray(jnp.inf, jax.eval_shape(loss, flat).dtype)
        nothing = jnp.zeros_like(flat)
        start = _Search(flat, value, nothing, inf, nothing, jnp.zeros_like(inf), zero, zero, zero, no, no, no)
        end = jax.lax.while_loop(lambda at: ~at.done, body, start)
        info = SolveInfo(end.size, end.steps, end.gradients, end.indefinite)
        params = unravel(end.params.astype(narrow.dtype))
        return Point(params, point.opt_state, point.model_state), state, info


@jax.custom_batching.custom_vmap
def _step(hessian, grad):
    """Newton's, downhill where the Hessian is not positive definite, and whether it is."""
    step = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(hessian), grad)
    convex = jnp.all(jnp.isfinite(step)) & (jnp.vdot(step, grad) < 0)
    return jax.lax.cond(convex, lambda: step, lambda: _by_eigenvalues(hessian, grad)[0]), convex


@_step.def_vmap
def _steps(axis_size, in_batched, hessian, grad):
    """Of a batch both branches would be computed, and the second one serves all.

    A Cholesky factorisation of a large batch inside a loop may also never end on a CPU (jaxlib 0.10).
    """
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(_by_eigenvalues, axes, axis_size=axis_size)(hessian, grad), (True, True)


def _by_eigenvalues(hessian, grad):
    """The same with negative eigenvalues replaced by their absolute values."""
    eigenvalues, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    convex = jnp.all(eigenvalues > 0)
    curvature = jnp.abs(eigenvalues)
    floor = jnp.sqrt(jnp.finfo(grad.dtype).eps) * jnp.max(curvature)
    curvature = jnp.where(convex, curvature, jnp.where(floor > 0, jnp.maximum(curvature, floor), 1))
    return -vectors @ ((vectors.T @ grad) / curvature), convex


def newton(max_steps: int = 50, atol: float | None = None, damping: float = 0.0) -> Newton:
    """Newton's method with the dense Hessian and backtracking, for small problems.

    Quadratic convergence: near the solution the number of right digits doubles with every step, down to
    rounding. Where the Hessian is not positive definite its negative eigenvalues change sign, so that the
    step goes downhill, and the info says so. One Hessian per step, counted as one gradient for each
    parameter, and two matrices of memory.

    Args:
      max_steps: steps at most; backtracking halves a step at most 30 times, then goes down the gradient, and
        ends where that does not help either.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      damping: added to the diagonal of the Hessian. The solution stays the same; convergence becomes linear.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range; more parameters than a dense matrix
        is made for.
    """
    return Newton(
        validation.whole_number("max_steps", max_steps, 1),
        check_atol(atol),
        validation.number("damping", damping, minimum=0.0),
    )
