"""The report as one page: HTML with its style, script and pictures inside, which needs no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import charts, pieces
from benchmarks.methods import METHODS
from benchmarks.overall import overall, sentence
from benchmarks.problems import PROBLEMS
from benchmarks.report import jobs_of, where
from benchmarks.rows import REFUSED, Row, StudyError
from benchmarks.study import Study
from benchmarks.summary import (
    WITHIN,
    bad,
    band,
    by_method,
    by_problem,
    costs,
    curves,
    entries,
    lowest_known,
    percent,
    profile,
    verdict,
)

_HERE = Path(__file__).parent
AXES = (("seconds", "seconds, without compilation"), ("examples", "examples touched by all oracles"))
PROFILES = (
    ("seconds", "factor of the least time", "By time"),
    ("cold", "factor of the least time", "By time, with compilation"),
    ("examples", "factor of the fewest examples", "By examples touched"),
)
FACTOR = 1e3
PROFILES_SAY = f"""A performance profile (Dolan and Moré, 2002) says on which share of all problems and
seeds a method is within {percent(WITHIN)} of the lowest known value at a cost of at most so many times
the least cost of any method: far left is who is first, far right is who arrives at all. A method that
does not run on a problem does not arrive there."""


def save(study: Study, path: Path) -> None:
    """Write the page.

    Raises:
      StudyError: there are no rows, or the file cannot be written.
    """
    text = page(study)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None


def page(study: Study) -> str:
    """The whole page."""
    problems = by_problem(study)
    rows = [row for of_problem in problems.values() for row in of_problem]
    methods = list(by_method(rows))
    body = [
        _head(study, rows),
        pieces.legend(methods),
        _overall(rows),
        *(_problem(study, name, of_problem) for name, of_problem in problems.items()),
        _endings(rows),
        _how(methods),
    ]
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmarks of bilevel: {html.escape(study.folder.resolve().name)}</title>"
        f"<style>\n{style}</style></head>\n<body>\n{''.join(body)}\n<script>\n{script}</script></body></html>\n"
    )


def _head(study: Study, rows: Sequence[Row]) -> str:
    seconds, jobs = study.settings()[0], jobs_of(study)
    done = len({*jobs} & {row.job for row in rows})
    began = sorted(row.started for row in rows)
    facts = {
        "Runs": f"{done} of {len(jobs)} asked for, {seconds:g} s each without compilation",
        "Begun": " to ".join(dict.fromkeys(text[:16].replace("T", " ") for text in (began[0], began[-1])))
        + " UTC",
        "Where": "; ".join(where(rows)),
        "Command": sorted({row.command for row in rows}),
    }
    loads, cores = [row.machine.load for row in rows], max(row.machine.cores for row in rows)
    loaded = ""
    if np.nanmax([*loads, 0.0]) > 2 * cores:  # more than workers of its own make
        loaded = (
            f'<p class="warning">The machine was busy: the load was up to {max(loads):.1f} on {cores} '
            "cores. Seconds are those of a slower machine, and vary more than usual.</p>"
        )
    links = [f'<li><a href="#{name}">{name}</a></li>' for name in dict.fromkeys(row.problem for row in rows)]
    return (
        f"<header><h1>bilevel: ways to tune hyperparameters, at equal time</h1>{pieces.facts(facts)}{loaded}"
        f'<nav aria-label="Problems"><ul><li><a href="#overall">overall</a></li>{"".join(links)}'
        '<li><a href="#endings">endings</a></li><li><a href="#how">how it was measured</a></li>'
        "</ul></nav></header>"
    )


def _overall(rows: Sequence[Row]) -> str:
    found = overall(rows)
    pictures = []
    for field, label, name in PROFILES:
        shares = {name: _profile(ratios) for name, ratios in costs(rows, field).items()}
        pictures.append(pieces.figure(charts.profiles(shares, label), f"Performance profile. {name}."))
    return (
        '<section id="overall"><h2>Over all problems</h2>'
        f'<p class="verdict">{html.escape(sentence(found))}</p>'
        f"{pieces.table(*pieces.overall_table(found), 'Over all problems')}"
        f'<div class="charts three">{"".join(pictures)}</div>'
        f'<p class="quiet">{PROFILES_SAY}</p></section>'
    )


def _profile(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.unique([1.0, *ratios[ratios <= FACTOR], FACTOR])
    return at, profile(ratios, at)


def _problem(study: Study, name: str, rows: Sequence[Row]) -> str:
    found, lowest = entries(rows, jobs_of(study)), lowest_known(rows)
    pictures = []
    for field, label in AXES:
        with_curves = {m: curves(own, field, lowest) for m, own in by_method(rows).items()}
        bands = {method: band(lines) for method, lines in with_curves.items() if lines}
        if bands:
            text = f"Above the lowest known value, after accurate training, by {field}: median and quartiles."
            pictures.append(pieces.figure(charts.curves(bands, label, WITHIN), text))
    entry = PROBLEMS.get(name)
    about = (
        f"{entry.about}; {entry.hparams} hyperparameter{'s' * (entry.hparams > 1)}. Data: {entry.source}."
        if entry
        else ""
    )
    return (
        f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2>'
        f'<p class="quiet">{html.escape(about[:1].upper() + about[1:])}</p>'
        f'<p class="verdict">{html.escape(verdict(found))}</p>'
        f'<div class="charts">{"".join(pictures)}</div>'
        f"{pieces.table(*pieces.problem_table(found), f'Results on {name}')}</section>"
    )


def _endings(rows: Sequence[Row]) -> str:
    wrong, refused = bad(rows), [row for row in rows if row.status == REFUSED]
    parts = ['<section id="endings"><h2>How runs ended</h2>']
    if wrong:
        said = [(row.problem, row.method, row.seed, row.status, row.message) for row in wrong]
        counted = f"{len(wrong)} of {len(rows)} runs failed, diverged or found no value."
        parts.append(f'<p class="warning">{counted}</p>')
        parts.append(
            pieces.table(*pieces.plain_table(("problem", "method", "seed", "ended by", "why"), said), "Bad")
        )
    else:
        parts.append("<p>No run failed, diverged or ended without a value.</p>")
    if refused:
        once = list(dict.fromkeys((row.method, row.problem, row.message) for row in refused))
        parts.append("<h3>Does not apply</h3>")
        parts.append(pieces.table(*pieces.plain_table(("method", "problem", "why"), once), "Does not apply"))
    kinds = list(dict.fromkeys((row.status, row.method) for row in rows if row.status != REFUSED))
    counted = [
        (status, method, len(own), own[0].message)
        for status, method in sorted(kinds)
        if (own := [row for row in rows if (row.status, row.method) == (status, method)])
    ]
    parts.append("<h3>All endings, each with the words of its first run</h3>")
    header = ("ended by", "method", "runs", "why")
    parts.append(pieces.table(*pieces.plain_table(header, counted), "All endings"))
    return f"{''.join(parts)}</section>"


def _how(methods: Sequence[str]) -> str:
    listed = {name: METHODS[name].about if name in METHODS else "not known any more" for name in methods}
    return f'<section id="how"><h2>How it was measured</h2>{pieces.HOW}{pieces.facts(listed)}</section>'
