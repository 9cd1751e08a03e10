# %% [markdown]
# # Cleaning data: a weight for every example
#
# Some labels of a training set are wrong. Which ones? Give every example a weight, and choose all weights so
# that the model trained with them does well on a few rows that somebody has checked:
#
# $$\min_{0 < \alpha_i < 1} \; L_\mathrm{valid}(w^*(\alpha)),
# \qquad w^*(\alpha) = \arg\min_w \; \sum_i \alpha_i \, \ell(w; x_i, y_i) + \rho \, |w|^2 .$$
#
# There is one hyperparameter for each example, 800 here. No search gets anywhere with 800 numbers. One
# hypergradient has all of them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import bilevel

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.55"

# %% [markdown]
# ## Digits, and a careless annotator
#
# 800 handwritten digits to learn from; the label of 45 % of them is one too high, a 3 says 4. Errors with a
# system are the hard ones: to a model they look like something to learn. 20 digits were checked, and 897 are
# to judge by.

# %%
images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(1)
order = rng.permutation(len(labels))
images, labels = np.float32(images[order] / 16), labels[order]
wrong = rng.uniform(size=800) < 0.45
given = np.where(wrong, (labels[:800] + 1) % 10, labels[:800])
CHECKED = 20
train = {"x": images[:800], "y": given, "i": np.arange(800)}
valid = {"x": images[800 : 800 + CHECKED], "y": labels[800 : 800 + CHECKED]}
test = {"x": images[900:], "y": labels[900:]}


def show(rows, columns, captions, title, colours=None):
    count = len(rows) // columns
    fig, axes = plt.subplots(count, columns, figsize=(0.72 * columns, 0.4 + 0.95 * count))
    for k, (ax, row) in enumerate(zip(axes.flat, rows, strict=True)):
        ax.imshow(-images[row].reshape(8, 8), cmap="gray")
        ax.set_title(captions[k], fontsize=9, pad=2, color="k" if colours is None else colours[k])
        ax.axis("off")
    fig.suptitle(title, fontsize=11)
    plt.show()


show(range(28), 14, [str(y) for y in given[:28]], "The first 28 with the labels they came with")


# %% [markdown]
# ## The problem
#
# `"i"` holds row numbers, so that a weight finds its example. The model is a softmax regression; anything
# that is written in JAX would do.


# %%
def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w["kernel"] + w["bias"], batch["y"])


def valid_loss(w, hparams, batch):
    return losses(w, batch).mean()


def train_loss(w, hparams, batch):
    weighted = hparams["weight"][batch["i"]] * losses(w, batch)
    return weighted.mean() + hparams["decay"] * jnp.sum(w["kernel"] ** 2)


def accuracy(w, split):
    return float(jnp.mean(jnp.argmax(split["x"] @ w["kernel"] + w["bias"], 1) == split["y"]))


limits = {"weight": bilevel.interval(0, 1), "decay": bilevel.fixed()}  # one is tuned, one only given
problem = bilevel.Problem(train_loss, valid_loss, constraints=limits)
w0 = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
half = {"weight": jnp.full(800, 0.5), "decay": 1e-2}

# %% [markdown]
# ## One hypergradient
#
# At equal weights, `grad["weight"][i]` says what a little more of example $i$ would do to the validation
# loss: its *influence*. Before anything is optimised, it is a detector of wrong labels already.

# %%
solve = jax.jit(bilevel.argmin(problem, bilevel.lbfgs()))
plain = solve(half, train, init=w0)
first = jax.jit(bilevel.hypergradient(problem))(plain, half, train, valid)
influence = 1e3 * np.asarray(first.grad["weight"])

fig, ax = plt.subplots(figsize=(7, 3))
bins = np.linspace(*np.quantile(influence, [0.005, 0.995]), 60)
ax.hist(influence[~wrong], bins, color=BLUE, alpha=0.75)
ax.hist(influence[wrong], bins, color=ORANGE, alpha=0.75)
ax.axvline(0, color="k", lw=0.8)
ax.text(0.02, 0.8, "right labels:\nmore would help", color=BLUE, transform=ax.transAxes)
ax.text(0.98, 0.8, "wrong labels:\nmore would harm", color=ORANGE, transform=ax.transAxes, ha="right")
ax.set(xlabel="hypergradient by the weight of an example, 1e-3", ylabel="examples")
plt.show()

# %% [markdown]
# ## Optimising the weights
#
# The default method: Newton steps inside, conjugate gradients for the hypergradient, Adam outside.

