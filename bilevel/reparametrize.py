"""The same problem in other coordinates.

With ``params = map(free, hparams)``, the losses of a problem become functions of ``free``::

    free -> inner(map(free, hparams), hparams, batch),   free -> outer(map(free, hparams), hparams, batch)

and every method and estimator works on ``free``. Where the map is invertible the minimiser is the same, and
so is its implicit hypergradient; the Hessian by ``free``, J^T H J with J the derivative of the map, may be
easier or harder to solve with. Where it is not, as of a subspace, the minimiser is another one. Maps of use
are in `bilevel.maps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.lift import axes
from bilevel.problem import Composite, FixedPoint, Problem, callable_of


@dataclasses.dataclass(frozen=True)
class _Through:
    """A function of (params, hparams, ...) of the params that a map makes of its first argument."""

    fn: Callable
    map: Callable

    def __call__(self, free, hparams, *rest):
        return self.fn(self.map(free, hparams), hparams, *rest)

    def __repr__(self) -> str:
        return f"{getattr(self.fn, '__name__', repr(self.fn))} of {_named(self.map)}"


@dataclasses.dataclass(frozen=True)
class _Conjugate:
    """The map of a fixed point in other coordinates; a model state beside it is left alone."""

    update: Callable
    map: Any
    has_state: bool

    def __call__(self, free, hparams, *rest):
        out = self.update(self.map(free, hparams), hparams, *rest)
        if self.has_state:
            return self.map.inverse(out[0], hparams), out[1]
        return self.map.inverse(out, hparams)

    def __repr__(self) -> str:
        return f"{getattr(self.update, '__name__', repr(self.update))} of {_named(self.map)}"


@dataclasses.dataclass(frozen=True)
class _Start:
    start: Callable
    map: Any

    def __call__(self, hparams, batch, key):
        return self.map.inverse(self.start(hparams, batch, key), hparams)


def reparametrize(problem: Problem | FixedPoint, map: Callable) -> Problem | FixedPoint:
    """The problem of ``free``, where ``params = map(free, hparams)``.

    Its structure is kept: a `bilevel.composite` stays one (its Gauss-Newton matrix is that of the predictions
    by ``free``; a penalty that is convex in params need not be so in ``free``), and so are metrics, model
    state and constraints. ``result.params`` are ``free``, and stand for ``map(result.params,
    result.hparams)``.

    Args:
      problem: in the old coordinates. Its ``start`` goes through ``map.inverse``, and so does the map of a
        `bilevel.FixedPoint`, whose fixed points are then those of the old one; as a
        `bilevel.proximal_gradient` it loses its symmetric system.
      map: ``(free, hparams) -> params``, differentiable: a function, or a value of `bilevel.maps`. It may
        have ``inverse(params, hparams) -> free``. Like a problem it is built outside of loops.

    Raises:
      TypeError: no problem, no function, or an inverse that is needed and missing; ValueError: a problem with
        smoothness constants, which are those of the old coordinates, or one that `bilevel.lift` made: lift
        the reparametrised one.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> def train_loss(w, hparams, target):
      ...     return jnp.sum((w - target) ** 2) + hparams["l2"] * jnp.sum(w**2)
      >>> def valid_loss(w, hparams, target):
      ...     return jnp.sum((w - target) ** 2)
      >>> def double(free, hparams):
      ...     return 2 * free
      >>> old = bilevel.Problem(train_loss, valid_loss)
      >>> new = bilevel.reparametrize(old, double)
      >>> w, data = jnp.array([0.5, 1.0]), (jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
      >>> for problem, params in ((old, w), (new, w / 2)):
      ...     print(f"{bilevel.hypergradient(problem)(params, {'l2': 1.0}, *data).grad['l2']:.3f}")
      -0.250
      -0.250
    """
    if not isinstance(problem, (Problem, FixedPoint)):
        raise TypeError(
            f"problem must be a bilevel.Problem or a bilevel.FixedPoint, got {type(problem).__name__}."
        )
    callable_of("map", map, "(free, hparams) -> params")
    if axes(problem):
        raise ValueError(
            "problem has been made by bilevel.lift, whose members would share the map: lift last, "
            "bilevel.lift(bilevel.reparametrize(problem, map))."
        )
    if problem.smoothness is not None:
        raise ValueError(
            "problem has smoothness constants, which are those of its own coordinates: pass "
            "dataclasses.replace(problem, smoothness=None), and set those of the new coordinates afterwards."
        )
    start = problem.start
    if start is not None:
        _needs_inverse(map, "the problem's start", "drop it by dataclasses.replace(problem, start=None)")
        start = _Start(start, map)
    if isinstance(problem, FixedPoint):
        _needs_inverse(map, "the map of a FixedPoint", "solve a Problem with a loss")
        update = _Conjugate(problem.update, map, problem.has_state)
        return dataclasses.replace(problem, update=update, outer=_Through(problem.outer, map), start=start)
    return dataclasses.replace(
        problem, inner=_inner(problem.inner, map), outer=_Through(problem.outer, map), start=start
    )


def _inner(inner: Callable, map: Callable) -> Callable:
    if not isinstance(inner, Composite):
        return _Through(inner, map)
    penalty = None if inner.penalty is None else _Through(inner.penalty, map)
    return Composite(_Through(inner.predict, map), inner.loss, penalty)


def _needs_inverse(map: Callable, what: str, instead: str) -> None:
    if not hasattr(map, "inverse"):
        raise TypeError(
            f"map must have an inverse(params, hparams) -> free, through which {what} goes, and "
            f"{_named(map)} has none; give it one, or {instead}."
        )


def _named(map: Callable) -> str:
    return getattr(map, "__name__", repr(map))
