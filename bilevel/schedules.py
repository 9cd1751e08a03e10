"""Numbers that change while a model trains, as functions of the training step.

Every one here is traceable in the step and in its numbers, so that it is an optax schedule, and
hypergradients pass through it. With t the step, counted from 0, and W of warm-up, in which the value rises
linearly::

    cosine       end + (peak - end) (1 + cos(pi (t - W) / (T - W))) / 2                              (1)
    wsd          peak until T - D, then down to end in D steps: warm-up, stable, decay               (2)
    power_law    min(peak, scale n^exponent), n = batch (t + 1) samples seen                         (3)

(3) is that of the power scheduler, whose fit to language models has an exponent of -0.51; `windows` and
`knots` assume no form. A hyperparameter that is a schedule is declared to a trajectory estimator::

    hparams = {"lr": jnp.full(20, 0.1), "l2": {"peak": jnp.array(1e-3)}}
    per_step = {
        "lr": bilevel.schedules.windows(20, steps=1000),
        "l2": lambda h: bilevel.schedules.cosine(h["peak"], steps=1000),
    }

References:
  Shen et al., "Power scheduler: a batch size and token number agnostic learning rate scheduler", 2024,
  arXiv:2408.13359.
  Hu et al., "MiniCPM: unveiling the potential of small language models with scalable training strategies",
  2024, arXiv:2404.06395 (warm-up, stable, decay).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import archive, validation
from bilevel.trees import readable

_INTERPOLATIONS = "linear", "log", "constant"
_DECAYS = "linear", "exponential", "sqrt"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A number, or an array of them, as a function of the training step, from its values at some steps.

    It is traceable, and an optax schedule where it is a scalar. Before the first step and after the last it
    keeps the value there. A picture and a file of it need values that are not traced.

    Args:
      steps: training steps, increasing; shape (rows,).
      values: shape (rows, ...), natural units.
      interpolation: "linear" between the steps given, "log": linear in the logarithm, or "constant": that of
        the last step given.

    Raises:
      ValueError: steps that do not increase, another number of values, an unknown interpolation.

    Example:
      >>> import bilevel, numpy as np
      >>> schedule = bilevel.Schedule(np.array([0, 10]), np.array([0.0, 1.0], np.float32))
      >>> print(f"{schedule(4):.1f}, {schedule(20):.1f}, {schedule.stretched(4)(4):.1f}")
      0.4, 1.0, 0.1
    """

    steps: np.ndarray
    values: Any
    interpolation: str = "linear"

    def __post_init__(self):
        steps = np.asarray(self.steps)
        if steps.ndim != 1 or not steps.size or not np.all(np.diff(steps) > 0):
            raise ValueError(f"steps must be a vector of increasing numbers, got {steps!r:.80}.")
        if jnp.shape(self.values)[:1] != steps.shape:
            raise ValueError(
                f"values must have a row for each of {steps.size} steps, got shape {jnp.shape(self.values)}."
            )
        validation.one_of("interpolation", self.interpolation, _INTERPOLATIONS)
        if readable(self.values):
            object.__setattr__(self, "values", np.asarray(self.values))

    def __call__(self, step) -> jax.Array:
        """The value at a training step, which may be traced."""
        values = jnp.asarray(self.values)
        dtype = jnp.promote_types(values.dtype, jnp.float32)  # steps count far
        steps = jnp.asarray(self.steps, dtype)
        at = jnp.clip(jnp.asarray(step).astype(dtype), steps[0], steps[-1])
        i = jnp.searchsorted(steps, at, side="right") - 1
        if self.interpolation == "constant":
            return values[i]
        i = jnp.clip(i, 0, max(len(self.steps) - 2, 0))
        j = jnp.minimum(i + 1, len(self.steps) - 1)
        width = jnp.where(steps[j] > steps[i], steps[j] - steps[i], 1)
        share = ((at - steps[i]) / width).astype(values.dtype)
        if self.interpolation == "log":
            return values[i] ** (1 - share) * values[j] ** share
        return values[i] + share * (values[j] - values[i])

    def stretched(self, factor: float) -> Schedule:
        """The same values over so many times the steps."""
        factor = validation.number("factor", factor, positive=True)
        return dataclasses.replace(self, steps=factor * np.asarray(self.steps))

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, for `Schedule.load`.

        Raises:
          OSError: the file cannot be written.
        """
        meta = {"kind": "schedule", "interpolation": self.interpolation}
        archive.write(path, {"steps": np.asarray(self.steps), "values": np.asarray(self.values)}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Schedule:
        """Read one that `save` wrote.

        Raises:
          ValueError: no such file, something else, or damaged.
        """
        trees, meta = archive.read(path, None)
        if meta.get("kind") != "schedule":
            raise ValueError(f"path: {path} holds a {meta.get('kind', 'result')}, not a schedule.")
        return cls(trees["steps"], trees["values"], meta["interpolation"])

    def plot(self):
        """The value over the training steps, a line for each entry; a matplotlib Figure.

        Raises:
          ImportError: matplotlib is missing (``pip install 'bilevel[plots]'``).
        """
        from bilevel.plots import plot_schedule

        return plot_schedule(self)


@dataclasses.dataclass(frozen=True)
class Knots:
    """See `knots` and `windows`."""

    steps: tuple[int, ...]
    interpolation: str

    @property
    def windows(self) -> bool:
        """Each entry holds for steps of its own."""
        return self.interpolation == "constant"

    def __call__(self, values) -> Schedule:
        """The schedule of given values, an array with a row for each knot."""
        if jnp.shape(values)[:1] != (len(self.steps),):
            what = "window" if self.windows else "knot"
            raise ValueError(
                f"a schedule of {len(self.steps)} {what}s needs an array with an entry for each {what}, got "
                f"{validation.describe(values)}."
            )
        return Schedule(np.array(self.steps), values, self.interpolation)


def knots(*steps: int, interpolation: str = "linear") -> Knots:
    """What makes a `Schedule` of an array: its entries are the values at given steps.

    Args:
      steps: training steps, increasing.
      interpolation: as in `Schedule`.

    Raises:
      TypeError, ValueError: steps that are no whole numbers or out of order.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> schedule = bilevel.schedules.knots(0, 100, 1000)(jnp.array([0.0, 1.0, 0.1]))
      >>> print(f"{schedule(50):.2f} {schedule(550):.2f}")
      0.50 0.55
    """
    whole = tuple(validation.whole_number("steps of knots", step, 0) for step in steps)
    if not whole or any(b <= a for a, b in zip(whole, whole[1:], strict=False)):
        raise ValueError(f"knots must be at steps that increase, got {', '.join(map(str, whole)) or 'none'}.")
    return Knots(whole, validation.one_of("interpolation", interpolation, _INTERPOLATIONS))


def windows(n: int, steps: int) -> Knots:
    """What makes a `Schedule` of an array of ``n`` entries: each holds for its share of ``steps``.

    Args:
      n: windows.
      steps: of the training run, a multiple of ``n``.

    Raises:
      TypeError, ValueError: numbers that are not whole, or do not divide.
    """
    n, steps = validation.whole_number("n", n, 1), validation.whole_number("steps", steps, 1)
    if steps % n:
        near = [m for m in range(1, steps + 1) if steps % m == 0]
        below, above = max(m for m in near if m < n or m == 1), min(m for m in near if m > n or m == steps)
        raise ValueError(
            f"windows: {n} of them do not divide {steps} steps; take {below} or {above}, or other steps."
        )
    return Knots(tuple(range(0, steps, steps // n)), "constant")


def sampled(schedule: Callable, steps: int) -> Schedule:
    """Any optax schedule as a `Schedule`, which can be drawn, stretched and saved: its value at every step.

    Args:
      schedule: ``step -> value``.
      steps: of the training run.

    Raises:
      TypeError, ValueError: not a function, or not so many steps.
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the training step, got {schedule!r:.80}.")
    counted = np.arange(validation.whole_number("steps", steps, 1))
    return Schedule(counted, jax.vmap(schedule)(jnp.asarray(counted)))


