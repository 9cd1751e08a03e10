"""What the rows of a study say, in numbers; all are of accurate training at the hyperparameters found.

Seeds draw other data, whose values differ more than those of the methods: each value is compared with the
lowest that is known of its seed, the answer of any method or by theory. ``excess`` is what lies above it,
relative where the lowest is positive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.rows import FAILED, REFUSED, Job, Row, StudyError
from benchmarks.study import Study

WITHIN = 0.02
# What is closer in the end is as good.
TIE = 1e-3
GRID = 80


def in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Each name once, known ones first and in their order."""
    names = set(names)
    return [name for name in order if name in names] + sorted(names - set(order))


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method."""
    names = in_order((row.method for row in rows), METHODS)
    return {name: [row for row in rows if row.method == name] for name in names}


def by_problem(study: Study) -> dict[str, list[Row]]:
    """The rows of each problem.

    Raises:
      StudyError: there are none.
    """
    rows = list(study.rows().values())
    if not rows:
        raise StudyError(f"{study.folder} has no rows yet.")
    names = in_order((row.problem for row in rows), PROBLEMS)
    return {name: [row for row in rows if row.problem == name] for name in names}


def lowest_known(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """For each problem and seed the lowest answer of any method, or the optimum where it is lower."""
    found: dict[tuple[str, int], float] = {}
    for row in rows:
        values = [row.solved, np.inf if row.optimum is None else row.optimum]
        own = min((value for value in values if np.isfinite(value)), default=np.inf)
        found[row.problem, row.seed] = min(own, found.get((row.problem, row.seed), np.inf))
    return found


def excess(values, lowest: float):
    """Above the lowest, relative to it; the difference where it is not positive."""
    if not np.isfinite(lowest):
        return np.full(np.shape(values), np.nan)
    return (np.asarray(values) - lowest) / (lowest if lowest > 0 else 1.0)


def reached(row: Row, lowest: float, field: str = "seconds") -> float:
    """Seconds or examples until the excess is at most `WITHIN` and stays so, up to the answer; else inf.

    Passing by does not count, as whoever runs the method does not see it. What is found later than the answer
    counts as the answer where it is worse.
    """
    points = [point for point in row.curve if np.isfinite(point.solved)]
    if not points or not excess(row.solved, lowest) <= WITHIN:
        return float("inf")
    values = np.array([point.solved for point in points])
    answered = int(np.argmax(values <= row.solved + 1e-6 * abs(row.solved)))
    values[answered:] = np.minimum(values[answered:], row.solved)
    away = np.flatnonzero(excess(values, lowest) > WITHIN)
    first = away[-1] + 1 if len(away) else 0
    return float(getattr(points[first], field)) if first < len(points) else float("inf")


def ran(rows: Sequence[Row]) -> list[Row]:
    """Without those that the method refused."""
    return [row for row in rows if row.status != REFUSED]


def bad(rows: Sequence[Row]) -> list[Row]:
    """Those that a reader has to know of: they failed, diverged, or found no value."""
    return [row for row in ran(rows) if row.status in (FAILED, "DIVERGED") or not np.isfinite(row.solved)]


# --- A method on a problem --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method's runs of one problem: quartiles are (lower, median, upper) over the seeds.

    Args:
      method: its name; ``rows`` are those that it did not refuse.
      asked: runs that were asked for.
      excess: at the end; nan without a value.
      seconds: until the excess is within `WITHIN`, of each row; inf where it never is. ``examples`` likewise.
      statuses: how many runs ended so; the refused, too.
    """

    method: str
    rows: list[Row]
    asked: int
    excess: np.ndarray
    seconds: np.ndarray
    examples: np.ndarray
    statuses: dict[str, int]

    @property
    def hits(self) -> int:
        """Runs that came within `WITHIN`."""
        return int(np.isfinite(self.seconds).sum())

    def middle(self, name: str) -> float:
        """The median of a field of the rows; nan without rows."""
        return middle([getattr(row, name) for row in self.rows])


