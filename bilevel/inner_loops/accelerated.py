"""Accelerated gradient descent with the momentum of strongly convex losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_loops.measured import (
    check_atol,
    gradient_of,
    info_of,
    loss_of,
    measured_moves,
    needs_a_loss,
    tolerance,
)
from bilevel.problem import Draw, Point, PyTree
from bilevel.vectors import axpy, norm, vdot, where

# With constants a solve ends where so many times sqrt(L / mu) steps have not halved the gradient; 1.4 should.
_PATIENCE = 50


class _Momentum(NamedTuple):
    """Of the scheme without constants; ``before`` and ``grad`` are one evaluation back."""

    x: PyTree
    before: PyTree
    grad: PyTree
    lipschitz: jax.Array
    theta: jax.Array
    age: jax.Array


@dataclasses.dataclass(frozen=True)
class Accelerated:
    """See `accelerated`."""

    max_steps: int
    atol: float | None
    strong_convexity: float | Callable | None
    smoothness: float | Callable | None

    def init(self, problem, point, hparams):
        """No state: every solve finds its constants anew, so that none is ever that of other hparams."""
        del point, hparams
        needs_a_loss("accelerated", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        loss = loss_of(problem, point, hparams, draw.last)
        patience: Any = jnp.inf
        if self.smoothness is None:
            move, memory = _move_by_estimates, _first_momentum(point.params)
        else:
            mu, lipschitz = self._constants(hparams)
            move, memory = _move_by_constants(mu, lipschitz), point.params
            patience = _PATIENCE * jnp.sqrt(lipschitz / mu)
        loop = measured_moves(
            gradient_of(loss),
            move,
            point.params,
            memory,
            self.max_steps,
            tolerance(self.atol, atol, point.params),
            retries=self.smoothness is None,
            patience=patience,
        )
        return Point(loop.params, point.opt_state, point.model_state), state, info_of(loop)

    def _constants(self, hparams) -> tuple[jax.Array, jax.Array]:
        mu, lipschitz = (
            jnp.asarray(c(hparams) if callable(c) else c) for c in (self.strong_convexity, self.smoothness)
        )
        return mu, lipschitz


def _move_by_constants(mu, lipschitz) -> Callable:
    # Constants that contradict one another (mu > L) give no momentum rather than a negative one.
    ratio = jnp.sqrt(jnp.clip(mu / lipschitz, 0.0, 1.0))
    momentum = (1 - ratio) / (1 + ratio)  # (sqrt L - sqrt mu) / (sqrt L + sqrt mu)

    def move(y, grad, size, x):
        del size
        new = axpy(-1 / lipschitz, grad, y)
        return axpy(1 + momentum, new, _scaled(-momentum, x)), new

    return move


def _first_momentum(params: PyTree) -> _Momentum:
    one = jnp.ones_like(norm(params))
    return _Momentum(params, params, jax.tree.map(jnp.zeros_like, params), one, one, jnp.int32(0))


def _move_by_estimates(y, grad, size, memory: _Momentum) -> tuple[PyTree, _Momentum]:
    # |grad(y) - grad(before)| / |y - before| is at most L for an L-smooth loss. A step from ``before`` that
    # was made with less than that is taken back and repeated with more. No value of the loss enters: their
    # differences are rounding long before the gradients are.
    change, distance = norm(axpy(-1.0, memory.grad, grad)), norm(axpy(-1.0, memory.before, y))
    eps = jnp.finfo(size.dtype).eps
    significant = distance > 100 * eps * norm(y)
    secant = jnp.where(significant, change / jnp.where(significant, distance, 1), 0)
    secant = jnp.where(jnp.isnan(secant), jnp.inf, secant)
    first, second = memory.age == 0, memory.age == 1
    back = ~first & ~second & (secant > 1.01 * memory.lipschitz) | ~first & ~jnp.isfinite(size)

    # The first step only probes: so short that any loss is quadratic along it.
    probe = size / (jnp.cbrt(eps) * (1 + norm(y)))
    raised = jnp.maximum(2 * memory.lipschitz, jnp.where(jnp.isfinite(secant), secant, 0))
    lipschitz = jnp.where(back, raised, memory.lipschitz)
    lipschitz = jnp.where(second & ~back & (secant > 0), secant, lipschitz)
    lipschitz = jnp.where(first, probe, lipschitz)

    base, slope = where(back, (memory.before, memory.grad), (y, grad))
    x = axpy(-1 / lipschitz, slope, base)
    moved = axpy(-1.0, memory.x, x)
    restart = back | first | second | (vdot(slope, moved) > 0)
    theta = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * memory.theta**2)) / 2)
    momentum = jnp.where(restart, 0, (memory.theta - 1) / theta)
    new = _Momentum(x, base, slope, lipschitz, theta, jnp.minimum(memory.age + 1, 2))
    return axpy(momentum, moved, x), new


def _scaled(factor, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def accelerated(
    max_steps: int = 1000,
    atol: float | None = None,
    strong_convexity: float | Callable | None = None,
    smoothness: float | Callable | None = None,
) -> Accelerated:
    """Nesterov's accelerated gradient method for strongly convex losses.

    With both constants, steps ``1 / L`` and the momentum ``(sqrt L - sqrt mu) / (sqrt L + sqrt mu)``: the
    error falls by about ``1 - sqrt(mu / L)`` per step, where gradient descent has ``1 - mu / L``. They must
    hold: an L that is too small diverges (and the residual says so), a mu that is too large loses the rate.
    A solve ends short of its tolerance where rounding keeps the gradient from falling any further.

    Without them, steps come from a running estimate of L that only grows within a solve and begins anew in
    the next, with a step taken back where it proved too long, and the momentum of convex losses restarts
    where it points uphill (the gradient scheme of O'Donoghue and Candes): the same rate up to a constant,
    often better where the curvature near the solution is.

    One gradient per step, and two (with constants) to five vectors of memory.

    Args:
      max_steps: steps at most, those taken back included.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      strong_convexity: mu, a float or a function of hparams, evaluated in every solve.
      smoothness: L, likewise; both or neither.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range, one constant without the other.
    """
    if (strong_convexity is None) != (smoothness is None):
        raise ValueError(
            "strong_convexity and smoothness come together; give both, or neither to have them estimated."
        )
    constants = [
        c if c is None or callable(c) else validation.number(name, c, positive=True)
        for name, c in (("strong_convexity", strong_convexity), ("smoothness", smoothness))
    ]
    return Accelerated(
        validation.whole_number("max_steps", max_steps, 1), check_atol(atol), constants[0], constants[1]
    )
