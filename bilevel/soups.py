"""One model out of several: averages of the params of a population, or of points of a trajectory.

Of members theta_1 ... theta_n, fine-tuned from one common initialisation (else an average of their params
means nothing)::

    uniform   theta = (1/n) sum_i theta_i                                                            (1)
    greedy    the same over a subset: from the best held-out value down, a member is added where the
              average with it has a lower value                                                      (2)
    learned   theta = sum_i alpha_i theta_i, where alpha on the simplex minimises a validation loss    (3)

A soup costs what one model costs when it is used. (1) costs nothing, (2) at most 2 n evaluations, (3) a run
of `bilevel.optimize`, in which every step evaluates one model and its gradient. Mutable model state, such as
the statistics of batch normalisation, is not averaged: measure it anew at the soup.

References:
  Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
  increasing inference time", 2022, arXiv:2203.05482.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import validation
from bilevel.constraints import positive, simplex
from bilevel.estimators.unrolled import one_step
from bilevel.methods.alternating import alternating
from bilevel.optimize import optimize
from bilevel.problem import FixedPoint, Params, PyTree, Status
from bilevel.result import Result
from bilevel.trees import readable
from bilevel.vectors import widened


@dataclasses.dataclass(frozen=True)
class Soup:
    """An average of members.

    Args:
      params: of the soup, a tree like one member's.
      weights: of all members given, shape (n,), zero for those left out; a tree of such where each leaf has
        its own.
      value: held-out value of ``params``; None where none was measured.
      members: which have a weight, in the order in which they were taken.
      inverse_temperature: learned with the weights, or None.
    """

    params: Params
    weights: PyTree
    value: float | None
    members: tuple[int, ...]
    inverse_temperature: float | None = None


def uniform(members) -> Soup:
    """Eq. (1): the mean of all members.

    Args:
      members: the `bilevel.Result` of a population; a list or tuple with params, or a `bilevel.Result` (whose
        params are taken), for each; or params with an axis of members in front of every array (no list or
        plain tuple at the top). Members that diverged, or whose params are not finite, are left out with a
        warning.

    Raises:
      TypeError, ValueError: no members, members of unlike trees, params that are not floating, none finite.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> soup = bilevel.soups.uniform([{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}])
      >>> print(soup.params["w"], soup.weights)
      [2. 1.] [0.5 0.5]
    """
    stack, good = _stacked(members)
    return Soup(_mean(stack, good), _shares(good, len(_first(stack))), None, tuple(good))


def greedy(members, value: Callable) -> Soup:
    """Eq. (2): members that improve the average, tried from the best to the worst.

    The soup is never worse than its best member on the data of ``value``: take others to judge it.

    Args:
      members: as in `uniform`.
      value: ``params -> scalar``, lower is better; called on the host once for each member and once for each
        average, so that it may be any metric. Give it jitted where JAX computes it.

    Raises:
      TypeError, ValueError: as `uniform`; a value that is no scalar, or finite for no member.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> soup = bilevel.soups.greedy([jnp.array(3.0), jnp.array(0.5), jnp.array(-1.0)], abs)
      >>> print(soup.members, soup.params, soup.value)
      (1, 2) -0.25 0.25
    """
    if not callable(value):
        raise TypeError(f"value must be a function params -> scalar, got {value!r:.80}.")
    stack, good = _stacked(members)
    alone = [_measured(value, _mean(stack, [i])) for i in good]
    if not np.isfinite(alone).any():
        raise ValueError("value is finite for no member; look for members that diverged, or at value itself.")
    order = [good[i] for i in np.argsort(np.where(np.isnan(alone), np.inf, alone), kind="stable")]
    chosen, best, params = order[:1], min(v for v in alone if not np.isnan(v)), _mean(stack, order[:1])
    for i in order[1:]:
        tried = _mean(stack, [*chosen, i])
        found = _measured(value, tried)
        if found < best:
            chosen, best, params = [*chosen, i], found, tried
    return Soup(params, _shares(chosen, len(_first(stack))), best, tuple(chosen))


def learned(
    members,
    loss: Callable,
    valid,
    *,
    per_leaf: bool = False,
    inverse_temperature: bool = False,
    steps: int = 200,
    outer=None,
    key=None,
) -> Soup:
    """Eq. (3): the weights that minimise a validation loss, by softmax logits and Adam.

    An outer problem whose inner one is trivial: the map of a `bilevel.FixedPoint` returns the soup, whatever
    it is given, and `bilevel.one_step` differentiates through it exactly. It begins at the uniform soup, and
    returns the best that it meets.

    Args:
      members: as in `uniform`.
      loss: ``(params, hparams, batch) -> scalar``, such as the outer loss of a problem. ``hparams`` is
        ``{"weights": ...}``, with "inverse_temperature" where that is learned too.
      valid: validation data: arrays, or `bilevel.minibatches`.
      per_leaf: weights of their own for every array of params.
      inverse_temperature: learn a positive factor, from 1 on, that the loss multiplies the logits with.
      steps: of the optimiser.
      outer: optax optimiser of the logits; default ``optax.adam(0.05)``, as published but for weight decay.
      key: as in `bilevel.optimize`.

    Raises:
      TypeError, ValueError: as `uniform` and `bilevel.optimize`; a single member, whose weight is 1.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> members = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> loss = lambda params, hparams, batch: jnp.sum((params - batch) ** 2)
      >>> soup = bilevel.soups.learned(members, loss, jnp.array([0.2, 0.8]))
      >>> print(soup.weights.round(2), f"{soup.value:.3f}")
      [0.2 0.8] 0.000
    """
    per_leaf = validation.flag("per_leaf", per_leaf)
    inverse_temperature = validation.flag("inverse_temperature", inverse_temperature)
    stack, good = _stacked(members)
    if len(good) < 2:
        raise ValueError("learned needs at least two members that are finite, got 1: its weight is 1.")
    n, stack = len(_first(stack)), jax.tree.map(lambda x: x[np.array(good)], stack)

    def start(leaf):
        return jnp.full(len(good), 1 / len(good), jnp.promote_types(leaf.dtype, jnp.float32))

    hparams: dict[str, Any] = {"weights": jax.tree.map(start, stack) if per_leaf else start(_first(stack))}
    constraints: dict[str, Any] = {"weights": simplex()}
    if inverse_temperature:
        hparams["inverse_temperature"] = jnp.ones((), jax.tree.leaves(hparams)[0].dtype)
        constraints["inverse_temperature"] = positive()
    problem: Any = FixedPoint(
        lambda params, h, every: _mixed(every, h["weights"], per_leaf), loss, constraints
    )
    method = alternating(one_step(), outer=optax.adam(0.05) if outer is None else outer)
    begin = jax.tree.map(lambda x: x[0], stack)
    result = optimize(problem, begin, hparams, stack, valid, method, steps, key, progress=False)
    best = result.best
    weights = jax.tree.map(lambda w: _placed(np.asarray(w), good, n), best.hparams["weights"])
    learned_factor = float(best.hparams["inverse_temperature"]) if inverse_temperature else None
    return Soup(best.params, weights, best.value, tuple(good), learned_factor)


# --- Members ---------------------------------------------------------------------------------------------


def _stacked(members) -> tuple[Params, list[int]]:
    """Members along a leading axis of every array, and which of them are in order."""
    status = None
    if isinstance(members, Result):
        if members.members is None:
            raise TypeError("members: this result is of a single run; give a list of results, or of params.")
        members, status = members.params, np.asarray(members.status)
    elif isinstance(members, Sequence) and not hasattr(members, "_fields"):  # a NamedTuple is a tree
        if not members:
            raise ValueError("members must hold at least one member, got none.")
        if any(isinstance(m, Result) and m.members is not None for m in members):
            raise TypeError("members: a list holds single runs; of a population take result.member(i).")
        status = np.array([m.status if isinstance(m, Result) else Status.RUNNING for m in members])
        members = _joined([m.params if isinstance(m, Result) else m for m in members])
    stack = validation.floating(members, "members", allow_python=False)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"members must have one leading axis of the same length in every array, got "
            f"{validation.describe(stack)}. Members that are apart go in a list."
        )
    return stack, _in_order(stack, status)


def _joined(members: Sequence) -> Params:
    first, like = members[0], _layout(members[0])
    for i, other in enumerate(members[1:], 1):
        if _layout(other) != like:
            raise ValueError(
                f"members must be trees alike: member 0 is {validation.describe(first)}, member {i} is "
                f"{validation.describe(other)}."
            )
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *members)


def _layout(tree) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _in_order(stack, status: np.ndarray | None) -> list[int]:
    """Members that have not failed; traced ones are taken as they are."""
    n = len(_first(stack))
    good = np.ones(n, bool) if status is None else status != Status.DIVERGED
    for leaf in jax.tree.leaves(stack):
        if readable(leaf):
            good &= np.asarray(jnp.isfinite(leaf).reshape(n, -1).all(axis=1))
    left_out = np.flatnonzero(~good).tolist()
    if len(left_out) == n:
        raise ValueError(f"members: all {n} diverged or have params that are not finite.")
    if left_out:
        warnings.warn(
            f"members {', '.join(map(str, left_out))} of {n} diverged or have params that are not finite: "
            "they are left out.",
            RuntimeWarning,
            stacklevel=4,
        )
    return np.flatnonzero(good).tolist()


def _first(stack) -> jax.Array:
    return jax.tree.leaves(stack)[0]


def _mean(stack, places: Sequence[int]) -> Params:
    """The mean of some members; in float32 at least, in the end in their dtype."""
    chosen = np.array(places)
    return jax.tree.map(lambda x, wide: wide[chosen].mean(axis=0).astype(x.dtype), stack, widened(stack))


def _mixed(stack, weights, per_leaf: bool) -> Params:
    """Eq. (3)."""

    def mix(leaf, own):
        return jnp.tensordot(own.astype(jnp.promote_types(leaf.dtype, own.dtype)), leaf, 1).astype(leaf.dtype)

    return jax.tree.map(mix, stack, weights) if per_leaf else jax.tree.map(lambda x: mix(x, weights), stack)


def _shares(places: Sequence[int], n: int) -> np.ndarray:
    return _placed(np.full(len(places), 1 / len(places)), places, n)


def _placed(weights: np.ndarray, places: Sequence[int], n: int) -> np.ndarray:
    out = np.zeros(n, weights.dtype)
    out[np.array(places)] = weights
    return out


def _measured(value: Callable, params) -> float:
    found = np.asarray(value(params))
    real = jnp.issubdtype(found.dtype, jnp.floating) or found.dtype.kind in "iub"
    if found.shape != () or not real:
        raise TypeError(f"value must return a real scalar, got {validation.describe(found)}.")
    return float(found)
