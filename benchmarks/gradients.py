"""Methods of the studies that follow hypergradients: `bilevel.optimize`, with what it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.found import TIME, Found, curve_of
from benchmarks.measure import seconds
from benchmarks.problems import Task
from bilevel.result import COUNT_COLUMNS


@dataclasses.dataclass(frozen=True)
class Gradient:
    """`bilevel.optimize`, until the task's steps are done or the time is up.

    Args:
      about: what it is and how it is set, in a line.
      make: its method for a task; equal ones are compiled once.
      sampled: whether it draws minibatches, always the same ones, of the task's size; refused where the task
        has none.
      double: whether it takes float64 and the problem's constants; refused where the task has none.
      longer: outer steps for each of the task's, where a step is cheap.
      every: outer steps between looks at the clock and at the best value.
    """

    about: str
    make: Callable[[Task], object]
    sampled: bool = False
    double: bool = False
    longer: int = 1
    every: int = 5

    def check(self) -> None:
        """Nothing is needed."""

    def refusal(self, task: Task) -> str:
        """By what it takes and the task does not have."""
        if self.sampled and task.batch is None:
            return "The data of this problem only make sense whole, and this method draws minibatches."
        if self.double and task.smoothness is None:
            return "The constants of this problem are not known, and this method's line search needs them."
        return ""

    def warm_up(self, task: Task) -> float:
        """One outer step: how many there are is an argument of the compiled program."""
        first, again = (seconds(lambda: self._optimize(task, 1, 0, ()).params) for _ in range(2))
        return max(first - again, 0.0)

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """The two candidates are the hyperparameters of the best pair and those at the end."""
        began = time.perf_counter()

        def out_of_time(step, rows):
            return bilevel.STOP if time.perf_counter() - began >= budget else None

        result = self._optimize(task, self.longer * task.steps, seed, out_of_time)
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
            later=functools.partial(recorded, result)
            if exact
            else functools.partial(self._again, task, seed),
            affordable=48 if exact else 16,
            marked=max(result.best.step - 1, 0),
        )

    def _again(self, task: Task, seed: int, points: Sequence[int]) -> list:
        """Hyperparameters after these outer steps, by shorter runs, which go the same way."""
        return [self._optimize(task, int(point) + 1, seed, ()).hparams for point in points]

    def _optimize(self, task: Task, steps: int, seed: int, callbacks) -> bilevel.Result:
        method = self.make(task)
        with contextlib.ExitStack() as stack:
            # What a run is warned of stands in its message, and in the row.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)
            problem, data = task.problem, (task.train, task.valid)
            start = task.params, task.hparams
            if self.double:
                stack.enter_context(jax.enable_x64(True))
                problem = dataclasses.replace(problem, smoothness=task.smoothness)
                start, data = doubled((start, data))
            if self.sampled:
                data = tuple(bilevel.minibatches(level, task.batch, fixed=True) for level in data)
            return bilevel.optimize(
                problem, *start, *data, method, steps, jax.random.key(seed),
                callbacks=callbacks, judge_every=self.every, progress=False,
            )  # fmt: skip


def doubled(tree):
    """Floating arrays as float64, where that is enabled."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype.kind == "f" else x, tree)


def recorded(result: bilevel.Result, points: Sequence[int]) -> list:
    """Hyperparameters after these outer steps, from the trajectory."""
    rows = np.searchsorted(result.trajectory.steps, np.asarray(points) + 1)
    return [jax.tree.map(lambda leaf: leaf[row], result.trajectory.hparams) for row in rows]  # noqa: B023
