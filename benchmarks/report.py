"""What the rows of a study say, for the terminal: a table for each problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.measure import table
from benchmarks.rows import Job, Row
from benchmarks.study import Study
from benchmarks.summary import (
    WITHIN,
    Entry,
    bad,
    by_problem,
    entries,
    in_order,
    middle,
    percent,
    verdict,
)

LEGEND = f"""solved: outer value after accurate training at what was found, median (lowest to highest)
over the seeds. above: of it over the lowest known of its seed, median. s to {percent(WITHIN)}: seconds
until accurate training at what was found is within {percent(WITHIN)} of the lowest known and stays so,
median, and on how many seeds."""


def jobs_of(study: Study) -> list[Job]:
    """All that was asked, each once."""
    return list(dict.fromkeys(job for request in study.settings()[1] for job in request.jobs()))


def show(study: Study) -> None:
    """Print the report."""
    seconds, jobs = study.settings()[0], jobs_of(study)
    problems = by_problem(study)
    rows = [row for of_problem in problems.values() for row in of_problem]
    print(f"{study.folder}: {len({*jobs} & {row.job for row in rows})} of {len(jobs)} jobs done, "
          f"{seconds:g} s a run")  # fmt: skip
    for line in where(rows):
        print(line)
    print(LEGEND)
    for name, of_problem in problems.items():
        found = entries(of_problem, jobs)
        print(f"\n== {name}")
        table(*tabulated(found))
        print(verdict(found))
    if wrong := bad(rows):
        print(f"\n{len(wrong)} runs failed, diverged or found no value:")
        for row in wrong:
            print(f"  {row.job}: {row.status}. {row.message}")


def where(rows: Sequence[Row]) -> list[str]:
    """A line for each machine and commit that rows come from."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        machine = row.machine
        key = (machine.python, machine.jax, machine.backend, machine.cores, machine.processor, row.commit)
        found.setdefault(key, []).append(machine.load)
    return [
        f"{len(loads)} rows: python {python}, jax {jax} on {backend}, {cores} cores of {processor}, "
        f"commit {commit}, load {min(loads):.1f} to {max(loads):.1f}"
        for (python, jax, backend, cores, processor, commit), loads in found.items()
    ]


def tabulated(found: Sequence[Entry]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and lines of the table of one problem."""
    metrics = in_order((name for entry in found for row in entry.rows for name in row.metrics), ())
    header = ("method", "seeds", "compile s", "run s", "solved", "above", "test", *metrics,
              f"s to {percent(WITHIN)}", "ended by")  # fmt: skip
    lines = [
        (
            entry.method, f"{len(entry.rows)}/{entry.asked}", number(entry.middle("compile_seconds")),
            number(entry.middle("run_seconds")), _spread([row.solved for row in entry.rows]),
            percent(middle(entry.excess)), number(entry.middle("test")),
            *(number(metric(entry, name)) for name in metrics), _time(entry.seconds), endings(entry),
        )
        for entry in found
    ]  # fmt: skip
    return header, lines


def metric(entry: Entry, name: str) -> float:
    """The median of a metric over the runs that have it."""
    return middle([row.metrics[name] for row in entry.rows if name in row.metrics])


def number(value: float, digits: int = 3) -> str:
    """As short as it can be; a dash for what there is not."""
    return f"{value:.{digits}g}" if np.isfinite(value) else "-"


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.5g} ({min(values):.5g} to {max(values):.5g})" if values else "-"


def _time(times: np.ndarray) -> str:
    reached = np.isfinite(times).sum()
    if not reached:
        return "never" if len(times) else "-"
    middle = np.median(times)
    return f"{middle:.3g} ({reached}/{len(times)})" if np.isfinite(middle) else f"({reached}/{len(times)})"


def endings(entry: Entry) -> str:
    """How many runs ended how."""
    several = len(entry.statuses) > 1
    return ", ".join(f"{count} {name}" if several else name for name, count in sorted(entry.statuses.items()))
