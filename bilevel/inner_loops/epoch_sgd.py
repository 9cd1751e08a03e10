"""Stochastic gradient descent in epochs of doubling length."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.inner_loops.measured import gradient_of, loss_of, needs_a_loss, size_of_gradient, tolerance
from bilevel.problem import Draw, Point, PyTree, SolveInfo
from bilevel.vectors import axpy, into_ball, norm


class _Epochs(NamedTuple):
    params: PyTree
    size: jax.Array
    epoch: jax.Array
    steps: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class EpochSGD:
    """See `epoch_sgd`."""

    step_size: float
    radius: float
    steps: int
    epochs: int
    atol: float

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        needs_a_loss("epoch_sgd", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Batch ``j`` of the draw for step ``j``, counted through all epochs."""
        del key
        atol = tolerance(self.atol, atol, point.params)

        def gradient(params, batch):
            return gradient_of(loss_of(problem, point, hparams, batch))(params)

        def run_epoch(at):
            halved = jnp.exp2(-at.epoch.astype(at.size.dtype))
            step_size, radius = self.step_size * halved, self.radius * jnp.sqrt(halved)

            def step(j, carry):
                w, mean = carry
                w = axpy(-step_size, gradient(w, draw(at.steps + j)), w)
                w = into_ball(w, at.params, radius)
                return w, jax.tree.map(lambda m, x: (m + (x - m) / (j + 1)).astype(m.dtype), mean, w)

            length = jnp.left_shift(jnp.int32(self.steps), at.epoch)
            _, mean = jax.lax.fori_loop(0, length, step, (at.params, at.params))
            return mean, at.steps + length

        def body(at):
            size = size_of_gradient(gradient(at.params, draw.last))
            done = (size <= atol) | ~jnp.isfinite(size) | (at.epoch >= self.epochs)
            params, steps = jax.lax.cond(done, lambda at: (at.params, at.steps), run_epoch, at)
            return _Epochs(params, size, jnp.where(done, at.epoch, at.epoch + 1), steps, done)

        size = jnp.full_like(norm(point.params), jnp.inf)
        start = _Epochs(point.params, size, jnp.int32(0), jnp.int32(0), jnp.bool_(False))
        end = jax.lax.while_loop(lambda at: ~at.done, body, start)
        info = SolveInfo(end.size, end.steps, end.steps + end.epoch + 1, jnp.bool_(False))
        return Point(end.params, point.opt_state, point.model_state), state, info


def epoch_sgd(
    step_size: float, radius: float, steps: int = 16, epochs: int = 6, atol: float = 0.0
) -> EpochSGD:
    """Epoch-SGD: gradient steps on batches, for strongly convex losses seen through noise.

    Epoch ``s = 0, 1, ...`` begins at the mean of the epoch before, ``c``, and takes ``steps 2^s`` steps of
    size ``step_size / 2^s``, each projected onto the ball around ``c`` of radius ``radius / 2^(s/2)``; the
    mean of its iterates is where the next begins. The expected squared error falls like one over the number
    of all steps, ``steps (2^epochs - 1)``, the best rate that noisy gradients allow, and the balls keep a
    rare bad batch from throwing it far.

    Step ``j`` takes batch ``j`` of the draw, counted through all epochs: fresh batches beyond the outer
    step's own where the source is sampled, else the last again. The gradient is measured between epochs and
    at the end on the draw's last batch; with minibatches that is a noisy number, and not the residual of all
    data.

    Args:
      step_size: of the first epoch; at most about ``1 / L`` for an L-smooth loss on a batch, and a few times
        ``1 / (mu steps)`` where that is less.
      radius: of the first ball: a bound on the distance between the start and the solution.
      steps: of the first epoch.
      epochs: how many, each twice as long as the one before.
      atol: Euclidean norm of the gradient at which no further epoch begins; 0 runs all of them.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    epochs = validation.whole_number("epochs", epochs, 1)
    steps = validation.whole_number("steps", steps, 1)
    if steps * 2**epochs >= 2**31:
        raise ValueError(
            f"epochs = {epochs} doubles the {steps} steps of the first so often that "
            f"{steps * (2**epochs - 1)} are taken in all. Take fewer."
        )
    return EpochSGD(
        validation.number("step_size", step_size, positive=True),
        validation.number("radius", radius, positive=True),
        steps,
        epochs,
        validation.number("atol", atol, minimum=0.0),
    )
