"""MAID: descent by hypergradients that are as exact as descent needs, and no more.

With theta the hyperparameters in free units, F the outer value at the inner solution, z a hypergradient and
omega a bound on its error (`bilevel.certificates`), one outer step is::

    repeat:  solve the inner problem to |w - w*| <= eps and the linear system to a residual delta     (1)
             until omega <= (1 - descent) |z|, else eps, delta <- shrink (eps, delta)
    try      a = step_size, shrink step_size, ...:  theta+ = theta - a z                               (2)
             upper(theta+) - lower(theta) + armijo a |z|^2 <= 0
    else     eps, delta <- shrink (eps, delta), and (1) again with one more trial                      (3)
    then     theta <- theta+; step_size, eps and delta grow                                            (4)

where ``lower <= F <= upper`` by Eq. (2) of `bilevel.certificates`. (1) makes -z a direction of descent of the
exact F, (2) makes F itself fall by ``armijo a |z|^2`` at least; neither needs an accuracy from the user: both
are tightened where they are too loose and loosened where they were tight enough.

Deviations from the algorithm in the paper: the bounds use what was measured, not what was asked for, and have
the direct term; values are taken anew at the params of (1).

Two options, neither with a theorem here. A non-monotone search compares ``upper`` with a weighted mean of the
lower bounds so far, where that is above the last one: single steps may rise, the mean falls (Zhang and
Hager). The first trial may be the Barzilai-Borwein step ``s.s / s.y`` of the last move s and the change y of
the gradient along it, where that is positive.

References:
  Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization
  with application to hyperparameter learning", 2025, arXiv:2308.10098, Algorithms 3.1 and 3.2.
  Zhang and Hager, "A nonmonotone line search technique and its application to unconstrained optimization",
  2004, SIAM Journal on Optimization 14(4).
  Barzilai and Borwein, "Two-point step size gradient methods", 1988, IMA Journal of Numerical Analysis 8(1).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import certificates, data, validation
from bilevel.constraints import Box
from bilevel.estimators.implicit import Implicit
from bilevel.lift import examples
from bilevel.methods.inexact import (
    InexactState,
    Work,
    default_solver,
    first_state,
    implicit_of,
    nonfinite_mask,
    refuse_unfit,
    work,
)
from bilevel.placement import refuse_explicit
from bilevel.problem import (
    Draw,
    Estimate,
    Info,
    InnerSolver,
    Point,
    PyTree,
    SolveInfo,
    Status,
    outer_value,
)
from bilevel.vectors import axpy, norm, vdot, where

# Reasons why a run stalls, as they stand in the history.
_FLOOR, _LINE_SEARCH, _INFINITY = 1, 2, 3
# An optimum at infinity: the gradient has fallen to this share, while a minimum is by the curvature along the
# last move further away than that share of the whole way.
_FLAT, _FAR = 1e-5, 1e-3
# A Barzilai-Borwein step may differ so much from the one that it replaces.
_RANGE = 10.0


class _Progress(NamedTuple):
    """``accuracy`` and ``residual`` are eps and delta of Eq. (1), ``step_size`` the first trial of (2).

    ``free`` and ``z`` are the pair of the last accepted step, ``path`` the length of the way so far, in free
    units, ``steepest`` the largest gradient norm on it; ``reference`` is the mean of lower bounds and
    ``weight`` its weight.
    """

    accuracy: jax.Array
    residual: jax.Array
    step_size: jax.Array
    free: PyTree
    z: PyTree
    path: jax.Array
    steepest: jax.Array
    reference: jax.Array
    weight: jax.Array


class _Measured(NamedTuple):
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


class _Trial(NamedTuple):
    """A trial of Eq. (2)."""

    free: PyTree
    point: Point
    inner: PyTree
    upper: jax.Array
    step_size: jax.Array
    tried: jax.Array
    accepted: jax.Array
    work: Work


@dataclasses.dataclass(frozen=True)
class Maid:
    """See `maid`."""

    estimator: Implicit
    inner: InnerSolver | None
    accuracy: float
    residual: float
    step_size: float
    descent: float
    armijo: float
    shrink: float
    grow: float
    accuracy_shrink: float
    accuracy_grow: float
    max_backtracks: int
    max_rounds: int
    floor: float
    certify: bool
    non_monotone: float
    barzilai_borwein: bool
    batches_per_step = 1, 1
    differentiated = None
    columns = ("accuracy", "linear_accuracy", "step_size", "trials", "tightened", "lower", "upper", "stalled")

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        del j
        return hparams

    def why_stalled(self, row: dict) -> str:
        """The reason and the setting to change."""
        if int(row["stalled"]) == _INFINITY:
            return (
                "The optimum seems to lie at infinity: the gradient is as small as the arithmetic can tell, "
                "and by its curvature the minimum is as far away as ever. Keep hparams in a range by "
                "constraints=bilevel.interval(...), penalise them in outer, or stop at a larger tol."
            )
        if int(row["stalled"]) == _FLOOR:
            return (
                f"The accuracy floor is reached (accuracy {row['accuracy']:.1e}): no tighter solve tells a "
                "direction of descent from its error. At a gradient norm this small that is as good as the "
                "arithmetic gets; else let the inner solver take more steps, or check problem.smoothness."
            )
        return (
            f"The line search is exhausted after {int(row['trials'])} trials: no step along the gradient is "
            "seen to lower outer. Start with a smaller step_size or raise max_backtracks; check that "
            "smoothness.outer is not far too large."
        )

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; the problem checked on the data's shapes."""
        refuse_unfit("maid", problem)
        if problem.smoothness is None:
            raise ValueError(
                "maid needs a Problem with smoothness=bilevel.Smoothness(...), which its bounds are made of."
            )
        state = first_state(
            "maid", problem, self.estimator, self._solver(problem), self._progress,
            params, hparams, train, valid, key=key, model_state=model_state,
        )  # fmt: skip
        if any(isinstance(constraint, Box) for constraint in state.constraints.leaves):
            raise ValueError(
                "maid refuses bilevel.box, whose projection breaks its descent test; take interval."
            )
        _double("params", state.params)
        _double("hparams", state.free)
        return state

    def _progress(self, free) -> _Progress:
        number = functools.partial(jnp.asarray, dtype=float)
        return _Progress(
            accuracy=number(self.accuracy),
            residual=number(self.residual),
            step_size=number(self.step_size),
            free=free,
            z=jax.tree.map(jnp.zeros_like, free),
            path=number(0.0),
            steepest=number(0.0),
            reference=number(0.0),
            weight=number(0.0),
        )

    def _solver(self, problem) -> Any:
        return default_solver(problem) if self.inner is None else self.inner

    def step(self, problem, state, train, valid):
        """Eq. (1) to (4)."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        train_batch = train.batch(state.key, 0)
        job = _Job(self, problem, state, Draw(lambda j: train_batch, 1, False), valid.batch(state.key, 0))
        measured, trial = job.search()
        estimate, before = measured.estimate, state.progress
        finite = jnp.isfinite(estimate.value) & jnp.isfinite(measured.size)
        accepted = trial.accepted
        grown = dataclasses.replace(
            state,
            point=trial.point,
            free=trial.free,
            estimator=measured.estimator,
            inner=trial.inner,
            progress=_Progress(
                accuracy=self.accuracy_grow * measured.accuracy,
                residual=self.accuracy_grow * measured.residual,
                step_size=self.grow * trial.step_size,
                free=state.free,
                z=measured.z,
                path=before.path + norm(axpy(-1.0, state.free, trial.free)),
                steepest=jnp.maximum(before.steepest, measured.size),
                reference=job.reference(measured)[0],
                weight=job.reference(measured)[1],
            ),
        )
        kept = jax.lax.cond(accepted, lambda: grown, lambda: state)
        at_floor = ~measured.descends | (measured.accuracy <= self.floor)
        reason = jnp.where(at_floor, jnp.where(job.far(measured), _INFINITY, _FLOOR), _LINE_SEARCH)
        status = jnp.where(finite, jnp.where(accepted, Status.RUNNING, Status.STALLED), Status.DIVERGED)
        info = Info(
            value=estimate.value,
            grad_norm=measured.size,
            error=measured.omega,
            accepted=finite,
            status=status.astype(jnp.int32),
            nonfinite=nonfinite_mask(estimate.value, measured.size),
            counts=measured.work.plus(trial.work).counts(problem, train_batch, job.valid),
            solve=estimate.solve,
            metrics=estimate.metrics,
            params=estimate.params,
            hparams=state.hparams,
            model_state=estimate.point.model_state,
            extra={
                "accuracy": measured.accuracy,
                "linear_accuracy": measured.residual,
                "step_size": trial.step_size,
                "trials": trial.tried,
                "tightened": measured.tightened,
                "lower": estimate.value - estimate.value_error,
                "upper": estimate.value + estimate.value_error,
                "stalled": jnp.where(accepted | ~finite, 0, reason),
            },
            error_kind=estimate.error_kind,
        )
        return dataclasses.replace(kept, count=state.count + 1), info


class _Job:
    """One outer step."""

    def __init__(self, method: Maid, problem, state: InexactState, draw: Draw, valid):
        self.method, self.problem, self.state, self.draw, self.valid = method, problem, state, draw, valid
        self.solver = method._solver(problem)
        self.key = jax.random.fold_in(state.key, state.count)

    def search(self) -> tuple[_Measured, _Trial]:
        """Rounds of Eq. (1) and (2), tightened by (3)."""
        method, state = self.method, self.state
        accuracy, residual, step_size = state.progress[:3]
        # The loops begin with blanks, so that each solve stands in the program once.
        blank = _zeros(self.at, state.point, state.inner, state.estimator, accuracy, residual)
        no_trial = _Trial(
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

    def measure(self, begun: tuple, before: _Measured) -> _Measured:
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

    def at(self, point, inner, estimator, accuracy, residual) -> _Measured:
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
        return _Measured(
            point, inner, estimator, estimate, z, size, omega, accuracy, residual, jnp.int32(0), descends,
            spent,
        )  # fmt: skip

    def backtrack(self, measured: _Measured, before: _Trial, budget) -> _Trial:
        """Eq. (2); the first step size is the same in every round."""
        method, state = self.method, self.state
        lower = measured.estimate.value - measured.estimate.value_error
        if method.non_monotone:
            lower = jnp.maximum(lower, self.reference(measured)[0])
        z2 = vdot(measured.z, measured.z)
        first = self.first_size(measured)

        def body(trial: _Trial) -> _Trial:
            size = first * method.shrink ** (trial.tried - before.tried)
            free = axpy(-size, measured.z, state.free)
            free = state.constraints.project(free, state.free)
            point, inner, upper, spent = self.upper(free, measured.point, measured.inner, measured.accuracy)
            accepted = upper - lower + method.armijo * size * z2 <= 0
            return _Trial(free, point, inner, upper, size, trial.tried + 1, accepted, trial.work.plus(spent))

        def going(trial: _Trial):
            return ~trial.accepted & _hopeful(measured) & (trial.tried - before.tried < budget)

        return jax.lax.while_loop(going, body, before)

    def first_size(self, measured: _Measured):
        """The first trial."""
        grown = self.state.progress.step_size
        if not self.method.barzilai_borwein:
            return grown
        moved, along = self.secant(measured)
        safe = jnp.clip(moved / jnp.where(along > 0, along, 1), grown / _RANGE, grown * _RANGE)
        return jnp.where((moved > 0) & (along > 0), safe, grown)

    def secant(self, measured: _Measured):
        """``s.s`` and ``s.y`` of the last move s and the change y of the gradient along it; 0 before one."""
        before = self.state.progress
        move = axpy(-1.0, before.free, self.state.free)
        return vdot(move, move), vdot(move, axpy(-1.0, before.z, measured.z))

    def far(self, measured: _Measured):
        """Whether the gradient is nearly gone, and the minimum is not near."""
        before = self.state.progress
        moved, along = self.secant(measured)
        distance = measured.size * moved / jnp.where(along > 0, along, 1)
        flat = measured.size <= _FLAT * before.steepest
        return flat & (moved > 0) & (along > 0) & (distance > _FAR * before.path)

    def reference(self, measured: _Measured):
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


def _hopeful(measured: _Measured):
    """Whether there is a direction to search along."""
    return measured.descends & jnp.isfinite(measured.size) & (measured.size > 0)


def _zeros(fn, *args):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))


def _double(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.dtype.itemsize < 8:
            raise TypeError(
                f"maid needs float64, got {name}{validation.name_of(path)} of dtype {leaf.dtype}: its "
                "accuracies fall below what smaller floats can tell. Call "
                'jax.config.update("jax_enable_x64", True) first and pass float64 arrays.'
            )


def maid(
    estimator: Implicit | None = None,
    inner: InnerSolver | None = None,
    accuracy: float = 0.1,
    linear_accuracy: float | None = None,
    step_size: float = 1.0,
    descent: float = 0.5,
    armijo: float = 0.1,
    shrink: float = 0.5,
    grow: float = 10 / 9,
    accuracy_shrink: float = 0.5,
    accuracy_grow: float = 1.05,
    max_backtracks: int = 10,
    max_rounds: int = 20,
    floor: float = 1e-13,
    certify: bool = True,
    non_monotone: float = 0.0,
    barzilai_borwein: bool = False,
) -> Maid:
    """Descent with an inexact line search that finds the accuracies it needs, Eq. (1) to (4) of the module.

    Deterministic, in float64, for a problem with `bilevel.Smoothness` and whole arrays. Every accepted step
    lowers the exact outer value. An outer step costs the inner steps and products that its accuracy asks for,
    and one inner solve and outer gradient a trial. With ``tol`` in `bilevel.optimize` the run ends where the
    norm of the hypergradient plus the bound on its error is below it.

    Args:
      estimator: `implicit`, whose solver takes an absolute tolerance; default
        ``implicit(cg(max_steps=2000))``.
      inner: an inner solver; default `accelerated` with the problem's constants.
      accuracy: eps, the first distance to the inner solution; params' units.
      linear_accuracy: delta, the first residual of the linear system, absolute; default ``accuracy``.
      step_size: the first trial, in free units per gradient.
      descent: how much of the gradient must be beyond doubt, between ``armijo`` and 1.
      armijo: share of the expected decrease that a step has to bring.
      shrink: of the step size from trial to trial.
      grow: of the step size after a success.
      accuracy_shrink: of both accuracies after a failure.
      accuracy_grow: of both after a success.
      max_backtracks: trials of the first round; one more in each further one.
      max_rounds: rounds until the line search is given up.
      floor: accuracy below which nothing is tightened any more.
      certify: False skips the test of (1) and what its bound costs; accepted steps still lower outer. The
        error of the history is then the relative residual of the linear system.
      non_monotone: weight of the past in the value that a step has to improve on, below 1; 0 for the last
        value alone, 0.85 is usual.
      barzilai_borwein: whether the first trial is the Barzilai-Borwein step, where there is one.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Salehi, Mukherjee, Roberts and Ehrhardt, 2025, arXiv:2308.10098.
    """
    estimator = implicit_of(estimator)
    if estimator.curvature != "hessian":
        raise ValueError(
            'estimator must be bilevel.implicit with curvature="hessian", whose error is bounded, got '
            f"{estimator.curvature!r}."
        )
    if inner is not None:
        validation.kind("inner", inner, "an inner solver")
    numbers = {
        name: validation.number(name, value, positive=True)
        for name, value in (
            ("accuracy", accuracy),
            ("linear_accuracy", accuracy if linear_accuracy is None else linear_accuracy),
            ("step_size", step_size),
            ("descent", descent),
            ("armijo", armijo),
            ("shrink", shrink),
            ("grow", grow),
            ("accuracy_shrink", accuracy_shrink),
            ("accuracy_grow", accuracy_grow),
            ("floor", floor),
        )
    }
    if not armijo < descent < 1:
        raise ValueError(f"armijo < descent < 1 is needed, got armijo={armijo:g} and descent={descent:g}.")
    for name in ("shrink", "accuracy_shrink"):
        if numbers[name] >= 1:
            raise ValueError(f"{name} must be below 1, got {numbers[name]:g}.")
    for name in ("grow", "accuracy_grow"):
        if numbers[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {numbers[name]:g}.")
    numbers["residual"] = numbers.pop("linear_accuracy")
    non_monotone = validation.number("non_monotone", non_monotone, minimum=0.0)
    if non_monotone >= 1:
        raise ValueError(f"non_monotone must be below 1, got {non_monotone:g}.")
    return Maid(
        estimator=estimator,
        inner=inner,
        max_backtracks=validation.whole_number("max_backtracks", max_backtracks, 1),
        max_rounds=validation.whole_number("max_rounds", max_rounds, 1),
        certify=validation.flag("certify", certify),
        non_monotone=non_monotone,
        barzilai_borwein=validation.flag("barzilai_borwein", barzilai_borwein),
        **numbers,
    )
