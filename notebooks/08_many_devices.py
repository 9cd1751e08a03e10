# %% [markdown]
# # Many devices
#
# A run over many devices is the same call. What differs is where the arrays lie, and that is what this
# notebook looks at: who holds what, whether the result is the same, what travels, and how much memory is
# left. Eight virtual devices on one CPU are enough for all of it, except for speed: they share the same
# cores.

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits

import bilevel

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"
print(jax.device_count(), "devices")

# %% [markdown]
# ## A problem with as many hyperparameters as rows
#
# A weight for each of 1,200 digits, some with a wrong label. The weights are the largest thing in this run
# after the data, so they are to be split as the rows are.

# %%
images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(labels))
images, labels = images[order] / 16, labels[order]
wrong = rng.uniform(size=1200) < 0.3
train = {"x": images[:1200], "y": np.where(wrong, (labels[:1200] + 1) % 10, labels[:1200])}
valid = {"x": images[1200:1600], "y": labels[1200:1600]}


def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w["kernel"] + w["bias"], batch["y"])


def valid_loss(w, hparams, batch):
    return losses(w, batch).mean()


def train_loss(w, hparams, batch):
    return jnp.mean(hparams["weight"] * losses(w, batch)) + hparams["l2"] * jnp.sum(w["kernel"] ** 2)


limits = {"weight": bilevel.interval(0, 1), "l2": bilevel.positive()}
problem = bilevel.Problem(train_loss, valid_loss, constraints=limits)
w0 = {"kernel": np.zeros((64, 10)), "bias": np.zeros(10)}
h0 = {"weight": np.full(1200, 0.5), "l2": np.float64(3e-3)}

# %% [markdown]
# ## Placing it
#
# `mesh=` splits the rows of the data and copies everything else to each device. Arrays that were placed
# already stay as they are: here the weights, by a sharding of their own.

# %%
mesh = jax.make_mesh((8,), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))
placed = h0 | {"weight": jax.device_put(h0["weight"], rows)}
method = bilevel.alternating(
    bilevel.implicit(bilevel.cg(max_steps=15)),
    inner=optax.sgd(1.0, momentum=0.9),
    outer=optax.adam(0.2),
    inner_steps=20,
)
split = bilevel.optimize(problem, w0, placed, train, valid, method, steps=40, mesh=mesh, progress=False)
alone = bilevel.optimize(problem, w0, h0, train, valid, method, steps=40, progress=False)


def held(array):
    """Which eighths of the rows each device holds."""
    table = np.zeros((8, 8))
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        first, last, _ = index[0].indices(len(array))
        eighths = np.arange(8) * len(array) / 8
        table[device.id] = (eighths >= first) & (eighths < last)
    return table


shown = {
    "train images": jax.device_put(train["x"], rows),
    "weights, given": placed["weight"],
    "weights, result": split.hparams["weight"],
    "kernel, result": split.params["kernel"],
}

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
for ax, (name, array) in zip(axes, shown.items(), strict=True):
    table = held(array) * (1 + np.arange(8))[:, None]
    ax.imshow(table, cmap=ListedColormap(["0.95", *plt.cm.viridis(np.linspace(0.1, 0.9, 8))]), vmin=0, vmax=8)
    ax.set(title=name, xlabel="rows, by eighths", xticks=range(8), yticks=range(8))
    ax.set_xticks(np.arange(-0.5, 8), minor=True)
    ax.set_yticks(np.arange(-0.5, 8), minor=True)
    ax.grid(which="minor", color="w")
    ax.tick_params(which="both", length=0)
axes[0].set_ylabel("device")
plt.show()

# %% [markdown]
# A diagonal is an array of which each device has an eighth; a full square is one that all have. Weights went
# in split and came out split, and nobody ever held them all.
#
# ## Is it the same run?

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
left.plot(alone.history["value"], color=GREY, lw=6, alpha=0.5)
left.plot(split.history["value"], color=GREEN, lw=1.8)
left.text(12, alone.history["value"][4], "one device (thick), eight (thin)")
left.set(xlabel="outer step", ylabel="validation loss, nats", title="The run")
for name, colour in (("value", GREEN), ("grad_norm", BLUE), ("error", ORANGE)):
    off = np.abs(split.history[name] / alone.history[name] - 1)
    right.semilogy(np.maximum(off, 1e-17), color=colour, lw=1.8, label=name)
right.axhline(np.finfo(float).eps, color="k", lw=0.8, ls="--")
right.text(40, np.finfo(float).eps * 1.4, "precision of float64", ha="right")
right.set(
    xlabel="outer step", ylabel="relative difference", title="Columns of the history", ylim=(1e-17, 1e-5)
)
right.legend(frameon=False)
plt.show()
weights = [np.asarray(run.hparams["weight"]) for run in (alone, split)]
print(f"largest difference of a weight: {np.abs(weights[0] - weights[1]).max():.0e}")

