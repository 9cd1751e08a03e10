"""``python -m benchmarks.readme_picture``: docs/images/cleaning.png, from a run of the demonstration.

Seed 1, as the demonstration's own seed is a lucky one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bilevel import demo

PATH = Path(__file__).parents[1] / "docs" / "images" / "cleaning.png"
SEED = 1
SUSPECTS = 15
GREY = "0.45"


def main() -> None:
    report = demo.run(SEED, progress=False)
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    weights, digits, accuracy = figure.subfigures(1, 3, width_ratios=(1.15, 1, 1), wspace=0.06)
    _weights(weights.subplots(), report)
    _suspects(digits, report)
    _accuracy(accuracy.subplots(), report)
    PATH.parent.mkdir(exist_ok=True)
    figure.savefig(PATH, dpi=100)
    print(
        f"{PATH}: {PATH.stat().st_size / 1e3:.0f} kB; accuracy {report.noisy.accuracy:.3f}, "
        f"{report.learned.accuracy:.3f}, {report.clean.accuracy:.3f}; precision {report.precision:.3f}, "
        f"recall {report.recall:.3f}"
    )


def _weights(ax, report: demo.Report) -> None:
    """The learned weights, by what nobody told the run."""
    weight, wrong = np.asarray(report.result.hparams["weight"]), report.data.corrupted
    bins = np.linspace(0, 1, 26)
    ax.hist(weight[wrong], bins, color=demo.VERMILION, alpha=0.7, label="wrong label")
    ax.hist(weight[~wrong], bins, color=demo.BLUE, alpha=0.7, label="right label")
    ax.set(xlabel="learned weight", ylabel="examples", title="weights of 1,000 examples")
    ax.legend(frameon=False, loc="upper center")
    ax.spines[["top", "right"]].set_visible(False)


def _suspects(figure, report: demo.Report) -> None:
    """The digits with the lowest weights, and their labels."""
    weight, train = np.asarray(report.result.hparams["weight"]), report.data.train
    lowest = np.argsort(weight)[:SUSPECTS]
    for ax, i in zip(figure.subplots(3, 5).ravel(), lowest, strict=True):
        ax.imshow(np.asarray(train["x"][i]).reshape(8, 8), cmap="gray_r")
        colour = demo.VERMILION if report.data.corrupted[i] else demo.BLUE
        ax.set_title(f'"{train["y"][i]}"', fontsize=9, color=colour, pad=2)
        ax.set(xticks=[], yticks=[])
    wrong = int(report.data.corrupted[lowest].sum())
    figure.suptitle(f"lowest weights: {wrong} of {SUSPECTS} labels wrong", fontsize="large")


def _accuracy(ax, report: demo.Report) -> None:
    """Test accuracies of three models, trained by the same code."""
    rows = (
        ("all labels,\nbest L2 of 8", report.noisy.accuracy, GREY),
        ("learned weights", report.learned.accuracy, demo.BLUE),
        ("right labels only,\nbest L2 of 8", report.clean.accuracy, GREY),
    )
    names, values, colours = zip(*rows, strict=True)
    ax.hlines(names, 0.8, 1.0, color="0.9", zorder=0)
    ax.scatter(values, names, color=colours, s=60)
    for name, value in zip(names, values, strict=True):
        ax.annotate(f"{value:.3f}", (value, name), (0, 7), textcoords="offset points", ha="center")
    ax.set(xlim=(0.8, 1.0), ylim=(2.5, -0.5), title="test accuracy")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


if __name__ == "__main__":
    main()
