# %% [markdown]
# # Against Optuna, and with it
#
# Optuna proposes hyperparameters, trains a model, looks at one number and proposes again. A hypergradient run
# trains once and moves all hyperparameters while it does. When is which better? The same problem three times,
# with 1, 8 and 64 hyperparameters, at equal CPU time. Then both together, where neither will do alone.
#
# The problem is a softmax regression on 8 x 8 digits with a penalty on the weights of each pixel. Either all
# pixels share one strength, or each row of the picture has its own, or each pixel:
#
# $$w^*(\lambda) = \arg\min_w \; \mathrm{CE}_\mathrm{train}(w) + \sum_\mathrm{pixels} \lambda_p |w_p|^2 .$$

# %%
import time
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel

warnings.filterwarnings("ignore", "IProgress not found")  # of a progress bar that is not used
import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.55"

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = np.float32(images[order] / 16), labels[order]
parts = slice(0, 200), slice(200, 500), slice(500, None)
train, valid, test = [{"x": jnp.asarray(images[p]), "y": jnp.asarray(labels[p])} for p in parts]


def valid_loss(w, hparams, batch):
    logits = batch["x"] @ w["kernel"] + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train_loss(w, hparams, batch):
    strength = jnp.repeat(hparams["l2"], 64 // hparams["l2"].size)
    return valid_loss(w, hparams, batch) + jnp.sum(strength[:, None] * w["kernel"] ** 2)


problem = bilevel.Problem(train_loss, valid_loss, constraints={"l2": bilevel.interval(1e-4, 10)})
w0 = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}

# %% [markdown]
# ## Both arms
#
# Each has 3 seconds of CPU time, all its own expenses included but for the first compilation. Strengths lie
# between $10^{-4}$ and 10 and start at 0.01. A trial of Optuna trains to the minimum with L-BFGS and begins
# at the weights of the last trial, which saves it half of the time.

# %%
SECONDS = 3.0
solve = jax.jit(bilevel.argmin(problem, bilevel.lbfgs()))


def searched(n, sampler):
    """Best validation losses over time, and the best strengths."""
    study, w, found = optuna.create_study(sampler=sampler), w0, []
    study.enqueue_trial({f"l2_{i}": 1e-2 for i in range(n)})
    solve({"l2": np.full(n, 1e-2, np.float32)}, train, init=w0)  # compiles
    began = time.process_time()
    while time.process_time() - began < SECONDS:
        trial = study.ask()
        l2 = np.array([trial.suggest_float(f"l2_{i}", 1e-4, 10, log=True) for i in range(n)], np.float32)
        w = solve({"l2": l2}, train, init=w)
        study.tell(trial, float(valid_loss(w, None, valid)))
        found.append((time.process_time() - began, study.best_value))
    best = np.array(list(study.best_params.values()), np.float32)
    return np.array(found), best


# %%
def descended(n):
    """The same of a run by hypergradients."""
    found, start = [], {"l2": np.full(n, 1e-2, np.float32)}
    bilevel.optimize(problem, w0, start, train, valid, steps=1, judge_every=5, progress=False)  # compiles
    began = time.process_time()

    def watch(step, rows):
        found.append((time.process_time() - began, rows["value"].min()))
        return bilevel.STOP if found[-1][0] > SECONDS else None

    result = bilevel.optimize(
        problem, w0, start, train, valid, steps=400, judge_every=5, callbacks=watch, progress=False
    )
    times, values = np.array(found).T
    return np.stack([times, np.minimum.accumulate(values)], 1), np.asarray(result.best.hparams["l2"])


# %%
arms = {
    "hypergradients": descended,
    "Optuna, TPE": lambda n: searched(n, optuna.samplers.TPESampler(seed=0)),
    "random search": lambda n: searched(n, optuna.samplers.RandomSampler(seed=0)),
}
runs = {(name, n): arm(n) for n in (1, 8, 64) for name, arm in arms.items()}

fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
for ax, n in zip(axes, (1, 8, 64), strict=True):
    for name, colour in zip(arms, (GREEN, BLUE, GREY), strict=True):
        times, values = runs[name, n][0].T
        times, values = np.append(times, max(SECONDS, times[-1])), np.append(values, values[-1])
        ax.step(times, values, where="post", color=colour, lw=2, label=name)
    trials = len(runs["Optuna, TPE", n][0])
    ax.set(xlabel="CPU seconds", xscale="log", title=f"{n} strength{'s' * (n > 1)}, {trials} trials of TPE")
axes[0].set(ylabel="best validation loss so far, nats")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()


# %% [markdown]
# With one strength a search is as good, and in the end a little better: a few trials along a line are all it
# takes, and it sees the whole line, where a gradient sees one valley. With eight both get somewhere, and the
# hypergradient gets further. With 64 a search has hardly begun.
#
# ## What it is worth on other data


