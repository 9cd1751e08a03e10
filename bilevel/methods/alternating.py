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
from bilevel.inner_solvers import Tuned, descend, start_point, started
from bilevel.lift import examples, refuse_sampled
from bilevel.linear_solvers import norm, where
from bilevel.placement import refuse_explicit
from bilevel.problem import (
    CERTIFIED,
    ESTIMATED,
    Estimator,
    FixedPoint,
    HParams,
    Info,
    InnerSolver,
    NonFinite,
    Params,
    Point,
    PyTree,
    Status,
    register,
    static,
    tree_is_finite,
)
from bilevel.trees import copied

# Outer steps in a row that may be rejected; a step that nothing random enters would only repeat itself.
_REJECTIONS = 3


@register
@dataclasses.dataclass(frozen=True)
class AlternatingState:
    """What the next outer step needs; leaves as listed, hparams in free units.

    ``inner``, ``estimator`` and ``outer`` are the states of those three; ``finite`` says whether they are.
    ``origin`` is the first point, for methods that restart there, else None. ``position`` counts the training
    batches taken; batches are functions of ``key`` and position, and so is all randomness of ``key`` and
    ``count``, the outer steps attempted. ``rejected`` counts rejections in a row.
    """

    point: Point
    free: PyTree
    estimator: PyTree
    inner: PyTree
    outer: PyTree
    origin: Point | None
    key: jax.Array
    count: jax.Array
    position: jax.Array
    rejected: jax.Array
    finite: jax.Array
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

    @property
    def streams(self) -> tuple[jax.Array, ...]:
        """Keys of the batches of train, of those of valid, and of what is random in this outer step."""
        key_train, key_valid, key_step = (jax.random.fold_in(self.key, i) for i in range(3))
        return key_train, key_valid, jax.random.fold_in(key_step, self.count)


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
        if not estimator.trajectory or estimator.steps is not None:
            return estimator
        return dataclasses.replace(estimator, inner=self.inner, steps=self.inner_steps)

    @property
    def _inner(self) -> Any:
        """What makes the points: of the trajectory family the estimator's own optimiser."""
        return self._estimator.inner if self._estimator.trajectory else self.inner

    @property
    def differentiated(self) -> Any:
        """The inner optimiser through whose steps derivatives are taken, or None."""
        first_order = getattr(self._estimator, "first_order", False)
        return self._inner if self._estimator.trajectory and not first_order else None

    @property
    def reverses(self) -> bool:
        """Whether these derivatives are taken in reverse mode, through more than one step."""
        return getattr(self._estimator, "reverses", False)

    @property
    def _solves(self) -> bool:
        return isinstance(self.inner, InnerSolver)

    def columns(self, problem) -> tuple[str, ...]:
        """What is reported of a fixed point that is taken for reached, and of a long trajectory."""
        if self._estimator.trajectory:
            return getattr(self._estimator, "columns", ())
        return ("contraction",) if isinstance(problem, FixedPoint) else ()

    def seen(self, hparams, j):
        """What the losses see at inner step ``j``."""
        estimator = self._estimator
        return estimator.seen(hparams, j) if estimator.trajectory else hparams

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state: fresh optimisers, the problem checked on the data's shapes."""
        validation.kind("problem", problem, "a problem")
        self._check_inner(problem)
        hparams = validation.floating(hparams, "hparams")
        validation.finite(hparams, "hparams")
        key = validation.random_key("key", key)
        model_state = validation.strong(model_state)
        train = data.as_source(train, "train")
        valid = data.as_source(valid, "valid")
        data.check_sources(train, valid, self._steps)
        refuse_sampled(problem, train=train, valid=valid)
        if self.period != 1 and train.restarts and train.renewed:
            raise ValueError("period would waste the batches of an iterable; take arrays or minibatches.")
        constraints = bind(problem.constraints, hparams)
        constraints.check(hparams)
        seen = self.seen(hparams, 0)
        params = validation.first_params(problem, params, seen, lambda: train.batch(key, 0), key)
        batches = data.abstract_batch(train), data.abstract_batch(valid)
        settled = self._estimator
        validation.problem_on_data(
            problem, settled, self._inner, params, seen, *batches, model_state, given=hparams
        )
        # Copies, so that a loop that donates its state leaves the user's arrays alone.
        return self._first_state(problem, constraints, *copied((params, hparams, key, model_state)))

    def _check_inner(self, problem) -> None:
        if isinstance(problem, FixedPoint):
            if self._inner is not None and not self._solves:
                raise ValueError(
                    "inner must be None for a FixedPoint problem, whose map is the inner step, or an inner "
                    "solver such as bilevel.picard()."
                )
        elif self._inner is None:
            raise TypeError(
                "inner must be an optax optimiser such as optax.adam(1e-3), got None (which stands for the "
                "map of a FixedPoint problem only); params need something that advances them."
            )

    def _first_state(self, problem, constraints, params, hparams, key, model_state) -> AlternatingState:
        free = constraints.to_free(hparams)
        optimizer = None if self._solves else self._inner
        point = start_point(optimizer, params, model_state, self.seen(hparams, 0))
        estimator = self._estimator.init(problem, point, hparams)
        inner = self.inner.init(problem, point, hparams) if self._solves else ()
        outer = self.outer.init(free)
        return AlternatingState(
            point=point,
            free=free,
            estimator=estimator,
            inner=inner,
            outer=outer,
            origin=copied(point) if self.restart else None,
            key=key,
            count=jnp.int32(0),
            position=jnp.int32(0),
            rejected=jnp.int32(0),
            finite=tree_is_finite((point.opt_state, model_state, estimator, inner, outer)),
            constraints=constraints,
        )

    def step(self, problem, state, train, valid):
        """Eq. (1) to (3); rejected as a whole where a result is not finite."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        data.check_sources(train, valid, self._steps)
        hparams = state.hparams
        moves = state.count % self.period == 0
        estimated, end, inner, gradients = self._estimated(problem, state, hparams, moves, train, valid)
        estimate, estimator = estimated
        counts = estimate.counts._replace(inner_grad=gradients)
        estimate = dataclasses.replace(estimate, counts=counts)
        old = state
        if getattr(self._estimator, "forgets", False):
            # A warm start need not outlive a rejected step: one vector less is held through it.
            old = dataclasses.replace(state, estimator=self._estimator.init(problem, state.point, hparams))
        taken = jnp.where(moves, self._steps, 0)
        renewed = train.renewed or valid.renewed
        return self.concluded(old, estimate, end, estimator, inner, taken=taken, renewed=renewed)

    def concluded(self, state, estimate, end, estimator, inner=(), *, taken=0, renewed):
        """Eq. (3) and the end of an outer step, which is rejected where a result is not finite.

        Args:
          state: before the step, as a rejected one leaves it.
          estimate: at hparams of the state.
          end: the new point.
          estimator: its new state.
          inner: new state of an inner solver.
          taken: training batches.
          renewed: the step would not be the same if it were repeated.
        """
        hparams = state.hparams
        grad = state.constraints.free_gradient(state.free, estimate)
        free, outer = self._outer_update(state, estimate.value, grad)
        proposed = dataclasses.replace(
            state, point=end, free=free, estimator=estimator, inner=inner, outer=outer
        )
        nonfinite, finite = _nonfinite(proposed, estimate, grad)
        accepted = nonfinite == 0
        # Not the whole state: what stays as it is, the key above all, is a constant of a compiled loop.
        kept = jax.lax.cond(accepted, lambda: _moving(proposed), lambda: _moving(state))
        rejected = jnp.where(accepted, 0, state.rejected + 1)
        # A step that nothing new enters would only repeat itself.
        allowed = _REJECTIONS if renewed else 1
        new_state = dataclasses.replace(
            state,
            **kept,
            count=state.count + 1,
            position=state.position + taken,
            rejected=rejected,
            finite=jnp.where(accepted, finite, state.finite),
        )
        measured = {"contraction": estimate.contraction, "growth": estimate.growth}
        info = Info(
            value=estimate.value,
            grad_norm=state.constraints.grad_norm(state.free, grad),
            error=error_in_free_units(estimate, state.constraints, state.free),
            accepted=accepted,
            status=jnp.where(rejected >= allowed, Status.DIVERGED, Status.RUNNING).astype(jnp.int32),
            nonfinite=nonfinite,
            counts=estimate.counts,
            solve=estimate.solve,
            metrics=estimate.metrics,
            params=estimate.params,
            hparams=hparams,
            model_state=estimate.point.model_state,
            extra={name: x for name, x in measured.items() if x is not None},
            settled=estimate.settled,
            error_kind=estimate.error_kind,
        )
        return new_state, info

    def _estimated(self, problem, state, hparams, moves, train, valid):
        """Eq. (1) and (2): (estimate, its state), new point, inner solver's state, inner gradients."""
        key_train, key_valid, key = state.streams
        draw = data.draw(train, key_train, state.position, self._steps, state.count, own=moves)
        valid_batch = valid.batch(key_valid, state.count)

        # What perturbs hyperparameters needs to know where they are between two whole numbers.
        units = {"free": state.free} if getattr(self._estimator, "responds", False) else {}

        def estimate(point):
            args = problem, state.estimator, point, hparams, draw, valid_batch, key
            return self._estimator.estimate(*args, **units)

        if self._estimator.trajectory:
            estimated = estimate(self._begin(state))
            return estimated, estimated[0].point, state.inner, estimated[0].counts.inner_grad
        end, inner, taken = self._advance(problem, state, hparams, draw, moves, key)
        estimated = estimate(state.point if self.simultaneous else end)
        gradients = estimated[0].counts.inner_grad + taken * examples(problem, draw.last)
        return estimated, end, inner, gradients

    def _begin(self, state) -> Point:
        return state.point if state.origin is None else state.origin

    def _outer_update(self, state, value, grad):
        """Eq. (3): hyperparameters in free units and the outer optimiser's state."""
        try:
            updates, outer = optax.with_extra_args_support(self.outer).update(
                grad, state.outer, state.free, value=value, grad=grad
            )
        except TypeError as error:
            raise TypeError(
                "outer must be an optax optimiser that needs gradients only (no line search, which would "
                f"evaluate the loss): {error}."
            ) from error
        free = state.constraints.project(optax.apply_updates(state.free, updates), state.free)
        if not self.warmup:
            return free, outer
        return where(state.count >= self.warmup, (free, outer), (state.free, state.outer))

    def _advance(self, problem, state, hparams, draw, moves, key):
        """Eq. (1) where ``period`` does not skip it: point, inner solver's state, gradients taken."""

        def solve():
            optimizer = None if self._solves else self.inner
            start = started(problem, optimizer, self._begin(state), hparams, draw(0), key)
            if not self._solves:
                end = descend(problem, self.inner, start, hparams, draw)
                return end, state.inner, jnp.float32(draw.steps)
            begun = state.inner
            if self.restart or problem.start is not None:
                begun = self.inner.init(problem, start, hparams)
            end, inner, info = self.inner.solve(problem, begun, start, hparams, draw, key)
            return end, inner, jnp.asarray(info.products, jnp.float32)

        if self.period == 1:
            return solve()
        return jax.lax.cond(moves, solve, lambda: (state.point, state.inner, jnp.float32(0)))


