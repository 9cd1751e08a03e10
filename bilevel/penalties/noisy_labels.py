"""Early-learning regularisation, for labels of which many are wrong.

A network learns first what is true of most labels, then the wrong ones by heart. It is held to what it
predicted early. With p the softmax of the logits, clipped to [1e-4, 1 - 1e-4], and targets t::

    penalty = s mean_i log(1 - <p_i, t_i>)                                                          (1)
    t_i <- m t_i + (1 - m) p_i / |p_i|_1,    t_i = 0 at first                                       (2)

with the new t_i in (1), a constant to the gradient of training. It is not one to the hypergradient: m acts
through it alone, and s on it through all steps before. So t_i is `held` constant at the innermost level of
differentiation only, where `jax.lax.stop_gradient`, as in published code, would do it at all of them.

References:
  Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-learning regularization prevents memorization of
  noisy labels", 2020, arXiv:2007.00151.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.penalties.strengths import scalar, strength_of


@jax.custom_jvp
def held(x):
    """``x``, one array, a constant to the innermost derivative and to no other.

    Example:
      >>> import jax
      >>> from bilevel.penalties import held
      >>> slope = jax.grad(lambda w, t: w * held(w * t))  # w^2 t with the second w held: w t
      >>> print(slope(3.0, 2.0), jax.grad(slope, 1)(3.0, 2.0))
      6.0 3.0
    """
    return x


@held.defjvp
def _held_rule(primals, tangents):
    del tangents
    return primals[0], jnp.zeros_like(primals[0])


def early_learning(logits, strength, targets, momentum) -> tuple[jax.Array, jax.Array]:
    """Eq. (1), and the targets (2) for the next time that these examples come.

    Targets are model state: a problem has ``has_state=True``, and an estimator differentiates through the
    trajectory (`bilevel.unrolled`, `bilevel.forward`). Implicit ones are approximate: they take the old
    targets alone for constants, and as the new ones are `held`, the system that they solve is not symmetric.
    With minibatches, and ``"i": jnp.arange(n)`` among the arrays::

        def train_loss(params, hparams, batch, targets):
            logits, i = predict(params, batch["x"]), batch["i"]
            penalty, new = early_learning(logits, hparams["s"], targets[i], hparams["m"])
            return cross_entropy(logits, batch["y"]) + penalty, targets.at[i].set(new)

    Args:
      logits: shape (examples, classes).
      strength: s, a scalar; 1 to 7 in the paper.
      targets: of these examples, like logits; zeros at first.
      momentum: m, a scalar in [0, 1), or one for each example; 0.7 to 0.9 in the paper.

    Returns:
      A scalar in the dtype of logits, and new targets in that of targets. Both are computed in float32 at
      least: 1 - 1e-4 is 1 in less.

    Raises:
      TypeError, ValueError: another shape, arrays that are not floating.
    """
    logits = jnp.asarray(validation.floating(logits, "logits"))
    targets = jnp.asarray(validation.floating(targets, "targets"))
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must have one shape (examples, classes), got "
            f"{logits.shape} and {targets.shape}; take the targets of the batch, targets[batch['i']]."
        )
    strength = scalar("strength", strength)
    momentum = strength_of("momentum", momentum, logits, "logits")
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    p = jnp.clip(jax.nn.softmax(logits.astype(wide)), 1e-4, 1 - 1e-4)
    new = momentum * targets.astype(wide) + (1 - momentum) * p / jnp.sum(p, -1, keepdims=True)
    agreement = jnp.sum(p * held(new), -1)
    penalty = strength * jnp.mean(jnp.log(1 - agreement))
    return penalty.astype(logits.dtype), new.astype(targets.dtype)
