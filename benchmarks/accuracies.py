"""Learning a Field of Experts at equal work: MAID, HOAG with three schedules, and three fixed accuracies.

Work is inner gradients plus products of the linear system, each over all pictures. All begin at the same
filters and accuracy 0.1, but for the fixed ones, which are MAID's line search without any change of
accuracy: they end where that fails first. A figure shows the outer loss against the work.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.curves import save
from benchmarks.measure import table
from benchmarks.problems import pictures
from bilevel import imaging

SIZE, SIGMA, FILTERS, SIDE = 32, 0.1, 16, 5
BUDGET, STEPS = 20_000, 3000
FIGURE = Path(__file__).parent / "results" / "accuracies.png"
MARGIN = 3


def batch(names, seed: int) -> dict:
    """One crop of each photograph, and noise."""
    clean = pictures.crops(names, SIZE, 1, seed)
    noisy = pictures.noisy(clean, SIGMA, seed + 10)
    return {
        "noisy": jnp.asarray(noisy),
        "clean": jnp.asarray(clean[:, MARGIN:-MARGIN, MARGIN:-MARGIN]),
    }


def arms() -> dict:
    """Methods by name."""
    maid = {"step_size": 0.05, "certify": False}
    fixed = {**maid, "accuracy_grow": 1.0, "max_rounds": 1}
    return {
        "MAID": bilevel.maid(accuracy=0.1, **maid),
        "MAID, non-monotone": bilevel.maid(accuracy=0.1, non_monotone=0.85, barzilai_borwein=True, **maid),
        **{f"HOAG, {name}": bilevel.hoag(name) for name in ("geometric", "quadratic", "cubic")},
        **{f"fixed, {eps:g}": bilevel.maid(accuracy=eps, **fixed) for eps in (1e-3, 1e-4, 1e-5)},
    }


def run(method, train, hparams):
    """A result that has done the work, or ended before."""
    problem = imaging.experts_denoising(len(train["noisy"]))
    done = [0.0]
    unit = SIZE * len(train["noisy"])

    def spent(step, rows):
        del step
        done[0] += float(np.sum(rows["inner_grad"] + rows["hvp"])) / unit
        return bilevel.STOP if done[0] >= BUDGET else None

    return bilevel.optimize(
        problem, train["noisy"], hparams, train, train, method, STEPS,
        judge_every=1, callbacks=spent, progress=False,
    ), unit  # fmt: skip


def main() -> None:
    with jax.enable_x64(True):
        study()


def study() -> None:
    train, test = batch(pictures.TRAINING, 0), batch(pictures.HELD_OUT, 1)
    hparams = imaging.first_experts(jax.random.key(0), FILTERS, SIDE)
    problem = imaging.experts_denoising(len(train["noisy"]))
    solver = bilevel.accelerated(20_000, 1e-5, problem.smoothness.strong_convexity, problem.smoothness.inner)
    restore = jax.jit(bilevel.argmin(problem, solver))
    rows, curves = [], {}
    for name, method in arms().items():
        result, unit = run(method, train, hparams)
        h = result.history
        work = np.cumsum(h["inner_grad"] + h["hvp"]) / unit
        curves[name] = work, np.minimum.accumulate(h["value"])
        end = restore(result.best.hparams, test, init=test["noisy"])[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        quality = float(jnp.mean(imaging.psnr(end, test["clean"])))
        rows.append(
            (
                name, f"{h['value'][0]:.4f}", f"{result.best.value:.4f}", f"{quality:.2f}", len(work),
                f"{work[-1]:.0f}", f"{h['accuracy'][-1]:.0e}", result.status.name, f"{result.seconds:.0f}",
            )
        )  # fmt: skip
        print(f"  {name}: {result.message[:100]}", flush=True)
    header = (
        "method", "first loss", "lowest loss", "PSNR, held out", "steps", "work", "last accuracy", "status",
        "seconds",
    )  # fmt: skip
    table(header, rows)
    draw(curves, FIGURE)
    print(f"  figure: {FIGURE}")


def draw(curves: dict, path: Path) -> None:
    """Lowest loss so far against the work."""

    def plot(ax):
        for name, (work, value) in curves.items():
            family = name.split(",")[0]
            dash = {"MAID": "-", "HOAG": "--", "fixed": ":"}[family]
            ax.plot(work, value, dash, linewidth=2.4 if family == "MAID" else 1.6, label=name)
        ax.set_xscale("log")

    title, work = "learning a Field of Experts at equal work", "inner gradients and products with the Hessian"
    save(path, title, work, "lowest outer loss so far", plot)


if __name__ == "__main__":
    main()
