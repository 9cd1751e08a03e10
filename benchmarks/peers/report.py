"""What came out: a file for each case, tables, verdicts and a page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import table
from benchmarks.peers.handles import OTHERS_OF_OURS, OURS
from benchmarks.peers.measured import CANNOT, FAILED, RIGHT, Row, fastest, ratio
from benchmarks.peers.searches import SAMPLERS

Kept = dict[str, Any]
ASKED_TIME = {"implicit": 1.05, "unrolled": 1.05, "along": 0.6, "cold": 0.5}
ASKED_SHARE = 0.1  # of the seconds of the searches
ASKED_MEMORY, MEMORY_PEERS = 0.1, ("jaxopt", "higher")
NAMED_BY = ("task", "kind", "size", "dtype")
ORDER = ("implicit", "unrolled", "along", "cold", "searches")
WHAT = {
    "implicit": "one hypergradient at the inner solution, {setting} steps of conjugate gradients",
    "unrolled": "one hypergradient through {setting[0]} gradient steps",
    "along": "hypergradients of error at most {accurate:g} at 20 points of an outer run (bilevel with "
    "`cg(follow=True)`, from where its last solutions point to, to a tolerance; others from zero, to a "
    "tolerance where they have one, else with as many steps as the hardest point needs)",
    "cold": "an outer run from a cold process, seconds until its hyperparameters are worth {setting:.4g}",
    "searches": "what users pick instead, for {setting:g} s, and when it is as good as the best of Optuna",
}
PROBLEMS = {"rate": "learned learning rate"}  # where the kind says too little
HEADER = ("", "error", "setting", "ms", "ratio", "compile s", "MB", "")
RUN_HEADER = ("", "best loss", "seconds", "ratio", "compile s", "")


def save(folder: Path, case: Kept) -> None:
    name = "-".join(case[part] for part in NAMED_BY)
    (folder / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")


def load(folder: Path) -> list[Kept]:
    """In the order of the report."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(
        found, key=lambda case: (ORDER.index(case["task"]), case["kind"], case["shape"] or [], case["dtype"])
    )


def rows_of(case: Kept) -> list[Row]:
    return [Row(**{**row, "seconds": tuple(row["seconds"])}) for row in case["rows"]]


def title(case: Kept) -> str:
    what = WHAT[case["task"]].format(**case)
    if case["shape"] is None:
        return f"{what}: {case['kind']}, {case['size']}"
    rows, valid, features = case["shape"]
    problem = PROBLEMS.get(case["kind"], case["kind"])
    return f"{what}: {problem}, {rows} and {valid} rows of {features} features, {case['dtype']}"


def is_cpu_time(case: Kept) -> bool:
    return case["where"]["clock"] == "process_time"


def is_run(case: Kept) -> bool:
    return case["task"] in ("cold", "searches")


