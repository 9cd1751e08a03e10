# %% [markdown]
# # In a training loop that exists already
#
# There is a model in flax and a loop that trains it, and nobody wants to rewrite either. `bilevel.online` is
# an optax optimiser that wraps the one in use: it holds the hyperparameters in its state and moves them now
# and then, on a batch of validation data. Here it looks after a small language model that overfits.

# %%
import itertools
import pydoc_data.topics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import bilevel

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"

# %% [markdown]
# ## The text
#
# The prose of Python's own manual, which comes with every Python: 20,000 characters to learn from, 10,000 to
# validate, 30,000 to test. The model sees ten characters and predicts the next one.

# %%
topics = pydoc_data.topics.topics
text = topics["types"] + topics["compound"]
text = " ".join(text.split())
alphabet = sorted(set(text))
codes = np.array([alphabet.index(c) for c in text])
SEEN = 10


def windows(first, last):
    rows = np.arange(first, last - SEEN)[:, None] + np.arange(SEEN + 1)
    return {"x": codes[rows[:, :-1]], "y": codes[rows[:, -1]]}


train, valid, test = windows(0, 20_000), windows(20_000, 30_000), windows(30_000, 60_000)
print(len(alphabet), "characters;", repr(text[20_000:20_070]))


# %% [markdown]
# ## The model and the loop, as they were


# %%
class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(len(alphabet), 16, rngs=rngs)
        self.hidden = nnx.Linear(SEEN * 16, 128, rngs=rngs)
        self.out = nnx.Linear(128, len(alphabet), rngs=rngs)

    def __call__(self, x):
        x = self.embed(x).reshape(len(x), -1)
        return self.out(nnx.relu(self.hidden(x)))


def valid_loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def train_loss(model, hparams, batch):
    labels = optax.smooth_labels(jax.nn.one_hot(batch["y"], len(alphabet)), hparams["smoothing"])
    loss = optax.softmax_cross_entropy(model(batch["x"]), labels).mean()
    kernels = {"embed": model.embed.embedding, "hidden": model.hidden.kernel, "out": model.out.kernel}
    return loss + sum(hparams["l2"][name] * jnp.sum(kernel[...] ** 2) for name, kernel in kernels.items())


FIRST = {"l2": {"embed": 1e-5, "hidden": 1e-5, "out": 1e-5}, "smoothing": 0.01}
FIRST = jax.tree.map(jnp.float32, FIRST)


@nnx.jit
def plain_step(model, optimizer, batch):
    grads = nnx.grad(train_loss)(model, FIRST, batch)
    optimizer.update(model, grads)


# %% [markdown]
# ## What changes
#
# 1. A `Problem`: the same two losses, as functions of the parameters.
# 2. The optimiser is wrapped.
# 3. The training loss takes its hyperparameters from the optimiser's state, and `update` is shown two
#    batches.
#
# The hypergradient is implicit, its linear system a Neumann series of five terms, which a network far from
# any minimum does not upset. It is taken at every fifth update, after 200 without any.

# %%
graphdef, _ = nnx.split(Model(nnx.Rngs(0)), nnx.Param)


def inner(params, hparams, batch):
    return train_loss(nnx.merge(graphdef, params, copy=True), hparams, batch)


def outer(params, hparams, batch):
    return valid_loss(nnx.merge(graphdef, params, copy=True), batch)


limits = {"l2": bilevel.positive(), "smoothing": bilevel.interval(0, 0.5)}
tuner = bilevel.online(
    bilevel.Problem(inner, outer, limits),
    FIRST,
    inner=optax.adam(2e-3),
    outer=optax.adam(0.05),
    estimator=bilevel.implicit(bilevel.neumann(5, 0.1)),
    every=5,
    warmup=200,
)


@nnx.jit
def step(model, optimizer, batch, valid_batch):
    hparams = bilevel.get_hparams(optimizer.opt_state)
    grads = nnx.grad(train_loss)(model, hparams, batch)
    optimizer.update(model, grads, train=batch, valid=valid_batch)


# %% [markdown]
# ## Both runs


# %%
def batches(data, size, seed):
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(data["y"]), size)
        yield {name: array[rows] for name, array in data.items()}


