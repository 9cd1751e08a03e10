"""Hypergradients by looking back on updates, the Jacobians of all of them taken at the last one.

Let ``z' = step(z, hparams)`` be the last inner step, of params and optimiser state together, A and B its
derivatives by z and hparams, and ``v = d_z' outer`` after it (zero for the optimiser's state). With the steps
before it taken to be copies of it::

    dF/dhparams = d_hparams outer + B^T p,    p = sum_{j < terms} (A^T)^j v              (1)

This is Eq. (1) of `bilevel.estimators.unrolled` with A_t = A and B_t = B. One term is `bilevel.one_step`.
At an inner solution it is the Neumann series of implicit differentiation with so many terms. On a quadratic
loss with ``optax.sgd`` A is the same everywhere, so that only B is taken at the wrong point.

It sees hyperparameters of the optimiser and remembers nothing of the trajectory. The bias has two parts:
what is older than ``terms`` steps is left out, and the derivatives of the others are those of the last. The
first falls with ``terms``; the second grows with it while params move fast, and not at all once they rest.

Cost: one inner gradient, and ``terms`` products with the Jacobian of a step, each about two. Memory: that of
differentiating one step, whatever ``terms``.

References:
  Clarke, Oldewage and Hernandez-Lobato, "Scalable one-pass optimisation of high-dimensional weight-update
  hyperparameters by implicit differentiation", 2022, arXiv:2110.10461.
"""

from __future__ import annotations

import dataclasses

import jax

from bilevel import validation
from bilevel.estimators.rollout import settings
from bilevel.estimators.unrolled import OneStep
from bilevel.inner_solvers import inner_step, started
from bilevel.linear_solvers import axpy
from bilevel.problem import outer_value
from bilevel.trees import joined, split_floating


@dataclasses.dataclass(frozen=True)
class LookBack(OneStep):
    """See `look_back`."""

    terms: int

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Eq. (1) at the last of the steps from the point given, where the point of the estimate is."""
        last = self.lengths[0] - 1
        point = started(problem, self.inner, point, hparams, draw(0), key)
        point = jax.lax.fori_loop(
            0, last, lambda j, p: inner_step(problem, self.inner, p, hparams, draw(j)), point
        )
        z, rest = split_floating(point)

        def step(z, hparams):
            return split_floating(inner_step(problem, self.inner, joined(z, rest), hparams, draw(last)))

        z, pull, rest = jax.vjp(step, z, hparams, has_aux=True)
        end = joined(z, rest)

        def outer(z, hparams):
            at = joined(z, rest)
            return outer_value(problem, at.params, hparams, valid, at.model_state)

        (value, metrics), (v, direct) = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(z, hparams)

        def back(_, carry):
            q, p = carry
            q = pull(q)[0]
            return q, axpy(1.0, q, p)

        _, p = jax.lax.fori_loop(1, self.terms, back, (v, v))
        grad = axpy(1.0, pull(p)[1], direct)
        return self.report(problem, value, grad, end, metrics, draw, valid, products=self.terms), state


def look_back(terms: int, inner=None) -> LookBack:
    """Through the last ``terms`` inner steps, with the derivatives of the last one for all of them.

    For hyperparameters of the loss and of the optimiser (`bilevel.tuned`) in one pass of training. It sees
    further than `bilevel.one_step`, in the memory of one step, where ``unrolled(truncate=terms)`` is exact.

    Args:
      terms: how far it looks back, at least 1; 5 in the paper. More is not always better: derivatives of
        old steps are taken at the last.
      inner: as in `bilevel.one_step`.

    Raises:
      TypeError, ValueError: a number of terms or an optimiser that is none.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> at = jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0)  # w* = 1
      >>> for terms in (1, 2, 20):
      ...     fn = bilevel.hypergradient(problem, bilevel.look_back(terms, optax.sgd(0.2)))
      ...     print(f"{terms}: {fn(*at).grad:.3f}")  # 1 - (1 - 0.2 * 2)^terms
      1: 0.400
      2: 0.640
      20: 1.000
    """
    terms = validation.whole_number("terms", terms, 1)
    inner, steps, truncate, per_step, clip = settings(inner, None if inner is None else 1, 1, None)
    return LookBack(inner, steps, truncate, True, per_step, clip, terms)
