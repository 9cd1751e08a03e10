"""The demonstration: which of these labels are wrong?

Half of the labels of 1,000 handwritten digits are replaced by other ones. Nobody says which. A softmax
model is trained on them while one weight per training example and one L2 strength per class, 1,010
hyperparameters in all, are tuned by the loss on 300 clean digits::

    inner = mean_i weight_i CE(params; x_i, y_i) + 1/2 sum_c l2_c (|W_c|^2 + b_c^2)       (1)
    outer = mean CE(params; x, y) over the clean digits                                   (2)

An example whose gradient points away from what the clean digits ask for loses weight, so that in the end
the weights tell wrong labels from right ones. The idea is known as data hyper-cleaning.

The L2 strengths start strong and fall as slowly as the weights move: a stiff model cannot fit 300 digits by
juggling 1,000 weights. For the same reason the run is short: beyond some 400 outer steps the outer loss
still falls while the test loss rises.

References:
  Franceschi, Donini, Frasconi and Pontil, "Forward and reverse gradient-based hyperparameter
  optimization", 2017, arXiv:1703.01785.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import bilevel
from bilevel import plots

TRAIN, VALID, CLASSES = 1000, 300, 10
STEPS = 250

# Strengths among which a baseline takes the one with the highest validation accuracy. Not the lowest loss:
# wrong labels flatten the probabilities, so that the loss asks for a weak L2 which costs accuracy.
L2_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# Okabe and Ito's blue and vermilion, which the colour-blind tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"


# --- The problem: what a user writes ------------------------------------------------------------------


def logits(params, batch):
    """Scores of the classes, shape (examples, classes)."""
    return batch["x"] @ params["W"] + params["b"][None]


def cross_entropy(params, batch):
    """One loss per example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])


def train_loss(params, hparams, batch):
    """Eq. (1); ``batch["i"]`` says which of the weights belong to the examples of the batch."""
    fit = jnp.mean(hparams["weight"][batch["i"]] * cross_entropy(params, batch))
    squares = jnp.sum(params["W"] ** 2, axis=0) + params["b"] ** 2
    return fit + 0.5 * jnp.sum(hparams["l2"] * squares)


def valid_loss(params, hparams, batch):
    """Eq. (2), and the accuracy as a metric."""
    del hparams
    right = jnp.argmax(logits(params, batch), axis=-1) == batch["y"]
    return jnp.mean(cross_entropy(params, batch)), {"accuracy": jnp.mean(right)}


PROBLEM = bilevel.Problem(
    train_loss,
    valid_loss,
    constraints={"weight": bilevel.interval(0, 1), "l2": bilevel.positive()},
)

METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.cg(max_steps=30)),
    inner=optax.sgd(1.0, momentum=0.9),
    outer=optax.adam(0.03),
    inner_steps=20,
)


def first_params():
    """The model that says nothing."""
    return {"W": jnp.zeros((64, CLASSES)), "b": jnp.zeros(CLASSES)}


def first_hparams():
    """Every example trusted by half, and a strong L2."""
    return {"weight": jnp.full(TRAIN, 0.5), "l2": jnp.full(CLASSES, 0.1)}


# --- The data -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """Three splits; ``corrupted`` says which training labels are wrong, which no loss ever sees."""

    train: dict[str, jax.Array]
    valid: dict[str, jax.Array]
    test: dict[str, jax.Array]
    corrupted: np.ndarray


def load_digits(seed: int) -> Digits:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, split at random, half of the training labels replaced."""
    rng = np.random.default_rng(seed)
    x, y = _require("sklearn.datasets").load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = x[order] / 16, y[order].astype(np.int32)
    corrupted = np.zeros(TRAIN, bool)
    corrupted[rng.choice(TRAIN, TRAIN // 2, replace=False)] = True
    given = y.copy()
    other = rng.integers(1, CLASSES, corrupted.sum(), dtype=np.int32)  # how far on, never back to itself
    given[:TRAIN][corrupted] = (given[:TRAIN][corrupted] + other) % CLASSES

    def split(rows: slice) -> dict[str, jax.Array]:
        return {"x": jnp.asarray(x[rows]), "y": jnp.asarray(given[rows])}

    train = split(slice(TRAIN)) | {"i": jnp.arange(TRAIN)}
    return Digits(train, split(slice(TRAIN, TRAIN + VALID)), split(slice(TRAIN + VALID, None)), corrupted)


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn and matplotlib: pip install 'bilevel[demo]'."
        ) from error


def check_extras() -> None:
    """Look for what the demo needs beyond the library, before any work is done.

    Raises:
      ImportError: scikit-learn or matplotlib is missing; says what to install.
    """
    for module in ("sklearn.datasets", "matplotlib.figure"):
        _require(module)


# --- The job ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A model trained to convergence, and how well it does."""

    params: dict[str, jax.Array]
    l2: np.ndarray
    valid: tuple[float, float]  # loss and accuracy
    accuracy: float  # on the test split


