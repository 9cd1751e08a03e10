"""Hypergradients of first derivatives only: the outer loss enters the inner problem as a penalty.

With a multiplier ``m``, let ``w`` be the inner solution and ``y`` that of the inner problem which also looks
at the outer loss. Then, by Danskin's theorem, the derivative of ``m (min_y (inner + outer / m) - min inner)``
is a hypergradient up to an error of at most the order of ``1 / m``::

    y minimises   inner(y, hparams) + outer(y, hparams) / m                                           (1)
    dF/dhparams ~ d_hparams outer(y) + m (d_hparams inner(y) - d_hparams inner(w))                    (2)

Cost: ``steps`` gradients of both losses for (1), three gradients in hparams for (2), no second derivative:
for models that are not twice differentiable, or whose Hessian is dear. Memory: one vector of the size of
params and an optimiser's state.

Not where digits matter: the difference in (2) is of the size ``1 / m``, and its rounding and the distances of
both minimisers from where they should be are multiplied by m. `bilevel.implicit` has no such bias.

References:
  Kwon, Kwon, Wright and Nowak, "A fully first-order method for stochastic bilevel optimization", 2023,
  arXiv:2301.10945.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_solvers import descend, start_point
from bilevel.lift import examples
from bilevel.problem import (
    Counts,
    Draw,
    Estimate,
    FixedPoint,
    InnerSolver,
    Point,
    Problem,
    PyTree,
    inner_value,
    outer_value,
    unsolved,
)
from bilevel.trees import copied

# Fresh batches from here on are those of no solver.
_APART = 1 << 20


class PenaltyState(NamedTuple):
    """Where the minimiser of Eq. (1) stands, the state of its solver, and the estimates so far."""

    point: Point
    solver: PyTree
    estimates: jax.Array


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The loss of Eq. (1); its batch is ``(train, valid, multiplier, model state)``."""

    problem: Problem

    def __call__(self, params, hparams, batch):
        train, valid, multiplier, model_state = batch
        inner, _ = inner_value(self.problem, params, hparams, train, model_state)
        outer, _ = outer_value(self.problem, params, hparams, valid, model_state)
        return inner + (outer / multiplier).astype(inner.dtype)


@dataclasses.dataclass(frozen=True)
class Penalty:
    """See `penalty`."""

    multiplier: Any
    optimizer: Any
    length: int
    trajectory = False
    continues = "its second copy of params would go on, and mean nothing beside one that begins anew"

    @property
    def _solves(self) -> bool:
        return isinstance(self.optimizer, InnerSolver)

    def init(self, problem, point, hparams):
        """The minimiser of Eq. (1) begins at params."""
        if isinstance(problem, FixedPoint):
            raise TypeError(
                "penalty compares values of an inner loss, which a FixedPoint does not have; take "
                "bilevel.implicit(bilevel.gmres())."
            )
        if problem.start is not None:
            raise ValueError(
                "penalty compares params with a second copy of them that goes on from step to step, and a "
                "problem with start= begins anew at every step."
            )
        params = copied(point.params)
        begun = start_point(None if self._solves else self.optimizer, params, None)
        solver = self.optimizer.init(_shifted(problem), begun, hparams) if self._solves else ()
        return PenaltyState(begun, solver, jnp.int32(0))

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Eq. (2); for Eq. (1) the batches of the inner steps, a fresh one for the inner terms of Eq. (2)."""
        multiplier = self.multiplier(state.estimates) if callable(self.multiplier) else self.multiplier
        moved, solver, taken = self._minimised(
            problem, state, hparams, draw, (valid, multiplier, point.model_state), key
        )
        batch = draw(draw.steps + _APART)
        value, metrics = outer_value(problem, point.params, hparams, valid, point.model_state)

        def gap(hparams):
            def inner(params):
                return inner_value(problem, params, hparams, batch, point.model_state)[0]

            outer, _ = outer_value(problem, moved.params, hparams, valid, point.model_state)
            return outer + multiplier * (inner(moved.params) - inner(point.params)).astype(outer.dtype)

        rows, valid_rows = examples(problem, batch), examples(problem, valid)
        estimate = Estimate(
            value=value,
            grad=jax.grad(gap)(hparams),
            point=point,
            error=jnp.full_like(value, jnp.inf),
            counts=Counts(
                inner_grad=(taken + 2) * rows,
                outer_grad=(taken + 1) * valid_rows,
                hvp=jnp.float32(0),
                cross=jnp.float32(0),
            ),
            solve=unsolved(value),
            metrics=metrics,
        )
        last = jnp.iinfo(jnp.int32).max - 1
        return estimate, PenaltyState(moved, solver, jnp.minimum(state.estimates, last) + 1)

    def _minimised(self, problem, state, hparams, draw, rest, key):
        """Eq. (1): the point, the state of the solver, gradients taken."""

        # Noise that both copies of params share is not in their difference.
        def batch(j):
            return draw(j), *rest

        shifted, own = _shifted(problem), Draw(batch, self.length, draw.sampled)
        if not self._solves:
            moved = descend(shifted, self.optimizer, state.point, hparams, own)
            return moved, (), jnp.float32(self.length)
        moved, solver, info = self.optimizer.solve(shifted, state.solver, state.point, hparams, own, key)
        return moved, solver, jnp.asarray(info.products, jnp.float32)


def _shifted(problem) -> Problem:
    return Problem(Shifted(problem), problem.outer)


def penalty(multiplier, inner, steps: int = 1) -> Penalty:
    """First derivatives only: Eq. (1) and (2) of the module, biased by about ``1 / multiplier``.

    It keeps a second copy of params, the minimiser of the inner loss with a share of the outer one, from
    estimate to estimate; outside a method it begins at params, and ``steps`` have to be enough. It takes the
    batches that the inner steps of the method take, so that noise cancels from the difference. ``value`` is
    the outer loss at params themselves. What is unknown of its error is stated as infinite.

    Args:
      multiplier: of the inner loss against the outer one, positive; or a function of the number of estimates
        so far. The bias falls like one over it, and all noise and rounding grow with it: a difference of
        gradients in float32 is right to some 1e-7 times the multiplier.
      inner: for Eq. (1), an optax optimiser or an inner solver such as `bilevel.lbfgs`.
      steps: of the optimiser, for each estimate.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> at = jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0)  # w* = 1
      >>> for multiplier in (1, 10, 100):
      ...     fn = bilevel.hypergradient(problem, bilevel.penalty(multiplier, optax.sgd(0.3), steps=100))
      ...     print(f"{multiplier}: {fn(*at).grad:.2f}")  # the limit is 1
      1: 0.89
      10: 1.00
      100: 1.00

    References:
      Kwon, Kwon, Wright and Nowak, 2023, arXiv:2301.10945.
    """
    if not callable(multiplier):
        multiplier = validation.number("multiplier", multiplier, positive=True)
    return Penalty(
        multiplier,
        validation.kind("inner", inner, "an inner optimiser or solver"),
        validation.whole_number("steps", steps, 1),
    )
