"""How an inner problem moves: one optax step, and a number of them."""

from __future__ import annotations

from typing import Any

import jax
import optax

from bilevel.problem import Draw, HParams, Point, Problem, inner_value


def start_point(optimizer: optax.GradientTransformation, params, model_state: Any) -> Point:
    """Where an inner loop begins: params with a fresh optimiser state."""
    return Point(params, optimizer.init(params), model_state)


def inner_step(problem: Problem, optimizer, point: Point, hparams: HParams, batch) -> Point:
    """One step of an optax optimiser on the inner loss."""

    def loss(params):
        return inner_value(problem, params, hparams, batch, point.model_state)

    (value, model_state), grad = jax.value_and_grad(loss, has_aux=True)(point.params)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grad, point.opt_state, point.params, value=value, grad=grad, value_fn=lambda p: loss(p)[0]
    )
    return Point(optax.apply_updates(point.params, updates), opt_state, model_state)


def descend(problem: Problem, optimizer, point: Point, hparams: HParams, draw: Draw) -> Point:
    """As many optax steps as the draw has batches of its own; not meant to be differentiated."""

    def body(j, point):
        return inner_step(problem, optimizer, point, hparams, draw(j))

    return jax.lax.fori_loop(0, draw.steps, body, point)
