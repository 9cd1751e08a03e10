"""The task "searches": what users pick instead, for the same seconds, and when the library is as good.

``python -m benchmarks.peers.searches PROBLEM ARM SEED SECONDS`` runs one of them and prints a line of JSON.
Searches train accurately at one proposal after the other, or give some up (`pruned`), in a space with an
axis for every hyperparameter. Compilation is in nobody's seconds. All are compared by accurate training from
the start: of the default of the library, and of training in pieces, at the hyperparameters they had, after
the run; nothing better than their answer counts.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search
from benchmarks.peers.handles import OURS, PYTHON, Handle
from benchmarks.peers.measured import CANNOT, FAILED, RIGHT, WRONG, Row, reached, reason

PROBLEMS = ("ridge", "lasso", "logistic", "mlp", "cleaning")
# Runs that find the same minimum are equally good: losses are float32, and params trained to a tolerance.
SLACK = 1e-3


# --- Arms -------------------------------------------------------------------------------------------------

PROPOSALS = {
    "Optuna, TPE": search.tpe,
    "Optuna, multivariate TPE": search.sampled(
        lambda samplers, seed: samplers.TPESampler(seed=seed, multivariate=True)
    ),
    "Optuna, CMA-ES": search.sampled(lambda samplers, seed: samplers.CmaEsSampler(seed=seed)),
}
HYPERBAND = "Optuna, TPE, Hyperband"
SAMPLERS = (*PROPOSALS, HYPERBAND)
MOST_AXES = 8  # of a grid
SKLEARN = "scikit-learn, CV"
ARMS = (OURS, *SAMPLERS, "random", "grid", SKLEARN)


def picked_by_sklearn(problem: str, seed: int) -> dict[str, Any]:
    """The loss of accurate training with its penalty, as other arms are judged."""
    from benchmarks.peers import by_sklearn

    if problem in by_sklearn.MISSING:
        return {CANNOT: by_sklearn.MISSING[problem]}
    from benchmarks import runner
    from benchmarks.peers.searched import task_of

    task = task_of(problem, seed)
    hparams, seconds = by_sklearn.picked(task)
    value = float(runner.trained(task, hparams)[0][0])
    return {"seconds": [seconds], "values": [value], "compile_seconds": 0.0}


def method_of(arm: str):
    """What `benchmarks.found.Method` says."""
    from benchmarks import methods, searches
    from benchmarks.peers.pruned import Pruned

    if arm == OURS:
        return methods.METHODS["default"]
    if arm == HYPERBAND:
        return Pruned(arm)
    if arm in PROPOSALS:
        return searches.Search(arm, PROPOSALS[arm], search.check_optuna)
    return searches.Search(arm, getattr(search, arm))


def curve(problem: str, arm: str, seed: int, budget: float) -> dict[str, Any]:
    """Seconds and the best loss of accurate training so far."""
    if arm == SKLEARN:
        return picked_by_sklearn(problem, seed)
    from benchmarks import runner
    from benchmarks.peers.searched import task_of

    task = task_of(problem, seed)
    if arm == "grid" and len(task.box) > MOST_AXES:
        return {CANNOT: f"a grid of {len(task.box)} axes has at least 3**{len(task.box)} points"}
    own = method_of(arm)
    own.check()
    compiled = own.warm_up(task)
    found = own.run(task, budget, seed)
    points = runner.thinned_curve(task, found)
    pairs = [(p.seconds, p.solved) for p in points if np.isfinite(p.solved)]
    if not pairs:
        return {FAILED: f"trained no configuration to the end in {budget:g} s"}
    best = np.minimum.accumulate([value for _, value in pairs])
    if found.later is not None:
        best = np.maximum(best, runner.judged(task, found.candidates)[0])
    return {"seconds": [t for t, _ in pairs], "values": best.tolist(), "compile_seconds": compiled}


def main(problem: str, arm: str, seed: str, budget: str) -> None:
    """What packages print goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = curve(problem, arm, int(seed), float(budget))
        except Exception as error:
            traceback.print_exc()
            answer = {FAILED: f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(answer))


# --- All of them ------------------------------------------------------------------------------------------


def rows(
    problem: str, arms: Sequence[str], seeds: Sequence[int], budget: float, core: int, log: Path
) -> list[Row]:
    """One for each arm."""
    return compared({arm: [_asked(problem, arm, seed, budget, core, log) for seed in seeds] for arm in arms})


def _asked(problem: str, arm: str, seed: int, budget: float, core: int, log: Path) -> dict[str, Any]:
    command = [str(PYTHON), "-m", "benchmarks.peers.searches", problem, arm, str(seed), repr(budget)]
    handle = Handle(command, core, log)
    answer = handle.ask({}, 10 * budget + 600)
    handle.close()
    return answer


def compared(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[Row]:
    """Of each arm the mean loss, and the seconds after which it is as good as the best sampler is at its end.

    As good is a loss higher by at most `SLACK`, relative. Seconds are those of each seed; inf where it is
    never that good.
    """
    without = {arm: reason(runs) for arm, runs in found.items()}
    whole = {arm: runs for arm, runs in found.items() if without[arm] is None}
    ends = [[run["values"][-1] for run in runs] for arm, runs in whole.items() if arm in SAMPLERS]
    targets = (1 + SLACK) * np.min(ends, axis=0) if ends else []
    rows = []
    for arm, runs in found.items():
        missing = without[arm]
        if missing is not None:
            rows.append(Row(arm, *missing))
            continue
        times = [reached(run, target) for run, target in zip(runs, targets, strict=False)]
        rows.append(
            Row(
                arm,
                RIGHT if np.all(np.isfinite(times)) else WRONG,
                compile_seconds=float(np.median([run["compile_seconds"] for run in runs])),
                seconds=tuple(times),
                value=float(np.mean([run["values"][-1] for run in runs])),
            )
        )
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
