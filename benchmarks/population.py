"""A population of 64 in one program, against 64 runs one after the other.

The problem is the demo's: one weight per training digit and one L2 strength per class, 1,010 hyperparameters,
with the demo's method. Members differ in their starts. Both ways take the same outer steps from the same
starts; what they cost besides, a call of `bilevel.optimize` and its compilation, is timed by itself. The runs
one after the other share one compiled program; their time is 64 times the median of one.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import table, verdict
from bilevel import demo

MEMBERS, STEPS, REPEATS = 64, 20, 4
ASKED = 1 / 3


def starts(key):
    """A member's params and hparams."""
    weight, l2 = jax.random.split(key)
    hparams = {
        "weight": jnp.full(demo.TRAIN, 0.5) + 0.1 * jax.random.uniform(weight, (demo.TRAIN,), minval=-1.0),
        "l2": jnp.exp(jax.random.uniform(l2, (demo.CLASSES,), minval=-3.0, maxval=-2.0)),
    }
    return demo.first_params(), hparams


def timed(fn):
    began = time.perf_counter()
    result = fn()
    jax.block_until_ready(result.params)
    return result, time.perf_counter() - began


def main() -> None:
    data = demo.load_digits(seed=0)
    key = jax.random.key(0)
    population = bilevel.population(MEMBERS)
    keys = [jax.random.fold_in(key, i) for i in range(MEMBERS)]
    stacked = jax.jit(jax.vmap(starts))(population.keys(key))
    each = [jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), stacked) for i in range(MEMBERS)]

    def together(steps):
        return bilevel.optimize(
            demo.PROBLEM, *stacked, data.train, data.valid, demo.METHOD, steps, key,
            population=population, progress=False,
        )  # fmt: skip

    def alone(i, steps):
        return bilevel.optimize(
            demo.PROBLEM, *each[i], data.train, data.valid, demo.METHOD, steps, keys[i], progress=False
        )

    _, first_together = timed(lambda: together(1))
    _, first_alone = timed(lambda: alone(0, 1))
    singles, walls, worst = [], [], 0.0
    joint, _ = timed(lambda: together(STEPS))
    for i in range(MEMBERS):
        # In turns, so that whatever else the machine does meets both.
        if i % (MEMBERS // REPEATS) == 0:
            walls.append(timed(lambda: together(STEPS))[1])
        result, seconds = timed(lambda i=i: alone(i, STEPS))
        singles.append(seconds)
        difference = np.abs(joint.history["value"][:, i] / result.history["value"] - 1)
        worst = max(worst, float(difference.max()))
    single, wall = MEMBERS * float(np.median(singles)), float(np.median(walls))
    rows = [
        (f"{MEMBERS} runs of {STEPS} outer steps, one after the other", f"{single:.2f}"),
        (f"a population of {MEMBERS}, median of {REPEATS}", f"{wall:.2f}"),
        ("ratio", f"{wall / single:.3f} (asked: {ASKED:.3f}, {verdict(wall / single, ASKED)})"),
        ("first call with one step, compilation included: one run", f"{first_alone:.2f}"),
        ("... the population", f"{first_together:.2f}"),
    ]
    table(("", "seconds"), rows)
    print(f"  largest relative difference in the outer value: {worst:.1e}")


if __name__ == "__main__":
    main()
