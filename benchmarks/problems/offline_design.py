"""Designs from data of the past, by a surrogate that does not change much with its params.

Dao et al. (2024, IGNITE) fit a surrogate to designs that were tried, and climb it from the best of them; as
it is wrong where nothing was tried, they bound how far its output moves with its params, the norm of d_params
of its mean, by a multiplier (`penalties.primal_dual`) or a penalty of a fixed strength. They report up to
9.6 % better designs. Here Branin's function and Hartmann's of six variables are sampled at random; a network
of 32-32 units for each sees the worse half only, values standardised::

    inner = mean (h - y)^2 + strength |d_params mean h| + 1e-4 |w|^2 / 2
    outer = mean (h - y)^2 on the best quarter of what may be seen, held out

A strength for each function; 200 steps of Adam, hypergradients through all of them. The test: from the best
designs seen the surrogate is climbed, and the true function says what they are worth, in units of the way
from the best seen to the optimum, so that 1 is left where nothing was gained. An arm more, "primal-dual",
runs their rule with their constants and answers with the multiplier that it ends with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.paper import Answer, Case, Evidence, Paper, Score
from bilevel import penalties

HIDDEN, STEPS, RATE, DECAY = 32, 200, 1e-2, 1e-4
SAMPLES, CLIMBERS, CLIMB, CLIMB_RATE = 400, 16, 100, 0.01
DIMS = {"branin": 2, "hartmann": 6}
USUAL, GRID = 1e-3, np.geomspace(1e-4, 1.0, 9)
BOUND, SCALE, DUAL_RATE = 1e-3, 0.05, 1e-3  # |d_params mean h| is to be below BOUND / SCALE
OPTIMIZER = optax.adam(RATE, eps_root=1e-8)
GAIN = 0.02  # of the way to the optimum


def branin(u):
    """Minus the function at a point of the unit square; its optimum is -0.397887."""
    x, y = 15 * u[0] - 5, 15 * u[1]
    valley = y - 5.1 / (4 * jnp.pi**2) * x**2 + 5 / jnp.pi * x - 6
    return -(valley**2 + 10 * (1 - 1 / (8 * jnp.pi)) * jnp.cos(x) + 10)


WEIGHTS = np.array([1.0, 1.2, 3.0, 3.2])
SHARPNESS = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
CENTRES = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann(u):
    """Minus the function of six variables; its optimum is 3.32237."""
    return jnp.exp(-jnp.sum(SHARPNESS * (u[None] - CENTRES) ** 2, 1)) @ WEIGHTS


TRUTH = {"branin": (branin, -0.397887), "hartmann": (hartmann, 3.32237)}


def start(hparams, batch, key):
    """A network for each function, weights of variance one over the fan-in."""
    del hparams, batch

    def network(key, dim):
        sizes = dim, HIDDEN, HIDDEN, 1
        return [
            {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
            for k, m, n in zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
        ]

    keys = jax.random.split(key, len(DIMS))
    return {name: network(k, dim) for k, (name, dim) in zip(keys, DIMS.items(), strict=True)}


def surrogate(network, x):
    """Of designs in the unit cube, shape (n, dim)."""
    x = 4 * x - 2
    for layer in network[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return (x @ network[-1]["w"] + network[-1]["b"][None])[:, 0]


def miss(network, batch):
    return jnp.mean(jnp.square(surrogate(network, batch["x"]) - batch["y"]))


def inner(params, hparams, batch):
    """Both surrogates side by side."""

    def one(name):
        rows = batch[name]
        slope = penalties.gradient_norm(params[name], hparams["strength"][name], surrogate, rows["x"])
        return miss(params[name], rows) + slope + penalties.l2(params[name], DECAY)

    return sum(one(name) for name in DIMS)


def outer(params, hparams, batch):
    del hparams
    found = {name: miss(params[name], batch[name]) for name in DIMS}
    return sum(found.values()), found


PROBLEM = bilevel.Problem(inner, outer, start=start, constraints=bilevel.positive())
METHOD = bilevel.alternating(
    bilevel.unrolled(remat=False), OPTIMIZER, optax.adam(0.5, b2=0.9), inner_steps=STEPS
)


def of_each(numbers):
    return {"strength": {name: jnp.float32(numbers[name]) for name in DIMS}}


RULE = penalties.primal_dual(
    lambda network, hparams, rows: miss(network, rows) + penalties.l2(network, DECAY),
    lambda network, hparams, rows: (
        SCALE * penalties.gradient_norm(network, 1.0, surrogate, rows["x"]) - BOUND
    ),
    DUAL_RATE,
)


@functools.cache
def split(seed: int):
    """Training, validation; the designs to climb from, and what the truth is measured by."""
    rng, parts = np.random.default_rng(seed), ({}, {}, {})
    for name, dim in DIMS.items():
        x = rng.random((SAMPLES, dim))
        y = np.asarray(jax.vmap(TRUTH[name][0])(jnp.asarray(x)))
        seen = np.argsort(y)[: SAMPLES // 2]
        fit, held = np.split(seen, [len(seen) * 3 // 4])
        mean, size = y[seen].mean(), y[seen].std()
        for part, rows in ((parts[0], fit), (parts[1], held)):
            part[name] = {"x": jnp.asarray(x[rows]), "y": jnp.asarray((y[rows] - mean) / size)}
        parts[2][name] = {"x": jnp.asarray(x[seen[-CLIMBERS:]]), "best": jnp.asarray(y[seen[-1]])}
    return jax.tree.map(lambda x: x.astype(jnp.float32), parts)


def climbed(network, x):
    """Designs after gradient ascent on the surrogate, inside the unit cube."""

    def step(x, _):
        slope = jax.grad(lambda x: surrogate(network, x).sum())(x)
        return jnp.clip(x + CLIMB_RATE * slope, 0.0, 1.0), None

    return jax.lax.scan(step, x, None, CLIMB)[0]


def left(network, name, begin):
    """Of the way from the best design seen to the optimum, what is left: a mean over designs."""
    truth, optimum = TRUTH[name]
    worth = jax.vmap(truth)(climbed(network, begin["x"]))
    return jnp.mean((optimum - worth) / (optimum - begin["best"]))


@jax.jit
def trained(hparams, key, train, dual):
    """Params after a plain run, and strengths, which move if they are ``dual`` to the bound."""
    params = start(None, None, key)

    def step(carry, _):
        params, state, multipliers = carry

        def total(params):
            found = {n: RULE(params[n], None, train[n], multipliers[n] / SCALE) for n in DIMS}
            return sum(f[0] for f in found.values()), {name: SCALE * f[1] for name, f in found.items()}

        grads, moved = jax.grad(total, has_aux=True)(params)
        updates, state = OPTIMIZER.update(grads, state)
        multipliers = jax.tree.map(lambda m, n: jnp.where(dual, n, m), multipliers, moved)
        return (optax.apply_updates(params, updates), state, multipliers), None

    carry = params, OPTIMIZER.init(params), hparams["strength"]
    (params, _, multipliers), _ = jax.lax.scan(step, carry, None, STEPS)
    return params, multipliers


@jax.jit
def judged(hparams, key, parts):
    """The loss of validation, and what is left by each function."""
    train, valid, begin = parts
    params, _ = trained(hparams, key, train, False)
    return outer(params, hparams, valid)[0], jnp.stack([left(params[n], n, begin[n]) for n in DIMS])


def case(seed: int) -> Case:
    parts = split(seed)

    def judge(hparams, key):
        valid, lefts = judged(hparams, key, parts)
        return Score(valid, lefts.mean())

    return Case(
        problem=PROBLEM,
        params=None,
        hparams=of_each(dict.fromkeys(DIMS, USUAL)),
        train=parts[0],
        valid=parts[1],
        method=METHOD,
        steps=12,
        box={name: (1e-4, 10.0) for name in DIMS},
        spread=of_each,
        judge=judge,
    )


def multiplier(own: Case, seconds: float, seed: int) -> Answer:
    """The rule of the paper, in one training."""
    del seconds
    begin = of_each(dict.fromkeys(DIMS, SCALE * 1e-3))
    strengths = trained(begin, jax.random.key(seed), own.train, True)[1]
    return Answer({"strength": strengths}, 1)


# --- The claim --------------------------------------------------------------------------------------------


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    keys = jax.random.split(jax.random.key(99), 3)

    def gained(hparams, seed):
        return 1 - np.mean([judged(hparams, key, split(seed))[1] for key in keys], axis=0)

    def over_seeds(of):
        return np.mean([gained(of(own), seed) for seed, own in answers.items()], axis=0)

    without = over_seeds(lambda own: of_each(dict.fromkeys(DIMS, 0.0)))
    tuned = over_seeds(lambda own: own["hypergradient"].hparams)
    dual = over_seeds(lambda own: own["primal-dual"].hparams)
    along = np.array([over_seeds(lambda own, s=s: of_each(dict.fromkeys(DIMS, s))) for s in GRID])
    more = np.maximum(tuned, dual) - without
    verdict = (
        "holds" if more.min() >= GAIN else "holds in part" if more.max() >= GAIN else "does not hold here"
    )
    words = "; ".join(
        f"{name}: {without[i]:.1%} without, {tuned[i]:.1%} tuned by hypergradient, {dual[i]:.1%} at the "
        f"multiplier, {along[:, i].max():.1%} at the best of a grid ({GRID[along[:, i].argmax()]:.2g})"
        for i, name in enumerate(DIMS)
    )
    sentence = f"designs get so far from the best seen to the optimum: {words}."

    def draw(ax):
        for i, name in enumerate(DIMS):
            (line,) = ax.plot(GRID, along[:, i], label=name)
            ax.axhline(without[i], color=line.get_color(), linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel("strength (dotted: none)")
        ax.set_ylabel("way to the optimum gained")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="designs by an insensitive surrogate",
    source="Dao et al. 2024 (IGNITE)",
    claim="a surrogate that is penalised for its sensitivity to its params leads to better designs",
    case=case,
    evidence=evidence,
    unit="way to the optimum left",
    arms={"primal-dual": multiplier},
)
