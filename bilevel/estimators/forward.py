"""Hypergradients by forward mode through the inner loop.

With A_t and B_t as in `bilevel.estimators.unrolled`, the tangents of params move along with params::

    Z_{t+1} = A_t Z_t + B_t,    dF_T/dhparams = d_hparams outer + Z_T^T d_params outer       (1)

The same number as reverse mode, in memory that does not grow with the trajectory: one copy of params and
optimiser state for every hyperparameter. For few hyperparameters and long trajectories. A schedule of n
windows is n of them however long it is (`bilevel.schedules.windows`; forward-mode differentiation with
sharing, FDS): its gradient by a window is the sum of those by the steps in it. Columns of Z that are still
zero are not computed, by quarters of the trajectory.

Once the window of a column is over it moves as a small change of params does, so that the growth of such
columns is measured (`bilevel.Estimate`); without windows there is none.

References:
  Franceschi, Donini, Frasconi and Pontil, "Forward and reverse gradient-based hyperparameter
  optimization", 2017, arXiv:1703.01785.
  Micaelli and Storkey, "Gradient-based hyperparameter optimization over long horizons", 2021,
  arXiv:2007.07869.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import influence
from bilevel.estimators.rollout import (
    TrajectoryEstimator,
    begun,
    is_setting,
    settings,
    shortened,
    stepped,
)
from bilevel.schedules import Knots
from bilevel.trees import joined, split_floating, spread
from bilevel.vectors import norm

# Parts of the trajectory, each with the columns of its own.
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Forward(TrajectoryEstimator):
    """See `forward`."""

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Eq. (1) from the point given; the point of the estimate is the end of the trajectory."""
        tuned = influence.tuned_leaves(problem, hparams)
        starts, ends = self._active(hparams, tuned)
        order = np.argsort(starts, kind="stable")
        tangent, flatten = _tangents(hparams, tuned, order)

        def first(hparams):
            return split_floating(begun(self, problem, point, hparams, draw, key))

        def along(fn, z, dz, i):
            return jax.jvp(fn, (z, hparams), (dz, tangent(i)), has_aux=True)

        columns = jnp.arange(len(order))
        moving, dz, rest = jax.vmap(
            lambda i: jax.jvp(first, (hparams,), (tangent(i),), has_aux=True), out_axes=(None, 0, None)
        )(columns)

        def step(carry, j):
            moving, rest, dz, before = carry

            def moved(moving, hparams):
                return split_floating(stepped(self, problem, joined(moving, rest), hparams, draw, j))

            own = columns[: len(before)]
            moving, dz, rest = jax.vmap(lambda d, i: along(moved, moving, d, i), out_axes=(None, 0, None))(
                dz, own
            )
            sizes = jax.vmap(lambda d: norm(joined(d, rest).params))(dz)
            if self.clip is not None:
                dz = jax.vmap(functools.partial(shortened, limit=self.clip))(dz, sizes)
            over = jnp.asarray(ends[order][: len(before)]) == j + 1
            return (moving, rest, dz, jnp.where(over, sizes, before)), sizes

        total, kept = self.lengths
        none = jax.tree.map(lambda x: x[:0], dz)
        carry = moving, rest, none, jax.vmap(norm)(none)
        parts, products = min(_PARTS, kept) if starts.any() else 1, 0
        for part in np.array_split(np.arange(total - kept, total), parts):
            m = int(np.searchsorted(starts[order], part[-1], side="right"))
            products += m * len(part)
            moving, rest, own, before = carry
            new = jax.tree.map(lambda d: d[len(before) : m], dz)  # noqa: B023
            own = jax.tree.map(lambda x, d: jnp.concatenate([x, d]), own, new)
            before = jnp.concatenate([before, jnp.full(m - len(before), jnp.inf, before.dtype)])
            carry, sizes = jax.lax.scan(step, (moving, rest, own, before), jnp.asarray(part))
        moving, rest, dz, before = carry
        outer = self.outer_at(problem, valid)

        def at_end(moving, hparams):
            return outer(joined(moving, rest), hparams)

        value, slopes, metrics = jax.vmap(lambda d, i: along(at_end, moving, d, i), out_axes=(None, 0, None))(
            dz, columns
        )
        end = joined(moving, rest)
        growth = None
        if self.columns:
            growth = jnp.log(jnp.maximum(jnp.max(sizes[-1] / before, where=before > 0, initial=1), 1))
        grad = flatten(slopes)
        return self.report(problem, value, grad, end, metrics, draw, valid, products, growth), state

    @property
    def columns(self) -> tuple[str, ...]:
        """What a history has of it: the growth of the tangents of windows, and of entries of a schedule."""
        stepwise = self.per_step is not None and any(
            x is True or (isinstance(x, Knots) and x.windows and len(x.steps) > 1)
            for x in self.per_step.leaves
        )
        return ("growth",) if stepwise and self.lengths[1] > 1 else ()

    def _active(self, hparams, tuned) -> tuple[np.ndarray, np.ndarray]:
        """For each column the first step that it acts at, and the step after the last."""
        total, _ = self.lengths
        given = self.per_step and self.per_step.tree()
        stepwise = spread(given, hparams, False, is_setting, "per_step", "hparams")
        starts, ends = [np.zeros(0, int)], [np.zeros(0, int)]
        for leaf, setting, moves in zip(jax.tree.leaves(hparams), stepwise, tuned, strict=True):
            if not moves:
                continue
            begin, end = np.zeros(jnp.shape(leaf), int), np.full(jnp.shape(leaf), total)
            if setting is True or (isinstance(setting, Knots) and setting.windows):
                first = np.asarray(setting.steps if isinstance(setting, Knots) else np.arange(total))
                shape = -1, *[1] * (begin.ndim - 1)
                begin = begin + np.append(0, first[1:]).reshape(shape)
                end = np.minimum(end, np.append(first[1:], total).reshape(shape))
            starts.append(begin.ravel())
            ends.append(end.ravel())
        return np.concatenate(starts), np.concatenate(ends)


