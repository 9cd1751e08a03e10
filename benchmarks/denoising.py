"""Learned regularisers on real pictures: total variation and a Field of Experts against tuned denoisers.

Three tasks, each learned on crops of five photographs and judged on crops of five others, all by MAID with
its own choice of accuracies:

- denoising: normal noise of 0.1; two parameters of total variation, and a Field of Experts that begins at
  that total variation (its two differences at two corners of a filter) beside cosine filters of low weight;
- uneven noise, from 0.04 in the middle to 0.2 in the corners: one strength for each pixel;
- deblurring: a Gaussian kernel of 5 x 5 and noise of 0.02.

Weights of the denoisers of scikit-image and of total variation by hand are the best of a grid on the training
pictures, by mean squared error, which is what MAID lowers too. Pixels closer than MARGIN to a border are
neither learned from nor judged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import table
from benchmarks.problems import pictures
from bilevel import imaging

SIGMA, MARGIN = 0.1, 4
# Crops: their side and how many of each of five photographs.
SIZE, EACH = 44, 3
UNEVEN_SIZE, UNEVEN_EACH = 36, 5
STEPS = {"tv": 40, "map": 20, "blur": 25, "experts": 120}
COSINES, SIDE, SCALE = 12, 5, 1.5
SHOWN, SHOWN_SIZE = ("camera", "page"), 128
FIGURE = Path(__file__).parent / "results" / "denoising.png"
START = {"strength": 0.05, "smoothing": 0.05}


def inside(stack):
    return stack[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def task(size: int, each: int, spoil: Callable) -> tuple[dict, dict]:
    """Training and held-out batches; ``spoil(clean, seed)`` makes the noisy pictures."""
    found = []
    for seed, names in enumerate((pictures.TRAINING, pictures.HELD_OUT)):
        clean = pictures.crops(names, size, each, seed)
        found.append({"noisy": jnp.asarray(spoil(clean, seed)), "clean": jnp.asarray(inside(clean))})
    return found[0], found[1]


def restorer(problem: bilevel.Problem) -> Callable:
    """``(hparams, noisy, start) -> pictures``, their middle, to 1e-4."""
    known = problem.smoothness
    solver = bilevel.accelerated(
        20_000, atol=1e-4, strong_convexity=known.strong_convexity, smoothness=known.inner
    )
    solve = jax.jit(bilevel.argmin(problem, solver))
    return lambda hparams, noisy, start: inside(solve(hparams, {"noisy": noisy}, init=start))


def learn(problem, start, train, hparams, steps: int, step_size: float = 0.05, **settings):
    """A run of MAID and its seconds, compilation included."""
    method = bilevel.maid(step_size=step_size, **settings)
    began = time.perf_counter()
    result = bilevel.optimize(problem, start, hparams, train, train, method, steps, progress=False)
    return result, time.perf_counter() - began


def best_of(grid, restore: Callable, clean):
    """The entry with the lowest mean squared error."""
    return min(grid, key=lambda weight: float(jnp.mean((restore(weight) - clean) ** 2)))


def tv_grid() -> list[dict]:
    return [{"strength": s, "smoothing": 0.01} for s in np.geomspace(0.005, 0.2, 12)]


def row(name: str, restored: Callable, train: dict, test: dict, seconds: float | None = None) -> tuple:
    """A line of a table; ``restored(noisy)`` are the middles of the pictures."""
    from skimage.metrics import structural_similarity

    learned, held = (np.asarray(restored(data["noisy"])) for data in (train, test))
    clean = np.asarray(test["clean"])
    ssim = np.mean([structural_similarity(a, b, data_range=1.0) for a, b in zip(held, clean, strict=True)])
    psnrs = (float(jnp.mean(imaging.psnr(x, d["clean"]))) for x, d in ((learned, train), (held, test)))
    return name, *(f"{p:.2f}" for p in psnrs), f"{ssim:.3f}", "" if seconds is None else f"{seconds:.0f}"


def report(title: str, rows) -> None:
    table((title, "PSNR, training", "PSNR, held out", "SSIM, held out", "seconds to learn"), rows)
    print(flush=True)


def first_experts(tv) -> dict:
    """A Field of Experts that is the learned total variation but for borders, and cosines beside it.

    Filters of norm SCALE and more: their weights and smoothings then learn about as fast as their taps.
    """
    down = np.zeros((2, SIDE, SIDE))
    down[0, 0, 0], down[0, 1, 0], down[1, -2, -1], down[1, -1, -1] = -1, 1, -1, 1
    i = np.arange(SIDE)
    cosines = np.cos(np.pi * np.outer(i, i + 0.5) / SIDE)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    both = np.einsum("ai,bj->abij", cosines, cosines).reshape(-1, SIDE, SIDE)
    order = np.argsort(np.add.outer(i, i).ravel(), kind="stable")[1 : COSINES + 1]  # slow ones first
    filters = np.concatenate([down, down.transpose(0, 2, 1), both[order]])
    strength, smoothing = float(tv["strength"]), float(tv["smoothing"])
    weight = np.r_[np.full(4, strength / 2), np.full(COSINES, strength / 60)]
    return {
        "strength": 1.0,
        "weight": weight / SCALE,
        "smoothing": np.r_[np.full(4, smoothing), np.full(COSINES, 2 * smoothing)] * SCALE,
        "filters": SCALE * filters,
    }


def each_picture(denoise: Callable) -> Callable:
    """A denoiser of one picture on a stack, the middles."""
    return lambda weight: lambda stack: inside(np.stack([denoise(x, weight) for x in np.asarray(stack)]))


def denoising():
    """The first task; the runs of both models, and the strength by hand."""
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

    train, test = task(SIZE, EACH, lambda clean, seed: pictures.noisy(clean, SIGMA, seed + 10))
    count = len(train["noisy"])
    problem = imaging.tv_denoising(count)
    solve = restorer(problem)

    def total_variation(hparams):
        return lambda noisy: solve(hparams, noisy, noisy)

    chambolle = each_picture(lambda x, weight: denoise_tv_chambolle(x, weight=weight))
    means = each_picture(
        lambda x, h: denoise_nl_means(x, patch_size=5, patch_distance=8, h=h, sigma=SIGMA, fast_mode=False)
    )
    rows = [row("noisy", inside, train, test)]
    for name, arm, grid in (
        ("total variation, weight by hand", total_variation, tv_grid()),
        ("skimage tv_chambolle, tuned", chambolle, np.geomspace(0.02, 0.3, 12)),
        ("skimage nl_means, tuned", means, SIGMA * np.linspace(0.3, 1.2, 7)),
    ):
        best = best_of(grid, lambda weight, arm=arm: arm(weight)(train["noisy"]), train["clean"])
        rows.append(row(name, arm(best), train, test))
    tv, seconds = learn(problem, train["noisy"], train, START, STEPS["tv"])
    rows.append(row("total variation, MAID", total_variation(tv.hparams), train, test, seconds))
    problem = imaging.experts_denoising(count)
    solve_experts = restorer(problem)
    settings = {"certify": False, "barzilai_borwein": True, "non_monotone": 0.85}
    experts, seconds = learn(
        problem, tv.params, train, first_experts(tv.hparams), STEPS["experts"], **settings
    )
    rows.append(
        row("Field of Experts, MAID", lambda x: solve_experts(experts.hparams, x, x), train, test, seconds)
    )
    report(f"noise of {SIGMA}", rows)
    for name, result in (("total variation", tv), ("experts", experts)):
        value = result.history["value"]
        print(f"  {name}: {result.status.name}, loss {value[0]:.3f} -> {value[-1]:.3f} in {len(value)} steps")
    return tv, experts


def uneven_noise() -> None:
    """The second task."""
    at = np.linspace(-1, 1, UNEVEN_SIZE)
    sigma = 0.04 + 0.08 * np.add.outer(at**2, at**2)
    train, test = task(UNEVEN_SIZE, UNEVEN_EACH, lambda clean, seed: pictures.noisy(clean, sigma, seed + 20))
    problem = imaging.tv_denoising(len(train["noisy"]))
    solve = restorer(problem)
    rows = [row("noisy", inside, train, test)]
    number, seconds = learn(problem, train["noisy"], train, START, STEPS["tv"])
    rows.append(row("one strength", lambda x: solve(number.hparams, x, x), train, test, seconds))
    strength = jnp.full(sigma.shape, number.hparams["strength"])
    # The smoothing stays: its gradient is a thousand times that of a pixel's strength.
    fixed = {"strength": bilevel.positive(), "smoothing": bilevel.fixed()}
    each, seconds = learn(
        dataclasses.replace(problem, constraints=fixed), number.params, train,
        number.hparams | {"strength": strength}, STEPS["map"], step_size=100.0, certify=False,
    )  # fmt: skip
    rows.append(row("one for each pixel", lambda x: solve(each.hparams, x, x), train, test, seconds))
    report("noise from 0.04 to 0.2", rows)
    learned = np.asarray(inside(each.hparams["strength"]))
    noise = np.corrcoef(np.log(learned).ravel(), np.log(inside(sigma)).ravel())[0, 1]
    print(f"  correlation of the logarithms of learned strength and noise: {noise:.2f}\n", flush=True)


def deblurring() -> None:
    """The third task."""
    at = np.arange(-2, 3)
    kernel = np.exp(-np.add.outer(at**2, at**2) / 2)
    kernel /= kernel.sum()
    blur = jax.vmap(lambda x: imaging.blur(x, kernel))
    train, test = task(
        SIZE, EACH, lambda clean, seed: pictures.noisy(np.asarray(blur(clean)), 0.02, seed + 30)
    )
    problem = imaging.tv_deblurring(len(train["noisy"]), kernel, ridge=0.01)
    solve = restorer(problem)

    def padded(noisy):
        return jnp.pad(noisy, ((0, 0), (2, 2), (2, 2)), mode="edge")

    def restored(hparams):
        return lambda noisy: solve(hparams, noisy, padded(noisy))

    rows = [row("blurred and noisy", lambda noisy: inside(padded(noisy)), train, test)]
    grid = [{"strength": s, "smoothing": 0.01} for s in np.geomspace(1e-4, 1e-2, 9)]
    best = best_of(grid, lambda h: restored(h)(train["noisy"]), train["clean"])
    rows.append(row("total variation, weight by hand", restored(best), train, test))
    start = {"strength": 0.01, "smoothing": 0.05}
    result, seconds = learn(problem, padded(train["noisy"]), train, start, STEPS["blur"], certify=False)
    rows.append(row("total variation, MAID", restored(result.hparams), train, test, seconds))
    report("blur, and noise of 0.02", rows)


# --- The figure ------------------------------------------------------------------------------------


def draw(tv, experts, path: Path) -> None:
    """Two held-out pictures, the learned filters and the accuracies that MAID chose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10.2), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(1, 1, 0.95))
    one = {name: restorer(make(1)) for name, make in MODELS}
    clean = pictures.whole(SHOWN, SHOWN_SIZE)
    noisy = pictures.noisy(clean, SIGMA, 40)
    for i in range(len(SHOWN)):
        stack = jnp.asarray(noisy[i : i + 1])
        shown = {
            "noisy": inside(stack)[0],
            "total variation, learned": one["tv"](tv.hparams, stack, stack)[0],
            "Field of Experts, learned": one["experts"](experts.hparams, stack, stack)[0],
            "ground truth": inside(clean[i]),
        }
        for j, (name, picture) in enumerate(shown.items()):
            ax = figure.add_subplot(grid[i, j])
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            quality = "" if name == "ground truth" else f"\n{imaging.psnr(picture, inside(clean[i])):.2f} dB"
            ax.set_title(name + quality, fontsize=11)
    _draw_filters(figure.add_subplot(grid[2, :2]), experts.hparams)
    _draw_accuracies(figure.add_subplot(grid[2, 2:]), {"total variation": tv, "Field of Experts": experts})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


