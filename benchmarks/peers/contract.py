"""What a peer is to this benchmark, and what a prepared case of it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


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
