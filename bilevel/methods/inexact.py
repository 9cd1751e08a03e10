"""What methods share that solve the inner problem to an accuracy of their own: MAID, HOAG, ISGD.

They work on arrays used whole, with an inner solver and an implicit hypergradient; what each of them keeps
from step to step beside that is its ``progress``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import certificates, data, validation
from bilevel.constraints import BoundConstraints, bind
from bilevel.estimators.implicit import Implicit, implicit
from bilevel.inner_loops.accelerated import accelerated
from bilevel.inner_solvers import start_point
from bilevel.lift import examples, refuse_sampled
from bilevel.linear_solvers import cg
from bilevel.problem import Counts, FixedPoint, NonFinite, Point, PyTree, register, static
from bilevel.trees import copied

# Inner steps of a solve, where the method is left to choose its solver.
_MAX_STEPS = 100_000


@register
@dataclasses.dataclass(frozen=True)
class InexactState:
    """What the next outer step needs; ``free`` are the hyperparameters in free units."""

    point: Point
    free: PyTree
    estimator: PyTree
    inner: PyTree
    progress: PyTree
    key: jax.Array
    count: jax.Array
    constraints: BoundConstraints = static()

    @property
    def params(self):
        """Parameters."""
        return self.point.params

    @property
    def hparams(self):
        """Hyperparameters in natural units."""
        return self.constraints.to_natural(self.free)

    @property
    def model_state(self):
        """Mutable model state."""
        return self.point.model_state


class Work(NamedTuple):
    """Gradients of both levels, and products of the system, so far; each over all rows."""

    inner: Any
    outer: Any
    hvp: Any
    cross: Any

    def plus(self, other: Work) -> Work:
        """The sum."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def counts(self, problem, train, valid) -> Counts:
        """Examples touched."""
        rows, valid_rows = examples(problem, train), examples(problem, valid)
        each = (rows, valid_rows, rows, rows)
        return Counts(*(jnp.float32(n * r) for n, r in zip(self, each, strict=True)))


def work(inner=0, outer=0, hvp=0, cross=0) -> Work:
    """So much work; a solver of members reports the mean over them, which need not be whole."""
    return Work(*(jnp.asarray(n, jnp.float32) for n in (inner, outer, hvp, cross)))


def refuse_unfit(name: str, problem) -> None:
    """Raise where a problem begins anew at every step, or has no inner loss."""
    validation.kind("problem", problem, "a problem")
    if isinstance(problem, FixedPoint):
        raise TypeError(f"{name} minimises an inner loss, which a FixedPoint does not have.")
    if problem.start is not None:
        raise ValueError(
            f"{name} goes on from where it stands; a problem with start= begins anew at every step."
        )


def first_state(
    name: str, problem, estimator, solver, progress, params, hparams, train, valid, *, key, model_state
) -> InexactState:
    """The first state; the problem checked on the data's shapes.

    Args:
      name: of the method, for messages.
      problem: a problem that `refuse_unfit` lets pass.
      estimator: `bilevel.implicit`.
      solver: of the inner problem.
      progress: a function of the first hyperparameters in free units.
      params: as given to the method, and so are the rest.
      hparams: see params.
      train: see params.
      valid: see params.
      key: see params.
      model_state: see params.
    """
    hparams = validation.floating(hparams, "hparams")
    validation.finite(hparams, "hparams")
    key = validation.random_key("key", key)
    model_state = validation.strong(model_state)
    train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
    for which, source in (("train", train), ("valid", valid)):
        if source.sampled or source.renewed or source.restarts:
            raise ValueError(
                f"{which} must be arrays used whole: {name} compares values of one and the same loss."
            )
    refuse_sampled(problem, train=train, valid=valid)
    constraints = bind(problem.constraints, hparams)
    constraints.check(hparams)
    params = validation.first_params(problem, params, hparams, lambda: train.batch(key, 0), key)
    batches = data.abstract_batch(train), data.abstract_batch(valid)
    validation.problem_on_data(problem, estimator, None, params, hparams, *batches, model_state)
    # Copies, so that a loop that donates its state leaves the user's arrays alone.
    params, hparams, key, model_state = copied((params, hparams, key, model_state))
    point = start_point(None, params, model_state, hparams)
    free = constraints.to_free(hparams)
    return InexactState(
        point=point,
        free=free,
        estimator=estimator.init(problem, point, hparams),
        inner=solver.init(problem, point, hparams),
        progress=progress(free),
        key=key,
        count=jnp.int32(0),
        constraints=constraints,
    )


def default_solver(problem) -> Any:
    """Accelerated gradients, with the problem's constants where it has them."""
    known = problem.smoothness
    if known is None:
        return accelerated(_MAX_STEPS)
    return accelerated(_MAX_STEPS, strong_convexity=known.strong_convexity, smoothness=known.inner)


def gradient_tolerance(problem, hparams, accuracy):
    """Norm of the inner gradient at which params are within ``accuracy`` of the inner solution.

    Without the problem's strong convexity that is taken to be 1.
    """
    if problem.smoothness is None:
        return accuracy
    return accuracy * certificates.constants(problem.smoothness, hparams, accuracy.dtype).strong_convexity


def nonfinite_mask(value, size):
    """A `NonFinite` mask of an estimate: its value, the norm of its gradient."""
    bad_grad = jnp.where(jnp.isfinite(size), 0, NonFinite.GRAD)
    return jnp.where(jnp.isfinite(value), bad_grad, NonFinite.VALUE).astype(jnp.int32)


def implicit_of(estimator) -> Implicit:
    """The estimator of a method that asks for absolute residuals, or the default one."""
    if estimator is None:
        return implicit(cg(max_steps=2000))
    if not isinstance(estimator, Implicit):
        raise TypeError(f"estimator must be bilevel.implicit(...), got {estimator!r}.")
    if getattr(estimator.solver, "randomized", False):
        raise ValueError(
            "estimator: a randomized Neumann series has no accuracy to be asked for; take bilevel.cg()."
        )
    return estimator
