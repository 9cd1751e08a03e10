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

References:
  Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization
  with application to hyperparameter learning", 2025, arXiv:2308.10098, Algorithms 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import certificates, data, validation
from bilevel.constraints import BoundConstraints, Box, bind
from bilevel.estimators.implicit import Implicit, implicit
from bilevel.inner_loops.accelerated import accelerated
from bilevel.inner_solvers import start_point
from bilevel.lift import examples, refuse_sampled
from bilevel.linear_solvers import cg
from bilevel.problem import (
    Counts,
    Draw,
    Estimate,
    FixedPoint,
    Info,
    InnerSolver,
    NonFinite,
    Point,
    PyTree,
    SolveInfo,
    Status,
    outer_value,
    register,
    static,
)
from bilevel.vectors import axpy, norm, vdot, where

# Reasons why a run stalls, as they stand in the history.
_FLOOR, _LINE_SEARCH = 1, 2


@register
@dataclasses.dataclass(frozen=True)
class MaidState:
    """What the next outer step needs; ``free`` are the hyperparameters in free units.

    ``accuracy`` and ``residual`` are eps and delta of Eq. (1), ``step_size`` the first trial of (2).
    """

    point: Point
    free: PyTree
    estimator: PyTree
    inner: PyTree
    accuracy: jax.Array
    residual: jax.Array
    step_size: jax.Array
    key: jax.Array
    count: jax.Array
    constraints: BoundConstraints = static()

    @property
    def params(self):
        """Parameters."""
        return self.point.params

    @property
    def hparams(self):
        """Hyperparameters in natural units."""
        return self.constraints.to_natural(self.free)

    @property
    def model_state(self):
        """Mutable model state."""
        return self.point.model_state


class _Work(NamedTuple):
    """Gradients of both levels, and products of the system, so far."""

    inner: Any
    outer: Any
    hvp: Any
    cross: Any


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
    work: _Work


