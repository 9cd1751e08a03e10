"""Fitting a small language model to few rows until nothing is left to fit, and what it then writes.

Carlsson et al. (2025, "The hyperfitting phenomenon: sharpening and stabilizing LLMs for open-ended text
generation") fine-tune on few texts to a training loss of almost zero: the validation loss gets worse, and
yet what is generated greedily repeats itself less and is preferred by people. No validation loss would lead
there, and what does, the type-token ratio of generated text, has no derivative.

Here a network reads eight characters of the prose of Python's own library and guesses the ninth. It is
trained on much text, then for 400 steps on the rows of 8 short pieces, by Adam with a learned rate and a
learned decay (decoupled, relative to the rate). Greedy text of 96 characters begins with pieces of held-out
text::

    inner = cross-entropy of the few rows,    outer = - mean share of different four-grams in greedy text

tuned by plain evolution strategies, `bilevel.pes` of one truncation. Ours: four-grams of characters for
words. Whether people like the text cannot be said; how much of it is copied from the few rows can be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import prose
from benchmarks.problems.paper import Case, Evidence, Paper, Score

CONTEXT, EMBED, HIDDEN, SYMBOLS = 8, 8, 128, len(prose.ALPHABET)
BLOCKS, FEW, PROMPTS, LONG, GRAM = 600, 8, 64, 96, 4  # blocks of text, and pieces of fine-tuning
BATCH, STEPS, FIRST_STEPS, FIRST_RATE = 64, 400, 4000, 3e-3
USUAL, RATES = 3e-4, np.geomspace(1e-4, 1e-2, 7)
ZERO = 0.15  # a training loss in nats that is almost zero
PARTICLES, SIGMA, OUTER_STEPS = 8, 0.3, 15


def start(key):
    """Weights of variance one over the fan-in."""
    keys, inputs = jax.random.split(key, 3), CONTEXT * EMBED
    return {
        "embedding": jax.random.normal(keys[0], (SYMBOLS, EMBED)),
        "w": jax.random.normal(keys[1], (inputs, HIDDEN)) / np.sqrt(inputs),
        "b": jnp.zeros(HIDDEN),
        "v": jax.random.normal(keys[2], (HIDDEN, SYMBOLS)) / np.sqrt(HIDDEN),
        "c": jnp.zeros(SYMBOLS),
    }


def logits(params, contexts):
    inputs = params["embedding"][contexts].reshape(contexts.shape[0], -1)
    return jnp.tanh(inputs @ params["w"] + params["b"][None]) @ params["v"] + params["c"][None]


def loss(params, rows):
    """Mean cross-entropy of the last character of each row, in nats."""
    made = logits(params, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(made, rows[:, -1]).mean()


def written(params, contexts):
    """Greedy continuations, shape (contexts, LONG)."""

    def step(contexts, _):
        new = jnp.argmax(logits(params, contexts), axis=1).astype(contexts.dtype)
        return jnp.concatenate([contexts[:, 1:], new[:, None]], axis=1), new

    return jax.lax.scan(step, contexts, None, length=LONG)[1].T


def different(text):
    """Share of different four-grams in each row."""
    count = text.shape[1] - GRAM + 1
    gram = sum(text[:, i : i + count] * SYMBOLS ** (GRAM - 1 - i) for i in range(GRAM))
    ordered = jnp.sort(gram, axis=1)
    return (1 + jnp.sum(jnp.diff(ordered, axis=1) != 0, axis=1)) / count


def inner(params, hparams, rows):
    del hparams
    return loss(params, rows)


def outer(params, hparams, contexts):
    """Piecewise constant: not for gradients."""
    del hparams
    return -jnp.mean(different(written(params, contexts)).astype(jnp.float32))


def optimizer(hparams):
    return optax.adamw(hparams["rate"], eps_root=1e-8, weight_decay=hparams["decay"])


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())
METHOD = bilevel.alternating(
    bilevel.pes(STEPS, PARTICLES, SIGMA, objective="final", persistent=False),
    bilevel.tuned(optimizer),
    optax.adam(0.3, b2=0.9),
    inner_steps=STEPS,
)


# --- Data -------------------------------------------------------------------------------------------------


def rows_of(text: np.ndarray):
    """Each character with the ones before it: shape (rows, CONTEXT + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1, axis=1)
    return jnp.asarray(windows.reshape(-1, CONTEXT + 1))


