"""L-BFGS with its line search."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import validation
from bilevel.inner_loops.measured import check_atol, loss_of, needs_a_loss, size_of_gradient, tolerance
from bilevel.problem import Draw, Point, PyTree, SolveInfo
from bilevel.vectors import cast, vdot, where, widened


class _Quasi(NamedTuple):
    params: PyTree
    opt_state: PyTree
    value: jax.Array
    grad: PyTree
    size: jax.Array
    steps: jax.Array
    gradients: jax.Array
    best: tuple[jax.Array, jax.Array]
    idle: jax.Array
    stuck: jax.Array


# So many steps without a smaller loss or gradient than ever before, and L-BFGS gives up.
_IDLE = 20


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """See `lbfgs`."""

    max_steps: int
    atol: float | None
    memory: int

    def init(self, problem, point, hparams):
        """No state: the curvature of other hparams is not carried over."""
        del point, hparams
        needs_a_loss("lbfgs", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        # One dtype for all leaves and the loss, of at least 32 bits, whatever those of params and data are.
        params = widened(point.params)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        given = loss_of(problem, point, hparams, draw.last)

        def loss(params):
            return given(cast(params, point.params)).astype(dtype)

        optimizer = optax.lbfgs(memory_size=self.memory)
        atol = tolerance(self.atol, atol, point.params).astype(dtype)

        def going(at):
            return (at.size > atol) & jnp.isfinite(at.size) & (at.steps < self.max_steps) & ~at.stuck

        def body(at):
            updates, opt_state = optimizer.update(
                at.grad, at.opt_state, at.params, value=at.value, grad=at.grad, value_fn=loss
            )
            # The line search has evaluated the point it chose.
            value, grad = (optax.tree.get(opt_state, name) for name in ("value", "grad"))
            searches = optax.tree.get(opt_state, "num_linesearch_steps")
            params = optax.apply_updates(at.params, updates)
            stuck = vdot(updates, updates) == 0
            size = size_of_gradient(grad)
            # A step to where the loss is not finite is not taken: what was measured before it stands.
            lost = ~jnp.isfinite(size) | ~jnp.isfinite(value)
            params, grad, size = where(lost, (at.params, at.grad, at.size), (params, grad, size))
            idle = jnp.where((value < at.best[0]) | (size < at.best[1]), 0, at.idle + 1)
            return _Quasi(
                params=params,
                opt_state=opt_state,
                value=value,
                grad=grad,
                size=size,
                steps=at.steps + 1,
                gradients=at.gradients + searches.astype(jnp.int32),
                best=(jnp.minimum(value, at.best[0]), jnp.minimum(size, at.best[1])),
                idle=idle,
                stuck=stuck | lost | (idle >= _IDLE),
            )

        value, grad = jax.value_and_grad(loss)(params)
        opt_state = optimizer.init(params)
        size = jnp.where(jnp.isfinite(value), size_of_gradient(grad), jnp.inf)
        zero = jnp.int32(0)
        start = _Quasi(
            params, opt_state, value, grad, size, zero, zero + 1, (value, size), zero, jnp.bool_(False)
        )
        end = jax.lax.while_loop(going, body, start)
        info = SolveInfo(end.size, end.steps, end.gradients, jnp.bool_(False))
        return Point(cast(end.params, point.params), point.opt_state, point.model_state), state, info


def lbfgs(max_steps: int = 200, atol: float | None = None, memory: int = 10) -> LBFGS:
    """L-BFGS with a line search: `optax.lbfgs` until the gradient is small.

    Needs no constants and no step size, and takes losses that are not convex. One to two gradients per step,
    as the line search has it, and ``2 memory`` vectors. It stops early, with a residual above ``atol``, where
    nothing gets better any more.

    Args:
      max_steps: steps at most; each searches along its direction with at most 20 gradients.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      memory: pairs of differences that stand for the inverse Hessian.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    return LBFGS(
        validation.whole_number("max_steps", max_steps, 1),
        check_atol(atol),
        validation.whole_number("memory", memory, 1),
    )
