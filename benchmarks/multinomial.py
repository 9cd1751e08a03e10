"""Multinomial logistic regression on real digits with one L2 strength for each of its 1,440 weights.

The digits of scikit-learn, 8 x 8 pixels, are resized to 12 x 12, the size that the paper of MAID takes for
another set. inner is the mean cross entropy plus ``1/2 sum_j exp(t_j) w_j^2`` with a t_j for each entry of w,
outer the mean cross entropy of validation rows. The t_j stay between -10 and 4: weights that help on the
validation rows would like none, and the optimum would lie at infinity. MAID, HOAG and a grid of one strength
for all, by the loss and the accuracy on test rows; so many hyperparameters can overfit 400 validation rows,
which the table shows. Inner problems are solved by L-BFGS, systems by CG.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import table

SIDE, CLASSES, TRAIN, VALID = 12, 10, 1000, 400
STEPS = 40


def digits(seed: int = 0):
    """Three parts, each features (rows, 144) and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = np.asarray(jax.image.resize(x.reshape(-1, 8, 8) / 16, (len(x), SIDE, SIDE), "bilinear"))
    order = np.random.default_rng(seed).permutation(len(x))
    cuts = np.split(order, (TRAIN, TRAIN + VALID))
    return [(jnp.asarray(x[rows].reshape(len(rows), -1)), jnp.asarray(y[rows])) for rows in cuts]


def cross_entropy(w, hparams, batch):
    scores = batch[0] @ w
    chosen = jnp.take_along_axis(scores, batch[1][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - chosen)


def inner(w, t, batch):
    return cross_entropy(w, t, batch) + 0.5 * jnp.sum(jnp.exp(t) * w**2)


def correct(w, batch) -> float:
    return float(jnp.mean(jnp.argmax(batch[0] @ w, axis=1) == batch[1]))


def main() -> None:
    with jax.enable_x64(True):
        study()


def study() -> None:
    train, valid, test = digits()
    smoothness = bilevel.logistic_smoothness(train[0], valid[0], jnp.exp, CLASSES)
    problem = bilevel.Problem(
        inner, cross_entropy, constraints=bilevel.interval(-10, 4), smoothness=smoothness
    )
    shape = (SIDE * SIDE, CLASSES)
    solve = jax.jit(bilevel.argmin(problem, bilevel.lbfgs(2000, atol=1e-7)))
    parts = {"inner": bilevel.lbfgs(500), "estimator": bilevel.implicit(bilevel.cg(max_steps=300))}

    def line(name, w, t, steps="", seconds=""):
        losses = (f"{float(cross_entropy(w, t, part)):.4f}" for part in (valid, test))
        return name, *losses, f"{correct(w, valid):.3f}", f"{correct(w, test):.3f}", steps, seconds

    began = time.perf_counter()
    grid = [np.full(shape, t) for t in np.linspace(-9, -2, 15)]
    fitted = [solve(t, train, init=jnp.zeros(shape)) for t in grid]
    best = int(np.argmin([cross_entropy(w, t, valid) for w, t in zip(fitted, grid, strict=True)]))
    strength = f"one strength, exp({grid[best][0, 0]:g}), of a grid of {len(grid)}"
    rows = [line(strength, fitted[best], grid[best], "", f"{time.perf_counter() - began:.0f}")]
    start = np.zeros(shape), np.full(shape, -3.0)
    rows.insert(0, line("exp(-3) for all", solve(start[1], train, init=start[0]), start[1]))
    for name, method in (
        ("MAID", bilevel.maid(step_size=300.0, certify=False, **parts)),
        ("MAID, non-monotone", bilevel.maid(
            step_size=300.0, certify=False, non_monotone=0.85, barzilai_borwein=True, **parts)),
        ("HOAG, quadratic", bilevel.hoag("quadratic", **parts)),
    ):  # fmt: skip
        run = bilevel.optimize(problem, *start, train, valid, method, STEPS, test=test, progress=False)
        work = (run.history["inner_grad"] + run.history["hvp"]).sum() / TRAIN
        steps = f"{len(run.history['value'])} ({work:.0f})"
        rows.append(line(name, run.best.params, run.best.hparams, steps, f"{run.seconds:.0f}"))
        print(f"  {name}: {run.message}", flush=True)
    header = (
        f"{np.prod(shape)} weights", "valid loss", "test loss", "valid accuracy", "test accuracy",
        "steps (work)", "seconds",
    )  # fmt: skip
    table(header, rows)


if __name__ == "__main__":
    main()
