"""Few-shot tasks: their check, their loss, and how they are drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.trees import readable


def check_task(batch, num_classes: int | None = None) -> None:
    """The arrays of one task fit each other; their values too, where they can be read.

    Raises:
      TypeError, ValueError: a part that is missing, a shape, integers where there are none, a label out of
        range.
    """
    if not isinstance(batch, dict) or not {"support", "labels", "query"} <= set(batch):
        got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise TypeError(f'batch must be a dict with "support", "labels" and "query", got {got}.')
    support, labels, query = (batch[name] for name in ("support", "labels", "query"))
    for name, x in (("support", support), ("query", query)):
        if jnp.ndim(x) != 2:
            raise ValueError(
                f'batch["{name}"] must have shape (examples, features), got {jnp.shape(x)}. Several tasks '
                "at once "
                "are those of bilevel.lift(problem)."
            )
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f'batch["{name}"] must be floating, got dtype {jnp.result_type(x)}.')
    if jnp.shape(support)[1] != jnp.shape(query)[1]:
        raise ValueError(
            "support and query must have the same features, got shapes "
            f"{jnp.shape(support)} and {jnp.shape(query)}."
        )
    if jnp.shape(labels) != jnp.shape(support)[:1]:
        raise ValueError(
            f'batch["labels"] must have one entry for each row of support, {jnp.shape(support)[:1]}, got '
            f"{jnp.shape(labels)}."
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f'batch["labels"] must be integers, got dtype {jnp.result_type(labels)}.')
    if num_classes is not None and readable(labels):
        outside = [int(x) for x in np.unique(labels) if not 0 <= x < num_classes]
        if outside:
            raise ValueError(f'batch["labels"] must be in [0, {num_classes}), got {outside[:5]}.')


def one_hot(labels, num_classes: int, dtype) -> jax.Array:
    """Labels as rows of weights; nan where a label is out of range, so that it is not overlooked."""
    known = (labels >= 0) & (labels < num_classes)
    rows = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return jnp.where(known[:, None], rows, jnp.nan)


def strengths(hparams, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prior weight, temperature and scale, 1 where left out; nan where a temperature is not positive.

    Raises:
      ValueError: one that is no scalar, or a temperature that is known and not positive.
    """
    out = []
    for name in ("prior_weight", "temperature", "scale"):
        value = hparams.get(name, 1.0)
        if jnp.ndim(value) != 0:
            raise ValueError(
                f'hparams["{name}"] must be a scalar in one step, got shape {jnp.shape(value)}. An entry '
                "for each "
                f'step is declared to the estimator: bilevel.unrolled(per_step={{"{name}": True}}).'
            )
        if name == "temperature" and readable(value) and not np.asarray(value) > 0:
            raise ValueError(
                f'hparams["temperature"] must be positive, got {value}; constrain it: bilevel.positive().'
            )
        out.append(jnp.asarray(value, dtype))
    prior_weight, temperature, scale = out
    return prior_weight, jnp.where(temperature > 0, temperature, jnp.nan), scale


def query_loss(params, hparams, batch):
    """Cross-entropy of assignments against true classes, an outer loss; ``accuracy`` is its metric.

    Args:
      params: with ``log_assignments`` (q, K).
      hparams: not used.
      batch: with ``labels`` (q,), the classes of the queries.

    Returns:
      ``(mean of -log u_n[label_n], {"accuracy": share of queries whose largest assignment is right})``.
    """
    del hparams
    log_u, labels = params["log_assignments"], batch["labels"]
    right = one_hot(labels, log_u.shape[1], log_u.dtype)
    loss = -jnp.mean(jnp.sum(jnp.where(right == 0, 0, right * log_u), axis=1))
    accuracy = jnp.mean(jnp.argmax(log_u, axis=1) == labels, dtype=log_u.dtype)
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
            f"the smallest class has {counts.min()} examples and the smallest {present} have {fewest} "
            "beside their "
            f"support: too few for shots={shots} and queries={queries}."
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
