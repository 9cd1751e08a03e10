"""How an inner problem moves: a step of an optax optimiser or of a fixed-point map, and many of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from bilevel.problem import Draw, FixedPoint, HParams, Point, Problem, inner_value, updated


@dataclasses.dataclass(frozen=True)
class Tuned:
    """See `tuned`."""

    make: Callable[[HParams], optax.GradientTransformation]


def tuned(make: Callable[[HParams], optax.GradientTransformation]) -> Tuned:
    """An inner optimiser whose settings are hyperparameters: learning rate, momentum, weight decay.

    It goes wherever ``inner=`` takes an optax optimiser, with an estimator of the trajectory family
    (`bilevel.unrolled`, `bilevel.forward`, `bilevel.one_step`): the inner *solution* does not depend on how
    it was reached, so that implicit differentiation sees nothing of them.

    Args:
      make: ``hparams -> optax optimiser``. Its state must have the same structure for all values; they are
        traced, so that they may enter arithmetic but not Python conditions.

    Raises:
      TypeError: not a function.

    Example:
      >>> import bilevel, optax
      >>> inner = bilevel.tuned(lambda hparams: optax.sgd(hparams["lr"]))
      >>> method = bilevel.alternating(bilevel.unrolled(), inner, optax.adam(0.1), inner_steps=50)
    """
    if isinstance(make, tuple) or not callable(make):
        raise TypeError(
            "tuned takes a function from hparams to an optax optimiser, such as "
            f'lambda hparams: optax.sgd(hparams["lr"]), got {make!r:.80}.'
        )
    return Tuned(make)


def optimizer_at(inner, hparams: HParams) -> optax.GradientTransformation:
    """The optax optimiser for given hyperparameters."""
    return inner.make(hparams) if isinstance(inner, Tuned) else inner


def start_point(inner, params, model_state: Any, hparams: HParams = None) -> Point:
    """Where an inner loop begins: params with a fresh optimiser state."""
    state = () if inner is None else optimizer_at(inner, hparams).init(params)
    return Point(params, state, model_state)


def started(problem, inner, point: Point, hparams: HParams, batch, key) -> Point:
    """Where an outer step begins: the point given, or a fresh one where the problem has a start."""
    if problem.start is None:
        return point
    return start_point(inner, problem.start(hparams, batch, key), point.model_state, hparams)


def inner_step(problem, inner, point: Point, hparams: HParams, batch) -> Point:
    """One step: of an optax optimiser on the inner loss, or of the map of a fixed point."""
    if isinstance(problem, FixedPoint):
        params, model_state = updated(problem, point.params, hparams, batch, point.model_state)
        return Point(params, point.opt_state, model_state)

    def loss(params):
        return inner_value(problem, params, hparams, batch, point.model_state)

    (value, model_state), grad = jax.value_and_grad(loss, has_aux=True)(point.params)
    point = dataclasses.replace(point, model_state=model_state)
    extra = {"value": value, "grad": grad, "value_fn": lambda p: loss(p)[0]}
    return along(optimizer_at(inner, hparams), point, grad, **extra)


def along(optimizer: optax.GradientTransformation, point: Point, gradient, **extra) -> Point:
    """One step of an optax optimiser for a gradient that is given."""
    try:
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradient, point.opt_state, point.params, **extra
        )
    except TypeError as error:
        if extra:
            raise
        raise TypeError(
            "inner must be an optax optimiser that needs gradients only: the directions of this method are "
            f"not the gradient of one loss whose value it could be told ({error})."
        ) from error
    return dataclasses.replace(point, params=optax.apply_updates(point.params, updates), opt_state=opt_state)


def descend(problem: Problem | FixedPoint, inner, point: Point, hparams: HParams, draw: Draw) -> Point:
    """As many steps as the draw has batches of its own; not meant to be differentiated."""

    def body(j, point):
        return inner_step(problem, inner, point, hparams, draw(j))

    return jax.lax.fori_loop(0, draw.steps, body, point)
