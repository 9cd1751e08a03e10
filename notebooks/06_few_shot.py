# %% [markdown]
# # Few examples: an algorithm whose steps are learned
#
# One labelled example of each digit, and 75 unlabelled ones, of which only three digits occur.
# Expectation-maximisation assigns all 75 together: assign, average, assign again. Three numbers steer it: the
# weight of the classes' shares $\pi_k$, a temperature $\tau$ and the scale of the features. In step $t$ query
# $n$ belongs to class $k$ with
#
# $$\log u_{nk} = \log\mathrm{softmax}_k
# \Big( \frac{\log p(z_n | \theta_k) + \gamma_t \log \pi_k}{\tau_t} \Big).$$
#
# Plain EM has $\gamma_t = \tau_t = 1$ throughout. Unrolled EM gives each of ten steps numbers of its own and
# learns all 21 by the derivative through the ten steps.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import bilevel
from bilevel import em

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"

# %% [markdown]
# ## A task

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(labels))
mine, others = order[:900], order[900:]
learn = em.sample_tasks(images[mine], labels[mine], num_tasks=100, shots=1, present=3, seed=0)
judge = em.sample_tasks(images[others], labels[others], num_tasks=100, shots=1, present=3, seed=1)


def strip(pictures, title):
    fig, axes = plt.subplots(1, len(pictures), figsize=(0.62 * len(pictures), 1.1))
    for ax, picture in zip(axes, pictures, strict=True):
        ax.imshow(-picture.reshape(8, 8), cmap="gray")
        ax.axis("off")
    fig.suptitle(title, fontsize=10)
    plt.show()


strip(judge[0]["support"][3], "Support of one task: an example of each class")
strip(judge[0]["query"][3][:14], "14 of its 75 queries: only three classes, but nobody says which")


# %% [markdown]
# ## Learning the steps
#
# The map is `em.gaussian_step`, the outer loss the cross-entropy of the queries. `lift` makes one problem of
# 100 tasks; `per_step` gives the prior weight and the temperature an axis of ten steps.


# %%
def start(hparams, batch, key):
    return em.gaussian_init(batch, 10, hparams["scale"])


STEPS = 10
constraints = bilevel.positive()
problem = bilevel.lift(
    bilevel.FixedPoint(em.gaussian_step, em.query_loss, constraints=constraints, start=start)
)
each = {"prior_weight": True, "temperature": True}


def learned(per_step, first, steps=80):
    method = bilevel.alternating(
        bilevel.unrolled(per_step=per_step), None, optax.adam(0.1), inner_steps=STEPS
    )
    first = jax.tree.map(np.float32, first)
    return bilevel.optimize(problem, None, first, *learn, method, steps=steps, progress=False)


full = np.full(STEPS, 1.0)
unem = learned(each, {"prior_weight": 1.3 * full, "temperature": 2.3 * full, "scale": 1.3})
shared = learned(None, {"prior_weight": 1.3, "temperature": 2.3, "scale": 1.3})
three = shared.best.hparams
arms = {
    "plain EM": ({"prior_weight": full, "temperature": full, "scale": 1.0}, GREY),
    "three numbers": (three | {name: full * three[name] for name in each}, BLUE),
    "21 numbers": (unem.best.hparams, GREEN),
}

# %%
fig, axes = plt.subplots(1, 3, figsize=(11.5, 3.3))
for name, (numbers, colour) in arms.items():
    axes[0].plot(np.arange(1, 11), numbers["prior_weight"], "o-", ms=4, color=colour, label=name)
    axes[1].plot(np.arange(1, 11), numbers["temperature"], "o-", ms=4, color=colour)
axes[0].legend(frameon=False)
axes[0].set(title="prior weight", xlabel="step of EM", yscale="log")
axes[1].set(title="temperature", xlabel="step of EM", yscale="log")
for run, colour in ((shared, BLUE), (unem, GREEN)):
    axes[2].plot(run.history["step"], run.history["accuracy"], color=colour, lw=2)
axes[2].set(title="accuracy on the tasks learned from", xlabel="outer step")
plt.show()

# %% [markdown]
# The first prior weight stays where it was: shares are equal at the start, and a weight on equal shares does
# nothing. The second is large: at once it cuts down the classes in use, and later steps are milder.
#
# ## Other images, step by step


