"""MAID from starting accuracies over six orders of magnitude and step sizes over four: where it ends.

Two problems: the scalar ridge regression of the certificates' page, whose optimum is known in closed form,
and total-variation denoising with two parameters on crops of real photographs, where the runs are compared
with one another. Each run ends where the norm of the hypergradient, plus the bound on its error, is below the
tolerance.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import table, verdict
from benchmarks.problems import pictures
from bilevel import imaging
from bilevel.lift import examples

ACCURACIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
STEP_SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ASKED = 1e-5
# Of the ridge problem, by bisection on the closed form of the hypergradient.
RIDGE_OPTIMUM = -3.6631908703
SIZE, SIGMA = 20, 0.1


def ridge():
    """Problem, params, hparams, train, valid and tol."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal(20) * (np.arange(20) < 4)
    a = rng.standard_normal((40, 20))
    b = a @ w + 0.5 * rng.standard_normal(40)
    v = rng.standard_normal((200, 20))
    c = v @ w + 0.5 * rng.standard_normal(200)

    def squares(w, data):
        return 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2)

    problem = bilevel.Problem(
        lambda w, t, data: squares(w, data) + 0.5 * jnp.exp(t) * jnp.sum(w**2),
        lambda w, t, data: squares(w, data),
        smoothness=bilevel.ridge_smoothness(a, v, jnp.exp),
    )
    return problem, np.zeros(20), np.array(0.0), (a, b), (v, c), 1e-6


def denoising():
    """The same of total variation, one crop of each of five photographs."""
    clean = pictures.crops(pictures.TRAINING, SIZE, 1, 0)
    data = {"noisy": jnp.asarray(pictures.noisy(clean, SIGMA, 10)), "clean": jnp.asarray(clean)}
    hparams = {"strength": np.array(0.05), "smoothing": np.array(0.05)}
    return imaging.tv_denoising(len(clean)), data["noisy"], hparams, data, data, 2e-8


def runs(problem, params, hparams, train, valid, tol, **settings):
    """``(accuracy, step size, result, seconds)`` of each run."""
    pairs = [(a, 1.0) for a in ACCURACIES] + [(0.1, s) for s in STEP_SIZES if s != 1.0]
    for accuracy, step_size in pairs:
        method = bilevel.maid(accuracy=accuracy, step_size=step_size, descent=1e-4, armijo=1e-8, **settings)
        began = time.perf_counter()
        result = bilevel.optimize(
            problem, params, hparams, train, valid, method, 400, tol=tol, judge_every=1, progress=False
        )
        yield accuracy, step_size, result, time.perf_counter() - began


def free(hparams) -> np.ndarray:
    """Logarithms where hyperparameters are positive."""
    if isinstance(hparams, dict):
        return np.log([float(hparams[name]) for name in sorted(hparams)])
    return np.atleast_1d(np.asarray(hparams))


def study(title: str, task, optimum=None, **settings) -> None:
    """A table; ends are compared with the optimum, or with the mean end."""
    found = list(runs(*task, **settings))
    ends = np.stack([free(result.hparams) for *_, result, _ in found])
    centre = ends.mean(axis=0) if optimum is None else optimum
    rows = []
    for (accuracy, step_size, result, seconds), end in zip(found, ends, strict=True):
        gradients = result.history["inner_grad"].sum() / examples(task[0], task[3])
        rows.append(
            (
                f"{accuracy:g}", f"{step_size:g}", result.status.name, len(result.history["value"]),
                f"{gradients:.0f}", f"{result.history['accuracy'][-1]:.0e}",
                f"{result.history['value'][-1]:.9f}", f"{np.max(np.abs(end - centre)):.1e}", f"{seconds:.1f}",
            )
        )  # fmt: skip
    header = (
        "first accuracy", "first step", "status", "steps", "inner gradients", "last accuracy", "outer",
        "distance", "seconds",
    )  # fmt: skip
    print(f"  {title}")
    table(header, rows)
    spread = float(np.max(np.abs(ends - centre)))
    print(f"  farthest end: {spread:.1e} (asked: {ASKED:.0e}, {verdict(spread, ASKED)})\n", flush=True)


def main() -> None:
    with jax.enable_x64(True):
        study("ridge, log L2: distance from the known optimum", ridge(), RIDGE_OPTIMUM)
        study(
            "total variation, logarithms of both parameters: distance from the mean end",
            denoising(),
            barzilai_borwein=True,
            non_monotone=0.85,
        )


if __name__ == "__main__":
    main()
