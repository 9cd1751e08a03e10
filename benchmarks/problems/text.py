"""The three kinds of task that BO-REP was introduced with, on real prose and with a small recurrent network.

Hao, Gong and Liu (2024, arXiv:2401.09587) tune recurrent networks on reviews and tweets; here windows of 48
characters from `benchmarks.problems.prose` are classified by subject, of cleaning by the kind of text: where
subjects can hardly be told apart, nor can wrong labels. The encoder is a gated recurrent unit
of 16 units whose states are averaged over the window, ``f(w, text)``; a head makes logits of it::

    penalty         inner = mean ce + 1/2 sum_m exp(t_m) |w_m|^2     over encoder and head; hyperparameters
                    outer = mean ce                                  are the t_m, one per matrix        (1)
    representation  inner = mean ce(head of the row's task) + 1e-3 / 2 |heads|^2
                    outer = mean ce                                  the encoder is the hyperparameter  (2)
    cleaning        inner = mean_i weight_i ce_i + 1e-4 / 2 |w|^2    over encoder and head; weights are
                    outer = mean ce                                  between 0 and 1, one per example   (3)

Eq. (2) is strongly convex in the heads; (1) and (3) are only where the penalty outweighs the network's own
curvature, which tasks of this kind share with those of the paper. Wrong labels of (3) are drawn once;
validation and test labels are clean. In (1) and (3) params begin at a network that was trained for 400 steps
with the first hyperparameters. The metric is loss and accuracy on test windows; of (2) on tasks, triples of
subjects, other than those learned from, with heads fitted to these tasks' training windows. (1) also
takes reviews, `benchmarks.problems.reviews`, where their package is installed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import prose

UNITS, BATCH, BEGUN = 16, 32, 400
SYMBOLS = len(prose.ALPHABET)
FOUR = tuple(prose.SUBJECTS)[:4]
SIX = tuple(prose.SUBJECTS)[:6]
TASKS, WAYS = 6, 3
HEAD_L2, CLEANING_L2 = 1e-3, 1e-4


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A problem with its data and a start.

    Args:
      problem: a constant of this module, so that programs are compiled once for all seeds.
      params: where training begins.
      hparams: where they begin; natural units.
      train: training rows; "i" numbers them where there is a weight for each.
      valid: validation rows.
      test: what the metric takes.
      metric: ``(params, hparams, test) -> (loss, accuracy)``, traceable.
      batch_size: of both levels.
      wrong: of cleaning, which training labels are.
    """

    problem: bilevel.Problem
    params: Any
    hparams: Any
    train: Any
    valid: Any
    test: Any
    metric: Callable
    batch_size: int = BATCH
    wrong: np.ndarray | None = None

    def sources(self, fixed: bool = False):
        """Minibatches of both levels; ``fixed`` ones where a method keeps a table."""
        return tuple(
            bilevel.minibatches(rows, self.batch_size, fixed=fixed) for rows in (self.train, self.valid)
        )


# --- Network ----------------------------------------------------------------------------------------------


def first_encoder(key):
    """Normal weights, no biases."""
    key_in, key_state = jax.random.split(key)
    return {
        "in": 0.5 * jax.random.normal(key_in, (SYMBOLS, 3 * UNITS), jnp.float32),
        "state": jax.random.normal(key_state, (UNITS, 3 * UNITS), jnp.float32) / UNITS**0.5,
        "bias": jnp.zeros(3 * UNITS, jnp.float32),
    }


def first_head(classes: int):
    return {
        "out": jnp.zeros((UNITS, classes), jnp.float32),
        "shift": jnp.zeros(classes, jnp.float32),
    }


def encode(encoder, text):
    """The mean of the states of a gated recurrent unit (Cho et al., 2014), shape (rows, UNITS)."""
    drive = jnp.swapaxes(encoder["in"][text] + encoder["bias"][None, None], 0, 1)

    def step(state, x):
        a = state @ encoder["state"]
        gates = jax.nn.sigmoid(x[:, : 2 * UNITS] + a[:, : 2 * UNITS])
        reset, update = gates[:, :UNITS], gates[:, UNITS:]
        new = jnp.tanh(x[:, 2 * UNITS :] + reset * a[:, 2 * UNITS :])
        state = state + update * (new - state)
        return state, state

    first = jnp.zeros((text.shape[0], UNITS), drive.dtype)
    return jnp.mean(jax.lax.scan(step, first, drive)[1], axis=0)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def scored(logits, labels):
    """Mean loss and accuracy."""
    right = jnp.argmax(logits, axis=-1) == labels
    return jnp.mean(cross_entropy(logits, labels)), jnp.mean(right, dtype=jnp.float32)