def lines(case: Kept) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells; ratios are to the fastest of the others that is right.

    What is the same as another row is left out.
    """
    rows = [row for row in rows_of(case) if row.status != CANNOT or not row.reason.startswith("the same")]
    base = fastest(rows)
    if is_run(case):
        return RUN_HEADER, [_run_line(row, base if case["task"] == "cold" else None) for row in rows]
    return HEADER, [_line(case, row, base) for row in rows]


def _median(row: Row) -> float:
    return float(np.median(row.seconds)) if row.seconds else math.nan


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def _line(case: Kept, row: Row, base: Row | None) -> tuple[str, ...]:
    if row.status in (CANNOT, FAILED):
        return (row.peer, "", "", "", "", "", "", f"{row.status}: {row.reason}")
    return (
        row.peer,
        "none" if row.error is None else f"{row.error:.1e}",
        f"{row.setting:g}" if case["task"] == "along" else "",
        _number(1e3 * _median(row), ".3g"),
        f"{ratio(row, base):.2f}" if base is not None and row.seconds else "",
        _number(row.compile_seconds, ".1f"),
        _number(row.megabytes, ".3g"),
        "" if row.status == RIGHT else "wrong",
    )


def _run_line(row: Row, base: Row | None) -> tuple[str, ...]:
    if row.status in (CANNOT, FAILED):
        return (row.peer, "", "", "", "", f"{row.status}: {row.reason}")
    seconds = _median(row)
    return (
        row.peer,
        _number(row.value, ".4f"),
        "never" if math.isinf(seconds) else _number(seconds, ".2f"),
        f"{ratio(row, base):.2f}" if base is not None and row.seconds else "",
        _number(row.compile_seconds, ".1f"),
        row.reason,
    )


def verdicts(case: Kept) -> list[tuple[str, float, float]]:
    """``(what, found, asked at most)``; nan where nothing is asked."""
    rows = {row.peer: row for row in rows_of(case)}
    ours, found = rows.get(OURS), []
    if case["task"] == "searches":
        if ours is None or not ours.seconds:
            return []
        share = max(ours.seconds) / case["setting"]
        best = min(rows[name].value for name in SAMPLERS if name in rows and rows[name].value is not None)
        return [
            ("time to the best of Optuna, worst seed", share, ASKED_SHARE),
            ("loss of the best of Optuna, of ours, at the end", best / ours.value, math.nan),
        ]
    base = fastest(list(rows.values()))
    if ours is not None and ours.status == RIGHT and base is not None:
        asked = ASKED_TIME[case["task"]]
        found.append((f"time, of {base.peer}", ratio(ours, base), asked))
        for name in OTHERS_OF_OURS:
            other = rows.get(name)
            if other is not None and other.status == RIGHT:
                setting = name.removeprefix(f"{OURS}, ")
                found.append((f"time with {setting}, of {base.peer}", ratio(other, base), asked))
    if case["task"] == "unrolled":
        for name, peer in itertools.product((OURS, *OTHERS_OF_OURS), MEMORY_PEERS):
            mine, theirs = (rows[n].megabytes if n in rows else None for n in (name, peer))
            if mine and theirs:
                setting = f" with {name.removeprefix(f'{OURS}, ')}" if name != OURS else ""
                found.append((f"memory{setting}, of {peer}", mine / theirs, ASKED_MEMORY))
    return found


def judged(found: float, asked: float) -> tuple[str, str]:
    """What was asked, and whether it is met; both empty where nothing was."""
    return ("", "") if math.isnan(asked) else (f"{asked:g}", "met" if found <= asked else "missed")


def sentences(case: Kept) -> list[str]:
    said = []
    for what, found, asked in verdicts(case):
        bar, met = judged(found, asked)
        said.append(f"{what}: {found:.3g}" + f" (asked: at most {bar}, {met})" * bool(bar))
    return said


def show(cases: Sequence[Kept]) -> None:
    for case in cases:
        print(f"\n  {title(case)} (load {case['where']['load']:.1f}{', CPU time' * is_cpu_time(case)})")
        table(*lines(case))
        for sentence in sentences(case):
            print(f"  {sentence}")


_PAGE = """\
# Beside its peers

`make peers` builds an environment with the packages named at the end, and `python -m benchmarks peers` runs
all of them, each in a process of its own, on the same data and one core;
`python -m benchmarks peers --page docs/peers.md` writes this page. Timed are calls after the first, in rounds
in which all peers take turns; a ratio is the median over rounds, to the fastest other peer whose answer is
right. Runs from a cold process count everything, imports and compilation too; their small sizes are real
data, breast cancer and digits. Searches count no compilation, and one is as good as another where its loss is
higher by at most 0.1 %. Errors are relative, against numpy in float64. Memory is what a call takes beyond its
arguments and results: as the compiler says, and for torch the growth of the resident memory.
"""

_WHY = """
What is missed has reasons. A hypergradient comes with the residual that it measured: two products with the
data more than the 43 of the gradient alone, which is what peers return. `unrolled()` recomputes what it does
not keep, for a fortieth of the memory; `remat=False` keeps it. At small sizes a cold process does little but
compile, and a program with a line search and a history takes a second more than bare steps. Where two
hyperparameters and trainings of milliseconds are all there is, a search tries thousands, and picks the
luckiest minimum of a loss that is not convex.
"""


def page_of(cases: Sequence[Kept]) -> str:
    page = [_PAGE, "| case | bar | found | asked, at most | |", "|---|---|---|---|---|"]
    for case in cases:
        for what, found, asked in verdicts(case):
            name = ", ".join(case[part] for part in NAMED_BY)
            if case["task"] == "searches":
                name += f", {case['setting']:g} s"
            page.append(f"| {name} | {what} | {found:.3g} | {' | '.join(judged(found, asked))} |")
    page.append(_WHY.rstrip("\n"))
    for task in dict.fromkeys(case["task"] for case in cases):
        page += ["", f"## {task.capitalize()}"]
        for case in (case for case in cases if case["task"] == task):
            named = title(case) + ", CPU time" * is_cpu_time(case)
            page += ["", f"{named[0].upper()}{named[1:]}.", ""]
            header, cells = lines(case)
            page += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
            page += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*page, "", *_where(cases)]) + "\n"


def _where(cases: Sequence[Kept]) -> list[str]:
    versions: dict[str, str] = {}
    for case in cases:
        for own in case["versions"].values():
            versions |= {name: version for name, version in own.items() if name != "failed"}
    places = sorted({f"{case['where']['processor']}, commit {case['where']['commit']}" for case in cases})
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    load = max(case["where"]["load"] for case in cases)
    return [f"Measured on {'; '.join(places)}; load at most {load:.1f}. Versions: {told}."]
