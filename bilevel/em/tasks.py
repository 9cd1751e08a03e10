"""Few-shot tasks: their check, their weights, their loss, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.trees import readable

_STRENGTHS = ("prior_weight", "temperature", "scale")


def check_task(batch, num_classes: int) -> None:
    """The arrays of one task fit each other; their labels too, where they can be read.

    Raises:
      TypeError, ValueError: a part that is missing, a shape, integers where there are none, a label out of
        range.
    """
    if not isinstance(batch, dict) or not {"support", "labels", "query"} <= set(batch):
        raise TypeError(f'batch must be a dict with "support", "labels" and "query", got {_parts(batch)}.')
    support, labels, query = (batch[name] for name in ("support", "labels", "query"))
    for name, x in (("support", support), ("query", query)):
        check_features(f'batch["{name}"]', x, " Several tasks at once are those of bilevel.lift(problem).")
    if support.shape[1] != query.shape[1]:
        raise ValueError(
            f"support and query must have the same features, got shapes {support.shape} and {query.shape}."
        )
    if query.shape[0] == 0:
        raise ValueError(f'batch["query"] must have at least one example, got shape {query.shape}.')
    _check_labels(labels, support.shape[:1], "row of support", num_classes)


def check_features(name: str, x, hint: str = "") -> None:
    """Examples, row by row; ``hint``: what is said of another shape."""
    _check_array(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (examples, features), got {x.shape}.{hint}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, got dtype {x.dtype}.")


def _check_array(name: str, x) -> None:
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}; numpy.asarray makes one.")


def _check_labels(labels, shape: tuple[int, ...], of: str, num_classes: int) -> None:
    """Labels are whole numbers, one for each row, in range where that can be read."""
    _check_array('batch["labels"]', labels)
    if labels.shape != shape:
        raise ValueError(
            f'batch["labels"] must have one entry for each {of}, shape {shape}, got {labels.shape}.'
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f'batch["labels"] must be integers, got dtype {labels.dtype}.')
    if readable(labels):
        outside = [int(x) for x in np.unique(labels) if not 0 <= x < num_classes]
        if outside:
            raise ValueError(f'batch["labels"] must be in [0, {num_classes}), got {outside[:5]}.')


def _parts(tree):
    """What a dict holds, or the type of something else."""
    return sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__


def part(params, name: str, init: str) -> jax.Array:
    """The array of params of two axes under a name.

    Raises:
      TypeError, ValueError: it is not there, or has another number of axes.
    """
    if not isinstance(params, Mapping) or name not in params:
        raise TypeError(f'params must be a dict with "{name}", as {init} makes it, got {_parts(params)}.')
    if jnp.ndim(params[name]) != 2:
        raise ValueError(f'params["{name}"] must have two axes, got shape {jnp.shape(params[name])}.')
    return jnp.asarray(params[name])


def one_hot(labels, num_classes: int, dtype) -> jax.Array:
    """Labels as rows of weights; nan where a label is out of range, so that it is not overlooked."""
    rows = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return jnp.where(_known(labels, num_classes)[:, None], rows, jnp.nan)


def _known(labels, num_classes: int):
    return (labels >= 0) & (labels < num_classes)


class Weights(NamedTuple):
    """How much each example belongs to each class: what Eq. (3) divides by ``mass``.

    Those of a class that no label names are in units of the largest of them: in float32 its sum may be so
    small that the square of its inverse, which a derivative has, is infinite, or be 0.

    Args:
      support: (s, K).
      query: (q, K), at most 1.
      mass: (K,), their sum, at least 1.
      unit: (K,), of the three above; 1 where a label names the class.
      empty: (K,), whether nothing belongs to the class, all assignments being log 0.
    """

    support: jax.Array
    query: jax.Array
    mass: jax.Array
    unit: jax.Array
    empty: jax.Array

    def shares(self) -> jax.Array:
        """Of the queries: Eq. (2)."""
        return self.unit * self.query.mean(axis=0)

    def means(self, support, query) -> jax.Array:
        """Of rows of each class, (K, d): Eq. (3) where the likelihood has a mean."""
        return (self.support.T @ support + self.query.T @ query) / self.mass[:, None]


def weigh(labels, log_u) -> Weights:
    """From the labels of the support and the assignments of queries."""
    known = one_hot(jnp.asarray(labels), log_u.shape[1], log_u.dtype)
    counts = known.sum(axis=0)
    largest = jax.lax.stop_gradient(jnp.where(counts > 0, 0, log_u.max(axis=0)))
    empty = (counts == 0) & (largest == -jnp.inf)
    largest = jnp.where(empty, 0, largest)
    u = jnp.exp(log_u - largest[None])
    mass = counts + u.sum(axis=0)
    return Weights(known, u, jnp.where(empty, 1, mass), jnp.exp(largest), empty)


def strengths(hparams, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prior weight, temperature and scale, 1 where left out; nan where one of the last two is not positive.

    Raises:
      TypeError, ValueError: no dict, a name that it does not have, a value that is no scalar, or one of the
        last two that is known and not positive.
    """
    if not isinstance(hparams, Mapping):
        raise TypeError(f"hparams must be a dict of {', '.join(_STRENGTHS)}, got {hparams!r:.100}.")
    unknown = [repr(name) for name in hparams if name not in _STRENGTHS]
    if unknown:
        raise ValueError(
            f"hparams has {', '.join(unknown)}, and EM takes {', '.join(_STRENGTHS)}. What else there is to "
            "learn is taken out by a function around the step."
        )
    values = []
    for name in _STRENGTHS:
        hint = (
            f'; one for each step is declared to the estimator: bilevel.unrolled(per_step={{"{name}": True}})'
        )
        value = hparams.get(name, 1.0)
        values.append(scalar(f'hparams["{name}"]', value, dtype, name != "prior_weight", hint))
    prior_weight, temperature, scale = values
    return prior_weight, temperature, scale


