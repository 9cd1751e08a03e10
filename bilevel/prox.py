"""Proximal maps of penalties with kinks: ``argmin_x |x - z|^2 / 2 + penalty(x)``, for one array.

Strengths are those of the penalty times the step size; ``l1`` and ``elastic_net`` take one for all entries or
one for each. A strength of zero leaves everything as it is. Where an entry or a group is shrunk to zero, the
derivative by it and by its strength is zero, at the kink too. A negative strength, for which there is no such
map, raises ValueError; in a program that is being traced it makes nan.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bilevel.trees import readable


def l1(z, strength):
    """Of ``sum strength_i |x_i|``: soft thresholding."""
    strength = _not_negative("strength", strength)
    kept = ~(jnp.abs(z) <= strength) | ~(strength > 0)
    return jnp.where(kept, z - jnp.sign(z) * strength, 0)


def elastic_net(z, l1_strength, l2_strength):
    """Of ``sum l1_i |x_i| + l2_i x_i^2 / 2``."""
    return l1(z, l1_strength) / (1 + _not_negative("l2_strength", l2_strength))


def group_l2(z, strength, axis=-1):
    """Of ``sum_g strength_g |x_g|``: a group is what lies along ``axis``, and vanishes as a whole.

    Args:
      z: an array.
      strength: a scalar, or of the shape that is left of ``z`` without ``axis``.
      axis: one or several.

    Raises:
      ValueError: a strength of another shape, or negative.
    """
    square = jnp.sum(z**2, axis=axis, keepdims=True)
    strength = _not_negative("strength", strength)
    if strength.ndim:
        groups = jnp.squeeze(square, axis).shape
        if strength.shape != groups:
            raise ValueError(
                f"strength must be a scalar or have the shape {groups} of the groups of z{jnp.shape(z)} "
                f"along axis {axis}, got shape {strength.shape}."
            )
        strength = jnp.expand_dims(strength, axis)
    # The derivative of a root is not finite at zero, not even where it is left out.
    length = jnp.sqrt(jnp.where(square == 0, 1, square))
    kept = ~((square == 0) | (length <= strength)) | ~(strength > 0)
    return jnp.where(kept, 1 - strength / length, 0) * z


def _not_negative(name: str, strength):
    """A strength as an array; nan where it is negative and cannot be read."""
    if readable(strength) and np.any(np.asarray(strength) < 0):
        raise ValueError(f"{name} must not be negative, got {np.min(strength):g}.")
    strength = jnp.asarray(strength)
    return jnp.where(strength >= 0, strength, jnp.nan)
