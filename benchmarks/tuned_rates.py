"""Learning rate and weight decay of AdamW by gradient, against a grid of 20 points.

A network of 64, 32 and 10 units on 100 digits with minibatches of 25; adamw from a fixed start; the outer
loss is the cross-entropy on 600 other digits after the last step. The grid, five learning rates from 1e-4 to
1 and four weight decays from 1e-3 to 1, takes the same number of inner steps from the same start on the same
batches. It runs as one program called 20 times and as one that is mapped over the points. Compilation is
timed apart. The gradient starts at values that are common defaults, not at a point of the grid that is good.

One hypergradient costs four to five runs of the inner loop, and a call of `optimize` some tenths of a second
whatever it runs: for two hyperparameters and runs of milliseconds a grid of 20 is hard to beat in time. Each
further hyperparameter multiplies the grid by four or five. From one start the gradient finds the optimum next
to it: with 400 digits the grid found a better one, at a rate of 0.1.

Without restart every outer step goes on where the last one ended, and the rate that is learned is the best
for a few steps of a trained network: the short-horizon bias (Wu, Ren, Liao and Grosse, 2018,
arXiv:1803.02021).
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import compiled, seconds, table, verdict

INNER_STEPS, OUTER_STEPS = 100, 8
SHORT, SHORT_OUTER_STEPS = 5, 1500
RATES, DECAYS = np.geomspace(1e-4, 1.0, 5), np.geomspace(1e-3, 1.0, 4)
START = {"lr": 1e-3, "decay": 1e-2}  # in the order of the arguments
REPEATS = 3

ADAMW = bilevel.tuned(lambda h: optax.adamw(h["lr"], weight_decay=h["decay"], eps_root=1e-8))
OUTER = optax.adam(0.5, b1=0.7)
WHOLE_RUNS = {
    name: bilevel.alternating(estimator, ADAMW, OUTER, inner_steps=INNER_STEPS, restart=True)
    for name, estimator in (("unrolled", bilevel.unrolled()), ("forward", bilevel.forward()))
}
MYOPIC = bilevel.alternating(bilevel.unrolled(), ADAMW, optax.adam(0.05), inner_steps=SHORT)


def cross_entropy(params, hparams, batch):
    hidden = jnp.tanh(batch[0] @ params["in"]["w"] + params["in"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


PROBLEM = bilevel.Problem(cross_entropy, cross_entropy, constraints=bilevel.positive())


@functools.cache
def arguments():
    """params, one stack of training batches for all runs, valid and test."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(digits.target.size)
    x, y = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])
    weights = {"in": rng.standard_normal((64, 32)) / 8, "out": rng.standard_normal((32, 10)) / 6}
    params = {k: {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(w.shape[1])} for k, w in weights.items()}
    rows = np.concatenate([rng.permutation(100) for _ in range(INNER_STEPS // 4)]).reshape(INNER_STEPS, 25)
    return params, (x[rows], y[rows]), (x[100:700], y[100:700]), (x[700:], y[700:])


def trained(rate, decay, params, batches):
    """Params after one run, by hand."""
    optimizer = optax.adamw(rate, weight_decay=decay, eps_root=1e-8)

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params, None, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]


def one_point(rate, decay, params, batches, valid, test):
    end = trained(rate, decay, params, batches)
    return cross_entropy(end, None, valid), cross_entropy(end, None, test)


def grid():
    """The grid as two programs: name -> (values of shape (20, 2), seconds, seconds to compile)."""
    params, batches, valid, test = arguments()
    points = jnp.asarray([(r, d) for r in RATES for d in DECAYS], jnp.float32)
    args = (params, batches, valid, test)
    single, compiling = compiled(one_point, *points[0], *args)
    mapped, compiling_mapped = compiled(
        jax.vmap(one_point, in_axes=(0, 0, None, None, None, None)), *points.T, *args
    )

    def in_turn():
        return [jax.block_until_ready(single(*point, *args)) for point in points]

    taken = {"called": [seconds(in_turn) for _ in range(REPEATS)]}
    taken["mapped"] = [seconds(mapped, *points.T, *args) for _ in range(REPEATS)]
    values, by_turns = np.stack(mapped(*points.T, *args), axis=1), np.asarray(in_turn())
    best = np.argmin(values[:, 0])  # runs that diverge agree in nothing
    np.testing.assert_allclose(values[best], by_turns[best], rtol=1e-2)
    return points, values, {
        "grid of 20, one after the other": (np.median(taken["called"]), compiling),
        "grid of 20, mapped": (np.median(taken["mapped"]), compiling_mapped),
    }  # fmt: skip


def tune(method, train, steps):
    """A run, and seconds: the median of runs after the first, and what the first took beyond it."""
    params, _, valid, test = arguments()
    taken = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        result = bilevel.optimize(
            PROBLEM, params, START, train, valid, method, steps, test=test, judge_every=steps, progress=False
        )
        taken.append(time.perf_counter() - began)
    again = float(np.median(taken[1:]))
    return result, again, taken[0] - again


def short_horizon(rate: float):
    """The rate that is learned without restart, beside the one of whole runs."""
    params, batches, valid, test = arguments()
    rows = tuple(b.reshape(-1, *b.shape[2:])[:100] for b in batches)
    result = bilevel.optimize(
        PROBLEM,
        params,
        START,
        bilevel.minibatches(rows, 25),
        valid,
        MYOPIC,
        SHORT_OUTER_STEPS,
        progress=False,
    )
    short = tuple(float(result.hparams[name]) for name in START)
    value, on_test = jax.jit(one_point)(*short, params, batches, valid, test)
    print(
        f"  without restart, {SHORT_OUTER_STEPS} outer steps of {SHORT} inner ones: rate {short[0]:.5f}, "
        f"decay {short[1]:.2f}; with it the rate is {rate / short[0]:.0f} times as large"
    )
    print(f"  {INNER_STEPS} steps at these from the start: valid {value:.4f}, test {on_test:.4f}")


def main():
    _, batches, _, _ = arguments()
    points, values, grids = grid()
    best = int(np.nanargmin(values[:, 0]))
    rows = [
        (name, f"{points[best][0]:.4f}", f"{points[best][1]:.4f}", f"{values[best, 0]:.4f}",
         f"{values[best, 1]:.4f}", f"{taken:.3f}", f"{compiling:.1f}")
        for name, (taken, compiling) in grids.items()
    ]  # fmt: skip
    base, found = grids["grid of 20, one after the other"][0], {}
    for name, method in WHOLE_RUNS.items():
        result, taken, compiling = tune(method, bilevel.stacked(batches), OUTER_STEPS)
        found[name] = result, taken
        lr, decay = (float(result.best.hparams[k]) for k in START)
        rows.append(
            (f"{name}, {OUTER_STEPS} outer steps", f"{lr:.4f}", f"{decay:.4f}", f"{result.best.value:.4f}",
             f"{result.test['best']['value']:.4f}", f"{taken:.3f}", f"{compiling:.1f}")
        )  # fmt: skip
    table(("", "rate", "decay", "valid", "test", "seconds", "compilation"), rows)
    for name, (result, taken) in found.items():
        loss = float(result.best.value) / values[best, 0]
        first = np.flatnonzero(result.history["value"] <= values[best, 0])
        reached = f"at outer step {first[0] + 1}" if first.size else "never"
        print(f"  {name}: validation loss {loss:.3f} of the grid's best", end=" ")
        print(f"(asked: below 1, {verdict(loss, 0.9999)}), reached {reached};")
        print(
            f"    time {taken / base:.2f} of the grid's (asked: below 1, {verdict(taken / base, 1.0)});",
            end=" ",
        )
        print(f"an outer step costs {20 * taken / base / OUTER_STEPS:.1f} points of the grid")
    print()
    short_horizon(float(found["unrolled"][0].best.hparams["lr"]))


if __name__ == "__main__":
    main()
