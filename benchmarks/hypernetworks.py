"""Hypernetworks with and without the magnitude-invariant parametrisation, on images of digits.

A hypernetwork puts out a classifier of 64-32-10 units for a strength of weight decay, given as a number
between 0 and 1 (1e-5 to 1e-1 on a logarithmic scale); it trains on the loss of random strengths. The claim of
Gonzalez Ortiz et al. (2024, arXiv:2304.07645) is that the input encoding and the residual form make training
faster and steadier, with SGD and with Adam. Each optimiser gets the learning rate, of five, with the lowest
loss in the end for each parametrisation by itself, in the median over seeds; then ten seeds are compared. The
loss is that of training, penalty included, of which the claim speaks.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import curves
from benchmarks.measure import table
from bilevel import nn

OUT = Path(__file__).parent / "results" / "hypernetworks"
SEEDS, STEPS, EVERY, BATCH, STRENGTHS = 10, 1000, 50, 50, 4
FORMS = {"with": {}, "without": {"encoding": False, "residual": False}}
OPTIMIZERS = {
    "SGD": (lambda rate: optax.sgd(rate, momentum=0.9), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "Adam": (optax.adam, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
}


@functools.cache
def digits():
    """Training rows."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return images[:800], labels[:800]


def start(key):
    """A network with He's initial weights."""
    one, two = jax.random.split(key)
    return {
        "hidden": jax.random.normal(one, (64, 32)) * np.float32(np.sqrt(2 / 64)),
        "bias": jnp.zeros(32),
        "out": jax.random.normal(two, (32, 10)) * np.float32(np.sqrt(2 / 32)),
        "shift": jnp.zeros(10),
    }


def cross_entropy(params, rows):
    x = jax.nn.relu(rows[0] @ params["hidden"] + params["bias"])
    logits = x @ params["out"] + params["shift"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[1]))


def loss(network, params, g, rows):
    made = network(params, g[None])
    decay = 10.0 ** (4 * g - 5)
    return cross_entropy(made, rows) + decay * sum(jnp.sum(x**2) for x in jax.tree.leaves(made))


@functools.partial(jax.jit, static_argnames=("optimizer", "form"))
def curve(optimizer: str, form: str, rate, keys):
    """Training loss over all rows, a mean over eleven strengths, every so many steps; (seeds, points)."""
    train = digits()
    network = nn.hypernetwork(jax.eval_shape(start, keys[0]), 1, hidden=(16, 64), **FORMS[form])
    update = OPTIMIZERS[optimizer][0](rate)

    def run(key):
        key_start, key_network, key_data = jax.random.split(key, 3)
        params = network.init(key_network, start(key_start))

        def step(at, t):
            params, state = at
            key_rows, key_g = jax.random.split(jax.random.fold_in(key_data, t))
            index = jax.random.randint(key_rows, (BATCH,), 0, 800)
            rows = jax.tree.map(lambda x: jnp.asarray(x)[index], train)
            g = jax.random.uniform(key_g, (STRENGTHS,))
            grads = jax.grad(lambda p: jnp.mean(jax.vmap(lambda g: loss(network, p, g, rows))(g)))(params)
            updates, state = update.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def point(at, k):
            at, _ = jax.lax.scan(step, at, k * EVERY + jnp.arange(EVERY))
            judged = jax.vmap(lambda g: loss(network, at[0], g, train))
            return at, jnp.mean(judged(jnp.linspace(0, 1, 11)))

        return jax.lax.scan(point, (params, update.init(params)), jnp.arange(STEPS // EVERY))[1]

    return jax.vmap(run)(keys)


def finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)


def main() -> None:
    found: dict[tuple[str, str], tuple[float, np.ndarray]] = {}
    for optimizer, (_, rates) in OPTIMIZERS.items():
        for form in FORMS:
            tried = {}
            for rate in rates:
                keys = jax.random.split(jax.random.key(1), 3)
                tried[rate] = np.median(finite(np.asarray(curve(optimizer, form, rate, keys)))[:, -1])
            best = min(tried, key=lambda rate: tried[rate])
            keys = jax.random.split(jax.random.key(0), SEEDS)
            found[optimizer, form] = best, finite(np.asarray(curve(optimizer, form, best, keys)))
    rows = []
    for (optimizer, form), (rate, values) in found.items():
        target = 1.1 * np.median(found[optimizer, "without"][1][:, -1])
        reached = np.median([_first(value, target) for value in values])
        early, end = values[:, STEPS // EVERY // 5 - 1], values[:, -1]
        rows.append(
            (
                optimizer, form, f"{rate:g}", f"{np.median(early):.3f}", f"{np.median(end):.3f}",
                f"{end.min():.3f} to {end.max():.3f}", f"{np.std(end):.3f}", f"{reached:.0f}",
            )
        )  # fmt: skip
    header = "optimiser", "parametrisation", "rate", f"after {STEPS // 5} steps", "in the end", "range"
    table((*header, "spread", "steps to 1.1 x the end of without"), rows)

    def plot(ax):
        steps = EVERY * np.arange(1, STEPS // EVERY + 1)
        for i, ((optimizer, form), (_, values)) in enumerate(found.items()):
            low, middle, high = np.quantile(values, (0.0, 0.5, 1.0), axis=0)
            ax.fill_between(steps, low, high, color=f"C{i}", alpha=0.2)
            ax.plot(steps, middle, color=f"C{i}", label=f"{optimizer}, {form}")
        ax.set_yscale("log")

    path = OUT / "hypernetworks.png"
    title = "hypernetworks for digits: median and range of ten seeds"
    curves.save(path, title, "steps", "training loss", plot)
    print(f"  figure: {path}")


def _first(values: np.ndarray, target: float) -> float:
    below = np.flatnonzero(values <= target)
    return EVERY * (below[0] + 1) if below.size else np.inf