# %% [markdown]
# Sums over rows are taken in another order. That is a difference in the last digit at first, and it grows
# along the run, as rounding does, most where conjugate gradients are stopped after 15 steps.
#
# ## What travels
#
# The compiled program of a hypergradient says it: collective operations and what they carry. An example, or a
# weight of one, would show up as an all-gather or an all-to-all.

# %%
everywhere = NamedSharding(mesh, PartitionSpec())
fn = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(bilevel.cg(max_steps=15))))
arguments = jax.device_put(
    (w0, h0, train, valid), (everywhere, {"weight": rows, "l2": everywhere}, rows, rows)
)
program = fn.lower(*arguments).compile().as_text()
kinds = ["all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"]
found = {kind: re.findall(rf"= (.*?) {kind}(?:-start)?\(", program) for kind in kinds}
for kind, results in found.items():
    numbers = [
        int(np.prod([int(d) for d in dims.split(",") if d]))
        for r in results
        for dims in re.findall(r"f64\[([\d,]*)\]", r)
    ]
    print(f"{kind:20} {len(results)} in the program, the largest of {max(numbers, default=0)} numbers")

# %% [markdown]
# Only sums, of gradients by the 650 parameters. The one in the loop of the linear solver, which counts once
# here, comes with every product.
#
# ## Memory
#
# `bilevel.memory` compiles and computes nothing, so that shapes will do: a linear model of a million rows and
# 1,000 features, with a weight for each row. How much of it lies on each device?


# %%
def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


big = {"x": shape(2**20, 1000), "y": jax.ShapeDtypeStruct((2**20,), jnp.int32)}
model, counts, sizes = {"kernel": shape(1000, 10), "bias": shape(10)}, [1, 2, 8], []
for n in counts:
    some = jax.make_mesh((n,), ("data",), devices=jax.devices()[:n])
    weight = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=NamedSharding(some, PartitionSpec("data")))
    hparams = {"weight": weight, "l2": shape()}
    sizes.append(bilevel.memory(problem, method, model, hparams, big, big, mesh=some))
    print(n, "devices:", sizes[-1])

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.6))
bottom = np.zeros(3)
for name, colour in (("data", GREY), ("temporaries", ORANGE), ("state", BLUE)):
    height = np.array([getattr(size, name) for size in sizes]) / 1e9
    ax.bar(range(3), height, bottom=bottom, color=colour, label=name, width=0.6)
    bottom += height
ax.set_xticks(range(3), [str(n) for n in counts])
ax.set(xlabel="devices", ylabel="GB on each device", title="A million rows, a million hyperparameters")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Members on one axis, data on the other
#
# A population of four starts on a mesh of two by four: two halves of the data, four groups of members.

# %%
both = jax.make_mesh((2, 4), ("data", "population"))
starts = {"weight": np.full((4, 1200), 0.5), "l2": np.array([1e-5, 1e-3, 1e-1, 1.0])}
kernels = jax.tree.map(lambda leaf: np.zeros((4, *leaf.shape)), w0)
members = bilevel.optimize(
    problem, kernels, starts, train, valid, method, steps=40, mesh=both,
    population=bilevel.population(4), progress=False,
)  # fmt: skip
ends = np.asarray(members.hparams["l2"])
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for i, colour in enumerate((BLUE, ORANGE, GREEN, PINK)):
    left.plot(members.history["value"][:, i], color=colour, lw=2)
    right.semilogy(members.trajectory.steps, members.trajectory.hparams["l2"][:, i], color=colour, lw=2)
    where = sorted(d.id for d, index in members.hparams["l2"].sharding.devices_indices_map((4,)).items()
                   if index[0].indices(4)[0] == i)  # fmt: skip
    right.text(40.5, ends[i], f"on devices {where}", color=colour, va="top" if i < 3 else "bottom")
left.set(xlabel="outer step", ylabel="validation loss, nats", title="Four members")
right.set(xlabel="outer step", ylabel="weight decay", title="and where they live")
plt.show()

# %% [markdown]
# What to conclude:
#
# - `mesh=`, or arrays that have a sharding, is all there is to it. Hyperparameters that belong to rows are
#   split like rows.
# - Results are those of one device, but for rounding and what a run makes of it. What travels are sums of the
#   size of the parameters.
# - Ask `bilevel.memory` before a machine is rented.
#
# References: Xu et al., "GSPMD: general and scalable parallelization for ML computation graphs", 2021,
# arXiv:2105.04663.
