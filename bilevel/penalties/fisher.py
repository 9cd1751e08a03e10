"""Elastic weight consolidation: the distance from where an earlier task ended, in its Fisher information.

For a model p(y | outputs) with outputs z = predict(params, x), J = dz/dparams and the score
``g(y) = d log p(y | z) / dz``, the diagonal is, averaged over inputs x::

    F_i = E_y [ (J^T g(y))_i^2 ]                                                                    (1)

with y drawn from the model, exactly, or with the labels given ("empirical"). As z are the natural parameters
of p here, the former is the diagonal of the Gauss-Newton matrix of the loss, and that of its Hessian where
predict is linear: `ewc` with a strength of n is then the loss of n examples to second order, but for what
couples params.

References:
  Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017, arXiv:1612.00796.
  Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation for natural gradient
  descent", 2019, arXiv:1905.12558.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.penalties.strengths import laid_out, same_tree, total
from bilevel.problem import PyTree, callable_of
from bilevel.trees import readable
from bilevel.vectors import cast, widened

_FAMILIES = "categorical", "bernoulli", "gaussian"


def ewc(params, strengths, start, fisher) -> jax.Array:
    """``sum_i s_i F_i (w_i - start_i)^2 / 2``.

    Args:
      params: any pytree of floating arrays.
      strengths: as of `bilevel.penalties.l2`; the number of examples of the task before, if that task is to
        count as much as it did.
      start: like params, where the task before ended.
      fisher: like params, of `fisher_diagonal` there. Both are better handed in with the batch than closed
        over.

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: as `bilevel.penalties.l2_to`, for fisher too.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> print(penalties.ewc(jnp.array([1.0, 3.0]), 2.0, jnp.ones(2), fisher=jnp.array([5.0, 0.5])))
      2.0
    """
    pairs = laid_out(params, strengths)
    starts, weights = (same_tree(*at, params) for at in (("start", start), ("fisher", fisher)))
    return total(
        jnp.sum(s * jnp.asarray(f, w.dtype) * jnp.square(w - jnp.asarray(w0, w.dtype))) / 2
        for (w, s), w0, f in zip(pairs, starts, weights, strict=True)
    )


def fisher_diagonal(
    predict: Callable, params, inputs, labels=None, family: str = "categorical", batch_size: int = 1
) -> PyTree:
    """Eq. (1): the diagonal of the Fisher information of an example.

    Args:
      predict: ``(params, inputs) -> outputs``, for inputs with examples along the leading axis of every leaf,
        each of which has its outputs without a look at the others.
      params: any pytree of floating arrays.
      inputs: a pytree of arrays.
      labels: None for the expectation over the model's own labels, without sampling; for the empirical one
        whole numbers, shape (examples,), or values of the shape of outputs for the other families.
      family: p. "categorical": outputs are logits, shape (examples, classes). "bernoulli": logits of any
        shape, independent. "gaussian": means of any shape, independent with variance 1.
      batch_size: examples at once. Memory: ``batch_size`` times outputs of an example times params.

    Returns:
      Like params; summed up in float32 at least.

    Raises:
      TypeError, ValueError: an unknown family, outputs or labels of another shape, labels that can be read
        and are no classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> predict = lambda w, x: x @ w
      >>> print(penalties.fisher_diagonal(predict, jnp.zeros(2), x, family="gaussian"))
      [1. 2.]
    """
    callable_of("predict", predict, "(params, inputs) -> outputs")
    validation.one_of("family", family, _FAMILIES)
    params = validation.floating(params, "params")
    inputs = jax.tree.map(jnp.asarray, inputs)
    labels = None if labels is None else jnp.asarray(labels)
    count = _examples(predict, params, inputs, labels, family)
    size = min(validation.whole_number("batch_size", batch_size, 1), count)

    def squares(row):
        x, y = jax.tree.map(lambda a: a[row][None], (inputs, labels))
        z, pull = jax.vjp(lambda p: predict(p, x)[0], params)
        scores = _expected(z, family) if y is None else _observed(z, y[0], family)
        pulled = widened(jax.vmap(lambda g: pull(g)[0])(scores))
        return jax.tree.map(lambda g: jnp.sum(jnp.square(g), 0), pulled)

    def add(sums, rows):
        # The last batch is filled up with rows that do not count.
        more = jax.vmap(squares)(rows % count)
        counted = (rows < count).astype(jnp.float32)
        return jax.tree.map(lambda s, m: s + jnp.tensordot(counted.astype(m.dtype), m, 1), sums, more), None

    rows = jnp.arange(-(-count // size) * size).reshape(-1, size)
    sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, widened(params)), rows)
    return cast(jax.tree.map(lambda s: s / count, sums), params)


def _expected(z, family: str):
    """Scores whose squares sum to the expectation in (1), weighted by the square roots of probabilities."""
    eye = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
    if family == "categorical":
        p = jax.nn.softmax(z)
        return jnp.sqrt(p)[:, None] * (eye - p[None])
    if family == "bernoulli":
        return eye * jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))[None]
    return eye


def _observed(z, y, family: str):
    if family == "categorical":
        return (jax.nn.one_hot(y, z.size, dtype=z.dtype) - jax.nn.softmax(z))[None]
    return (y.astype(z.dtype) - (jax.nn.sigmoid(z) if family == "bernoulli" else z))[None]


def _examples(predict, params, inputs, labels, family: str) -> int:
    """How many there are; ValueError where shapes do not fit."""
    out = jax.eval_shape(predict, params, inputs)
    counts = {x.shape[:1] for x in jax.tree.leaves((inputs, out))}
    if not hasattr(out, "shape") or len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            "inputs and predict(params, inputs) must have one leading axis of examples, got "
            f"{validation.describe(inputs)} and {validation.describe(out)}."
        )
    if family == "categorical" and len(out.shape) != 2:
        raise ValueError(
            f"predict must return logits of shape (examples, classes), got {out.shape}; of one logit "
            'for each example take family="bernoulli".'
        )
    wanted = out.shape[:1] if family == "categorical" else out.shape
    if labels is not None and labels.shape != wanted:
        raise ValueError(f"labels must have the shape {wanted}, got {labels.shape}.")
    if labels is not None and family == "categorical" and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be whole numbers, got dtype {labels.dtype}.")
    if labels is not None and family == "categorical" and readable(labels):
        known = np.asarray(labels)  # of a jax.Array itself a minimum would be traced under jit
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= out.shape[1]:
            raise ValueError(
                f"labels must be from 0 to {out.shape[1] - 1}, the classes of predict, got {least} to {most}."
            )
    return out.shape[0]
