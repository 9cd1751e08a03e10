"""Noise whose strength is a hyperparameter: a traced number, or one for each example.

flax's dropout wants a Python number as its rate. Here rates are arrays, and there are two kinds of them.
Between a Bernoulli mask and its rate there is no pathwise derivative: a hypergradient through it is wrong,
and is stopped here; methods that learn a response (`bilevel.stn`, `bilevel.delta_stn`) need none. Gaussian
noise of the same mean and variance has one, and methods of every family may tune it.

References:
  Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to prevent neural
  networks from overfitting", JMLR 15, 2014, section 10 for the Gaussian kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.trees import readable

_KINDS = ("bernoulli", "gaussian")


def dropout(x, rate, key, kind: str = "bernoulli", broadcast_dims: Sequence[int] = ()) -> jax.Array:
    """Entries dropped, or blurred, at a rate that may be traced.

    Of a kernel it is DropConnect. Both kinds keep the mean of each entry and multiply its second moment by
    ``1 / (1 - rate)``.

    Args:
      x: activations with examples along the leading axis, or a kernel; floating.
      rate: in [0, 1), a scalar or one number for each example, shape (examples,).
      key: PRNG key.
      kind: "bernoulli": entries are zero with probability ``rate``; nothing is differentiated by it.
        "gaussian": entries are multiplied by normal numbers of mean 1 and variance ``rate / (1 - rate)``; a
        pathwise derivative by the rate is right where the rate is above 0, at which it is infinite.
      broadcast_dims: axes along which all entries have the same noise, such as (1, 2) to drop whole channels.

    Raises:
      TypeError: x is not floating; ValueError: an unknown kind, rates that are not one for each example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel.nn import dropout
      >>> x = dropout(jnp.ones((2, 10_000)), jnp.array([0.0, 0.5]), jax.random.key(0))
      >>> print((x == 0).mean(1).round(1), x.mean(1).round(1))
      [0.  0.5] [1. 1.]
    """
    if kind not in _KINDS:
        raise ValueError(f'kind must be "bernoulli" or "gaussian", got {kind!r}.')
    x = jnp.asarray(x)
    if readable(rate) and not np.all((np.asarray(rate) >= 0) & (np.asarray(rate) < 1)):
        raise ValueError(f"rate must be in [0, 1), got {np.asarray(rate)}.")
    rate = strength_of("rate", rate, x)
    shape = tuple(1 if i in broadcast_dims else size for i, size in enumerate(x.shape))
    if kind == "gaussian":
        return x * (1 + jnp.sqrt(rate / (1 - rate)) * jax.random.normal(key, shape, x.dtype))
    kept = 1 - jax.lax.stop_gradient(rate.astype(jnp.promote_types(x.dtype, jnp.float32)))
    # Drawn and compared in float32 at least: steps of bfloat16 are as large as small rates.
    mask = jax.random.uniform(key, shape, kept.dtype) < kept
    return x * (mask / kept).astype(x.dtype)


def gaussian_noise(x, strength, key) -> jax.Array:
    """Normal noise added to every entry; it has a pathwise derivative by its strength.

    Args:
      x: floating, examples along the leading axis.
      strength: standard deviation, a scalar or one for each example.
      key: PRNG key.

    Raises:
      TypeError, ValueError: as `dropout`.
    """
    x = jnp.asarray(x)
    return x + strength_of("strength", strength, x) * jax.random.normal(key, x.shape, x.dtype)


def strength_of(name: str, strength, x) -> jax.Array:
    """A strength that broadcasts against x, in its dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got dtype {x.dtype}.")
    strength = jnp.asarray(strength).astype(x.dtype)
    if strength.ndim == 0:
        return strength.reshape((1,) * x.ndim)
    if x.ndim == 0 or strength.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must be a scalar or one number for each example, shape {x.shape[:1]}, got shape "
            f"{strength.shape}."
        )
    return strength.reshape(-1, *[1] * (x.ndim - 1))
