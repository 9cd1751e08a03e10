"""The task "searches": what users pick instead, for the same seconds, and when the library is as good.

``python -m benchmarks.peers.searches PROBLEM ARM SEED SECONDS`` runs one of them and prints a line of JSON.
Searches train accurately at one proposal after the other. On "logistic" they choose one penalty for each
feature, on "mlp" one weight decay for each layer. Compilation is in nobody's seconds. The default of the
library is judged by accurate training at the hyperparameters it had, after its run; nothing better than its
answer counts.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import search
from benchmarks.peers.handles import OURS, PYTHON, ROOT, environment
from benchmarks.peers.measured import CANNOT, FAILED, RIGHT, WRONG, Row, reached, reason

PROBLEMS = ("logistic", "mlp")


# --- Arms -------------------------------------------------------------------------------------------------

SAMPLERS = {
    "Optuna, TPE": search.tpe,
    "Optuna, multivariate TPE": search.sampled(
        lambda samplers, seed: samplers.TPESampler(seed=seed, multivariate=True)
    ),
    "Optuna, CMA-ES": search.sampled(lambda samplers, seed: samplers.CmaEsSampler(seed=seed)),
}
MOST_AXES = 8  # of a grid
SKLEARN = "scikit-learn, LogisticRegressionCV"
ARMS = (OURS, *SAMPLERS, "random", "grid", SKLEARN)


def task_of(problem: str, seed: int):
    """With one number to search for each penalty."""
    from benchmarks.problems import PROBLEMS

    task = PROBLEMS[problem].make(seed)
    if problem != "logistic":
        return task
    names = [f"feature {i}" for i in range(len(task.hparams["l2"]))]
    return dataclasses.replace(
        task,
        box=dict.fromkeys(names, (1e-5, 1e1)),
        spread=lambda values: {"l2": np.float32([values[name] for name in names])},
    )


def by_sklearn(problem: str, seed: int) -> dict[str, Any]:
    """One penalty for all features, of 50, by the same validation rows."""
    if problem != "logistic":
        return {CANNOT: "fits no networks"}
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit

    from benchmarks import runner

    task = task_of(problem, seed)
    x, y = (np.concatenate([task.train[name], task.valid[name]]) for name in "xy")
    rows = len(task.train["y"])
    split = PredefinedSplit(np.where(np.arange(len(y)) < rows, -1, 0))
    began = time.perf_counter()
    model = LogisticRegressionCV(Cs=np.logspace(-4, 4, 50), cv=split, scoring="neg_log_loss", max_iter=1000)
    strength = float(np.ravel(model.fit(x, y).C_)[0])
    seconds = time.perf_counter() - began
    hparams = {"l2": np.full_like(task.hparams["l2"], 1 / (strength * rows))}
    value = float(runner.trained(task, hparams)[0][0])
    return {"seconds": [seconds], "values": [value], "compile_seconds": 0.0}


def curve(problem: str, arm: str, seed: int, budget: float) -> dict[str, Any]:
    """Seconds and the best loss of accurate training so far."""
    from benchmarks import methods, runner, searches

    if arm == SKLEARN:
        return by_sklearn(problem, seed)
    task = task_of(problem, seed)
    if arm == "grid" and len(task.box) > MOST_AXES:
        return {CANNOT: f"a grid of {len(task.box)} axes has at least 3**{len(task.box)} points"}
    if arm == OURS:
        own: Any = methods.METHODS["default"]
    elif arm in SAMPLERS:
        own = searches.Search(arm, SAMPLERS[arm], search.check_optuna)
    else:
        own = searches.Search(arm, getattr(search, arm))
    own.check()
    compiled = own.warm_up(task)
    found = own.run(task, budget, seed)
    points = runner.thinned_curve(task, found)
    pairs = [(p.seconds, p.solved) for p in points if np.isfinite(p.solved)]
    best = np.minimum.accumulate([value for _, value in pairs])
    if found.later is not None:
        best = np.maximum(best, runner.judged(task, found.candidates)[0])
    return {"seconds": [t for t, _ in pairs], "values": best.tolist(), "compile_seconds": compiled}


def main(problem: str, arm: str, seed: str, budget: str) -> None:
    print(json.dumps(curve(problem, arm, int(seed), float(budget))))


# --- All of them ------------------------------------------------------------------------------------------


def rows(problem: str, seeds: Sequence[int], budget: float) -> list[Row]:
    """One for each arm."""
    return compared({arm: [_asked(problem, arm, seed, budget) for seed in seeds] for arm in ARMS})


def _asked(problem: str, arm: str, seed: int, budget: float) -> dict[str, Any]:
    command = [str(PYTHON), "-m", "benchmarks.peers.searches", problem, arm, str(seed), repr(budget)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=10 * budget + 600
        )
    except subprocess.TimeoutExpired:
        return {FAILED: "did not end"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["nothing was printed"]
        return {FAILED: said[-1][:200]}
    return json.loads(lines[-1])


def compared(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[Row]:
    """Of each arm the mean loss, and the seconds after which it is as good as the best sampler is at its end.

    Seconds are those of each seed; inf where it is never that good.
    """
    without = {arm: reason(runs) for arm, runs in found.items()}
    whole = {arm: runs for arm, runs in found.items() if without[arm] is None}
    ends = [[run["values"][-1] for run in runs] for arm, runs in whole.items() if arm in SAMPLERS]
    targets = np.min(ends, axis=0) if ends else []
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
