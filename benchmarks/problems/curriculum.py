"""How much of the hardest examples a loss should have, more and more of it, with right labels and with wrong.

Wang et al. (2023, "Hard patches mining for masked image modeling") mask what a teacher finds hard to
reconstruct, a share of it that rises linearly during training. Ours: a small classifier of digits, no masks,
and no teacher; what is hard is what has a large loss now. At step t of T, on a minibatch::

    inner = (1 - s_t) mean + s_t mean of the harder half,    s_t = s (t + 1) / T

The share s at the end is the hyperparameter, one for 400 digits with right labels and one for the same
digits with 30 % wrong ones; two networks train side by side, for so few steps (60) that much is left to
learn. Validation labels are right. Arms begin near no mining, at 0.05. The claim is tested by a grid of s,
beside the same grid for a share that does not rise (s_t = s).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.paper import Case, Evidence, Paper, Score
from benchmarks.problems.training_run import logits, pictures, start

TRAIN, VALID, BATCH, STEPS, WRONG = 400, 500, 64, 60, 0.3
RATE, MOMENTUM = 0.1, 0.9
GRID = np.linspace(0, 0.9, 7).astype(np.float32)
DATA, KEYS = ("right", "wrong"), 3


def starts(hparams, batch, key):
    """A network for each data set, the same at first."""
    one = start(hparams, batch, key)
    return jax.tree.map(lambda x: jnp.stack([x, x]), one)


def row_losses(params, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)


def mined(losses, share):
    """(1 - s) mean + s mean of the harder half."""
    hard = jax.lax.top_k(losses, losses.shape[0] // 2)[0]
    return (1 - share) * jnp.mean(losses) + share * jnp.mean(hard)


def inner(params, hparams, batch):
    """Of both networks; the share is that of the step."""

    def one(params, labels, share):
        return mined(row_losses(params, batch["x"], labels), share)

    return jnp.sum(jax.vmap(one, (0, 1, 0))(params, batch["y"], hparams["share"]))


def outer(params, hparams, batch):
    del hparams
    each = jax.vmap(lambda p: jnp.mean(row_losses(p, batch["x"], batch["y"])))(params)
    return jnp.mean(each), dict(zip(DATA, each, strict=True))


def rising(share):
    """s_t."""
    return lambda step: share["end"] * (step + 1) / STEPS


PROBLEM = bilevel.Problem(inner, outer, start=starts, constraints=bilevel.interval(0.0, 1.0))
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
METHOD = bilevel.alternating(
    bilevel.forward(per_step={"share": rising}), OPTIMIZER, optax.adam(0.3, b2=0.9), inner_steps=STEPS
)


@functools.cache
def split(seed: int):
    """Training digits with both labels, shape (rows, 2); validation and test."""
    (x, y), rng = pictures(), np.random.default_rng(seed)
    order = rng.permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    wrong = y[:TRAIN].copy()
    count = round(WRONG * TRAIN)
    wrong[:count] = (wrong[:count] + rng.integers(1, 10, count)) % 10
    train = {"x": x[:TRAIN], "y": np.stack([y[:TRAIN], wrong], axis=1)}
    rest = [{"x": x[i], "y": y[i]} for i in (slice(TRAIN, TRAIN + VALID), slice(TRAIN + VALID, None))]
    return jax.tree.map(jnp.asarray, [train, *rest])


@jax.jit
def judged(shares, key, data):
    """Losses on validation and on test of both networks; the share of each step has shape (STEPS, 2)."""
    train, *held_out = data
    key_start, key_order = jax.random.split(key)
    params = starts(None, None, key_start)

    def step(carry, moment):
        params, state = carry
        j, share = moment
        rows = jax.random.choice(jax.random.fold_in(key_order, j), TRAIN, (BATCH,))
        batch = jax.tree.map(lambda x: x[rows], train)
        updates, state = OPTIMIZER.update(jax.grad(inner)(params, {"share": share}, batch), state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, OPTIMIZER.init(params)
    params = jax.lax.scan(step, carry, (jnp.arange(STEPS), shares))[0][0]
    return [jnp.stack([outer(params, None, batch)[1][name] for name in DATA]) for batch in held_out]


RISE = (np.arange(1, STEPS + 1, dtype=np.float32) / STEPS)[:, None]


def ends(right, wrong):
    return {"share": {"end": jnp.stack([jnp.asarray(x, jnp.float32) for x in (right, wrong)])}}


def case(seed: int) -> Case:
    data = split(seed)

    def judge(hparams, key):
        valid, test = judged(RISE * hparams["share"]["end"][None], key, data)
        return Score(valid.mean(), test.mean())

    return Case(
        problem=PROBLEM,
        params=None,
        hparams=ends(0.05, 0.05),
        train=bilevel.minibatches(data[0], BATCH),
        valid=data[1],
        method=METHOD,
        steps=60,
        box={name: (0.005, 0.98) for name in DATA},
        spread=lambda numbers: ends(*(numbers[name] for name in DATA)),
        judge=judge,
    )


# --- The claim --------------------------------------------------------------------------------------------


def gains(losses: np.ndarray):
    """The best of the grid on validation, its gain over none on test, and the standard error of that.

    ``losses`` has shape (grid, seeds, 2), validation and test; the best is the same for all seeds.
    """
    best = int(np.argmin(losses[..., 0].mean(axis=1)))
    gain = losses[0, :, 1] - losses[best, :, 1]
    error = np.std(gain, ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return best, float(gain.mean()), float(error)


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    keys = jax.random.split(jax.random.key(99), KEYS)
    ways = {"rising": RISE, "constant": np.ones_like(RISE)}
    # (ways, grid, seeds, validation and test, data)
    found = np.array(
        [
            [
                [
                    np.mean([judged(way * np.full(2, s), key, split(i)) for key in keys], axis=0)
                    for i in answers
                ]
                for s in GRID
            ]
            for way in ways.values()
        ]
    )
    own = {name: gains(found[0, ..., i]) for i, name in enumerate(DATA)}
    helps = {name: best > 0 and gain > 2 * error for name, (best, gain, error) in own.items()}
    verdict = (
        "holds" if all(helps.values()) else "holds in part" if any(helps.values()) else "does not hold here"
    )
    learned = np.mean(
        [np.asarray(a["hypergradient"].hparams["share"]["end"]) for a in answers.values()], axis=0
    )
    words = [
        f"with {name} labels the best share at the end is {GRID[best]:.2f}, which gains {gain:.3f} +- "
        f"{error:.3f} nats on test over none (loss {found[0, 0, :, 1, i].mean():.3f}); hypergradients find "
        f"{learned[i]:.2f}"
        for i, (name, (best, gain, error)) in enumerate(own.items())
    ]
    constant = gains(found[1, ..., 0])
    sentence = f"{'; '.join(words)}; a constant share gains {constant[1]:.3f} with right labels."

    def draw(ax):
        for way, losses, style in zip(ways, found, ("-", ":"), strict=True):
            for i, name in enumerate(DATA):
                tested = losses[:, :, 1, i].mean(axis=1)
                label = f"{name} labels, {way}"
                ax.plot(GRID, tested / tested[0], style, color=f"C{i}", label=label)
        ax.axhline(1.0, color="0.4", linewidth=0.8)
        ax.set_xlabel("share of the harder half (at the end, where it rises)")
        ax.set_ylabel("test cross-entropy, relative to no mining")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="hard examples, more and more",
    source="Wang et al. 2023",
    claim="a loss that has a rising share of the hardest examples is better than their mean",
    case=case,
    evidence=evidence,
    unit="cross-entropy, nats",
)
