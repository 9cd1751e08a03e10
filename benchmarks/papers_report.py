"""The report of `benchmarks.papers`: a table, a picture and a sentence for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.claims import anchor
from benchmarks.measure import table
from benchmarks.problems.paper import VERDICTS, Evidence, Paper

SHOWN = 6  # numbers of a leaf
_PAGE = """\
# What papers claim, tried here

Ideas of the literature at the size of a minute, each tuned by hypergradient, by random search and by Optuna
in the same CPU time. `python -m benchmarks.papers --page docs/papers.md` writes this page, and draws a
picture of each; the modules in [benchmarks/problems](../benchmarks/problems) say what is scaled down and what
is ours. A verdict is about the claim at this size, and about nothing else. Scores are means over seeds with
standard errors, lower is better; wins are seeds on which the test score by hypergradients is the lower one.
"""


def in_words(hparams) -> str:
    """Names and numbers; of a long leaf its quartiles."""

    def words(path, leaf) -> str:
        values = np.ravel(np.asarray(leaf, float))
        if values.size > SHOWN:
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            return f"{_name(path)}: quartiles {low:.3g} {middle:.3g} {high:.3g}"
        return f"{_name(path)}: {' '.join(f'{x:.3g}' for x in values)}"

    return ", ".join(words(*entry) for entry in jax.tree_util.tree_flatten_with_path(hparams)[0])


def _name(path) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def with_error(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    values = np.asarray(values)
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.4f} +- {error:.4f}"


def save(out: Path, name: str, own: Paper, rows: Sequence[Any], evidence: Evidence) -> None:
    """``NAME.json``, which `show` reads, and ``NAME.png``."""
    if evidence.verdict not in VERDICTS:
        raise ValueError(f"a verdict is one of {VERDICTS}, got {evidence.verdict!r}.")
    found = {
        "title": own.title, "source": own.source, "claim": own.claim, "unit": own.unit,
        "seeds": len({row.seed for row in rows}), "verdict": evidence.verdict,
        "sentence": evidence.sentence, "rows": _table(rows),
    }  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    _draw(out / f"{name}.png", own, rows, evidence)


def _table(rows: Sequence[Any]) -> list[tuple]:
    by_arm: dict[str, list] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    first = by_arm["hypergradient"]
    return [
        (
            arm,
            with_error([row.valid for row in own]),
            with_error([row.test for row in own]),
            "" if own is first else f"{_wins(first, own)} of {len(own)}",
            f"{np.mean([row.tried for row in own]):.0f}",
            f"{np.mean([row.seconds for row in own]):.1f}",
            own[0].hparams[:60],
        )
        for arm, own in by_arm.items()
    ]


def _wins(first, other) -> int:
    return sum(a.test < b.test for a, b in zip(first, other, strict=True))


def _draw(path: Path, own: Paper, rows: Sequence[Any], evidence: Evidence) -> None:
    """Test scores of the arms, and what decided about the claim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    arms = list(dict.fromkeys(row.arm for row in rows))
    for seed in sorted({row.seed for row in rows}):
        own_rows = {row.arm: row.test for row in rows if row.seed == seed}
        left.plot([own_rows[arm] for arm in arms], range(len(arms)), "o", label=f"seed {seed}", alpha=0.8)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set_xlabel(f"test: {own.unit}")
    left.legend(frameon=False, fontsize="small")
    left.grid(color="0.9")
    evidence.draw(right)
    figure.suptitle(f"{own.title}: the claim {evidence.verdict}", fontsize="medium")
    figure.savefig(path, dpi=110)


def page(out: Path, names: Sequence[str]) -> str:
    """The same as a Markdown page."""
    lines = [_PAGE, "| problem | claim | verdict |", "|---|---|---|"]
    every = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    for found in every.values():
        lines.append(
            f"| [{found['title']}](#{anchor(found['title'])}) | {found['claim']} | {found['verdict']} |"
        )
    for name, found in every.items():
        lines += ["", f"## {found['title'][0].upper()}{found['title'][1:]}", ""]
        seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
        verdict = found["verdict"].capitalize()
        lines += [f"{found['source']} (`benchmarks/problems/{name}.py`), {seeds}. {verdict}:", ""]
        lines += ["> " + found["sentence"].replace("+-", "±"), ""]
        lines += [
            f"| | validation | test: {found['unit']} | wins | tried | CPU s |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            "| " + " | ".join(str(cell).replace("+-", "±") for cell in row[:6]) + " |"
            for row in found["rows"]
        ]
    return "\n".join(lines) + "\n"


def show(out: Path, names: Sequence[str]) -> None:
    """Everything that is there."""
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        print(f"\n  {found['title']} ({found['source']})\n  claim: {found['claim']}")
        table(
            ("", "validation", f"test: {found['unit']}", "wins", "tried", "CPU s", "first seed"),
            found["rows"],
        )
        print(f"  {found['verdict'].upper()}: {found['sentence']}")