@dataclasses.dataclass(frozen=True)
class Report:
    """What the demo finds.

    ``noisy``, ``learned`` and ``clean`` are models trained from zero to convergence by the same code: on all
    labels with weight one, with the hyperparameters that the run learned, and on the examples with right
    labels only. ``precision`` and ``recall`` are those of "weight < 1/2" as a detector of wrong labels.
    """

    data: Digits
    noisy: Model
    learned: Model
    clean: Model
    precision: float
    recall: float
    result: bilevel.Result

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-12)


def run(seed: int = 0, steps: int = STEPS, progress: bool = True) -> Report:
    """Tune weights and L2 strengths, then train the final model and two to compare it with.

    Args:
      seed: of the split and of the wrong labels.
      steps: outer steps.
      progress: show a live progress bar.

    Raises:
      ImportError: scikit-learn is missing.
    """
    data = load_digits(seed)
    result = bilevel.optimize(
        PROBLEM,
        first_params(),
        first_hparams(),
        data.train,
        data.valid,
        method=METHOD,
        steps=steps,
        progress=progress,
        test=data.test,
    )
    precision, recall = detection(np.asarray(result.hparams["weight"]) < 0.5, data.corrupted)
    return Report(
        data=data,
        noisy=best_baseline(data, np.ones(TRAIN)),
        learned=train_model(data, result.hparams),
        clean=best_baseline(data, ~data.corrupted),
        precision=precision,
        recall=recall,
        result=result,
    )


def detection(suspected: np.ndarray, corrupted: np.ndarray) -> tuple[float, float]:
    """Precision and recall of a suspicion."""
    hits = np.sum(suspected & corrupted)
    return float(hits / max(suspected.sum(), 1)), float(hits / corrupted.sum())


def best_baseline(data: Digits, weight: np.ndarray) -> Model:
    """The model with given weights whose L2, one for all classes, does best on the validation split."""
    weights = jnp.asarray(weight, jnp.result_type(float))
    models = [train_model(data, {"weight": weights, "l2": jnp.full(CLASSES, l2)}) for l2 in L2_GRID]
    return min(models, key=lambda model: (-model.valid[1], model.valid[0]))


def train_model(data: Digits, hparams) -> Model:
    """A model trained from zero to convergence."""
    params = converge(hparams, data.train)
    loss, metrics = valid_loss(params, hparams, data.valid)
    return Model(
        params=params,
        l2=np.asarray(hparams["l2"]),
        valid=(float(loss), float(metrics["accuracy"])),
        accuracy=float(valid_loss(params, hparams, data.test)[1]["accuracy"]),
    )


@jax.jit
def converge(hparams, train):
    """Minimise Eq. (1) by L-BFGS to a gradient norm of 1e-4, from zero; at most 500 steps."""
    solver = optax.lbfgs()

    def loss(params):
        return train_loss(params, hparams, train)

    def going(carry):
        _, state, step = carry
        slope = optax.tree.norm(optax.tree.get(state, "grad"))
        return (step == 0) | (step < 500) & (slope > 1e-4)

    def advance(carry):
        params, state, step = carry
        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, step + 1

    params = first_params()
    return jax.lax.while_loop(going, advance, (params, solver.init(params), jnp.int32(0)))[0]


# --- What is shown ----------------------------------------------------------------------------------------


def main(output: str | os.PathLike, seed: int, progress: bool, console: Console) -> None:
    """Run the job, print its figures and save its picture."""
    check_extras()
    console.print(
        f"Cleaning {TRAIN:,} handwritten digits, half of them with a wrong label: one weight per example and "
        f"one L2 strength per class, {TRAIN + CLASSES:,} hyperparameters, tuned on {VALID} clean digits."
    )
    report = run(seed, progress=progress)
    console.print(table(report))
    draw(report).savefig(output, dpi=110)
    console.print(f"{report.result.message}", highlight=False)
    console.print(f"Picture: {os.fspath(output)}", highlight=False, markup=False, soft_wrap=True)


def table(report: Report) -> Table:
    """The figures of a report."""
    out = Table("", "", title="Data hyper-cleaning", title_justify="left", show_header=False)
    out.columns[1].justify = "right"
    for rows in (_accuracies(report), _detector(report), _costs(report.result)):
        for row in rows:
            out.add_row(*row)
        out.add_section()
    out.caption = (
        "Three models, trained from zero to convergence by the same code. The first and the last have the L2 "
        f"that is the most accurate of {len(L2_GRID)} on the validation digits."
    )
    out.caption_justify = "left"
    return out


