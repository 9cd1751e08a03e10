"""A figure of one panel with some curves and a legend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def save(path: Path, title: str, xlabel: str, ylabel: str, plot: Callable[[Any], None]) -> None:
    """Have ``plot(ax)`` draw and write the picture, with its folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.add_subplot()
    plot(ax)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    ax.grid(color="0.9")
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
