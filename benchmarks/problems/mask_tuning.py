"""Weights that are switched on and off for a new task of few shots, under the eyes of the old model.

Zheng et al. (2023, "Regularized mask tuning", arXiv:2307.15049) adapt a frozen network by a binary mask of
its weights, trained straight through on 16 shots of each class, and drop entries of the gradient that
contradict the network they began with (`maps.gradient_dropout`). Here a network of 64-64-10 units has learned
half of the digits, and the new task are the others turned by twenty degrees, 16 shots of each, of which
the frozen network knows about as many as theirs did (65 %)::

    params = 1[m > 0.005] weights,   m = 0.01 at first
    g = d_m cross-entropy(params),   h = d_m KL(old model | params)
    g <- (1 - level + level 1[P > u]) g + strength m,   m <- m - rate g with momentum

The hyperparameters are the level of dropout and the strength. As theirs, masks are hard and gradients pass
straight through; what hypergradients follow is then not the derivative of the validation loss, which has
none, but that of the same run with the identity for the step: biased. Ours: the square of the norm of m where
they have the norm, all weights where they have those of attention, and all shots in every step. The claim
compares the frozen network, masks without dropout and penalty, those at the answer of all arms that is best
on validation, and for scale all weights trained.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import digits
from benchmarks.problems.paper import Case, Evidence, Paper, Score
from bilevel import maps, penalties

HIDDEN, SHOTS, VALID, STEPS, ANGLE = 64, 16, 300, 100, 20
ON, MOMENTUM, RATE, FULL_RATE = 0.01, 0.9, 1e-3, 0.05
USUAL = {"level": 0.5, "strength": 1e-3}
PRETRAINING = optax.adam(1e-2)
CLEAR = 0.01  # accuracy


def start(key):
    return digits.network(key, HIDDEN)


def cross_entropy(params, batch):
    return digits.cross_entropy(digits.logits(params, batch["x"]), batch["y"])


@functools.cache
def split(seed: int):
    """The weights of the old model; shots, validation and test of the new task."""
    from scipy import ndimage

    x, y = digits.pictures()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    old, new = np.split(order, [len(order) // 2])
    turned = ndimage.rotate(x.reshape(-1, 8, 8), ANGLE, axes=(1, 2), reshape=False, order=1).reshape(x.shape)

    def batch(rows, pixels):
        return {"x": jnp.asarray(pixels[rows] / 16, jnp.float32), "y": jnp.asarray(y[rows], jnp.int32)}

    shots = np.concatenate([new[y[new] == c][:SHOTS] for c in range(10)])
    rest = np.setdiff1d(new, shots)
    rng.shuffle(rest)
    parts = shots, *np.split(rest, [VALID])
    return pretrained(jax.random.key(seed), batch(old, x)), [batch(rows, turned) for rows in parts]


@jax.jit
def pretrained(key, rows):
    params = start(key)

    def step(carry, _):
        params, state = carry
        updates, state = PRETRAINING.update(jax.grad(cross_entropy)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, PRETRAINING.init(params)), None, 150)[0][0]


MASKS = maps.masks(lambda weights: weights)
"""Of numbers and of what stands for hyperparameters here, the frozen weights, which come with the batch."""


def tuned(at, hparams, batch):
    """A step of the numbers m and of their speed."""
    (rows, weights), key = batch

    def apart(numbers):
        """Divergence from the old model."""
        teacher = digits.logits(weights, rows["x"])
        return penalties.distillation(digits.logits(MASKS(numbers, weights), rows["x"]), 1.0, teacher)

    g = jax.grad(lambda numbers: cross_entropy(MASKS(numbers, weights), rows))(at["numbers"])
    h = jax.grad(apart)(at["numbers"])
    g = maps.gradient_dropout(g, h, hparams["level"], key)
    g = jax.tree.map(lambda g, m: g + hparams["strength"] * m, g, at["numbers"])
    speed = jax.tree.map(lambda s, g: MOMENTUM * s + g, at["speed"], g)
    return {"numbers": jax.tree.map(lambda m, s: m - RATE * s, at["numbers"], speed), "speed": speed}


def outer(at, hparams, batch):
    del hparams
    rows, weights = batch
    return cross_entropy(MASKS(at["numbers"], weights), rows)


CONSTRAINTS = {"level": bilevel.interval(0.0, 1.0), "strength": bilevel.positive()}
PROBLEM = bilevel.FixedPoint(tuned, outer, constraints=CONSTRAINTS)
METHOD = bilevel.alternating(
    bilevel.unrolled(None, STEPS, remat=False), None, optax.adam(0.4, b2=0.9), restart=True
)


def all_on(weights):
    numbers = MASKS.init(weights, ON)
    return {"numbers": numbers, "speed": jax.tree.map(jnp.zeros_like, numbers)}


@jax.jit
def adapted(hparams, key, shots, weights):
    """Masked weights after a plain run."""

    def step(at, key):
        return tuned(at, hparams, ((shots, weights), key)), None

    at, _ = jax.lax.scan(step, all_on(weights), jax.random.split(key, STEPS))
    return MASKS(at["numbers"], weights)


@jax.jit
def fine_tuned(shots, weights):
    """All weights after as many steps of gradient descent with momentum."""
    optimizer = optax.sgd(FULL_RATE, MOMENTUM)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params, shots), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (weights, optimizer.init(weights)), None, STEPS)[0][0]


def of_each(numbers):
    """Of a level given as what is not dropped."""
    return {"level": jnp.float32(1 - numbers["kept"]), "strength": jnp.float32(numbers["strength"])}


def case(seed: int) -> Case:
    weights, (shots, valid, test) = split(seed)

    @jax.jit
    def judge(hparams, key):
        params = adapted(hparams, key, shots, weights)
        return Score(cross_entropy(params, valid), cross_entropy(params, test))

    return Case(
        problem=PROBLEM,
        params=all_on(weights),
        hparams={name: jnp.float32(value) for name, value in USUAL.items()},
        train=bilevel.with_rng((shots, weights)),
        valid=(valid, weights),
        method=METHOD,
        steps=40,
        box={"kept": (0.01, 1.0), "strength": (1e-4, 10.0)},
        spread=of_each,
        judge=judge,
    )


# --- The claim --------------------------------------------------------------------------------------------


def accuracy(params, batch) -> float:
    return float(jnp.mean(digits.logits(params, batch["x"]).argmax(1) == batch["y"]))


def compared(seed: int, hparams) -> dict[str, float]:
    """Accuracies on the test."""
    weights, (shots, _, test) = split(seed)
    keys = jax.random.split(jax.random.key(99), 3)
    nothing = {"level": jnp.float32(0), "strength": jnp.float32(0)}
    return {
        "frozen": accuracy(weights, test),
        "masks alone": accuracy(adapted(nothing, keys[0], shots, weights), test),
        "masks, regularised": float(
            np.mean([accuracy(adapted(hparams, key, shots, weights), test) for key in keys])
        ),
        "all weights": accuracy(fine_tuned(shots, weights), test),
    }


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    # On validation the best answer of all arms, as the claim is about masks and not about arms.
    found = []
    for seed, own in answers.items():
        weights, (shots, valid, _) = split(seed)
        losses = {
            arm: float(cross_entropy(adapted(answer.hparams, jax.random.key(98), shots, weights), valid))
            for arm, answer in own.items()
        }
        found.append(compared(seed, own[min(losses, key=losses.get)].hparams))
    frozen, alone, regularised, every = (np.mean([of[name] for of in found]) for name in found[0])
    better = regularised >= frozen + CLEAR, regularised >= alone + CLEAR
    verdict = "holds" if all(better) else "holds in part" if better[0] else "does not hold here"
    sentence = (
        f"of the digits turned, {SHOTS} shots each, {regularised:.1%} are right by regularised masks, "
        f"{alone:.1%} by masks alone, {frozen:.1%} by the frozen network; {every:.1%} if all weights train."
    )

    def draw(ax):
        for seed, of in zip(answers, found, strict=True):
            ax.plot(list(of.values()), range(len(of)), "o", label=f"seed {seed}", alpha=0.8)
        ax.set_yticks(range(len(found[0])), list(found[0]))
        ax.invert_yaxis()
        ax.set_xlabel("accuracy on the digits turned")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="regularised mask tuning",
    source="Zheng et al. 2023, arXiv:2307.15049",
    claim="regularised masks of frozen weights adapt better, on few shots, than none and than masks alone",
    case=case,
    evidence=evidence,
    unit="cross-entropy",
)
