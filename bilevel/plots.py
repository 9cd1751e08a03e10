"""Lines of a run over its outer steps; matplotlib is imported when a figure is made."""

from __future__ import annotations

import textwrap

import jax
import numpy as np

# Lines of one hyperparameter leaf that are still told apart.
MOST_LINES = 32
# Okabe and Ito's colours, which the colour-blind tell apart. Of a population: the members in grey.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
)  # fmt: skip
_VALUE, _JUDGED, _TEST, _OTHERS = BLUE, GREEN, VERMILION, "0.65"
# From this ratio of the largest to the smallest number on, an axis is logarithmic.
_WIDE = 30
SMALL = {"frameon": False, "fontsize": 8}


def figure(*args, **kwargs):
    """A matplotlib figure and its axes, without touching pyplot's global state of windows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'bilevel[plots]'.") from error
    return Figure(*args, layout="constrained", **kwargs)


def plot_result(result):
    """See `bilevel.Result.plot`."""
    from bilevel import panels

    drawn, left_out = panels.panels(result)
    columns = len(drawn) if len(drawn) <= 4 else 3 if len(drawn) <= 6 else 4
    rows = -(-len(drawn) // columns)
    fig = figure(figsize=(3.6 * columns, 3.2 * rows))
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, drawn, strict=False):
        panel.draw(ax)
    for ax in axes[len(drawn) :]:
        ax.remove()
    if left_out:
        text = textwrap.fill(panels.sentence(left_out), 48 * columns, max_lines=2)
        fig.supxlabel(text, fontsize=8, color="0.4")
    return fig


def plot_value(ax, result) -> None:
    """Outer value (and what was judged or tested) over the outer steps, the best one marked."""
    history, member = result.history, result.best.member
    value = np.where(history["accepted"], history["value"], np.nan)
    if member is None:
        wide = logarithmic(value)
        columns = {"validation": value, **{n: history[n] for n in ("judged", "test") if n in history}}
    else:
        # What decides which is best; a minibatch says little.
        decides, label = history.get("judged", value), "judged" if "judged" in history else "validation"
        wide = logarithmic(decides)
        _plot_members(ax, history["step"], decides, member, label, wide)
        columns = {"test": history["test"][:, member]} if "test" in history else {}
    for name, column in columns.items():
        seen = np.isfinite(column)
        colour = {"validation": _VALUE, "judged": _JUDGED, "test": _TEST}[name]
        ax.plot(history["step"][seen], column[seen], color=colour, label=name, lw=1)
    if np.isfinite(result.best.value):
        ax.plot(result.best.step, result.best.value, "k.", label="best")
    if wide:
        ax.set_yscale("log")
    _mark_rejected(ax, history, member)
    over_steps(ax, "outer loss")
    ax.legend(**SMALL)


def plot_norm(ax, result) -> None:
    """The norm of the hypergradient over the outer steps."""
    history, member = result.history, result.best.member
    norm = np.where(history["grad_norm"] > 0, history["grad_norm"], np.nan)
    wide = logarithmic(norm)
    if member is None:
        ax.plot(history["step"], norm, color=_VALUE, lw=1)
    else:
        _plot_members(ax, history["step"], norm, member, log=wide)
    if wide:
        ax.set_yscale("log")
    over_steps(ax, "gradient norm (free units)")


def plot_metric(ax, result, name: str) -> None:
    """A metric of the outer loss, on validation and test data."""
    history, member = result.history, result.best.member
    for label, key, colour in (("validation", name, _VALUE), ("test", f"test_{name}", _TEST)):
        column = history[key] if member is None else history[key][:, member]
        seen = np.isfinite(column)
        ax.plot(history["step"][seen], column[seen], color=colour, label=label, lw=1)
    over_steps(ax, name)
    ax.legend(**SMALL)


def over_steps(ax, title: str) -> None:
    """Name a panel whose horizontal axis is the outer step."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("outer step")


def logarithmic(values) -> bool:
    """Whether numbers, but for the largest twentieth, ask for a logarithmic axis."""
    seen = values[np.isfinite(values)]
    return bool(seen.size and seen.min() > 0 and np.quantile(seen, 0.95) > _WIDE * seen.min())


def spread_widely(values) -> bool:
    """The same of hyperparameters with many entries; rates and weights between 0 and 1 are not."""
    seen = values[np.isfinite(values)]
    if not seen.size or seen.min() <= 0 or (seen.max() <= 1 and np.median(seen) > 0.05):
        return False
    low, high = np.quantile(seen, (0.1, 0.9))
    return bool(high > _WIDE * low)


def _mark_rejected(ax, history, member: int | None) -> None:
    """Steps that were rejected, by crosses at the bottom."""
    rejected = history["nonfinite"] > 0 if member is None else history["nonfinite"][:, member] > 0
    if rejected.any():
        steps = history["step"][rejected]
        bottom = ax.get_xaxis_transform()
        ax.scatter(
            steps,
            np.full(len(steps), 0.02),
            s=12,
            color="k",
            marker="x",
            transform=bottom,
            lw=0.8,
            label="rejected",
        )


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
    ax.plot(steps[own], lines[own, best], color=_VALUE, lw=1.4, label=label)
    seen = lines[np.isfinite(lines)]
    if not seen.size:
        return
    low, high = seen.min(), max(np.max(lines[own, best], initial=seen.min()), np.quantile(seen, 0.75))
    room = high - low
    if seen.max() - low > 100 * room > 0:  # some blew up: the others are to be seen
        if log:
            ax.set_ylim(low / 2, 5 * high)
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
    ax.plot(steps, lines[:, :MOST_LINES], lw=1.2, **style)
    if lines.min() > 0 and lines.max() > _WIDE * lines.min():
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
        middle = slice(2, 3) if trajectory.quantiles[i] else slice(MOST_LINES)
        for j in np.arange(leaf.shape[1]):
            if j != best:
                ax.plot(steps, leaf[:, j, middle], color=_OTHERS, lw=0.6, zorder=1)
        leaf = leaf[:, best]
    lines = np.reshape(leaf, (len(steps), -1))
    if trajectory.quantiles[i]:
        ax.fill_between(steps, lines[:, 0], lines[:, 4], alpha=0.15, lw=0, label="all")
        ax.fill_between(steps, lines[:, 1], lines[:, 3], alpha=0.35, lw=0, label="middle half")
        ax.plot(steps, lines[:, 2], lw=1 if best is None else 1.8, label="median")
        if spread_widely(lines):
            ax.set_yscale("log")
        ax.legend(**SMALL)
    else:
        ax.plot(steps, lines[:, :MOST_LINES], lw=1 if best is None else 1.8)
        drawn = np.concatenate([np.asarray(line.get_ydata()) for line in ax.lines])
        drawn = drawn[np.isfinite(drawn)]
        if drawn.size and drawn.min() > 0 and drawn.max() > _WIDE * drawn.min():
            ax.set_yscale("log")
