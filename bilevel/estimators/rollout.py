"""The inner loop as a differentiable function of hparams, for the trajectory family.

For steps ``params_{t+1} = step(params_t, hparams, batch_t)`` reverse mode needs the whole trajectory. With
``remat`` only the starts of about sqrt(T) segments are kept and each segment is run again when the backward
pass reaches it, and each of its steps once more: O(sqrt(T)) points for two more forward passes (Chen, Xu,
Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174). With "steps" all
T points are kept, but not what a step computes on its way, for one more forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_solvers import inner_step, started
from bilevel.lift import examples
from bilevel.problem import Counts, Estimate, FixedPoint, Point, StaticTree, outer_value, unsolved
from bilevel.schedules import Knots
from bilevel.trees import children, spread
from bilevel.vectors import norm, scaled


@dataclasses.dataclass(frozen=True)
class TrajectoryEstimator:
    """What the estimators of this family have in common."""

    inner: Any
    steps: int | None
    truncate: int | None
    remat: bool | str
    per_step: StaticTree | None
    clip: float | None
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
        """What the losses and optimisers see at inner step ``j``; -1: at the last."""
        if self.per_step is None:
            return hparams
        if self.steps is None:
            raise ValueError(self._unsettled)
        settings = self.per_step.tree()
        spread(settings, hparams, False, is_setting, "per_step", "hparams")
        return _at_step(settings, hparams, j, self.steps, "")

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps taken, and how many of them, the last ones, are differentiated."""
        assert self.steps is not None  # checked by init
        return self.steps, self.steps if self.truncate is None else min(self.truncate, self.steps)

    def outer_at(self, problem, valid):
        """The function ``(end point, hparams) -> (value, metrics)``."""

        def value(end, hparams):
            return outer_value(problem, end.params, self.seen(hparams, -1), valid, end.model_state)

        return value

    def report(
        self, problem, value, grad, end: Point, metrics, draw, valid, products: int, growth=None
    ) -> Estimate:
        """The estimate at the end point, ``products``: how many with the Jacobian of a step it took."""
        steps, _ = self.lengths
        batch_rows = jnp.float32(examples(problem, draw.last))
        return Estimate(
            value=value,
            grad=grad,
            point=end,
            error=jnp.full_like(value, jnp.inf),
            counts=Counts(
                inner_grad=steps * batch_rows,
                outer_grad=jnp.float32(examples(problem, valid)),
                hvp=products * batch_rows,
                cross=products * batch_rows,
            ),
            solve=unsolved(value),
            metrics=metrics,
            growth=growth,
        )


def is_setting(x) -> bool:
    """Of ``per_step``, for everything below."""
    return isinstance(x, bool) or callable(x)


def _at_step(setting, tree, j, steps: int, path: str):
    """What is seen at step ``j`` of a tree whose entries, or numbers, are those of schedules."""
    if setting is None or setting is False:
        return tree
    if setting is True:
        return jax.tree_util.tree_map_with_path(
            lambda own, leaf: _entry(leaf, j, steps, path + validation.name_of(own)), tree
        )
    if callable(setting):
        if isinstance(setting, Knots) and setting.steps[-1] >= steps:
            raise ValueError(
                f"per_step{path} has a knot or window at step {setting.steps[-1]} of a run with steps from 0 "
                f"to {steps - 1}."
            )
        return jnp.asarray(_schedule(setting, tree, path)(steps - 1 if _is_last(j) else j))
    named = children(setting)
    parts = [_at_step(named.get(n), child, j, steps, path + n) for n, child in children(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda x: x is not tree), parts)


def _is_last(j) -> bool:
    return isinstance(j, int) and j == -1


def _entry(leaf, j, steps: int, path: str):
    if jnp.shape(leaf)[:1] != (steps,):
        raise ValueError(
            f"hparams{path} is declared per_step, one entry for each of the {steps} inner steps, but has "
            f"shape {jnp.shape(leaf)}."
        )
    return leaf[j]


