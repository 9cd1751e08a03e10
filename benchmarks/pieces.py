"""Pieces of the report's page: tables that sort, figures, the legend, and what it says of the measurement."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.charts import name_classes
from benchmarks.overall import Overall
from benchmarks.report import endings, metric, number
from benchmarks.rows import FAILED
from benchmarks.summary import WITHIN, Entry, in_order, middle, percent

HOW = """<p>A job is a problem, a method and a seed; the seed draws the data. Every job compiles from
nothing, and its clock runs after that. A gradient method follows one pair of params and
hyperparameters, whose training is never finished; a search trains every configuration to the end.
To compare them, the hyperparameters that a method had at a time are trained accurately from the
problem's start, after the run and apart from its time: all values here are of such models. The
answer of a gradient method is the better of its best pair and its last one.</p>
<p>The lowest known value of a problem and seed is the lowest answer of any method of this study,
or the optimum where theory knows it. A run has arrived when it is within 2 % of that and stays so
to its end: passing by does not count. Examples count the rows that gradients, values and products
touch. Every method has one setting for all problems; where its name ends in <code>_tuned</code> it
is the one that a recorded search of some families found on another seed
(<code>benchmarks/tuned.json</code>). The
inner rates of the problems were chosen by hand, which the default does not use. Gradient methods
begin at the problem's start, searches in its box.</p>"""


class Column(NamedTuple):
    """A header, whether its cells are numbers, and what a pointer on it says."""

    name: str
    numeric: bool = True
    title: str = ""


class Cell(NamedTuple):
    """What is shown and what is sorted by; None is no value."""

    text: str
    key: float | str | None = None
    classes: str = ""


def cell(value: float, digits: int = 3, text: str | None = None) -> Cell:
    """A number; what is not finite is a dash without a key."""
    finite = bool(np.isfinite(value))
    return Cell(number(value, digits) if text is None else text, float(value) if finite else None)