def scalar(name: str, value, dtype, positive: bool, hint: str = "") -> jax.Array:
    """A number as an array of the dtype; nan where it should be positive, is not, and cannot be read."""
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    kind = getattr(value, "dtype", np.dtype(float))
    real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if isinstance(value, bool) or not isinstance(value, numbers) or not real:
        raise TypeError(f"{name} must be a number, got {value!r:.100}.")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}{hint}.")
    if positive and readable(value) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be positive, got {value}; where it is learned, bilevel.positive().")
    value = jnp.asarray(value, dtype)
    return jnp.where(value > 0, value, jnp.nan) if positive else value


def query_loss(params, hparams, batch):
    """Cross-entropy of assignments against true classes, an outer loss; ``accuracy`` is its metric.

    Args:
      params: with ``log_assignments`` (q, K).
      hparams: not used.
      batch: with ``labels`` (q,), the classes of the queries.

    Returns:
      ``(mean of -log u_n[label_n], {"accuracy": share of queries whose largest assignment is right})``.

    Raises:
      TypeError, ValueError: labels of another shape, not integers or out of range. Where they are traced and
        cannot be looked at, both results are nan instead.
    """
    del hparams
    log_u = part(params, "log_assignments", "gaussian_init or dirichlet_init")
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise TypeError(f'batch must be a dict with "labels", the classes of queries, got {_parts(batch)}.')
    _check_labels(batch["labels"], log_u.shape[:1], "query", log_u.shape[1])
    labels = jnp.asarray(batch["labels"])
    right = one_hot(labels, log_u.shape[1], log_u.dtype)
    loss = -jnp.mean(jnp.sum(jnp.where(right == 0, 0, right * log_u), axis=1))
    hits = (jnp.argmax(log_u, axis=1) == labels).astype(log_u.dtype)
    accuracy = jnp.mean(jnp.where(_known(labels, log_u.shape[1]), hits, jnp.nan))
    return loss, {"accuracy": accuracy}


def sample_tasks(
    features, labels, num_tasks: int, shots: int, present: int, queries: int = 75, seed: int = 0
):
    """Tasks as few-shot benchmarks draw them, stacked for `bilevel.lift`.

    The support of a task has ``shots`` examples of every class. Its queries are drawn uniformly from all
    other examples of ``present`` classes, themselves drawn for each task, so that most classes may not occur.

    Args:
      features: of shape (n, d).
      labels: of shape (n,), whole numbers from 0 on, each class with more than ``shots`` examples.
      num_tasks: how many.
      shots: labelled examples of each class.
      present: classes that occur among the queries, at most all.
      queries: of each task.
      seed: the same tasks for the same one.

    Returns:
      ``(train, valid)`` of numpy arrays: ``train`` has ``support`` (num_tasks, K shots, d), ``labels``
      (num_tasks, K shots) and ``query`` (num_tasks, queries, d), ``valid`` has ``labels`` (num_tasks,
      queries).

    Raises:
      TypeError, ValueError: arrays that do not fit, a class with too few examples.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must have shape (n, d) and labels (n,), got {features.shape} and {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    classes, counts = np.unique(labels, return_counts=True)
    if not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(f"labels must be 0, 1, ..., each of them used, got {classes.tolist()[:20]}.")
    num_tasks = validation.whole_number("num_tasks", num_tasks, 1)
    shots = validation.whole_number("shots", shots, 1)
    present = validation.whole_number("present", present, 1)
    queries = validation.whole_number("queries", queries, 1)
    if present > len(classes):
        raise ValueError(f"present must be at most the number of classes, {len(classes)}, got {present}.")
    fewest = int(np.sort(counts)[:present].sum()) - present * shots
    if counts.min() <= shots or fewest < queries:
        raise ValueError(
            f"the smallest class has {counts.min()} examples and the smallest {present} have {fewest} beside "
            f"their support: too few for shots={shots} and queries={queries}."
        )
    rng = np.random.default_rng(validation.whole_number("seed", seed, 0))
    rows = [_drawn(rng, labels, len(classes), shots, present, queries) for _ in range(num_tasks)]
    support, query = (np.stack(part) for part in zip(*rows, strict=True))
    train = {"support": features[support], "labels": labels[support], "query": features[query]}
    return train, {"labels": labels[query]}


def _drawn(rng, labels, num_classes: int, shots: int, present: int, queries: int):
    """Rows of the support, class after class, and of the queries of one task."""
    order = rng.permutation(len(labels))
    by_class = [order[labels[order] == k] for k in range(num_classes)]
    chosen = rng.choice(num_classes, present, replace=False)
    pool = np.concatenate([by_class[k][shots:] for k in chosen])
    return np.concatenate([rows[:shots] for rows in by_class]), rng.choice(pool, queries, replace=False)
