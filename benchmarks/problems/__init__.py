"""The problems of the studies: ``PROBLEMS[name](seed)`` is a `Task`."""

from collections.abc import Callable

from benchmarks.problems import cleaning, kfold, logistic, mlp, quadratic, ridge
from benchmarks.problems.task import Task

PROBLEMS: dict[str, Callable[[int], Task]] = {
    "ridge": ridge.make,
    "logistic": logistic.make,
    "cleaning": cleaning.make,
    "mlp": mlp.make,
    "kfold": kfold.make,
    "quadratic": quadratic.make,
}

__all__ = ["PROBLEMS", "Task"]
