"""Hyperband with proposals of Optuna: training in pieces, and configurations that look bad are given up.

Of the steps that the task's solver takes at most, a configuration has been given a 27th, a 9th, a third and
all of them when it is looked at; each piece goes on from the params of the one before and begins the solver
anew, and the last may take all steps: up to a third more than training at once. Only those that come to the
end count. Where the inner loss has several minima, pieces may lead to another one than training at
once does: how good the best so far is, accurate training from the start says after the run.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from benchmarks import search
from benchmarks.found import TIME, Found, curve_of, rows_of, solve
from benchmarks.measure import seconds
from benchmarks.problems import Task

FACTOR, RUNGS = 3, (1, 3, 9, 27)
JUDGED = 48  # points of its curve


def pieces(solver) -> list[Any]:
    """The solver with the steps from one rung to the next; the last has as many as it had alone."""
    steps = np.diff([0, *RUNGS[:-1]]) * solver.max_steps // RUNGS[-1]
    return [dataclasses.replace(solver, max_steps=max(int(n), 1)) for n in steps] + [solver]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """`benchmarks.searches.Search` with a pruner."""

    about: str

    def check(self) -> None:
        """Raises StudyError where Optuna is missing."""
        search.check_optuna()

    def refusal(self, task: Task) -> str:
        """It can tune anything whose solver counts steps, as all do."""
        del task
        return ""

    def warm_up(self, task: Task) -> float:
        """One training in pieces, in the middle of the box."""
        hparams = task.spread(search.at(task.box, np.full(len(task.box), 0.5)))
        first, again = (seconds(lambda: list(trained(task, hparams))) for _ in range(2))
        return max(first - again, 0.0)

    def run(self, task: Task, budget: float, seed: int) -> Found:
        """The candidate is the best configuration that was trained to the end."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points, bests, best, tried, examples = [], [], np.inf, 0, 0
        per_product, per_value = rows_of(task)
        began = time.perf_counter()
        study = optuna.create_study(
            study_name=f"seed {seed}",  # brackets are drawn by it
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.HyperbandPruner(RUNGS[0], RUNGS[-1], FACTOR),
        )
        taken = 0.0
        while taken < budget:
            trial = study.ask()
            hparams = task.spread(
                {name: trial.suggest_float(name, *ends, log=True) for name, ends in task.box.items()}
            )
            value, products = told(study, trial, trained(task, hparams))
            examples += products * per_product + per_value
            tried += 1
            taken = time.perf_counter() - began
            if np.isfinite(value):
                points.append((taken, examples, value))
                bests.append(hparams if value < best else bests[-1])
                best = min(value, best)
        curve = curve_of(*np.reshape(points, (-1, 3)).T)
        return Found(
            curve=curve,
            seconds=taken,
            status=TIME,
            message=f"The time was up after {tried} configurations, {len(points)} of them to the end.",
            candidates=tuple(bests[-1:]),
            later=(lambda numbers: [bests[i] for i in numbers]) if bests else None,
            affordable=JUDGED,
            marked=int(np.argmin(curve[:, 2])) if bests else 0,
        )


def trained(task: Task, hparams):
    """Yields ``(rung, outer value, inner gradients)`` after every piece."""
    params = task.params
    for rung, solver in zip(RUNGS, pieces(task.solver), strict=True):
        params, *said = solve(task.problem, solver, params, hparams, task.train, task.valid)
        info, [(value, _)] = jax.device_get(said)
        yield rung, float(value), int(info.products)


def told(study, trial, values) -> tuple[float, int]:
    """The value to count, nan where it was given up or failed, and all inner gradients."""
    import optuna

    states, total = optuna.trial.TrialState, 0
    value = np.nan
    for rung, value, products in values:
        total += products
        if not np.isfinite(value):
            study.tell(trial, state=states.FAIL)
            return np.nan, total
        trial.report(value, rung)
        if rung < RUNGS[-1] and trial.should_prune():
            study.tell(trial, state=states.PRUNED)
            return np.nan, total
    study.tell(trial, value)
    return value, total
