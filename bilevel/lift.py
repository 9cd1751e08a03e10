"""One set of hyperparameters for many inner problems: cross-validation, multi-task, few-shot tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import data, validation
from bilevel.problem import Composite, FixedPoint, Problem, Proximal


@dataclasses.dataclass(frozen=True)
class _Each:
    """A function of (params, hparams, batch, ...) mapped over all its arguments but hparams."""

    fn: Callable

    def __call__(self, params, hparams, *rest):
        if rest:
            rest = member_batches(params, rest[0]), *rest[1:]
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
class _EachProx:
    prox: Callable

    def __call__(self, params, hparams, step_size):
        return jax.vmap(lambda p: self.prox(p, hparams, step_size))(params)


@dataclasses.dataclass(frozen=True)
class _EachStart:
    start: Callable

    def __call__(self, hparams, batch, key):
        members = _members(batch)
        keys = jax.random.split(key, members)
        return jax.vmap(self.start, in_axes=(None, 0, 0))(hparams, _own_keys(batch, members), keys)


def any_members(problem: Problem) -> Problem:
    """A lifted problem for some of its members: without constants or checks that hold for all of them."""
    return dataclasses.replace(problem, inner=_lifted(problem.inner), smoothness=None)


def _lifted(inner) -> Any:
    """The inner loss that `lift` has made, without what others have put around it."""
    while not isinstance(inner, (Composite, _Each)):
        inner = inner.fn
    return inner


def member(problem: Problem) -> Problem:
    """The problem of one member of a lifted one."""
    inner: Any = _lifted(problem.inner)
    outer: Any = problem.outer
    start: Any = problem.start
    if isinstance(inner, Composite):
        parts: Any = inner.predict, inner.loss, inner.penalty
        inner = Composite(*(part and part.fn for part in parts))
    else:
        inner = inner.fn
    return dataclasses.replace(problem, inner=inner, outer=outer.fn, start=start and start.start)


def member_batches(params, batch):
    """The batch with a leading axis of members on every leaf."""
    return _own_keys(batch, members(params, batch))


def members(params, batch=()) -> int:
    """How many members params have; ValueError where the batch has others."""
    count = _members(params)
    others = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim} - {count}
    if others:
        raise ValueError(
            f"bilevel.lift: params have {count} members along their leading axis, a batch has "
            f"{', '.join(map(str, sorted(others)))}. Each member has its own entry in every array of train "
            "and valid; minibatches would draw members instead of examples"
        )
    return count


def _members(tree) -> int:
    """Length of the leading axis, of the first leaf that has one."""
    return next(x.shape[0] for x in jax.tree.leaves(tree) if x.ndim)


def _own_keys(batch, members: int):
    """The batch with a key for each member where it has one for all."""

    def split(x):
        single = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.ndim == 0
        return jax.random.split(x, members) if single else x

    return jax.tree.map(split, batch)


def axes(problem) -> int:
    """How many leading axes `lift` has added to a problem."""
    loss, count = problem.outer, 0
    while isinstance(loss, _Reduced):
        loss, count = loss.fn, count + 1
    return count


def examples(problem, batch) -> int:
    """Examples in a batch: its rows, over all members of a lifted problem."""
    return data.rows(batch, 1 + axes(problem))


def refuse_sampled(problem, **sources: data.Source) -> None:
    """Raise ValueError where a sampled source would draw members of a lifted problem instead of examples."""
    for name, source in sources.items():
        if axes(problem) and source.sampled:
            raise ValueError(
                f"{name} is sampled along its leading axis, which belongs to the members of bilevel.lift: "
                "whole members would be drawn and shuffled, not their examples. Pass whole arrays, each "
                "member's examples whole, or batches drawn beforehand, bilevel.stacked(batches) of shape "
                "(inner_steps, members, ...)."
            )


def lift(problem: Problem | FixedPoint) -> Problem | FixedPoint:
    """The problem with a leading axis on params, model state, train and valid, and hparams shared.

    The inner losses are summed, so that each member trains as it would alone; the outer losses (and their
    metrics) are averaged. With one fold per entry this is cross-validation of one set of hyperparameters.
    Data are whole arrays or `bilevel.stacked`, not `bilevel.minibatches`, which would draw members. A key in
    the batch (`bilevel.with_rng`) is split, so that each member has its own.

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
        update: Callable = _Each(problem.update)
        if isinstance(problem.update, Proximal):
            loss = _Reduced(problem.update.loss, False, state)
            update = dataclasses.replace(problem.update, loss=loss, prox=_EachProx(problem.update.prox))
        return dataclasses.replace(problem, update=update, outer=outer, start=start)
    inner: Callable = _Reduced(problem.inner, False, state)
    if isinstance(problem.inner, Composite):
        penalty = problem.inner.penalty
        inner = Composite(
            _Each(problem.inner.predict),
            _Reduced(problem.inner.loss, False, state),
            None if penalty is None else _Reduced(penalty, False, state),
        )
    return dataclasses.replace(problem, inner=inner, outer=outer, start=start)
