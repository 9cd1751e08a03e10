"""Alternate between the inner and the outer problem: the composition most methods are.

One outer step k, with a point p (params, optimiser state) and hyperparameters u in free units::

    p <- inner_steps optax steps on inner(., hparams(u), batch)                            (1)
    g <- estimator at (p, hparams(u)), pulled back to free units                          (2)
    u <- project(u + outer update of g)                                                    (3)

A trajectory estimator does (1) and (2) at once and its end point is the next p. Warm starts carry over:
p, and whatever state the estimator keeps (the last solution of its linear system).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import data, validation
from bilevel.constraints import BoundConstraints, bind
from bilevel.inner_solvers import descend, start_point
from bilevel.linear_solvers import norm, where
from bilevel.problem import (
    Estimator,
    HParams,
    Info,
    NonFinite,
    Params,
    Point,
    PyTree,
    Status,
    register,
    static,
    tree_is_finite,
)

# Outer steps in a row that may be rejected; a step that nothing random enters would only repeat itself.
_REJECTIONS = 3


@register
@dataclasses.dataclass(frozen=True)
class AlternatingState:
    """What the next outer step needs; leaves as listed, hparams in free units.

    ``origin`` is the first point, for methods that restart there, else None. ``position`` counts the
    training batches taken; batches are functions of ``key`` and position, and so is all randomness of ``key``
    and ``count``, the outer steps attempted.
    """

    point: Point
    free: PyTree
    estimator: PyTree
    outer: PyTree
    origin: Point | None
    key: jax.Array
    count: jax.Array
    position: jax.Array
    rejected: jax.Array
    constraints: BoundConstraints = static()

    @property
    def params(self) -> Params:
        """Parameters."""
        return self.point.params

    @property
    def hparams(self) -> HParams:
        """Hyperparameters in natural units."""
        return self.constraints.to_natural(self.free)

    @property
    def model_state(self) -> PyTree:
        """Mutable model state."""
        return self.point.model_state


@dataclasses.dataclass(frozen=True)
class Alternating:
    """See `alternating`."""

    estimator: Estimator
    inner: Any
    outer: Any
    inner_steps: int
    period: int
    warmup: int
    restart: bool
    simultaneous: bool

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """Training and validation batches that one outer step takes."""
        return self._steps, 1

    @property
    def _steps(self) -> int:
        return self._estimator.steps if self._estimator.trajectory else self.inner_steps

    @property
    def _estimator(self) -> Any:
        """The estimator, with the method's inner loop where it is left to the method."""
        estimator: Any = self.estimator
        if not estimator.trajectory or self.inner is None:
            return estimator
        return dataclasses.replace(estimator, inner=self.inner, steps=self.inner_steps)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state: fresh optimisers, the problem checked on the data's shapes."""
        validation.kind("problem", problem, "a problem")
        params = validation.floating(params, "params")
        hparams = validation.floating(hparams, "hparams")
        validation.finite(params, "params")
        validation.finite(hparams, "hparams")
        key = validation.random_key("key", key)
        if model_state is not None:
            raise NotImplementedError("model_state= comes with has_state=True, in a later release.")
        train = data.as_source(train, "train")
        valid = data.as_source(valid, "valid")
        data.check_sources(train, valid, self._steps)
        constraints = bind(problem.constraints, hparams)
        constraints.check(hparams)
        tuned = validation.tuned_leaves(problem, hparams)
        train_batch, valid_batch = jax.eval_shape(lambda: (train.batch(key, 0), valid.batch(key, 0)))
        validation.problem_on_data(problem, tuned, params, hparams, train_batch, valid_batch)
        return self._first_state(problem, params, hparams, key, constraints)

    def _first_state(self, problem, params, hparams, key, constraints) -> AlternatingState:
        # Copies, so that a loop that donates its state leaves the user's arrays alone.
        params, hparams, key = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, hparams, key))
        estimator = self._estimator
        inner = estimator.inner if estimator.trajectory else self.inner
        point = start_point(inner, params, None)
        free = constraints.to_free(hparams)
        return AlternatingState(
            point=point,
            free=free,
            estimator=estimator.init(problem, point, hparams),
            outer=self.outer.init(free),
            origin=point if self.restart else None,
            key=key,
            count=jnp.int32(0),
            position=jnp.int32(0),
            rejected=jnp.int32(0),
            constraints=constraints,
        )

    def step(self, problem, state, train, valid):
        """Eq. (1) to (3); rejected as a whole where a result is not finite."""
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        estimator, steps = self._estimator, self._steps
        data.check_sources(train, valid, steps)
        hparams = state.hparams
        key_train, key_valid, key_step = (jax.random.fold_in(state.key, i) for i in range(3))
        draw = data.draw(train, key_train, state.position, steps)
        valid_batch = valid.batch(key_valid, state.count)
        key = jax.random.fold_in(key_step, state.count)
        start = state.point if state.origin is None else state.origin
        moves = state.count % self.period == 0

        def advance(point):
            if self.period == 1:
                return descend(problem, self.inner, point, hparams, draw)
            return jax.lax.cond(
                moves, lambda p: descend(problem, self.inner, p, hparams, draw), lambda p: p, point
            )

        if estimator.trajectory:
            estimate, estimator_state = estimator.estimate(
                problem, state.estimator, start, hparams, draw, valid_batch, key
            )
            point = estimate.point
        else:
            at = start if self.simultaneous else advance(start)
            estimate, estimator_state = estimator.estimate(
                problem, state.estimator, at, hparams, draw, valid_batch, key
            )
            point = advance(start) if self.simultaneous else at

        grad = state.constraints.pull_back(state.free, estimate.grad)
        updates, outer = optax.with_extra_args_support(self.outer).update(
            grad, state.outer, state.free, value=estimate.value, grad=grad
        )
        free = state.constraints.project(optax.apply_updates(state.free, updates), state.free)
        if self.warmup:
            warm = state.count >= self.warmup
            free, outer = where(warm, (free, outer), (state.free, state.outer))

        finite = {
            NonFinite.VALUE: jnp.isfinite(estimate.value),
            NonFinite.GRAD: jnp.isfinite(norm(grad)),
            NonFinite.PARAMS: tree_is_finite(point.params),
            NonFinite.STATE: tree_is_finite((point.opt_state, free, outer, estimator_state)),
        }
        nonfinite = jnp.int32(0)
        for flag, ok in finite.items():
            nonfinite += jnp.where(ok, jnp.int32(0), jnp.int32(flag))
        accepted = nonfinite == 0
        new = (point, free, estimator_state, outer)
        old = (state.point, state.free, state.estimator, state.outer)
        point, free, estimator_state, outer = jax.lax.cond(accepted, lambda: new, lambda: old)
        rejected = jnp.where(accepted, 0, state.rejected + 1)
        allowed = _REJECTIONS if train.renewed or valid.renewed else 1
        new_state = dataclasses.replace(
            state,
            point=point,
            free=free,
            estimator=estimator_state,
            outer=outer,
            count=state.count + 1,
            position=state.position + jnp.where(moves, steps, 0),
            rejected=rejected,
        )
        info = Info(
            value=estimate.value,
            grad_norm=state.constraints.grad_norm(state.free, grad),
            error=estimate.error,
            accepted=accepted,
            status=jnp.where(rejected >= allowed, Status.DIVERGED, Status.RUNNING).astype(jnp.int32),
            nonfinite=nonfinite,
            counts=estimate.counts._replace(inner_grad=self._inner_grad(estimate, draw, moves)),
            solve=estimate.solve,
            metrics=estimate.metrics,
            params=estimate.params,
            hparams=hparams,
            model_state=estimate.point.model_state,
            error_kind=estimate.error_kind,
        )
        return new_state, info

    def _inner_grad(self, estimate, draw, moves):
        """Examples touched by inner gradients, in the estimate and in Eq. (1)."""
        if self._estimator.trajectory:
            return estimate.counts.inner_grad
        taken = jnp.where(moves, draw.steps * data.rows(draw.last), 0)
        return estimate.counts.inner_grad + taken.astype(jnp.float32)


