"""The picture of a study: how good each arm's hyperparameters are, against time and against work.

Values are those of accurate training at the hyperparameters an arm has at a time, the same measure for all;
a gradient arm does not know them while it runs, so they may rise again. Seeds draw other data, whose values
differ more than those of the arms: each value is divided by the lowest that is known of its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.arms import ARMS
from benchmarks.report import arms_of, problems_of
from benchmarks.rows import Row, StudyError
from benchmarks.study import Study

# Distinguishable for the colour-blind, and in grey by their dashes.
STYLES = (
    ("#0072b2", "-"),
    ("#d55e00", "--"),
    ("#009e73", "-."),
    ("#cc79a7", ":"),
    ("#8c6d00", (0, (5, 1, 1, 1, 1, 1))),
)
AXES = (("seconds", "seconds, without compilation"), ("examples", "examples touched by all oracles"))
GRID = 300


def save(study: Study, path: Path) -> None:
    """Draw the picture into a file.

    Raises:
      StudyError: there are no rows, matplotlib is missing, or the file cannot be written.
    """
    problems = problems_of(study)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StudyError(
            "the picture needs matplotlib, which is missing; install it with: pip install 'bilevel[plots]'."
        ) from None
    figure = Figure(figsize=(11, 1.2 + 2.8 * len(problems)), layout="constrained")
    arms = list(arms_of([row for rows in problems.values() for row in rows]))
    # The same in every picture, whichever arms it has.
    styles = {arm: STYLES[i % len(STYLES)] for i, arm in enumerate(dict.fromkeys([*ARMS, *arms]))}
    grid = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    for axes, (name, rows) in zip(grid, problems.items(), strict=True):
        for ax, (field, label) in zip(axes, AXES, strict=True):
            _draw(ax, rows, field, styles)
            ax.set_xlabel(label)
        axes[0].set_ylabel("outer value / lowest of its seed")
        axes[0].set_title(name, loc="left", fontweight="bold")
        axes[1].set_title("median and range over the seeds", loc="right", fontsize="small", color="0.4")
    handles = {line.get_label(): line for ax in grid.flat for line in ax.lines if line.get_label()[0] != "_"}
    known = {arm: handles[arm] for arm in arms if arm in handles}
    figure.legend(known.values(), known, loc="outside upper center", ncols=max(len(known), 1), frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error}.") from None


def _draw(ax, rows: Sequence[Row], field: str, styles) -> None:
    lowest, shown = lowest_known(rows), [1.0]
    ax.axhline(1.0, color="0.4", linewidth=0.8, zorder=0)
    for arm, of_arm in arms_of(rows).items():
        curves = [(at, values / lowest[seed]) for seed, (at, values) in solved(of_arm, field)]
        if curves:
            at, low, middle, high = band(curves)
            colour, dashes = styles[arm]
            ax.fill_between(at, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
            ax.step(at, middle, where="post", color=colour, linestyle=dashes, linewidth=1.8, label=arm)
            ax.plot(at[-1:], middle[-1:], "o", color=colour, markersize=4)
            shown.extend(middle[np.isfinite(middle)])
    ax.set_xscale("log")
    low, high = min(shown), max(shown)
    if high > 4 * low > 0:
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 100 * low else (1,))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** 0.07)
    else:
        margin = 0.07 * (high - low) + 1e-3
        ax.set_ylim(low - margin, high + margin)
    ax.grid(alpha=0.3, linewidth=0.5)


def solved(rows: Sequence[Row], field: str) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """For each row its seed, and the values of accurate training against a field of the curve."""
    points = [(row.seed, [p for p in row.curve if not np.isnan(p.solved)]) for row in rows]
    return [
        (seed, (np.array([getattr(p, field) for p in curve]), np.array([p.solved for p in curve])))
        for seed, curve in points
        if curve
    ]


def lowest_known(rows: Sequence[Row]) -> dict[int, float]:
    """For each seed the optimum, or the lowest value of any arm where it is lower or none is known.

    It is 1 where the lowest is not positive, and ratios would mean nothing.
    """
    found: dict[int, list[float]] = {row.seed: [np.inf] for row in rows}
    for row in rows:
        values = [row.solved, *(point.solved for point in row.curve)]
        values += [] if row.optimum is None else [row.optimum]
        found[row.seed].extend(value for value in values if np.isfinite(value))
    lowest = {seed: min(values) for seed, values in found.items()}
    return {seed: value if 0 < value < np.inf else 1.0 for seed, value in lowest.items()}


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]):
    """Lowest, median and highest value of several curves: ``(at, low, middle, high)``.

    From where all have a first point to the last point of any; one that ended before keeps its value.
    """
    first, last = max(x[0] for x, _ in curves), max(x[-1] for x, _ in curves)
    at = np.geomspace(max(first, 1e-9), max(last, first, 1e-9), GRID)
    at[0], at[-1] = first, last
    values = np.array([value[np.searchsorted(x, at, side="right") - 1] for x, value in curves])
    return at, values.min(axis=0), np.median(values, axis=0), values.max(axis=0)
