"""Frozen weights of which some are switched off.

With weights theta that stay, real numbers m that are trained, and a threshold t::

    params = 1[m > t] theta                                                                           (1)

The step has no derivative by m, and that of m itself is taken in its place ("straight through"), so that the
gradient by m is theta times that by params. With a temperature, ``sigmoid((m - t) / temperature)`` stands for
the step: an exact derivative, by t and the temperature too.

Masks that are tuned on few examples are kept near the model they began with by dropping what a teacher (that
model) contradicts. With g the gradient of the loss, h that of a divergence from the teacher, u uniform::

    P = (1 + sign(g) (g + h) / (|g| + |h|)) / 2,    g <- (1 - l + l 1[P > u]) g                       (2)

P is at least 1/2 where signs agree or h is the smaller one, and 1 where they agree.

References:
  Zheng et al., "Regularized mask tuning: uncovering hidden knowledge in pre-trained vision-language models",
  2023, arXiv:2307.15049 (R-AMT).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.maps.values import at, base_at, given_params, like, positive, shown
from bilevel.penalties.strengths import same_tree, scalar
from bilevel.problem import Params
from bilevel.trees import readable


@jax.custom_jvp
def _step(x):
    return (x > 0).astype(x.dtype)


@_step.defjvp
def _straight_through(primals, tangents):
    return _step(primals[0]), tangents[0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Masks:
    """See `masks`. Maps that were made by different calls are not equal."""

    base: Any
    threshold: Any
    temperature: Any

    def init(self, params: Params, value: float = 0.01) -> Params:
        """Numbers m, all of one value, above the threshold of old: every weight is on."""
        return jax.tree.map(lambda x: jnp.full(jnp.shape(x), value, jnp.result_type(x)), params)

    def __call__(self, free: Params, hparams) -> Params:
        """Eq. (1).

        Raises:
          ValueError: free is not like the base; a temperature that can be read and is not positive.
        """
        base = base_at(self.base, hparams)
        threshold = jnp.asarray(at(self.threshold, hparams))
        numbers = like("free", free, base)
        weights, treedef = jax.tree.flatten(base)
        if self.temperature is None:
            threshold = jax.lax.stop_gradient(threshold)  # nothing passes straight through to it
            on = [_step(m - threshold) for m in numbers]
        else:
            temperature = scalar("temperature", at(self.temperature, hparams), positive=True)
            on = [jax.nn.sigmoid((m - threshold) / temperature) for m in numbers]
        masked = [(m * w).astype(w.dtype) for m, w in zip(on, weights, strict=True)]
        return jax.tree.unflatten(treedef, masked)

    def __repr__(self) -> str:
        soft = "" if self.temperature is None else f", temperature={shown(self.temperature)}"
        return f"masks({shown(self.base)}, threshold={shown(self.threshold)}{soft})"


def masks(base, threshold=0.005, temperature=None) -> Masks:
    """Weights that are switched on and off, Eq. (1) of the module.

    Without a temperature the gradient is not that of the loss, which has none: hypergradients of what acts
    on m, such as a penalty, inherit that bias. Nothing is differentiated by the threshold, so that estimators
    refuse to tune it; methods that learn a response (`bilevel.stn`) may.

    Args:
      base: theta, a tree of floating arrays that the map holds, which become constants of the programs it is
        used in; or a function ``hparams -> params``, as of `bilevel.maps.fastfood`.
      threshold: t, a number, or a function of hparams.
      temperature: None for the step; a positive number or a function of hparams for a sigmoid.

    Returns:
      A map for `bilevel.reparametrize`; ``map.init(params)`` are the first m, 0.01.

    Raises:
      TypeError, ValueError: params that are not floating, a threshold that is no number, a temperature that
        is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel import maps
      >>> masked = maps.masks(jnp.array([3.0, -2.0]))
      >>> print(masked(jnp.array([0.01, 0.0]), None), jax.grad(lambda m: masked(m, None).sum())(jnp.zeros(2)))
      [ 3. -0.] [ 3. -2.]
    """
    base = given_params("base", base)
    if not callable(threshold):
        threshold = validation.number("threshold", threshold, minimum=-jnp.inf)
    if temperature is not None:
        temperature = positive("temperature", temperature)
    return Masks(base, threshold, temperature)


def gradient_dropout(grads, teacher_grads, level, key) -> Params:
    """Eq. (2): entries of a gradient dropped at random where that of a teacher contradicts them.

    Args:
      grads: g, any pytree of floating arrays.
      teacher_grads: h, like grads, for instance that of `bilevel.penalties.distillation` from the model that
        training began at.
      level: l in [0, 1], a scalar: how much is dropped.
      key: PRNG key.

    Returns:
      Like grads.

    Raises:
      TypeError, ValueError: trees that are not alike, a level that is no scalar, or can be read and is not
        from 0 to 1, a key that is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel import maps
      >>> print(maps.gradient_dropout(jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0]), 1.0, jax.random.key(0)))
      [ 1. -2.]
    """
    key = validation.random_key("key", key)
    level = scalar("level", level)
    if readable(level) and not 0 <= float(level) <= 1:
        raise ValueError(f"level must be from 0 to 1, got {float(level):g}.")
    teachers = same_tree("teacher_grads", teacher_grads, grads, "grads")
    leaves, treedef = jax.tree.flatten(validation.floating(grads, "grads"))
    keys = jax.random.split(key, len(leaves))

    def dropped(g, h, key):
        size = jnp.abs(g) + jnp.abs(h)
        keep = (1 + jnp.sign(g) * (g + h) / jnp.where(size > 0, size, 1)) / 2
        kept = keep > jax.random.uniform(key, g.shape, g.dtype)
        return ((1 - level + level * kept) * g).astype(g.dtype)

    out = [dropped(*at) for at in zip(leaves, map(jnp.asarray, teachers), keys, strict=True)]
    return jax.tree.unflatten(treedef, out)