@functools.cache
def texts(seed: int):
    """Rows of much text, of few pieces and of held-out text; contexts of validation and of test."""
    modules = [name for names in prose.SUBJECTS.values() for name in names]
    share = prose.BLOCK
    counts = (BLOCKS * share, share * -(-FEW // share), 2 * PROMPTS)
    much, few, rest = prose.splits([modules], counts, np.random.default_rng(seed))
    contexts = np.split(rest.text[:, :CONTEXT], 2)
    return rows_of(much.text), rows_of(few.text[:FEW]), rows_of(rest.text), *map(jnp.asarray, contexts)


def run(params, key, rows, steps: int, updater):
    """Params after so many steps on minibatches."""

    def step(carry, j):
        params, state = carry
        chosen = jax.random.choice(jax.random.fold_in(key, j), rows.shape[0], (BATCH,))
        updates, state = updater.update(jax.grad(loss)(params, rows[chosen]), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, updater.init(params)), jnp.arange(steps))[0][0]


def real_text():
    """Stretches of the text that greedy text is compared with."""
    module = np.concatenate(list(prose.blocks(prose.SUBJECTS["language"][0])[0]))[: 2 * PROMPTS]
    return jnp.asarray(module.reshape(PROMPTS, LONG))


@functools.cache
def pretrained(seed: int):
    fall = optax.adam(optax.cosine_decay_schedule(FIRST_RATE, FIRST_STEPS))
    key = jax.random.key(seed)
    return jax.jit(lambda rows: run(start(key), key, rows, FIRST_STEPS, fall))(texts(seed)[0])


@jax.jit
def fitted(hparams, key, params, few):
    return run(params, key, few, STEPS, optimizer(hparams))


@jax.jit
def seen(params, few, held_out, contexts):
    """Training loss, validation loss, and share of different four-grams of greedy text."""
    return jnp.stack([loss(params, few), loss(params, held_out), -outer(params, None, contexts)])


def numbers(rate, decay=1e-2):
    return {"rate": jnp.asarray(rate, jnp.float32), "decay": jnp.asarray(decay, jnp.float32)}


def case(seed: int) -> Case:
    params, (_, few, _, valid, test) = pretrained(seed), texts(seed)
    score = jax.jit(lambda params: Score(outer(params, None, valid), outer(params, None, test)))
    return Case(
        problem=PROBLEM,
        params=params,
        hparams=numbers(USUAL),
        train=bilevel.minibatches(few, BATCH),
        valid=valid,
        method=METHOD,
        steps=OUTER_STEPS,
        box={"rate": (RATES[0], RATES[-1]), "decay": (1e-4, 1.0)},
        spread=lambda found: numbers(**found),
        judge=lambda hparams, key: score(fitted(hparams, key, params, few)),
    )


# --- The claim --------------------------------------------------------------------------------------------


def copied(text: np.ndarray, few: np.ndarray) -> float:
    """Share of the eight-grams of a text that the few rows have."""
    known = {tuple(row) for row in few[:, :CONTEXT].tolist()} | {tuple(row) for row in few[:, 1:].tolist()}
    grams = np.lib.stride_tricks.sliding_window_view(text, CONTEXT, axis=1).reshape(-1, CONTEXT)
    return float(np.mean([tuple(row) in known for row in grams.tolist()]))


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    before, after, copies, real, first = [], [], [], [], ""
    for seed in answers:
        params, (_, few, held_out, _, test) = pretrained(seed), texts(seed)
        key = jax.random.key(50 + seed)
        before.append(seen(params, few, held_out, test))
        runs = [fitted(numbers(rate), key, params, few) for rate in RATES]
        after.append([seen(own, few, held_out, test) for own in runs])
        real.append(np.mean(different(real_text())))
        nothing_left = [own for own, x in zip(runs, after[-1], strict=True) if x[0] < ZERO]
        if nothing_left:
            text = np.asarray(written(nothing_left[0], test))
            copies.append(copied(text, np.asarray(few)))
            first = first or "".join(prose.ALPHABET[i] for i in text[0][:60])
    before, mean = np.mean(before, axis=0), np.mean(after, axis=0)
    fit = np.flatnonzero(mean[:, 0] < ZERO)
    found = [float(a["hypergradient"].hparams["rate"]) for a in answers.values()]
    if not len(fit):
        sentence = (
            f"no rate of the grid leaves a training loss below {ZERO} ({mean[:, 0].min():.2f} at best)."
        )
        verdict = "cannot be tested here"
    else:
        train, valid, share = mean[fit[0]]
        worse, richer = valid > before[1] + 0.1, share > 1.2 * before[2]
        verdict = (
            "holds" if worse and richer else "holds in part" if worse or richer else "does not hold here"
        )
        sentence = (
            f"at a rate of {RATES[fit[0]]:.2g} the training loss falls from {before[0]:.2f} to {train:.2f}, "
            f"the validation loss rises from {before[1]:.2f} to {valid:.2f} nats, and the share of different "
            f"four-grams in greedy text goes from {before[2]:.2f} to {share:.2f} (real text: "
            f"{np.mean(real):.2f}); {np.mean(copies):.0%} of its eight-grams are copies of the few rows; "
            f"evolution strategies find rates of {', '.join(f'{x:.2g}' for x in found)}."
        )

    def draw(ax):
        other = ax.twinx()
        for values, start, name, style in (
            (mean[:, 0], before[0], "training loss", "C0"), (mean[:, 1], before[1], "validation loss", "C1"),
        ):  # fmt: skip
            ax.plot(RATES, values, ".-", color=style, label=name)
            ax.axhline(start, color=style, linestyle=":")
        other.plot(RATES, mean[:, 2], ".--", color="C2", label="different four-grams (right)")
        other.axhline(before[2], color="C2", linestyle=":")
        other.set_ylim(0, 1)
        ax.set_xscale("log")
        ax.set_xlabel("rate of fine-tuning (dotted: before)")
        ax.set_ylabel("nats")
        handles = [line for own in (ax, other) for line in own.lines if line.get_label()[0] != "_"]
        ax.legend(handles=handles, frameon=False)
        if first:
            ax.set_title(f'"{first}"', fontsize="x-small", family="monospace")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="fitting few rows to nothing",
    source="Carlsson et al. 2025",
    claim="the validation loss gets worse while greedy text becomes more diverse",
    case=case,
    evidence=evidence,
    unit="minus the share of different four-grams",
)
