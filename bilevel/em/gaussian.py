"""EM of Gaussian classes with a common covariance: Eq. (1) to (3) of `bilevel.em`, in that order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.em.tasks import check_task, one_hot, strengths
from bilevel.trees import readable

# Added to the shares of classes before their logarithm, as published: a class that is not in use may return.
_LEAST_SHARE = 1e-6
# Of a variance, relative to the mean over features: constant features have none.
_LEAST_VARIANCE = 1e-6
_COVARIANCES = ("identity", "diagonal")


def gaussian_init(batch, num_classes: int, scale=1.0, covariance: str = "identity"):
    """Where EM of Gaussian classes starts: their means over the support.

    Args:
      batch: a task, see `bilevel.em`.
      num_classes: K; every class has an example in the support.
      scale: of the features, a scalar; hyperparameters may enter here too, give it as the ``start`` of a
        `bilevel.FixedPoint`.
      covariance: "identity"; "diagonal": one variance for each feature, shared by classes and updated with
        them.

    Returns:
      ``{"log_assignments": (q, K), "log_prior": (K,), "centers": (K, d)}``, and ``"variances"`` (d,) where
      they are updated. Assignments are uniform and the prior is flat: the first step reads neither. Centers
      are in units of scaled features; the prior is not normalised.

    Raises:
      TypeError, ValueError: arrays that do not fit, labels out of range, a class without an example. Where
        values are traced and cannot be looked at, what depends on them is nan instead.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> task = {
      ...     "support": jnp.array([[0.0], [4.0]]),
      ...     "labels": jnp.array([0, 1]),
      ...     "query": jnp.array([[1.0], [3.5], [4.5]]),
      ... }
      >>> params = bilevel.em.gaussian_init(task, num_classes=2)
      >>> for _ in range(3):
      ...     params = bilevel.em.gaussian_step(params, {"temperature": 1.0}, task)
      >>> print(params["centers"].ravel().round(2), jnp.exp(params["log_prior"]).round(2))
      [0.5  3.97] [0.33 0.67]
    """
    num_classes = validation.whole_number("num_classes", num_classes, 1)
    if covariance not in _COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(_COVARIANCES)}, got {covariance!r}.")
    check_task(batch, num_classes)
    dtype = jnp.result_type(batch["query"])
    support = jnp.asarray(scale, dtype) * jnp.asarray(batch["support"])
    weights = one_hot(jnp.asarray(batch["labels"]), num_classes, dtype)
    mass = weights.sum(axis=0)
    if readable(mass):
        empty = [k for k, count in enumerate(mass) if count == 0]
        if empty:
            raise ValueError(
                f"every class needs an example in the support, and there is none of {empty[:10]} "
                "(num_classes = "
                f"{num_classes}). Clusters without any are those of bilevel.em.soft_kmeans."
            )
    queries = jnp.shape(batch["query"])[0]
    params = {
        "log_assignments": jnp.full((queries, num_classes), -jnp.log(jnp.asarray(num_classes, dtype))),
        "log_prior": jnp.zeros(num_classes, dtype),
        "centers": weights.T @ support / mass[:, None],  # nan where a class is empty
    }
    if covariance == "diagonal":
        params["variances"] = _variances(weights.T @ support**2, weights.T @ support, mass, params["centers"])
    return params


def gaussian_step(params, hparams, batch):
    """One step of generalised EM with Gaussian classes: assignments, prior, centers (and variances).

    The map of a `bilevel.FixedPoint`. It costs two products of (q, d) with (d, K).

    Args:
      params: as `gaussian_init` makes them.
      hparams: a dict with the scalars ``prior_weight``, ``temperature`` and ``scale``; one left out is 1. A
        temperature that is not positive makes the step nan.
      batch: a task, see `bilevel.em`.

    Returns:
      Params after the step. ``log_prior`` is the logarithm of the shares plus 1e-6.

    Raises:
      TypeError, ValueError: arrays that do not fit; a strength that is no scalar.
    """
    check_task(batch)
    dtype = params["centers"].dtype
    prior_weight, temperature, scale = strengths(hparams, dtype)
    support, query = jnp.asarray(batch["support"]), jnp.asarray(batch["query"])
    known = one_hot(jnp.asarray(batch["labels"]), params["centers"].shape[0], dtype)
    variances = params["variances"][None] if "variances" in params else 1.0
    logits = _log_likelihoods(query, scale, params["centers"], variances)
    logits += prior_weight * params["log_prior"][None]
    log_u = jax.nn.log_softmax(logits / temperature, axis=1)  # Eq. (1)
    u = jnp.exp(log_u)
    mass = known.sum(axis=0) + u.sum(axis=0)
    # The scale multiplies small arrays, never the features: no derivative by them is taken.
    total = scale * (known.T @ support + u.T @ query)
    centers = total / jnp.where(mass > 0, mass, 1)[:, None]  # Eq. (3)
    after = {
        "log_assignments": log_u,
        "log_prior": jnp.log(u.mean(axis=0) + _LEAST_SHARE),  # Eq. (2)
        "centers": jnp.where((mass == 0)[:, None], params["centers"], centers),
    }
    if "variances" in params:
        squares = scale**2 * (known.T @ support**2 + u.T @ query**2)
        after["variances"] = _variances(squares, total, mass, after["centers"])
    return after


def _log_likelihoods(features, scale, centers, variances):
    """``-|scale z_n - w_k|^2 / 2`` up to what all k share, about the mean center, where less cancels."""
    middle = centers.mean(axis=0, keepdims=True)
    centers = centers - middle
    scaled = centers / variances
    return scale * (features @ scaled.T) - jnp.sum((0.5 * centers + middle) * scaled, axis=1)[None]


def _variances(squares, total, mass, centers):
    """One for each feature, about the centers, from sums of each class: of squares, values, weights."""
    spread = (squares - 2 * centers * total + mass[:, None] * centers**2).sum(axis=0)
    variances = spread / mass.sum()
    return jnp.maximum(variances, _LEAST_VARIANCE * variances.mean() + jnp.finfo(variances.dtype).tiny)


def soft_kmeans(features, num_classes: int, key, hparams=None, steps: int = 20, covariance: str = "identity"):
    """Soft k-means: EM of Gaussian clusters without labels, differentiable by features and hparams.

    The first centers are examples, each drawn with the square of its distance from the nearest one so far
    (k-means++); which ones does not depend on ``scale``, and derivatives go through their positions.

    Args:
      features: of shape (q, d).
      num_classes: clusters.
      key: of the first centers.
      hparams: strengths, see `gaussian_step`; default ``{"prior_weight": 0.0}``, without shares, which is
        soft k-means proper. A small temperature makes it k-means.
      steps: of EM.
      covariance: as in `gaussian_init`.

    Returns:
      Params, as in `gaussian_init`.

    Raises:
      TypeError, ValueError: features of another shape, more clusters than examples.

    References:
      Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    num_classes = validation.whole_number("num_classes", num_classes, 1)
    steps = validation.whole_number("steps", steps, 1)
    features = jnp.asarray(features)
    empty = features[:0], jnp.zeros(0, jnp.int32)
    batch = {"support": empty[0], "labels": empty[1], "query": features}
    check_task(batch)
    if num_classes > features.shape[0]:
        raise ValueError(f"num_classes must be at most the {features.shape[0]} examples, got {num_classes}.")
    hparams = {"prior_weight": 0.0} if hparams is None else hparams
    scale = strengths(hparams, features.dtype)[2]
    chosen = _spread_out(features, num_classes, validation.random_key("key", key))
    seeds = {"support": features[chosen], "labels": jnp.arange(num_classes), "query": features}
    params = gaussian_init(seeds, num_classes, scale, covariance)
    if "variances" in params:  # those of the seeds about themselves are zero
        params["variances"] = jnp.var(scale * features, axis=0) + jnp.finfo(features.dtype).tiny

    def step(params, _):
        return gaussian_step(params, hparams, batch), None

    return jax.lax.scan(step, params, length=steps)[0]


def _spread_out(features, num_classes: int, key):
    """Rows of the first centers; not differentiated."""
    features = jax.lax.stop_gradient(features)
    keys = jax.random.split(key, num_classes)
    first = jax.random.randint(keys[0], (), 0, features.shape[0])

    def distances(row):
        return jnp.sum((features - features[row][None]) ** 2, axis=1)

    def draw(nearest, key):
        row = jax.random.categorical(key, jnp.log(nearest))
        return jnp.minimum(nearest, distances(row)), row

    _, rows = jax.lax.scan(draw, distances(first), keys[1:])
    return jnp.concatenate([first[None], rows])
