# %% [markdown]
# # First steps: a slope for the validation loss
#
# A regression has a weight decay. Too little and it fits noise, too much and it fits nothing. The usual way
# to choose it is to try values. This notebook asks for a slope instead: *if the weight decay were a little
# larger, would the validation loss fall, and how fast?* With a slope one can go downhill, and it costs the
# same for one hyperparameter and for sixty-five.
#
# $$\min_\lambda \; F(\lambda) = L_\mathrm{valid}\big(w^*(\lambda)\big)
# \qquad\text{where}\qquad w^*(\lambda) = \arg\min_w \; L_\mathrm{train}(w, \lambda)$$

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures

import bilevel

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.55"

# %% [markdown]
# ## The data
#
# 442 patients, ten measurements each, and the progress of their diabetes a year later. With all squares and
# products of two measurements there are 65 features, for 147 patients in each of three splits: training,
# validation, test.

# %%
data = load_diabetes()
powers = PolynomialFeatures(2, include_bias=False)
x = powers.fit_transform(data.data / data.data.std(0))
names = powers.get_feature_names_out(data.feature_names)
x, y = (x - x.mean(0)) / x.std(0), (data.target - data.target.mean()) / data.target.std()
order = np.random.default_rng(0).permutation(441)
train, valid, test = [(x[rows], y[rows]) for rows in order.reshape(3, 147)]
print(x.shape, "for instance", *names[8:13])


