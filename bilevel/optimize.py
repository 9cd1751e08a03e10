"""The driver: `optimize` runs a method and reports.

It is the only impure layer: here the arguments are checked and the run is planned; `bilevel.run` owns the
host loop, and the steps themselves run in compiled chunks, see `bilevel.loop`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, loop, validation
from bilevel.constraints import bind
from bilevel.estimators.implicit import implicit
from bilevel.estimators.unrolled import unrolled
from bilevel.feed import EpisodeHalf, Feed, halves
from bilevel.inner_loops.newton_cg import newton_cg
from bilevel.linear_solvers import cg, gmres
from bilevel.methods.alternating import alternating
from bilevel.problem import FixedPoint, Method, Problem
from bilevel.result import Result
from bilevel.run import Run

# Rows of a chunk's buffers: no chunk has more outer steps.
_CAPACITY = 512
_FED = (Feed, EpisodeHalf)


def _outer(first: float, scale: int) -> optax.GradientTransformation:
    """Adam of rate ``first / sqrt(1 + t / scale)``: bold at first, and any distance is covered in the end.

    Hypergradients fall by orders of magnitude along a run: a long memory of their squares would stop it.
    """
    return optax.adam(lambda t: first / jnp.sqrt(1 + t / scale), b1=0.8, b2=0.9)


# Measured, with other choices, by `python -m benchmarks default_method`. Newton steps need no rate and follow
# the solution within a few per cent; both systems are solved as far as hypergradients profit from.
DEFAULT_METHOD = alternating(
    implicit(cg(max_steps=50, tol=0.03)),
    inner=newton_cg(max_steps=1, atol=0.0, cg_steps=50, rtol=0.1),
    outer=_outer(0.3, 20),
)
# Curvature of one batch is not worth many products, nor its noise bold steps.
DEFAULT_SAMPLED = alternating(
    implicit(cg(max_steps=5, tol=0.1)),
    inner=optax.adam(1e-2),
    outer=_outer(0.1, 50),
    inner_steps=20,
)
# Every outer step begins anew, so that derivatives have to go through all inner steps.
DEFAULT_FROM_START = alternating(
    unrolled(),
    inner=optax.adam(1e-2, eps_root=1e-8),
    outer=_outer(0.1, 50),
    inner_steps=20,
)
DEFAULT_FIXED_POINT = alternating(implicit(gmres(max_steps=20)), outer=_outer(0.3, 20), inner_steps=20)


def default_method(problem: Problem | FixedPoint, train) -> Method:
    """What `optimize` takes where no method is given.

    Args:
      problem: a fixed point or one with a ``start`` has a method of its own; model state, which only inner
        steps advance, that of batches.
      train: the training data, as given to `optimize`.
    """
    if isinstance(problem, FixedPoint):
        return DEFAULT_FIXED_POINT
    batches = isinstance(train, data.Episodes | data.Source) and not isinstance(train, data.Whole)
    if problem.start is not None:
        method = DEFAULT_FROM_START
    elif batches or data.is_iterable(train) or problem.has_state:
        method = DEFAULT_SAMPLED
    else:
        return DEFAULT_METHOD
    if isinstance(train, data.Stacked):
        return dataclasses.replace(method, inner_steps=train.num_batches)
    return method


def optimize(
    problem: Problem,
    params,
    hparams,
    train,
    valid,
    method: Method | None = None,
    steps: int = 500,
    key=None,
    *,
    mesh=None,
    callbacks: Callable | Sequence[Callable] = (),
    checkpoint=None,
    progress: bool = True,
    tol: float | None = None,
    test=None,
    constraints=None,
    model_state=None,
    population=None,
    judge_every: int = 10,
    keep_best: bool = True,
) -> Result:
    """Tune hyperparameters by gradient while the model trains.

    Args:
      problem: what is solved.
      params: where the inner problem starts; a pytree of floating arrays. May be None for a problem with a
        ``start`` of its own.
      hparams: where the hyperparameters start; a pytree of floating arrays or floats, natural units.
      train: training data: a pytree of arrays (used whole), `minibatches`, `stacked`, `with_rng`, any Python
        iterable of batches, or `episodes`.
      valid: validation data, likewise (not `stacked`); None with `episodes`, which hold both.
      method: default `alternating` with implicit gradients. With whole arrays it needs no tuning: one Newton
        step by conjugate gradients and one bold, slowly falling Adam step per outer step. With batches or
        model state 20 Adam steps of 0.01 (one for each batch of a stack) and smaller outer ones, with a
        ``start`` the same, unrolled: these suit params of order one; else give a method with the optimiser
        that you train with. For a fixed point 20 applications of the map.
      steps: outer steps.
      key: PRNG key of the run; default ``jax.random.key(0)``.
      mesh: devices to place data on.
      callbacks: functions ``(step, rows)``, called every ``judge_every`` outer steps with the number of steps
        done and the new rows of the history as numpy arrays; one that returns `STOP` ends the run.
      checkpoint: a path to write checkpoints to and go on from.
      progress: show a live progress bar.
      tol: stop when ``grad_norm`` (free units; plus the method's certified error) is at most this.
      test: a third split; outer is reported on it, never optimised.
      constraints: replaces the problem's.
      model_state: mutable model state, for problems with ``has_state``.
      population: members to run in one program.
      judge_every: how often ``tol`` takes effect, a sampled validation source is judged on all its rows,
        ``test`` is measured and callbacks are called; outer steps.
      keep_best: keep the pair with the lowest outer value, at the cost of one more copy of params.

    Returns:
      A `Result`. A run that diverges, stalls or is interrupted (Ctrl-C) returns one too, with the last good
      state, the whole history, a status and a message.

    Raises:
      TypeError, ValueError: an argument is wrong; before anything is compiled.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, data: 0.5 * (w - data) ** 2 + 0.5 * h["l2"] * w**2,
      ...     outer=lambda w, h, data: 0.5 * (w - data) ** 2,
      ...     constraints={"l2": bilevel.positive()},
      ... )
      >>> result = bilevel.optimize(
      ...     problem,
      ...     jnp.float32(0.0),
      ...     {"l2": 0.1},
      ...     jnp.float32(2.0),
      ...     jnp.float32(1.0),
      ...     progress=False,
      ... )
      >>> print(f"{result.hparams['l2']:.2f}")  # w* = 2 / (1 + l2) is 1
      1.00
    """
    began = time.perf_counter()
    for name, value in (("mesh", mesh), ("checkpoint", checkpoint), ("population", population)):
        if value is not None:
            raise NotImplementedError(f"{name}= comes with a later release.")
    validation.kind("problem", problem, "a problem")
    if constraints is not None:
        problem = dataclasses.replace(problem, constraints=constraints)
    if method is None:
        method = default_method(problem, train)
    validation.kind("method", method, "a method")
    steps = validation.whole_number("steps", steps, 1)
    judge_every = validation.whole_number("judge_every", judge_every, 1)
    tol = -1.0 if tol is None else validation.number("tol", tol, minimum=0.0)
    key = _default_key() if key is None else validation.random_key("key", key)
    callbacks = _callbacks(callbacks)
    model_state = validation.strong(model_state)
    hparams = validation.floating(hparams, "hparams")
    validation.finite(hparams, "hparams")
    bind(problem.constraints, hparams).check(hparams)

    feeds: list[Feed] = []
    try:
        per_step = method.batches_per_step[0]
        sources = _sources(feeds, train, valid, per_step)
        examples = [source.example() if isinstance(source, _FED) else source for source in sources]
        data.check_sources(examples[0], examples[1], per_step)
        test = None if test is None else _test_source(test)
        seen = method.seen(hparams, 0)
        params = validation.first_params(problem, params, seen, lambda: examples[0].batch(key, 0), key)
        batch, valid_batch = (data.abstract_batch(source) for source in examples)
        metrics = validation.metric_names(problem, params, seen, batch, valid_batch, model_state)
        if test is not None:
            test_batch = data.abstract_batch(test, whole=True)
            validation.metric_names(problem, params, seen, batch, test_batch, model_state)
        plan = loop.Plan(
            problem=problem,
            method=method,
            capacity=min([_CAPACITY, *(feed.capacity for feed in feeds)]),
            judge_every=judge_every,
            keep_best=bool(keep_best) and not isinstance(sources[1], _FED),
            judges=examples[1].renewed and not isinstance(sources[1], _FED),
            tests=test is not None,
            metrics=metrics,
        )
        _check_columns(plan)
        carry, *start_values = loop.compiled_start(plan)(params, hparams, key, *examples, model_state)
        validation.zero_gradient_trap(
            problem, method.differentiated, params, seen, lambda: examples[0].batch(key, 0), key, model_state
        )
        validation.finite_losses(*(np.asarray(value) for value in start_values))
        return Run(plan, carry, sources, test, steps, tol, callbacks, began).go(progress)
    finally:
        for feed in feeds:
            feed.close()


def _default_key() -> jax.Array:
    """``jax.random.key(0)``, which would compile two small programs at the first call."""
    zeros: Any = np.zeros(2, np.uint32)
    return jax.random.wrap_key_data(zeros, impl="threefry2x32")


def _callbacks(callbacks) -> tuple[Callable, ...]:
    several = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(several, Sequence) or not all(callable(callback) for callback in several):
        raise TypeError(f"callbacks must be functions (step, rows), got {callbacks!r}.")
    return tuple(several)


def _test_source(test) -> data.Source:
    if data.is_iterable(test):
        raise TypeError(f"test must be arrays, got a Python iterable ({type(test).__name__}).")
    return data.whole_source(data.as_source(test, "test"), "test")


def _sources(feeds: list[Feed], train, valid, per_step: int) -> list:
    if isinstance(train, data.Episodes):
        if valid is not None:
            raise ValueError("valid must be None where train is episodes(...), which holds both.")
        feed, *both = halves(train)
        feeds.append(feed)
        return both
    if train is valid and data.is_iterable(train):
        raise ValueError("train and valid are the same iterable; each batch would go to one of the two.")
    return [
        _source(feeds, train, "train", per_step, single=False),
        _source(feeds, valid, "valid", 1, single=True),
    ]


def _source(feeds: list[Feed], value, name: str, per_step: int, single: bool):
    if data.is_iterable(value.source if isinstance(value, data.WithRng) else value):
        feeds.append(Feed(value, name, per_step, single))
        return feeds[-1]
    return data.as_source(value, name)


def _check_columns(plan: loop.Plan) -> None:
    names = ["step", "seconds", "judged", "test", *plan.columns]
    clash = sorted(name for name in plan.metrics if names.count(name) > 1)
    if clash:
        raise ValueError(f"outer: metrics named {', '.join(clash)} clash with columns of the history.")
