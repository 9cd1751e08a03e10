"""Any optax optimiser as an inner solver."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import validation
from bilevel.inner_loops.measured import needs_a_loss, size_of_gradient, tolerance
from bilevel.inner_solvers import inner_step
from bilevel.problem import Draw, Point, PyTree, SolveInfo
from bilevel.vectors import norm, where


class _Watch(NamedTuple):
    size: jax.Array
    steps: jax.Array
    done: jax.Array
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class OptaxLoop:
    """See `optax_loop`."""

    optimizer: Any
    max_steps: int
    atol: float

    def init(self, problem, point, hparams):
        """The optimiser's state, which goes on from solve to solve."""
        del hparams
        needs_a_loss("optax_loop", problem)
        return self.optimizer.init(point.params)

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Steps of the optimiser; batch ``j`` of the draw for step ``j``."""
        del key
        watched = self._watched(tolerance(self.atol, atol, point.params))
        opt_state = _Watch(jnp.full_like(norm(point.params), jnp.inf), jnp.int32(0), jnp.bool_(False), state)

        def body(at):
            new = inner_step(problem, watched, at, hparams, draw(at.opt_state.steps))
            model_state = where(new.opt_state.done, at.model_state, new.model_state)
            return Point(new.params, new.opt_state, model_state)

        start = Point(point.params, opt_state, point.model_state)
        end = jax.lax.while_loop(lambda at: ~at.opt_state.done, body, start)
        watch = end.opt_state
        info = SolveInfo(watch.size, watch.steps, watch.steps + 1, jnp.bool_(False))
        return Point(end.params, point.opt_state, end.model_state), watch.opt_state, info

    def _watched(self, atol) -> optax.GradientTransformationExtraArgs:
        """The optimiser; it measures the gradients it is given, and stands still once they are small."""
        optimizer = optax.with_extra_args_support(self.optimizer)

        def update(grads, state: _Watch, params=None, **extra):
            size = jnp.where(jnp.isfinite(extra["value"]), size_of_gradient(grads), jnp.inf)
            done = (size <= atol) | ~jnp.isfinite(size) | (state.steps >= self.max_steps)
            updates, opt_state = optimizer.update(grads, state.opt_state, params, **extra)
            updates = where(done, jax.tree.map(jnp.zeros_like, updates), updates)
            opt_state = where(done, state.opt_state, opt_state)
            return updates, _Watch(size, jnp.where(done, state.steps, state.steps + 1), done, opt_state)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)


def optax_loop(optimizer, max_steps: int, atol: float = 0.0) -> OptaxLoop:
    """Steps of an optax optimiser until the gradient is small.

    Step ``j`` takes batch ``j`` of the draw: the step's own, then fresh ones where the source has them, else
    the last again. The gradient that is measured is the one that the next step would use, so that with
    minibatches it is that of a batch and a tolerance stops at random; there, leave it at 0. One gradient per
    step and one for the last point; those of an optimiser's own line search are not counted. Momentum and
    moments live on in the solver's state from one solve to the next.

    Args:
      optimizer: of optax.
      max_steps: steps at most.
      atol: Euclidean norm of the gradient, absolute; 0 for a fixed number of steps.

    Raises:
      TypeError, ValueError: an optimiser that is none, a setting out of range.
    """
    return OptaxLoop(
        validation.kind("optimizer", optimizer, "an optax optimiser"),
        validation.whole_number("max_steps", max_steps, 1),
        validation.number("atol", atol, minimum=0.0),
    )