def _moving(state: AlternatingState) -> dict:
    """The parts of a state that a step moves, or leaves where it is rejected."""
    return {name: getattr(state, name) for name in ("point", "free", "estimator", "inner", "outer")}


def error_in_free_units(estimate, constraints: BoundConstraints, free):
    """A bound on the gradient's error as one on that of its pull-back; other errors as they are."""
    bound = estimate.error_kind in (CERTIFIED, ESTIMATED)
    return estimate.error * constraints.stretch(free) if bound else estimate.error


def _nonfinite(state: AlternatingState, estimate, grad) -> tuple[jax.Array, jax.Array]:
    """Where a proposed state is not finite, and whether its optimiser and estimator states are."""
    finite = tree_is_finite(
        (state.point.opt_state, state.point.model_state, state.estimator, state.inner, state.outer)
    )
    error_is_nan = jnp.isnan(estimate.error)  # norms that overflow
    bad = {
        NonFinite.VALUE: ~jnp.isfinite(estimate.value),
        NonFinite.GRAD: ~jnp.isfinite(norm(grad)) | error_is_nan,
        NonFinite.PARAMS: ~tree_is_finite(state.point.params),
        # Some optimisers start from an infinite best value: only what was finite can become bad.
        NonFinite.STATE: (~finite & state.finite) | ~tree_is_finite(state.free),
    }
    mask = jnp.int32(0)
    for flag, is_bad in bad.items():
        mask += jnp.where(is_bad, jnp.int32(flag), jnp.int32(0))
    return mask, finite


