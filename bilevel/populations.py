"""Many runs in one program: seeds, starting points, weights of several objectives.

A population is a method's step under `jax.vmap`: every array of the state has an axis of members in front. A
member that has ended is frozen. Successive halving (Jamieson and Talwalkar, 2016, "Non-stochastic best arm
identification and hyperparameter optimization", arXiv:1502.07943) drops the worse half every so often and
goes on in a smaller program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bilevel import validation
from bilevel.problem import HParams, Params

# Keeps the key that makes a member's start apart from those of its run.
_SAMPLE = np.uint32(2**32 - 3)


@dataclasses.dataclass(frozen=True)
class Population:
    """See `population`."""

    n: int
    sample: Callable | None = None
    halve_every: int | None = None

    def keys(self, key) -> jax.Array:
        """The keys of the members, shape (n,)."""
        return _keys(key, self.n)

    def start(self, key, params, hparams) -> tuple[Params, HParams]:
        """Where the members begin, every leaf with a leading axis of length n.

        Raises:
          TypeError, ValueError: a ``sample`` that fails or returns something else; params or hparams given
            twice, or without an axis of members.
        """
        if self.sample is not None:
            if params is not None or hparams is not None:
                raise ValueError(
                    "params and hparams must be None where bilevel.population(n, sample=...) makes them."
                )
            return self._sampled(self.sample, key)
        for name, tree in (("params", params), ("hparams", hparams)):
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                if np.shape(leaf)[:1] != (self.n,):
                    raise ValueError(
                        f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but in a "
                        f"population of {self.n} each array has an axis of members in front. Stack them, or "
                        "make them with bilevel.population(n, sample=fn)."
                    )
        return params, hparams

    def _sampled(self, sample: Callable, key) -> tuple[Params, HParams]:
        def one(key):
            made = sample(jax.random.fold_in(key, _SAMPLE))
            if not isinstance(made, tuple) or len(made) != 2:
                raise TypeError(f"sample must return a pair (params, hparams), got {made!r:.200}.")
            params, hparams = made
            return params, validation.floating(hparams, "hparams")

        return jax.jit(jax.vmap(one))(self.keys(key))


@functools.partial(jax.jit, static_argnames="n")
def _keys(key, n: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(n, dtype=np.uint32))


def population(n: int, sample: Callable | None = None, halve_every: int | None = None) -> Population:
    """Members that run in one program, for ``population=`` of `bilevel.optimize`.

    Member ``i`` is the run with ``key=jax.random.fold_in(key, i)``. All see the same data, each draws its own
    minibatches. One that diverges or converges is frozen and leaves the others as they are.

    Args:
      n: members.
      sample: ``key -> (params, hparams)``, one member's start in natural units, traceable by JAX. Without it
        params and hparams are given with an axis of members in front of every array.
      halve_every: successive halving: every so many outer steps the half with the higher lowest value so far
        is dropped (status ``DROPPED``), down to one member. Each halving compiles a smaller program.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, x: 0.5 * (w - x) ** 2 + 0.5 * h * w**2,
      ...     outer=lambda w, h, x: 0.5 * (w - x) ** 2,
      ...     constraints=bilevel.positive(),
      ... )
      >>> members = bilevel.population(4, sample=lambda key: (jnp.zeros(()), jax.random.uniform(key) + 0.1))
      >>> result = bilevel.optimize(
      ...     problem, None, None, jnp.array(2.0), jnp.array(1.0), population=members, progress=False
      ... )
      >>> result.history["value"].shape, f"{result.member(3).hparams:.2f}"
      ((500, 4), '1.00')
    """
    n = validation.whole_number("n", n, 1)
    if sample is not None and not callable(sample):
        raise TypeError(f"sample must be a function key -> (params, hparams), got {sample!r:.80}.")
    if halve_every is not None:
        halve_every = validation.whole_number("halve_every", halve_every, 1)
    return Population(n, sample, halve_every)


def member_of(tree, i: int) -> Any:
    """One member of a stacked tree; collective where the members are split over several processes."""

    def own(x):
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return x[i]
        if AxisType.Explicit in sharding.mesh.axis_types:
            # JAX wants to be told where an entry of an axis that is split over an Explicit one lies.
            rest = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
            entry = jax.sharding.auto_axes(lambda x: x[i], out_sharding=rest)(x)
        else:
            entry = x[i]
        # One exchange between processes after the other.
        return entry if x.is_fully_addressable else jax.block_until_ready(entry)

    return jax.tree.map(own, tree)


def survivors(values: np.ndarray, failed: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Which members stay after a halving, in their order: the better half, those that failed last.

    Args:
      values: the lowest outer value of each so far; nan counts as the worst.
      failed: those that diverged.
      dropped: those that were dropped before; they do not come back.
    """
    keep = -(-int((~dropped).sum()) // 2)
    order = np.lexsort((np.where(np.isnan(values), np.inf, values), failed, dropped))
    return np.sort(order[:keep])


def padded(keep: np.ndarray, members: int, shards: int) -> np.ndarray:
    """The places of those who stay, and of so many others that ``shards`` divide them; in their order."""
    others = np.setdiff1d(np.arange(members), keep)
    missing = min(-len(keep) % shards, len(others))
    return np.sort(np.concatenate([keep, others[:missing]]))
