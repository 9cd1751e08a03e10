"""Hypergradients by forward mode through the inner loop.

With A_t and B_t as in `bilevel.estimators.unrolled`, the tangents of params move along with params::

    Z_{t+1} = A_t Z_t + B_t,    dF_T/dhparams = d_hparams outer + Z_T^T d_params outer       (1)

The same number as reverse mode, in memory that does not grow with the trajectory: one copy of params and
optimiser state for every hyperparameter. For few hyperparameters and long trajectories.

References:
  Franceschi, Donini, Frasconi and Pontil, "Forward and reverse gradient-based hyperparameter
  optimization", 2017, arXiv:1703.01785.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import influence
from bilevel.estimators.rollout import TrajectoryEstimator, settings


@dataclasses.dataclass(frozen=True)
class Forward(TrajectoryEstimator):
    """See `forward`."""

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Eq. (1) from the point given; the point of the estimate is the end of the trajectory."""
        fn = self.outer_at_end(problem, point, draw, valid, key)
        leaves, treedef = jax.tree.flatten(hparams)
        tuned = influence.tuned_leaves(problem, hparams)
        flat, unravel = ravel_pytree([x for x, moves in zip(leaves, tuned, strict=True) if moves])

        def spread(vector):
            """A tree like hparams; zero where a leaf is fixed."""
            moving = iter(unravel(vector))
            parts = [next(moving) if t else jnp.zeros_like(x) for x, t in zip(leaves, tuned, strict=True)]
            return jax.tree.unflatten(treedef, parts)

        value, tangents, (end, metrics) = jax.vmap(
            lambda t: jax.jvp(fn, (hparams,), (spread(t),), has_aux=True),
            out_axes=(None, 0, None),
        )(jnp.eye(flat.size, dtype=flat.dtype))
        grad = spread(tangents.astype(flat.dtype))
        return self.report(problem, value, grad, end, metrics, draw, valid, passes=flat.size), state


def forward(inner=None, steps: int | None = None, truncate: int | None = None, per_step=None) -> Forward:
    """Forward mode through an inner loop of optax steps.

    Args:
      inner: an optax optimiser or `bilevel.tuned`; default that of the method it is used in.
      steps: length of the trajectory; default the method's inner steps.
      truncate: differentiate through so many last steps only; default all.
      per_step: as in `bilevel.unrolled`.

    Raises:
      TypeError, ValueError: an optimiser that is none, counts out of range.
    """
    inner, steps, truncate, per_step = settings(inner, steps, truncate, per_step)
    return Forward(inner, steps, truncate, False, per_step)
