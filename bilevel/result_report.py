"""A result as one page of HTML that holds its pictures and needs nothing else: `bilevel.Result.report`."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel import archive, diagnosis, panels, plots
from bilevel.problem import Status
from bilevel.progress import duration
from bilevel.result import COUNT_COLUMNS, Result

# Rows of the tables of hyperparameters and of members.
_MOST_ROWS = 200
# Entries of a leaf that are written out.
_LISTED = 6
_DPI = 130
_WELL = (Status.CONVERGED, Status.BUDGET)
_WORK = {
    "inner_grad": "inner gradients",
    "outer_grad": "outer gradients",
    "hvp": "Hessian-vector products",
    "cross": "cross products",
}
_STYLE = """
:root { --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --good: #1a7f37; --bad: #b35900; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
.status { display: inline-block; padding: 0 0.6rem; border-radius: 1rem; color: #fff; font-size: 0.85rem; }
.good { background: var(--good); } .bad { background: var(--bad); }
.warning { border-left: 4px solid var(--bad); background: #fff8ee; padding: 0.5rem 0.8rem; margin: 0.5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; overflow-wrap: normal; } td { font-variant-numeric: tabular-nums; }
td.short { white-space: nowrap; } td.long { min-width: 18rem; } tr.best { background: #eaf5ff; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0.5rem; }
.panels img { width: 100%; max-width: 30rem; height: auto; }
pre { background: #f6f8fa; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
.soft { color: var(--soft); font-size: 0.9rem; }
"""  # noqa: E501


def write(
    result: Result,
    path: str | os.PathLike,
    title: str = "bilevel run",
    notes: Mapping[str, Any] | None = None,
    loads: str | None = None,
) -> None:
    """Write the page; whole or not at all.

    Args:
      result: of a run or a population, as it came or as it was loaded.
      path: of the file; its folder must exist.
      title: of the page.
      notes: rows that are added to the summary.
      loads: Python that reads the result again; default: `bilevel.load`.

    Raises:
      ImportError: matplotlib is missing; ValueError: no such folder, or the path is one.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder {path.parent} does not exist; create it first.")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; give the path of a file, such as run.html.")
    content = page(result, title, notes or {}, loads)
    with archive.aside(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def page(result: Result, title: str, notes: Mapping[str, Any], loads: str | None = None) -> str:
    """The page as text; arguments as of `write`."""
    pictures, left_out = _pictures(result)
    parts = [
        f"<h1>{_text(title)}</h1>",
        _ending(result),
        *(f'<div class="warning">{_text(sentence)}</div>' for sentence in warnings_of(result)),
        "<h2>Summary</h2>",
        _facts({**_summary(result), **notes}),
        "<h2>Pictures</h2>",
        f'<div class="panels">{"".join(pictures)}</div>',
        f'<p class="soft">{_text(panels.sentence(left_out))}</p>' if left_out else "",
        "<h2>Hyperparameters</h2>",
        _hyperparameters(result),
        "" if result.members is None else "<h2>Members</h2>" + _members(result),
        "<h2>Work</h2>",
        _facts(_work(result)),
        "<h2>How to load it</h2>",
        f"<pre>{_text(loads or _LOADS)}</pre>",
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
    )
    return head + "\n".join(part for part in parts if part) + "\n</body></html>\n"


_LOADS = """import bilevel

result.save("run.npz")  # where the run was made
result = bilevel.load("run.npz")"""


def _text(value: Any) -> str:
    return html.escape(str(value))


# --- How it ended -------------------------------------------------------------------------------------------


def statuses(result: Result) -> list[Status]:
    """Of the run, or of each member."""
    return [Status(int(code)) for code in np.ravel(np.asarray(result.status))]


def _ending(result: Result) -> str:
    """The status and why; of a population how many members ended how."""
    every = statuses(result)
    badges = []
    for status in sorted(set(every)):
        count = f"{every.count(status)} of {len(every)} " if result.members is not None else ""
        kind = "good" if status in (*_WELL, Status.DROPPED, Status.RUNNING) else "bad"
        badges.append(f'<span class="status {kind}">{_text(count + status.name)}</span>')
    said = result.message
    for sentence in _advice(result):
        said = said.replace(sentence, "")
    return f"<p>{' '.join(badges)} {_text(' '.join(said.split()))}</p>"


def _advice(result: Result) -> list[str]:
    """The sentences of a message that are advice, each once."""
    if result.members is not None:
        return []
    status, found = statuses(result)[0], {}
    for may_rest in (False, True):
        for bounded in (False, True):
            found.update(dict.fromkeys(diagnosis.final(status, result.history, may_rest, bounded)[1]))
    return [sentence for sentence in found if sentence in result.message]


def warnings_of(result: Result) -> list[str]:
    """What deserves attention, in sentences."""
    history, steps = result.history, len(result.history["step"])
    warned = _advice(result)
    rejected = int((history["nonfinite"] > 0).sum())
    if rejected:
        of = steps * (1 if result.members is None else len(result.members.messages))
        warned.append(
            f"{rejected:,} of {of:,} outer steps met numbers that are not finite, and were rejected: lower "
            "the learning rates, or keep hparams in a range by constraints."
        )
    gap = _gap(result)
    if gap is not None and gap > 0.5 and not any("overfit" in sentence for sentence in warned):
        warned.append(
            f"At the best pair the test value is {100 * gap:.0f} % above the validation value: the "
            "validation data may be overfitted, or the two splits differ."
        )
    if result.members is not None:
        failed = statuses(result).count(Status.DIVERGED)
        warned += [f"{failed} of {len(result.members.messages)} members diverged."] if failed else []
    return warned


def _gap(result: Result) -> float | None:
    """By what part the test value of the best pair is above its validation value."""
    if not result.test or not result.best.value > 0:
        return None
    return float(result.test["best"]["value"]) / result.best.value - 1


# --- Numbers ------------------------------------------------------------------------------------------------


def _summary(result: Result) -> dict[str, str]:
    history, best = result.history, result.best
    steps = len(history["step"])
    facts = {"outer steps": f"{steps:,}", "time": duration(result.seconds)}
    if steps:
        facts["time"] += f", {result.seconds / steps:.3g} s a step, compilation included"
        if result.members is None:
            facts["first value"] = f"{history['value'][0]:.6g}"
            facts["last value"] = f"{history['value'][-1]:.6g}"
    of = "" if best.member is None else f" of member {best.member}"
    facts["best value"] = f"{best.value:.6g} at step {best.step}{of}"
    if result.test:
        for name, value in result.test["best"].items():
            facts["test value, best pair" if name == "value" else f"test {name}, best pair"] = f"{value:.6g}"
        if result.members is None:
            facts["test value, last pair"] = f"{result.test['last']['value']:.6g}"
    if "judged" in history:
        facts["best is decided by"] = f"all validation rows, every {_period(history['judged'])} steps"
    if result.members is not None:
        facts["members"] = f"{len(result.members.messages):,}"
    facts["hyperparameters"] = _sizes(best.hparams)
    if best.params is not None:
        facts["params"] = _sizes(best.params)
    return facts


def _period(column: np.ndarray) -> int:
    """Outer steps between two measurements."""
    seen = np.flatnonzero(np.isfinite(column).reshape(len(column), -1).any(axis=1))
    return int(np.diff(seen).min()) if len(seen) > 1 else 1


def _sizes(tree) -> str:
    leaves = jax.tree.leaves(tree)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves if hasattr(leaf, "dtype")}))
    numbers = sum(int(np.prod(np.shape(leaf))) for leaf in leaves)
    return f"{numbers:,} in {len(leaves):,} arrays" + (f" ({dtypes})" if dtypes else "")


def _work(result: Result) -> dict[str, str]:
    """Examples touched, and how well the linear systems were solved."""
    history = result.history
    facts = {
        f"examples touched by {_WORK[name]}": f"{history[name].sum():,.0f}"
        for name in COUNT_COLUMNS
        if history[name].any()
    }
    solved = history["accepted"] & (history["solver_steps"] > 0)
    if solved.any():
        residual = history["solver_residual"][solved]
        residual = residual[np.isfinite(residual)]
        facts["linear solver steps"] = f"{np.median(history['solver_steps'][solved]):.0f} (median)"
        if residual.size:
            facts["residual it left"] = f"{np.median(residual):.2g} (median), {residual.max():.2g} (largest)"
    facts["rejected steps"] = f"{int((history['nonfinite'] > 0).sum()):,}"
    return facts


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{_text(n)}</th><td>{_text(v)}</td></tr>" for n, v in facts.items())
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


# --- Tables and pictures ------------------------------------------------------------------------------------


def _hyperparameters(result: Result) -> str:
    rows = [
        (f"hparams{leaf.name}", "x".join(map(str, leaf.shape)) or "number", *told(leaf))
        for leaf in panels.leaves(result)
    ]
    more = f" {len(rows) - _MOST_ROWS} more are not listed." if len(rows) > _MOST_ROWS else ""
    whose = "" if result.best.member is None else f" Those of member {result.best.member}."
    caption = f"Of many entries: the least, the median, the largest.{whose}{more}"
    return _table(("name", "shape", "first", "best", "last"), rows[:_MOST_ROWS], caption)


def told(leaf: panels.Leaf) -> tuple[str, str, str]:
    """First, best and last values, in words."""
    return values_in_words(leaf.start, leaf.many), values_in_words(leaf.best), values_in_words(leaf.last)


def values_in_words(values: np.ndarray | None, quantiles: bool = False) -> str:
    """Few numbers as they are; of many, or of their ``quantiles``, the least, the median and the largest."""
    if values is None or not values.size:
        return "not known"
    if values.size <= _LISTED and values.ndim < 2 and not quantiles:
        return ", ".join(f"{v:.4g}" for v in values.ravel())
    return f"{values.min():.4g} .. {np.median(values):.4g} .. {values.max():.4g}"


def _members(result: Result) -> str:
    members = result.members
    assert members is not None
    order = np.argsort(np.where(np.isfinite(members.value), members.value, np.inf), kind="stable")
    tested = members.test["best"]["value"] if members.test else None
    rows = [
        (
            i, statuses(result)[i].name, f"{members.value[i]:.6g}", members.step[i],
            *([] if tested is None else [f"{tested[i]:.6g}"]), members.messages[i],
        )
        for i in order[:_MOST_ROWS].tolist()
    ]  # fmt: skip
    names = ("member", "status", "best value", "at step", *([] if tested is None else ["test"]), "message")
    more = f" Those after the first {_MOST_ROWS} are not listed." if len(order) > _MOST_ROWS else ""
    return _table(names, rows, f"The best first.{more}", marked=result.best.member)


def _table(names: Iterable[str], rows: list[tuple], caption: str, marked: Any = None) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    lines = []
    for row in rows:
        chosen = ' class="best"' if marked is not None and row[0] == marked else ""
        cells = "".join(f'<td class="{_width(value)}">{_text(value)}</td>' for value in row)
        lines.append(f"<tr{chosen}>{cells}</tr>")
    body = "".join(lines)
    return (
        f'<p class="soft">{_text(caption)}</p><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _width(value: Any) -> str:
    return "short" if len(str(value)) < 45 else "long"


def _pictures(result: Result) -> tuple[list[str], list[str]]:
    """Each panel as an image of its own, so that a narrow page shows one below the other."""
    drawn, left_out = panels.panels(result)
    images = []
    for panel in drawn:
        fig = plots.figure(figsize=(4.2, 3.2))
        panel.draw(fig.subplots())
        content = io.BytesIO()
        fig.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
        encoded = base64.b64encode(content.getvalue()).decode()
        images.append(f'<img alt="{_text(panel.title)}" src="data:image/png;base64,{encoded}">')
    return images, left_out