def _accuracies(report: Report) -> list[tuple[str, str]]:
    return [
        ("Test accuracy, noisy labels as they are", f"{report.noisy.accuracy:.3f}"),
        ("Test accuracy, learned weights and L2", f"[bold]{report.learned.accuracy:.3f}[/bold]"),
        ("Test accuracy, right labels only", f"{report.clean.accuracy:.3f}"),
    ]


def _detector(report: Report) -> list[tuple[str, str]]:
    return [
        ('Wrong labels found by "weight < 1/2": precision', f"{report.precision:.3f}"),
        ("... recall", f"{report.recall:.3f}"),
        ("... F1", f"[bold]{report.f1:.3f}[/bold]"),
    ]


def _costs(result: bilevel.Result) -> list[tuple[str, str]]:
    names = {
        "inner_grad": "Examples touched by inner gradients",
        "hvp": "... Hessian-vector products",
        "cross": "... cross products",
        "outer_grad": "... outer gradients",
    }
    counts = [(text, f"{result.counts[name]:,.0f}") for name, text in names.items()]
    return [("Seconds of the run, compilation included", f"{result.seconds:.1f}"), *counts]


def draw(report: Report):
    """The picture: how the run went, what the weights say, and the digits it suspects most; a Figure."""
    fig = plots.figure(figsize=(14, 9))
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.35), hspace=0.03)
    loss, weights, l2, histogram = top.subplots(1, 4)
    _draw_run(loss, weights, l2, report.result)
    _draw_histogram(histogram, report)
    _draw_suspects(bottom, report)
    return fig


def _draw_run(loss, weights, l2, result: bilevel.Result) -> None:
    plots.plot_value(loss, result)
    loss.set_title("loss on clean digits")
    # Leaves stand in the order of the sorted keys: l2, weight.
    l2.set_prop_cycle(color=_require("matplotlib").colormaps["viridis"](np.linspace(0, 0.95, CLASSES)))
    plots.plot_leaf(l2, result.trajectory, 0)
    for digit, line in enumerate(l2.lines):
        line.set_label(str(digit))
    l2.legend(title="digit", title_fontsize=8, fontsize=8, frameon=False, ncols=2)
    l2.set(title="L2 strength of each class", xlabel="outer step")
    weights.set_prop_cycle(color=[BLUE])
    plots.plot_leaf(weights, result.trajectory, 1)
    weights.set(title=f"weights of {TRAIN:,} examples", xlabel="outer step", ylim=(-0.02, 1.02))


def _draw_histogram(ax, report: Report) -> None:
    weight = np.asarray(report.result.hparams["weight"])
    bins = np.linspace(0, 1, 26)
    for chosen, colour, name in (
        (~report.data.corrupted, BLUE, "right label"),
        (report.data.corrupted, VERMILION, "wrong label"),
    ):
        ax.hist(weight[chosen], bins, color=colour, alpha=0.6, label=name)
    ax.axvline(0.5, color="black", lw=1, ls=":")
    ax.legend(frameon=False, fontsize=8, loc=(0.1, 0.84))
    ax.set(title=f"learned weights (F1 {report.f1:.3f})", xlabel="weight", ylabel="examples")


def _draw_suspects(fig, report: Report) -> None:
    train, weight = report.data.train, np.asarray(report.result.hparams["weight"])
    predicted = np.argmax(np.asarray(logits(report.learned.params, train)), axis=-1)
    axes = fig.subplots(3, 8).ravel()
    suspects = np.argsort(weight)[: len(axes)]
    wrong = report.data.corrupted[suspects]
    for ax, i, hit in zip(axes, suspects, wrong, strict=True):
        _draw_digit(ax, np.asarray(train["x"][i]), bool(hit))
        ax.set_title(f"label {train['y'][i]}, model says {predicted[i]}", fontsize=9, color=_colour(hit))
    fig.suptitle(
        f"The {len(axes)} lowest weights: {wrong.sum()} labels are wrong indeed (blue, solid frame), "
        f"{(~wrong).sum()} right (vermilion, dashed frame)"
    )


def _colour(hit: bool) -> str:
    return BLUE if hit else VERMILION


def _draw_digit(ax, pixels: np.ndarray, hit: bool) -> None:
    ax.imshow(pixels.reshape(8, 8), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(edgecolor=_colour(hit), linewidth=2.5, linestyle="-" if hit else "--")
