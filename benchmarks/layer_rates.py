"""Learning rates for each layer and window of a small language model, against one tuned constant rate.

A transformer of 61,000 parameters (two blocks, causal attention, normalisation before each part) predicts the
next character of `problems.prose`; 1,000 steps of SGD with momentum. Hyperparameters are the rates of four
groups (embeddings, two blocks, readout) in ten windows, moved by Adam along `bilevel.unrolled`, from the
best of a grid of constant rates. All are judged by the validation loss in runs with other starts and orders.
Memory beside the data is what `bilevel.memory` predicts from shapes before anything is computed, against what
the resident memory of a process grows by in an outer step, at its peak (Linux only).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table, verdict
from benchmarks.memory import resident
from benchmarks.problems import prose

WIDTH, HEADS, BLOCKS, BATCH, LENGTH, MOMENTUM = 48, 4, 2, 4, 32, 0.9
STEPS, WINDOWS, OUTER_STEPS, OUTER_RATE, JUDGES = 1000, 10, 16, 0.15, 4
GRID = tuple(float(x) for x in np.geomspace(0.01, 1, 9))
ROWS, SYMBOLS = (4000, 400, 400), len(prose.ALPHABET)
TOLERANCE = 0.2


@functools.cache
def text():
    """Training, validation and test windows."""
    parts = prose.splits(
        [sum((prose.SUBJECTS[name] for name in ("mail", "web", "testing", "files", "objects")), ())],
        ROWS, np.random.default_rng(0),
    )  # fmt: skip
    return [jnp.asarray(part.text[:, : LENGTH + 1]) for part in parts]


# --- The model --------------------------------------------------------------------------------------------


def start(hparams, batch, key):
    """Normal weights of variance one over the fan-in."""
    del hparams, batch
    keys = iter(jax.random.split(key, 3 + 4 * BLOCKS))

    def weights(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    return {
        "embed": {"symbol": weights(SYMBOLS, WIDTH), "place": 0.1 * weights(LENGTH, WIDTH)},
        "blocks": [
            {
                "mix": weights(WIDTH, 3 * WIDTH), "out": weights(WIDTH, WIDTH) / 2,
                "up": weights(WIDTH, 4 * WIDTH), "down": weights(4 * WIDTH, WIDTH) / 2,
            }
            for _ in range(BLOCKS)
        ],
        "read": weights(WIDTH, SYMBOLS),
    }  # fmt: skip


def normal(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attended(x, block):
    q, k, v = jnp.split((normal(x) @ block["mix"]).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ block["out"]


def loss(params, hparams, batch):
    del hparams
    x = params["embed"]["symbol"][batch[:, :-1]] + params["embed"]["place"][None]
    for block in params["blocks"]:
        x = x + attended(x, block)
        x = x + jax.nn.gelu(normal(x) @ block["up"]) @ block["down"]
    logits = normal(x) @ params["read"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


GROUPS = 2 + BLOCKS


def inner(hparams):
    """SGD with momentum at a rate for each group."""
    rates = hparams["lr"]

    def scaled(updates, params=None):
        del params
        groups = {"embed": rates[0], "blocks": [rates[1 + i] for i in range(BLOCKS)], "read": rates[-1]}
        return {
            "embed": jax.tree.map(lambda u: -groups["embed"] * u, updates["embed"]),
            "blocks": [
                jax.tree.map(lambda u, r=rate: -r * u, own)
                for rate, own in zip(groups["blocks"], updates["blocks"], strict=True)
            ],
            "read": -groups["read"] * updates["read"],
        }

    return optax.chain(optax.trace(MOMENTUM), optax.stateless(scaled))


PROBLEM = bilevel.Problem(loss, loss, start=start, constraints={"lr": bilevel.positive()})


@functools.cache
def method(steps: int, windows: int):
    per_step = {"lr": bilevel.schedules.windows(windows, steps)}
    return bilevel.alternating(
        bilevel.unrolled(per_step=per_step), bilevel.tuned(inner), optax.adam(OUTER_RATE), inner_steps=steps
    )


@functools.partial(jax.jit, static_argnames="steps")
def judged(rates, keys, train, valid, steps: int):
    """Loss of a run for each key, at rates of the shape (windows, groups)."""

    def one(key):
        key_start, key_order = jax.random.split(key)
        params = start(None, None, key_start)
        state = inner({"lr": rates[0]}).init(params)

        def step(carry, j):
            params, state = carry
            chosen = jax.random.choice(jax.random.fold_in(key_order, j), train.shape[0], (BATCH,))
            grad = jax.grad(loss)(params, None, train[chosen])
            optimizer = inner({"lr": rates[j * rates.shape[0] // steps]})
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
        return loss(params, None, valid)

    return jax.lax.map(one, keys)


# --- Memory -----------------------------------------------------------------------------------------------


def tune(first, outer_steps: int, steps: int = STEPS) -> bilevel.Result:
    """A run of `bilevel.optimize` from rates of the shape (windows, groups)."""
    train, valid, _ = text()
    return bilevel.optimize(
        PROBLEM, None, {"lr": first}, bilevel.minibatches(train, BATCH), valid, method(steps, len(first)),
        outer_steps, progress=False, keep_best=False,
    )  # fmt: skip


def run(variant: str, steps: int) -> int:
    """Resident memory before an outer step whose program is compiled; the peak is counted from here."""
    del variant
    first = jnp.full((WINDOWS, GROUPS), 0.05)
    tune(first, 1, steps)
    # A peak of compilation would be no peak of the run.
    Path("/proc/self/clear_refs").write_text("5")
    before = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    tune(first, 1, steps)
    return 1024 * int(before[0].split()[1])


def predicted(steps: int) -> int:
    """Bytes beside the data, from shapes; nothing is computed."""
    train, valid, _ = text()
    hparams = {"lr": jax.ShapeDtypeStruct((WINDOWS, GROUPS), jnp.float32)}
    told = bilevel.memory(
        PROBLEM, method(steps, WINDOWS), None, hparams, bilevel.minibatches(train, BATCH), valid,
        keep_best=False,
    )  # fmt: skip
    return told.total - told.data


# --- The study --------------------------------------------------------------------------------------------


def main(steps: int = STEPS, outer_steps: int = OUTER_STEPS, grid: Sequence[float] = GRID) -> None:
    train, valid, test = text()
    keys = jax.random.split(jax.random.key(1), 2 * JUDGES)
    chosen, judges = keys[:JUDGES], keys[JUDGES:]

    def losses(rates, keys, rows):
        return np.asarray(judged(rates, keys, train, rows, steps))

    constants = [jnp.full((WINDOWS, GROUPS), rate) for rate in grid]
    began = time.process_time()
    found = [losses(rates, chosen[:2], valid).mean() for rates in constants]
    print(f"  constant rates, {time.process_time() - began:.0f} CPU s:", end=" ")
    print(", ".join(f"{rate:.3g}: {x:.3f}" for rate, x in zip(grid, found, strict=True)), flush=True)
    best = constants[int(np.nanargmin(found))]
    began = time.process_time()
    result = tune(best, outer_steps, steps)
    spent = time.process_time() - began
    print(f"  learned, {outer_steps} outer steps, {spent:.0f} CPU s, first and last values", end=" ")
    print(f"{result.history['value'][0]:.3f}, {result.history['value'][-1]:.3f};", end=" ")
    print(f"largest growth {result.history['growth'].max():.1f}")
    rates = result.hparams["lr"]
    rows, at_best = [], losses(best, judges, valid)
    for name, own in (("best constant rate", best), ("rates of layers and windows", rates)):
        on_valid, on_test = losses(own, judges, valid), losses(own, judges, test)
        less = at_best - on_valid
        error = less.std(ddof=1) / np.sqrt(JUDGES)
        rows.append(
            (name, own.size if own is rates else 1, f"{on_valid.mean():.4f}", f"{on_test.mean():.4f}",
             f"{less.mean():.4f} +- {error:.4f}")
        )  # fmt: skip
    size = sum(x.size for x in jax.tree.leaves(start(None, None, jax.random.key(0))))
    print(f"  {size:,} parameters, {steps} steps; +- over {JUDGES} runs")
    table(("", "rates", "validation loss", "test loss", "less by"), rows)
    print(np.round(np.asarray(rates).T, 3))
    told = predicted(steps)
    before, peak = resident("benchmarks.layer_rates", "", steps)
    ratio = told / (peak - before)
    print(
        f"  memory beside the data: predicted {told / 1e6:.1f} MB, taken {(peak - before) / 1e6:.1f} MB,",
        end=" ",
    )
    print(f"ratio {ratio:.2f} (asked within {TOLERANCE:.0%}, {verdict(abs(ratio - 1), TOLERANCE)})")


if __name__ == "__main__":
    main()