def _schedule(make, tree, path: str):
    try:
        schedule = make(tree)
    except ValueError as error:
        raise ValueError(f"hparams{path} is declared per_step: {error}") from error
    if not callable(schedule):
        raise TypeError(
            f"per_step{path} must make a schedule, a function of the inner step, of hparams{path}; it made "
            f"{schedule!r:.80}."
        )
    return schedule


def settings(inner, steps, truncate, per_step, clip=None) -> tuple:
    """The arguments of a factory, checked; `remat` stands between the last two of an estimator."""
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
        for leaf in per_step.leaves:
            if not is_setting(leaf):
                raise TypeError(
                    "per_step must hold True, False, or what makes a schedule of the hyperparameters there, "
                    f"such as bilevel.schedules.windows(20, steps=1000); got {leaf!r:.80}."
                )
    if clip is not None:
        clip = validation.number("clip", clip, positive=True)
    return inner, steps, truncate, per_step, clip


def begun(settings: TrajectoryEstimator, problem, point: Point, hparams, draw, key) -> Point:
    """The point that the steps kept start from; differentiable by hparams only where they are all of them."""
    total, kept = settings.lengths
    first = total - kept
    if not first:
        return started(problem, settings.inner, point, settings.seen(hparams, 0), draw(0), key)
    hparams = jax.lax.stop_gradient(hparams)
    point = started(problem, settings.inner, point, settings.seen(hparams, 0), draw(0), key)
    point = jax.lax.fori_loop(0, first, lambda j, p: stepped(settings, problem, p, hparams, draw, j), point)
    return jax.lax.stop_gradient(point)


def stepped(settings: TrajectoryEstimator, problem, point: Point, hparams, draw, j) -> Point:
    """The point after inner step ``j``."""
    return inner_step(problem, settings.inner, point, settings.seen(hparams, j), draw(j))


def rollout(settings: TrajectoryEstimator, problem, point: Point, hparams, draw, key, probes) -> Point:
    """The point after all steps; differentiable in reverse mode by hparams through the last ones kept.

    ``probes``: zeros for each of the steps kept. Their derivatives, for a cotangent v of the end, are the
    norms of those of params before each step.
    """
    total, kept = settings.lengths
    point = begun(settings, problem, point, hparams, draw, key)
    steps = jnp.arange(total - kept, total), probes

    def kept_step(point, step):
        j, probe = step
        point = dataclasses.replace(point, params=_watched(settings.clip, point.params, probe))
        return stepped(settings, problem, point, hparams, draw, j), None

    if not settings.remat:
        return jax.lax.scan(kept_step, point, steps)[0]

    kept_step = jax.checkpoint(kept_step, prevent_cse=False)
    if settings.remat == "steps":
        return jax.lax.scan(kept_step, point, steps)[0]

    length = segment_length(kept)
    full = kept - kept % length

    def segment(point, steps):
        return jax.lax.scan(kept_step, point, steps)

    segments = jax.tree.map(lambda x: x[:full].reshape(-1, length), steps)
    point, _ = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), point, segments)
    rest = jax.tree.map(lambda x: x[full:], steps)
    return segment(point, rest)[0] if full < kept else point


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(clip: float | None, params, probe):
    """Params; backwards their cotangent, not longer than ``clip``, and its norm for the probe."""
    del clip, probe
    return params


def _watched_back(clip, probe, cotangent):
    size = norm(cotangent).astype(probe.dtype)
    return cotangent if clip is None else shortened(cotangent, size, clip), size


_watched.defvjp(lambda clip, params, probe: (params, probe), _watched_back)


def shortened(v, size, limit: float):
    """A tree of norm ``size``, at most as long as the limit."""
    return scaled(v, limit / jnp.maximum(size, limit))


def segment_length(steps: int) -> int:
    """Steps between checkpoints: about the square root of all of them.

    The nearest divisor within a factor of two; else the rounded root, with a shorter last segment.
    """
    root = math.sqrt(steps)
    near = [n for n in range(max(1, math.ceil(root / 2)), math.floor(2 * root) + 1) if steps % n == 0]
    return min(near, key=lambda n: abs(math.log(n / root)), default=round(root))