# %%
def error(w, hparams, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train_loss(w, hparams, batch):
    return error(w, hparams, batch) + jnp.sum(hparams["l2"] * w**2)


problem = bilevel.Problem(train_loss, error, constraints={"l2": bilevel.positive()})

# %% [markdown]
# ## One weight decay
#
# `bilevel.argmin` is the trained model as a function of the hyperparameters, and `bilevel.hypergradient` the
# slope at a trained model. Here is the whole curve, which for one hyperparameter can still be drawn, and the
# slope at a few places.

# %%
solve = bilevel.argmin(problem, bilevel.newton())


@jax.jit
def F(l2, split):
    w = solve({"l2": l2}, train, init=jnp.zeros(65))
    return error(w, None, split)


curve = np.geomspace(1e-3, 10, 80)
on_valid = jax.vmap(lambda l2: F(l2, valid))(curve)
on_test = jax.vmap(lambda l2: F(l2, test))(curve)


# %%
@jax.jit
def slope(l2):
    w = solve({"l2": l2}, train, init=jnp.zeros(65))
    estimate = bilevel.hypergradient(problem)(w, {"l2": l2}, train, valid)
    return estimate.value, estimate.grad["l2"]


places = np.array([3e-3, 0.02, 0.1, 0.6, 4.0])
value, grad = jax.vmap(slope)(places)

fig, ax = plt.subplots(figsize=(7, 3.8))
ax.semilogx(curve, on_valid, color=BLUE, lw=2)
ax.semilogx(curve, on_test, color=GREY, lw=1.5)
ax.text(curve[-1], on_valid[-1], "  validation", color=BLUE, va="center")
ax.text(curve[-1], on_test[-1], "  test", color=GREY, va="center")
for l2, f, g in zip(places, value, grad, strict=True):
    step = np.array([1 / 2.2, 2.2])
    ax.plot(l2 * step, f + g * l2 * np.log(step), color=ORANGE, lw=2.5)
    ax.plot(l2, f, "o", color=ORANGE)
ax.set(xlabel="weight decay", ylabel="mean squared error", title="The validation loss and its hypergradients")
plt.show()

# %% [markdown]
# Each orange line is one hypergradient, taken without looking anywhere but at its own model. They are
# tangents: on a logarithmic axis the slope is $\lambda \, dF/d\lambda$.
#
# ## Downhill
#
# `bilevel.optimize` follows the slope. Nothing is tuned: for whole arrays the default inner loop is a Newton
# step and the default outer one is Adam on the logarithm of the weight decay.

# %%
w0 = jnp.zeros(65)
one = bilevel.optimize(problem, w0, {"l2": 3.0}, train, valid, steps=40, test=test, progress=False)
print(one)

# %%
path = one.trajectory.hparams["l2"]
at = jax.vmap(lambda l2: F(l2, valid))(jnp.asarray(path))
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
left.semilogx(curve, on_valid, color=GREY, lw=1.5)
left.scatter(path, at, c=one.trajectory.steps, cmap="viridis", s=22, zorder=3)
left.annotate("start", (path[0], at[0]), (8, -2), textcoords="offset points")
left.set(xlabel="weight decay", ylabel="validation error", title="The run on the curve")
points = right.scatter(one.trajectory.steps, path, c=one.trajectory.steps, cmap="viridis", s=22)
right.set(xlabel="outer step", ylabel="weight decay", yscale="log", title="The run over time")
right.axhline(curve[on_valid.argmin()], color=GREY, lw=1, ls="--")
right.text(40, 0.6, "best on the curve", color=GREY, ha="right")
plt.show()

# %% [markdown]
# It passes the minimum, as Adam does, and comes back.
#
# ## Two weight decays
#
# The ten measurements deserve less decay than their 55 squares and products. One number for each group makes
# a landscape, and a *population* starts in nine places of it, in one compiled program.

# %%
linear = jnp.asarray(np.array([" " not in name and "^" not in name for name in names]))


def grouped_loss(w, hparams, batch):
    l2 = jnp.where(linear, hparams["measured"], hparams["products"])
    return error(w, hparams, batch) + jnp.sum(l2 * w**2)


grouped = bilevel.Problem(grouped_loss, error, constraints=bilevel.positive())
corners = 10 ** jnp.stack(jnp.meshgrid(jnp.array([-2.0, -0.5, 1.0]), jnp.array([-2.0, -0.5, 1.0])), -1)
starts = corners.reshape(9, 2)
stacked = {"measured": starts[:, 0], "products": starts[:, 1]}
nine = bilevel.population(9)
runs = bilevel.optimize(
    grouped, jnp.zeros((9, 65)), stacked, train, valid, steps=60, population=nine, progress=False
)


# %%
def exact(measured, products):
    """By the normal equations."""
    l2 = np.where(linear, measured, products)
    w = np.linalg.solve(train[0].T @ train[0] / 147 + np.diag(l2), train[0].T @ train[1] / 147)
    return np.mean((valid[0] @ w - valid[1]) ** 2)


a, b = np.meshgrid(np.geomspace(1e-4, 30, 31), np.geomspace(3e-3, 30, 31))
z = np.vectorize(exact)(a, b)

# %%
fig, ax = plt.subplots(figsize=(6.4, 4.6))
filled = ax.contourf(
    a, b, z, levels=np.linspace(z.min(), np.quantile(z, 0.93), 22), cmap="Blues_r", extend="max"
)
tracks = runs.trajectory.hparams
for i in range(9):
    ax.plot(tracks["measured"][:, i], tracks["products"][:, i], color=ORANGE, lw=1.4)
    ax.plot(tracks["measured"][0, i], tracks["products"][0, i], "o", color=ORANGE, ms=4)
best = runs.best.hparams
ax.plot(best["measured"], best["products"], "*", color="white", ms=15, mec="k")
ax.plot([3e-3, 30], [3e-3, 30], color="k", lw=0.8, ls=":")
ax.annotate("one weight decay for all", (0.006, 0.006), (0.009, 0.005), fontsize=9)
ax.set(xscale="log", yscale="log", xlim=(1e-4, 30), ylim=(3e-3, 30))
ax.set(xlabel="weight decay of the measurements", ylabel="weight decay of squares and products")
fig.colorbar(filled, label="validation error", format="%.2f")
plt.show()
values = runs.members.value
print(
    f"validation error: one weight decay {one.best.value:.3f}, two {values.min():.3f} to {values.max():.3f}"
)
print(f"test error: {one.test['best']['value']:.3f}, {error(runs.best.params, None, test):.3f}")

# %% [markdown]
# Paths run at right angles to the level lines at first, slow down in the flat valley above the dotted line,
# on which a single weight decay has to stay, and end at about the same error. Where exactly matters little:
# once products hardly count, it is all the same how much less.
#
# ## Sixty-five, and what that costs
#
# One weight decay for every feature. The problem is the one from above; only the shape of `l2` is another.

# %%
start = {"l2": jnp.full(65, 0.5)}
many = bilevel.optimize(problem, w0, start, train, valid, steps=60, test=test, judge_every=2, progress=False)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1, 1.25))
for key, colour, label in (("value", BLUE, "validation"), ("test", ORANGE, "test")):
    seen = np.isfinite(many.history[key])
    left.plot(many.history["step"][seen], many.history[key][seen], color=colour, lw=2)
    left.text(60, many.history[key][seen][-1], f" {label}", color=colour, va="center")
left.axhline(one.test["best"]["value"], color=GREY, lw=1, ls="--")
left.text(60, one.test["best"]["value"] + 0.003, "test, one weight decay", color=GREY, ha="right")
left.set(xlabel="outer step", ylabel="mean squared error", title="Weight decays can overfit, too")
shown = np.argsort(many.hparams["l2"])[[*range(12), *range(-4, 0)]]
right.barh(range(16), many.hparams["l2"][shown], color=[GREEN if linear[i] else GREY for i in shown])
right.set_yticks(range(16), names[shown], fontsize=8)
right.set(
    xscale="log", xlabel="weight decay (green: measurements)", title="The 12 smallest, and the 4 largest"
)
right.invert_yaxis()
plt.show()
print(many.message)

# %% [markdown]
# What to conclude:
#
# - A hypergradient is the slope of the validation loss by the hyperparameters, exact, for any number of them.
# - `optimize` needs two losses and a start. Its default needs no settings.
# - 65 numbers fitted to 147 validation rows are fitted to noise in part: the validation loss goes on falling
#   when the test loss does not. Keep a third split (`test=`), or tie hyperparameters together, as the two
#   groups did.
#
# Next: [which estimator](02_which_estimator.ipynb). Reference: Bengio, "Gradient-based optimization of
# hyperparameters", 2000, Neural Computation 12.
