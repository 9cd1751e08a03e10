"""The path that a hyperparameter took, as a schedule that another training run can follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A hyperparameter as a function of the training step, linear between the steps recorded.

    It is traceable, and an optax schedule where it is a scalar. Before the first step and after the last it
    keeps the value there.

    Args:
      steps: training steps, increasing; shape (rows,).
      values: shape (rows, ...), natural units.

    Example:
      >>> import bilevel, numpy as np
      >>> schedule = bilevel.Schedule(np.array([0, 10]), np.array([0.0, 1.0], np.float32))
      >>> print(f"{schedule(4):.1f}, {schedule(20):.1f}")
      0.4, 1.0
    """

    steps: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        steps, values = np.asarray(self.steps), np.asarray(self.values)
        if steps.ndim != 1 or not steps.size or np.any(np.diff(steps) <= 0):
            raise ValueError(f"steps must be a vector of increasing numbers, got {steps!r:.80}.")
        if values.shape[:1] != steps.shape:
            raise ValueError(f"values must have a row for each of {steps.size} steps, got {values.shape}.")

    def __call__(self, step) -> jax.Array:
        """The value at a training step, which may be traced."""
        values = jnp.asarray(self.values)
        dtype = jnp.promote_types(values.dtype, jnp.float32)  # steps count far
        steps = jnp.asarray(self.steps, dtype)
        at = jnp.clip(jnp.asarray(step).astype(dtype), steps[0], steps[-1])
        i = jnp.clip(jnp.searchsorted(steps, at, side="right") - 1, 0, max(len(self.steps) - 2, 0))
        j = jnp.minimum(i + 1, len(self.steps) - 1)
        width = jnp.where(steps[j] > steps[i], steps[j] - steps[i], 1)
        share = (at - steps[i]) / width
        return (values[i] + share * (values[j] - values[i])).astype(values.dtype)


def schedule_of(trajectory, name: Any, inner_steps: float) -> Schedule:
    """See `bilevel.Result.schedule`.

    Raises:
      KeyError: no such hyperparameter, or several and no name; ValueError: one of which only quantiles were
        kept.
    """
    paths = jax.tree_util.tree_flatten_with_path(trajectory.hparams)[0]
    names = [_name(path) for path, _ in paths]
    wanted = ".".join(map(str, name)) if isinstance(name, tuple) else name
    if name is None and len(paths) == 1:
        wanted = names[0]
    if wanted not in names:
        asked = "needs a name" if name is None else f"knows no {name!r}"
        raise KeyError(f"schedule {asked}; hparams have {', '.join(names)}")
    i = names.index(wanted)
    if trajectory.quantiles[i]:
        raise ValueError(
            f"schedule: of {wanted}, which has very many entries, only quantiles were kept over time. Record "
            "it by a callback."
        )
    inner_steps = validation.number("inner_steps", inner_steps, positive=True)
    return Schedule(inner_steps * np.asarray(trajectory.steps), np.asarray(paths[i][1]))


def _name(path) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)