def table(columns: Sequence[Column], lines: Sequence[Sequence[Cell]], label: str) -> str:
    """A table whose headers sort it."""
    heads = "".join(
        f'<th scope="col"{_class("num" if column.numeric else "")}{_title(column.title)}>'
        f'<button type="button">{html.escape(column.name)}</button></th>'
        for column in columns
    )
    body = "".join(f"<tr>{''.join(map(_cell, columns, line))}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(column: Column, entry: Cell) -> str:
    value = "" if entry.key is None else f"{entry.key:.10g}"
    key = f' data-v="{value}"' if column.numeric else ""
    names = f"{'num' if column.numeric else ''} {entry.classes}"
    return f"<td{_class(names)}{key}>{entry.text}</td>"


def _class(names: str) -> str:
    return f' class="{names.strip()}"' if names.strip() else ""


def _title(text: str) -> str:
    return f' title="{html.escape(text)}"' if text else ""


def plain_table(header: Sequence[str], lines: Sequence[Sequence[object]]):
    """Columns and cells of plain values; the last column is of sentences."""
    columns = [Column(name, name in ("seed", "runs")) for name in header]
    cells = [
        [
            Cell(
                html.escape(str(value)),
                float(value) if column.numeric else None,
                "wrap" if i == len(header) - 1 else "",
            )
            for i, (column, value) in enumerate(zip(columns, line, strict=True))
        ]
        for line in lines
    ]
    return columns, cells


def problem_table(found: Sequence[Entry]):
    """Columns and cells of the results on one problem."""
    metrics = in_order((name for entry in found for row in entry.rows for name in row.metrics), ())
    columns = [
        Column("method", False),
        Column("runs", title="done, of those asked for"),
        Column("above lowest", title="final value over the lowest known of its seed: median (quartiles)"),
        Column("final value", title="outer value after accurate training: median"),
        Column("test", title="outer loss on arrays that no method saw: median"),
        *(Column(name, title="on the test arrays: median") for name in metrics),
        Column(f"s to {percent(WITHIN)}", title="seconds until the excess is at most that: median"),
        Column("examples", title="until then: median"),
        Column("arrived", title=f"runs that came within {percent(WITHIN)}"),
        Column("run s", title="of the timed run: median"),
        Column("compile s", title="median"),
        Column("ended by", False),
    ]
    return columns, [_line(entry, metrics) for entry in found]


def _line(entry: Entry, metrics: Sequence[str]) -> list[Cell]:
    hits = entry.hits / len(entry.rows) if entry.rows else np.nan
    return [
        Cell(html.escape(entry.method)),
        Cell(f"{len(entry.rows)}/{entry.asked}", float(len(entry.rows))),
        cell(middle(entry.excess), text=with_quartiles(entry.excess)),
        cell(entry.middle("solved"), 5),
        cell(entry.middle("test"), 4),
        *(cell(metric(entry, name)) for name in metrics),
        cell(middle(entry.seconds)),
        cell(middle(entry.examples)),
        cell(hits, text=f"{entry.hits}/{len(entry.rows)}" if entry.rows else "-"),
        cell(entry.middle("run_seconds")),
        cell(entry.middle("compile_seconds")),
        Cell(endings(entry), classes="bad" if {FAILED, "DIVERGED"} & entry.statuses.keys() else ""),
    ]


def overall_table(found: Sequence[Overall]):
    """Columns and cells of all problems together."""
    columns = [
        Column("method", False),
        Column("problems"),
        Column("runs"),
        Column("arrived", title=f"runs that came within {percent(WITHIN)} of the lowest known value"),
        Column("time factor", title="until then, over the least of any method: median of those that arrived"),
        Column("with compilation", title="the same, with compilation"),
        Column("above lowest", title="final values over the lowest known: median"),
        Column("at worst", title="highest of them"),
        Column("failed", title="runs that failed, diverged or found no value"),
    ]
    lines = [
        [
            Cell(html.escape(entry.method)),
            cell(entry.problems),
            cell(entry.runs),
            cell(
                entry.arrived / entry.runs,
                text=f"{entry.arrived} <small>({percent(entry.arrived / entry.runs)})</small>",
            ),
            cell(entry.factor),
            cell(entry.cold),
            cell(entry.excess, text=percent(entry.excess)),
            cell(entry.worst, text=percent(entry.worst)),
            Cell(str(entry.bad), float(entry.bad), "bad" if entry.bad else ""),
        ]
        for entry in found
    ]
    return columns, lines


def with_quartiles(shares: np.ndarray) -> str:
    """The median in per cent, and the quartiles where there are several."""
    if not len(shares) or not np.isfinite(np.median(shares)):
        return "-"
    text = percent(float(np.median(shares)))
    if len(shares) < 2:
        return text
    low, high = np.quantile(shares, (0.25, 0.75))
    return f"{text} <small>({percent(low)} to {percent(high)})</small>"


def figure(svg: str, caption: str) -> str:
    """A picture and its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def facts(entries: Mapping[str, str | Sequence[str]]) -> str:
    """A list of names and what they are; several go on lines of their own, and long commands in code."""
    parts = []
    for name, value in entries.items():
        texts = (
            [html.escape(value)]
            if isinstance(value, str)
            else [f"<code>{html.escape(v)}</code>" for v in value]
        )
        parts.append(f"<dt>{html.escape(name)}</dt><dd>{'<br>'.join(texts)}</dd>")
    return f'<dl class="facts">{"".join(parts)}</dl>'


def legend(methods: Sequence[str]) -> str:
    """A button for each method, which hides it."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-method="{html.escape(name)}">'
        f'<svg class="key {name_classes(name)}" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path d="M0 4H26"/></svg>'
        f"{html.escape(name)}</button>"
        for name in methods
    )
    return f'<div class="legend" role="group" aria-label="Methods shown in the pictures">{buttons}</div>'
