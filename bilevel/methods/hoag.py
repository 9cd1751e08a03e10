"""HOAG: inexact hypergradients whose accuracies follow a schedule that is set beforehand.

With theta the hyperparameters in free units, z_k the hypergradient at params within eps_k of the inner
solution and with a linear residual of at most eps_k, and f_k the outer value there, one outer step is::

    theta_(k+1) = theta_k - z_k / L,   d = |z_k| / L                                              (1)
    L <- 0.95 L       if f_k <= f_(k-1) + eps_(k+1) / 4 + 5/4 eps_k d - L d^2                     (2)
    theta_(k+1) = theta_(k-1) - z_(k-1) / (2 L), L <- 2 L, eps <- eps / 2                         (3)
                      instead of (1) if f_k >= f_(k-1) + 0.2 |f_(k-1)|

The first L is ``|z_0| / sqrt(hparams)``, so that the first step moves each hyperparameter by about one; 1
where the gradient is below 1e-3.

(3) takes a bad step back: the move is made once more from where it came from, half as long. The released
implementation subtracts the step twice, and has no way back.

References:
  Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, arXiv:1602.02355.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data, validation
from bilevel.estimators.implicit import Implicit
from bilevel.methods.alternating import error_in_free_units
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
from bilevel.problem import Draw, Info, InnerSolver, PyTree, Status
from bilevel.vectors import axpy, norm, size_of, where

SCHEDULES = ("geometric", "quadratic", "cubic", "exact")
# Of Eq. (2) and (3), and of the geometric schedule.
_SLACK, _EASED, _RISE, _RATIO = 0.25, 0.95, 0.2, 0.9
_SMALL_GRADIENT = 1e-3


class _Progress(NamedTuple):
    """``accuracy``: eps_0, halved by Eq. (3); ``lipschitz``: L, 0 before the first step.

    ``value``, ``free`` and ``z`` are those of the step before.
    """

    accuracy: jax.Array
    lipschitz: jax.Array
    value: jax.Array
    free: PyTree
    z: PyTree


@dataclasses.dataclass(frozen=True)
class Hoag:
    """See `hoag`."""

    estimator: Implicit
    inner: InnerSolver | None
    schedule: str
    accuracy: float
    floor: float
    batches_per_step = 1, 1
    differentiated = None
    columns = ("accuracy", "step_size", "taken_back")

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        del j
        return hparams

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; the problem checked on the data's shapes."""
        refuse_unfit("hoag", problem)
        return first_state(
            "hoag", problem, self.estimator, self._solver(problem), self._progress,
            params, hparams, train, valid, key=key, model_state=model_state,
        )  # fmt: skip

    def _progress(self, free) -> _Progress:
        dtype = norm(free).dtype
        return _Progress(
            accuracy=jnp.asarray(self.accuracy, dtype),
            lipschitz=jnp.zeros((), dtype),
            value=jnp.asarray(jnp.inf, dtype),
            free=free,
            z=jax.tree.map(jnp.zeros_like, free),
        )

    def _solver(self, problem) -> Any:
        return default_solver(problem) if self.inner is None else self.inner

    def at(self, count, first):
        """The accuracy of the step after ``count`` others."""
        k = (count + 1).astype(first.dtype)
        shrunk = {
            "geometric": first * _RATIO ** (k - 1),
            "quadratic": first / k**2,
            "cubic": first / k**3,
            "exact": jnp.zeros_like(first),
        }[self.schedule]
        return jnp.maximum(shrunk, self.floor)

    def step(self, problem, state, train, valid):
        """Eq. (1) to (3)."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        train_batch, valid_batch = train.batch(state.key, 0), valid.batch(state.key, 0)
        draw = Draw(lambda j: train_batch, 1, False)
        key = jax.random.fold_in(state.key, state.count)
        hparams, before, constraints = state.hparams, state.progress, state.constraints
        eps = self.at(state.count, before.accuracy)
        point, inner, solved = self._solver(problem).solve(
            problem, state.inner, state.point, hparams, draw, key,
            atol=gradient_tolerance(problem, hparams, eps),
        )  # fmt: skip
        estimate, estimator = self.estimator.estimate(
            problem, state.estimator, point, hparams, draw, valid_batch, key, atol=eps
        )
        z = constraints.pull_back(state.free, estimate.grad)
        proposed, back, lipschitz = self._moved(state, estimate.value, z, eps)
        free, progress = proposed
        nonfinite = nonfinite_mask(estimate.value, norm(z))
        new = dataclasses.replace(
            state,
            point=point,
            free=constraints.project(free, state.free),
            estimator=estimator,
            inner=inner,
            progress=progress,
        )
        finite = nonfinite == 0
        kept = jax.lax.cond(finite, lambda: new, lambda: state)
        taken = estimate.counts
        info = Info(
            value=estimate.value,
            grad_norm=constraints.grad_norm(state.free, z),
            error=error_in_free_units(estimate, constraints, state.free),
            accepted=finite,
            status=jnp.where(finite, Status.RUNNING, Status.DIVERGED).astype(jnp.int32),
            nonfinite=nonfinite,
            counts=taken._replace(
                inner_grad=taken.inner_grad
                + work(solved.products).counts(problem, train_batch, valid_batch).inner_grad
            ),
            solve=estimate.solve,
            metrics=estimate.metrics,
            params=estimate.params,
            hparams=hparams,
            model_state=estimate.point.model_state,
            extra={"accuracy": eps, "step_size": 1 / lipschitz, "taken_back": back},
            error_kind=estimate.error_kind,
        )
        return dataclasses.replace(kept, count=state.count + 1), info

    def _moved(self, state, value, z, eps):
        """Eq. (1) to (3): (free, progress), whether a step was taken back, and the L of the move."""
        before = state.progress
        size = norm(z)
        first = state.count == 0
        begun = jnp.where(size > _SMALL_GRADIENT, size / jnp.sqrt(size_of(z) * 1.0), 1.0).astype(size.dtype)
        lipschitz = jnp.where(first, begun, before.lipschitz)
        length = size / lipschitz
        coming = self.at(state.count + 1, before.accuracy)
        allowed = _SLACK * coming + (1 + _SLACK) * eps * length - lipschitz * length**2
        good = first | (value <= before.value + allowed)
        back = ~first & (value >= before.value + _RISE * jnp.abs(before.value))
        doubled = 2 * lipschitz
        ahead = (
            axpy(-1 / lipschitz, z, state.free),
            _Progress(
                before.accuracy,
                jnp.where(good, _EASED * lipschitz, lipschitz),
                value.astype(before.value.dtype),
                state.free,
                z,
            ),
        )
        again = (
            axpy(-1 / doubled, before.z, before.free),
            before._replace(accuracy=0.5 * before.accuracy, lipschitz=doubled),
        )
        return where(back, again, ahead), back, jnp.where(back, doubled, lipschitz)


def hoag(
    schedule: str = "quadratic",
    accuracy: float = 0.1,
    estimator: Implicit | None = None,
    inner: InnerSolver | None = None,
    floor: float = 1e-12,
) -> Hoag:
    """Gradient descent with hypergradients of scheduled accuracy, Eq. (1) to (3) of the module.

    Deterministic, for whole arrays; in float32 too, where an accuracy below 1e-7 or so is out of reach and
    the inner solver's cap ends each solve. With `bilevel.Smoothness` the accuracy is a distance to the inner
    solution, else the norm of the inner gradient. Nothing is tested: a schedule that is too slow
    ends short of the optimum, one that is too fast pays for digits that no step needs; `maid` finds its own.

    Args:
      schedule: of the accuracy after k steps: "geometric" (0.9^k), "quadratic" (1 / (k + 1)^2), "cubic" or
        "exact" (the floor from the start).
      accuracy: eps_0, of the first step.
      estimator: `implicit`, whose solver takes an absolute tolerance; default
        ``implicit(cg(max_steps=2000))``.
      inner: an inner solver; default `accelerated`, with the problem's constants where it has them.
      floor: the smallest accuracy that is asked for.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Pedregosa, 2016, arXiv:1602.02355.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, x: 0.5 * (w - x) ** 2 + 0.5 * jnp.exp(h) * w**2,
      ...     outer=lambda w, h, x: 0.5 * (w - x) ** 2,
      ... )
      >>> start = jnp.float32(0.0), jnp.float32(2.0)
      >>> train, valid = jnp.float32(2.0), jnp.float32(1.0)
      >>> run = bilevel.optimize(problem, *start, train, valid, bilevel.hoag(), 100, progress=False)
      >>> print(f"{jnp.exp(run.hparams):.2f}")  # w* = 2 / (1 + exp(h)) is 1
      1.00
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    return Hoag(
        implicit_of(estimator),
        None if inner is None else validation.kind("inner", inner, "an inner solver"),
        schedule,
        validation.number("accuracy", accuracy, positive=True),
        validation.number("floor", floor, positive=True),
    )
