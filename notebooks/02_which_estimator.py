# %% [markdown]
# # Which estimator: what each one costs, and what it returns
#
# There are several ways to the derivative of a validation loss by a hyperparameter. They differ in what they
# differentiate, in what they cost and in where they are wrong. On ridge regression the truth has a closed
# form, so that each can be held against it.
#
# With $H$ the Hessian of the training loss, $J$ its cross derivative, $\eta$ the step size of gradient
# descent:
#
# | | returns | by |
# |---|---|---|
# | `implicit` | $-J^\top H^{-1} \nabla_w L_\mathrm{valid}$ at the given $w$ | a linear solve |
# | `unrolled` | the derivative of $L_\mathrm{valid}(w_T)$ | running $T$ steps backwards |
# | `forward` | the same number | carrying $dw_t/d\lambda$ along |
# | `one_step` | the last step's share of it | one step backwards |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import bilevel

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"

x, y = load_breast_cancer(return_X_y=True)
x, y = (x - x.mean(0)) / x.std(0), 2.0 * y - 1
train, valid = (x[:190], y[:190]), (x[190:], y[190:])
L2 = 0.03


def error(w, hparams, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train_loss(w, hparams, batch):
    return error(w, hparams, batch) + hparams["l2"] * w @ w


problem = bilevel.Problem(train_loss, error, constraints={"l2": bilevel.positive()})

# %% [markdown]
# ## The truth, by numpy
#
# Gradient descent from zero can be written down, too: in the basis of the eigenvectors of $H$ each coordinate
# shrinks by $1 - \eta\,\mathrm{eig}$ in every step. So there are two truths: $dF/d\lambda$ at the solution
# and $dF_T/d\lambda$ after $T$ steps.

# %%
gram, moment = train[0].T @ train[0] / 190, train[0].T @ train[1] / 190
eigenvalues, basis = np.linalg.eigh(gram)
RATE = 1 / (2 * eigenvalues[-1] + 2 * L2)


def weights(l2, steps=np.inf):
    h = 2 * eigenvalues + 2 * l2
    return basis @ ((1 - (1 - RATE * h) ** steps) / h * (basis.T @ (2 * moment)))


def slope(steps=np.inf, d=1e-7):
    up, down = (np.mean((valid[0] @ weights(L2 + s, steps) - valid[1]) ** 2) for s in (d, -d))
    return (up - down) / (2 * d)


condition = (eigenvalues[-1] + L2) / (eigenvalues[0] + L2)
print(f"condition {condition:.0f}; dF/dl2 {slope():.3f}, after 100 steps {slope(100):.3f}")


# %% [markdown]
# ## The linear solve of `implicit`
#
# At the solution, all that can be wrong is the linear system $Hv = \nabla_w L_\mathrm{valid}$. What does an
# additional Hessian product buy?


# %%
def at(solver, w):
    fn = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(solver)))
    return fn(w, {"l2": L2}, train, valid)


def off(estimate, truth):
    return abs(float(estimate.grad["l2"]) / truth - 1)


counts = [2, 5, 10, 20, 30]
makers = {
    "conjugate gradients": lambda k: bilevel.cg(max_steps=k, tol=0.0),
    "Neumann series": lambda k: bilevel.neumann(k + 1, RATE),
    "Nyström, damping 1e-4": lambda k: bilevel.nystrom(k, 1e-4),
}
solution = weights(L2)
errors = {name: [at(make(k), solution) for k in counts] for name, make in makers.items()}

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
labels = {"conjugate gradients": (2, 1e-6), "Neumann series": (3, 2), "Nyström, damping 1e-4": (8, 300)}
for (name, found), colour in zip(errors.items(), (BLUE, ORANGE, GREEN), strict=True):
    left.loglog(counts, [off(e, slope()) for e in found], "o-", color=colour, ms=4)
    right.loglog([e.error for e in found], [off(e, slope()) for e in found], "o", color=colour, ms=5)
    left.text(*labels[name], name, color=colour)
left.set(
    xlabel="Hessian products",
    ylabel="relative error",
    title="Error against cost",
    xlim=(1, 40),
    ylim=(1e-9, 1e4),
)
right.plot([1e-8, 1e3], [1e-8, 1e3], color=GREY, lw=0.8, ls=":")
right.set(
    xlabel="residual that the estimate reports", ylabel="relative error", title="Error against the residual"
)
plt.show()