def cosine(peak, steps: int, *, warmup: int = 0, end=0.0) -> Callable:
    """Eq. (1): down along half a cosine.

    Args:
      peak: highest value, reached at step ``warmup``; a number or a traced scalar.
      steps: T, of the training run; from there on it is ``end``.
      warmup: W, steps.
      end: last value, like ``peak``.

    Returns:
      An optax schedule.

    Raises:
      TypeError, ValueError: a negative value, steps that are not whole or less than those of the warm-up.
    """
    _rates(peak=peak, end=end)
    steps, warmup, _ = _lengths(steps, warmup, 0)

    def schedule(step):
        step = _counted(step, peak)
        share = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        return _warmed(end + (peak - end) * (1 + jnp.cos(jnp.pi * share)) / 2, peak, step, warmup)

    return schedule


def wsd(peak, steps: int, *, decay: int, warmup: int = 0, end=0.0, shape: str = "linear") -> Callable:
    """Eq. (2): warm-up, stable, decay.

    Args:
      peak: the stable value; a number or a traced scalar.
      steps: T, of the training run; from there on it is ``end``.
      decay: D, the last steps, in which it falls.
      warmup: W, steps.
      end: last value, like ``peak``.
      shape: of the decay: "linear", "exponential" (``end`` has to be positive) or "sqrt", that is
        ``1 - sqrt(share)``.

    Returns:
      An optax schedule.

    Raises:
      TypeError, ValueError: a negative value, steps that are not whole, warm-up and decay longer than all.
    """
    _rates(peak=peak, end=end)
    steps, warmup, decay = _lengths(steps, warmup, decay)
    validation.one_of("shape", shape, _DECAYS)
    if shape == "exponential" and readable(end) and float(end) <= 0:
        raise ValueError(f'end must be positive where shape="exponential", got {float(end):g}.')

    def schedule(step):
        step = _counted(step, peak)
        value = _decayed(peak, end, jnp.clip((step - (steps - decay)) / max(decay, 1), 0, 1), shape)
        return _warmed(value, peak, step, warmup)

    return schedule


