"""Time of an estimate and of an outer step with 10 to 1,000,000 hyperparameters.

The model does not change: logistic regression with 16 features on 1,000,000 training examples, each with a
weight between 0 and 1. What changes is how many examples share a weight: examples come in ``count`` groups of
equal size, and weights are repeated by a broadcast and a reshape for every count, one million included. The
losses are linear in the weights, so that they take the same operations whatever the count.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import compiled, interleaved, seconds, table, verdict

ASKED = 1.5
EXAMPLES, FEATURES, CG_STEPS, INNER_STEPS, OUTER_STEPS = 1_000_000, 16, 5, 5, 5
COUNTS = (10, 1_000, 100_000, 1_000_000)
REPEATS = 7


def log_loss(w, batch):
    return jax.nn.softplus(-batch["y"] * (batch["x"] @ w))


def inner(w, weights, batch):
    size = batch["y"].size
    repeated = jnp.broadcast_to(weights[:, None], (weights.size, size // weights.size)).reshape(size)
    return jnp.mean(repeated * log_loss(w, batch)) + 0.5e-2 * jnp.vdot(w, w)


def outer(w, weights, batch):
    del weights
    return jnp.mean(log_loss(w, batch))


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.interval(0, 1))
IMPLICIT = bilevel.implicit(bilevel.cg(max_steps=CG_STEPS, tol=0.0))


@functools.cache
def data():
    """Training and validation examples; the labels of the first quarter are noise."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(FEATURES)
    x = rng.standard_normal((EXAMPLES + 10_000, FEATURES), dtype=np.float32)
    y = np.sign(x @ w).astype(np.float32)
    y[: EXAMPLES // 4] = rng.choice([-1, 1], EXAMPLES // 4)
    train = {"x": x[:EXAMPLES], "y": y[:EXAMPLES]}
    return jax.tree.map(jnp.asarray, (train, {"x": x[EXAMPLES:], "y": y[EXAMPLES:]}))


def estimate(estimator, count: int):
    """A compiled estimate as a function without arguments, and the seconds of compilation."""
    fn = bilevel.hypergradient(PROBLEM, estimator)
    args = (jnp.zeros(FEATURES), jnp.full(count, 0.5), *data())
    program, compiling = compiled(fn, *args)
    return lambda: program(*args), compiling


def outer_step(estimator, count: int):
    """A compiled outer step of `alternating` that goes on where the last left off, likewise."""
    method = bilevel.alternating(estimator, optax.sgd(1.0), optax.adam(0.05), inner_steps=INNER_STEPS)
    train, valid = data()
    args = (jnp.zeros(FEATURES), jnp.full(count, 0.5), train, valid)
    state = method.init(PROBLEM, *args, key=jax.random.key(0))
    program, compiling = compiled(
        lambda state, *data: method.step(PROBLEM, state, *data), state, train, valid
    )

    def call():
        nonlocal state
        state, info = program(state, train, valid)
        return state, info

    return call, compiling


def run(estimator, count: int):
    """A whole `optimize`, checks, recording of the trajectory and result included."""
    method = bilevel.alternating(estimator, optax.sgd(1.0), optax.adam(0.05), inner_steps=INNER_STEPS)
    args = (jnp.zeros(FEATURES), jnp.full(count, 0.5), *data())

    def call():
        result = bilevel.optimize(PROBLEM, *args, method, steps=OUTER_STEPS, progress=False)
        return result.params, result.hparams

    first, second = seconds(call), seconds(call)
    return call, first - second


CASES = {
    "implicit, estimate": (estimate, IMPLICIT),
    "implicit, outer step": (outer_step, IMPLICIT),
    "one_step, estimate": (estimate, bilevel.one_step(optax.sgd(1.0))),
    "one_step, outer step": (outer_step, bilevel.one_step()),
    f"one_step, optimize(steps={OUTER_STEPS})": (run, bilevel.one_step()),
}


def measure(name: str) -> list[tuple]:
    """Rows of the table: one for each count, measured in turn with a call at the smallest count."""
    make, estimator = CASES[name]
    base, compiling = make(estimator, COUNTS[0])
    rows = [(name, f"{COUNTS[0]:,}", "", f"{compiling:.1f}", "", "", "")]
    alone = []
    for count in COUNTS[1:]:
        call, compiling = make(estimator, count)
        times = interleaved({"base": base, "count": call}, REPEATS)
        ratios = times["count"] / times["base"]
        low, slower, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        alone.extend(times["base"])
        rows.append(
            ("", f"{count:,}", f"{np.median(times['count']):.3f}", f"{compiling:.1f}", f"{slower:.2f}",
             f"{low:.2f} to {high:.2f}", verdict(slower, ASKED))
        )  # fmt: skip
    rows[0] = (name, f"{COUNTS[0]:,}", f"{np.median(alone):.3f}", rows[0][3], "1.00", "", "")
    return rows


def main():
    print(f"  {EXAMPLES:,} examples, {FEATURES} features; implicit: {CG_STEPS} CG steps; an outer step:")
    print(f"  {INNER_STEPS} gradient steps, an estimate, Adam; asked of the ratio: at most {ASKED}")
    rows = [row for name in CASES for row in measure(name)]
    table(("", "hyperparameters", "seconds", "compile", "ratio to 10", "quartiles", ""), rows)


if __name__ == "__main__":
    main()
