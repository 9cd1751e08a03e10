"""The slope of a surrogate by its params as a penalty, and a multiplier in its place.

A surrogate h fitted to data of the past is trusted where no small change of its params changes what it says.
With G the mean of its output over some inputs, and the Euclidean norm over all params::

    penalty = s |d_params G|                                                                         (1)

Instead of a strength s to be tuned, a bound may be given. The multiplier of a constraint ``c <= 0`` then
rises while it is broken, and falls to zero where it does not bind::

    loss + m c(params),    m <- max(0, m + rate c(params))                                           (2)

References:
  Dao et al., IGNITE: surrogates for offline optimisation that are insensitive to their params. Only its
  program was read, in which m may become negative; here it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.penalties.strengths import scalar
from bilevel.problem import callable_of
from bilevel.vectors import scaled, unit_of, vdot


def gradient_norm(params, strength, surrogate: Callable, inputs) -> jax.Array:
    """Eq. (1). Where the slope vanishes, so does the derivative of its norm.

    Args:
      params: any pytree of floating arrays.
      strength: s, a scalar.
      surrogate: h, ``(params, inputs) -> outputs`` of any shape.
      inputs: handed on.

    Returns:
      A scalar. Training takes second derivatives of the surrogate, hypergradients third ones.

    Raises:
      TypeError, ValueError: no function, params that are not floating, a strength that is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> surrogate = lambda w, x: x @ w  # its slope is the mean of x
      >>> print(penalties.gradient_norm(jnp.zeros(2), 2.0, surrogate, jnp.array([[3.0, 4.0]])))
      10.0
    """
    callable_of("surrogate", surrogate, "(params, inputs) -> outputs")
    params = validation.floating(params, "params")
    slope = jax.grad(lambda p: jnp.mean(surrogate(p, inputs)))(params)
    # In a unit near the largest entry, in which squares neither underflow nor overflow.
    unit = jax.lax.stop_gradient(unit_of(slope))
    slope = scaled(slope, 1 / unit)
    square = vdot(slope, slope)
    # The derivative of a root is not finite at zero, not even where it is left out.
    norm = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
    return scalar("strength", strength) * (unit * norm).astype(square.dtype)


@dataclasses.dataclass(frozen=True)
class PrimalDual:
    """See `primal_dual`."""

    loss: Callable
    constraint: Callable
    rate: float

    def __call__(self, params, hparams, batch, multiplier):
        """The Lagrangian and the multiplier after it, Eq. (2)."""
        excess = self.constraint(params, hparams, batch)
        value = self.loss(params, hparams, batch) + multiplier * excess
        return value, jnp.maximum(0, multiplier + self.rate * excess).astype(multiplier.dtype)


def primal_dual(loss: Callable, constraint: Callable, rate: float = 1e-3) -> PrimalDual:
    """An inner loss whose model state is the multiplier of a constraint, Eq. (2).

    It goes into a `bilevel.Problem` with ``has_state=True`` and ``model_state=jnp.array(1e-3)`` or another
    start. A fixed point of descent on it satisfies the constraint: either m is zero there and the constraint
    holds, or it holds with equality. Implicit estimators take the multiplier for a constant; trajectory
    estimators differentiate through it. Too large a rate makes both oscillate.

    Args:
      loss: ``(params, hparams, batch) -> scalar``.
      constraint: c, ``(params, hparams, batch) -> scalar``, at most zero where it holds, for instance
        ``gradient_norm(params, 1.0, surrogate, batch["x"]) - 0.1``.
      rate: a positive number; that of the reference by default.

    Raises:
      TypeError, ValueError: something that is no function, a rate that is not positive.
    """
    callable_of("loss", loss, "(params, hparams, batch) -> scalar")
    callable_of("constraint", constraint, "(params, hparams, batch) -> scalar")
    return PrimalDual(loss, constraint, validation.number("rate", rate, positive=True))
