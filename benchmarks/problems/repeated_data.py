"""Dropout for a language model that sees the same text again and again.

Xue et al. (2023, "To repeat or not to repeat") pre-train on the same tokens for many epochs: it is worse than
as many steps on new tokens, and of all regularisers dropout helps. Here a network reads eight characters of
the prose of Python's own library and guesses the ninth. It is trained on 512 such rows for E epochs by SGD
with momentum, with a dropout rate for its inputs and one for its hidden units::

    logits = W2 drop(tanh(W1 drop(embedded characters; r_input)); r_hidden)

against the same run on rows that are all new. Ours: noise is Gaussian, of the mean and variance of dropout at
that rate, so that the rates have a pathwise derivative. All arms tune the two rates for E = 64, from the
usual 0.1. The claim is tested by a grid of rates, one number for both layers, for each E.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import prose
from benchmarks.problems.paper import Case, Evidence, Paper, Score
from bilevel.nn import dropout

CONTEXT, EMBED, HIDDEN, SYMBOLS = 8, 8, 64, len(prose.ALPHABET)
ROWS, BATCH, EPOCHS = 512, 64, (1, 4, 16, 64)
HELD_OUT = 2048  # rows of validation, and of test
EACH = prose.LENGTH // (CONTEXT + 1)  # rows of a window
RATE, MOMENTUM, USUAL, MOST = 0.1, 0.9, 0.1, 0.9
GRID = np.array([1e-3, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], np.float32)
STEPS = max(EPOCHS) * ROWS // BATCH


def start(hparams, batch, key):
    """Weights of variance one over the fan-in."""
    del hparams, batch
    keys, inputs = jax.random.split(key, 3), CONTEXT * EMBED
    return {
        "embedding": jax.random.normal(keys[0], (SYMBOLS, EMBED)),
        "hidden": {
            "w": jax.random.normal(keys[1], (inputs, HIDDEN)) / np.sqrt(inputs),
            "b": jnp.zeros(HIDDEN),
        },
        "read": {
            "w": jax.random.normal(keys[2], (HIDDEN, SYMBOLS)) / np.sqrt(HIDDEN),
            "b": jnp.zeros(SYMBOLS),
        },
    }


def loss(params, rows, noise=lambda x, layer: x):
    """Mean cross-entropy of the last character of each row, in nats."""
    inputs = params["embedding"][rows[:, :-1]].reshape(rows.shape[0], -1)
    inner = noise(inputs, "input") @ params["hidden"]["w"] + params["hidden"]["b"][None]
    made = noise(jnp.tanh(inner), "hidden") @ params["read"]["w"] + params["read"]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(made, rows[:, -1]).mean()


def inner(params, hparams, batch):
    """The loss of a noisy pass; the batch has a key."""
    rows, key = batch
    keys = dict(zip(("input", "hidden"), jax.random.split(key), strict=True))

    def noise(x, layer):
        return dropout(x, hparams["rate"][layer], keys[layer], kind="gaussian")

    return loss(params, rows, noise)


def outer(params, hparams, rows):
    del hparams
    return loss(params, rows)


PROBLEM = bilevel.Problem(inner, outer, start=start, constraints=bilevel.interval(0.0, MOST))
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
# Clipped: at some seeds training is chaotic without dropout, and the derivative worthless.
METHOD = bilevel.alternating(
    bilevel.unrolled(clip=1.0), OPTIMIZER, optax.adam(0.4, b2=0.9), inner_steps=STEPS
)


def both(rate):
    return {"rate": {"input": jnp.asarray(rate), "hidden": jnp.asarray(rate)}}


def of_each(numbers):
    return {"rate": {name: jnp.float32(value) for name, value in numbers.items()}}


@functools.cache
def texts(seed: int, new: int = STEPS * BATCH):
    """So many rows of training, of which the first are repeated, and those of validation and of test."""
    modules = [name for names in prose.SUBJECTS.values() for name in names]
    share = prose.BLOCK * EACH
    counts = [-(-rows // share) * prose.BLOCK for rows in (new, HELD_OUT, HELD_OUT)]
    parts = prose.splits([modules], counts, np.random.default_rng(seed))

    def rows(part, count):
        cut = part.text[:, : EACH * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
        return jnp.asarray(cut[:count])

    return [rows(*pair) for pair in zip(parts, (new, HELD_OUT, HELD_OUT), strict=True)]


def order_of(key):
    """Rows of each step: all of the repeated ones in every epoch, in another order."""
    keys = jax.random.split(key, STEPS * BATCH // ROWS)
    return jax.vmap(lambda k: jax.random.permutation(k, ROWS))(keys).reshape(STEPS, BATCH)


NEW = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
"""Rows of each step of a run that repeats nothing."""


def trained(hparams, key, order, steps, rows):
    """Params after a plain run of so many steps."""
    key_start, key_noise = jax.random.split(key)
    params = start(None, None, key_start)

    def step(j, carry):
        params, state = carry
        batch = rows[order[j]], jax.random.fold_in(key_noise, j)
        updates, state = OPTIMIZER.update(jax.grad(inner)(params, hparams, batch), state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, OPTIMIZER.init(params)))[0]


@jax.jit
def judged(hparams, key, texts, new, steps) -> Score:
    """After a run on the repeated rows, or on new ones."""
    key_order, key = jax.random.split(key)
    params = trained(hparams, key, jnp.where(new, NEW, order_of(key_order)), steps, texts[0])
    return Score(loss(params, texts[1]), loss(params, texts[2]))


def case(seed: int) -> Case:
    own = texts(seed)
    return Case(
        problem=PROBLEM,
        params=None,
        hparams=both(np.float32(USUAL)),
        train=bilevel.with_rng(bilevel.minibatches(own[0][:ROWS], BATCH)),
        valid=own[1],
        method=METHOD,
        steps=12,
        box={"input": (0.005, 0.85), "hidden": (0.005, 0.85)},
        spread=of_each,
        judge=lambda hparams, key: judged(hparams, key, own, False, STEPS),
    )


# --- The claim --------------------------------------------------------------------------------------------


def losses(hparams, new: bool, epochs: int, seeds: Iterable[int]) -> float:
    """Mean validation loss over the seeds and two runs of each."""
    keys = jax.random.split(jax.random.key(99), 2)
    steps = epochs * ROWS // BATCH
    return float(np.mean([judged(hparams, key, texts(i), new, steps).valid for i in seeds for key in keys]))


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    seeds, none = tuple(answers), both(GRID[0])
    grid = np.array([[losses(both(rate), False, epochs, seeds) for rate in GRID] for epochs in EPOCHS])
    new = np.array([losses(none, True, epochs, seeds) for epochs in EPOCHS])
    cost, best = grid[:, 0] - new, GRID[np.argmin(grid, axis=1)]
    recovered = (grid[-1, 0] - grid[-1].min()) / cost[-1]
    degrades = bool(np.all(np.diff(cost[1:]) > 0) and cost[-1] > 0.1)
    grows = bool(np.all(np.diff(best) >= 0) and best[-1] > best[0])
    met = sum((degrades, grows, bool(recovered > 0.5)))
    verdict = "holds" if met == 3 else "holds in part" if degrades and met == 2 else "does not hold here"
    tuned = [
        np.mean([float(a["hypergradient"].hparams["rate"][n]) for a in answers.values()])
        for n in ("input", "hidden")
    ]

    def words(values, form):
        return ", ".join(format(float(x), form) for x in values)

    sentence = (
        f"after {words(EPOCHS, '.0f')} epochs repetition costs {words(cost, '.3f')} nats against new text; "
        f"the best of the rates is {words(best, '.2g')}, and recovers {recovered:.0%} of the cost at "
        f"{EPOCHS[-1]} epochs; there hypergradients find {tuned[0]:.2f} (input) and {tuned[1]:.2f} (hidden)."
    )

    def draw(ax):
        for values, fresh, epochs in zip(grid, new, EPOCHS, strict=True):
            (line,) = ax.plot(GRID, values, ".-", label=f"{epochs} epochs")
            ax.axhline(fresh, color=line.get_color(), linestyle=":")
        ax.set_xlabel("dropout rate (dotted: new text, no dropout)")
        ax.set_ylabel("validation cross-entropy, nats")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="dropout under repeated data",
    source="Xue et al. 2023",
    claim="repetition degrades; the best dropout rate grows with it, and recovers what is lost",
    case=case,
    evidence=evidence,
    unit="cross-entropy, nats",
)
