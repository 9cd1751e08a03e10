"""Pictures of a run; matplotlib is imported when one is drawn."""

from __future__ import annotations

import jax
import numpy as np

# Lines of one hyperparameter leaf that are still told apart.
_MOST_LINES = 32


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
    plot_value(axes[0], result)
    history = result.history
    axes[1].semilogy(history["step"], np.where(history["grad_norm"] > 0, history["grad_norm"], np.nan))
    axes[1].set(title="gradient norm (free units)", xlabel="outer step")
    for i, (ax, (path, _)) in enumerate(zip(axes[2:], leaves, strict=False)):
        plot_leaf(ax, result.trajectory, i)
        ax.set(title="hparams" + jax.tree_util.keystr(path), xlabel="outer step")
    return fig


def plot_value(ax, result) -> None:
    """Outer value (and what was judged or tested) over the outer steps, the best one marked."""
    history = result.history
    ok = history["accepted"]
    ax.plot(history["step"][ok], history["value"][ok], label="validation", lw=1)
    for name in ("judged", "test"):
        if name in history:
            seen = np.isfinite(history[name])
            ax.plot(history["step"][seen], history[name][seen], label=name, lw=1)
    if np.isfinite(result.best.value):
        ax.plot(result.best.step, result.best.value, "k.", label="best")
    ax.set(title="outer loss", xlabel="outer step")
    ax.legend(frameon=False, fontsize=8)


def plot_leaf(ax, trajectory, i: int) -> None:
    """Hyperparameter leaf ``i`` over time: its entries, or a band of quantiles where they are many."""
    steps = trajectory.steps
    lines = np.reshape(jax.tree.leaves(trajectory.hparams)[i], (len(steps), -1))
    if trajectory.quantiles[i]:
        ax.fill_between(steps, lines[:, 0], lines[:, 4], alpha=0.15, lw=0, label="all")
        ax.fill_between(steps, lines[:, 1], lines[:, 3], alpha=0.35, lw=0, label="middle half")
        ax.plot(steps, lines[:, 2], lw=1, label="median")
        ax.legend(frameon=False, fontsize=8)
    else:
        ax.plot(steps, lines[:, :_MOST_LINES], lw=1)
        if np.all(lines > 0) and lines.max() > 30 * lines.min():
            ax.set_yscale("log")
