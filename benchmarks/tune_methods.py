"""The search for the tuned settings of the families of methods, recorded in ``tuned.json``.

Every setting of a family's grid (`benchmarks.methods.FAMILIES`) runs on the problems of the quick size, but
the folds, that the family takes, at seeds that no report uses. The score of a run is ``log10(max(excess,
1e-4))``, with the excess of its final value over the lowest that any run of this search or of the default
found on that problem and seed, and a tenfold excess for a run without a value. The setting with the lowest
mean over problems and seeds is the family's tuned one: one setting for all problems, as is the documented
one.

``python -m benchmarks.tune_methods [FAMILY ...]`` goes on where it was interrupted: its rows are in
``benchmarks/results/tune``. A family that is not named keeps its record.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks import catalogue, machine, runner
from benchmarks.measure import table
from benchmarks.methods import FAMILIES, METHODS, TUNED_PATH, Method, Setting
from benchmarks.rows import REFUSED, Job, Row
from benchmarks.study import Request, Study
from benchmarks.summary import excess, lowest_known

SEEDS, SECONDS = (100,), 1.0
# Five folds of ridge regression are much like one.
SEARCHED = tuple(name for name in catalogue.SIZES["quick"].problems if name != "kfold")
FOLDER = Path(__file__).parent / "results" / "tune"
LEAST, LOST = 1e-4, 10.0


def name_of(family: str, setting: Setting) -> str:
    """Of a method at a setting, in the rows of this search."""
    return f"{family}@{'_'.join(f'{value:g}' for value in setting)}"


def candidates(families: Iterable[str]) -> dict[str, Method]:
    """All settings of their grids, and the default, which the lowest known values need."""
    found: dict[str, Method] = {"default": METHODS["default"]}
    for family in families:
        for setting in FAMILIES[family].settings:
            found[name_of(family, setting)] = FAMILIES[family].at(setting)
    return found


def scores(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Of each method and problem the mean score over its seeds; without the problems that it refuses."""
    rows = [row for row in rows if row.status != REFUSED]
    lowest, found = lowest_known(rows), {}
    for row in rows:
        above = float(excess(row.solved, lowest[row.problem, row.seed]))
        score = np.log10(np.clip(np.nan_to_num(above, nan=LOST, posinf=LOST), LEAST, LOST))
        found.setdefault(row.method, {}).setdefault(row.problem, []).append(score)
    return {
        method: {problem: round(float(np.mean(values)), 4) for problem, values in of_method.items()}
        for method, of_method in found.items()
    }


def winners(families: Iterable[str], found: dict[str, dict[str, float]]) -> dict[str, Setting]:
    """The setting of the lowest mean score over problems, of each family."""

    def mean(family: str, setting: Setting) -> float:
        return float(np.mean(list(found[name_of(family, setting)].values())))

    return {
        family: min(FAMILIES[family].settings, key=functools.partial(mean, family)) for family in families
    }


def search(families: list[str]) -> None:
    """Run what is missing, and write the record."""
    methods = candidates(families)
    request, study = Request(SEARCHED, tuple(methods), SEEDS), Study(FOLDER)
    command = f"python -m benchmarks.tune_methods {' '.join(families)}"
    study.ask(request, SECONDS)

    def run(job: Job) -> Row:
        row = runner.run(job, SECONDS, command, methods, fresh=False)
        print(f"  {job}: {row.solved:.6g}, {row.status}", flush=True)
        return row

    study.work(request.jobs(), run)
    rows = [row for job, row in study.rows().items() if job in set(request.jobs())]
    found = scores(rows)
    best = winners(families, found)
    before = json.loads(TUNED_PATH.read_text()) if TUNED_PATH.exists() else {}
    kept = {name: value for name, value in before.get("scores", {}).items() if name not in found}
    load = [round(f(row.machine.load for row in rows), 1) for f in (min, max)]
    made = {"command": command, "commit": machine.commit(), "load": load}
    record = {
        "runs": before.get("runs", {}) | dict.fromkeys(families, made),
        "score": "mean of log10(max(excess over the lowest known, 1e-4)) over seeds, by problem",
        "setting": list(Setting._fields),
        "seconds": SECONDS,
        "seeds": SEEDS,
        "winners": before.get("winners", {}) | best,
        "scores": kept | found,
    }
    TUNED_PATH.write_text(json.dumps(record, indent=1) + "\n")
    lines = [(name, *(found[name].get(problem, "-") for problem in SEARCHED)) for name in methods]
    table(("score", *SEARCHED), lines)
    for family, setting in best.items():
        print(f"  {family}: {setting}")


def main() -> None:
    """All families."""
    search(list(FAMILIES))


if __name__ == "__main__":
    if unknown := [name for name in sys.argv[1:] if name not in FAMILIES]:
        sys.exit(f"error: no family {', '.join(unknown)}; choose from: {', '.join(FAMILIES)}")
    search(sys.argv[1:] or list(FAMILIES))
