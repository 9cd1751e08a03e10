"""One set of hyperparameters for many inner problems: cross-validation, multi-task, few-shot tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.problem import Composite, FixedPoint, Problem


@dataclasses.dataclass(frozen=True)
class _Each:
    """A function of (params, hparams, batch, ...) mapped over all its arguments but hparams."""

    fn: Callable

    def __call__(self, params, hparams, *rest):
        return jax.vmap(lambda p, *r: self.fn(p, hparams, *r))(params, *rest)


@dataclasses.dataclass(frozen=True)
class _Reduced(_Each):
    """The same, its scalars summed or averaged; a model state beside them keeps its axis."""

    mean: bool
    has_state: bool

    def __call__(self, params, hparams, *rest):
        out = super().__call__(params, hparams, *rest)
        reduce = jnp.mean if self.mean else jnp.sum
        if self.has_state and not self.mean:
            return reduce(out[0]), out[1]
        return jax.tree.map(reduce, out)


@dataclasses.dataclass(frozen=True)
class _EachStart:
    start: Callable

    def __call__(self, hparams, batch, key):
        keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
        return jax.vmap(self.start, in_axes=(None, 0, 0))(hparams, batch, keys)


def lift(problem: Problem | FixedPoint) -> Problem | FixedPoint:
    """The problem with a leading axis on params, model state, train and valid, and hparams shared.

    The inner losses are summed, so that each member trains as it would alone; the outer losses (and their
    metrics) are averaged. With one fold per entry this is cross-validation of one set of hyperparameters.

    Args:
      problem: what each member solves.

    Raises:
      TypeError: not a problem.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.lift(
      ...     bilevel.Problem(
      ...         inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...         outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ...     )
      ... )
      >>> float(problem.outer(jnp.array([1.0, 2.0]), 0.0, jnp.array([0.0, 0.0])))
      1.25
    """
    validation.kind("problem", problem, "a problem")
    state = problem.has_state
    start = None if problem.start is None else _EachStart(problem.start)
    outer = _Reduced(problem.outer, True, state)
    if isinstance(problem, FixedPoint):
        return dataclasses.replace(problem, update=_Each(problem.update), outer=outer, start=start)
    inner: Callable = _Reduced(problem.inner, False, state)
    if isinstance(problem.inner, Composite):
        penalty = problem.inner.penalty
        inner = Composite(
            _Each(problem.inner.predict),
            _Reduced(problem.inner.loss, False, state),
            None if penalty is None else _Reduced(penalty, False, state),
        )
    return dataclasses.replace(problem, inner=inner, outer=outer, start=start)