def squares(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


# --- A classifier, Eq. (1) and (3) ------------------------------------------------------------------------


def classify(params, batch):
    return encode(params, batch["text"]) @ params["out"] + params["shift"][None]


def losses(params, batch):
    return cross_entropy(classify(params, batch), batch["label"])


def outer(params, hparams, batch):
    del hparams
    return jnp.mean(losses(params, batch))


def penalised(params, log_strength, batch):
    l2 = sum(jnp.exp(log_strength[name]) * squares(params[name]) for name in log_strength)
    return jnp.mean(losses(params, batch)) + 0.5 * l2


def weighted(params, weight, batch):
    return jnp.mean(weight[batch["i"]] * losses(params, batch)) + 0.5 * CLEANING_L2 * squares(params)


def classified(params, hparams, test):
    del hparams
    return scored(classify(params, test), test["label"])


# Stronger penalties than exp(-3) end in the saddle where all weights are zero.
PENALTY = bilevel.Problem(penalised, outer, constraints=bilevel.interval(-12, -3))
CLEANING = bilevel.Problem(weighted, outer, constraints=bilevel.interval(0, 1))


def rows(windows: prose.Windows) -> dict:
    return {"text": jnp.asarray(windows.text), "label": jnp.asarray(windows.label)}


def windows(classes, sizes, seed: int) -> list[prose.Windows]:
    """Of each subject, or kind of text, so many windows in each split."""
    known = prose.SUBJECTS | prose.KINDS
    return prose.splits([known[name] for name in classes], sizes, np.random.default_rng(seed))


def begun(problem, hparams, train, seed: int, steps: int):
    """Params after some plain training, where a tuner is switched on."""
    key_start, key_data = jax.random.split(jax.random.key(seed))
    params = first_encoder(key_start) | first_head(1 + int(jnp.max(train["label"])))
    return _trained(problem, params, hparams, bilevel.minibatches(train, BATCH), key_data, steps)


@functools.partial(jax.jit, static_argnums=0)
def _trained(problem, params, hparams, train, key, steps):
    optimizer = optax.adam(1e-2)

    def step(i, carry):
        params, state = carry
        grads = jax.grad(problem.inner)(params, hparams, train.batch(key, i))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


def of_subjects(sizes, seed: int) -> list[prose.Windows]:
    return windows(FOUR, sizes, seed)


def penalty(
    seed: int, log_strength: float = -6.0, sizes=(200, 400, 400), steps: int = BEGUN, read=of_subjects
) -> TextTask:
    """Few training rows; the seed draws the splits and the start. ``read``: `reviews.windows` for reviews."""
    train, valid, test = map(rows, read(sizes, seed))
    hparams = dict.fromkeys(("in", "state", "bias", "out", "shift"), jnp.float32(log_strength))
    params = begun(PENALTY, hparams, train, seed, steps)
    return TextTask(PENALTY, params, hparams, train, valid, test, classified)


def flipped(labels: np.ndarray, noise: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """With probability ``noise`` another label, all alike likely."""
    other = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.where(rng.random(len(labels)) < noise, other, labels).astype(labels.dtype)


def cleaning(seed: int, noise: float = 0.3, sizes=(400, 400, 400), steps: int = BEGUN) -> TextTask:
    """All weights begin at 1/2; the seed draws the splits, the start and the wrong labels."""
    parts = windows(prose.KINDS, sizes, seed)
    train, valid, test = map(rows, parts)
    labels = flipped(parts[0].label, noise, len(FOUR), np.random.default_rng((seed, 1)))
    train = train | {"label": jnp.asarray(labels), "i": jnp.arange(len(labels))}
    weight = jnp.full(len(labels), 0.5, jnp.float32)
    params = begun(CLEANING, weight, train, seed, steps)
    wrong = labels != parts[0].label
    return TextTask(CLEANING, params, weight, train, valid, test, classified, wrong=wrong)


# --- An encoder for many tasks, Eq. (2) -------------------------------------------------------------------


def task_losses(heads, encoder, batch):
    out, shift = heads["out"][batch["task"]], heads["shift"][batch["task"]]
    logits = jnp.einsum("ru,ruc->rc", encode(encoder, batch["text"]), out) + shift
    return cross_entropy(logits, batch["label"])


def fit_heads(heads, encoder, batch):
    return jnp.mean(task_losses(heads, encoder, batch)) + 0.5 * HEAD_L2 * squares(heads)


def judge_heads(heads, encoder, batch):
    return jnp.mean(task_losses(heads, encoder, batch))


REPRESENTATION = bilevel.Problem(fit_heads, judge_heads)


def on_new_tasks(heads, encoder, test):
    """Heads fitted by Newton's method to the encoded training windows of new tasks, on their test windows."""
    del heads
    support, query = (with_one(encode(encoder, test[part])) for part in ("support", "query"))

    def one(task):
        head = newton_head(
            support[task["train"]], jax.nn.one_hot(task["train_label"], WAYS, dtype=support.dtype)
        )
        return scored(query[task["test"]] @ head, task["test_label"])

    return jax.tree.map(jnp.mean, jax.lax.map(one, test["tasks"]))


def with_one(states):
    return jnp.concatenate([states, jnp.ones_like(states[:, :1])], axis=1)


def newton_head(states, targets):
    """The minimiser over W of ``mean ce(states W, targets) + HEAD_L2 / 2 |W|^2``, shape (states, classes)."""
    n, size, classes = *states.shape, targets.shape[1]

    def newton(_, head):
        chance = jax.nn.softmax(states @ head)
        grad = states.T @ (chance - targets) / n + HEAD_L2 * head
        spread = chance[:, :, None] * (jnp.eye(classes, dtype=chance.dtype)[None] - chance[:, None, :])
        pairs = (states[:, :, None] * states[:, None, :]).reshape(n, -1)
        hessian = (pairs.T @ spread.reshape(n, -1) / n).reshape(size, size, classes, classes)
        matrix = hessian.transpose(0, 2, 1, 3).reshape(size * classes, -1)
        matrix += HEAD_L2 * jnp.eye(size * classes, dtype=head.dtype)
        return head - jnp.linalg.solve(matrix, grad.ravel()).reshape(head.shape)

    return jax.lax.fori_loop(0, 8, newton, jnp.zeros((size, classes), states.dtype))


def members(labels: np.ndarray, chosen) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a task's classes, and the classes' numbers within the task."""
    found = np.flatnonzero(np.isin(labels, chosen))
    return found, np.searchsorted(chosen, labels[found]).astype(np.int32)


def of_tasks(part: prose.Windows, tasks) -> dict:
    """The rows of each task after one another."""
    found = [members(part.label, task) for task in tasks]
    index = np.concatenate([rows for rows, _ in found])
    return {
        "text": jnp.asarray(part.text[index]),
        "label": jnp.asarray(np.concatenate([label for _, label in found])),
        "task": jnp.asarray(np.repeat(np.arange(len(tasks), dtype=np.int32), [len(r) for r, _ in found])),
    }


def triples(classes: int) -> np.ndarray:
    """All sets of WAYS classes, sorted."""
    grid = np.stack(np.meshgrid(*[np.arange(classes)] * WAYS, indexing="ij"), -1).reshape(-1, WAYS)
    return grid[(np.diff(grid, axis=1) > 0).all(axis=1)]


def representation(seed: int, sizes=(160, 240, 240)) -> TextTask:
    """The seed draws the splits, which triples of subjects are tasks to learn from, and the start."""
    train, valid, query = windows(SIX, sizes, seed)
    order = np.random.default_rng((seed, 1)).permutation(20)
    known, new = np.split(triples(len(SIX))[order], [TASKS])
    found = [(*members(train.label, t), *members(query.label, t)) for t in new]
    names = ("train", "train_label", "test", "test_label")
    test = {
        "support": jnp.asarray(train.text),
        "query": jnp.asarray(query.text),
        "tasks": {n: jnp.asarray(np.stack(a)) for n, a in zip(names, zip(*found, strict=True), strict=True)},
    }
    heads = jax.tree.map(lambda x: jnp.tile(x, (TASKS, *[1] * x.ndim)), first_head(WAYS))
    encoder = first_encoder(jax.random.key(seed))
    rows_of = (of_tasks(part, known) for part in (train, valid))
    return TextTask(REPRESENTATION, heads, encoder, *rows_of, test, on_new_tasks, batch_size=64)
