"""Learning rate and weight decay of AdamW by gradient, against a grid of 20 points, on five splits.

A network of 64, 512 and 10 units on 400 digits with minibatches of 200; adamw for 100 steps from a fixed
start; the outer loss is the cross-entropy on 600 other digits after the last step. The grid, five learning
rates from 1e-4 to 1 and four weight decays from 1e-3 to 1, takes the same number of inner steps from the same
start on the same batches, one point after the other in one compiled program. The gradient starts in the
middle of the grid's box and takes four outer steps by forward mode. Compilation is timed apart.

One hypergradient of two hyperparameters costs between three and four runs of the inner loop: a grid of 20 is
beaten in time only by few and bold steps, each of about a factor e, and by runs long enough that the tenths
of a second a call of `optimize` takes do not count. Each further hyperparameter multiplies the grid by four
or five. A gradient finds the optimum next to its start, and a grid one anywhere: on some splits there is a
better one at a rate of 0.1, outside the reach of four steps.

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

HIDDEN, ROWS, BATCH = 512, 400, 200
INNER_STEPS, OUTER_STEPS = 100, 4
SHORT, SHORT_OUTER_STEPS = 5, 1500
RATES, DECAYS = np.geomspace(1e-4, 1.0, 5), np.geomspace(1e-3, 1.0, 4)
START = {"lr": 1e-2, "decay": 10**-1.5}  # the middle of the box; in the order of the arguments
SPLITS, REPEATS = 5, 3

ADAMW = bilevel.tuned(lambda h: optax.adamw(h["lr"], weight_decay=h["decay"], eps_root=1e-8))
WHOLE_RUNS = bilevel.alternating(
    bilevel.forward(), ADAMW, optax.adam(1.0, b1=0.5, b2=0.9), inner_steps=INNER_STEPS, restart=True
)
MYOPIC = bilevel.alternating(bilevel.unrolled(), ADAMW, optax.adam(0.05), inner_steps=SHORT)


def cross_entropy(params, hparams, batch):
    hidden = jnp.tanh(batch[0] @ params["in"]["w"] + params["in"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


PROBLEM = bilevel.Problem(cross_entropy, cross_entropy, constraints=bilevel.positive())


@functools.cache
def arguments(split: int):
    """params, one stack of training batches for all runs, valid and test."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(split)
    order = rng.permutation(digits.target.size)
    x, y = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])
    weights = {
        "in": rng.standard_normal((64, HIDDEN)) / 8,
        "out": rng.standard_normal((HIDDEN, 10)) / HIDDEN**0.5,
    }
    params = {k: {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(w.shape[1])} for k, w in weights.items()}
    passes = [rng.permutation(ROWS) for _ in range(INNER_STEPS * BATCH // ROWS)]
    rows = np.concatenate(passes).reshape(INNER_STEPS, BATCH)
    valid, test = slice(ROWS, ROWS + 600), slice(ROWS + 600, None)
    return params, (x[rows], y[rows]), (x[valid], y[valid]), (x[test], y[test])


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


def grid(split: int, program):
    """Values of the grid, shape (20, 2), and the seconds that they take."""
    args = arguments(split)
    points = [(float(rate), float(decay)) for rate in RATES for decay in DECAYS]

    def in_turn():
        return [jax.block_until_ready(program(*point, *args)) for point in points]

    values = np.asarray(in_turn())
    return values, float(np.median([seconds(in_turn) for _ in range(REPEATS)]))


def tune(split: int):
    """A run, and seconds: the median of runs after the first, and what the first took beyond it."""
    params, batches, valid, test = arguments(split)
    train, taken = bilevel.stacked(batches), []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        result = bilevel.optimize(
            PROBLEM,
            params,
            START,
            train,
            valid,
            WHOLE_RUNS,
            OUTER_STEPS,
            test=test,
            judge_every=OUTER_STEPS,
            progress=False,
        )
        taken.append(time.perf_counter() - began)
    again = float(np.median(taken[1:]))
    return result, again, taken[0] - again


def short_horizon(rate: float):
    """The rate that is learned without restart, beside the one of whole runs."""
    params, batches, valid, test = arguments(0)
    rows = tuple(b.reshape(-1, *b.shape[2:])[:ROWS] for b in batches)
    train = bilevel.minibatches(rows, BATCH)
    result = bilevel.optimize(PROBLEM, params, START, train, valid, MYOPIC, SHORT_OUTER_STEPS, progress=False)
    short = tuple(float(result.hparams[name]) for name in START)
    value, on_test = jax.jit(one_point)(*short, params, batches, valid, test)
    print(
        f"  without restart, {SHORT_OUTER_STEPS} outer steps of {SHORT} inner ones: rate {short[0]:.5f}, "
        f"decay {short[1]:.2f}; with it the rate is {rate / short[0]:.0f} times as large"
    )
    print(f"  {INNER_STEPS} steps at these from the start: valid {value:.4f}, test {on_test:.4f}")


def main():
    program, compiling = compiled(one_point, 0.1, 0.1, *arguments(0))
    rows, losses, times, found = [], [], [], []
    for split in range(SPLITS):
        values, base = grid(split, program)
        best = int(np.nanargmin(values[:, 0]))
        result, taken, compiling_ours = tune(split)
        lowest = values[best, 0]
        reached = np.flatnonzero(result.history["value"] <= lowest)
        rate, decay = RATES[best // len(DECAYS)], DECAYS[best % len(DECAYS)]
        ours = [float(result.best.hparams[k]) for k in START]
        rows.append(
            (split, f"{rate:.4f} {decay:.4f}", f"{lowest:.4f}", f"{values[best, 1]:.4f}", f"{base:.3f}",
             f"{ours[0]:.4f} {ours[1]:.4f}", f"{result.best.value:.4f}",
             f"{result.test['best']['value']:.4f}", f"{taken:.3f}",
             reached[0] + 1 if reached.size else "never")
        )  # fmt: skip
        losses.append(float(result.best.value) / lowest)
        times.append(taken / base)
        found.append(result)
        if split == 0:
            compilations = compiling, compiling_ours
    table(
        ("split", "grid: rate, decay", "valid", "test", "seconds",
         f"gradient, {OUTER_STEPS} steps", "valid", "test", "seconds", "beats at step"),
        rows,
    )  # fmt: skip
    won = sum(loss < 1 for loss in losses)
    print(f"  validation loss over the grid's best: {', '.join(f'{loss:.3f}' for loss in losses)}", end=" ")
    print(f"(asked: below 1; {won} of {SPLITS}, median {verdict(float(np.median(losses)), 0.9999)})")
    print(f"  seconds over the grid's: {', '.join(f'{time:.2f}' for time in times)}", end=" ")
    print(f"(asked: below 1, {verdict(max(times), 1.0)});", end=" ")
    print(f"an outer step costs {20 * np.median(times) / OUTER_STEPS:.1f} points of the grid")
    print(f"  compilation: {compilations[0]:.1f} s of the grid's program, {compilations[1]:.1f} s of ours")
    short_horizon(float(found[0].best.hparams["lr"]))


if __name__ == "__main__":
    main()
