"""What a method of the studies is, and what its runs find: one protocol for gradients and searches.

``check`` says what is missing before anything runs. ``warm_up`` compiles everything that ``run`` will use and
returns the seconds that took: the first call, less a repeat of the same work. ``run`` is timed, and compiles
nothing.

The values of a gradient method are those of its history, at pairs (params, hparams) whose training has not
finished: an early pair may well be below every value of finished training, which is what a search measures.
So the hyperparameters that a gradient method has at several times are trained accurately too, after the run
and apart from its time, and methods are compared by these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Task
from bilevel.data import rows
from bilevel.problem import Draw, Point, outer_value

TIME = "TIME"


class Found(NamedTuple):
    """What a run found.

    ``curve``: seconds, examples, value and best value so far, shape (points, 4). ``candidates``:
    hyperparameters that deserve an accurate training; the best of them is the method's answer. ``later``: the
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


class Method(Protocol):
    """A way to find hyperparameters."""

    about: str

    def check(self) -> None:
        """Raises StudyError where something it needs is missing."""
        ...

    def refusal(self, task: Task) -> str:
        """Why it cannot tune this task, or nothing."""
        ...

    def warm_up(self, task: Task) -> float:
        """Compile; returns the seconds that took."""
        ...

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """At most about so many seconds."""
        ...


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(problem, solver, params, hparams, train, *batches):
    """Trained by the solver: ``(params, info of the solve, (outer value, metrics) on each of the batches)``.

    Values and metrics are nan where the inner loss or its gradient was not finite: the solver then stays
    where it was, and an untrained model is no answer.
    """
    point = Point(params)
    state = solver.init(problem, point, hparams)
    draw = Draw(lambda j: train, 1, False)
    end, _, info = solver.solve(problem, state, point, hparams, draw, jax.random.key(0))
    outer = [outer_value(problem, end.params, hparams, batch, None) for batch in batches]
    outer = jax.tree.map(lambda x: jnp.where(jnp.isfinite(info.residual), x, jnp.nan), outer)
    return end.params, info, outer


def trained(task: Task, hparams, *batches):
    """`solve` for a task, from its start, without params; hyperparameters are rounded to the task's."""
    hparams = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), hparams, task.hparams)
    return solve(task.problem, task.solver, task.params, hparams, task.train, *batches)[1:]


def rows_of(task: Task) -> tuple[int, int]:
    """Examples that a product with the inner Hessian touches, and a value of outer."""
    return rows(task.train), rows(task.valid)


def curve_of(times, examples, values) -> np.ndarray:
    """With the best value so far, which passes over what is not a number."""
    best = np.fmin.accumulate(np.append(np.inf, values))[1:]
    return np.stack([times, examples, values, best], axis=1).astype(float)