def _check_inner_loop(estimator: Any, inner, inner_steps: int) -> None:
    """The inner loop is given once, to the method or to its estimator, and is of a kind that fits."""
    own = estimator.trajectory and estimator.inner is not None
    if own:
        if inner is not None or inner_steps != 1:
            raise ValueError(
                "inner and inner_steps are given twice, to alternating and to its estimator "
                f"({validation.called(estimator)}); give them to one of the two."
            )
        if estimator.steps is None:
            raise ValueError("the estimator has inner= but no steps=; give both there, or both here.")
    elif estimator.trajectory:
        if estimator.steps is not None and inner is not None:
            raise ValueError(
                "the inner loop is given half here (inner=) and half to the estimator (steps=); give both "
                "to one of the two."
            )
        if inner is not None:
            validation.kind("inner", inner, "an inner optimiser")
    elif isinstance(inner, Tuned):
        raise TypeError(
            "bilevel.tuned needs an estimator of the trajectory family, such as bilevel.unrolled() or "
            "bilevel.forward(): the inner solution does not depend on the optimiser that found it, so that "
            f"{validation.called(estimator)}() sees nothing of its hyperparameters."
        )
    elif inner is not None:
        validation.kind("inner", inner, "an inner optimiser or solver")


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
      inner: what advances params: an optax optimiser, `bilevel.tuned`, an inner solver, or None for a
        `bilevel.FixedPoint`, whose map is the step.
      outer: the optax optimiser that moves hparams, in free units.
      inner_steps: inner steps per outer step.
      period: advance params only every so many outer steps.
      warmup: leave hparams where they are for so many first outer steps.
      restart: begin every outer step at the first params, optimiser state and model state, an inner solver
        at a fresh state of its own. (A problem's ``start`` makes params anew, and leaves the model state.)
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
    restart = validation.flag("restart", restart)
    simultaneous = validation.flag("simultaneous", simultaneous)
    _check_inner_loop(estimator, inner, inner_steps)
    continues = getattr(estimator, "continues", "")
    if restart and continues:
        raise ValueError(
            f"restart=True does not go with bilevel.{validation.called(estimator)}: {continues}."
        )
    if getattr(estimator, "trajectory", False) and (period != 1 or simultaneous):
        raise ValueError(
            "period and simultaneous need an estimator of the implicit family; the trajectory family "
            "advances params in every estimate."
        )
    return Alternating(estimator, inner, outer, inner_steps, period, warmup, restart, simultaneous)
