"""What a search tries next: generators that yield values and are sent the outer value found there.

A box maps names to lower and upper ends; all searches work on the logarithms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from benchmarks.rows import StudyError

Box = Mapping[str, tuple[float, float]]
Proposals = Generator[dict[str, float], float, None]
Propose = Callable[[Box, int], Proposals]


def at(box: Box, unit: np.ndarray) -> dict[str, float]:
    """The values at a point of the unit cube."""
    return {
        name: float(low * (high / low) ** u) for (name, (low, high)), u in zip(box.items(), unit, strict=True)
    }


def random(box: Box, seed: int) -> Proposals:
    """Independent points."""
    rng = np.random.default_rng(seed)
    while True:
        yield at(box, rng.random(len(box)))


def grid(box: Box, seed: int) -> Proposals:
    """The full factorial of 1, 3, 5, 9, 17, ... levels, without the points of the one before.

    A grid is finished before the next one begins; its points come in an order drawn by the seed, so that one
    that the time cuts off is not missing a corner.
    """
    rng = np.random.default_rng(seed)
    yield at(box, np.full(len(box), 0.5))
    for level in itertools.count(1):
        intervals = 2**level
        shape = (intervals + 1,) * len(box)
        for number in rng.permutation(np.prod(shape)):
            index = np.array(np.unravel_index(number, shape))
            # Even everywhere: a point of the level before; that of level 0 is only the middle.
            old = np.all(index % 2 == 0) if level > 1 else np.all(index == 1)
            if not old:
                yield at(box, index / intervals)


def sampled(make: Callable[[Any, int], Any]) -> Propose:
    """Proposals of the Optuna sampler ``make(optuna.samplers, seed)``."""

    def propose(box: Box, seed: int) -> Proposals:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make(optuna.samplers, seed))
        while True:
            trial = study.ask()
            value = yield {name: trial.suggest_float(name, *ends, log=True) for name, ends in box.items()}
            if np.isfinite(value):
                study.tell(trial, value)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)

    return propose


# The tree-structured Parzen estimator.
tpe = sampled(lambda samplers, seed: samplers.TPESampler(seed=seed))


def check_optuna() -> None:
    """Raises StudyError where it is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise StudyError(
            "the method optuna needs optuna, which is missing; install it with: pip install -e '.[bench]'."
        ) from None