def _tangents(hparams, tuned, order):
    """Two functions: the tangent of hparams that is column ``i``; and the tree of derivatives by columns.

    Both are zero where a leaf is fixed.
    """
    leaves, treedef = jax.tree.flatten(hparams)
    flat, unravel = ravel_pytree([x for x, moves in zip(leaves, tuned, strict=True) if moves])
    places = jnp.asarray(order)

    def tree(vector):
        moving = iter(unravel(vector))
        parts = [next(moving) if t else jnp.zeros_like(x) for x, t in zip(leaves, tuned, strict=True)]
        return jax.tree.unflatten(treedef, parts)

    def tangent(i):
        return tree(jnp.zeros_like(flat).at[places[i]].set(1))

    def derivative(slopes):
        return tree(jnp.zeros_like(flat).at[places].set(slopes.astype(flat.dtype)))

    return tangent, derivative


def forward(
    inner=None,
    steps: int | None = None,
    truncate: int | None = None,
    per_step=None,
    clip: float | None = None,
) -> Forward:
    """Forward mode through an inner loop of optax steps.

    Args:
      inner: an optax optimiser or `bilevel.tuned`; default that of the method it is used in.
      steps: length of the trajectory; default the method's inner steps.
      truncate: differentiate through so many last steps only; default all.
      per_step: as in `bilevel.unrolled`.
      clip: shorten the derivative of params by a hyperparameter, a column of Z_t in Eq. (1), to this length,
        and that of the optimiser's state along with it; None: never. A bias without bound.

    Raises:
      TypeError, ValueError: an optimiser that is none, counts out of range.
    """
    inner, steps, truncate, per_step, clip = settings(inner, steps, truncate, per_step, clip)
    return Forward(inner, steps, truncate, False, per_step, clip)