def power_law(
    peak, scale, exponent, *, batch: float = 1.0, warmup: int = 0, decay: int = 0, steps: int | None = None
) -> Callable:
    """Eq. (3): a power of the samples seen, capped.

    Args:
      peak: the cap; a number or a traced scalar.
      scale: value after one sample, like ``peak``; in the paper batch size times a constant (4 to 4.6).
      exponent: negative, like ``peak``.
      batch: samples, or tokens, of a step.
      warmup: W, steps, to the value that (3) has there.
      decay: last steps, in which it falls linearly to zero.
      steps: of the training run, where there is a decay.

    Returns:
      An optax schedule.

    Raises:
      TypeError, ValueError: a negative rate, a positive exponent, steps that are not whole, a decay without
        steps.
    """
    _rates(peak=peak, scale=scale)
    batch = validation.number("batch", batch, positive=True)
    if readable(exponent) and float(exponent) > 0:
        raise ValueError(f"exponent must not be positive, got {float(exponent):g}.")
    if decay and steps is None:
        raise ValueError("power_law: a decay needs steps=, the length of the run that it ends.")
    if steps is None:
        steps = 1 + validation.whole_number("warmup", warmup, 0)
    end, warmup, decay = _lengths(steps, warmup, decay)

    def power(step):
        return jnp.minimum(peak, scale * (batch * (step + 1)) ** exponent)

    def schedule(step):
        step = _counted(step, peak)
        value = power(jnp.maximum(step, warmup))
        if decay:
            start = power(_counted(end - decay, peak))
            share = jnp.clip((step - (end - decay)) / decay, 0, 1)
            value = jnp.where(share > 0, _decayed(start, 0.0, share, "linear"), value)
        return _warmed(value, power(_counted(warmup, peak)), step, warmup)

    return schedule


def _rates(**given) -> None:
    """Raise ValueError where a value that can be read is negative, or a peak or scale is not positive."""
    for name, value in given.items():
        if jnp.shape(value):
            raise ValueError(f"{name} must be a scalar, got {validation.describe(value)}.")
        if not readable(value):
            continue
        number = validation.number(name, float(value), minimum=0.0)
        if number == 0 and name != "end":
            raise ValueError(f"{name} must be positive, got 0.")


def _lengths(steps, warmup, decay) -> tuple[int, int, int]:
    steps = validation.whole_number("steps", steps, 1)
    warmup, decay = (
        validation.whole_number(name, n, 0) for name, n in (("warmup", warmup), ("decay", decay))
    )
    if warmup + decay > steps:
        raise ValueError(f"warmup = {warmup} and decay = {decay} are longer than all {steps} steps.")
    return steps, warmup, decay


def _counted(step, like) -> jax.Array:
    """The step as a floating number; the dtype of the values, where they say one."""
    return jnp.asarray(step).astype(jnp.promote_types(jnp.result_type(like), jnp.float32))


def _warmed(value, peak, step, warmup: int):
    """Linear up to ``peak`` at step ``warmup``; the first step has a share of it, not zero."""
    return value if not warmup else jnp.where(step < warmup, peak * (step + 1) / (warmup + 1), value)


def _decayed(start, end, share, shape: str):
    if shape == "exponential":
        return start * (end / start) ** share
    # The root has no derivative at the start of the decay, where there is nothing to differentiate by.
    fallen = jnp.sqrt(jnp.where(share > 0, share, 1.0)) * (share > 0) if shape == "sqrt" else share
    return start + (end - start) * fallen


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
