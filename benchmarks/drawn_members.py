"""Some pictures a step against all of them: learning a Field of Experts by ISGD, and by MAID.

Crops of the two photographs of scikit-learn with noise of 0.1 are the members of `bilevel.lift`; eight
filters of 3 x 3, their weights and smoothings and a strength of all are learned. The claim is that of Salehi
et al. (2024, arXiv:2412.12049): drawn members with rising accuracy are sooner good than all of them at each
step. Work is inner and outer gradients, products with the Hessian and cross products, the last two counted
twice, in passes over all pictures.

Everyone gets the same start and the same budget. ISGD gets the same four outer rates, which fall like
1 / sqrt(steps); the one with the lowest loss at the end is taken, on the first seed, whose pictures are not
used again. MAID finds its step sizes itself. The loss is the outer one of all pictures, restored accurately.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.claims import Check
from benchmarks.measure import table
from benchmarks.stochastic_methods import SHARES, show, walk
from benchmarks.text import work
from bilevel import imaging
from bilevel.lift import examples

PICTURES, DRAWN, SIZE, SIGMA, FILTERS, SIDE, MARGIN = 32, 4, 14, 0.1, 8, 3, 1
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TUNED_ON, SEEDS = 0, (1, 2, 3)
BUDGET = 3000.0  # passes
RATES = (0.03, 0.1, 0.3, 1.0)
FIRST_STEP = 0.05  # of MAID
ROUGH, FINE = 0.1, 1e-3  # accuracies


def isgd(batch_size: int, accuracy: float = ROUGH, decay: float = 0.5) -> Callable:
    return lambda rate: bilevel.isgd(
        optax.sgd(lambda t: rate / jnp.sqrt(1.0 + t)), batch_size, accuracy, decay
    )


def maid(rate):
    """Whose first step size is no array."""
    del rate
    return bilevel.maid(accuracy=ROUGH, step_size=FIRST_STEP, certify=False)


# Methods by name, of an outer rate.
ARMS = {
    "drawn, rising": isgd(DRAWN),
    "all, rising": isgd(PICTURES),
    "drawn, rough": isgd(DRAWN, ROUGH, 0.0),
    "drawn, fine": isgd(DRAWN, FINE, 0.0),
    "all, fine": isgd(PICTURES, FINE, 0.0),
    "all, MAID": maid,
}


# --- The task ---------------------------------------------------------------------------------------------


PROBLEM = imaging.experts_denoising(PICTURES)


@functools.lru_cache
def photographs() -> tuple[np.ndarray, ...]:
    """Grey, in [0, 1], means of 2 x 2 pixels."""
    from sklearn.datasets import load_sample_image

    made = []
    for name in PHOTOGRAPHS:
        grey = load_sample_image(name).mean(axis=2) / 255
        height, width = (n // 2 * 2 for n in grey.shape)
        made.append(grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)))
    return tuple(made)


@functools.lru_cache
def instance(seed: int):
    """First hyperparameters, and the pictures; the seed draws everything."""
    rng, crops = np.random.default_rng(seed), []
    for picture in itertools.islice(itertools.cycle(photographs()), PICTURES):
        top, left = (rng.integers(0, n - SIZE + 1) for n in picture.shape)
        crops.append(picture[top : top + SIZE, left : left + SIZE])
    clean = np.stack(crops)
    noisy = clean + SIGMA * rng.standard_normal(clean.shape)
    data = {"noisy": jnp.asarray(noisy), "clean": jnp.asarray(clean[:, MARGIN:-MARGIN, MARGIN:-MARGIN])}
    return imaging.first_experts(jax.random.key(seed), FILTERS, SIDE), data


# --- Runs -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(make: Callable, budget: float, rate, hparams, data, key):
    """Hyperparameters at the shares of the budget, steps, and those rejected."""
    method, passes = make(rate), examples(PROBLEM, data["noisy"])
    state = method.init(PROBLEM, data["noisy"], hparams, data, data, key=key)

    def step(state):
        state, info = method.step(PROBLEM, state, data, data)
        return state, work(info.counts) / passes, info.accepted

    return walk(step, state, 0.0, budget)


@jax.jit
def losses(hparams, data):
    """Outer losses of stacked hyperparameters, pictures restored to 1e-4."""
    known = PROBLEM.smoothness
    solver = bilevel.accelerated(20_000, 1e-4, known.strong_convexity, known.inner)
    restore = bilevel.argmin(PROBLEM, solver)

    def loss(hparams):
        return PROBLEM.outer(restore(hparams, data, init=data["noisy"]), hparams, data)

    return jax.lax.map(loss, hparams)


class Found(NamedTuple):
    """The rate chosen; losses, (seeds, shares); outer steps, the mean; those rejected."""

    rate: float
    loss: np.ndarray
    steps: int
    rejected: int


def study(name: str, seeds: Sequence[int] = SEEDS, budget: float = BUDGET) -> Found:
    """All rates on the first seed, and the one chosen on the others."""

    def found(rate: float, seed: int):
        hparams, data = instance(seed)
        end = run(ARMS[name], budget, jnp.asarray(rate), hparams, data, jax.random.key(seed))
        loss = np.asarray(losses(end.hparams, data))
        return np.where(np.isfinite(loss), loss, np.inf), int(end.steps), int(end.rejected)

    rates = (FIRST_STEP,) if ARMS[name] is maid else RATES
    rate = min(rates, key=lambda rate: found(rate, TUNED_ON)[0][-1])
    loss, steps, rejected = zip(*(found(rate, seed) for seed in seeds), strict=True)
    return Found(rate, np.stack(loss), round(np.mean(steps)), sum(rejected))


def checks(all_found: Mapping[str, Found]) -> list[Check]:
    """What the paper claims, and the same against accuracies that stay."""
    loss = {name: [float(f"{x:.4g}") for x in found.loss.mean(axis=0)] for name, found in all_found.items()}
    mine = loss["drawn, rising"]
    against = ("all, rising", "all, MAID", "drawn, rough", "drawn, fine")
    return [
        Check(f"against {other}, {words} the budget", mine[i], f"< {loss[other][i]}")
        for other in against
        for i, words in ((0, "a quarter of"), (2, "all"))
    ]


def main() -> None:
    with jax.enable_x64(True):
        starting = [float(losses(jax.tree.map(lambda x: x[None], h), d)[0]) for h, d in map(instance, SEEDS)]
        print(f"  {PICTURES} pictures, {BUDGET:g} passes; loss of the start: {np.mean(starting):.4f}")
        all_found = {name: study(name) for name in ARMS}
    rows = [
        (
            name, f"{found.rate:g}", found.steps, *(f"{x:.4f}" for x in found.loss.mean(axis=0)),
            f"{found.loss[:, -1].min():.4f} to {found.loss[:, -1].max():.4f}", found.rejected,
        )
        for name, found in all_found.items()
    ]  # fmt: skip
    shares = (f"after {share:g}" for share in SHARES)
    table(("method", "rate", "steps", *shares, "seeds", "rejected"), rows)
    show(checks(all_found))


if __name__ == "__main__":
    main()
