"""The inner loop as a differentiable function of hparams, for the trajectory family.

For steps ``params_{t+1} = step(params_t, hparams, batch_t)`` reverse mode needs the whole trajectory. With
``remat`` only the starts of about sqrt(T) segments are kept and each segment is run again when the backward
pass reaches it: O(sqrt(T)) memory for one more forward pass (Chen, Xu, Zhang and Guestrin, "Training
deep nets with sublinear memory cost", 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_solvers import inner_step, started
from bilevel.lift import examples
from bilevel.problem import Counts, Estimate, FixedPoint, Point, StaticTree, outer_value, unsolved
from bilevel.trees import spread


@dataclasses.dataclass(frozen=True)
class TrajectoryEstimator:
    """What the estimators of this family have in common."""

    inner: Any
    steps: int | None
    truncate: int | None
    remat: bool
    per_step: StaticTree | None
    trajectory = True

    def init(self, problem, point, hparams):
        """No state; the start is the point."""
        del point, hparams
        if self.steps is None or (self.inner is None and not isinstance(problem, FixedPoint)):
            raise ValueError(self._unsettled)
        if self.inner is not None and isinstance(problem, FixedPoint):
            raise ValueError("inner must be None for a FixedPoint problem: its map is the inner step.")
        return ()

    @property
    def _unsettled(self) -> str:
        return (
            f"{validation.called(self)}() has no inner optimiser or number of steps: give inner= "
            "and steps= here, or use it inside a method that has them."
        )

    def seen(self, hparams, j):
        """What the losses and optimisers see at inner step ``j``."""
        if self.per_step is None:
            return hparams
        if self.steps is None:
            raise ValueError(self._unsettled)
        stepwise = spread(
            self.per_step.tree(), hparams, False, lambda x: isinstance(x, bool), "per_step", "hparams"
        )
        paths, treedef = jax.tree_util.tree_flatten_with_path(hparams)
        for (path, leaf), flag in zip(paths, stepwise, strict=True):
            if flag and jnp.shape(leaf)[:1] != (self.steps,):
                raise ValueError(
                    f"hparams{validation.name_of(path)} is declared per_step, one entry for each of the "
                    f"{self.steps} inner steps, but has shape {jnp.shape(leaf)}."
                )
        entries = [x[j] if f else x for (_, x), f in zip(paths, stepwise, strict=True)]
        return jax.tree.unflatten(treedef, entries)

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps taken, and how many of them, the last ones, are differentiated."""
        assert self.steps is not None  # checked by init
        return self.steps, self.steps if self.truncate is None else min(self.truncate, self.steps)

    def outer_at_end(self, problem, point: Point, draw, valid, key):
        """The function ``hparams -> (value, (end point, metrics))``."""

        def value(hparams):
            end = rollout(self, problem, point, hparams, draw, key)
            value, metrics = outer_value(problem, end.params, self.seen(hparams, -1), valid, end.model_state)
            return value, (end, metrics)

        return value

    def report(self, problem, value, grad, end: Point, metrics, draw, valid, passes: int) -> Estimate:
        """The estimate at the end point, derivatives having taken ``passes`` sweeps over the steps kept."""
        steps, kept = self.lengths
        batch_rows = jnp.float32(examples(problem, draw.last))
        return Estimate(
            value=value,
            grad=grad,
            point=end,
            error=jnp.full_like(value, jnp.inf),
            counts=Counts(
                inner_grad=steps * batch_rows,
                outer_grad=jnp.float32(examples(problem, valid)),
                hvp=kept * passes * batch_rows,
                cross=kept * passes * batch_rows,
            ),
            solve=unsolved(value),
            metrics=metrics,
        )


def settings(inner, steps, truncate, per_step) -> tuple[Any, int | None, int | None, StaticTree | None]:
    """The arguments of a factory, checked."""
    if inner is not None:
        validation.kind("inner", inner, "an inner optimiser")
    if steps is not None:
        steps = validation.whole_number("steps", steps, 1)
    if truncate is not None:
        truncate = validation.whole_number("truncate", truncate, 1)
        if steps is not None and truncate > steps:
            raise ValueError(f"truncate must be at most steps = {steps}, got {truncate}.")
    if per_step is not None:
        per_step = StaticTree.of(per_step)
        if not all(isinstance(leaf, bool) for leaf in per_step.leaves):
            raise TypeError(f"per_step must hold True and False, got {per_step!r}.")
    return inner, steps, truncate, per_step


def rollout(settings: TrajectoryEstimator, problem, point: Point, hparams, draw, key) -> Point:
    """The point after all steps; differentiable by hparams through the last ``truncate`` of them."""
    total, kept = settings.lengths
    first = total - kept

    def step(hparams, point, j):
        return inner_step(problem, settings.inner, point, settings.seen(hparams, j), draw(j))

    detached = jax.lax.stop_gradient(hparams) if first else hparams
    point = started(problem, settings.inner, point, settings.seen(detached, 0), draw(0), key)
    if first:
        point = jax.lax.fori_loop(0, first, lambda j, p: step(detached, p, j), point)
        point = jax.lax.stop_gradient(point)
    steps = first + jnp.arange(kept)

    def kept_step(point, j):
        return step(hparams, point, j), None

    if not settings.remat:
        return jax.lax.scan(kept_step, point, steps)[0]

    kept_step = jax.checkpoint(kept_step, prevent_cse=False)
    length = segment_length(kept)
    full = kept - kept % length

    def segment(point, steps):
        return jax.lax.scan(kept_step, point, steps)

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
