"""Distillation: predictions held to those of a teacher, or of the same model before a new task.

References:
  Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, arXiv:1503.02531.
  Li and Hoiem, "Learning without forgetting", 2016, arXiv:1606.09282.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.penalties.strengths import scalar, strength_of


def distillation(logits, strengths, teacher_logits, temperature=1.0) -> jax.Array:
    """``mean_i s_i T^2 KL(softmax(teacher_i / T) | softmax(logits_i / T))``.

    Zero where both agree. The factor T^2 keeps the size of its gradient as T grows, towards that of half the
    squared distance of the logits from their means. Its gradient by logits is that of the cross-entropy, from
    which it differs by the entropy of the teacher. To keep what was learned on old classes, compare the
    logits of these, on data of new ones: ``distillation(logits[:, :old], s, teacher_logits)``.

    Args:
      logits: shape (..., classes); -inf for classes that are masked, where the teacher has -inf too: the
        divergence is infinite otherwise.
      strengths: a scalar, or one for each example, of the shape of leading axes of logits.
      teacher_logits: like logits.
      temperature: T, a positive scalar.

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: another shape, a temperature that can be read and is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> teacher = jnp.array([[2.0, 0.0]])
      >>> print(f"{penalties.distillation(jnp.zeros((1, 2)), 1.0, teacher):.3f}")
      0.328
    """
    logits, teacher_logits = jnp.asarray(logits), jnp.asarray(teacher_logits)
    if logits.ndim < 1 or logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits and teacher_logits must have one shape (..., classes), got {logits.shape} and "
            f"{teacher_logits.shape}; of a model that has more classes than its teacher take "
            "logits[..., :classes]."
        )
    temperature = scalar("temperature", temperature, positive=True)
    student, teacher = (jax.nn.log_softmax(_divided(z, temperature)) for z in (logits, teacher_logits))
    chance = jnp.exp(teacher)
    divergence = jnp.sum(chance * jnp.where(chance > 0, teacher - student, 0), -1)
    weights = strength_of("strengths", strengths, divergence, "logits without classes")
    return jnp.mean(weights * jnp.square(temperature) * divergence)


def _divided(logits, temperature):
    """``logits / temperature``, with derivatives that are finite where logits are -inf."""
    masked = jnp.isneginf(logits)
    return jnp.where(masked, -jnp.inf, jnp.where(masked, 0, logits) / temperature)
