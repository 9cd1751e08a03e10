"""Transformations of gradients that optax does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.problem import PyTree
from bilevel.validation import whole_number
from bilevel.vectors import norm, scaled, unit_of, where


class NormalizedMomentumState(NamedTuple):
    """The running mean of gradients, and the steps made, for schedules."""

    momentum: PyTree
    steps: jax.Array


def normalized_momentum(step_size, momentum=0.9) -> optax.GradientTransformation:
    """Steps of one length along the running mean of gradients.

    With gradients ``g_k``, ``m_-1 = 0``, and the Euclidean norm over the whole pytree::

        m_k = momentum m_(k-1) + (1 - momentum) g_k
        update = -step_size m_k / |m_k|                                                      (1)

    Every update has length ``step_size``, however steep or flat the loss: it converges where the smoothness
    grows with the gradient, and where plain steps of the same size diverge. For the same reason a fixed
    ``step_size`` ends in a cycle around the minimum, of a radius of about ``step_size / (1 - momentum)``;
    let it fall to come closer. The start from zero needs no correction: the norm takes it out. Where
    ``m_k`` is exactly zero so is the update. One vector of memory.

    Args:
      step_size: length of each update, positive; or an optax schedule of it, whose values have to be so.
      momentum: weight of the past, at least 0 and less than 1; 0 is normalised gradient descent.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> optimizer = bilevel.normalized_momentum(0.5)
      >>> gradient = {"a": jnp.float32(300.0), "b": jnp.float32(-400.0)}
      >>> update, _ = optimizer.update(gradient, optimizer.init(gradient))
      >>> print({name: f"{u:.2f}" for name, u in update.items()})
      {'a': '-0.30', 'b': '0.40'}

    References:
      Cutkosky and Mehta, "Momentum improves normalized SGD", 2020, arXiv:2002.03305.
    """
    if not callable(step_size):
        _in_range("step_size", step_size, "a positive number or a schedule", lambda x: x > 0)
    if callable(momentum):
        raise TypeError(f"momentum must be a number, got {momentum!r}; only step_size may be a schedule.")
    _in_range("momentum", momentum, "a number of at least 0 and less than 1", lambda x: 0 <= x < 1)

    def init(params):
        return NormalizedMomentumState(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(grads, state, params=None):
        del params
        mean = jax.tree.map(
            lambda m, g: (momentum * m + (1 - momentum) * g).astype(m.dtype), state.momentum, grads
        )
        length = step_size(state.steps) if callable(step_size) else step_size
        # Eq. (1), in a unit in which no square leaves the range of its dtype.
        unit = unit_of(mean)
        units = jax.tree.map(lambda m: m / unit.astype(m.dtype), mean)
        size = norm(units)
        updates = scaled(units, -length / jnp.where(size == 0, 1, size))
        steps = jnp.minimum(state.steps, jnp.iinfo(jnp.int32).max - 1) + 1
        return updates, NormalizedMomentumState(mean, steps)

    return optax.GradientTransformation(init, update)


class MomentumResetState(NamedTuple):
    """The state of the optimiser, and the updates since it was begun anew."""

    state: PyTree
    age: jax.Array


def momentum_reset(
    optimizer: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose state is begun anew from time to time: its momentum, and its count of steps.

    For an inner loop whose problem an outer step, or `bilevel.maps.refactorise`, moves away from what the
    momentum remembers. As the count begins anew too, Adam's correction of its first means is right again. A
    schedule of learning rates would begin anew with it: leave it outside,
    ``optax.chain(momentum_reset(optax.scale_by_adam(), 200), optax.scale_by_learning_rate(schedule))``.

    Args:
      optimizer: any optax transformation.
      every: updates from one begin to the next, at least 1, which leaves no momentum at all.

    Raises:
      TypeError, ValueError: no transformation, or no such number.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> optimizer = bilevel.momentum_reset(optax.trace(0.9), every=2)
      >>> state = optimizer.init(jnp.zeros(()))
      >>> updates = []
      >>> for _ in range(4):
      ...     update, state = optimizer.update(jnp.ones(()), state)
      ...     updates.append(round(float(update), 1))
      >>> print(updates)
      [1.0, 1.9, 1.0, 1.9]
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax transformation, got {optimizer!r:.80}.")
    every = whole_number("every", every, 1)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return MomentumResetState(optimizer.init(params), jnp.int32(0))

    def update(grads, state, params=None, **extra_args):
        # An optimiser whose first state holds params themselves is given them here too.
        fresh = optimizer.init(grads if params is None else params)
        before = where(state.age == every, fresh, state.state)
        updates, after = optimizer.update(grads, before, params, **extra_args)
        return updates, MomentumResetState(after, jnp.where(state.age == every, 1, state.age + 1))

    return optax.GradientTransformationExtraArgs(init, update)


def _in_range(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raise where a setting is out of range; one that is traced, as in a sweep, is taken on trust."""
    if isinstance(value, jax.Array) and value.shape == ():
        if isinstance(value, jax.core.Tracer):
            return
        value = value.item()
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")
    if not (np.isfinite(value) and fits(float(value))):
        raise ValueError(f"{name} must be {wanted}, got {value:g}.")