# %% [markdown]
# Conjugate gradients need no step size and are at seven digits after 30 products, one for each dimension. The
# Neumann series would need as many terms as the condition number, 500. Nyström divides what its columns have
# not seen by the damping: with fewer columns than large eigenvalues a small damping makes it useless. On the
# right: the residual, which is measured for free, goes with the error. It is not fooled by the last term of
# the Neumann series, where the error happens to change its sign.
#
# ## Before the solution is reached
#
# Training stops after $T$ steps. `implicit` takes $w_T$ for the solution; `unrolled` does not care.

# %%
descent = optax.sgd(RATE)
horizons = np.array([10, 30, 100, 300, 1000])
fine = np.unique(np.geomspace(7, 1400, 80).round())
implicit = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(bilevel.dense())))
last = jax.jit(bilevel.hypergradient(problem, bilevel.one_step(descent)))
twenty = jax.jit(bilevel.hypergradient(problem, bilevel.unrolled(descent, steps=20)))
h = {"l2": L2}
rows = {"implicit": [], "one step": [], "the last 20 steps": [], "unrolled": []}
for steps in horizons:
    w = weights(L2, steps)
    rows["implicit"].append(implicit(w, h, train, valid).grad["l2"])
    rows["one step"].append(last(weights(L2, steps - 1), h, train, valid).grad["l2"])
    before = weights(L2, max(steps - 20, 0))
    rows["the last 20 steps"].append(twenty(before, h, train, valid).grad["l2"])
    whole = jax.jit(bilevel.hypergradient(problem, bilevel.unrolled(descent, steps=int(steps))))
    rows["unrolled"].append(whole(np.zeros(30), h, train, valid).grad["l2"])

# %%
fig, ax = plt.subplots(figsize=(8.5, 4.4))
ax.semilogx(fine, [slope(t) for t in fine], color=GREY, lw=3, alpha=0.6)
ax.axhline(slope(), color="k", lw=1, ls="--")
ax.text(7, slope(), "truth at the solution, $dF/d\\lambda$", va="bottom")
ax.text(60, slope(60), "truth after $T$ steps, $dF_T/d\\lambda$ ", color=GREY, va="top", ha="right")
for (name, grads), colour in zip(rows.items(), (BLUE, PINK, ORANGE, GREEN), strict=True):
    shown = horizons >= (20 if "20" in name else 0)
    ax.plot(horizons[shown], np.array(grads)[shown], "o", color=colour, ms=7, label=name)
ax.set(xlabel="inner steps $T$", ylabel="derivative by the weight decay")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Green dots lie on the grey curve: `unrolled` is exact for the training that was done. Blue ones come to the
# dashed line as training comes to its end, at a fixed cost. Truncation (orange) sees a part of the way,
# whatever $T$ is: 20 steps have three quarters of the derivative, and one step (pink) has next to nothing.
#
# ## Memory
#
# `unrolled` has to remember the way, `forward` a copy of the parameters for each hyperparameter. The compiler
# knows how much, so that nothing has to run. Here for 3,000 parameters.

# %%
big = {"x": np.zeros((50, 3000)), "y": np.zeros(50)}


