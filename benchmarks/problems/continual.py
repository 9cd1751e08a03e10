"""Learning digits two at a time, without a look back at the old ones.

Smith et al. (2022, "A closer look at rehearsal-free continual learning") compare what holds a network to what
it knew while it learns new classes: the distance from the old weights (L2), the same in the metric of the
Fisher information (EWC), and the distance from the old predictions on new data (PredKD). From a random start,
alone, EWC ends near nothing (7.7 % of CIFAR-100 in ten tasks) and PredKD far above (25.2 %), and PredKD with
EWC or L2 is no better (22.7 %, 21.6 %). Here a network of 64-32-10 units learns the digits 0 and 1, then 2
and 3, up to 8 and 9, by Adam on all pictures of a task; sigmoids, not a softmax, as theirs::

    binary cross-entropies of the classes seen so far
        + l2 |w - old|^2 / 2 + sum_i ewc F_i (w_i - old_i)^2 / 2 + kd KL(old | new) of the old classes

on pictures of the new classes alone, F the sum over the tasks before. As theirs, strengths are the same for
all tasks and are found on the first two: hypergradients go through both. They are judged by all ten digits
after five tasks; both by the cross-entropy of a softmax over the classes seen, which says how well these are
told apart, where the loss of training also says how sure each of them is. The claim is tested by grids of
each strength, alone and in pairs, the best on the first two tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import digits
from benchmarks.problems.paper import Case, Evidence, Paper, Score
from bilevel import penalties

HIDDEN, STEPS, TASKS, PREFIX = 32, 80, 5, 2
TRAIN, VALID, PER_TASK = 1000, 400, 170  # examples; of a task, repeated where there are fewer
OPTIMIZER = optax.adam(0.01, eps_root=1e-8)  # whose derivative is finite where a pixel is never lit
GRID = {
    "l2": np.geomspace(1e-4, 10, 8),
    "ewc": np.geomspace(1e-1, 1e4, 8),
    "kd": np.geomspace(1e-2, 1e2, 8),
}
USUAL = {"l2": 1e-3, "ewc": 1.0, "kd": 1.0}
SETS = (), ("l2",), ("ewc",), ("kd",), ("kd", "l2"), ("kd", "ewc")
FAR, SAME = 1.5, 0.02  # PredKD over EWC, and what a pair may add to PredKD, in accuracy


def start(hparams, batch, key):
    del hparams, batch
    return digits.network(key, HIDDEN)


def cross_entropy(params, batch):
    """Binary ones of the classes that count in the batch: their sum, averaged over examples."""
    every = optax.sigmoid_binary_cross_entropy(digits.logits(params, batch["x"]), batch["y"])
    return jnp.mean(every @ batch["seen"])


def inner(params, hparams, batch, old, fisher):
    """The loss of a task."""
    logits, teacher = (digits.logits(p, batch["x"]) for p in (params, old))
    # Of two classes, one with a logit of zero, the softmax is a sigmoid.
    pairs = [jnp.stack([z, jnp.zeros_like(z)], -1) for z in (logits, teacher)]
    shares = hparams["kd"] * jnp.broadcast_to(batch["old"][None], logits.shape)
    return (
        cross_entropy(params, batch)
        + penalties.l2_to(params, hparams["l2"] * batch["later"], old)
        + penalties.ewc(params, hparams["ewc"], old, fisher)
        + logits.shape[1] * penalties.distillation(pairs[0], shares, pairs[1])
    )


def learned(params, hparams, batch, fisher):
    """Params after a task, and the Fisher information of all tasks so far."""
    fisher = jax.tree.map(lambda f: batch["later"] * f, fisher)

    def step(carry, _):
        at, state = carry
        updates, state = OPTIMIZER.update(jax.grad(inner)(at, hparams, batch, params, fisher), state)
        return (optax.apply_updates(at, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, OPTIMIZER.init(params)), None, STEPS)
    more = penalties.fisher_diagonal(
        lambda p, x: digits.logits(p, x) * batch["seen"][None],
        after,
        batch["x"],
        family="bernoulli",
        batch_size=34,
    )
    return after, jax.tree.map(jnp.add, fisher, more)


def told_apart(params, batch):
    """Cross-entropy of the softmax over the classes that count in the batch."""
    logits = jnp.where(batch["seen"] > 0, digits.logits(params, batch["x"]), -1e9)
    return optax.softmax_cross_entropy(logits, batch["y"]).mean()


def outer(params, hparams, batch, fisher):
    del hparams, fisher
    return told_apart(params, batch)


PROBLEM = bilevel.FixedPoint(learned, outer, start=start, constraints=bilevel.positive(), has_state=True)
METHOD = bilevel.alternating(bilevel.unrolled(None, PREFIX, remat=False), None, optax.adam(0.5, b2=0.9))


def nothing():
    """The Fisher information before the first task."""
    return jax.tree.map(jnp.zeros_like, start(None, None, jax.random.key(0)))


def strengths(numbers):
    return {name: jnp.float32(numbers.get(name, 0.0)) for name in USUAL}


@functools.cache
def split(seed: int):
    """A batch of training for each task, and all of validation and of test."""
    x, y = digits.pictures()
    order = np.random.default_rng(seed).permutation(len(y))
    train, valid, test = np.split(order, [TRAIN, TRAIN + VALID])

    def batch(rows, seen, old=0):
        counts = np.arange(10)
        made = {"x": x[rows] / 16, "y": np.eye(10)[y[rows]], "seen": counts < seen, "old": counts < old}
        return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}

    def task(t):
        rows = np.resize(train[y[train] // 2 == t], PER_TASK)
        return {**batch(rows, 2 * t + 2, 2 * t), "later": jnp.float32(t > 0)}

    def so_far(rows, tasks):
        return batch(rows[y[rows] < 2 * tasks], 2 * tasks)

    return [task(t) for t in range(TASKS)], so_far(valid, PREFIX), so_far(test, TASKS)


@jax.jit
def chain(hparams, key, tasks, valid, test):
    """The loss of validation after the first tasks; of the test, and its accuracy, after all."""

    def learn(carry, batch):
        params, fisher = learned(carry[0], hparams, batch, carry[1])
        return (params, fisher), told_apart(params, valid)

    (params, _), values = jax.lax.scan(learn, (start(None, None, key), nothing()), tasks)
    right = digits.logits(params, test["x"]).argmax(1) == test["y"].argmax(1)
    return values[PREFIX - 1], told_apart(params, test), right.mean()


def inputs(seed: int):
    tasks, valid, test = split(seed)
    return jax.tree.map(lambda *x: jnp.stack(x), *tasks), valid, test


def case(seed: int) -> Case:
    tasks, valid, _ = split(seed)
    given = inputs(seed)

    def judge(hparams, key):
        return Score(*chain(hparams, key, *given)[:2])

    return Case(
        problem=PROBLEM,
        params=start(None, None, jax.random.key(0)),
        hparams=strengths(USUAL),
        train=bilevel.stacked(jax.tree.map(lambda *x: jnp.stack(x), *tasks[:PREFIX])),
        valid=valid,
        method=METHOD,
        steps=20,
        box={name: (float(grid[0]), float(grid[-1])) for name, grid in GRID.items()},
        spread=strengths,
        judge=judge,
        model_state=nothing(),
    )


# --- The claim --------------------------------------------------------------------------------------------


def chosen(names: Sequence[str], seed: int, key):
    """The best of a grid on the first tasks; (strengths, accuracy after all, accuracies along the grid)."""
    grids = np.meshgrid(*(GRID[name][:: i + 1] for i, name in enumerate(names)))
    points = [dict(zip(names, at, strict=True)) for at in zip(*map(np.ravel, grids), strict=True)] or [{}]
    found = np.array([chain(strengths(point), key, *inputs(seed)) for point in points])
    best = int(np.nanargmin(found[:, 0]))
    return points[best], found[best, 2], found[:, 2]


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    key = jax.random.key(99)
    found = [[chosen(names, seed, key) for names in SETS] for seed in answers]
    ends = np.array([[own[1] for own in of] for of in found])
    none, l2, ewc, kd, kd_l2, kd_ewc = ends.mean(0)
    far, alike = kd >= FAR * ewc, max(kd_l2, kd_ewc) <= kd + SAME
    verdict = "holds" if far and alike else "holds in part" if far else "does not hold here"
    sentence = (
        f"of ten digits after five tasks {kd:.1%} are right with PredKD alone, {ewc:.1%} with EWC alone, "
        f"{l2:.1%} with L2 alone, {none:.1%} without any; PredKD with EWC {kd_ewc:.1%}, with L2 {kd_l2:.1%}."
    )

    def draw(ax):
        names = [" + ".join(names) or "none" for names in SETS]
        for seed, own in zip(answers, ends, strict=True):
            ax.plot(own, range(len(names)), "o", label=f"seed {seed}", alpha=0.8)
        for i, of in enumerate(zip(*found, strict=True)):
            ax.plot([max(own[2].max() for own in of)], [i], "|", color="0.4", markersize=14)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel("accuracy on ten digits after five tasks (bar: the best of the grid)")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="continual learning without rehearsal",
    source="Smith et al. 2022",
    claim="predictions that are held beat EWC alone by far, and need neither EWC nor L2 beside them",
    case=case,
    evidence=evidence,
    unit="cross-entropy after five tasks",
)
