"""What a peer is to this benchmark, and what a prepared case of it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Of the task "along". Tolerances are of the residual, as each peer measures it; the largest that is accurate
# enough is looked for.
TOLERANCES = (
    0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 5e-3, 3e-3, 2e-3, 1e-3, 7e-4, 5e-4, 3e-4, 2e-4, 1e-4, 5e-5,
)  # fmt: skip
MOST_STEPS = 200


class Case(NamedTuple):
    """A prepared call.

    ``call`` returns the answer as a numpy array. ``compile_seconds`` and ``megabytes``, temporary memory, are
    what the compiler says; None where nothing was compiled: then the memory of the process is watched.
    """

    call: Callable[[], np.ndarray]
    compile_seconds: float | None = None
    megabytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to differentiate.

    Args:
      name: in tables.
      packages: distributions whose versions are told.
      family: the module that prepares its calls, `in_jax` or `in_torch`.
      tasks: for each task a maker ``(kind, setting) -> fn(w, h, train, valid)``, or why there is none. In
        the task "along", w and h have an axis of points in front, and so has what is returned; in the task
        "cold" ``(kind, steps) -> fn(instance)``, which returns times and hyperparameters at `cold.looks`.
      settings: in the task "along", from the cheapest to the most accurate; empty for the number of CG steps
        that suffices in numpy, or the next larger one that does.
    """

    name: str
    packages: tuple[str, ...]
    family: str
    tasks: Mapping[str, Callable[[str, Any], Callable] | str]
    settings: Sequence[Any] = ()


def solver_peer(
    name: str,
    packages: tuple[str, ...],
    family: ModuleType,
    implicit: Callable,
    unrolled: Callable | str,
    tolerances: Sequence[float] = (),
) -> Peer:
    """A peer whose tasks "along" and "cold" follow from its maker for "implicit".

    With ``tolerances``, the settings of "along", that maker is ``(kind, steps, tol)``, with a default of 0.
    """
    point = (lambda kind, tol: implicit(kind, MOST_STEPS, tol)) if tolerances else implicit
    return Peer(
        name=name,
        packages=packages,
        family=family.__name__.rpartition(".")[2],
        tasks={
            "implicit": implicit,
            "unrolled": unrolled,
            "along": family.along(point),
            "cold": family.outer_run(implicit),
        },
        settings=tolerances,
    )