MODELS = (("tv", imaging.tv_denoising), ("experts", imaging.experts_denoising))


def _draw_filters(ax, hparams) -> None:
    filters, weight = np.asarray(hparams["filters"]), np.asarray(hparams["weight"])
    norms = np.linalg.norm(filters, axis=(1, 2))
    order = np.argsort(-weight * norms)
    columns = 8
    rows = -(-len(order) // columns)
    canvas = np.full((rows * (SIDE + 1) + 1, columns * (SIDE + 1) + 1), np.nan)
    for place, k in enumerate(order):
        i, j = (n * (SIDE + 1) + 1 for n in divmod(place, columns))
        canvas[i : i + SIDE, j : j + SIDE] = filters[k] / np.max(np.abs(filters[k]))
    ax.imshow(canvas, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"the {len(order)} learned filters, largest weight x norm first", fontsize=11)


def _draw_accuracies(ax, runs: dict) -> None:
    for (name, result), (colour, dash) in zip(
        runs.items(), (("#0072b2", "-"), ("#d55e00", "--")), strict=True
    ):
        accuracy = result.history["accuracy"]
        ax.plot(np.arange(1, len(accuracy) + 1), accuracy, dash, color=colour, linewidth=1.8, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("outer step")
    ax.set_ylabel("accuracy of the inner solutions")
    ax.set_title("accuracies chosen by MAID, from 0.1", fontsize=11)
    ax.grid(color="0.9")
    ax.legend(frameon=False)


def main() -> None:
    with jax.enable_x64(True):
        tv, experts = denoising()
        draw(tv, experts, FIGURE)
        print(f"  figure: {FIGURE}\n", flush=True)
        uneven_noise()
        deblurring()


if __name__ == "__main__":
    main()
