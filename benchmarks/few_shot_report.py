"""The table, the verdicts and the figures of `benchmarks.few_shot`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.measure import table

if TYPE_CHECKING:
    from benchmarks.few_shot import Row

# Points of accuracy by which unem should beat plain EM on the digits, by shots.
ASKED = {1: 5.0, 5: 4.0}


def load(path: Path, kind: type) -> list:
    """The rows of a file."""
    return [kind(**json.loads(line)) for line in path.read_text().splitlines()]


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by source and shots."""
    return {
        key: [row for row in rows if (row.source, row.shots) == key]
        for key in dict.fromkeys((row.source, row.shots) for row in rows)
    }


def show(rows: Sequence[Row]) -> None:
    """Print all of it."""
    for (source, shots), own in groups(rows).items():
        seeds = len({row.seed for row in own})
        print(f"\n  {source}, shots {shots}, {seeds} seeds: accuracy in percent, mean and standard error")
        lines = []
        for arm in dict.fromkeys(row.arm for row in own):
            of_arm = [row for row in own if row.arm == arm]
            mean, error = spread([row.test for row in of_arm])
            valid, _ = spread([row.valid for row in of_arm])
            seconds, tried = (float(np.median([getattr(r, f) for r in of_arm])) for f in ("seconds", "tried"))
            line = f"{mean:.1f}", f"{error:.1f}", f"{valid:.1f}", f"{seconds:.1f}", f"{tried:.0f}"
            lines.append((arm, *line))
        table(("arm", "test", "error", "valid", "CPU s", "tried"), lines)
        for sentence in verdicts(own):
            print(f"  - {sentence}")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, in percent; of one value the error is not known."""
    percent = 100 * np.asarray(values)
    error = percent.std(ddof=1) / np.sqrt(percent.size) if percent.size > 1 else np.nan
    return float(percent.mean()), float(error)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Differences in test accuracy, seeds paired; one holds that is large enough and two errors from zero."""
    pairs = [("unem", arm) for arm in ("em", "em_scale", "grid", "random", "unem_ce", "softplus")]
    pairs += [("unem", "global"), ("unem", "implicit"), ("global", "grid"), ("global_ce", "grid")]
    out = []
    for better, worse in pairs:
        gaps = [
            a.test - b.test for a in rows for b in rows if (a.arm, b.arm, a.seed) == (better, worse, b.seed)
        ]
        if gaps:
            mean, error = spread(gaps)
            won = sum(gap > 0 for gap in gaps)
            asked = ASKED.get(rows[0].shots, 0.0) if (better, worse) == ("unem", "em") else 0.0
            clear = np.isnan(error) or mean > 2 * error
            verdict = "holds" if mean >= asked and clear else "does not hold"
            wanted = "" if not asked else f", {asked:g} asked"
            out.append(
                f"{better} beats {worse}: by {mean:.1f} points, standard error {error:.1f}{wanted}, in {won} "
                f"of {len(gaps)} seeds ({verdict})"
            )
    return out


def draw(rows: Sequence[Row], folder: Path, arm: str = "unem") -> None:
    """Learned prior weights and temperatures by step, a line for each seed and their median."""
    from matplotlib.figure import Figure

    for (source, shots), own in groups([row for row in rows if row.arm == arm]).items():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for ax, name in zip(figure.subplots(1, 2), ("prior_weight", "temperature"), strict=True):
            values = np.array([row.hparams[name] for row in own])
            steps = np.arange(1, values.shape[1] + 1)
            ax.plot(steps, values.T, color="C0", alpha=0.3, linewidth=1)
            ax.plot(steps, np.median(values, axis=0), "o-", color="C0", markersize=4)
            ax.axhline(1.0, color="0.5", linewidth=0.8, linestyle="--")
            ax.set_yscale("log")
            ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
            ax.set_xticks(steps)
            ax.set_xlabel("step of EM")
            ax.set_title(name.replace("_", " "))
            ax.grid(color="0.9")
        figure.suptitle(f"{source}, shots {shots}: learned strengths of {len(own)} seeds and their median")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{source}_{shots}.png", dpi=120)