# %%
def loss_on(split, l2):
    return float(valid_loss(solve({"l2": l2}, train, init=w0), None, split))


first = np.full(1, 1e-2, np.float32)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, split, title in ((left, valid, "validation"), (right, test, "test")):
    for k, (name, colour) in enumerate(zip(arms, (GREEN, BLUE, GREY), strict=True)):
        heights = [loss_on(split, runs[name, n][1]) for n in (1, 8, 64)]
        bars = ax.bar(np.arange(3) + 0.27 * (k - 1), heights, 0.25, color=colour, label=name)
        ax.bar_label(bars, fmt="%.3f", fontsize=7.5, padding=1)
    ax.axhline(loss_on(split, first), color="k", lw=0.8, ls="--")
    ax.set(title=f"{title} loss, trained to the minimum", xlabel="strengths", ylim=(0.15, None))
    ax.set_xticks(range(3), ["1", "8", "64"])
left.set(ylabel="cross-entropy, nats")
left.text(2.45, loss_on(valid, first), "where all began", ha="right", va="bottom", fontsize=9)
fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# The gain on the validation rows is partly theirs alone: 64 strengths have the lowest validation loss, and on
# the test rows eight are better. More hyperparameters than the validation data can tell apart are no gain.
#
# ## What 64 strengths look like

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.1))
ink = axes[0].imshow(images[:200].std(0).reshape(8, 8), cmap="Greys")
axes[0].set_title("spread of the pixels")
fig.colorbar(ink, ax=axes[0], shrink=0.8)
for ax, name in zip(axes[1:], ("hypergradients", "Optuna, TPE"), strict=True):
    shown = ax.imshow(np.log10(runs[name, 64][1]).reshape(8, 8), cmap="viridis", vmin=-4, vmax=1)
    ax.set_title(f"strengths: {name}")
fig.colorbar(shown, ax=axes[1:], label="log10 of the strength", shrink=0.8)
for ax in axes:
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Together
#
# What features to take is a choice; it has no derivative. Optuna makes it, and inside each trial a run by
# hypergradients tunes the 64 strengths. `build` returns arguments of `bilevel.optimize`; all trials share one
# compiled program, as their shapes agree.

# %%
grid = np.arange(8)
waves = np.cos(np.pi * np.outer(grid, grid + 0.5) / 8)


def features(kind):
    pictures = images.reshape(-1, 8, 8)
    made = {
        "pixels": pictures,
        "square roots": np.sqrt(pictures),
        "cosines": waves @ pictures @ waves.T / 4,
        "differences": pictures - np.roll(pictures, 1, 2),
        "smoothed": (pictures + np.roll(pictures, 1, 1) + np.roll(pictures, 1, 2)) / 2,
    }
    return np.float32(made[kind].reshape(-1, 64))


KINDS = ["pixels", "square roots", "cosines", "differences", "smoothed"]


def build(trial):
    made = features(trial.suggest_categorical("features", KINDS))
    one, two, _ = ({"x": made[p], "y": labels[p]} for p in parts)
    return {"train": one, "valid": two}


# %%
start = {"l2": jnp.full(64, 1e-2)}
objective = bilevel.optuna_objective(
    build, problem=problem, params=w0, hparams=start, steps=30, judge_every=3
)
sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=5)
study = bilevel.optuna_study(None, sampler=sampler, pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
study.optimize(objective, n_trials=12)
print(
    study.best_params,
    f"validation loss {study.best_value:.3f}, {len(objective.best.hparams['l2'])} strengths",
)

fig, ax = plt.subplots(figsize=(7, 3.6))
palette = dict(zip(KINDS, (GREY, GREEN, BLUE, ORANGE, "#cc79a7"), strict=True))
for trial in study.trials:
    kind, values = trial.params["features"], trial.intermediate_values
    pruned = trial.state.name == "PRUNED"
    ax.plot(list(values), list(values.values()), color=palette[kind], lw=1.8, ls=":" if pruned else "-")
    ax.plot(list(values)[-1], list(values.values())[-1], "x" if pruned else "o", color=palette[kind])
for kind, colour in palette.items():
    tried = sum(trial.params["features"] == kind for trial in study.trials)
    ax.plot([], [], color=colour, lw=3, label=f"{kind}: {tried} trials")
ax.legend(frameon=False, fontsize=9)
ax.set(xlabel="outer step", ylabel="validation loss, nats", title="Trials of the study; a cross was pruned")
plt.show()

# %% [markdown]
# What to conclude:
#
# - One to three continuous hyperparameters and short trainings: a search is simpler, and as good.
# - Tens to millions: there is no search. Watch a third split.
# - Choices: a search outside, hypergradients inside, pruned like any other trial.
#
# Times are those of the machine that built this page; shapes of the curves are what to look at.
#
# Reference: Akiba, Sano, Yanase, Ohta and Koyama, "Optuna: a next-generation hyperparameter optimization
# framework", 2019, arXiv:1907.10902.
