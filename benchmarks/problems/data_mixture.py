"""A mixture of four domains for a fifth, by hypergradient and by Bayesian search with cheap trainings.

Chen et al. (2025, "ADMIRE-BayesOpt: accelerated data mixture re-weighting for language models with Bayesian
optimization", arXiv:2508.11551) search the mixture of the sources of training data by a Gaussian process over
mixtures and model sizes: small models rank mixtures as large ones do, at a fraction of the cost. Here the
domains are digits turned by 0, 15, 45 and 90 degrees, those at 15 with 60 % wrong labels, and what is wanted
are digits turned by 20. The loss of row i of domain d(i) has the weight pi_d(i) / q_d(i), by
`bilevel.mixtures.loss`::

    inner = sum_d pi_d mean_(i of d) cross-entropy_i,    outer = cross-entropy at 20 degrees

with pi on the simplex. Ours: what is cheap is not a small model but a short training, a tenth of the steps.
The arm "fidelities" is `benchmarks.fidelities` with both; the claim is tested by the rank correlation of
short and long trainings at random mixtures, and by what this search costs to be as good as the same search by
long trainings only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import fidelities
from benchmarks.problems.digits import pictures
from benchmarks.problems.paper import Answer, Case, Evidence, Paper, Score, key_of

ANGLES, NOISY, WRONG, WANTED = (0, 15, 45, 90), 1, 0.6, 20
ROWS, VALID, BATCH, HIDDEN = 200, 300, 64, 32  # rows of each domain
RATE, MOMENTUM, STEPS = 0.02, 0.9, 500
SHORT, CHEAP = STEPS // 10, 0.1
MIXTURES, BUDGET, REPEATS = 40, 30, 3


def start(hparams, batch, key):
    """Weights of variance one over the fan-in."""
    del hparams, batch
    one, two = jax.random.split(key)
    return {
        "w": jax.random.normal(one, (64, HIDDEN)) / 8,
        "b": jnp.zeros(HIDDEN),
        "v": jax.random.normal(two, (HIDDEN, 10)) / np.sqrt(HIDDEN),
        "c": jnp.zeros(10),
    }


def row_losses(params, hparams, batch):
    del hparams
    made = jnp.tanh(batch["x"] @ params["w"] + params["b"][None]) @ params["v"] + params["c"][None]
    return optax.softmax_cross_entropy_with_integer_labels(made, batch["y"])


def outer(params, hparams, batch):
    return jnp.mean(row_losses(params, hparams, batch))


INNER = bilevel.mixtures.loss(row_losses, np.full(len(ANGLES), 1 / len(ANGLES)))
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
PROBLEM = bilevel.Problem(INNER, outer, start=start, constraints={"mixture": bilevel.simplex()})
METHOD = bilevel.alternating(bilevel.unrolled(), OPTIMIZER, optax.adam(0.3, b2=0.9), inner_steps=STEPS)


def turned(x: np.ndarray, angle: float) -> np.ndarray:
    from scipy.ndimage import rotate

    grey = rotate(x.reshape(-1, 8, 8) / 16, angle, axes=(2, 1), reshape=False, order=1)
    return grey.reshape(-1, 64).astype(np.float32)


@functools.cache
def split(seed: int):
    """Training data of all domains, no digit in two of them; validation and test as wanted."""
    (x, y), rng = pictures(), np.random.default_rng(seed)
    order, count = rng.permutation(len(y)), ROWS * len(ANGLES)
    train, valid, test = np.split(order, [count, count + VALID])
    labels = y[train].astype(np.int32)
    domain = np.repeat(np.arange(len(ANGLES), dtype=np.int32), ROWS)
    wrong = np.flatnonzero(domain == NOISY)[: round(WRONG * ROWS)]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    parts = zip(ANGLES, np.split(x[train], len(ANGLES)), strict=True)
    data = {"x": np.concatenate([turned(part, a) for a, part in parts]), "y": labels, "domain": domain}
    wanted = [{"x": turned(x[i], WANTED), "y": y[i].astype(np.int32)} for i in (valid, test)]
    return jax.tree.map(jnp.asarray, [data, *wanted])


@jax.jit
def judged(hparams, key, data, steps) -> Score:
    """After a plain run of so many steps."""
    train, valid, test = data
    key_start, key_order = jax.random.split(key)
    params = start(None, None, key_start)

    def step(j, carry):
        params, state = carry
        rows = jax.random.choice(jax.random.fold_in(key_order, j), train["y"].shape[0], (BATCH,))
        grad = jax.grad(INNER)(params, hparams, jax.tree.map(lambda x: x[rows], train))
        updates, state = OPTIMIZER.update(grad, state)
        return optax.apply_updates(params, updates), state

    params = jax.lax.fori_loop(0, steps, step, (params, OPTIMIZER.init(params)))[0]
    return Score(outer(params, None, valid), outer(params, None, test))


def mixture(weights):
    weights = jnp.asarray(weights, jnp.float32)
    return {"mixture": weights / jnp.sum(weights)}


def of_each(numbers):
    return mixture(jnp.stack([jnp.asarray(numbers[f"{angle}"]) for angle in ANGLES]))


def case(seed: int) -> Case:
    own = split(seed)
    return Case(
        problem=PROBLEM,
        params=None,
        hparams=mixture(np.ones(len(ANGLES))),
        train=bilevel.minibatches(own[0], BATCH),
        valid=own[1],
        method=METHOD,
        steps=30,
        box={f"{angle}": (0.01, 1.0) for angle in ANGLES},
        spread=of_each,
        judge=lambda hparams, key: judged(hparams, key, own, STEPS),
    )


# --- Fidelities -------------------------------------------------------------------------------------------


def searched(seed: int, key, cheap: float | None, going, draws: int) -> list[fidelities.Look]:
    """Bayesian search by validation losses, of short trainings and long ones or of long ones only."""

    def evaluate(point, fidelity):
        steps = STEPS if fidelity == fidelities.EXACT else SHORT
        return float(judged(mixture(point), key, split(seed), steps).valid)

    return fidelities.search(evaluate, len(ANGLES), cheap, going, draws)


def by_fidelities(case: Case, seconds: float, seed: int) -> Answer:
    """An arm: for as many CPU seconds, its own included."""
    del case
    began = time.process_time()

    def going(looks):
        del looks
        return time.process_time() - began < seconds

    looks = searched(seed, key_of(seed, 1), CHEAP, going, seed)
    return Answer(mixture(fidelities.best(looks).point), len(looks))


# --- The claim --------------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def correlation(seed: int):
    """Validation losses of short and long trainings at random mixtures, and their rank correlation."""
    points = np.random.default_rng(seed).dirichlet(np.ones(len(ANGLES)), MIXTURES)
    keys = jax.random.split(jax.random.key(50 + seed), 2)
    losses = [
        np.array([float(judged(mixture(x), key, split(seed), steps).valid) for x in points])
        for key, steps in zip(keys, (SHORT, STEPS), strict=True)
    ]
    return losses, float(np.corrcoef(*map(ranks, losses))[0, 1])


def lowest(looks: Sequence[fidelities.Look], costs: np.ndarray) -> np.ndarray:
    """The lowest exact value by each cost; infinite before the first."""
    exact = [(x.cost, x.value) for x in looks if x.fidelity == fidelities.EXACT]
    return np.array([min((v for c, v in exact if c <= cost + 1e-9), default=np.inf) for cost in costs])


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    costs, traces, found = np.arange(1, BUDGET + 0.01, 0.1), {}, []
    for seed in answers:
        found.append(correlation(seed))
        for draws in range(REPEATS):
            for cheap in (CHEAP, None):
                looks = searched(
                    seed, key_of(seed, 1), cheap, lambda looks: looks[-1].cost < BUDGET, 10 * seed + draws
                )
                traces.setdefault(cheap, []).append(lowest(looks, costs))
    means = {cheap: np.mean(values, axis=0) for cheap, values in traces.items()}
    # Where search by long trainings is after two thirds of the budget, and what that costs with short ones.
    goal_at = 2 * BUDGET / 3
    goal = means[None][np.searchsorted(costs, goal_at)]
    reached = np.flatnonzero(means[CHEAP] <= goal)
    share = (
        float(costs[reached[0]] / costs[np.flatnonzero(means[None] <= goal)[0]]) if len(reached) else np.inf
    )
    rank = float(np.mean([r for _, r in found]))
    met = (rank > 0.8) + (share < 0.6)
    verdict = ("does not hold here", "holds in part", "holds")[met]
    learned = np.mean([np.asarray(a["hypergradient"].hparams["mixture"]) for a in answers.values()], axis=0)
    sentence = (
        f"trainings of {SHORT} steps rank {MIXTURES} mixtures as those of {STEPS} do with a correlation of "
        f"{rank:.2f}; the loss of Bayesian search after {goal_at:.0f} long trainings ({goal:.3f}) costs "
        f"{share:.2f} times as much with short ones; hypergradients give "
        + ", ".join(f"{x:.2f} to {angle}" for x, angle in zip(learned, ANGLES, strict=True))
        + " degrees."
    )

    def draw(ax):
        for cheap, name in ((None, "long trainings"), (CHEAP, "short and long")):
            ax.plot(costs, np.where(np.isfinite(means[cheap]), means[cheap], np.nan), label=name)
        ax.axhline(goal, color="0.4", linestyle=":")
        ax.set_xlabel("cost, long trainings")
        ax.set_ylabel("lowest validation cross-entropy")
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 1.0))
        ax.grid(color="0.9")
        small = ax.inset_axes((0.55, 0.4, 0.4, 0.45))
        for (short, long), _ in found:
            small.plot(short, long, ".", markersize=3)
        small.set_xlabel("short", fontsize="small")
        small.set_ylabel("long", fontsize="small")
        small.set_title(f"rank correlation {rank:.2f}", fontsize="small")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="a mixture of domains",
    source="Chen et al. 2025, arXiv:2508.11551",
    claim="cheap trainings rank mixtures as expensive ones do, and search with both costs a fraction",
    case=case,
    evidence=evidence,
    unit="cross-entropy",
    arms={"fidelities": by_fidelities},
)
