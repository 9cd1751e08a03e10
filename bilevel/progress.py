"""A live progress bar of a run (rich), imported only when it is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np


@contextlib.contextmanager
def reporter(show: bool, steps: int) -> Iterator[Callable[[int, dict], None]]:
    """A function ``(steps done, last row)`` that updates the bar, or does nothing."""
    if not show:
        yield lambda done, row: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("outer steps"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("", total=steps, text="compiling")

        def report(done: int, row: dict) -> None:
            text = (
                f"value {_lowest(row['value']):.5g}  grad norm {_lowest(row['grad_norm']):.2g}" if row else ""
            )
            bar.update(task, completed=done, text=text)

        yield report


def _lowest(column) -> float:
    """Of the members of a population."""
    finite = np.ravel(column)[np.isfinite(np.ravel(column))]
    return float(finite.min()) if finite.size else float("nan")