def temporary(estimator, n):
    def inner(w, h, b):
        return jnp.mean((b["x"] @ w - b["y"]) ** 2) + jnp.sum(jnp.repeat(h["l2"], 3000 // n) * w**2)

    outer = lambda w, h, b: jnp.mean((b["x"] @ w - b["y"]) ** 2)  # noqa: E731
    fn = jax.jit(bilevel.hypergradient(bilevel.Problem(inner, outer), estimator))
    compiled = fn.lower(np.zeros(3000), {"l2": np.ones(n)}, big, big).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


lengths, groups = [10, 100, 1000], [1, 10, 100]
sgd = optax.sgd(0.1)
stored = [temporary(bilevel.unrolled(sgd, steps=t, remat=False), 1) for t in lengths]
segments = [temporary(bilevel.unrolled(sgd, steps=t), 1) for t in lengths]
tangents = [temporary(bilevel.forward(sgd, steps=10), n) for n in groups]
solved = temporary(bilevel.implicit(bilevel.cg()), 1)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
left.loglog(lengths, stored, "o-", color=PINK)
left.loglog(lengths, segments, "o-", color=GREEN)
left.text(lengths[1], stored[1] * 1.6, "every step stored ", color=PINK, ha="right")
left.text(lengths[-1], segments[-1] * 0.5, "unrolled, the default", color=GREEN, ha="right", va="top")
left.set(xlabel="inner steps", ylabel="temporary memory, MB", title="In the number of steps")
right.loglog(groups, tangents, "o-", color=ORANGE)
right.text(groups[1], tangents[1] * 1.6, "forward ", color=ORANGE, ha="right")
for ax in (left, right):
    ax.axhline(solved, color=BLUE, lw=1.5)
right.text(groups[-1], solved * 0.93, "implicit", color=BLUE, va="top", ha="right")
right.set(xlabel="hyperparameters", title="In the number of hyperparameters")
plt.show()

# %% [markdown]
# Slopes on these axes are exponents: 1 for storing everything and for `forward`, 1/2 for the checkpointed
# `unrolled`, 0 for `implicit`.
#
# ## A case where all of them are wrong
#
# A dropout mask is drawn as `uniform < 1 - rate`. It does not move under a small change of the rate, so that
# no derivative passes through it. Gaussian noise of the same mean and variance has one. The curve is exact:
# in expectation dropout on the inputs of a linear model is a penalty $\frac{r}{1-r}\sum_j \overline{x_j^2}
# w_j^2$.

# %%
draws = np.random.default_rng(0)
masked = {"x": train[0], "y": train[1], "u": draws.uniform(size=(400, 190, 30))}
masked["n"] = draws.standard_normal((400, 190, 30))


def bernoulli(w, h, batch):
    keep = 1 - h["rate"]
    return jnp.mean(((batch["u"] < keep) / keep * batch["x"] @ w - batch["y"]) ** 2)


def gaussian(w, h, batch):
    noise = 1 + jnp.sqrt(h["rate"] / (1 - h["rate"])) * batch["n"]
    return jnp.mean((noise * batch["x"] @ w - batch["y"]) ** 2)


# %%
def dropped(rate):
    return np.linalg.solve(gram + rate / (1 - rate) * np.diag(np.diag(gram)), moment)


rates = np.linspace(0.02, 0.6, 60)
truth = [np.mean((valid[0] @ dropped(r) - valid[1]) ** 2) for r in rates]
fig, ax = plt.subplots(figsize=(7, 3.6))
ax.plot(rates, truth, color=GREY, lw=2.5)
for inner, colour, label in (
    (gaussian, GREEN, "through Gaussian noise"),
    (bernoulli, ORANGE, "through masks"),
):
    fn = jax.jit(bilevel.hypergradient(bilevel.Problem(inner, error), bilevel.implicit(bilevel.dense())))
    for r in (0.06, 0.2, 0.4):
        est, f = fn(dropped(r), {"rate": r}, masked, valid), np.interp(r, rates, truth)
        line = f + est.grad["rate"] * np.array([-0.05, 0.05])
        ax.plot([r - 0.05, r + 0.05], line, color=colour, lw=3, label=label if r == 0.2 else None)
ax.set(
    xlabel="dropout rate of the inputs", ylabel="validation error", title="Slopes through two kinds of noise"
)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# What to conclude:
#
# - Hyperparameters of the loss and a model that is nearly trained: `implicit(cg())`. Read `error`, the
#   residual.
# - Training that stops early on purpose, learning rates, schedules: `unrolled`. `forward` for a handful of
#   hyperparameters over very many steps.
# - `one_step` and short truncations are cheap, and for anything slow they are not the derivative of much.
# - A derivative through a mask is wrong with a small error bar. Take `bilevel.nn.dropout(...,
#   kind="gaussian")`, or a method that needs no derivative of the training loss: [self-tuning
#   networks](05_self_tuning.ipynb).
#
# References: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
# differentiation", 2020, arXiv:1911.02590. Franceschi et al., "Forward and reverse gradient-based
# hyperparameter optimization", 2017, arXiv:1703.01785. Hataya and Yamada, "Nyström method for accurate and
# scalable implicit differentiation", 2023, arXiv:2302.09726.
