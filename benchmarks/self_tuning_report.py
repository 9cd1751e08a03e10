"""The table, the verdicts and the figures of `benchmarks.self_tuning`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import curves
from benchmarks.measure import table

if TYPE_CHECKING:
    from benchmarks.self_tuning import Row

SEARCHES = ("random", "grid", "optuna")


def show(rows: Sequence[Row]) -> None:
    """Print all of it."""
    for task in dict.fromkeys(row.task for row in rows if row.start is None):
        own = [row for row in rows if row.task == task and row.start is None]
        arms = dict.fromkeys(row.arm for row in own)
        print(f"\n  {task}: at the lowest validation loss; median over seeds, and range")
        table(
            ("arm", "valid", "test", "test range", "accuracy", "seconds to it", "steps to it"),
            [
                (
                    arm,
                    f"{_median(own, arm, 'valid'):.4f}",
                    f"{_median(own, arm, 'test'):.4f}",
                    f"{min(_values(own, arm, 'test')):.4f} to {max(_values(own, arm, 'test')):.4f}",
                    f"{_median(own, arm, 'accuracy'):.4f}",
                    f"{_median(own, arm, 'seconds'):.0f}",
                    f"{_median(own, arm, 'steps'):.0f}",
                )
                for arm in arms
            ],
        )
        for sentence in verdicts(own):
            print(f"  - {sentence}")
    moved = [row for row in rows if row.start is not None]
    for arm in dict.fromkeys(row.arm for row in moved):
        own = [row for row in moved if row.arm == arm]
        first, last = spreads(own)
        values = ", ".join(
            f"{row.start[1]:g} to {row.path[row.start[0]][-1]:.2f}" for row in own if row.start
        )
        print(f"\n  {own[0].task}, {arm}, {values}: range {first:.2f} at the start, {last:.2f} at the end")


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A claim and how often it held, by seeds paired; lower test losses are better."""
    pairs = [("stn", search) for search in SEARCHES]
    pairs += [(f"replay of {arm}", f"final of {arm}") for arm in ("stn", "delta_stn")]
    pairs += [("delta_stn", "stn"), *(("delta_stn", search) for search in SEARCHES)]
    out = []
    for better, worse in pairs:
        won = [
            a.best.test < b.best.test
            for a in rows
            for b in rows
            if (a.arm, b.arm, a.seed) == (better, worse, b.seed)
        ]
        if won:
            verdict = "holds" if all(won) else "does not hold" if sum(won) <= len(won) / 2 else "mostly holds"
            out.append(f"{better} beats {worse}: {sum(won)} of {len(won)} seeds ({verdict})")
    return out


def spreads(rows: Sequence[Row]) -> tuple[float, float]:
    """Range of the hyperparameter over the runs, at the start and at the end."""
    paths = [row.path[row.start[0]] for row in rows if row.start is not None]
    return np.ptp([path[0] for path in paths]), np.ptp([path[-1] for path in paths])


def _values(rows, arm: str, field: str) -> list[float]:
    return [getattr(row.best, field) for row in rows if row.arm == arm]


def _median(rows, arm: str, field: str) -> float:
    return float(np.median(_values(rows, arm, field)))


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Best validation loss so far over time, for each task; schedules from several starts."""
    for task in dict.fromkeys(row.task for row in rows if row.start is None):
        own = [row for row in rows if row.task == task and row.start is None]

        def plot(ax, own=own):
            for i, arm in enumerate(dict.fromkeys(row.arm for row in own)):
                if "of" in arm.split() or arm == "start":
                    continue
                for row in (row for row in own if row.arm == arm):
                    seconds = [point.seconds for point in row.points]
                    best = np.minimum.accumulate([point.valid for point in row.points])
                    label = arm if row.seed == own[0].seed else None
                    ax.plot(seconds, best, color=f"C{i}", label=label, alpha=0.8)
            low = min(row.best.valid for row in own)
            ax.set_ylim(low * 0.95, 2.5 * low)

        curves.save(
            folder / f"{task}.png",
            f"{task}: searches and self-tuning",
            "seconds",
            "lowest validation loss",
            plot,
        )
    moved = [row for row in rows if row.start is not None]
    if moved:

        def paths(ax):
            for row in moved:
                name, value = row.start
                style = "-" if row.arm == "stn" else "--"
                ax.plot(
                    [point.steps for point in row.points],
                    row.path[name],
                    style,
                    color=f"C{sorted({r.start[1] for r in moved}).index(value)}",
                    label=f"{row.arm} from {value:g}",
                )

        name = moved[0].start[0]
        curves.save(
            folder / "starts.png", f"dropout of {name}s from several starts", "training steps", "rate", paths
        )
