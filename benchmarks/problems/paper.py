"""What the study of papers needs to know of one: its problem, seed by seed, and what is found of its claim.

A paper's module makes a `Case` for each seed and says in `Paper.evidence` what was seen of the claim, with
the figures that decide. All arms find hyperparameters for the same case and are judged alike, by training
anew.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel

VERDICTS = ("holds", "holds in part", "does not hold here", "cannot be tested here")


class Score(NamedTuple):
    """Of one training at some hyperparameters; lower is better.

    ``valid`` is what all arms minimise; ``test`` is what no arm sees.
    """

    valid: float
    test: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with its data, of one seed.

    Args:
      problem: see `bilevel.optimize`, as the next six.
      params: see there.
      hparams: the default, what a user has who tunes nothing; gradient arms begin here.
      train: see there.
      valid: see there.
      method: see there.
      steps: outer steps.
      box: ends of each number that searches try, in natural units; they search its logarithm.
      spread: hyperparameters made of such numbers.
      judge: trains anew at hyperparameters and returns the `Score`; a jitted function of (hparams, key). The
        key decides about starts and orders. Searches see the value for one key, the final judgement is of
        others.
      model_state: see `bilevel.optimize`.
    """

    problem: Any
    params: Any
    hparams: Any
    train: Any
    valid: Any
    method: Any
    steps: int
    box: Mapping[str, tuple[float, float]]
    spread: Callable[[Mapping[str, Any]], Any]
    judge: Callable[[Any, Any], Score]
    model_state: Any = None


class Answer(NamedTuple):
    """Hyperparameters that an arm found, and the trainings (or outer steps) that took."""

    hparams: Any
    tried: int


Arm = Callable[[Case, float, int], Answer]
"""Of a case, CPU seconds and a seed."""


class Evidence(NamedTuple):
    """What was seen of a claim.

    Args:
      verdict: one of `VERDICTS`.
      sentence: with the figures that decide.
      draw: draws them into the axes of a picture.
    """

    verdict: str
    sentence: str
    draw: Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Paper:
    """An idea of the literature as a problem of about a minute.

    Args:
      title: of the problem, a few words.
      source: authors, year, identifier.
      claim: one sentence.
      case: of a seed.
      evidence: of the cases and of what each arm answered for them, both by seed: ``answers[seed][arm]`` for
        ``cases[seed]``.
      unit: of the test score.
      arms: further ones, or others for those of the same name; None leaves one out.
    """

    title: str
    source: str
    claim: str
    case: Callable[[int], Case]
    evidence: Callable[[Mapping[int, Case], Mapping[int, Mapping[str, Answer]]], Evidence]
    unit: str
    arms: Mapping[str, Arm | None] = dataclasses.field(default_factory=dict)


# --- What arms are made of ---------------------------------------------------------------------------------


def key_of(seed: int, use: int):
    """0: of the gradient arm; 1: what searches are scored by; from 2 on: of the judges."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(7), seed), use)


def scored(case: Case, hparams, key) -> Score:
    """A training; nan scores are infinite."""
    found = jax.device_get(case.judge(hparams, key))
    return Score(*(float(np.nan_to_num(x, nan=np.inf)) for x in found))


def tuned(case: Case, seed: int, steps: int) -> bilevel.Result:
    """A run of `bilevel.optimize` from the default."""
    with warnings.catch_warnings():
        # What a run is warned of is in its result.
        warnings.simplefilter("ignore", RuntimeWarning)
        return bilevel.optimize(
            case.problem, case.params, case.hparams, case.train, case.valid, case.method, steps,
            key=key_of(seed, 0), model_state=case.model_state, progress=False,
        )  # fmt: skip
