"""``bench list``: the problems and methods of the studies, and the two sizes of a run."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.methods import METHODS
from benchmarks.problems import LARGE, PROBLEMS
from benchmarks.rows import StudyError


class Size(NamedTuple):
    """What a run takes that is not asked for."""

    problems: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    seconds: float


_QUICK = ("default", "implicit", "unrolled", "random", "optuna")
_NOT_QUICK = (*LARGE, "kfold")
SIZES = {
    "quick": Size(
        tuple(name for name in PROBLEMS if name not in _NOT_QUICK),
        _QUICK,
        (0, 1),
        0.5,
    ),
    "full": Size(tuple(PROBLEMS), tuple(METHODS), (0, 1, 2, 3, 4), 5.0),
}


def show() -> None:
    """Print both tables and the sizes."""
    print("Problems, with the hyperparameters that are tuned and where the data are from:")
    for name, entry in PROBLEMS.items():
        print(f"  {name:<16} {entry.hparams:>4}  {_in(name, 'problems'):<12} {entry.about}; {entry.source}")
    print("\nMethods:")
    for name, method in METHODS.items():
        print(f"  {name:<16} {_in(name, 'methods'):<12} {method.about}")
    print("\nSizes:")
    for name, size in SIZES.items():
        runs = len(size.problems) * len(size.methods) * len(size.seeds)
        print(f"  --{name}: {runs} runs of {size.seconds:g} s, seeds {' '.join(map(str, size.seeds))}")


def _in(name: str, kind: str) -> str:
    return "quick, full" if name in getattr(SIZES["quick"], kind) else "full"


def check_extras() -> None:
    """Raises StudyError where scikit-learn, which has the data, is missing."""
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        raise StudyError(
            "the problems need scikit-learn, which is missing; install it with: pip install -e '.[bench]'."
        ) from None
