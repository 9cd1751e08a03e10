"""What the rows of a study say: a table for each problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.arms import ARMS
from benchmarks.measure import table
from benchmarks.problems import PROBLEMS
from benchmarks.rows import Row, StudyError
from benchmarks.study import Request, Study

WITHIN = 0.02
LEGEND = f"""solved: outer value after accurate training at what was found, median (lowest to highest) over
the seeds; the best arm has the lowest. s to {WITHIN:.0%}: seconds until accurate training at what was found
is within {WITHIN:.0%} of what the best arm reaches on that seed, median, and on how many seeds it is."""


def in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Each name once, known ones first and in their order."""
    names = set(names)
    return [name for name in order if name in names] + sorted(names - set(order))


def arms_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each arm."""
    return {arm: [row for row in rows if row.arm == arm] for arm in in_order((r.arm for r in rows), ARMS)}


def problems_of(study: Study) -> dict[str, list[Row]]:
    """The rows of each problem.

    Raises:
      StudyError: there are none.
    """
    rows = list(study.rows().values())
    if not rows:
        raise StudyError(f"{study.folder} has no rows yet.")
    names = in_order((row.problem for row in rows), PROBLEMS)
    return {name: [row for row in rows if row.problem == name] for name in names}


def show(study: Study) -> None:
    """Print the report."""
    seconds, asked = study.settings()
    problems = problems_of(study)
    rows = [row for of_problem in problems.values() for row in of_problem]
    jobs = {job for request in asked for job in request.jobs()}
    done = len(jobs & {row.job for row in rows})
    print(f"{study.folder}: {done} of {len(jobs)} jobs done, {seconds:g} s a run")
    for line in _where(rows):
        print(line)
    print(LEGEND)
    for name, of_problem in problems.items():
        print(f"\n== {name}")
        _show_problem(of_problem, asked)


def _where(rows: Sequence[Row]) -> list[str]:
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


def _show_problem(rows: Sequence[Row], asked: Sequence[Request]) -> None:
    arms = arms_of(rows)
    best = best_arm(arms)
    targets = {row.seed: row.solved + WITHIN * abs(row.solved) for row in arms[best]}
    metrics = in_order((name for row in rows for name in row.metrics), ())
    jobs = {job for request in asked for job in request.jobs()}
    lines = []
    for arm, of_arm in arms.items():
        wanted = sum((job.problem, job.arm) == (rows[0].problem, arm) for job in jobs)
        times = [time_to(row, targets[row.seed]) for row in of_arm if row.seed in targets]
        measured = [[row.metrics.get(name, np.nan) for row in of_arm] for name in metrics]
        lines.append(
            (arm, f"{len(of_arm)}/{wanted}", _median(row.compile_seconds for row in of_arm),
             _median(row.run_seconds for row in of_arm), _spread([row.solved for row in of_arm]),
             _gap(of_arm), _median(row.test for row in of_arm), *map(_median, measured), _time(times),
             _endings(of_arm))
        )  # fmt: skip
    header = ("arm", "seeds", "compile s", "run s", "solved", "gap", "test", *metrics,
              f"s to {WITHIN:.0%}", "ended by")  # fmt: skip
    table(header, lines)


def best_arm(arms: dict[str, list[Row]]) -> str:
    """The arm with the lowest median of solved values; what is not a number is worst."""
    return min(arms, key=lambda arm: np.median(np.nan_to_num([r.solved for r in arms[arm]], nan=np.inf)))


def time_to(row: Row, target: float) -> float:
    """Seconds until accurate training gives at most the target; inf if it never does."""
    return next((point.seconds for point in row.curve if point.solved <= target), float("inf"))


def _median(values: Iterable[float]) -> str:
    return f"{np.median(list(values)):.3g}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.5g} ({min(values):.5g} to {max(values):.5g})"


def _gap(rows: Sequence[Row]) -> str:
    gaps = [(row.solved - row.optimum) / abs(row.optimum) for row in rows if row.optimum]
    # The sum with zero makes -0 a 0.
    return f"{round(100 * float(np.median(gaps)), 2) + 0.0:.4g} %" if gaps else "-"


def _time(times: Sequence[float]) -> str:
    reached = sum(map(np.isfinite, times))
    if not reached:
        return "never"
    middle = np.median(times)
    return f"{middle:.3g} ({reached}/{len(times)})" if np.isfinite(middle) else f"({reached}/{len(times)})"


def _endings(rows: Sequence[Row]) -> str:
    statuses = [row.status for row in rows]
    return ", ".join(
        f"{statuses.count(s)} {s}" if len(set(statuses)) > 1 else s for s in sorted(set(statuses))
    )