evaluate = nnx.jit(valid_loss)
shown = {name: {k: a[:: len(a) // 3000] for k, a in data.items()} for name, data in
         {"train": train, "valid": valid, "test": test}.items()}  # fmt: skip


def fit(tune, steps=3000):
    model, log = Model(nnx.Rngs(0)), []
    optimizer = nnx.Optimizer(model, tuner if tune else optax.adam(2e-3), wrt=nnx.Param)
    pairs = zip(batches(train, 128, 0), batches(valid, 256, 1), strict=False)
    for t, (batch, valid_batch) in enumerate(itertools.islice(pairs, steps)):
        if tune:
            step(model, optimizer, batch, valid_batch)
        else:
            plain_step(model, optimizer, batch)
        if t % 100 == 99:
            row = {name: float(evaluate(model, data)) for name, data in shown.items()}
            hparams = bilevel.get_hparams(optimizer.opt_state) if tune else FIRST
            log.append(row | {"step": t + 1} | {"hparams": jax.tree.map(float, hparams)})
    return model, log


plain, plain_log = fit(False)
tuned, tuned_log = fit(True)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
at = [row["step"] for row in plain_log]
for ax, log, title in zip(axes, (plain_log, tuned_log), ("as it was", "with bilevel.online"), strict=True):
    for name, colour in (("train", GREY), ("valid", BLUE), ("test", ORANGE)):
        line = [row[name] for row in log]
        ax.plot(at, line, color=colour, lw=2)
        ax.text(at[-1] + 40, line[-1], name, color=colour, va="center")
    ax.set(title=title, xlabel="update")
axes[0].set_ylabel("cross-entropy, nats for each character")
plt.show()

# %% [markdown]
# The same model, data and Adam. On the left it learns the training text by heart; on the right the gap stays
# small, and nobody chose a weight decay.
#
# ## What it chose, and when

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for name, colour in (("embed", GREEN), ("hidden", BLUE), ("out", PINK)):
    line = [row["hparams"]["l2"][name] for row in tuned_log]
    left.semilogy(at, line, color=colour, lw=2)
    left.text(at[-1] + 40, line[-1], name, color=colour, va={"embed": "top"}.get(name, "bottom"))
left.axvspan(0, 200, color="0.92")
left.text(210, left.get_ylim()[0], "warm-up until here", color=GREY, va="bottom", fontsize=9)
left.set(xlabel="update", ylabel="weight decay", title="Three weight decays")
right.plot(at, [row["hparams"]["smoothing"] for row in tuned_log], color=ORANGE, lw=2)
right.set(xlabel="update", ylabel="share of the label that is spread", title="Label smoothing", ylim=0)
plt.show()

# %% [markdown]
# ## In their own words
#
# Both models go on from the same ten characters.


# %%
def write(model, length=240, seed=4):
    rng, written = np.random.default_rng(seed), list(codes[30_000 : 30_000 + SEEN])
    predict = nnx.jit(lambda model, x: jax.nn.softmax(model(x)[0]))
    for _ in range(length):
        p = np.asarray(predict(model, np.array([written[-SEEN:]])), np.float64) ** 1.5
        written.append(rng.choice(len(alphabet), p=p / p.sum()))
    return "".join(alphabet[c] for c in written)


for name, model in (("as it was", plain), ("tuned", tuned)):
    print(f"{name}, test loss {float(evaluate(model, test)):.3f}\n  {write(model)!r}\n")

# %% [markdown]
# ## What it costs
#
# A hypergradient with five terms is worth about a dozen gradients, and is due at every fifth update.


# %%
def seconds(tune, updates=200):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tuner if tune else optax.adam(2e-3), wrt=nnx.Param)
    batch, valid_batch = next(batches(train, 128, 0)), next(batches(valid, 256, 0))
    began = time.process_time()
    for _ in range(updates + (200 if tune else 0)):  # those of the warm-up are plain
        if tune:
            step(model, optimizer, batch, valid_batch)
        else:
            plain_step(model, optimizer, batch)
    jax.block_until_ready(nnx.state(model))
    return time.process_time() - began


usual = seconds(False)
print(f"an update with tuning takes {(seconds(True) - usual) / usual:.0f} times the CPU time of one without")

# %% [markdown]
# What to conclude:
#
# - Three changes to a loop: a problem, a wrapped optimiser, two batches handed to `update`.
# - Hyperparameters start where they were and go where the validation loss wants them, once there is something
#   to regularise. A second training is not needed.
# - `every` sets the price. What it finds is for this run, at its moment; it is no schedule for another.
#
# References: Luketina, Berglund, Greff and Raiko, "Scalable gradient-based tuning of continuous
# regularization hyperparameters", 2016, arXiv:1511.06727. Lorraine, Vicol and Duvenaud, "Optimizing millions
# of hyperparameters by implicit differentiation", 2020, arXiv:1911.02590.
