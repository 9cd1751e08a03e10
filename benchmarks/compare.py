"""Two studies beside each other: what changed from the first to the second, and is it more than noise?

Runs of the same problem, method and seed are paired. Compared are logarithms of ratios, second over first:
of the final values, and of the seconds until they are close to the lowest value that either study knows.
Over n seeds their mean has the interval ``mean +- t s / sqrt(n)``, with s their standard deviation and t
the 97.5 % quantile of Student's distribution for n - 1 degrees. A change counts where that interval leaves
zero out and the change is above a least size; one seed has no spread, and never counts. Of many comparisons
one in twenty would have an interval without zero by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from benchmarks.measure import table
from benchmarks.rows import Job, Row, StudyError
from benchmarks.study import Study
from benchmarks.summary import WITHIN, by_problem, lowest_known, percent, reached

# Changes below these are none, however certain: of the value, and of the time.
LEAST_VALUE, LEAST_TIME = 1e-3, 0.1
LEGEND = f"""Ratios B / A over the paired seeds, with 95 % intervals. value: of the final outer value. time:
of the seconds until within {percent(WITHIN)} of the lowest value that either knows. change: what is more than
noise, and more than {percent(LEAST_VALUE)} of the value or {percent(LEAST_TIME)} of the time."""


class Change(NamedTuple):
    """A mean of logarithms of ratios and half the width of its interval, inf where it has none."""

    mean: float
    half: float
    seeds: int

    def counts(self, least: float) -> bool:
        """Whether it is more than noise, and more than a least ratio."""
        return abs(self.mean) > self.half and abs(self.mean) > math.log1p(least)

    def __str__(self) -> str:
        if not self.seeds:
            return "-"
        spread = f" ({_ratio(self.mean - self.half)} to {_ratio(self.mean + self.half)})"
        return _ratio(self.mean) + (spread if math.isfinite(self.half) else " (one seed)")


def _ratio(log: float) -> str:
    return f"{math.exp(min(log, 700.0)):.3g}"


def change(first: Sequence[float], second: Sequence[float]) -> Change:
    """Of paired positive numbers; pairs that are not both finite and positive are left out."""
    pairs = np.array([first, second], float).reshape(2, -1)
    logs = np.log(pairs[:, np.all(np.isfinite(pairs) & (pairs > 0), axis=0)])
    differences, n = logs[1] - logs[0], logs.shape[1]
    if n < 2:
        return Change(float(differences.mean()) if n else math.nan, math.inf, n)
    half = stdtrit(n - 1, 0.975) * differences.std(ddof=1) / math.sqrt(n)
    return Change(float(differences.mean()), float(half), n)


class Line(NamedTuple):
    """A method on a problem, in both studies."""

    problem: str
    method: str
    value: Change
    time: Change
    hits: tuple[int, int]
    says: str


def compared(first: dict[Job, Row], second: dict[Job, Row]) -> list[Line]:
    """A line for each problem and method of which both have runs of a seed."""
    both = [job for job in first if job in second]
    lowest = lowest_known([*first.values(), *second.values()])
    lines = []
    for problem, method in dict.fromkeys((job.problem, job.method) for job in both):
        jobs = [job for job in both if (job.problem, job.method) == (problem, method)]
        rows = [[study[job] for job in jobs] for study in (first, second)]
        times = [[reached(row, lowest[problem, row.seed]) for row in of_study] for of_study in rows]
        value = change(*([row.solved for row in of_study] for of_study in rows))
        time = change(*times)
        hits = tuple(int(np.isfinite(of_study).sum()) for of_study in times)
        lines.append(Line(problem, method, value, time, hits, _says(value, time, hits)))
    return lines


def _says(value: Change, time: Change, hits: tuple[int, int]) -> str:
    said = []
    if value.counts(LEAST_VALUE):
        said.append("better" if value.mean < 0 else "worse")
    if time.counts(LEAST_TIME):
        said.append("faster" if time.mean < 0 else "slower")
    if hits[0] != hits[1]:
        said.append(f"there on {hits[1]} seeds, not {hits[0]}")
    return ", ".join(said)


def show(first: Study, second: Study) -> None:
    """Print the comparison.

    Raises:
      StudyError: a study has no rows, or they have no run in common.
    """
    seconds = [study.settings()[0] for study in (first, second)]
    for study in (first, second):
        by_problem(study)
    rows = [study.rows() for study in (first, second)]
    lines = compared(*rows)
    if not lines:
        raise StudyError(
            f"{first.folder} and {second.folder} have no run in common: problem, method and seed."
        )
    for name, study, budget in zip("AB", (first, second), seconds, strict=True):
        commits = ", ".join(sorted({row.commit for row in study.rows().values()}))
        print(f"{name}: {study.folder}, {budget:g} s a run, commit {commits}")
    print(LEGEND)
    cells = [(f"{line.problem}, {line.method}", line.value.seeds, *line[2:4], line.says) for line in lines]
    table(("problem, method", "seeds", "value", "time", "change"), cells)
    alone = sum(len(study) for study in rows) - 2 * len(rows[0].keys() & rows[1].keys())
    marked = sum(bool(line.says) for line in lines)
    print(f"{marked} of {len(lines)} changed; {alone} runs have no partner in the other study.")