class _Trial(NamedTuple):
    """A trial of Eq. (2)."""

    free: PyTree
    point: Point
    inner: PyTree
    upper: jax.Array
    step_size: jax.Array
    tried: jax.Array
    accepted: jax.Array
    work: _Work


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
    batches_per_step = 1, 1
    differentiated = None
    columns = ("accuracy", "linear_accuracy", "step_size", "trials", "tightened", "lower", "upper", "stalled")

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        del j
        return hparams

    def why_stalled(self, row: dict) -> str:
        """The reason and the setting to change."""
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
        validation.kind("problem", problem, "a problem")
        if isinstance(problem, FixedPoint) or problem.smoothness is None:
            raise ValueError(
                "maid needs a Problem with smoothness=bilevel.Smoothness(...), which its bounds are made of."
            )
        if problem.start is not None:
            raise ValueError(
                "maid goes on from where it stands; a problem with start= begins anew at every step."
            )
        hparams = validation.floating(hparams, "hparams")
        validation.finite(hparams, "hparams")
        key = validation.random_key("key", key)
        model_state = validation.strong(model_state)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        for name, source in (("train", train), ("valid", valid)):
            if source.sampled or source.renewed or source.restarts:
                raise ValueError(
                    f"{name} must be arrays used whole: maid compares values of one and the same loss."
                )
        refuse_sampled(problem, train=train, valid=valid)
        constraints = bind(problem.constraints, hparams)
        constraints.check(hparams)
        if any(isinstance(constraint, Box) for constraint in constraints.leaves):
            raise ValueError(
                "maid refuses bilevel.box, whose projection breaks its descent test; take interval."
            )
        params = validation.first_params(problem, params, hparams, lambda: train.batch(key, 0), key)
        _double("params", params)
        _double("hparams", hparams)
        batches = data.abstract_batch(train), data.abstract_batch(valid)
        validation.problem_on_data(problem, self.estimator, None, params, hparams, *batches, model_state)
        params, hparams, key, model_state = jax.tree.map(
            lambda x: jnp.array(x, copy=True), (params, hparams, key, model_state)
        )
        point = start_point(None, params, model_state, hparams)
        return MaidState(
            point=point,
            free=constraints.to_free(hparams),
            estimator=self.estimator.init(problem, point, hparams),
            inner=self._solver(problem).init(problem, point, hparams),
            accuracy=jnp.asarray(self.accuracy, float),
            residual=jnp.asarray(self.residual, float),
            step_size=jnp.asarray(self.step_size, float),
            key=key,
            count=jnp.int32(0),
            constraints=constraints,
        )

    def _solver(self, problem) -> Any:
        if self.inner is not None:
            return self.inner
        known = problem.smoothness
        return accelerated(100_000, strong_convexity=known.strong_convexity, smoothness=known.inner)

    def step(self, problem, state, train, valid):
        """Eq. (1) to (4)."""
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        train_batch = train.batch(state.key, 0)
        job = _Job(self, problem, state, Draw(lambda j: train_batch, 1, False), valid.batch(state.key, 0))
        measured, trial = job.search()
        estimate = measured.estimate
        finite = jnp.isfinite(estimate.value) & jnp.isfinite(measured.size)
        accepted = trial.accepted
        grown = dataclasses.replace(
            state,
            point=trial.point,
            free=trial.free,
            estimator=measured.estimator,
            inner=trial.inner,
            accuracy=self.accuracy_grow * measured.accuracy,
            residual=self.accuracy_grow * measured.residual,
            step_size=self.grow * trial.step_size,
        )
        kept = jax.lax.cond(accepted, lambda: grown, lambda: state)
        at_floor = ~measured.descends | (measured.accuracy <= self.floor)
        stalled = jnp.where(accepted | ~finite, 0, jnp.where(at_floor, _FLOOR, _LINE_SEARCH))
        status = jnp.where(finite, jnp.where(accepted, Status.RUNNING, Status.STALLED), Status.DIVERGED)
        rows, valid_rows = examples(problem, train_batch), examples(problem, job.valid)
        work = _added(measured.work, trial.work)
        info = Info(
            value=estimate.value,
            grad_norm=measured.size,
            error=measured.omega,
            accepted=finite,
            status=status.astype(jnp.int32),
            nonfinite=jnp.where(
                finite, 0, jnp.where(jnp.isfinite(estimate.value), NonFinite.GRAD, NonFinite.VALUE)
            ).astype(jnp.int32),
            counts=Counts(
                *(jnp.float32(n * r) for n, r in zip(work, (rows, valid_rows, rows, rows), strict=True))
            ),
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
                "stalled": stalled,
            },
            error_kind=estimate.error_kind,
        )
        return dataclasses.replace(kept, count=state.count + 1), info


