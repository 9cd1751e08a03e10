"""Pictures of a run; matplotlib is imported when one is drawn."""

from __future__ import annotations

import jax
import numpy as np

# Lines of one hyperparameter leaf that are still told apart.
_MOST_LINES = 32
# Of a population: the members, the best of them, and its test value.
_OTHERS, _BEST, _TEST = "0.65", "C0", "C1"


def figure(*args, **kwargs):
    """A matplotlib figure and its axes, without touching pyplot's global state of windows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'bilevel[plots]'.") from error
    return Figure(*args, layout="constrained", **kwargs)


def plot_result(result):
    """See `bilevel.Result.plot`."""
    leaves = jax.tree_util.tree_flatten_with_path(result.trajectory.hparams)[0]
    columns = 2 + len(leaves[:4])
    fig = figure(figsize=(3.6 * columns, 3.2))
    axes = fig.subplots(1, columns)
    history, best = result.history, result.best.member
    plot_value(axes[0], result)
    norm = np.where(history["grad_norm"] > 0, history["grad_norm"], np.nan)
    if best is None:
        axes[1].semilogy(history["step"], norm)
    else:
        _plot_members(axes[1], history["step"], norm, best, log=True)
    axes[1].set(title="gradient norm (free units)", xlabel="outer step")
    for i, (ax, (path, _)) in enumerate(zip(axes[2:], leaves, strict=False)):
        plot_leaf(ax, result.trajectory, i, best)
        ax.set(title="hparams" + jax.tree_util.keystr(path), xlabel="outer step")
    return fig


def plot_value(ax, result) -> None:
    """Outer value (and what was judged or tested) over the outer steps, the best one marked."""
    history, member = result.history, result.best.member
    if member is None:
        ok = history["accepted"]
        ax.plot(history["step"][ok], history["value"][ok], label="validation", lw=1)
        columns = {name: history[name] for name in ("judged", "test") if name in history}
    else:
        # What decides which is best; a minibatch says little.
        label = "judged" if "judged" in history else "validation"
        value = np.where(history["accepted"], history["value"], np.nan)
        _plot_members(ax, history["step"], history.get("judged", value), member, label)
        columns = {"test": history["test"][:, member]} if "test" in history else {}
    for name, column in columns.items():
        seen = np.isfinite(column)
        colour = None if member is None else _TEST
        ax.plot(history["step"][seen], column[seen], color=colour, label=name, lw=1)
    if np.isfinite(result.best.value):
        ax.plot(result.best.step, result.best.value, "k.", label="best")
    ax.set(title="outer loss", xlabel="outer step")
    ax.legend(frameon=False, fontsize=8)


def _plot_members(ax, steps, lines, best: int, label: str | None = None, log: bool = False) -> None:
    """A thin line for each member of a population, columns of ``lines``, and a thick one for the best."""
    if log:
        ax.set_yscale("log")
    for i in np.arange(lines.shape[1]):
        own = np.isfinite(lines[:, i])
        if i != best:
            ax.plot(steps[own], lines[own, i], color=_OTHERS, lw=0.6, zorder=1)
    own = np.isfinite(lines[:, best])
    label = label and f"{label}, member {best}"
    ax.plot(steps[own], lines[own, best], color=_BEST, lw=1.8, label=label)
    seen = lines[np.isfinite(lines)]
    if not seen.size:
        return
    low, high = seen.min(), max(np.max(lines[own, best], initial=seen.min()), np.quantile(seen, 0.75))
    room = high - low
    if seen.max() - low > 100 * room > 0:  # some blew up: the others are to be seen
        if log:
            ax.set_ylim(low / 2, 10 * high)
        else:
            ax.set_ylim(low - 0.05 * room, high + 0.5 * room)


def plot_schedule(schedule):
    """See `bilevel.Schedule.plot`."""
    steps, lines = np.asarray(schedule.steps), np.reshape(schedule.values, (len(schedule.steps), -1))
    fig = figure(figsize=(4.8, 3.2))
    ax = fig.subplots()
    style = {"drawstyle": "steps-post"} if schedule.interpolation == "constant" else {}
    if style:  # the last window is as long as the one before
        steps = np.append(steps, 2 * steps[-1] - steps[max(len(steps) - 2, 0)])
        lines = np.concatenate([lines, lines[-1:]])
    ax.plot(steps, lines[:, :_MOST_LINES], lw=1.2, **style)
    if lines.min() > 0 and lines.max() > 30 * lines.min():
        ax.set_yscale("log")
    ax.set(xlabel="training step", ylabel="value")
    return fig


def plot_leaf(ax, trajectory, i: int, best: int | None = None) -> None:
    """Hyperparameter leaf ``i`` over time: its entries, or a band of quantiles where they are many.

    Of a population ``best`` is the member that is drawn thick; of the others there are thin lines, medians
    where a leaf has many entries.
    """
    steps = trajectory.steps
    leaf = jax.tree.leaves(trajectory.hparams)[i]
    if best is not None:
        leaf = np.reshape(leaf, (*leaf.shape[:2], -1))
        middle = slice(2, 3) if trajectory.quantiles[i] else slice(_MOST_LINES)
        for j in np.arange(leaf.shape[1]):
            if j != best:
                ax.plot(steps, leaf[:, j, middle], color=_OTHERS, lw=0.6, zorder=1)
        leaf = leaf[:, best]
    lines = np.reshape(leaf, (len(steps), -1))
    if trajectory.quantiles[i]:
        ax.fill_between(steps, lines[:, 0], lines[:, 4], alpha=0.15, lw=0, label="all")
        ax.fill_between(steps, lines[:, 1], lines[:, 3], alpha=0.35, lw=0, label="middle half")
        ax.plot(steps, lines[:, 2], lw=1 if best is None else 1.8, label="median")
        ax.legend(frameon=False, fontsize=8)
    else:
        ax.plot(steps, lines[:, :_MOST_LINES], lw=1 if best is None else 1.8)
        drawn = [np.asarray(line.get_ydata()) for line in ax.lines]
        low, high = min(map(np.nanmin, drawn)), max(map(np.nanmax, drawn))
        if low > 0 and high > 30 * low:
            ax.set_yscale("log")
