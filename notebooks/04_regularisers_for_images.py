# %% [markdown]
# # Learning a regulariser for pictures
#
# A noisy picture $y$ is restored by a compromise: stay close to it, and be smooth.
#
# $$x^*(\lambda) = \arg\min_x \; \tfrac12 |x - y|^2 + R_\lambda(x)$$
#
# What is smooth, and how much of it? Given some pairs of noisy and clean pictures, that is a bilevel problem:
# choose $\lambda$ so that what is restored is close to what was clean. First with two numbers, then with one
# for each pixel, then with filters of its own.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from sklearn.datasets import load_sample_images

import bilevel
from bilevel import imaging

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.55"

# %% [markdown]
# ## Pictures
#
# Two photographs, a temple and a flower, in grey and at half the size. Four crops to learn from, four of
# other places to judge by. The outermost three pixels are neither learned from nor judged.

# %%
SIDE, MARGIN, NOISE = 36, 3, 0.1
temple, flower = (photo.mean(2)[::2, ::2] / 255 for photo in load_sample_images().images)
corners = [(temple, 120, 60), (temple, 95, 85), (temple, 110, 240), (flower, 40, 90)]
corners_test = [(temple, 100, 190), (temple, 140, 120), (flower, 60, 130), (flower, 100, 180)]
rng = np.random.default_rng(0)


def inside(stack):
    return np.asarray(stack)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def pairs(places):
    clean = np.stack([photo[i : i + SIDE, j : j + SIDE] for photo, i, j in places])
    return {"clean": inside(clean), "noisy": clean + NOISE * rng.standard_normal(clean.shape)}


train, test = pairs(corners), pairs(corners_test)


def show(rows, captions, side):
    fig, axes = plt.subplots(
        len(rows), len(rows[0]), figsize=(1.75 * len(rows[0]), 1.95 * len(rows)), squeeze=False
    )
    for line, (row, caption) in zip(axes, zip(rows, captions, strict=True), strict=True):
        line[0].text(-0.08, 0.5, caption, transform=line[0].transAxes, rotation=90, va="center", ha="right")
        for ax, picture, clean in zip(line, row, side, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
            if not np.array_equal(picture, clean):
                ax.set_title(f"{imaging.psnr(picture, clean):.1f} dB", fontsize=9)
            ax.axis("off")
    plt.show()


show([train["clean"], inside(train["noisy"])], ["clean", "noisy"], train["clean"])

# %% [markdown]
# ## Two numbers: total variation
#
# $R(x) = \alpha \sum_\mathrm{pixels} \sqrt{|\partial x|^2 + \nu^2}$ has a strength $\alpha$ and a smoothing
# $\nu$. The method is [MAID](09_certified_accuracy.ipynb), which finds its own accuracies and step sizes.

# %%
problem = imaging.tv_denoising(pictures=4)
method = bilevel.maid(non_monotone=0.85, barzilai_borwein=True)
first = {"strength": jnp.array(0.01), "smoothing": jnp.array(0.05)}
tv = bilevel.optimize(problem, train["noisy"], first, train, train, method, 25, progress=False)
print(f"strength {tv.hparams['strength']:.3f}, smoothing {tv.hparams['smoothing']:.4f}")

solver = bilevel.accelerated(5_000, atol=1e-3)
restore = jax.jit(lambda h, noisy: bilevel.argmin(problem, solver)(h, {"noisy": noisy}, init=noisy))


def quality(hparams, data):
    return -10 * np.log10(np.mean((inside(restore(hparams, data["noisy"])) - data["clean"]) ** 2))


strengths = np.geomspace(0.004, 0.4, 13)
by_hand = [
    [quality({"strength": s, "smoothing": tv.hparams["smoothing"]}, d) for s in strengths]
    for d in (train, test)
]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
for line, colour, name in zip(
    by_hand, (BLUE, ORANGE), ("pictures learned from", "other pictures"), strict=True
):
    left.semilogx(strengths, line, color=colour, lw=2, label=name)
left.axvline(tv.hparams["strength"], color=GREEN, lw=2)
left.text(tv.hparams["strength"] * 1.1, min(by_hand[0]), "learned", color=GREEN)
left.set(xlabel="strength of total variation", ylabel="PSNR, dB", title="By hand, and learned")
left.legend(frameon=False, loc="upper left", fontsize=9)
path = tv.trajectory.hparams
right.loglog(path["strength"], path["smoothing"], "-", color=GREY, lw=1)
dots = right.scatter(path["strength"], path["smoothing"], c=tv.trajectory.steps, cmap="viridis", zorder=3)
right.set(xlabel="strength", ylabel="smoothing", title="The way of 25 steps")
right.set_xticks([0.01, 0.03, 0.1], [0.01, 0.03, 0.1])
right.set_yticks([0.005, 0.02, 0.05], [0.005, 0.02, 0.05])
right.minorticks_off()
fig.colorbar(dots, label="outer step")
plt.show()

# %% [markdown]
# ## A number for each pixel
#
# The noise of a camera is not the same everywhere. Here it is weak in the middle and strong in the corners,
# nobody says so, and every pixel has a strength of its own, shared by all pictures: 1,296 hyperparameters.

# %%
at = np.linspace(-1, 1, SIDE)
sigma = 0.03 + 0.11 * np.add.outer(at**2, at**2)
places = [(p, i, j) for p in (temple, flower) for i in (10, 60, 110, 150) for j in (30, 100, 170, 240)]
whole = np.stack([p[i : i + SIDE, j : j + SIDE] for p, i, j in places])
uneven = {"clean": inside(whole), "noisy": whole + sigma * rng.standard_normal(whole.shape)}
mapped = dataclasses.replace(
    imaging.tv_denoising(len(places)),
    constraints={"strength": bilevel.positive(), "smoothing": bilevel.fixed()},
)
start = {"strength": jnp.full((SIDE, SIDE), tv.hparams["strength"]), "smoothing": jnp.array(0.02)}
each = bilevel.optimize(
    mapped, uneven["noisy"], start, uneven, uneven,
    bilevel.maid(step_size=100.0, certify=False, barzilai_borwein=True), 15, progress=False,
)  # fmt: skip
sigma, learned = inside(sigma), inside(each.hparams["strength"])

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for ax, picture, title in ((axes[0], sigma, "noise (not told)"), (axes[1], learned, "learned strengths")):
    drawn = ax.imshow(picture, cmap="magma", norm=LogNorm())
    ax.set_title(title)
    ax.axis("off")
    fig.colorbar(drawn, ax=ax, shrink=0.8)
axes[2].loglog(sigma.ravel(), learned.ravel(), ".", color=GREY, ms=3)
axes[2].set(xlabel="standard deviation of the noise", ylabel="learned strength", title="pixel by pixel")
axes[2].set_xticks([0.03, 0.1, 0.25], [0.03, 0.1, 0.25])
axes[2].minorticks_off()
plt.show()

# %% [markdown]
# ## Filters of its own: a Field of Experts
#
# $R(x) = \sum_k w_k \sum_\mathrm{pixels} \sqrt{(f_k * x)^2 + \nu_k^2}$ with filters $f_k$ that are learned.
# It starts as the total variation just found, its two differences as filters of 5 x 5, with six cosines of
# smaller weight beside them. That makes 217 hyperparameters.

# %%
K, TAPS = 8, 5
grid = np.arange(TAPS)
waves = np.cos(np.pi * np.outer(grid, grid + 0.5) / TAPS)
waves /= np.linalg.norm(waves, axis=1, keepdims=True)
filters = np.zeros((K, TAPS, TAPS))
filters[0, 2, 2], filters[0, 3, 2], filters[1, 2, 2], filters[1, 2, 3] = -1, 1, -1, 1
filters[2:] = [np.outer(waves[a], waves[b]) for a, b in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 2))]
weight = np.r_[0.7, 0.7, np.full(K - 2, 0.1)] * float(tv.hparams["strength"])
begin = {"strength": jnp.array(1.0), "weight": jnp.asarray(weight), "filters": jnp.asarray(filters)}
begin["smoothing"] = jnp.full(K, 0.02)
experts = imaging.experts_denoising(pictures=4)
settings = {"certify": False, "barzilai_borwein": True, "non_monotone": 0.85, "step_size": 1.0}
foe = bilevel.optimize(experts, tv.params, begin, train, train, bilevel.maid(**settings), 60, progress=False)
print(f"validation loss {foe.history['value'][0]:.3f} -> {foe.best.value:.3f}")

