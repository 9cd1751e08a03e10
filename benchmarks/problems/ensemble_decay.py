"""Weight decay for an ensemble, and for one of its members, on few data.

Kim, Kotha, Liang and Hashimoto (2025, "Pre-training under infinite compute", arXiv:2509.14786) train on few
data for many epochs, under a much stronger weight decay than is usual, and ensembles of such models. For an
infinite ensemble they take half the decay that is best for one model: a member may overfit more, as the
average forgives it. Here K networks are trained on 200 digits for 75 epochs by SGD with momentum and
decoupled weight decay, a decay for each layer::

    outer A = mean over members of their cross-entropy
    outer B = cross-entropy of the mean of their logits

All arms minimise B. The claim is tested by the decay, one number for both layers, that is best for A and
for B: the vertex of a parabola through the mean over the seeds, in the logarithm, around the lowest of a
grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import digits
from benchmarks.problems.paper import Case, Evidence, Paper, Score

MEMBERS, HIDDEN, TRAIN, VALID, BATCH, STEPS = 8, 32, 200, 400, 50, 300
RATE, MOMENTUM, USUAL = 0.1, 0.9, 1e-3
GRID = np.geomspace(1e-3, 0.3, 16)


def start(hparams, batch, key):
    """Members with weights of variance one over the fan-in."""
    del hparams, batch

    return jax.vmap(lambda key: digits.network(key, HIDDEN))(jax.random.split(key, MEMBERS))


def logits(params, x):
    """Of every member, shape (members, rows, 10)."""

    return jax.vmap(lambda member: digits.logits(member, x))(params)


def singles(params, batch):
    """The mean over members of their losses, outer A."""
    return jnp.mean(jax.vmap(lambda made: digits.cross_entropy(made, batch["y"]))(logits(params, batch["x"])))


def ensemble(params, batch):
    """The loss of the mean of the logits, outer B."""
    return digits.cross_entropy(logits(params, batch["x"]).mean(0), batch["y"])


def inner(params, hparams, batch):
    """Members train side by side, each by the gradient of its own loss."""
    del hparams
    return MEMBERS * singles(params, batch)


def optimizer(hparams):
    """SGD with momentum and decoupled decay."""

    def decayed(updates, params):
        # A prefix of params: a decay for each layer.
        def layer(decay, u, p):
            return jax.tree.map(lambda u, p: -RATE * (u + decay * p), u, p)

        return jax.tree.map(layer, hparams["decay"], updates, params)

    return optax.chain(optax.trace(MOMENTUM), optax.stateless(decayed))


def both(decay):
    return {"decay": {"hidden": jnp.asarray(decay), "read": jnp.asarray(decay)}}


def of_each(numbers):
    return {"decay": {name: jnp.float32(value) for name, value in numbers.items()}}


PROBLEM = bilevel.Problem(
    inner, lambda params, hparams, batch: ensemble(params, batch), start=start, constraints=bilevel.positive()
)
METHOD = bilevel.alternating(
    bilevel.unrolled(), bilevel.tuned(optimizer), optax.adam(0.3, b2=0.9), inner_steps=STEPS
)


def split(seed: int):
    return digits.split(seed, TRAIN, VALID)


@jax.jit
def trained(hparams, key, train):
    """Members after a plain run."""
    key_start, key_order = jax.random.split(key)
    params = start(None, None, key_start)
    state = optimizer(hparams).init(params)

    def step(carry, j):
        params, state = carry
        rows = jax.random.choice(jax.random.fold_in(key_order, j), TRAIN, (BATCH,))
        grad = jax.grad(inner)(params, None, jax.tree.map(lambda x: x[rows], train))
        updates, state = optimizer(hparams).update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.arange(STEPS))[0][0]


def case(seed: int) -> Case:
    train, valid, test = split(seed)

    @jax.jit
    def judge(hparams, key):
        params = trained(hparams, key, train)
        return Score(ensemble(params, valid), ensemble(params, test))

    return Case(
        problem=PROBLEM,
        params=None,
        hparams=both(np.float32(USUAL)),
        train=bilevel.minibatches(train, BATCH),
        valid=valid,
        method=METHOD,
        steps=20,
        box={"hidden": (1e-4, 1.0), "read": (1e-4, 1.0)},
        spread=of_each,
        judge=judge,
    )


# --- The claim --------------------------------------------------------------------------------------------


@jax.jit
def losses(decay, key, train, valid):
    """Outer A and B after training at one decay for both layers."""
    params = trained(both(decay), key, train)
    return jnp.stack([singles(params, valid), ensemble(params, valid)])


def lowest(values: np.ndarray) -> float:
    """Where the parabola through the lowest of the grid and two to each side of it has its vertex."""
    i = int(np.clip(np.argmin(values), 2, len(GRID) - 3))
    x, y = np.log(GRID[i - 2 : i + 3]), values[i - 2 : i + 3]
    bend, slope, _ = np.polyfit(x - x[2], y, 2)
    return float(np.exp(x[2] - np.clip(slope / (2 * bend), -2, 2)))


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    keys = jax.random.split(jax.random.key(99), 2)
    found = np.mean(
        [
            [
                np.mean([losses(jnp.float32(decay), key, *split(seed)[:2]) for key in keys], 0)
                for decay in GRID
            ]
            for seed in answers
        ],
        axis=0,
    )
    single, together = lowest(found[:, 0]), lowest(found[:, 1])
    ratio = together / single
    verdict = "holds" if 0.3 < ratio < 0.75 else "holds in part" if ratio < 0.95 else "does not hold here"
    sentence = (
        f"the best decay is {single:.3g} for one network ({found[:, 0].min():.3f}) and {together:.3g} for "
        f"the mean of {MEMBERS} ({found[:, 1].min():.3f}): {ratio:.2f} of it, where the paper has about half."
    )

    def draw(ax):
        for values, best, name in ((found[:, 0], single, "one network"), (found[:, 1], together, "ensemble")):
            (line,) = ax.plot(GRID, values, label=name)
            ax.axvline(best, color=line.get_color(), linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel("weight decay")
        ax.set_ylabel("validation cross-entropy")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="weight decay of an ensemble",
    source="Kim et al. 2025, arXiv:2509.14786",
    claim="the best weight decay of an ensemble is about half that of one model",
    case=case,
    evidence=evidence,
    unit="cross-entropy of the ensemble",
)
