# %% [markdown]
# # Self-tuning: hyperparameters that move while a network trains
#
# The best amount of regularisation is not one number. A network that has just begun needs none, one that has
# begun to overfit needs some. This notebook lets rates of dropout and a weight decay move *during* a single
# training run, looks at where they go, and then learns a schedule of the learning rate through the training
# itself.
#
# A dropout mask has no useful derivative by its rate. A self-tuning network needs none: beside the weights it
# trains their *response*, how they would change with the hyperparameters,
#
# $$w(\lambda) \approx w_0 + (V\lambda) \odot W_h ,$$
#
# on perturbed hyperparameters, and differentiates the validation loss through that.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel
from bilevel import nn, schedules

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"

# %% [markdown]
# ## A small network that overfits
#
# 400 digits to train on, three labels of ten wrong, and a hidden layer of 100 units: enough to learn all of
# it by heart. Against that stand dropout of the pixels, dropout of the hidden units, and a weight decay.

# %%
pictures, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(labels))
pictures, labels = np.float32(pictures[order] / 16), labels[order]
wrong = (np.arange(len(labels)) < 400) & (rng.uniform(size=len(labels)) < 0.3)
given = np.where(wrong, rng.integers(0, 10, len(labels)), labels)
splits = slice(0, 400), slice(400, 900), slice(900, None)
train, valid, test = [{"x": jnp.asarray(pictures[s]), "y": jnp.asarray(given[s])} for s in splits]


def logits(w, x, h=None, key=None):
    if key is not None:
        key_in, key_hidden = jax.random.split(key)
        x = nn.dropout(x, h["pixels"], key_in)
    hidden = jax.nn.relu(x @ w["in"] + w["b"])
    hidden = hidden if key is None else nn.dropout(hidden, h["hidden"], key_hidden)
    return hidden @ w["out"] + w["c"]


def cross_entropy(out, y):
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()


# %%
def train_loss(w, h, batch):
    batch, key = batch
    decay = h["decay"] * sum(jnp.sum(w[name] ** 2) for name in ("in", "out"))
    return cross_entropy(logits(w, batch["x"], h, key), batch["y"]) + decay


def valid_loss(w, h, batch):
    return cross_entropy(logits(w, batch["x"]), batch["y"])


def fresh(key):
    a, b = jax.random.split(key)
    w = {"in": jax.random.normal(a, (64, 100)) / 8, "out": jax.random.normal(b, (100, 10)) / 10}
    return w | {"b": jnp.zeros(100), "c": jnp.zeros(10)}


limits = {"pixels": bilevel.interval(0, 0.9), "hidden": bilevel.interval(0, 0.9)}
problem = bilevel.Problem(train_loss, valid_loss, constraints=limits | {"decay": bilevel.positive()})

# %% [markdown]
# ## One run each from three starts
#
# `stn` solves the problem as it stands: the response is built on the parameters by the library. Three starts,
# from hardly any regularisation to far too much, are a population: one program.

# %%
STEPS = 800
starts = {
    "pixels": jnp.array([0.02, 0.3, 0.6]),
    "hidden": jnp.array([0.02, 0.3, 0.8]),
    "decay": jnp.array([1e-6, 1e-4, 1e-3]),
}
networks = jax.vmap(fresh)(jax.random.split(jax.random.key(0), 3))
source = bilevel.with_rng(bilevel.minibatches(train, 50))
method = bilevel.stn(optax.adam(3e-3), optax.adam(1e-2), entropy=1e-3, warmup=50)
result = bilevel.optimize(
    problem, networks, starts, source, valid, method, STEPS, population=bilevel.population(3), progress=False
)

# %%
units = {"pixels": "dropout of pixels", "hidden": "dropout of hidden units", "decay": "weight decay"}
colours = (BLUE, ORANGE, GREEN)
fig, axes = plt.subplots(1, 4, figsize=(12.5, 3.2))
for i, colour in enumerate(colours):
    smooth = np.convolve(result.history["value"][:, i], np.ones(25) / 25, "valid")
    axes[0].plot(np.arange(len(smooth)) * 2, smooth, color=colour, lw=1.5)
    for ax, (name, unit) in zip(axes[1:], units.items(), strict=True):
        ax.plot(result.trajectory.steps * 2, result.trajectory.hparams[name][:, i], color=colour, lw=1.8)
        ax.set(title=unit, xlabel="training step")
axes[3].set(yscale="log")
axes[0].set(title="validation loss, nats", xlabel="training step", ylim=(0.2, 1.2))
plt.show()

# %% [markdown]
# A colour is a start. Early on all paths run towards less regularisation, whatever it was: the network has
# everything to learn yet. Once it begins to learn wrong labels by heart, dropout of the hidden units and the
# weight decay rise. Dropout ends at about the same rate from all three starts; the weight decay, which
# matters less, is still on its way.
#
# ## Did it find anything?
#
# The loss over a grid can be had by brute force: train with everything held fixed, but for the rate of
# dropout. One function trains along any path of hyperparameters, constant or not.


# %%
def trained(path, key):
    """Validation and test loss after training along a path, mean of the last 200 steps."""
    optimizer, w = optax.adam(3e-3), fresh(key)

    def step(carry, t):
        w, state = carry
        h = jax.tree.map(lambda leaf: leaf[t], path)
        grads = jax.grad(train_loss)(w, h, source.batch(jax.random.fold_in(key, 1), t))
        updates, state = optimizer.update(grads, state)
        w = optax.apply_updates(w, updates)
        return (w, state), jnp.stack([valid_loss(w, None, valid), valid_loss(w, None, test)])

    _, losses = jax.lax.scan(step, (w, optimizer.init(w)), jnp.arange(2 * STEPS))
    return losses[-200:].mean(0)


