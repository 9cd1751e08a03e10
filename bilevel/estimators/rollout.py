"""The inner loop as a differentiable function of hparams, for the trajectory family.

For steps ``params_{t+1} = step(params_t, hparams, batch_t)`` from a start that does not depend on hparams,
reverse mode needs the whole trajectory. With ``remat`` only the starts of about sqrt(T) segments are kept
and each segment is run again when the backward pass reaches it: O(sqrt(T)) memory for one more forward
pass (Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016,
arXiv:1604.06174).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.data import rows
from bilevel.inner_solvers import inner_step
from bilevel.problem import Counts, Estimate, Point, SolveInfo, outer_value


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What the estimators of this family have in common."""

    inner: Any
    steps: int | None
    truncate: int | None
    remat: bool
    trajectory = True

    def init(self, problem, point, hparams):
        """No state; the start is the point."""
        del problem, hparams
        if self.inner is None or self.steps is None:
            raise ValueError(
                f"{type(self).__name__.lower()}() has no inner optimiser or number of steps: give inner= "
                "and steps= here, or use it inside a method that has them."
            )
        del point
        return ()

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps taken, and how many of them, the last ones, are differentiated."""
        assert self.steps is not None  # checked by init
        return self.steps, self.steps if self.truncate is None else min(self.truncate, self.steps)

    def outer_at_end(self, problem, point: Point, draw, valid):
        """The function ``hparams -> (value, (end point, metrics))``."""

        def value(hparams):
            end = rollout(self, problem, point, hparams, draw)
            value, metrics = outer_value(problem, end.params, hparams, valid, end.model_state)
            return value, (end, metrics)

        return value

    def report(self, value, grad, end: Point, metrics, draw, valid, passes: int) -> Estimate:
        """The estimate at the end point, derivatives having taken ``passes`` sweeps over the steps kept."""
        steps, kept = self.lengths
        batch_rows = jnp.float32(rows(draw.last))
        return Estimate(
            value=value,
            grad=grad,
            point=end,
            error=jnp.full_like(value, jnp.inf),
            counts=Counts(
                inner_grad=steps * batch_rows,
                outer_grad=jnp.float32(rows(valid)),
                hvp=kept * passes * batch_rows,
                cross=kept * passes * batch_rows,
            ),
            solve=SolveInfo(jnp.zeros_like(value), jnp.int32(0), jnp.int32(0), jnp.bool_(False)),
            metrics=metrics,
        )


def settings(inner, steps, truncate, per_step) -> tuple[Any, int | None, int | None]:
    """The arguments of a factory, checked."""
    if per_step is not None:
        raise NotImplementedError("per_step= (hyperparameters of their own at each step) comes later.")
    if inner is not None:
        validation.kind("inner", inner, "an optax optimiser")
    if steps is not None:
        steps = validation.whole_number("steps", steps, 1)
    if truncate is not None:
        truncate = validation.whole_number("truncate", truncate, 1)
        if steps is not None and truncate > steps:
            raise ValueError(f"truncate must be at most steps = {steps}, got {truncate}.")
    return inner, steps, truncate


def rollout(settings: Trajectory, problem, point: Point, hparams, draw) -> Point:
    """The point after all steps; differentiable by hparams through the last ``truncate`` of them."""

    def step(point, j):
        return inner_step(problem, settings.inner, point, hparams, draw(j)), None

    total, kept = settings.lengths
    first = total - kept
    if first:
        detached = jax.lax.stop_gradient(hparams)

        def body(j, point):
            return inner_step(problem, settings.inner, point, detached, draw(j))

        point = jax.lax.stop_gradient(jax.lax.fori_loop(0, first, body, point))
    steps = first + jnp.arange(kept)
    if not settings.remat:
        return jax.lax.scan(step, point, steps)[0]

    step = jax.checkpoint(step, prevent_cse=False)
    length = segment_length(kept)
    full = kept - kept % length

    def segment(point, steps):
        return jax.lax.scan(step, point, steps)

    segments = steps[:full].reshape(-1, length)
    point, _ = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), point, segments)
    return segment(point, steps[full:])[0] if full < kept else point


def segment_length(steps: int) -> int:
    """Steps between checkpoints: about the square root of all of them.

    The nearest divisor within a factor of two; else the rounded root, with a shorter last segment.
    """
    root = math.sqrt(steps)
    near = [n for n in range(max(1, math.ceil(root / 2)), math.floor(2 * root) + 1) if steps % n == 0]
    return min(near, key=lambda n: abs(math.log(n / root)), default=round(root))