# %%
@jax.jit
@jax.vmap
def steps_of(task, numbers):
    """Assignments after every step."""

    def step(params, t):
        at = {name: leaf if leaf.ndim == 0 else leaf[t] for name, leaf in numbers.items()}
        params = em.gaussian_step(params, at, task)
        return params, params["log_assignments"]

    return jax.lax.scan(step, start(numbers, task, None), jnp.arange(STEPS))[1]


def followed(numbers, tasks):
    count = len(tasks[0]["labels"])
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.float32(leaf), (count, *np.shape(leaf))), numbers)
    found = np.asarray(steps_of(tasks[0], same))
    return found, (found.argmax(-1) == tasks[1]["labels"][:, None]).mean(-1)


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
traces = {}
for name, (numbers, colour) in arms.items():
    traces[name], right_share = followed(numbers, judge)
    mean, error = right_share.mean(0), right_share.std(0) / np.sqrt(len(right_share))
    left.plot(np.arange(1, 11), mean, "o-", ms=4, color=colour, lw=2, label=name)
    left.fill_between(np.arange(1, 11), mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    in_use = (np.exp(traces[name]).mean(2) > 0.02).sum(-1).mean(0)
    right.plot(np.arange(1, 11), in_use, "o-", ms=4, color=colour, lw=2)
left.set(xlabel="step of EM", ylabel="accuracy, 100 other tasks", title="Queries assigned rightly")
left.legend(frameon=False)
right.axhline(3, color="k", lw=0.8, ls="--")
right.set(xlabel="step of EM", ylabel="classes", title="Classes with more than 2 % of the queries")
right.text(10, 3.1, "truth", ha="right")
plt.show()

# %% [markdown]
# ## One task, seen from above
#
# The 75 queries of the task where plain and learned EM differ most, in the plane of their two principal
# components. Colours are assignments.

# %%
ends = {name: (trace[:, -1].argmax(-1) == judge[1]["labels"]).mean(1) for name, trace in traces.items()}
TASK = int(np.argmax(ends["21 numbers"] - ends["plain EM"]))
plane = PCA(2).fit(judge[0]["query"][TASK])
at, marks = plane.transform(judge[0]["query"][TASK]), plane.transform(judge[0]["support"][TASK])
truth = judge[1]["labels"][TASK]
fig, axes = plt.subplots(2, 4, figsize=(11, 5), sharex=True, sharey=True)
for row, name in zip(axes, ("plain EM", "21 numbers"), strict=True):
    for ax, t in zip(row, (0, 1, 4, 9), strict=True):
        guess = traces[name][TASK, t].argmax(-1)
        ax.scatter(*at.T, c=guess, cmap="tab10", vmin=0, vmax=9, s=24)
        ax.scatter(*at[guess != truth].T, facecolors="none", edgecolors="k", s=60, lw=0.8)
        for digit in np.unique(guess):
            ax.text(*marks[digit], str(digit), color=plt.cm.tab10(int(digit)), weight="bold", fontsize=13)
        ax.set_title(f"{name}, step {t + 1}: {np.mean(guess == truth):.0%} right", fontsize=9)
        ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# A circle is a mistake, a number the one labelled example of a class that is still in use.
#
# ## Does it hold where tasks are different?
#
# It was learned on tasks with three classes. Here with one to ten.

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.6))
present = [1, 2, 3, 5, 7, 10]
drawn = [em.sample_tasks(images[others], labels[others], 100, 1, k, seed=2) for k in present]
for name, (numbers, colour) in arms.items():
    ends = [followed(numbers, tasks)[1][:, -1].mean() for tasks in drawn]
    ax.plot(present, ends, "o-", color=colour, lw=2, label=name)
ax.axvline(3, color=GREY, lw=0.8, ls=":")
ax.set(xlabel="classes among the queries", ylabel="accuracy", title="Learned on three classes")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# What to conclude:
#
# - An algorithm of few steps is a function, and its settings at every step are hyperparameters with an exact
#   derivative.
# - What helps is a value for each step: strong selection early, mild refinement later. Three shared numbers
#   cannot say that.
# - What was learned belongs to tasks of the same kind: look at the last picture before it is used on others.
#
# References: Zhou, Shakeri, Sadraoui, Kaaniche, Pesquet and Ben Ayed, "UNEM: unrolled generalized EM for
# transductive learning", 2025, arXiv:2412.16739. Martin et al., "Towards practical few-shot query sets:
# transductive minimum description length inference", 2022, arXiv:2210.14545.
