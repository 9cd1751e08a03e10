"""The three directions of a single-loop method, and what those that reduce their variance share.

With params w, the running solution v of the linear system and hyperparameters u, all move at once, from one
point, along::

    D_w = d_w inner(w, u)                                                                    (1)
    D_v = H v - d_w outer(w, u),   H = d^2_w inner                                           (2)
    D_u = d_u outer(w, u) - d_u (d_w inner . v)                                              (3)

Each is a mean over examples, so that batches give unbiased estimates of them, and so do the corrections of
`bilevel.saba` and `bilevel.srba`, which need the same examples again: those of (1) to (3) come from one batch
of each level.

References:
  Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and
  global variance reduction algorithms", 2022, arXiv:2201.13409.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data, validation
from bilevel.estimators.implicit import implicit
from bilevel.inner_solvers import along
from bilevel.lift import examples
from bilevel.linear_solvers import SGD, SGDState, axpy, norm, sgd
from bilevel.methods.alternating import Alternating, AlternatingState, alternating
from bilevel.methods.inexact import refuse_unfit
from bilevel.problem import (
    RESIDUAL,
    SETTLED,
    Counts,
    Estimate,
    HParams,
    Params,
    SolveInfo,
    inner_value,
    outer_value,
)
from bilevel.vectors import scaled


class InnerPart(NamedTuple):
    """Of the inner loss on a batch: gradient, Hessian-vector product, cross product."""

    gradient: Params
    product: Params
    cross: HParams


class OuterPart(NamedTuple):
    """Of the outer loss on a batch: its gradients by params and by hparams."""

    slope: Params
    direct: HParams


class Parts(NamedTuple):
    """All of which Eq. (1) to (3) are made; natural units."""

    inner: InnerPart
    outer: OuterPart


def inner_part(problem, params, v, hparams, batch) -> InnerPart:
    """Eq. (1), and the terms with v of Eq. (2) and (3)."""

    # The slope of inner along v is linear in v: one gradient of it holds all three.
    def slope(v, params, hparams):
        def inner(params):
            return inner_value(problem, params, hparams, batch, None)[0]

        return jax.jvp(inner, (params,), (v,))[1]

    return InnerPart(*jax.grad(slope, argnums=(0, 1, 2))(v, params, hparams))


def outer_part(problem, params, hparams, batch) -> tuple[jax.Array, dict, OuterPart]:
    """The outer loss, its metrics, and the terms without v of Eq. (2) and (3)."""

    def outer(params, hparams):
        return outer_value(problem, params, hparams, batch, None)

    (value, metrics), grads = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(params, hparams)
    return value, metrics, OuterPart(*grads)


def single_loop(inner, outer, linear_step) -> Alternating:
    """All three variables by one step each, from one point: `bilevel.soba`, where the others begin."""
    validation.kind("inner", inner, "an optax optimiser")
    solver = sgd(checked(linear_step), before=True)
    return alternating(implicit(solver, batches=1), inner, outer, simultaneous=True)


def checked(linear_step):
    """The step size of a linear system, a positive number or a schedule."""
    if callable(linear_step):
        return linear_step
    return validation.number("linear_step", linear_step, positive=True)


def sources_of(refuse: Callable, train, valid) -> tuple[Any, Any]:
    """Both sources; ``refuse`` raises where they are not what the method needs."""
    train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
    refuse(train=train, valid=valid)
    return train, valid


def begun(name: str, method: Alternating, problem, args, *, key, model_state) -> AlternatingState:
    """The first state of a method that needs the same examples again."""
    refuse_unfit(name, problem)
    if problem.has_state:
        raise ValueError(
            f"{name} evaluates the same examples again, which model state would make others; the problem "
            "must not have has_state=True. bilevel.soba takes it."
        )
    return method.init(problem, *args, key=key, model_state=model_state)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step along given directions, up to the move of hyperparameters."""

    estimate: Estimate
    point: Any
    running: SGDState


def moved(method: Alternating, state, running: SGDState, parts: Parts, value, metrics, counts) -> Step:
    """Params and v after Eq. (1) and (2), and Eq. (3) as an estimate at the point before."""
    solver = linear_solver(method)
    (gradient, product, cross), (slope, direct) = parts
    left = axpy(-1.0, slope, product)
    size = norm(slope)
    error = norm(left) / jnp.where(size == 0, 1, size)
    estimate = Estimate(
        value=value,
        grad=axpy(-1.0, cross, direct),
        point=state.point,
        error=error,
        counts=counts,
        # Of a corrected product the sign says nothing about H.
        solve=SolveInfo(norm(left), jnp.int32(1), jnp.int32(1), jnp.bool_(False)),
        metrics=metrics,
        settled=error <= SETTLED,
        error_kind=RESIDUAL,
    )
    v = axpy(-solver.step_at(running), left, running.v)
    return Step(estimate, along(method.inner, state.point, gradient), solver.after(running, v))


def linear_solver(method: Alternating) -> SGD:
    """That of `single_loop`."""
    estimator: Any = method.estimator
    return estimator.solver


def first_running(method: Alternating, running: SGDState, slope) -> SGDState:
    """The running vector after a step from zero: with v = 0 a hypergradient has no indirect term."""
    solver = linear_solver(method)
    return solver.after(running, scaled(slope, solver.step_at(running)))


def counted(problem, train, valid, times=1) -> Counts:
    """Examples touched by the parts of a batch of each level, ``times`` times."""
    inner, outer = examples(problem, train), examples(problem, valid)
    return Counts(*(jnp.float32(times * n) for n in (inner, outer, inner, inner)))


def refuse_iterable(name: str, why: str, fix: str, **sources: data.Source) -> None:
    """Raise ValueError where batches come only once."""
    for which, source in sources.items():
        if source.restarts or (source.renewed and not source.sampled):
            raise ValueError(
                f"{which}: {name} {why}; batches of an iterable come once, and those of a stack are for the "
                f"steps of one inner loop. {fix}"
            )
