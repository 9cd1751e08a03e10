"""The search of one outer step of MAID: rounds of a gradient and trials along it, ever more accurate.

Equations are those of `bilevel.methods.maid`. All of it is while loops over carried counters, so that a step
is one traceable program, whatever its budgets.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import certificates
from bilevel.lift import examples
from bilevel.methods.inexact import InexactState, Work, work
from bilevel.problem import Draw, Estimate, Point, PyTree, SolveInfo, outer_value
from bilevel.vectors import axpy, norm, vdot, where

# An optimum at infinity: the gradient has fallen to this share, while a minimum is by the curvature along the
# last move further away than that share of the whole way.
_FLAT, _FAR = 1e-5, 1e-3
# A Barzilai-Borwein step may differ so much from the one that it replaces.
_RANGE = 10.0


class Measured(NamedTuple):
    """The end of Eq. (1): where it stands, and what is known there."""

    point: Point
    inner: PyTree
    estimator: PyTree
    estimate: Estimate
    z: PyTree
    size: jax.Array
    omega: jax.Array
    accuracy: jax.Array
    residual: jax.Array
    tightened: jax.Array
    descends: jax.Array
    work: Work


class Trial(NamedTuple):
    """A trial of Eq. (2)."""

    free: PyTree
    point: Point
    inner: PyTree
    upper: jax.Array
    step_size: jax.Array
    tried: jax.Array
    accepted: jax.Array
    work: Work


class Search:
    """One outer step.

    Args:
      method: the settings, `bilevel.methods.maid.Maid`.
      solver: of the inner problem.
      problem: with constants.
      state: where the step begins.
      draw: the training data.
      valid: the validation batch.
    """

    def __init__(self, method: Any, solver, problem, state: InexactState, draw: Draw, valid):
        self.method, self.solver, self.problem = method, solver, problem
        self.state, self.draw, self.valid = state, draw, valid
        self.key = jax.random.fold_in(state.key, state.count)

    def run(self) -> tuple[Measured, Trial]:
        """Rounds of Eq. (1) and (2), tightened by (3)."""
        method, state = self.method, self.state
        accuracy, residual, step_size = state.progress[:3]
        # The loops begin with blanks, so that each solve stands in the program once.
        blank = _zeros(self.at, state.point, state.inner, state.estimator, accuracy, residual)
        no_trial = Trial(
            state.free, state.point, state.inner, jnp.full_like(accuracy, jnp.inf), step_size,
            jnp.int32(0), jnp.bool_(False), work(),
        )  # fmt: skip

        def going(carry):
            measured, trial, rounds = carry
            more = ~trial.accepted & _hopeful(measured) & (rounds < method.max_rounds)
            return (more & (measured.accuracy > method.floor)) | (rounds == 0)

        def body(carry):
            measured, trial, rounds = carry
            begun = state.point, state.inner, state.estimator, accuracy, residual
            tighter = (
                measured.point, measured.inner, measured.estimator,
                method.accuracy_shrink * measured.accuracy, method.accuracy_shrink * measured.residual,
            )  # fmt: skip
            begun = where(rounds == 0, begun, tighter)
            measured = self.measure(begun, measured)
            return measured, self.backtrack(measured, trial, method.max_backtracks + rounds), rounds + 1

        measured, trial, _ = jax.lax.while_loop(going, body, (blank, no_trial, jnp.int32(0)))
        return measured, trial

    def measure(self, begun: tuple, before: Measured) -> Measured:
        """Eq. (1), beginning where and with the accuracies given; the arguments of `at`."""
        method = self.method
        point, inner, estimator, accuracy, residual = begun
        start = before._replace(
            point=point, inner=inner, estimator=estimator, accuracy=accuracy, residual=residual,
            descends=jnp.bool_(False), size=jnp.full_like(before.size, jnp.inf),
        )  # fmt: skip

        def going(carry):
            m, passes = carry
            more = ~m.descends & jnp.isfinite(m.size) & (m.accuracy > method.floor)
            return more | (passes == 0)

        def body(carry):
            m, passes = carry
            shrink = jnp.where(passes == 0, 1.0, method.accuracy_shrink)
            new = self.at(m.point, m.inner, m.estimator, shrink * m.accuracy, shrink * m.residual)
            tightened = m.tightened + jnp.minimum(passes, 1)
            return new._replace(work=m.work.plus(new.work), tightened=tightened), passes + 1

        return jax.lax.while_loop(going, body, (start, jnp.int32(0)))[0]

    def at(self, point, inner, estimator, accuracy, residual) -> Measured:
        """One pass of Eq. (1)."""
        method, constraints, free = self.method, self.state.constraints, self.state.free
        hparams = self.state.hparams
        known = self.constants(hparams)
        point, inner, solved = self.solve(point, inner, hparams, accuracy * known.strong_convexity)
        # Without the test nothing is spent on its bound.
        problem = self.problem if method.certify else dataclasses.replace(self.problem, smoothness=None)
        estimate, estimator = method.estimator.estimate(
            problem, estimator, point, hparams, self.draw, self.valid, self.key, atol=residual
        )
        z = constraints.pull_back(free, estimate.grad)
        size, omega = norm(z), estimate.error
        descends = jnp.bool_(True)
        if method.certify:
            omega = omega * constraints.stretch(free)
            descends = omega <= (1 - method.descent) * size
        else:
            _, gap = self.value(point, hparams, solved)
            estimate = dataclasses.replace(estimate, value_error=gap)
        examined = estimate.counts
        rows, valid_rows = examples(self.problem, self.draw.last), examples(self.problem, self.valid)
        spent = work(
            solved.products + examined.inner_grad / rows,
            examined.outer_grad / valid_rows,
            examined.hvp / rows,
            examined.cross / rows,
        )
        return Measured(
            point=point,
            inner=inner,
            estimator=estimator,
            estimate=estimate,
            z=z,
            size=size,
            omega=omega,
            accuracy=accuracy,
            residual=residual,
            tightened=jnp.int32(0),
            descends=descends,
            work=spent,
        )

    def backtrack(self, measured: Measured, before: Trial, budget) -> Trial:
        """Eq. (2); the first step size is the same in every round."""
        method, state = self.method, self.state
        lower = measured.estimate.value - measured.estimate.value_error
        if method.non_monotone:
            lower = jnp.maximum(lower, self.reference(measured)[0])
        z2 = vdot(measured.z, measured.z)
        first = self.first_size(measured)

        def body(trial: Trial) -> Trial:
            size = first * method.shrink ** (trial.tried - before.tried)
            free = axpy(-size, measured.z, state.free)
            free = state.constraints.project(free, state.free)
            point, inner, upper, spent = self.upper(free, measured.point, measured.inner, measured.accuracy)
            accepted = upper - lower + method.armijo * size * z2 <= 0
            return Trial(free, point, inner, upper, size, trial.tried + 1, accepted, trial.work.plus(spent))

        def going(trial: Trial):
            return ~trial.accepted & _hopeful(measured) & (trial.tried - before.tried < budget)

        return jax.lax.while_loop(going, body, before)

    def first_size(self, measured: Measured):
        """The first trial."""
        grown = self.state.progress.step_size
        if not self.method.barzilai_borwein:
            return grown
        moved, along = self.secant(measured)
        safe = jnp.clip(moved / jnp.where(along > 0, along, 1), grown / _RANGE, grown * _RANGE)
        return jnp.where((moved > 0) & (along > 0), safe, grown)

    def secant(self, measured: Measured):
        """``s.s`` and ``s.y`` of the last move s and the change y of the gradient along it; 0 before one."""
        before = self.state.progress
        move = axpy(-1.0, before.free, self.state.free)
        return vdot(move, move), vdot(move, axpy(-1.0, before.z, measured.z))

    def far(self, measured: Measured):
        """Whether the gradient is nearly gone, and the minimum is not near."""
        before = self.state.progress
        moved, along = self.secant(measured)
        distance = measured.size * moved / jnp.where(along > 0, along, 1)
        flat = measured.size <= _FLAT * before.steepest
        return flat & (moved > 0) & (along > 0) & (distance > _FAR * before.path)

    def reference(self, measured: Measured):
        """The mean of the lower bounds, and its weight, with this step's among them."""
        before, kept = self.state.progress, self.method.non_monotone
        lower = measured.estimate.value - measured.estimate.value_error
        weight = kept * before.weight + 1
        return (kept * before.weight * before.reference + lower) / weight, weight

    def upper(self, free, point, inner, accuracy):
        """An upper bound of F at other hyperparameters, the inner problem solved to the same accuracy."""
        hparams = self.state.constraints.to_natural(free)
        known = self.constants(hparams)
        point, inner, solved = self.solve(point, inner, hparams, accuracy * known.strong_convexity)

        value, gap = self.value(point, hparams, solved)
        upper = jnp.where(known.valid & jnp.isfinite(value + gap), value + gap, jnp.inf)
        return point, inner, upper, work(solved.products, 1)

    def value(self, point: Point, hparams, solved: SolveInfo):
        """Outer at the end of a solve, and a bound on its distance from F."""
        known = self.constants(hparams)

        def outer(params):
            return outer_value(self.problem, params, hparams, self.valid, point.model_state)[0]

        value, grad = jax.value_and_grad(outer)(point.params)
        return value, certificates.gap(known, norm(grad), solved.residual / known.strong_convexity)

    def constants(self, hparams) -> certificates.Constants:
        return certificates.constants(self.problem.smoothness, hparams, self.state.progress.accuracy.dtype)

    def solve(self, point, inner, hparams, atol) -> tuple[Point, PyTree, SolveInfo]:
        return self.solver.solve(self.problem, inner, point, hparams, self.draw, self.key, atol=atol)


def _hopeful(measured: Measured):
    """Whether there is a direction to search along."""
    return measured.descends & jnp.isfinite(measured.size) & (measured.size > 0)


def _zeros(fn, *args):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))
