"""What the inner solvers share: moves until a measured gradient is small enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.problem import FixedPoint, Point, PyTree, SolveInfo, inner_value
from bilevel.vectors import norm, where


class Loop(NamedTuple):
    """``size`` is the norm measured at ``params``; ``memory`` is what the solver needs for the next move.

    ``level`` is the size when it was last halved, ``since`` the moves made since then.
    """

    params: PyTree
    memory: Any
    size: jax.Array
    steps: jax.Array
    done: jax.Array
    level: jax.Array
    since: jax.Array


def measured_moves(
    gradient, move, params, memory, max_steps: int, atol, retries: bool = False, patience: Any = jnp.inf
) -> Loop:
    """Moves until the gradient is small: one gradient a pass, which is measured first and then moved by.

    Args:
      gradient: of params.
      move: ``(params, gradient, size, memory) -> (params, memory)``.
      params: where it begins.
      memory: before the first move.
      max_steps: moves at most.
      atol: norm of the gradient at which it ends.
      retries: whether ``move`` knows a way back from a gradient that is not finite.
      patience: it also ends where so many moves have not halved the norm: rounding is all that is left.
    """

    def body(loop):
        grad = gradient(loop.params)
        size = size_of_gradient(grad)
        lost = ~jnp.isfinite(size) & ((loop.steps == 0) if retries else True)
        halved = size <= 0.5 * loop.level
        level, since = jnp.where(halved, size, loop.level), jnp.where(halved, 0, loop.since + 1)
        done = (size <= atol) | lost | (loop.steps >= max_steps) | (since > patience)
        params, memory = move(loop.params, grad, size, loop.memory)
        params, memory = where(done, (loop.params, loop.memory), (params, memory))
        return Loop(params, memory, size, jnp.where(done, loop.steps, loop.steps + 1), done, level, since)

    infinite = jnp.full_like(norm(params), jnp.inf)
    start = Loop(params, memory, infinite, jnp.int32(0), jnp.bool_(False), infinite, jnp.int32(0))
    return jax.lax.while_loop(lambda loop: ~loop.done, body, start)


def size_of_gradient(grad: PyTree) -> jax.Array:
    """Euclidean norm; inf where it is not a number, so that no comparison hides it."""
    size = norm(grad)
    return jnp.where(jnp.isnan(size), jnp.inf, size)


def gradient_of(loss: Callable) -> Callable:
    """Gradient of a loss; not a number where the loss is not finite, as outside the domain of a logarithm."""

    def gradient(params):
        value, grad = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda g: jnp.where(jnp.isfinite(value), g, jnp.nan), grad)

    return gradient


def info_of(loop: Loop) -> SolveInfo:
    """What a loop has measured; one gradient a step, and one at the start."""
    return SolveInfo(loop.size, loop.steps, loop.steps + 1, jnp.bool_(False))


def loss_of(problem, point: Point, hparams, batch) -> Callable:
    """The inner loss as a function of params alone, model state held constant."""
    return lambda params: inner_value(problem, params, hparams, batch, point.model_state)[0]


def tolerance(setting: float | None, atol, params: PyTree):
    """The tolerance of one solve: that of the call, else the solver's, else the default of the dtype."""
    atol = setting if atol is None else atol
    if atol is None:
        atol = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)) ** 0.5
    return jnp.asarray(atol, norm(params).dtype)


def needs_a_loss(name: str, problem) -> None:
    """Raise TypeError for a fixed point, which has no inner loss."""
    if isinstance(problem, FixedPoint):
        raise TypeError(
            f"{name}() minimises an inner loss, which a FixedPoint does not have; take bilevel.picard()."
        )


def check_atol(atol) -> float | None:
    """The setting of a factory, checked."""
    return None if atol is None else validation.number("atol", atol, minimum=0.0)
