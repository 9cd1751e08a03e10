"""Methods of the studies that search: configurations one after the other, each trained accurately."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import search
from benchmarks.found import TIME, Found, curve_of, rows_of, trained
from benchmarks.measure import seconds
from benchmarks.problems import Task


@dataclasses.dataclass(frozen=True)
class Search:
    """Proposals in the task's box, each trained from its start.

    Args:
      about: what it is, in a line.
      propose: what it tries next.
      check: raises StudyError where something it needs is missing.
    """

    about: str
    propose: search.Propose
    check: Callable[[], None] = lambda: None

    def refusal(self, task: Task) -> str:
        """It can tune anything."""
        del task
        return ""

    def warm_up(self, task: Task) -> float:
        """One training, in the middle of the box."""
        middle = task.spread(search.at(task.box, np.full(len(task.box), 0.5)))
        first, again = (seconds(trained, task, middle, task.valid) for _ in range(2))
        return max(first - again, 0.0)

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """The candidate is the best configuration."""
        points, best, best_values, examples = [], np.inf, None, 0
        per_product, per_value = rows_of(task)
        began = time.perf_counter()
        proposals = self.propose(task.box, seed)
        values, taken = next(proposals), 0.0
        while taken < budget:
            info, [(value, _)] = jax.device_get(trained(task, task.spread(values), task.valid))
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
