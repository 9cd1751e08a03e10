"""The kernel of a graph, tuned on some semi-supervised tasks and judged on tasks never seen.

Balcan, Nguyen and Sharma (2025, "Sample complexity of data-driven tuning") have as their second example a
network on a graph whose adjacency is a polynomial kernel, ``A_ij = (similarity_ij + alpha)^Delta``. Here a
task is 300 of scikit-learn's digits, of which 20 have labels. There is one linear layer (ours; the paper has
two layers)::

    inner = mean over labelled i of ce(w^T sum_j a_ij x_j, y_i) + l2 / 2 |w|^2,    a_i = A_i / sum_j A_ij
    outer = mean ce on 60 other nodes

with w strictly convex, so that implicit hypergradients are exact. x are 16 principal components of all
pictures, the similarity is the cosine of pixels, and Delta is 32. All arms tune alpha and l2 on 16 tasks made
of one half of the digits, and are judged on 32 of the other half. The claim is tested by the gap of
`interpolated_activation`, of a grid of alpha, with and without l2, on tasks of all digits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.digits import pictures
from benchmarks.problems.interpolated_activation import gap_evidence, optimism
from benchmarks.problems.paper import Case, Evidence, Paper, Score

NODES, LABELLED, HELD_OUT, FEATURES, CLASSES = 300, 20, 60, 16, 10
DELTA, USUAL = 32, {"offset": 1.0, "l2": 0.05}
TASKS, UNSEEN, POOL = 16, 32, 192
OFFSETS, PENALTIES = np.geomspace(0.02, 20, 9), np.geomspace(1e-4, 1, 5)


def features(hparams, batch):
    """Of the nodes in question, each a mean over the graph."""
    # The divisor, which the rows' sums cancel, keeps float32 from overflow.
    kernel = ((batch["similarity"] + hparams["offset"]) / (1 + hparams["offset"])) ** DELTA
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ batch["x"]


def cross_entropy(params, made, labels):
    logits = made @ params["w"] + params["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def penalised(params, hparams, made, labels):
    return cross_entropy(params, made, labels) + hparams["l2"] / 2 * sum(
        jnp.sum(p**2) for p in params.values()
    )


TASK = bilevel.Problem(
    lambda params, hparams, batch: penalised(params, hparams, features(hparams, batch), batch["y"]),
    lambda params, hparams, batch: cross_entropy(params, features(hparams, batch), batch["y"]),
    constraints=bilevel.positive(),
)
PROBLEM = bilevel.lift(TASK)
SOLVER = bilevel.lbfgs(max_steps=200, atol=1e-4)
METHOD = bilevel.alternating(bilevel.implicit(bilevel.cg(max_steps=200)), SOLVER, optax.adam(0.2, b2=0.9))

# The same inner problem, with features that are made once.
SOLVE = bilevel.argmin(
    bilevel.Problem(
        lambda params, hparams, batch: penalised(params, hparams, *batch),
        lambda params, hparams, batch: cross_entropy(params, *batch),
    ),
    SOLVER,
)


def zeros(*lead: int):
    return {"w": jnp.zeros((*lead, FEATURES, CLASSES)), "b": jnp.zeros((*lead, CLASSES))}


def held_out(hparams, train, valid):
    """Cross-entropy of each task at the inner solution."""

    def one(train, valid):
        params = SOLVE(hparams, (features(hparams, train), train["y"]), zeros())
        return TASK.outer(params, hparams, valid)

    return jax.vmap(one)(train, valid)


@functools.cache
def digits():
    """Cosines between all pictures, principal components of unit variance, labels."""
    x, y = pictures()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centred = x - x.mean(0)
    components = np.linalg.svd(centred, full_matrices=False)[0][:, :FEATURES] * np.sqrt(len(y))
    return (unit @ unit.T).astype(np.float32), components.astype(np.float32), y.astype(np.int32)


def tasks(rows: np.ndarray, count: int, rng: np.random.Generator):
    """Training and validation data of so many, each of some of the rows; as many labels of each class."""
    similarity, x, y = digits()

    def batch(nodes, chosen):
        return {"similarity": similarity[np.ix_(chosen, nodes)], "x": x[nodes], "y": y[chosen]}

    def task():
        nodes = rng.permutation(rows)[:NODES]
        by_class = np.argsort(y[nodes], kind="stable")
        ranks = np.concatenate([np.arange(n) for n in np.bincount(y[nodes], minlength=CLASSES)])
        first = by_class[ranks < LABELLED // CLASSES]
        others = np.setdiff1d(np.arange(NODES), first)[:HELD_OUT]
        return batch(nodes, nodes[first]), batch(nodes, nodes[others])

    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *(task() for _ in range(count)))


@functools.cache
def split(seed: int):
    """Tasks to tune on, and unseen ones, of two halves of the digits."""
    rng = np.random.default_rng(seed)
    one, two = np.array_split(rng.permutation(len(digits()[2])), 2)
    return tasks(one, TASKS, rng), tasks(two, UNSEEN, rng)


@jax.jit
def judged(hparams, own, unseen) -> Score:
    return Score(held_out(hparams, *own).mean(), held_out(hparams, *unseen).mean())


def case(seed: int) -> Case:
    own, unseen = split(seed)
    return Case(
        problem=PROBLEM,
        params=zeros(TASKS),
        hparams={name: jnp.float32(value) for name, value in USUAL.items()},
        train=own[0],
        valid=own[1],
        method=METHOD,
        steps=100,
        box={"offset": (0.01, 30.0), "l2": (1e-5, 10.0)},
        spread=lambda numbers: {name: jnp.float32(value) for name, value in numbers.items()},
        judge=lambda hparams, key: judged(hparams, own, unseen),
    )


# --- The claim --------------------------------------------------------------------------------------------


@functools.cache
def table() -> np.ndarray:
    """Validation losses, shape (offsets, penalties, tasks), of tasks of all digits."""
    rng = np.random.default_rng(9999)
    pool, found = tasks(np.arange(len(digits()[2])), POOL, rng), jax.jit(held_out)
    pairs = [{"offset": jnp.float32(a), "l2": jnp.float32(b)} for a in OFFSETS for b in PENALTIES]
    return np.stack([found(pair, *pool) for pair in pairs]).reshape(len(OFFSETS), len(PENALTIES), POOL)


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    losses = table()
    usual = int(np.argmin(np.abs(np.log(PENALTIES / 1e-3))))
    kinds = {"alpha alone": losses[:, usual], "alpha and l2": losses.reshape(-1, POOL)}
    return gap_evidence(kinds, optimism(cases, answers), TASKS)


PAPER = Paper(
    title="the kernel of a graph",
    source="Balcan, Nguyen and Sharma 2025",
    claim="what is tuned on N tasks is the nearer to its value on unseen ones the more tasks there are",
    case=case,
    evidence=evidence,
    unit="cross-entropy on unseen tasks",
)
