"""The arms of a study: ways to find hyperparameters, under one protocol.

``check`` says what is missing before anything runs. ``warm_up`` compiles everything that ``run`` will use and
returns the seconds that took: the first call, less a repeat of the same work. ``run`` is timed, and compiles
nothing.

The values of a gradient arm are those of its history, at pairs (params, hparams) whose training has not
finished: an early pair may well be below every value of finished training, which is what a search measures.
So the hyperparameters that a gradient arm has at several times are trained accurately too, after the run and
apart from its time, and arms are compared by these.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import search
from benchmarks.measure import seconds
from benchmarks.problems import Task
from bilevel.data import rows
from bilevel.problem import Draw, Point, outer_value
from bilevel.result import COUNT_COLUMNS

# Outer steps between looks at the clock.
EVERY = 5
TIME = "TIME"


class Found(NamedTuple):
    """What a run found.

    ``curve``: seconds, examples, value and best value so far, shape (points, 4). ``candidates``:
    hyperparameters that deserve an accurate training; the best of them is the arm's answer. ``later``: the
    hyperparameters that it had after some points of the curve, given their numbers, ``affordable``, how many
    one may ask for, and ``marked``, the one whose hyperparameters are those of the best pair; None where the
    values are of accurate training already.
    """

    curve: np.ndarray
    seconds: float
    status: str
    message: str
    candidates: tuple[Any, ...]
    later: Callable[[Sequence[int]], list] | None = None
    affordable: int = 0
    marked: int = 0


class Arm(Protocol):
    """A way to find hyperparameters."""

    def check(self) -> None:
        """Raises StudyError where something it needs is missing."""
        ...

    def warm_up(self, task: Task) -> float:
        """Compile; returns the seconds that took."""
        ...

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """At most about so many seconds."""
        ...


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(problem, solver, params, hparams, train, *batches):
    """Params trained accurately: ``(info of the solve, (outer value, metrics) on each of the batches)``.

    All are nan where the inner loss or its gradient was not finite: the solver then stays where it was, and
    an untrained model is no answer.
    """
    point = Point(params)
    state = solver.init(problem, point, hparams)
    draw = Draw(lambda j: train, 1, False)
    end, _, info = solver.solve(problem, state, point, hparams, draw, jax.random.key(0))
    outer = [outer_value(problem, end.params, hparams, batch, None) for batch in batches]
    return info, jax.tree.map(lambda x: jnp.where(jnp.isfinite(info.residual), x, jnp.nan), outer)


def curve_of(times, examples, values) -> np.ndarray:
    """With the best value so far, which passes over what is not a number."""
    best = np.fmin.accumulate(np.append(np.inf, values))[1:]
    return np.stack([times, examples, values, best], axis=1).astype(float)


def recorded(result: bilevel.Result, points: Sequence[int]) -> list:
    """Hyperparameters after these outer steps, from the trajectory."""
    rows = np.searchsorted(result.trajectory.steps, np.asarray(points) + 1)
    return [jax.tree.map(lambda leaf: leaf[row], result.trajectory.hparams) for row in rows]  # noqa: B023


@dataclasses.dataclass(frozen=True)
class Gradient:
    """`bilevel.optimize`, until the task's steps are done or the time is up."""

    method: Callable[[Task], Any]

    def check(self) -> None:
        """Nothing is needed."""

    def warm_up(self, task: Task) -> float:
        """One outer step: how many there are is an argument of the compiled program."""
        first, again = (seconds(lambda: self._optimize(task, 1, ()).params) for _ in range(2))
        return max(first - again, 0.0)

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """The two candidates are the hyperparameters of the best pair and those at the end."""
        del seed  # no randomness: the data are used whole
        began = time.perf_counter()

        def out_of_time(step, rows):
            return bilevel.STOP if time.perf_counter() - began >= budget else None

        result = self._optimize(task, task.steps, out_of_time)
        taken = time.perf_counter() - began
        history = result.history
        stopped = result.status == bilevel.Status.INTERRUPTED
        if stopped and taken < budget:
            raise KeyboardInterrupt  # by a person, and not by the clock
        examples = np.cumsum(sum(history[name].astype(float) for name in COUNT_COLUMNS))
        ended = TIME, f"The time was up after {len(examples)} outer steps."
        status, message = ended if stopped else (result.status.name, result.message)
        # The library records no more than quantiles of many hyperparameters.
        exact = not any(result.trajectory.quantiles)
        return Found(
            curve=curve_of(history["seconds"], examples, history["value"]),
            seconds=taken,
            status=status,
            message=message,
            candidates=(result.best.hparams, result.hparams),
            later=functools.partial(recorded, result) if exact else functools.partial(self._again, task),
            affordable=48 if exact else 16,
            marked=max(result.best.step - 1, 0),
        )

    def _again(self, task: Task, points: Sequence[int]) -> list:
        """Hyperparameters after these outer steps, by shorter runs, which go the same way."""
        return [self._optimize(task, int(point) + 1, ()).hparams for point in points]

    def _optimize(self, task: Task, steps: int, callbacks) -> bilevel.Result:
        with warnings.catch_warnings():
            # What a run is warned of stands in its message, and in the row.
            warnings.simplefilter("ignore", RuntimeWarning)
            return bilevel.optimize(
                task.problem, task.params, task.hparams, task.train, task.valid, self.method(task), steps,
                callbacks=callbacks, judge_every=EVERY, progress=False,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Search:
    """Configurations one after the other, each trained accurately from the task's start."""

    propose: search.Propose
    check: Callable[[], None] = lambda: None

    def warm_up(self, task: Task) -> float:
        """One training, in the middle of the box."""
        middle = task.spread(search.at(task.box, np.full(len(task.box), 0.5)))
        first, again = (seconds(self._train, task, middle) for _ in range(2))
        return max(first - again, 0.0)

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """The candidate is the best configuration."""
        points, best, best_values, examples = [], np.inf, None, 0
        per_product, per_value = rows(task.train), rows(task.valid)
        began = time.perf_counter()
        proposals = self.propose(task.box, seed)
        values, taken = next(proposals), 0.0
        while taken < budget:
            info, [(value, _)] = jax.device_get(self._train(task, task.spread(values)))
            value = float(value)
            examples += int(info.products) * per_product + per_value
            if best_values is None or value < best:
                best, best_values = np.fmin(value, np.inf), values
            taken = time.perf_counter() - began
            points.append((taken, examples, value))
            values = proposals.send(value)
        return Found(
            curve=curve_of(*np.asarray(points).T),
            seconds=taken,
            status=TIME,
            message=f"The time was up after {len(points)} configurations.",
            candidates=(task.spread(best_values),),
        )

    def _train(self, task: Task, hparams):
        return solve(task.problem, task.solver, task.params, hparams, task.train, task.valid)


@functools.cache
def fixed_schedule(rate: float):
    """The usual fixed schedule; made once for each rate, as equal optax transformations are not equal."""
    return bilevel.alternating(
        bilevel.implicit(bilevel.cg(max_steps=20, tol=0.0)),
        optax.sgd(rate),
        optax.adam(0.1),
        inner_steps=20,
    )


ARMS: dict[str, Arm] = {
    "default": Gradient(lambda task: None),
    "fixed": Gradient(lambda task: fixed_schedule(task.rate)),
    "random": Search(search.random),
    "grid": Search(search.grid),
    "optuna": Search(search.tpe, search.check_optuna),
}
