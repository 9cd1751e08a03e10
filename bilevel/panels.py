"""Which panels show a result, and those of hyperparameters that are pictures or many numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel import plots
from bilevel.result import Result
from bilevel.trees import readable

_MOST_PANELS = 12
_MOST_METRICS = 2
# Pictures of one leaf, the pixels from which on a matrix is one, and the longest side of a filter.
_MOST_TILES, _LEAST_PIXELS, _FILTER = 36, 9, 11
# Lines of a leaf that have names.
_NAMED_LINES = 6
_TITLE = 42


class Panel(NamedTuple):
    """A picture on axes of its own."""

    title: str
    draw: Callable[[Any], None]


class Leaf(NamedTuple):
    """One leaf of the hyperparameters: its place among all, its name, its shape, and its values.

    ``start``: the entries it began with or, where they are ``many``, their quantiles 0, 1/4, 1/2, 3/4 and 1;
    None where that is not on record. ``best`` and ``last`` are known where they can be read here.
    """

    place: int
    name: str
    shape: tuple[int, ...]
    many: bool
    start: np.ndarray | None
    best: np.ndarray | None
    last: np.ndarray | None


def leaves(result: Result) -> list[Leaf]:
    """All leaves; of a population those of the best member."""
    member = result.best.member
    trail, found = jax.tree.leaves(result.trajectory.hparams), []
    last = jax.tree_util.tree_flatten_with_path(result.hparams)[0]
    best = jax.tree.leaves(result.best.hparams)
    for i, ((path, end), at_best) in enumerate(zip(last, best, strict=True)):
        rows = trail[i] if member is None else trail[i][:, member]
        begun = np.asarray(rows[0], float) if len(rows) and result.trajectory.steps[0] == 0 else None
        found.append(
            Leaf(
                place=i,
                name=jax.tree_util.keystr(path),
                shape=np.shape(at_best),
                many=result.trajectory.quantiles[i],
                start=begun,
                best=_array(at_best),
                last=_array(end, member),
            )
        )
    return found


def _array(leaf, member: int | None = None) -> np.ndarray | None:
    if not readable(leaf):
        return None
    return np.asarray(leaf if member is None else leaf[member], float)


def panels(result: Result, most: int = _MOST_PANELS) -> tuple[list[Panel], list[str]]:
    """At most so many panels, and names of the hyperparameters for which there was no room."""
    metrics = [n for n in result.history if f"test_{n}" in result.history][:_MOST_METRICS]
    head = [
        Panel("outer loss", lambda ax: plots.plot_value(ax, result)),
        Panel("gradient norm (free units)", lambda ax: plots.plot_norm(ax, result)),
        *(Panel(n, functools.partial(plots.plot_metric, result=result, name=n)) for n in metrics),
    ]
    every = leaves(result)
    own = [_of_leaf(result, leaf) for leaf in every]
    room = most - len(head)
    # What shows most of a leaf comes first; the second panels only where there is room for all.
    wanted = own if sum(map(len, own)) <= room else [each[:1] for each in own]
    drawn = [*head, *(panel for each in wanted[:room] for panel in each)]
    return drawn, [f"hparams{leaf.name}" for leaf in every[room:]]


def sentence(left_out: list[str]) -> str:
    """What has no panel."""
    named = ", ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
    return f"not drawn: {named}"


def short(name: str) -> str:
    """The name of a leaf as a title: its end, where it is long."""
    title = f"hparams{name}"
    return title if len(title) <= _TITLE else f"...{title[3 - _TITLE :]}"


def _of_leaf(result: Result, leaf: Leaf) -> list[Panel]:
    title = short(leaf.name)
    over_time = Panel(title, lambda ax: _plot_lines(ax, result, leaf, title))
    shown = leaf.last if leaf.best is None or not np.isfinite(leaf.best).all() else leaf.best
    if shown is None or not np.isfinite(shown).all():
        return [over_time]
    tiles = _tiles(shown)
    if tiles is not None:
        picture = Panel(title, lambda ax: _plot_picture(ax, result, leaf, tiles, title))
        return [picture, over_time] if leaf.many else [picture]
    if not leaf.many:
        return [over_time]
    return [over_time, Panel(title, lambda ax: _plot_histogram(ax, result, leaf, shown, title))]


# --- Over time ----------------------------------------------------------------------------------------------


def _plot_lines(ax, result: Result, leaf: Leaf, title: str) -> None:
    first = None if leaf.many else leaf.start
    entries = 1 if first is None else first.size
    if leaf.many or entries <= _NAMED_LINES:
        colours: Any = [plots.BLUE, plots.VERMILION, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.SKY]
    else:
        from matplotlib import colormaps

        colours = colormaps["viridis"](np.linspace(0, 0.9, entries))
    ax.set_prop_cycle(color=[plots.BLUE] if leaf.many else colours)
    plots.plot_leaf(ax, result.trajectory, leaf.place, result.best.member)
    if 1 < entries <= _NAMED_LINES and first is not None:
        for line, index in zip(ax.lines[-entries:], np.ndindex(first.shape), strict=True):
            line.set_label(str(list(index)))
        ax.legend(handles=ax.lines[-entries:], **plots.SMALL)
    if np.isfinite(result.best.value):
        ax.vlines(result.best.step, 0, 1, "0.75", ":", lw=1, transform=ax.get_xaxis_transform(), zorder=0)
    plots.over_steps(ax, title)


# --- Many numbers -------------------------------------------------------------------------------------------


def _plot_histogram(ax, result: Result, leaf: Leaf, shown: np.ndarray, title: str) -> None:
    """Entries at the best step and at the end, and where they began."""
    last = leaf.last if leaf.last is not None and np.isfinite(leaf.last).all() else shown
    both = np.concatenate([shown.ravel(), last.ravel()])
    wide = plots.spread_widely(both)
    low, high = both.min(), both.max()
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.geomspace(low, high, 41) if wide else np.linspace(low, high, 41)
    ax.hist(shown.ravel(), bins, color=plots.BLUE, alpha=0.6, label=f"best (step {result.best.step})")
    if not np.array_equal(last, shown):
        ax.hist(last.ravel(), bins, color="k", histtype="step", lw=0.8, label="end")
    begun = leaf.start
    if begun is not None and np.isfinite(begun).all() and not (wide and begun[0] <= 0):
        if begun[0] == begun[4]:
            ax.axvline(begun[2], color=plots.VERMILION, lw=1.2, ls="--", label="start (all)")
        else:
            ax.axvspan(
                begun[1], begun[3], color=plots.VERMILION, alpha=0.15, lw=0, label="start, middle half"
            )
    if wide:
        ax.set_xscale("log")
    ax.set_title(f"{title}, {shown.size:,} entries", fontsize=10)
    ax.set(xlabel="value", ylabel="entries")
    ax.legend(**plots.SMALL)


# --- Pictures -----------------------------------------------------------------------------------------------


def _tiles(values: np.ndarray) -> np.ndarray | None:
    """An array as pictures, (n, height, width) or (n, height, width, 3); None where it is none."""
    if values.ndim > 2:
        values = values.reshape([n for n in values.shape if n > 1] or [1])
    coloured = values.shape[-1:] == (3,) and values.min() >= 0 and values.max() <= 1
    if values.ndim in (3, 4) and coloured and min(values.shape[-3:-1]) > 3:
        return values.reshape(-1, *values.shape[-3:])
    if values.ndim > 2 and _is_filter(values.shape[:2]) and not _is_filter(values.shape[-2:]):
        values = np.moveaxis(values, (0, 1), (-2, -1))  # flax has the channels last
    if values.ndim not in (2, 3, 4) or min(values.shape[-2:]) < 2 or values.size < _LEAST_PIXELS:
        return None
    return values.reshape(-1, *values.shape[-2:])


def _is_filter(sides: tuple[int, ...]) -> bool:
    return sides[0] == sides[1] and 1 < sides[0] <= _FILTER


def _plot_picture(ax, result: Result, leaf: Leaf, tiles: np.ndarray, title: str) -> None:
    """The pictures at the best step; of one that is small the start beside it."""
    count = len(tiles)
    if leaf.start is not None and not leaf.many and count == 1:
        before = _tiles(leaf.start)
        tiles = tiles if before is None else np.concatenate([before, tiles])
    grid = _mosaic(tiles[np.linspace(0, len(tiles) - 1, min(len(tiles), _MOST_TILES)).astype(int)])
    low, high = float(tiles.min()), float(tiles.max())
    if grid.ndim == 3:
        ax.imshow(grid, interpolation="nearest")
    else:
        style = {"cmap": "viridis", "vmin": low, "vmax": high}
        if low < 0 < high:  # zero is in the middle
            style = {"cmap": "RdBu_r", "vmin": -max(-low, high), "vmax": max(-low, high)}
        height, width = grid.shape
        fits = max(height, width) <= 6 * min(height, width)
        drawn = ax.imshow(grid, aspect="equal" if fits else "auto", interpolation="nearest", **style)
        shrink = min(max(height / width, 0.4), 1.0) if fits else 1.0
        ax.figure.colorbar(drawn, ax=ax, shrink=shrink, pad=0.02).ax.tick_params(labelsize=8)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    some = f", {_MOST_TILES} of {count}" if count > _MOST_TILES else ""
    ax.set_title(f"{title}{some}", fontsize=10)
    ax.set_xlabel(
        "start, best" if len(tiles) > count else f"at the best step, {result.best.step}", fontsize=8
    )


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """Pictures in rows, with a gap between them that stays empty."""
    n, height, width = tiles.shape[:3]
    if n == 1:
        return tiles[0]
    columns = 2 if n == 2 else int(np.ceil(np.sqrt(n * height / width)))
    rows, gap = -(-n // columns), max(1, min(height, width) // 10)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *tiles.shape[3:])
    grid = np.full(shape, 1.0 if tiles.ndim == 4 else np.nan)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = tile
    return grid
