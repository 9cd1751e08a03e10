"""The cases of the hypergradient tasks: an instance in a file, with the right answer beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers import instances
from benchmarks.peers.measured import Question

# A right answer: at most twice the error of as many steps of conjugate gradients in numpy, plus rounding.
FACTOR, ROUNDING = 2.0, {"float32": 1e-4, "float64": 1e-8}
DTYPES = tuple(ROUNDING)
ALONG_POINTS, ALONG_ERROR = 20, 1e-3


def implicit(folder: Path, instance: instances.Instance) -> list[Question]:
    expected = instances.implicit(instance)
    few = instances.relative(instances.implicit(instance, instances.CG_STEPS), expected)
    file = folder / "implicit.npz"
    instances.save(file, instance, expected=expected)
    return [
        Question("implicit", instances.CG_STEPS, file, dtype, FACTOR * few + rounding)
        for dtype, rounding in ROUNDING.items()
    ]


def unrolled(folder: Path, instance: instances.Instance) -> list[Question]:
    instance = instance._replace(w=np.zeros_like(instance.w))
    file = folder / "unrolled.npz"
    instances.save(file, instance, expected=instances.unrolled(instance))
    setting = [instances.UNROLLED_STEPS, instances.UNROLLED_RATE]
    return [Question("unrolled", setting, file, dtype, rounding) for dtype, rounding in ROUNDING.items()]


def along(folder: Path, instance: instances.Instance) -> list[Question]:
    """The setting is the number of CG steps that all points need at most."""
    ws, hs, expected = instances.run(instance, ALONG_POINTS)
    file = folder / "along.npz"
    instances.save(file, instance._replace(w=ws, h=hs), expected=expected)
    steps = max(
        instances.steps_needed(instance._replace(w=w, h=h), right, ALONG_ERROR)
        for w, h, right in zip(ws, hs, expected, strict=True)
    )
    return [Question("along", steps, file, dtype, ALONG_ERROR) for dtype in DTYPES]


# Of each task its problems.
TASKS: dict[str, tuple[Callable[[Path, instances.Instance], list[Question]], tuple[str, ...]]] = {
    "implicit": (implicit, ("logistic",)),
    "unrolled": (unrolled, ("logistic", "rate")),
    "along": (along, ("logistic", "cleaning")),
}