def alternating(
    estimator: Estimator,
    inner=None,
    outer=None,
    inner_steps: int = 1,
    period: int = 1,
    warmup: int = 0,
    restart: bool = False,
    simultaneous: bool = False,
) -> Alternating:
    """Inner steps, a hypergradient, an outer step; in turn.

    Args:
      estimator: of the hypergradient. One of the trajectory family without settings of its own takes the
        method's ``inner`` and ``inner_steps``.
      inner: the optax optimiser that advances params.
      outer: the optax optimiser that moves hparams, in free units.
      inner_steps: inner steps per outer step.
      period: advance params only every so many outer steps.
      warmup: leave hparams where they are for so many first outer steps.
      restart: begin every outer step at the first params and optimiser state.
      simultaneous: estimate at the old params, so that all variables move from the old point.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range, an inner loop given twice or
        not at all.

    Example:
      >>> import bilevel, optax
      >>> method = bilevel.alternating(
      ...     bilevel.unrolled(), inner=optax.sgd(0.1), outer=optax.adam(0.01), inner_steps=20
      ... )
      >>> method.batches_per_step
      (20, 1)
    """
    validation.kind("estimator", estimator, "an estimator")
    if outer is None:
        raise TypeError("outer must be an optax optimiser such as optax.adam(1e-2), got None.")
    validation.kind("outer", outer, "an optax optimiser")
    inner_steps = validation.whole_number("inner_steps", inner_steps, 1)
    period = validation.whole_number("period", period, 1)
    warmup = validation.whole_number("warmup", warmup, 0)
    settings: Any = estimator
    own = settings.trajectory and settings.inner is not None
    if own:
        if inner is not None or inner_steps != 1:
            raise ValueError(
                "inner and inner_steps are given twice, to alternating and to its estimator "
                f"({type(estimator).__name__.lower()}); give them to one of the two."
            )
        if settings.steps is None:
            raise ValueError("the estimator has inner= but no steps=; give both there, or both here.")
    elif inner is None:
        raise TypeError(
            "inner must be an optax optimiser such as optax.adam(1e-3), got None; params need something "
            "that advances them."
        )
    else:
        validation.kind("inner", inner, "an optax optimiser")
        if settings.trajectory and settings.steps is not None:
            raise ValueError(
                "the inner loop is given half here (inner=) and half to the estimator (steps=); give both "
                "to one of the two."
            )
    if settings.trajectory and (period != 1 or simultaneous):
        raise ValueError(
            "period and simultaneous need an estimator of the implicit family; the trajectory family "
            "advances params in every estimate."
        )
    return Alternating(
        estimator, inner, outer, inner_steps, period, warmup, bool(restart), bool(simultaneous)
    )
