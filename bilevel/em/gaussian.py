"""EM of Gaussian classes with a common covariance: Eq. (1) to (3) of `bilevel.em`, in that order."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.em.tasks import check_features, check_task, one_hot, part, scalar, strengths, weigh
from bilevel.trees import readable

# Added to the shares of classes before their logarithm, as published: a class that is not in use may return.
_LEAST_SHARE = 1e-6
# Of a variance, relative to the mean over features: constant features have none. Also of the share of a
# feature's variance that a start has to find within the classes of the support.
_LEAST_VARIANCE = 1e-6
_COVARIANCES = ("identity", "diagonal")


def gaussian_init(batch, num_classes: int, scale=1.0, covariance: str = "identity"):
    """Where EM of Gaussian classes starts: their means over the support.

    Args:
      batch: a task, see `bilevel.em`.
      num_classes: K; every class has an example in the support.
      scale: of the features, a positive scalar; hyperparameters may enter here too, give it as the ``start``
        of a `bilevel.FixedPoint`.
      covariance: "identity"; "diagonal": one variance for each feature, shared by classes and updated with
        them. It starts from the variance within the classes of the support, or, where there is none, as
        with one example a class, from that of support and queries together.

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
    dtype = batch["query"].dtype
    scale = scalar("scale", scale, dtype, positive=True)
    support, query, middle = _centred(batch)
    weights = one_hot(jnp.asarray(batch["labels"]), num_classes, dtype)
    mass = weights.sum(axis=0)
    if readable(mass):
        empty = [k for k, count in enumerate(mass) if count == 0]
        if empty:
            raise ValueError(
                f"every class needs an example in the support, and of num_classes = {num_classes} there is "
                f"none of {empty[:10]}. Clusters without any are those of bilevel.em.soft_kmeans."
            )
    means = weights.T @ support / mass[:, None]  # nan where a class is empty
    params = {
        "log_assignments": jnp.full((len(query), num_classes), -jnp.log(jnp.asarray(num_classes, dtype))),
        "log_prior": jnp.zeros(num_classes, dtype),
        "centers": scale * (means + middle[None]),
    }
    if covariance == "diagonal":
        within = jnp.mean((support - weights @ means) ** 2, axis=0)
        overall = _sum_of_squares(support, query) / (len(support) + len(query))
        start = jnp.where(within <= _LEAST_VARIANCE * overall, overall, within)
        params["variances"] = _lifted(scale**2 * start)
    return params


def gaussian_step(params, hparams, batch):
    """One step of generalised EM with Gaussian classes: assignments, prior, centers (and variances).

    The map of a `bilevel.FixedPoint`. It costs two products of (q, d) with (d, K).

    Args:
      params: as `gaussian_init` makes them.
      hparams: a dict with the scalars ``prior_weight``, ``temperature`` and ``scale``; one left out is 1.
      batch: a task, see `bilevel.em`.

    Returns:
      Params after the step. ``log_prior`` is the logarithm of the shares plus 1e-6.

    Raises:
      TypeError, ValueError: arrays that do not fit, labels out of range; a strength that is unknown, no
        scalar, or (temperature and scale) not positive. Where values are traced and cannot be looked at, what
        depends on them is nan instead.
    """
    centers = part(params, "centers", "gaussian_init")
    check_task(batch, centers.shape[0])
    prior_weight, temperature, scale = strengths(hparams, centers.dtype)
    support, query, middle = _centred(batch)
    if centers.shape[1] != len(middle):
        raise ValueError(
            f'params["centers"] must have the {len(middle)} features of batch, got shape {centers.shape}.'
        )
    # The scale multiplies small arrays, never the features: no derivative by them is taken.
    centers = centers - scale * middle[None]
    precise = centers / params["variances"][None] if "variances" in params else centers
    # -|scale z_n - w_k|^2 / 2 up to what all k share
    logits = scale * (query @ precise.T) - 0.5 * jnp.sum(centers * precise, axis=1)[None]
    logits += prior_weight * params["log_prior"][None]
    log_u = jax.nn.log_softmax(logits / temperature, axis=1)  # Eq. (1)
    weights = weigh(batch["labels"], log_u)
    means = weights.means(support, query)
    after = {
        "log_assignments": log_u,
        "log_prior": jnp.log(weights.shares() + _LEAST_SHARE),  # Eq. (2)
        "centers": jnp.where(  # Eq. (3)
            weights.empty[:, None], params["centers"], scale * (means + middle[None])
        ),
    }
    if "variances" in params:
        mass = jnp.where(weights.empty, 0, weights.unit * weights.mass)
        # Every example has weights of sum 1, so that the first sum is that of all, whatever the assignments.
        left = _sum_of_squares(support, query) - jnp.sum(mass[:, None] * means**2, axis=0)
        after["variances"] = _lifted(scale**2 * left / (len(support) + len(query)))
    return after


def _centred(batch):
    """Support and queries about one row, and that row: their mean.

    Far from zero their squares would cancel in float32. Nothing depends on the row but rounding, so that it
    is not differentiated; of a feature that is constant zeros are left.
    """
    support, query = jnp.asarray(batch["support"]), jnp.asarray(batch["query"])
    first = query[0]
    rest = (support - first[None]).sum(axis=0) + (query - first[None]).sum(axis=0)
    middle = jax.lax.stop_gradient(first + rest / (len(support) + len(query)))
    return support - middle[None], query - middle[None], middle


def _sum_of_squares(support, query):
    return jnp.sum(support**2, axis=0) + jnp.sum(query**2, axis=0)


def _lifted(variances):
    """None of them far below their mean, or 0."""
    mean = variances.mean()
    return jnp.maximum(variances, _LEAST_VARIANCE * jnp.where(mean <= 0, 1, mean))


def soft_kmeans(features, num_classes: int, key, hparams=None, steps: int = 20, covariance: str = "identity"):
    """Soft k-means: EM of Gaussian clusters without labels, differentiable by features and hparams.

    The first centers are examples, each drawn with the square of its distance from the nearest one so far
    (k-means++); which ones does not depend on ``scale``, and derivatives go through their positions.

    Args:
      features: of shape (q, d).
      num_classes: clusters.
      key: of the first centers.
      hparams: strengths, see `gaussian_step`, but a prior_weight left out is 0: without shares, which is soft
        k-means proper. A small temperature makes it k-means.
      steps: of EM.
      covariance: as in `gaussian_init`.

    Returns:
      Params, as in `gaussian_init`.

    Raises:
      TypeError, ValueError: features of another shape, more clusters than examples; strengths as in
        `gaussian_step`.

    References:
      Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    num_classes = validation.whole_number("num_classes", num_classes, 1)
    steps = validation.whole_number("steps", steps, 1)
    check_features("features", features)
    features = jnp.asarray(features)
    if num_classes > features.shape[0]:
        raise ValueError(f"num_classes must be at most the {features.shape[0]} examples, got {num_classes}.")
    if hparams is None or isinstance(hparams, Mapping):
        hparams = {"prior_weight": 0.0, **(hparams or {})}
    scale = strengths(hparams, features.dtype)[2]
    chosen = _spread_out(features, num_classes, validation.random_key("key", key))
    seeds = {"support": features[chosen], "labels": jnp.arange(num_classes), "query": features}
    params = gaussian_init(seeds, num_classes, scale, covariance)
    batch = {"support": features[:0], "labels": jnp.zeros(0, jnp.int32), "query": features}

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
