"""Inner problems with kinks: a proximal gradient step as the map of a fixed point, and its symmetric system.

For a smooth loss f and a penalty g that may have kinks, the minimisers of ``f + g`` are the fixed points of::

    u(w) = prox(z),   z = w - s d_w f(w),   prox(z) = argmin_x |x - z|^2 / 2 + s g(x)               (1)

With H the Hessian of f and D the Jacobian of prox at z, the implicit system ``(I - (I - s H) D) v = b`` of
`bilevel.implicit` is not symmetric. But D is, so that D times it is::

    (D - D (I - s H) D) y = D b,    v = b + (I - s H) D y                                           (2)

which is positive semi-definite where f is convex: conjugate gradients solve it. Of the lasso D is 1 on the
support and 0 off it, and (2) the system ``s H y = b`` restricted to the support.

References:
  Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort and Salmon, "Implicit differentiation for fast
  hyperparameter selection in non-smooth convex learning", 2022, arXiv:2105.01637.
  Parikh and Boyd, "Proximal algorithms", 2014, Foundations and Trends in Optimization 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel import prox as maps
from bilevel import validation
from bilevel.problem import AnyProblem, FixedPoint, Proximal, callable_of
from bilevel.trees import readable
from bilevel.vectors import axpy


def proximal_gradient(loss: Callable, prox: Callable, step_size: float) -> Proximal:
    """A proximal gradient step, Eq. (1), as the ``update`` of a `bilevel.FixedPoint`.

    `bilevel.implicit` then takes solvers for symmetric systems, `bilevel.cg` by default, and solves for the
    support alone. `bilevel.picard` with ``anderson=10`` finds the solution in several times fewer steps than
    the plain map. The hypergradient is that of the solution where its support does not change; where it does,
    F has a kink.

    Args:
      loss: ``(params, hparams, batch) -> scalar``, the smooth part.
      prox: ``(params, hparams, step_size) -> params``, the proximal map of ``step_size`` times the penalty,
        see `bilevel.prox`.
      step_size: at most ``1 / L``, where L is the largest eigenvalue of H, over all batches; from ``2 / L``
        on the map need not contract.

    Raises:
      TypeError, ValueError: something that is no function or takes other arguments, such as `bilevel.prox.l1`
        itself; a step size that is not positive.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> def squares(w, hparams, target):
      ...     return 0.5 * jnp.sum((w - target) ** 2)
      >>> def soft(w, hparams, step_size):
      ...     return bilevel.prox.l1(w, step_size * hparams["l1"])
      >>> lasso = bilevel.FixedPoint(bilevel.proximal_gradient(squares, soft, 0.5), squares)
      >>> solve = bilevel.argmin(lasso)
      >>> print(solve({"l1": 1.0}, jnp.array([3.0, 0.5]), init=jnp.zeros(2)).round(3))
      [2. 0.]
    """
    callable_of("loss", loss, "(params, hparams, batch) -> scalar")
    callable_of("prox", prox, "(params, hparams, step_size) -> params")
    if prox in (maps.l1, maps.elastic_net, maps.group_l2):
        raise TypeError(
            "prox must be a function (params, hparams, step_size) -> params, got "
            f"bilevel.prox.{prox.__name__}, which takes one array and strengths: call it in a function of "
            'yours, for instance lambda w, hparams, step_size: bilevel.prox.l1(w, step_size * hparams["l1"]).'
        )
    validation.takes("loss", loss, ("params", "hparams", "batch"))
    validation.takes("prox", prox, ("params", "hparams", "step_size"))
    if isinstance(step_size, (np.ndarray, jax.Array)) and step_size.ndim == 0 and readable(step_size):
        step_size = step_size.item()
    return Proximal(loss, prox, validation.number("step_size", step_size, positive=True))


def is_proximal(problem: AnyProblem) -> bool:
    """Whether Eq. (2) holds of a problem."""
    return isinstance(problem, FixedPoint) and problem.proximal


def restricted_system(update: Any, params, hparams, batch, b):
    """Eq. (2): the product of its matrix, its right-hand side, and ``y -> v``."""
    z, forward = jax.linearize(lambda w: update.forward(w, hparams, batch), params)  # I - s H
    _, shrink = jax.linearize(lambda z: update.prox(z, hparams, update.step_size), z)  # D

    def matvec(y, j=None):
        del j  # there is one batch
        inside = shrink(y)
        return axpy(-1.0, shrink(forward(inside)), inside)

    return matvec, shrink(b), lambda y: axpy(1.0, forward(shrink(y)), b)
