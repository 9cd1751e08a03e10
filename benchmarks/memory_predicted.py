"""Memory as `bilevel.memory` predicts it, against what a run takes: 10^6 hyperparameters, 10^7 parameters.

The diagonal model of `benchmarks.memory` with a weight decay for each ten parameters. The prediction is made
from shapes, before anything is computed; the measure is the peak of resident memory of a process that runs,
less that of the same process with few parameters (Linux only). Asked: within 20 %.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import bilevel
from benchmarks.measure import table, verdict
from benchmarks.memory import METHOD, SIZE, arguments, resident, valid_loss

SHARE, SMALL = 10, 100
LOW = optax.sgd(0.1)
METHODS = {
    "cg, Adam": METHOD,
    "unrolled": bilevel.alternating(bilevel.unrolled(), LOW, optax.adam(0.1), inner_steps=9),
    "default": None,
}
STEPS, TOLERANCE = 3, 0.2


def train_loss(w, hparams, batch):
    decay = jnp.mean(hparams["l2"][:, None] * w.reshape(-1, SHARE) ** 2)
    return 0.5 * jnp.mean(batch["c"] * (w - batch["a"]) ** 2) + 0.5 * decay


PROBLEM = bilevel.Problem(train_loss, valid_loss, constraints={"l2": bilevel.positive()})


def run(name: str, size: int) -> float:
    """A run of a few outer steps; its last outer value."""
    params, _, train, valid = arguments(size)
    hparams = {"l2": jnp.full(size // SHARE, 1.0)}
    result = bilevel.optimize(PROBLEM, params, hparams, train, valid, METHODS[name], STEPS, progress=False)
    return float(result.history["value"][STEPS - 1])


def predicted(name: str, size: int) -> bilevel.Memory:
    params, _, train, valid = jax.eval_shape(lambda: arguments(size))
    hparams = {"l2": jax.ShapeDtypeStruct((size // SHARE,), jnp.float32)}
    return bilevel.memory(PROBLEM, METHODS[name], params, hparams, train, valid)


def main():
    rows = []
    for name in METHODS:
        told = predicted(name, SIZE)
        measured = resident(__name__, name, SIZE)[1] - resident(__name__, name, SMALL)[1]
        off = abs(told.total / measured - 1)
        rows.append(
            (name, f"{told.total / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{told.total / measured:.2f}",
             verdict(off, TOLERANCE), repr(told))
        )  # fmt: skip
    print(f"  {SIZE:,} parameters, {SIZE // SHARE:,} hyperparameters, float32; in MB")
    table(("", "predicted", "measured", "ratio", "", "in words"), rows)


if __name__ == "__main__":
    main()
