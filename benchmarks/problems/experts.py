"""Routing between experts, held alike for examples that are alike.

RoMA (2026; only a summary of it was read) trains the routers of mixtures of experts, with all else frozen,
under a penalty on differing routing weights r of examples whose task embeddings are close, with a Gaussian
kernel over the three nearest of those answered correctly. It reports 76.2 % for a model at 67.6 %, and 68.2
to 71.5 % for penalties on the weights' L1 norm, L2 norm and entropy. Here four linear experts, near the truth
and frozen, answer four regressions; which one is asked decides the nearest of four places in the plane of
embeddings e. The router is linear in features of forty numbers that know of e with much noise, a softmax
over experts, and sees few examples::

    inner = mean (sum_k r_k expert_k(x) - y)^2
        + strength / n * 1/2 sum_ij W_ij |r_i - r_j|^2 + 1e-3 |router|^2 / 2,    W = nearest(e, 3, width)

Embeddings are known in training only. Ours: all examples are neighbours, not only those that are answered
correctly. All arms tune strength and width. The claim is tested against no penalty and those on the entropy
and the squares of r, both to be small, each at the best of a grid of strengths on validation.
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
from bilevel import penalties

EXPERTS, INPUTS, FEATURES, NEAREST = 4, 6, 40, 3
TRAIN, HELD_OUT = 100, 1000
OFF, NOISE, BLUR, DECAY = 0.2, 0.3, 1.5, 1e-3  # of experts, of y, of features; on the router
STEPS, RATE = 150, 0.05
USUAL = {"strength": 1e-2, "width": 1.0}
GRID = np.geomspace(1e-3, 100.0, 16)
RIVALS = "laplacian", "entropy", "squares"
OPTIMIZER = optax.adam(RATE)
CLEAR = 0.05  # share of the error without a penalty that is to be gained


def start(hparams, batch, key):
    """A router that prefers almost none."""
    del hparams, batch
    return {"w": jax.random.normal(key, (FEATURES, EXPERTS)) / 50, "b": jnp.zeros(EXPERTS)}


def routed(params, batch):
    return jax.nn.softmax(batch["features"] @ params["w"] + params["b"][None])


def miss(params, batch):
    """Mean squared error; the batch has what each expert answers."""
    return jnp.mean(jnp.square(jnp.sum(routed(params, batch) * batch["answers"], 1) - batch["y"]))


def held(params, hparams, batch, kind: str = "laplacian"):
    """Penalties on routing weights, per example."""
    r = routed(params, batch)
    if kind == "laplacian":
        graph = penalties.nearest(batch["embedding"], NEAREST, hparams["width"])
        return penalties.laplacian(r, hparams["strength"], graph) / len(r)
    if kind == "squares":
        return hparams["strength"] * jnp.mean(jnp.sum(jnp.square(r), 1))
    return -hparams["strength"] * jnp.mean(jnp.sum(r * jnp.log(r + 1e-9), 1))


def inner(params, hparams, batch, kind: str = "laplacian"):
    return miss(params, batch) + held(params, hparams, batch, kind) + penalties.l2(params, DECAY)


def outer(params, hparams, batch):
    del hparams
    return miss(params, batch)


PROBLEM = bilevel.Problem(inner, outer, start=start, constraints=bilevel.positive())
METHOD = bilevel.alternating(
    bilevel.unrolled(remat=False), OPTIMIZER, optax.adam(0.1, b2=0.99), inner_steps=STEPS
)


def both(numbers):
    return {name: jnp.float32(numbers[name]) for name in USUAL}


@functools.cache
def split(seed: int):
    """Training, validation, test."""
    rng = np.random.default_rng(seed)
    places = 2 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    truth = rng.normal(size=(EXPERTS, INPUTS))
    experts = truth + OFF * rng.normal(size=truth.shape)
    look = rng.normal(size=(2, FEATURES)) / 2

    def part(count):
        e = places[rng.integers(0, EXPERTS, count)] + rng.normal(size=(count, 2))
        task = np.argmin(np.sum((e[:, None] - places[None]) ** 2, -1), 1)
        x = rng.normal(size=(count, INPUTS))
        made = {
            "embedding": e,
            "features": e @ look + BLUR * rng.normal(size=(count, FEATURES)),
            "answers": x @ experts.T,
            "y": np.sum(x * truth[task], 1) + NOISE * rng.normal(size=count),
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}

    return part(TRAIN), part(HELD_OUT // 4), part(HELD_OUT)


@functools.partial(jax.jit, static_argnames="kind")
def judged(hparams, key, parts, kind: str = "laplacian"):
    """Errors of validation and test after training."""
    train, valid, test = parts
    params = start(None, None, key)

    def step(carry, _):
        params, state = carry
        updates, state = OPTIMIZER.update(jax.grad(inner)(params, hparams, train, kind), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, OPTIMIZER.init(params)), None, STEPS)
    return Score(miss(params, valid), miss(params, test))


def case(seed: int) -> Case:
    parts = split(seed)
    return Case(
        problem=PROBLEM,
        params=None,
        hparams=both(USUAL),
        train=parts[0],
        valid=parts[1],
        method=METHOD,
        steps=120,
        box={"strength": (1e-3, 100.0), "width": (0.03, 10.0)},
        spread=both,
        judge=lambda hparams, key: judged(hparams, key, parts),
    )


# --- The claim --------------------------------------------------------------------------------------------


def along(kind: str, seed: int, key) -> np.ndarray:
    """Errors without the penalty and along the grid, at the usual width; shape (strengths, 2)."""
    return np.array(
        [judged(both({**USUAL, "strength": s}), key, split(seed), kind) for s in np.append(0.0, GRID)]
    )


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    keys = jax.random.split(jax.random.key(99), 2)
    # (kinds, seeds, strengths, validation and test)
    found = np.array(
        [[np.mean([along(kind, seed, key) for key in keys], 0) for seed in answers] for kind in RIVALS]
    )
    best = np.take_along_axis(found[..., 1], found[..., :1].argmin(2), 2)[..., 0].mean(1)
    none = found[0, :, 0, 1].mean()
    gains = (np.array([none, *best[1:]]) - best[0]) / none
    verdict = (
        "holds" if gains.min() >= CLEAR else "holds in part" if gains[0] >= CLEAR else "does not hold here"
    )
    sentence = (
        f"the squared error is {best[0]:.3f} with the Laplacian of the embeddings, {none:.3f} with no "
        f"penalty, {best[1]:.3f} with the entropy and {best[2]:.3f} with the squares of the routing weights "
        f"penalised, each at its best strength on validation (noise: {NOISE**2:.2f})."
    )

    def draw(ax):
        for name, values in zip(RIVALS, found[..., 1].mean(1), strict=True):
            ax.plot(GRID, values[1:], label=name)
        ax.axhline(none, color="0.4", linestyle=":", label="none")
        ax.set_xscale("log")
        ax.set_xlabel("strength")
        ax.set_ylabel("test error")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="routing of experts on a manifold",
    source="RoMA 2026",
    claim="routing weights that are alike for close embeddings beat none and penalties on their spread",
    case=case,
    evidence=evidence,
    unit="squared error",
)
