"""Control flow that a population passes by."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def once(condition, fn, at):
    """``fn(at)`` where a scalar condition holds, else ``at``.

    A loop of at most one pass: under vmap, where `jax.lax.cond` runs both branches, it does nothing as long
    as the condition holds for no member.
    """
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), fn(c[1])), (condition, at))[1]
