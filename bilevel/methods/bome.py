"""BOME: hyperparameters and params descend the outer loss under a barrier that the inner loss makes.

The inner problem is the constraint ``q = inner(w, u) - inner(w', u) <= 0``, where w' is where T inner steps
lead from w, and w' is held constant in the derivatives of q. Both levels move along one direction, that of
the outer loss with just enough of the constraint that q falls::

    D = grad outer + lam grad q,     lam = max(ratio - (grad outer . grad q) / |grad q|^2, 0)          (1)

with gradients by params w and hyperparameters u (free units) together. No second derivative is taken.

References:
  Liu, Ye, Wright, Stone and Liu, "BOME! Bilevel optimization made easy: a simple first-order approach",
  2022, arXiv:2209.08709.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.constraints import bind
from bilevel.inner_solvers import along, descend, start_point
from bilevel.lift import examples
from bilevel.linear_solvers import axpy, vdot
from bilevel.methods.alternating import Alternating, alternating
from bilevel.methods.inexact import refuse_unfit
from bilevel.problem import Counts, Estimate, inner_value, outer_value, unsolved


@dataclasses.dataclass(frozen=True)
class Barrier:
    """Eq. (1) as an estimator that moves params; ``inner`` and ``steps`` are those of the method."""

    ratio: float
    inner: Any = None
    steps: int | None = None
    trajectory = True
    first_order = True

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        del j
        return hparams

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        refuse_unfit("bome", problem)
        return ()

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Eq. (1) at the point given, and one step of params along it."""
        del key
        begun = start_point(self.inner, point.params, point.model_state)
        lower = jax.lax.stop_gradient(descend(problem, self.inner, begun, hparams, draw))
        batch = draw(draw.steps)

        def inner(params, hparams):
            return inner_value(problem, params, hparams, batch, point.model_state)[0]

        def gap(params, hparams):
            return inner(params, hparams) - inner(lower.params, hparams)

        def outer(params, hparams):
            return outer_value(problem, params, hparams, valid, point.model_state)[0]

        slope = jax.grad(outer, argnums=(0, 1))(point.params, hparams)
        rise = jax.grad(gap, argnums=(0, 1))(point.params, hparams)
        weight = self._weight(problem, hparams, slope, rise)
        by_params, by_hparams = axpy(weight, rise, slope)
        end = dataclasses.replace(along(self.inner, point, by_params), model_state=lower.model_state)
        value, metrics = outer_value(problem, end.params, hparams, valid, point.model_state)
        rows, valid_rows = examples(problem, batch), examples(problem, valid)
        nothing = jnp.float32(0)
        estimate = Estimate(
            value=value,
            grad=by_hparams,
            point=end,
            error=jnp.full_like(value, jnp.inf),
            counts=Counts(jnp.float32((draw.steps + 2) * rows), jnp.float32(valid_rows), nothing, nothing),
            solve=unsolved(value),
            metrics=metrics,
            settled=False,
        )
        return estimate, state

    def _weight(self, problem, hparams, slope, rise):
        """``lam`` of Eq. (1); zero where the constraint is flat."""
        constraints = bind(problem.constraints, hparams)
        free = constraints.to_free(hparams)

        def pulled(grads):
            return grads[0], constraints.pull_back(free, grads[1])

        slope, rise = pulled(slope), pulled(rise)
        square = vdot(rise, rise)
        steep = square > 0
        along_it = vdot(slope, rise) / jnp.where(steep, square, 1)
        return jnp.where(steep, jnp.maximum(self.ratio - along_it, 0), 0)


def bome(inner, outer, inner_steps: int = 10, ratio: float = 0.5) -> Alternating:
    """First-order steps of both levels along one direction, Eq. (1) of the module.

    One outer step costs ``inner_steps + 2`` inner gradients and an outer one, and evaluates the outer loss
    where params have moved to; no second derivatives, no linear system. Memory: two copies of params and
    their gradients. In the paper both levels move with one step size; here params move along their part of
    Eq. (1) by ``inner``, which also makes the steps to w' (with a state of its own, begun anew), and hparams
    by ``outer``.

    The batches of the steps to w' and that of the constraint are drawn apart, the outer loss takes one.
    What the history calls the gradient norm is that of D's part in hyperparameters, which is no hypergradient
    and is zero wherever ``lam`` is, so that ``tol`` never ends a run.

    Noise enters ``lam`` as a quotient, so that batches give a biased direction; small ones do worse here than
    with `bilevel.soba`.

    Args:
      inner: the optax optimiser of params; of the paper ``optax.sgd``.
      outer: the optax optimiser of hyperparameters, in free units.
      inner_steps: T, from params to w'.
      ratio: how fast q has to fall, relative to the square of its gradient; the paper's eta.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    Example:
      >>> import bilevel, optax
      >>> bilevel.bome(optax.sgd(0.05), optax.sgd(0.5)).batches_per_step
      (10, 1)

    References:
      Liu, Ye, Wright, Stone and Liu, 2022, arXiv:2209.08709.
    """
    validation.kind("inner", inner, "an optax optimiser")
    ratio = validation.number("ratio", ratio, positive=True)
    return alternating(Barrier(ratio), inner, outer, inner_steps)
