"""The hypergradient at a point: the stateless view of an estimator."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bilevel import data, validation
from bilevel.constraints import bind
from bilevel.estimators.implicit import implicit
from bilevel.inner_solvers import start_point
from bilevel.problem import Estimate, Estimator, Point, Problem


def hypergradient(problem: Problem, estimator: Estimator | None = None) -> Callable[..., Estimate]:
    """A function that estimates the hypergradient at a point; jit, vmap or shard it as you like.

    Args:
      problem: the bilevel problem.
      estimator: default `bilevel.implicit`. The implicit family takes params as the inner solution, the
        trajectory family starts from them.

    Returns:
      ``fn(params, hparams, train_batch, valid_batch, key=None) -> Estimate``. A plain train batch is used at
      every inner step, ``bilevel.stacked(batches)`` gives one to each. The gradient is in natural units.

    Raises:
      TypeError, ValueError: from this call, for a wrong problem or estimator; from the function's, for losses
        that do not fit what they are given and hyperparameters that influence nothing.
    """
    validation.kind("problem", problem, "a problem")
    estimator = implicit() if estimator is None else estimator
    validation.kind("estimator", estimator, "an estimator")

    def estimate(params, hparams, train_batch, valid_batch, key=None) -> Estimate:
        params = validation.floating(params, "params")
        hparams = validation.floating(hparams, "hparams")
        validation.finite(params, "params")
        validation.finite(hparams, "hparams")
        bind(problem.constraints, hparams).check(hparams)
        train = data.as_source(train_batch, "train_batch")
        valid = data.as_source(valid_batch, "valid_batch")
        key = jax.random.key(0) if key is None else validation.random_key("key", key)
        steps = getattr(estimator, "steps", None) or 1
        data.check_sources(train, valid, steps)
        inner = getattr(estimator, "inner", None)
        point = Point(params) if inner is None else start_point(inner, params, None)
        draw = data.draw(train, jax.random.fold_in(key, 0), 0, steps)
        valid_batch = valid.batch(jax.random.fold_in(key, 1), 0)
        tuned = validation.tuned_leaves(problem, hparams)
        validation.problem_on_data(problem, tuned, params, hparams, draw(0), valid_batch)
        state = estimator.init(problem, point, hparams)
        result, _ = estimator.estimate(
            problem, state, point, hparams, draw, valid_batch, jax.random.fold_in(key, 2)
        )
        return result

    return estimate
