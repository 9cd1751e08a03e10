"""All problems of a study together: how often each method arrives, how late, and how far off it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.rows import Row
from benchmarks.summary import WITHIN, bad, by_method, costs, excess, lowest_known, middle, percent, ran


class Overall(NamedTuple):
    """A method over all problems and seeds.

    ``arrived``: of its ``runs``, those within `WITHIN` of the lowest known. ``factor`` and ``cold``: median,
    over those that arrived, of the time until then over the least of any method, without and with
    compilation. ``excess`` and ``worst``: of the final values, median and highest; a run without a value is
    infinite. ``bad``: runs that failed, diverged or found no value.
    """

    method: str
    runs: int
    problems: int
    arrived: int
    factor: float
    cold: float
    excess: float
    worst: float
    bad: int


def overall(rows: Sequence[Row]) -> list[Overall]:
    """One for each method that ran anywhere, those that arrive most often first."""
    lowest, warm, cold = lowest_known(rows), costs(rows, "seconds"), costs(rows, "cold")
    found = []
    for method, of_method in by_method(rows).items():
        own = ran(of_method)
        if not own:
            continue
        ends = [float(excess(row.solved, lowest[row.problem, row.seed])) for row in own]
        ends = np.nan_to_num(ends, nan=np.inf, posinf=np.inf)
        there = np.isfinite(warm[method])
        found.append(
            Overall(
                method=method,
                runs=len(own),
                problems=len({row.problem for row in own}),
                arrived=int(there.sum()),
                factor=middle(warm[method][there]),
                cold=middle(cold[method][there]),
                excess=middle(ends),
                worst=float(ends.max()),
                bad=len(bad(own)),
            )
        )
    return sorted(found, key=lambda entry: (-entry.arrived, np.nan_to_num(entry.factor, nan=np.inf)))


def sentence(found: Sequence[Overall]) -> str:
    """Which method arrives most often, how the next one does, and the default where it is neither."""
    if not found:
        return "No method ran."
    said = [f"Most often within {percent(WITHIN)} of the lowest known value is {_words(found[0])}."]
    if len(found) > 1:
        said.append(f"Next is {_words(found[1])}.")
    said += [f"The default: {_words(entry)}." for entry in found[2:] if entry.method == "default"]
    return " ".join(said)


def _words(entry: Overall) -> str:
    late = f", at {entry.factor:.2g} times the least time (median)" if entry.arrived else ""
    worst = f"{percent(entry.worst)} above" if np.isfinite(entry.worst) else "without a value"
    return f"{entry.method}, in {entry.arrived} of {entry.runs} runs{late}; its worst run ends {worst}"
