"""The hypergradient at a point: the stateless view of an estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from bilevel import data, validation
from bilevel.constraints import bind
from bilevel.estimators.implicit import implicit
from bilevel.inner_solvers import start_point
from bilevel.lift import refuse_sampled
from bilevel.linear_solvers import gmres
from bilevel.placement import refuse_explicit
from bilevel.problem import AnyProblem, Estimate, Estimator, FixedPoint
from bilevel.proximal import is_proximal


def default_estimator(problem: AnyProblem) -> Estimator:
    """What is taken where no estimator is given."""
    general = isinstance(problem, FixedPoint) and not is_proximal(problem)
    return implicit(gmres()) if general else implicit()


def hypergradient(problem: AnyProblem, estimator: Estimator | None = None) -> Callable[..., Estimate]:
    """A function that estimates the hypergradient at a point; jit, vmap or shard it as you like.

    Args:
      problem: the bilevel problem.
      estimator: default `bilevel.implicit`, with `bilevel.gmres` for a fixed point that is no
        `bilevel.proximal_gradient`. The implicit family takes
        params as the inner solution, the trajectory family starts from them.

    Returns:
      ``fn(params, hparams, train_batch, valid_batch, key=None, model_state=None) -> Estimate``. A plain train
      batch is used at every inner step, ``bilevel.stacked(batches)`` gives one to each. The gradient is in
      natural units.

    Raises:
      TypeError, ValueError: from this call, for a wrong problem or estimator; from the function's, for losses
        that do not fit what they are given and hyperparameters that influence nothing.
    """
    validation.kind("problem", problem, "a problem")
    chosen: Any = default_estimator(problem) if estimator is None else estimator
    validation.kind("estimator", chosen, "an estimator")

    def estimate(params, hparams, train_batch, valid_batch, key=None, model_state=None) -> Estimate:
        refuse_explicit(
            params=params, hparams=hparams, train_batch=train_batch, valid_batch=valid_batch,
            model_state=model_state,
        )  # fmt: skip
        hparams = validation.floating(hparams, "hparams")
        validation.finite(hparams, "hparams")
        bind(problem.constraints, hparams).check(hparams)
        train = data.as_source(train_batch, "train_batch")
        valid = data.as_source(valid_batch, "valid_batch")
        key = jax.random.key(0) if key is None else validation.random_key("key", key)
        steps = getattr(chosen, "steps", None) or 1
        data.check_sources(train, valid, steps)
        refuse_sampled(problem, train_batch=train, valid_batch=valid)
        draw = data.draw(train, jax.random.fold_in(key, 0), 0, steps)
        valid_batch = valid.batch(jax.random.fold_in(key, 1), 0)
        key = jax.random.fold_in(key, 2)
        inner = getattr(chosen, "inner", None)
        seen = chosen.seen(hparams, 0) if chosen.trajectory else hparams
        params = validation.first_params(problem, params, seen, lambda: draw(0), key)
        validation.problem_on_data(
            problem, chosen, inner, params, seen, draw(0), valid_batch, model_state, given=hparams
        )
        point = start_point(inner, params, model_state, seen)
        state = chosen.init(problem, point, hparams)
        result, _ = chosen.estimate(problem, state, point, hparams, draw, valid_batch, key)
        return result

    return estimate