# %%
after = foe.best.hparams
loud = np.argsort(-np.asarray(after["weight"]))
fig, axes = plt.subplots(2, K, figsize=(11, 3.1))
for line, hparams, title in ((axes[0], begin, "at first"), (axes[1], after, "learned")):
    line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, rotation=90, va="center", ha="right")
    for ax, k in zip(line, loud, strict=True):
        taps = np.asarray(hparams["filters"][k])
        ax.imshow(taps, cmap="RdBu", vmin=-abs(taps).max(), vmax=abs(taps).max())
        ax.set_title(f"{float(hparams['weight'][k]):.3f}", fontsize=9)
        ax.axis("off")
fig.suptitle("Filters and their weights", fontsize=11)
plt.show()

# %%
denoise = jax.jit(lambda h, noisy: bilevel.argmin(experts, solver)(h, {"noisy": noisy}, init=noisy))
restored = {"noisy": test["noisy"], "total variation": restore(tv.hparams, test["noisy"])}
restored["experts"] = denoise(after, test["noisy"])
restored = {name: inside(stack) for name, stack in restored.items()}
show([test["clean"], *restored.values()], ["clean", *restored], test["clean"])
for name, stack in restored.items():
    print(
        f"{name:16} {float(jnp.mean(imaging.psnr(stack, test['clean']))):.2f} dB on pictures it has not seen"
    )

# %% [markdown]
# What to conclude:
#
# - Two hyperparameters could be found by hand; the learned ones stand at the top of the curve.
# - 1,296 could not. They find the noise that nobody told them of.
# - Filters are hyperparameters, too. In 60 steps on four small pictures they gain a little on what they learn
#   from, and nothing on other pictures: they need more of both (`python -m benchmarks denoising` has more).
#
# References: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992,
# Physica D 60. Roth and Black, "Fields of Experts", 2009, International Journal of Computer Vision 82. Salehi
# et al., "An adaptively inexact first-order method for bilevel optimization", 2025, arXiv:2308.10098.