# %%
result = bilevel.optimize(problem, w0, half, train, valid, steps=40, test=test, judge_every=2, progress=False)
weight = np.asarray(result.hparams["weight"])
print(f"mean weight of right labels {weight[~wrong].mean():.2f}, of wrong ones {weight[wrong].mean():.2f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
bins = np.linspace(0, 1, 41)
left.hist(weight[~wrong], bins, color=BLUE, alpha=0.75)
left.hist(weight[wrong], bins, color=ORANGE, alpha=0.75)
left.text(0.97, 0.85, "right labels", color=BLUE, transform=left.transAxes, ha="right")
left.text(0.08, 0.85, "wrong labels", color=ORANGE, transform=left.transAxes)
left.set(xlabel="learned weight", ylabel="examples", title="After 40 outer steps")
for key, colour, label in (("value", BLUE, "validation"), ("test", ORANGE, "test")):
    seen = np.isfinite(result.history[key])
    right.plot(result.history["step"][seen], result.history[key][seen], color=colour, lw=2)
    right.text(40, result.history[key][seen][-1], f" {label}", color=colour, va="center")
right.set(xlabel="outer step", ylabel="cross-entropy, nats", title="800 numbers, 20 checked rows", ylim=0)
plt.show()

# %% [markdown]
# The weights fit the 20 checked rows ever better, the test loss stops falling after a few steps. 800
# hyperparameters overfit so few validation rows; a third split shows when to stop. The first step says most
# of what there is to know, which is the hypergradient from above.
#
# ## Which examples are distrusted

# %%
worst = np.argsort(-influence)[:42]
captions = [f"{given[i]}" if not wrong[i] else f"{given[i]} ({labels[i]})" for i in worst]
colours = ["k" if wrong[i] else ORANGE for i in worst]
show(worst, 14, captions, "The 42 highest hypergradients: the label it had (and the true one)", colours)

# %% [markdown]
# Orange marks those whose label was right. They are what a person would want to look at, too.
#
# ## Is it better than simpler ideas?
#
# Two detectors need no hypergradient: the training loss of an example (wrong labels fit badly), and the loss
# under a model that was trained on nothing but the checked rows. Which is best depends on how many were
# checked, so here are 10 to 100, with four draws of the data each.


# %%
def on_checked(w, hparams, batch):
    return jnp.mean(hparams["on"] * losses(w, batch)) + 1e-3 * jnp.sum(w["kernel"] ** 2)


small = jax.jit(bilevel.argmin(bilevel.Problem(on_checked, valid_loss), bilevel.lbfgs()))


def checked_loss(w, hparams, batch):
    return jnp.sum(batch["on"] * losses(w, batch)) / jnp.sum(batch["on"])


slopes = jax.jit(bilevel.hypergradient(bilevel.Problem(train_loss, checked_loss, limits)))


def detectors(count, seed):
    """Scores of the examples, the higher the more suspect, with ``count`` checked rows."""
    rows = np.random.default_rng(seed).permutation(897)[:100] + 900
    checked = {"x": images[rows], "y": labels[rows], "on": np.float32(np.arange(100) < count)}
    trusted = small({"on": checked["on"] * 100 / count}, checked, init=w0)
    return {
        "one hypergradient": np.asarray(slopes(plain, half, train, checked).grad["weight"]),
        "loss under the checked rows' model": np.asarray(losses(trusted, train)),
        "training loss": np.asarray(losses(plain, train)),
    }


counts = [10, 20, 30, 50, 100]
areas = {name: [] for name in detectors(10, 0)}
for count in counts:
    drawn = [detectors(count, seed) for seed in range(4)]
    for name, row in areas.items():
        row.append([roc_auc_score(wrong, scores[name]) for scores in drawn])

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for (name, row), colour in zip(areas.items(), (BLUE, ORANGE, GREY), strict=True):
    row = np.array(row)
    ax.plot(counts, row.mean(1), "o-", color=colour, lw=2, label=name)
    ax.fill_between(counts, row.min(1), row.max(1), color=colour, alpha=0.15, lw=0)
ax.set(xlabel="checked rows", ylabel="area under the ROC curve", title="Detecting wrong labels", xscale="log")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend(frameon=False, loc="center right")
plt.show()

# %% [markdown]
# Errors with a system fit nearly as well as what is right: the training loss is of little use. With few
# checked rows the hypergradient is ahead, since it uses the other 800 as well. With many, their own model is
# the better judge.
#
# ## And the model?
#
# What counts is the test accuracy of the model that is trained in the end.


# %%
def accuracy_with(weights):
    hparams = {"weight": jnp.asarray(weights, jnp.float32), "decay": 1e-3}
    return accuracy(solve(hparams, train, init=w0), test)


def keep(score):
    return np.argsort(np.argsort(score)) < 440  # 55 %


trusted = small({"on": np.ones(CHECKED, np.float32)}, valid, init=w0)
bars = {
    "all labels": accuracy_with(np.ones(800)),
    "the 20 checked rows only": accuracy(trusted, test),
    "55 % with the least training loss": accuracy_with(keep(losses(plain, train))),
    "55 % by the checked rows' model": accuracy_with(keep(losses(trusted, train))),
    "55 % by one hypergradient": accuracy_with(keep(influence)),
    "learned weights": accuracy_with(weight),
    "all right labels, as an oracle has them": accuracy_with(~wrong),
}
fig, ax = plt.subplots(figsize=(7.5, 3))
drawn = ax.barh(list(bars), list(bars.values()), color=[GREY, GREY, GREY, ORANGE, BLUE, GREEN, "0.8"])
ax.bar_label(drawn, [f" {value:.1%}" for value in bars.values()])
ax.invert_yaxis()
ax.set(xlim=(0.4, 1.0), xlabel="test accuracy")
plt.show()

# %% [markdown]
# What to conclude:
#
# - A weight for each example is one hyperparameter for each example, and costs what one costs.
# - The sign of a single hypergradient finds most wrong labels: it asks whether an example helps, not whether
#   it fits.
# - Validation rows are spent: with 20 of them 800 weights overfit. Stop early, or use the slopes as a
#   ranking.
# - Compare with a model of the checked rows alone. Where these are many it is the better detector.
#
# References: Ren, Zeng, Yang and Urtasun, "Learning to reweight examples for robust deep learning", 2018,
# arXiv:1803.09050. Koh and Liang, "Understanding black-box predictions via influence functions", 2017,
# arXiv:1703.04730. Northcutt, Jiang and Chuang, "Confident learning", 2021, arXiv:1911.00068.
