"""Proximal maps of penalties with kinks: ``argmin_x |x - z|^2 / 2 + penalty(x)``, for one array.

Strengths are those of the penalty times the step size, and broadcast: one for all entries, or one for each.
  Where an
entry or a group is shrunk to zero the derivative by it and by its strength is zero.
"""

from __future__ import annotations

import jax.numpy as jnp


def l1(z, strength):
    """Of ``sum strength_i |x_i|``: soft thresholding."""
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - strength, 0)


def elastic_net(z, l1_strength, l2_strength):
    """Of ``sum l1_i |x_i| + l2_i x_i^2 / 2``."""
    return l1(z, l1_strength) / (1 + l2_strength)


def group_l2(z, strength, axis=-1):
    """Of ``sum_g strength_g |x_g|``: a group is what lies along ``axis``, and vanishes as a whole.

    Args:
      z: an array.
      strength: a scalar, or of the shape that is left of ``z`` without ``axis``.
      axis: one or several.
    """
    square = jnp.sum(z**2, axis=axis, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    strength = jnp.asarray(strength)
    if strength.ndim:
        strength = jnp.expand_dims(strength, axis)
    return jnp.where((square > 0) & (length > strength), 1 - strength / length, 0) * z
