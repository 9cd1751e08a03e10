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

from bilevel import data, validation
from bilevel.constraints import Box
from bilevel.estimators.implicit import Implicit
from bilevel.methods.inexact import (
    default_solver,
    first_state,
    implicit_of,
    nonfinite_mask,
    refuse_unfit,
)
from bilevel.methods.maid_search import Search
from bilevel.placement import refuse_explicit
from bilevel.problem import (
    Draw,
    Info,
    InnerSolver,
    PyTree,
    Status,
)
from bilevel.vectors import axpy, norm

# Reasons why a run stalls, as they stand in the history.
_FLOOR, _LINE_SEARCH, _INFINITY = 1, 2, 3


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
        draw = Draw(lambda j: train_batch, 1, False)
        search = Search(self, self._solver(problem), problem, state, draw, valid.batch(state.key, 0))
        measured, trial = search.run()
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
                reference=search.reference(measured)[0],
                weight=search.reference(measured)[1],
            ),
        )
        kept = jax.lax.cond(accepted, lambda: grown, lambda: state)
        at_floor = ~measured.descends | (measured.accuracy <= self.floor)
        reason = jnp.where(at_floor, jnp.where(search.far(measured), _INFINITY, _FLOOR), _LINE_SEARCH)
        status = jnp.where(finite, jnp.where(accepted, Status.RUNNING, Status.STALLED), Status.DIVERGED)
        info = Info(
            value=estimate.value,
            grad_norm=measured.size,
            error=measured.omega,
            accepted=finite,
            status=status.astype(jnp.int32),
            nonfinite=nonfinite_mask(estimate.value, measured.size),
            counts=measured.work.plus(trial.work).counts(problem, train_batch, search.valid),
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
