"""Tables and a figure of the study of `benchmarks.text`: medians and quartiles over seeds, at equal budgets.

Budgets are the largest that all methods reached on a kind of task: examples touched, and seconds. Between two
points of a run its curve is taken as straight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import table

BUDGETS = {"examples": "examples touched, weighted", "seconds": "seconds, after compilation"}
FIELDS = ("test", "accuracy")
STYLES = {
    "bo_rep": ("#d55e00", "-"),
    "slip": ("#d55e00", ":"),
    "stocbio": ("#0072b2", "-"),
    "ttsa": ("#0072b2", ":"),
    "saba": ("#009e73", "-"),
    "soba": ("#009e73", "--"),
    "ma_soba": ("#009e73", ":"),
    "fixed": ("0.4", "--"),
}


def finals(rows: Sequence) -> dict:
    """``{kind: {method: runs}}`` without those of the grids."""
    found: dict = {}
    for row in rows:
        if not row.tuning:
            found.setdefault(row.kind, {}).setdefault(row.arm, []).append(row)
    return found


def step_seconds(rows: Sequence, kind: str, arm: str) -> float:
    """Of the quickest chunk of all runs."""
    return min(row.step_seconds for row in rows if (row.kind, row.arm) == (kind, arm))


def axis(row, budget: str, seconds: float) -> np.ndarray:
    """Where the points of a run lie on the axis of a budget."""
    if budget == "examples":
        return np.array([point.examples for point in row.curve])
    return np.array([point.steps * seconds for point in row.curve])


def at(runs: Sequence, field: str, budget: str, seconds: float, where) -> np.ndarray:
    """Quartiles over the runs of a field at places on an axis, shape (3, places)."""
    where = np.atleast_1d(where)
    curves = [
        np.interp(where, axis(row, budget, seconds), [getattr(point, field) for point in row.curve])
        for row in runs
    ]
    return np.quantile(curves, (0.25, 0.5, 0.75), axis=0)


def reached(arms: dict, rows: Sequence, budget: str) -> float:
    """The largest budget that all runs of a kind reached."""
    return min(
        axis(row, budget, step_seconds(rows, row.kind, row.arm))[-1] for runs in arms.values() for row in runs
    )


def show(rows: Sequence) -> None:
    """A table for each kind of task."""
    for kind, arms in finals(rows).items():
        limits = {budget: reached(arms, rows, budget) for budget in BUDGETS}
        print(
            f"\n  {kind}: at {limits['examples']:.0f} examples | at {limits['seconds']:.2f} s; test splits,"
        )
        print("  median (quartiles) over seeds; < and > mark rates at the ends of their grid")
        lines, medians = [], {}
        for arm, runs in arms.items():
            seconds = step_seconds(rows, kind, arm)
            cells = []
            for budget, field in ((b, f) for b in BUDGETS for f in FIELDS):
                low, middle, high = at(runs, field, budget, seconds, limits[budget])[:, 0]
                medians[arm, budget, field] = middle
                cells.append(f"{middle:.3f} ({low:.3f} {high:.3f})")
            rates = f"{runs[0].inner_rate:g} {runs[0].outer_rate:g}{edge(rows, runs[0])}"
            steps = int(np.median([row.curve[-1].steps for row in runs]))
            lines.append((arm, rates, steps, f"{1e3 * seconds:.1f}", sum(r.rejected for r in runs), *cells))
        header = (
            "method", "rates", "steps", "ms a step", "rejected", "loss", "accuracy", "| loss", "accuracy",
        )  # fmt: skip
        table(header, lines)
        stopped = [min(row.curve, key=lambda point: point.valid) for row in arms.get("fixed", ())]
        if stopped:
            ends = (f"{np.median([getattr(point, field) for point in stopped]):.3f}" for field in FIELDS)
            print(f"  fixed where its validation loss was lowest: loss {next(ends)}, accuracy {next(ends)}")
        for budget, field in ((b, f) for b in BUDGETS for f in FIELDS):
            print(f"  by {field} at equal {budget}: {', '.join(ranking(medians, budget, field))}")


def edge(rows: Sequence, run) -> str:
    """A mark where the outer rate that was taken is the lowest or the highest of its grid."""
    grid = [row.outer_rate for row in rows if (row.kind, row.arm, row.tuning) == (run.kind, run.arm, True)]
    if len(set(grid)) < 2 or min(grid) < run.outer_rate < max(grid):
        return ""
    return "<" if run.outer_rate == min(grid) else ">"


def ranking(medians: dict, budget: str, field: str) -> list[str]:
    """Methods, the best first."""
    sign = -1 if field == "accuracy" else 1
    found = {arm: sign * value for (arm, b, f), value in medians.items() if (b, f) == (budget, field)}
    return sorted(found, key=found.__getitem__)


def draw(rows: Sequence, path: Path) -> None:
    """Test accuracy against both budgets: medians, and bands between quartiles."""
    from matplotlib.figure import Figure

    kinds = finals(rows)
    figure = Figure(figsize=(11, 1 + 2.9 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), 2, squeeze=False, sharey="row")
    for axes, (kind, arms) in zip(grid, kinds.items(), strict=True):
        for ax, (budget, label) in zip(axes, BUDGETS.items(), strict=True):
            for arm, runs in arms.items():
                seconds = step_seconds(rows, kind, arm)
                where = np.linspace(0, min(axis(row, budget, seconds)[-1] for row in runs), 60)
                low, middle, high = at(runs, "accuracy", budget, seconds, where)
                colour, dash = STYLES.get(arm, ("0.2", "-"))
                ax.fill_between(where, low, high, color=colour, alpha=0.12, linewidth=0)
                ax.plot(
                    where, middle, dash, color=colour, linewidth=2.4 if arm == "bo_rep" else 1.5, label=arm
                )
            ax.set_xlabel(label)
            ax.grid(color="0.9")
        axes[0].set_ylabel("test accuracy")
        axes[0].set_title(kind, loc="left", fontweight="bold")
    handles = {line.get_label(): line for ax in grid.flat for line in ax.lines}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
