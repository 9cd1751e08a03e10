"""The driver: `optimize` runs a method and reports.

It is the only impure layer: here the arguments are checked and the run is planned; `bilevel.run` owns the
host loop, and the steps themselves run in compiled chunks, see `bilevel.loop`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

from bilevel import hosts, validation
from bilevel.checkpoint import as_checkpoints
from bilevel.keeper import Keeper, identity
from bilevel.placement import several_hosts
from bilevel.preparation import Given, prepare
from bilevel.problem import Method, Problem
from bilevel.result import Result
from bilevel.run import Run, Settings


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
      mesh: a `jax.sharding.Mesh`: rows of the data that lie nowhere in particular are split over its axis
        "data", everything else is on each device. Arrays that carry a sharding stay as they are, with or
        without ``mesh``.
      callbacks: functions ``(step, rows)``, called every ``judge_every`` outer steps with the number of steps
        done and the new rows of the history as numpy arrays; one that returns `STOP` ends the run. One
        with an attribute ``whole = True`` gets all rows from step 0, also where a run is gone on with. In a
        population one may return booleans, one for each member: those where it is true are stopped there
        (status ``INTERRUPTED``), keep their state and best pair, and the others go on.
      checkpoint: a folder to write checkpoints to, and to go on from where it holds one of the same run; or
        `checkpoints`.
      progress: show a live progress bar.
      tol: stop when ``grad_norm`` (free units; plus the bound on its error, where there is one) is at most
        this.
      test: a third split; outer is reported on it, never optimised.
      constraints: replaces the problem's.
      model_state: mutable model state, for problems with ``has_state``; each member begins with it.
      population: many runs in one program, see `population`. With its ``sample`` params and hparams are None,
        else every array of theirs has an axis of members in front.
      judge_every: how often ``tol`` takes effect, a sampled validation source is judged on all its rows,
        ``test`` is measured and callbacks are called; outer steps.
      keep_best: keep the pair with the lowest outer value, at the cost of one more copy of params.

    Returns:
      A `Result`. A run that diverges, stalls or is interrupted (Ctrl-C, SIGTERM) returns one too, with the
      last good state, the whole history, a status and a message.

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
    spec = None if checkpoint is None else as_checkpoints(checkpoint)
    steps = validation.whole_number("steps", steps, 1)
    tol = -1.0 if tol is None else validation.number("tol", tol, minimum=0.0)
    callbacks = _callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        given = Given(
            problem, method, params, hparams, train, valid, key, mesh, test, constraints, model_state,
            population, judge_every, keep_best,
        )  # fmt: skip
        spans = several_hosts(mesh, (params, hparams, train, valid, test, model_state))
        stack.enter_context(hosts.watched(spans))
        with hosts.agreed(spans, "Another process could not begin the run; see its own error."):
            ready = prepare(stack, given)
        settings = Settings(steps, tol, callbacks, began, population, ready.placement)
        # Where nothing but batches of an iterable lies on several hosts, it is known only now.
        stack.enter_context(hosts.watched(settings.spans_hosts and not spans))
        keeper = stored = None
        if spec is not None:
            name = functools.partial(identity, ready.plan, ready.arguments, ready.test, population)
            keeper = stack.enter_context(Keeper(spec, name, ready.feeds, ready.placement))
            stored = keeper.stored()
        carry = ready.abstract_carry() if stored else ready.first_carry()
        run = Run(ready, carry, settings, keeper)
        if keeper is not None and stored is not None:
            keeper.restore(run, *stored)
        return run.go(progress)


def _callbacks(callbacks) -> tuple[Callable, ...]:
    several = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(several, Sequence) or not all(callable(callback) for callback in several):
        raise TypeError(f"callbacks must be functions (step, rows), got {callbacks!r}.")
    return tuple(several)