def middle(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return float(np.median(values)) if len(values) else float("nan")


def entries(rows: Sequence[Row], jobs: Iterable[Job]) -> list[Entry]:
    """One for each method, of the rows of one problem."""
    lowest, asked = lowest_known(rows), [job.method for job in jobs if job.problem == rows[0].problem]
    found = []
    for method, of_method in by_method(rows).items():
        own = ran(of_method)
        lows = [lowest[row.problem, row.seed] for row in own]
        statuses = [row.status for row in of_method]
        found.append(
            Entry(
                method=method,
                rows=own,
                asked=max(asked.count(method), len(of_method)),
                excess=np.array([float(excess(row.solved, low)) for row, low in zip(own, lows, strict=True)]),
                seconds=np.array([reached(row, low) for row, low in zip(own, lows, strict=True)]),
                examples=np.array([reached(r, low, "examples") for r, low in zip(own, lows, strict=True)]),
                statuses={status: statuses.count(status) for status in dict.fromkeys(statuses)},
            )
        )
    return found


def ended(entry: Entry) -> float:
    """The median excess at the end; inf where half of the runs have no value, or there are none."""
    return middle(np.nan_to_num(entry.excess, nan=np.inf)) if entry.rows else float("inf")


def verdict(found: Sequence[Entry]) -> str:
    """Sentences on one problem: who ends lowest, who is first, and what of the default."""
    lowest = min(found, key=ended)
    if not np.isfinite(ended(lowest)):
        return "No method has a value on most seeds."
    ties = [entry for entry in found if ended(entry) <= ended(lowest) + TIE]
    most = ("at most " if len(ties) > 1 else "") + percent(max(map(ended, ties)))
    names = _listed([entry.method for entry in ties])
    said = f"{names} end{'' if len(ties) > 1 else 's'} lowest, {most} above the lowest known value"
    always = [entry for entry in found if entry.rows and entry.hits == len(entry.rows)]
    first = min(always, key=lambda entry: middle(entry.seconds), default=None)
    if first is None:
        said += f"; no method is within {percent(WITHIN)} of it on all seeds."
    else:
        alone = "the only one" if len(always) == 1 else "first"
        said += (
            f"; {first.method} is {alone} within {percent(WITHIN)} on all seeds, after {time_of(first)} s."
        )
    default = next((entry for entry in found if entry.method == "default" and entry.rows), None)
    if default not in (None, first):
        there = f"within {percent(WITHIN)} on {default.hits} of {len(default.rows)} seeds"
        after = f", after {time_of(default)} s" if np.isfinite(middle(default.seconds)) else ""
        said += f" The default ends {percent(ended(default))} above, {there}{after}."
    return said[0].upper() + said[1:]


def time_of(entry: Entry) -> str:
    """The median time until it is within `WITHIN`."""
    return f"{middle(entry.seconds):.2g}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def percent(share: float) -> str:
    """A share in per cent, with as many digits as it has worth."""
    if not np.isfinite(share):
        return "-"
    # The sum with zero makes -0 a 0.
    return f"{round(100 * share, 2) + 0.0:.3g} %" if share < 10 else f"{share:.3g} times"


# --- Curves and profiles ----------------------------------------------------------------------------------


def curves(rows: Sequence[Row], field: str, lowest: Mapping) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each row that has some: a field of the curve, and the excess there."""
    found = []
    for row in rows:
        points = [point for point in row.curve if np.isfinite(point.solved)]
        if points:
            at = np.array([getattr(point, field) for point in points])
            values = excess([point.solved for point in points], lowest[row.problem, row.seed])
            found.append((at, values))
    return found


def band(found: Sequence[tuple[np.ndarray, np.ndarray]]):
    """Quartiles of several curves: ``(at, lower, median, upper)``.

    From where all have a first point to the last point of any; one that ended before keeps its value.
    """
    first, last = max(x[0] for x, _ in found), max(x[-1] for x, _ in found)
    at = np.geomspace(max(first, 1e-9), max(last, first, 1e-9), GRID)
    at[0], at[-1] = first, last
    values = np.array([value[np.searchsorted(x, at, side="right") - 1] for x, value in found])
    return at, *np.quantile(values, (0.25, 0.5, 0.75), axis=0)


def costs(rows: Sequence[Row], field: str) -> dict[str, np.ndarray]:
    """Of each method the cost of being within `WITHIN` over the least of any, one entry a problem and seed.

    inf where it never is, or did not run; ``field`` is "seconds", "examples", or "cold": with compilation.
    Problems and seeds that no method solves are left out.
    """
    lowest, methods = lowest_known(rows), list(by_method(rows))
    keys = {key: number for number, key in enumerate(lowest)}
    found = np.full((len(methods), len(keys)), np.inf)
    for row in rows:
        cost = reached(row, lowest[row.problem, row.seed], "examples" if field == "examples" else "seconds")
        cost += row.compile_seconds if field == "cold" and np.isfinite(cost) else 0.0
        found[methods.index(row.method), keys[row.problem, row.seed]] = cost
    least = found.min(axis=0, initial=np.inf)
    solved = np.isfinite(least)
    ratios = found[:, solved] / np.maximum(least[solved], 1e-12)
    return dict(zip(methods, ratios, strict=True))


def profile(ratios: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The share of problems and seeds within each factor of the least cost (Dolan and More, 2002)."""
    return np.mean(ratios[None] <= at[:, None] * (1 + 1e-12), axis=1) if ratios.size else np.zeros(len(at))
