"""ISGD: stochastic gradients over members, each solved to an accuracy that grows along the run.

For a problem of many members (`bilevel.lift`: one inner problem per image) with the mean of their outer
losses, step k draws a batch B of members and, with ``eps_k = accuracy / (k + 1)^decay``::

    solve   the members of B from where each was left, to |w_i - w_i*| <= eps_k                 (1)
    z       the mean over B of their hypergradients, with linear residuals of at most eps_k     (2)
    outer   an optax step along z                                                               (3)

Members outside of B cost nothing and stay where they are. The rates of the outer optimiser and eps_k have to
fall together: errors of the gradient do not average out as its noise does.

References:
  Salehi, Mukherjee, Roberts and Ehrhardt, "Bilevel learning with inexact stochastic gradients", 2024,
  arXiv:2412.12049.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import data, validation
from bilevel.estimators.implicit import Implicit
from bilevel.inner_loops.memberwise import memberwise
from bilevel.lift import any_members, axes, members
from bilevel.methods.inexact import (
    default_solver,
    first_state,
    gradient_tolerance,
    implicit_of,
    nonfinite_mask,
    refuse_unfit,
    work,
)
from bilevel.placement import refuse_explicit
from bilevel.problem import Draw, Info, InnerSolver, Point, Status
from bilevel.vectors import norm


@dataclasses.dataclass(frozen=True)
class Isgd:
    """See `isgd`."""

    outer: Any
    batch_size: int
    accuracy: float
    decay: float
    estimator: Implicit
    inner: InnerSolver | None
    batches_per_step = 1, 1
    differentiated = None
    judges = True
    columns = ("accuracy",)

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        del j
        return hparams

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; the problem checked on the data's shapes."""
        refuse_unfit("isgd", problem)
        if not axes(problem):
            raise TypeError("isgd draws members of bilevel.lift(problem), and this problem has none.")
        if problem.has_state:
            raise ValueError("isgd has no place for model state; the problem must not have has_state=True.")
        state = first_state(
            "isgd", problem, self.estimator, self._solver(problem), self.outer.init,
            params, hparams, train, valid, key=key, model_state=model_state,
        )  # fmt: skip
        if self.batch_size > members(state.params):
            raise ValueError(
                f"batch_size must be at most the number of members, {members(state.params)}, got "
                f"{self.batch_size}."
            )
        # Warm starts would be those of other members.
        return dataclasses.replace(state, estimator=(), inner=())

    def _solver(self, problem) -> Any:
        return memberwise(default_solver(problem)) if self.inner is None else self.inner

    def step(self, problem, state, train, valid):
        """Eq. (1) to (3)."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        hparams, constraints = state.hparams, state.constraints
        drawing, solving = jax.random.split(state.key)
        key = jax.random.fold_in(solving, state.count)
        count = members(state.params)
        batch = data.minibatches(jnp.arange(count), self.batch_size).batch(drawing, state.count)
        params, own_train, own_valid = jax.tree.map(
            lambda x: x[batch], (state.params, train.batch(key, 0), valid.batch(key, 0))
        )
        eps = jnp.asarray(self.accuracy, norm(state.free).dtype) / (state.count + 1.0) ** self.decay
        draw, solver = Draw(lambda j: own_train, 1, False), self._solver(problem)
        root = math.sqrt(self.batch_size)
        point, _, solved = solver.solve(
            problem, solver.init(problem, Point(params), hparams), Point(params), hparams, draw, key,
            atol=gradient_tolerance(problem, hparams, eps) * root,
        )  # fmt: skip
        some = any_members(problem)
        estimate, _ = self.estimator.estimate(
            some, self.estimator.init(some, point, hparams), point, hparams, draw, own_valid, key,
            atol=eps / root,
        )  # fmt: skip
        z = constraints.pull_back(state.free, estimate.grad)
        updates, outer = self.outer.update(z, state.progress, state.free)
        nonfinite = nonfinite_mask(estimate.value, norm(z))
        finite = nonfinite == 0
        placed = jax.tree.map(lambda old, new: old.at[batch].set(new), state.params, point.params)
        new = dataclasses.replace(
            state,
            point=dataclasses.replace(state.point, params=placed),
            free=constraints.project(optax.apply_updates(state.free, updates), state.free),
            progress=outer,
        )
        kept = jax.lax.cond(finite, lambda: new, lambda: state)
        taken = estimate.counts
        solving_cost = work(solved.products).counts(problem, own_train, own_valid)
        info = Info(
            value=estimate.value,
            grad_norm=constraints.grad_norm(state.free, z),
            error=estimate.error,
            accepted=finite,
            status=jnp.where(finite, Status.RUNNING, Status.DIVERGED).astype(jnp.int32),
            nonfinite=nonfinite,
            counts=taken._replace(inner_grad=taken.inner_grad + solving_cost.inner_grad),
            solve=estimate.solve,
            metrics=estimate.metrics,
            params=placed,
            hparams=hparams,
            model_state=None,
            extra={"accuracy": eps},
            error_kind=estimate.error_kind,
        )
        return dataclasses.replace(kept, count=state.count + 1), info


def isgd(
    outer: optax.GradientTransformation,
    batch_size: int,
    accuracy: float = 0.1,
    decay: float = 0.5,
    estimator: Implicit | None = None,
    inner: InnerSolver | None = None,
) -> Isgd:
    """Stochastic hypergradient steps over the members of a lifted problem, Eq. (1) to (3) of the module.

    For many images, where a pass over all of them is too much for one step. ``value`` in the history is that
    of the batch; every ``judge_every`` steps all members are judged where they stand, which decides on
    ``best``.

    Args:
      outer: an optax optimiser in free units; with a rate that falls, such as
        ``optax.sgd(lambda t: 0.1 / (t + 1) ** 0.5)``, the run settles.
      batch_size: members per step.
      accuracy: distance of each member from its inner solution at the first step; the norm of its inner
        gradient where the problem has no `bilevel.Smoothness`.
      decay: power of the accuracy's decrease.
      estimator: `implicit`, whose solver takes an absolute tolerance; default
        ``implicit(cg(max_steps=2000))``.
      inner: an inner solver; default `memberwise` of `accelerated`.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Salehi, Mukherjee, Roberts and Ehrhardt, 2024, arXiv:2412.12049.
    """
    return Isgd(
        validation.kind("outer", outer, "an optax optimiser"),
        validation.whole_number("batch_size", batch_size, 1),
        validation.number("accuracy", accuracy, positive=True),
        validation.number("decay", decay, minimum=0.0),
        implicit_of(estimator),
        None if inner is None else validation.kind("inner", inner, "an inner solver"),
    )
