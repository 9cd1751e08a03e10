"""SRBA: single-loop steps whose noise vanishes, by differences along the path on the same examples.

With the directions D of `bilevel.methods.directions` at point k, and its batches i and j::

    Delta_k = D(point k) on all examples                       every ``period`` steps          (1)
    Delta_k = D_ij(point k) - D_ij(point k-1) + Delta_(k-1)    in between                      (2)

All three variables move along ``Delta_k``. Each difference is taken on one batch, evaluated anew at both
points. No table is kept, and the order of the number of examples to an accuracy is the least possible.

References:
  Dagreou, Moreau, Vaiter and Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk
  minimization", 2023, arXiv:2302.08766.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data, validation
from bilevel.control import once
from bilevel.linear_solvers import SGDState
from bilevel.methods.alternating import Alternating
from bilevel.methods.directions import (
    InnerPart,
    OuterPart,
    Parts,
    begun,
    counted,
    first_running,
    inner_part,
    moved,
    outer_part,
    refuse_iterable,
    single_loop,
    sources_of,
)
from bilevel.placement import refuse_explicit
from bilevel.problem import HParams, Params
from bilevel.trees import copied
from bilevel.vectors import into_ball


class Before(NamedTuple):
    """The point before: params, running solution, hyperparameters in natural units."""

    params: Params
    v: Params
    hparams: HParams


class SrbaState(NamedTuple):
    """The running vector, the point before, the parts of Delta there, and the steps since Eq. (1)."""

    running: SGDState
    before: Before
    parts: Parts
    age: jax.Array


@dataclasses.dataclass(frozen=True)
class Srba:
    """See `srba`."""

    method: Alternating
    period: int | None
    radius: float | None
    batches_per_step = 1, 1
    differentiated = None

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        return self.method.seen(hparams, j)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; the first step takes all examples."""
        train, valid = sources_of(_refuse_passing, train, valid)
        args = params, hparams, train, valid
        state = begun("srba", self.method, problem, args, key=key, model_state=model_state)
        # Copies, so that a loop that donates its state never gives one buffer twice.
        w, h = copied((state.params, state.hparams))
        before = Before(w, jax.tree.map(jnp.zeros_like, w), h)
        parts = Parts(InnerPart(w, w, h), OuterPart(w, h))
        all_valid = valid.whole(state.streams[1])
        slope = outer_part(problem, state.params, state.hparams, all_valid)[2].slope
        running = self._bounded(first_running(self.method, state.estimator, slope))
        memory = SrbaState(running, before, jax.tree.map(jnp.zeros_like, parts), jnp.int32(0))
        return dataclasses.replace(state, estimator=memory)

    def step(self, problem, state, train, valid):
        """Eq. (1) or (2); rejected as a whole where a result is not finite."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = sources_of(_refuse_passing, train, valid)
        memory = state.estimator
        key_train, key_valid, _ = state.streams
        rows = data.draw(train, key_train, state.position, 1, state.count).last
        valid_rows = valid.batch(key_valid, state.count)
        all_rows, all_valid = train.whole(key_train), valid.whole(key_valid)
        now = Before(state.params, memory.running.v, state.hparams)

        def on_all(_):
            return _parts(problem, now, all_rows, all_valid)

        def corrected(_):
            new, value, metrics = _parts(problem, now, rows, valid_rows)
            old, _, _ = _parts(problem, memory.before, rows, valid_rows)
            change = jax.tree.map(jnp.subtract, new, old)
            return jax.tree.map(jnp.add, change, memory.parts), value, metrics

        begins = memory.age == 0
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(corrected, None))
        parts, value, metrics = once(begins, on_all, once(~begins, corrected, nothing))
        whole, twice = counted(problem, all_rows, all_valid), counted(problem, rows, valid_rows, 2)
        counts = jax.tree.map(lambda a, b: jnp.where(begins, a, b), whole, twice)
        made = moved(self.method, state, memory.running, parts, value, metrics, counts)
        running = self._bounded(made.running)
        period = self.period or max(train.num_batches, valid.num_batches)
        age = (memory.age + 1) % period
        return self.method.concluded(
            state, made.estimate, made.point, SrbaState(running, now, parts, age),
            taken=1, renewed=train.renewed or valid.renewed,
        )  # fmt: skip

    def _bounded(self, running: SGDState) -> SGDState:
        """With v projected onto its ball."""
        if self.radius is None:
            return running
        zero = jax.tree.map(jnp.zeros_like, running.v)
        return running._replace(v=into_ball(running.v, zero, self.radius))


def _parts(problem, at: Before, rows, valid_rows):
    """The parts of the directions at a point, the outer loss and its metrics."""
    value, metrics, outer = outer_part(problem, at.params, at.hparams, valid_rows)
    return Parts(inner_part(problem, at.params, at.v, at.hparams, rows), outer), value, metrics


def _refuse_passing(**sources) -> None:
    fix = "Take bilevel.minibatches, or arrays."
    refuse_iterable("srba", "passes over all examples every so often", fix, **sources)
    for which, source in sources.items():
        if isinstance(source, data.WithRng):
            raise ValueError(
                f"{which}: srba corrects what a pass over all examples found, and with_rng would have that "
                "at one draw of the noise only, not in the mean. Take bilevel.soba."
            )


def srba(inner, outer, linear_step, period: int | None = None, radius: float | None = None) -> Srba:
    """Single-loop steps with variance reduced along the path, Eq. (1) and (2) of the module.

    One outer step moves params by ``inner``, the solution of the linear system by ``linear_step`` and hparams
    by ``outer``, from one point. It costs two inner gradients, two Hessian-vector and two cross products on
    one batch, and two outer gradients on another; every ``period`` steps one of each on all examples instead.
    Memory: five vectors of the size of params and three of hparams beside those of `bilevel.soba`, and that
    of derivatives on all examples at once. Both losses have to be means over the examples of a batch. Unlike
    in the paper, the batches of an epoch are drawn without replacement.

    With arrays used whole it is gradient descent with exact derivatives.

    Args:
      inner: the optax optimiser of params; of the paper ``optax.sgd``.
      outer: the optax optimiser of hyperparameters, in free units.
      linear_step: step size of the linear system, about the inverse of the largest curvature of the inner
        loss; or an optax schedule of it.
      period: steps from one pass over all examples to the next; default the number of batches of the level
        that has more.
      radius: of the ball around zero that the solution of the linear system is projected onto, a bound on
        its norm, as the paper's theory has it; default none.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range; from ``init``, data that cannot be
        passed over again.

    Example:
      >>> import bilevel, optax
      >>> bilevel.srba(optax.sgd(0.05), optax.sgd(0.5), linear_step=0.05).batches_per_step
      (1, 1)

    References:
      Dagreou, Moreau, Vaiter and Ablin, 2023, arXiv:2302.08766.
    """
    if period is not None:
        period = validation.whole_number("period", period, 1)
    if radius is not None:
        radius = validation.number("radius", radius, positive=True)
    return Srba(single_loop(inner, outer, linear_step), period, radius)