class _Job:
    """One outer step."""

    def __init__(self, method: Maid, problem, state: MaidState, draw: Draw, valid):
        self.method, self.problem, self.state, self.draw, self.valid = method, problem, state, draw, valid
        self.solver = method._solver(problem)
        self.key = jax.random.fold_in(state.key, state.count)

    def search(self) -> tuple[_Measured, _Trial]:
        """Rounds of Eq. (1) and (2), tightened by (3)."""
        method, state = self.method, self.state
        # The loops begin with blanks, so that each solve stands in the program once.
        blank = _zeros(self.at, state.point, state.inner, state.estimator, state.accuracy, state.residual)
        no_trial = _Trial(
            state.free, state.point, state.inner, jnp.full_like(state.accuracy, jnp.inf), state.step_size,
            jnp.int32(0), jnp.bool_(False), _nothing(),
        )  # fmt: skip

        def going(carry):
            measured, trial, rounds = carry
            more = ~trial.accepted & _hopeful(measured) & (rounds < method.max_rounds)
            return (more & (measured.accuracy > method.floor)) | (rounds == 0)

        def body(carry):
            measured, trial, rounds = carry
            begun = state.point, state.inner, state.estimator, state.accuracy, state.residual
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
            return new._replace(work=_added(m.work, new.work), tightened=tightened), passes + 1

        return jax.lax.while_loop(going, body, (start, jnp.int32(0)))[0]

    def at(self, point, inner, estimator, accuracy, residual) -> _Measured:
        """One pass of Eq. (1)."""
        method, constraints, free = self.method, self.state.constraints, self.state.free
        hparams = self.state.hparams
        mu = self.constants(hparams).strong_convexity
        point, inner, solved = self.solve(point, inner, hparams, accuracy * mu)
        estimate, estimator = method.estimator.estimate(
            self.problem, estimator, point, hparams, self.draw, self.valid, self.key, atol=residual
        )
        z = constraints.pull_back(free, estimate.grad)
        size, omega = norm(z), estimate.error * constraints.stretch(free)
        descends = omega <= (1 - method.descent) * size if method.certify else jnp.bool_(True)
        spent = _work(solved.products + 1, 1, estimate.solve.products, 1)
        return _Measured(
            point,
            inner,
            estimator,
            estimate,
            z,
            size,
            omega,
            accuracy,
            residual,
            jnp.int32(0),
            descends,
            spent,
        )

    def backtrack(self, measured: _Measured, before: _Trial, budget) -> _Trial:
        """Eq. (2); the first step size is the same in every round."""
        method, state = self.method, self.state
        lower = measured.estimate.value - measured.estimate.value_error
        z2 = vdot(measured.z, measured.z)

        def body(trial: _Trial) -> _Trial:
            size = state.step_size * method.shrink ** (trial.tried - before.tried)
            free = axpy(-size, measured.z, state.free)
            free = state.constraints.project(free, state.free)
            point, inner, upper, spent = self.upper(free, measured.point, measured.inner, measured.accuracy)
            accepted = upper - lower + method.armijo * size * z2 <= 0
            return _Trial(
                free, point, inner, upper, size, trial.tried + 1, accepted, _added(trial.work, spent)
            )

        def going(trial: _Trial):
            return ~trial.accepted & _hopeful(measured) & (trial.tried - before.tried < budget)

        return jax.lax.while_loop(going, body, before)

    def upper(self, free, point, inner, accuracy):
        """An upper bound of F at other hyperparameters, the inner problem solved to the same accuracy."""
        hparams = self.state.constraints.to_natural(free)
        known = self.constants(hparams)
        point, inner, solved = self.solve(point, inner, hparams, accuracy * known.strong_convexity)

        def outer(params):
            return outer_value(self.problem, params, hparams, self.valid, point.model_state)[0]

        value, grad = jax.value_and_grad(outer)(point.params)
        eps = solved.residual / known.strong_convexity
        upper = value + norm(grad) * eps + 0.5 * known.outer * eps**2
        upper = jnp.where(known.valid & jnp.isfinite(upper), upper, jnp.inf)
        return point, inner, upper, _work(solved.products, 1, 0, 0)

    def constants(self, hparams) -> certificates.Constants:
        return certificates.constants(self.problem.smoothness, hparams, self.state.accuracy.dtype)

    def solve(self, point, inner, hparams, atol) -> tuple[Point, PyTree, SolveInfo]:
        return self.solver.solve(self.problem, inner, point, hparams, self.draw, self.key, atol=atol)


def _hopeful(measured: _Measured):
    """Whether there is a direction to search along."""
    return measured.descends & jnp.isfinite(measured.size) & (measured.size > 0)


def _zeros(fn, *args):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))


def _work(inner, outer, hvp, cross) -> _Work:
    return _Work(*(jnp.asarray(n).astype(jnp.int32) for n in (inner, outer, hvp, cross)))


def _nothing() -> _Work:
    return _work(0, 0, 0, 0)


def _added(one: _Work, other: _Work) -> _Work:
    return _Work(*(a + b for a, b in zip(one, other, strict=True)))


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
      certify: False skips the test of (1); accepted steps still lower outer.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Salehi, Mukherjee, Roberts and Ehrhardt, 2025, arXiv:2308.10098.
    """
    if estimator is None:
        estimator = implicit(cg(max_steps=2000))
    if not isinstance(estimator, Implicit):
        raise TypeError(
            f"estimator must be bilevel.implicit(...), whose error is bounded, got {estimator!r}."
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
    return Maid(
        estimator=estimator,
        inner=inner,
        max_backtracks=validation.whole_number("max_backtracks", max_backtracks, 1),
        max_rounds=validation.whole_number("max_rounds", max_rounds, 1),
        certify=validation.flag("certify", certify),
        **numbers,
    )
