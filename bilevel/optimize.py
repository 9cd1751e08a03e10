"""The driver: `optimize` runs a method and reports.

It is the only impure layer. It owns the host loop, progress, callbacks and interruption; the steps
themselves run in compiled chunks, see `bilevel.loop`.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from bilevel import data, loop, validation
from bilevel.constraints import bind
from bilevel.estimators.implicit import implicit
from bilevel.feed import Feed
from bilevel.linear_solvers import cg
from bilevel.methods.alternating import alternating
from bilevel.problem import Method, NonFinite, Problem, Status, outer_value
from bilevel.result import Best, Result, Trajectory

# Rows of a chunk's buffers: no chunk has more outer steps. Iterables are stacked for so many.
_CAPACITY, _FED_CAPACITY = 512, 16
_CHUNK_SECONDS = 1.0
_TRAJECTORY_ROWS = 2000
_BOOLEAN = ("accepted", "negative_curvature")
_INTEGER = ("nonfinite", "solver_steps")


class _Stop:
    def __repr__(self) -> str:
        return "bilevel.STOP"


STOP = _Stop()

DEFAULT_METHOD = alternating(
    implicit(cg(max_steps=20)), inner=optax.adam(1e-2), outer=optax.adam(5e-2), inner_steps=20
)


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
      params: where the inner problem starts; a pytree of floating arrays.
      hparams: where the hyperparameters start; a pytree of floating arrays or floats, natural units.
      train: training data: a pytree of arrays (used whole), `minibatches`, `stacked`, `with_rng`, or any
        Python iterable of batches.
      valid: validation data, likewise (not `stacked`).
      method: default `alternating` with implicit gradients and Adam at both levels.
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
      model_state: mutable model state, for problems that have it.
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
    if model_state is not None:
        raise NotImplementedError("model_state= comes with has_state=True, in a later release.")
    validation.kind("problem", problem, "a problem")
    if constraints is not None:
        problem = dataclasses.replace(problem, constraints=constraints)
    method = DEFAULT_METHOD if method is None else validation.kind("method", method, "a method")
    steps = validation.whole_number("steps", steps, 1)
    judge_every = validation.whole_number("judge_every", judge_every, 1)
    tol = -1.0 if tol is None else validation.number("tol", tol, minimum=0.0)
    key = validation.random_key("key", jax.random.key(0) if key is None else key)
    callbacks = _callbacks(callbacks)
    params = validation.floating(params, "params")
    hparams = validation.floating(hparams, "hparams")
    validation.finite(params, "params")
    validation.finite(hparams, "hparams")
    bind(problem.constraints, hparams).check(hparams)

    feeds: list[Feed] = []
    try:
        per_step = method.batches_per_step[0]
        sources = [
            _source(feeds, train, "train", per_step, single=False),
            _source(feeds, valid, "valid", 1, single=True),
        ]
        test = None if test is None else data.as_source(test, "test")
        plan = _plan(
            problem,
            method,
            params,
            hparams,
            sources,
            test,
            judge_every,
            keep_best,
            bool(feeds),
            key,
        )
        carry, *start_values = loop.compiled_start(plan)(
            params, hparams, key, *(s.example() if isinstance(s, Feed) else s for s in sources)
        )
        validation.finite_losses(*(np.asarray(value) for value in start_values))
        run = _Run(plan, carry, sources, test, key, steps, tol, callbacks, began)
        return run.go(progress)
    finally:
        for feed in feeds:
            feed.close()


def _callbacks(callbacks) -> tuple[Callable, ...]:
    callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks must be functions (step, rows), got {callback!r}.")
    return callbacks


def _source(feeds: list[Feed], value, name: str, per_step: int, single: bool):
    if data.is_iterable(value) and not isinstance(value, data.Source):
        feeds.append(Feed(value, name, per_step, single))
        return feeds[-1]
    source = data.as_source(value, name)
    if single and source.restarts:
        raise TypeError(
            f"{name} is stacked, but an outer step takes one validation batch; pass arrays, minibatches "
            "or an iterable."
        )
    return source


def _plan(problem, method, params, hparams, sources, test, judge_every, keep_best, fed, key) -> loop.Plan:
    valid = sources[1]
    examples = [s.example() if isinstance(s, Feed) else s for s in sources]
    train_batch, valid_batch = jax.eval_shape(lambda: tuple(s.batch(key, 0) for s in examples))
    tuned = validation.tuned_leaves(problem, hparams)
    validation.problem_on_data(problem, tuned, params, hparams, train_batch, valid_batch)
    _, metrics = jax.eval_shape(
        lambda p, h, b: outer_value(problem, p, h, b, None), params, hparams, valid_batch
    )
    plan = loop.Plan(
        problem=problem,
        method=method,
        capacity=_FED_CAPACITY if fed else _CAPACITY,
        judge_every=judge_every,
        keep_best=keep_best and not isinstance(valid, Feed),
        judges=not isinstance(valid, Feed) and valid.sampled,
        tests=test is not None,
        metrics=tuple(sorted(metrics)),
    )
    taken = {"step", "seconds", "judged", "test", *loop.COLUMNS} & set(metrics)
    if taken:
        raise ValueError(
            f"outer: metrics named {', '.join(sorted(taken))} clash with columns of the history."
        )
    if test is not None:
        test_batch = jax.eval_shape(lambda: test.whole(key))
        validation.losses(problem, params, hparams, train_batch, test_batch)
    return plan


class _Run:
    """One run: chunks until something ends it."""

    def __init__(self, plan, carry, sources, test, key, steps, tol, callbacks, began):
        self.plan, self.carry, self.sources, self.test = plan, carry, sources, test
        self.key, self.steps, self.tol, self.callbacks = key, steps, tol, callbacks
        self.began = began
        self.rows: list[np.ndarray] = []
        self.trail: list[np.ndarray] = []
        self.seconds: list[np.ndarray] = []
        self.done = 0
        self.ended: tuple[Status, str] | None = None
        self.chunk_length = 1

    def go(self, progress: bool) -> Result:
        from bilevel.progress import reporter

        try:
            with _Interrupt() as interrupt, reporter(progress, self.steps) as report:
                while self.ended is None:
                    self._advance()
                    report(self.done, self._row())
                    if interrupt.seen and self.ended is None:
                        self.ended = Status.INTERRUPTED, "interrupted by the user"
        except KeyboardInterrupt:
            self.ended = Status.INTERRUPTED, "interrupted by the user"
        except Exception as error:
            # From a callback or a data iterable: the user's own, passed on with what was computed.
            self.ended = Status.INTERRUPTED, f"{type(error).__name__} in a callback or an iterable"
            error.partial_result = self.result()  # type: ignore[attr-defined]
            error.add_note("bilevel: what was computed so far is in this exception's partial_result.")
            raise
        return self.result()

    # --- one chunk ---

    def _advance(self) -> None:
        length = self._next_length()
        sources, length = self._feed(length)
        if length == 0:
            return
        before = time.perf_counter()
        carry = loop.compiled(self.plan)(
            self.carry,
            np.int32(self.done + length),
            np.float64(self.tol),
            self.key,
            *sources,
            self.test,
        )
        self.carry = carry
        taken = int(carry.step) - self.done  # waits for the chunk
        after = time.perf_counter()
        rows = np.array(carry.rows[:taken] if taken == length == 1 else carry.rows)[:taken]
        self.rows.append(rows)
        self.trail.append(np.array(carry.trail)[:taken])
        self.seconds.append(before - self.began + (after - before) * np.arange(1, taken + 1) / max(taken, 1))
        first = self.done
        self.done += taken
        self._adapt(taken, after - before, first)
        status = Status(int(carry.status))
        if status == Status.CONVERGED:
            self.ended = status, f"the gradient norm is at most tol = {self.tol:g}"
        elif status != Status.RUNNING:
            self.ended = status, _why_diverged(self.history())
        if self.callbacks and self._callback_due():
            self._call_back()
        if self.ended is None and self.done >= self.steps:
            self.ended = Status.BUDGET, f"all {self.steps} outer steps are done"

    def _next_length(self) -> int:
        length = min(self.chunk_length, self.plan.capacity, self.steps - self.done)
        if self.callbacks:  # called at multiples of judge_every, whatever the machine's speed
            every = self.plan.judge_every
            length = min(length, every - self.done % every)
        return length

    def _adapt(self, taken: int, seconds: float, first: int) -> None:
        if first > 0 and taken:  # the first chunk compiles
            wanted = int(_CHUNK_SECONDS * taken / max(seconds, 1e-9))
            self.chunk_length = max(1, min(wanted, 16 * self.chunk_length, self.plan.capacity))

    def _feed(self, length: int):
        """Sources for the next steps, and how many steps they last; ends the run where they do not."""
        fed: list[Any] = []
        for source in self.sources:
            if isinstance(source, Feed):
                chunk, length = source.chunk(length, self.plan.capacity)
                if length == 0:
                    self.ended = Status.DATA_EXHAUSTED, str(source.why_ended)
                    return (), 0
                fed.append(chunk)
            else:
                fed.append(source)
        return fed, length

    def _callback_due(self) -> bool:
        return self.ended is not None or self.done % self.plan.judge_every == 0 or self.done >= self.steps

    def _call_back(self) -> None:
        history = self.history()
        first = getattr(self, "_told", 0)
        self._told = self.done
        rows = {name: column[first:] for name, column in history.items()}
        if len(rows["step"]) and any([callback(self.done, rows) is STOP for callback in self.callbacks]):
            self.ended = self.ended or (Status.INTERRUPTED, "a callback returned STOP")

    # --- what is reported ---

    def _row(self) -> dict[str, float]:
        if not self.rows:
            return {}
        return dict(zip(self.plan.columns, self.rows[-1][-1].tolist(), strict=True))

    def history(self) -> dict[str, np.ndarray]:
        """All rows so far as columns."""
        rows = np.concatenate(self.rows) if self.rows else np.zeros((0, len(self.plan.columns)))
        history: dict[str, np.ndarray] = {"step": np.arange(len(rows))}
        for name, column in zip(self.plan.columns, rows.T, strict=True):
            if name in _BOOLEAN:
                column = column.astype(bool)
            elif name in _INTEGER:
                column = column.astype(np.int32)
            history[name] = np.ascontiguousarray(column)
        history["seconds"] = np.concatenate(self.seconds) if self.seconds else np.zeros(0)
        return history

    def result(self) -> Result:
        """The result of the run as it stands."""
        state, history = self.carry.state, self.history()
        params, hparams = state.params, state.hparams
        best = self._best(params, hparams, history)
        status, message = self.ended or (Status.INTERRUPTED, "interrupted by the user")
        advice = _advice(history, status)
        if advice:
            warnings.warn(advice, RuntimeWarning, stacklevel=4)
        return Result(
            params=params,
            hparams=hparams,
            best=best,
            history=history,
            trajectory=self._trajectory(hparams),
            status=status,
            message=". ".join(part for part in (message, advice) if part) + ".",
            seconds=time.perf_counter() - self.began,
            state=state,
        )

    def _best(self, params, hparams, history) -> Best:
        if self.carry.best is not None and np.isfinite(self.carry.best[2]):
            best_params, best_hparams, value, step = self.carry.best
            return Best(best_params, best_hparams, float(value), int(step))
        good = np.flatnonzero(history["accepted"])
        value = float(history["value"][good[-1]]) if len(good) else float("nan")
        return Best(params, hparams, value, int(good[-1]) if len(good) else 0)

    def _trajectory(self, hparams) -> Trajectory:
        quantiles = loop.quantile_leaves(hparams)
        steps = np.arange(self.done)
        trail = np.concatenate(self.trail) if self.trail else np.zeros((0, loop.trail_width(hparams)))
        if any(quantiles):
            keep = steps % self.plan.judge_every == 0
            steps, trail = steps[keep], trail[keep]
        stride = -(-len(steps) // _TRAJECTORY_ROWS) or 1
        steps = np.append(steps[::stride], self.done)
        trail = np.concatenate([trail[::stride], loop.last_trail(hparams, trail.dtype)[None]])
        return Trajectory(steps, loop.unpack_trail(trail, hparams), quantiles)


class _Interrupt:
    """Turns the first Ctrl-C into a wish to stop after the chunk; the second one raises at once."""

    seen = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *exc):
        if self._main:
            signal.signal(signal.SIGINT, self._previous)


# --- Words -----------------------------------------------------------------------------------------


def _why_diverged(history) -> str:
    last = NonFinite(int(history["nonfinite"][-1]))
    step = int(history["step"][-1])
    if last & NonFinite.PARAMS:
        what = "params became non-finite: the inner loop diverges"
        fix = "lower the inner learning rate, or keep hparams in a range by constraints"
    elif last & NonFinite.VALUE:
        what = "the outer loss is not finite"
        fix = "look for a nan in the data, or an overflow in the loss"
    elif last & NonFinite.GRAD:
        what = "the hypergradient is not finite"
        fix = "look for a derivative that is (sqrt or norm at zero; Adam with eps_root=0 when unrolled)"
    else:
        what = "the outer update or an optimiser state became non-finite"
        fix = "lower the outer learning rate, or clip its gradient"
    return f"outer step {step}: {what}; {fix}. The last good state is kept"


def _advice(history, status: Status) -> str:
    """What a person should know of the linear solves and gradients of a run; empty where all is well."""
    accepted = history["accepted"]
    attempted = len(accepted)
    if not attempted:
        return ""
    negative = int(history["negative_curvature"].sum())
    error = history["error"]
    solved = np.isfinite(error) & (history["solver_steps"] > 0) & accepted
    parts = []
    if negative:
        parts.append(
            f"the inner Hessian was not positive definite in {negative} of {attempted} outer steps, where "
            "the hypergradient means little: take more inner steps, cg(damping=...) or a trajectory "
            "estimator (bilevel.unrolled)"
        )
    elif solved.sum() and np.median(error[solved]) > 0.3:
        parts.append(
            f"the linear solve left a relative residual of {np.median(error[solved]):.2g} (median): give "
            "the solver more steps"
        )
    if accepted.any() and np.all(history["grad_norm"][accepted] == 0) and status != Status.CONVERGED:
        parts.append(
            "the hypergradient was exactly zero throughout: does the validation loss of the trained "
            "parameters depend on hparams at all?"
        )
    return "; ".join(parts)
