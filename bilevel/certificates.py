"""How far an implicit hypergradient is off, bounded by what was measured.

Let ``w`` be where an estimate z is taken and ``w*`` the inner solution; H the inner Hessian, J the cross
derivative ``d_hparams d_params inner`` (params by hparams) and b = d_params outer, all at ``w``. With the
constants of `bilevel.Smoothness` (mu; L_g of outer, L_J of J, L_H of the inverse Hessian, M of d_hparams
outer) and the two measured residuals::

    eps   = |d_params inner(w)| / mu   >= |w - w*|
    delta = |H q - b|                  of the linear system
    |z - dF/dhparams| <= omega                                                                     (1)
    omega = (M + L_g |J| / mu + L_H |b| |J| + L_J |b| / mu) eps + |J| / mu delta + (L_J L_g / mu) eps^2
    |outer(w) - F|    <= |b| eps + L_g / 2 eps^2                                                   (2)

(1) is Theorem 2.1 of Salehi et al. with the term M of problems whose outer loss sees the hyperparameters
itself, which the theorem leaves out; (2) is the sandwich of its line search.

References:
  Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization
  with application to hyperparameter learning", 2025, arXiv:2308.10098.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.problem import CERTIFIED, ESTIMATED, Smoothness
from bilevel.vectors import norm, scaled

# Up to this many hyperparameters the norm of J is exact.
EXACT_HPARAMS = 32
# Power iteration comes from below: its last value is taken so much larger.
_ITERATIONS, _SAFETY = 30, 1.1


class Constants(NamedTuple):
    """`bilevel.Smoothness` at given hyperparameters, and whether all are valid."""

    strong_convexity: Any
    inner: Any
    outer: Any
    cross: Any
    inverse_hessian: Any
    direct: Any
    valid: Any


class Certificate(NamedTuple):
    """Eq. (1) and (2), and the work that they took beyond the estimate's."""

    error: jax.Array
    value_error: jax.Array
    distance: jax.Array
    gradients: int
    products: int


def constants(smoothness: Smoothness, hparams, dtype) -> Constants:
    """The constants at hparams, natural units."""
    known = {}
    for name in Constants._fields[:-1]:
        setting = getattr(smoothness, name)
        known[name] = jnp.asarray(setting(hparams) if callable(setting) else setting or 0.0, dtype)
    valid = known["strong_convexity"] > 0
    for value in known.values():
        valid &= jnp.isfinite(value) & (value >= 0)
    return Constants(**known, valid=valid)


def gap(known: Constants, b_norm, eps):
    """Eq. (2), from the norm of the outer gradient and the distance to the inner solution."""
    return b_norm * eps + 0.5 * known.outer * eps**2


def error_kind(smoothness: Smoothness, hparams) -> str:
    """What the bound is: it is certified where the constants are known and the norm of J is exact."""
    if smoothness.estimated:
        return ESTIMATED
    size = sum(leaf.size for leaf in jax.tree.leaves(hparams))
    return CERTIFIED if size <= EXACT_HPARAMS else ESTIMATED


def certify(smoothness: Smoothness, inner: Callable, params, hparams, b, residual) -> Certificate:
    """Eq. (1) and (2) at params.

    Args:
      smoothness: the constants.
      inner: ``(params, hparams) -> scalar``.
      params: where the estimate was taken.
      hparams: natural units.
      b: ``d_params outer`` there.
      residual: of the linear system, absolute.
    """
    b_norm = norm(b)
    known = constants(smoothness, hparams, b_norm.dtype)
    slope, push = jax.linearize(lambda h: jax.grad(inner)(params, h), hparams)
    j_norm, products = _operator_norm(push, hparams)
    mu = jnp.where(known.valid, known.strong_convexity, 1)
    eps = norm(slope) / mu
    first_order = (
        known.direct
        + known.outer * j_norm / mu
        + known.inverse_hessian * b_norm * j_norm
        + known.cross * b_norm / mu
    )
    omega = first_order * eps + j_norm / mu * residual + known.cross * known.outer / mu * eps**2

    def judged(bound):
        return jnp.where(known.valid & ~jnp.isnan(bound), bound, jnp.inf)

    return Certificate(judged(omega), judged(gap(known, b_norm, eps)), judged(eps), 1, products)


def _operator_norm(push: Callable, hparams) -> tuple[jax.Array, int]:
    """Spectral norm of a linear function of hparams (an upper bound for few of them), and its products."""
    flat, unravel = ravel_pytree(hparams)
    pull = jax.linear_transpose(push, hparams)

    def square(v):
        (back,) = pull(push(unravel(v)))
        return ravel_pytree(back)[0]

    if flat.size <= EXACT_HPARAMS:
        gram = jax.lax.map(square, jnp.eye(flat.size, dtype=flat.dtype))
        largest = jnp.linalg.eigvalsh(0.5 * (gram + gram.T))[-1]
        return jnp.sqrt(jnp.maximum(largest, 0)), 2 * flat.size
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)

    def iterate(_, carry):
        v, _ = carry
        back = square(v)
        size = jnp.linalg.norm(back)
        return scaled(back, 1 / jnp.where(size == 0, 1, size)), size

    _, largest = jax.lax.fori_loop(
        0, _ITERATIONS, iterate, (start / jnp.linalg.norm(start), jnp.zeros((), flat.dtype))
    )
    return _SAFETY * jnp.sqrt(largest), 2 * _ITERATIONS