def held(h):
    return jax.tree.map(lambda leaf: jnp.full(2 * STEPS, leaf), h)


last = jax.tree.map(lambda leaf: leaf.mean(), result.hparams)
member = result.member(0)
schedule = {name: member.schedule(name, inner_steps=2)(jnp.arange(2 * STEPS)) for name in units}
rates = np.linspace(0.02, 0.85, 6)
paths = [held({"pixels": 0.0, "hidden": 0.0, "decay": 0.0}), held(last), schedule]
paths += [held(last | {"hidden": jnp.float32(rate)}) for rate in rates]
paths = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *paths)
losses = np.asarray(jax.jit(jax.vmap(trained, (0, None)))(paths, jax.random.key(5)))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), width_ratios=(1.3, 1))
left.plot(rates, losses[3:, 0], "o-", color=GREY, lw=2)
for i, colour in enumerate(colours):
    left.axvline(result.hparams["hidden"][i], color=colour, lw=1.5)
left.set(
    xlabel="dropout of hidden units, held",
    ylabel="validation loss, nats",
    title="Where the three runs ended, and a grid",
)
names = ["no regularisation", "last values, held", "path of the first run"]
bars = right.barh(names, losses[:3, 1], color=[GREY, GREEN, BLUE])
right.bar_label(bars, fmt=" %.3f")
right.invert_yaxis()
right.set(xlabel="test loss of a new run, nats", xlim=(0, 1.2 * losses[:3, 1].max()))
plt.show()

# %% [markdown]
# Each vertical line is one run. The grid took six trainings for one of three hyperparameters. On the right:
# without regularisation the test loss is nearly twice as high, and a new run is as good with the last values
# held as along the whole path.
#
# ## A schedule that is learned through the training
#
# A learning rate has no response of this kind: it acts through the optimiser. Its derivative goes through all
# steps. Here 200 steps are unrolled in every outer step, each from a new start, and the rate has one value
# for each of ten windows.


# %%
def start(h, batch, key):
    return fresh(key)


def plain(w, h, batch):
    return cross_entropy(logits(w, batch["x"]), batch["y"])


rate_problem = bilevel.Problem(plain, valid_loss, start=start, constraints={"lr": bilevel.interval(1e-3, 1)})
windows = schedules.windows(10, steps=200)
unrolled = bilevel.alternating(
    bilevel.unrolled(per_step={"lr": windows}),
    inner=bilevel.tuned(lambda h: optax.sgd(h["lr"])),
    outer=optax.adam(optax.cosine_decay_schedule(0.25, 40)),
    inner_steps=200,
)
batches = bilevel.minibatches(train, 10)
learned = bilevel.optimize(
    rate_problem, None, {"lr": jnp.full(10, 0.1)}, batches, valid, unrolled, steps=40, progress=False
)


# %%
def run(rates, key):
    """Validation loss at each step of a plain training with these 200 rates."""

    def step(w, t):
        grads = jax.grad(plain)(w, None, batches.batch(jax.random.fold_in(key, 1), t))
        w = jax.tree.map(lambda p, g: p - rates[t] * g, w, grads)
        return w, valid_loss(w, None, valid)

    return jax.lax.scan(step, fresh(key), jnp.arange(200))[1]


constants = np.array([0.05, 0.1, 0.2, 0.4])
found = windows(learned.hparams["lr"])(jnp.arange(200))
tried = jnp.stack([*(jnp.full(200, c) for c in constants), found])
keys = jax.random.split(jax.random.key(9), 8)
curves = np.asarray(jax.jit(jax.vmap(lambda r: jax.vmap(lambda k: run(r, k))(keys).mean(0)))(tried))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
tracks = learned.trajectory.hparams["lr"]
for k in range(0, 41, 8):
    left.step(
        np.arange(11) * 20,
        np.append(tracks[k], tracks[k, -1]),
        where="post",
        color=plt.cm.viridis(k / 44),
        lw=2,
    )
left.set(
    xlabel="training step", ylabel="learning rate", yscale="log", title="Outer steps 0 (dark) to 40 (light)"
)
for curve, rate in zip(curves, constants, strict=False):
    right.plot(curve, color=GREY, lw=1 + np.log2(rate / 0.05))
right.plot(curves[-1], color=GREEN, lw=2.5)
right.set(
    xlabel="training step", ylabel="validation loss, nats", yscale="log", title="New starts, mean of eight"
)
right.text(1, 0.97, "learned", color=GREEN, transform=right.transAxes, ha="right")
right.text(1, 0.9, "constant, 0.05 (thin) to 0.4", color=GREY, transform=right.transAxes, ha="right")
plt.show()
for rate, curve in zip([*constants, "learned"], curves, strict=True):
    print(f"{rate!s:8} {curve[-1]:.3f}")

# %% [markdown]
# What to conclude:
#
# - `stn` tunes what has no gradient, in one training run, whatever the model. Of several starts those
#   hyperparameters agree in the end that matter.
# - In a run this short, the last values held fixed are as good as the whole path.
# - A schedule of learning rates is an array with a derivative through all of training. Judge it on other
#   starts and orders than those it was learned on, as above.
#
# References: MacKay, Vicol, Lorraine, Duvenaud and Grosse, "Self-tuning networks", 2019, arXiv:1903.03088.
# Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible learning",
# 2015, arXiv:1502.03492.
