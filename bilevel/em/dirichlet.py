"""EM of Dirichlet classes, for features on the simplex: Eq. (3), (2) and (1) of `bilevel.em`, in that order.

The density of class k is ``log p(z | a) = lnGamma(sum a) - sum lnGamma(a_i) + sum (a_i - 1) log z_i``, and
Eq. (3) is solved where, with ybar the weighted mean of ``log z`` and psi the digamma function::

    psi(a_i) - psi(sum a) = ybar_i                                                                (4)

by Newton steps on all a_i together, whose matrix is diagonal plus rank one. With ``e(a) = 1 / psi'(a) - a``,
which is of the size of 1 where a is large and 1 / psi' would cancel, and g the residual of (4)::

    step_i = q_i (g_i + sum_j q_j g_j / (e(sum a) - sum_j e(a_j))),   q_i = 1 / psi'(a_i)         (5)

They start from ``sum a = (K - 1) / (2 (1 - sum exp(ybar_i)))``, exact where a is large, and are shortened
where one would leave the positive numbers. (4) is differentiated implicitly, by (5) with the tangent of ybar
for g.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln

from bilevel import validation
from bilevel.em.tasks import check_task, part, scalar, strengths, weigh
from bilevel.trees import readable

# Within the logarithms of features and of shares, as published.
_LEAST = 1e-15
_MAX_STEPS = 25
# How far sums may be from 1 before features are said to be off the simplex.
_TOLERANCE = 1e-3


def dirichlet_init(batch, num_classes: int, scale=1.0):
    """Where EM of Dirichlet classes starts: the features of queries are their first assignments.

    Args:
      batch: a task, see `bilevel.em`; features have d = K entries, not negative and of sum 1, such as the
        softmax of similarities between a picture and the names of the classes.
      num_classes: K, at least 2. A class need not have an example in the support.
      scale: the power that features are raised to, a positive scalar: of a softmax, the factor of its logits.

    Returns:
      ``{"log_assignments": (q, K), "log_prior": (K,), "concentrations": (K, K)}``; the first step reads the
      assignments only.

    Raises:
      TypeError, ValueError: arrays that do not fit, labels out of range, features off the simplex. Where
        values are traced and cannot be looked at, what depends on them is nan instead.
    """
    num_classes = validation.whole_number("num_classes", num_classes, 2)
    check_task(batch, num_classes)
    features = batch["query"].shape[1]
    if features != num_classes:
        raise ValueError(
            f"features must be probabilities of the {num_classes} classes, got {features} of them. For other "
            "features on a simplex begin with params of your own."
        )
    dtype = batch["query"].dtype
    scale = scalar("scale", scale, dtype, positive=True)
    _check_simplex(batch)
    return {
        "log_assignments": _log_features(batch["query"], scale),
        "log_prior": jnp.zeros(num_classes, dtype),
        "concentrations": jnp.ones((num_classes, features), dtype),
    }


def dirichlet_step(params, hparams, batch):
    """One step of generalised EM with Dirichlet classes: concentrations, prior, assignments.

    The map of a `bilevel.FixedPoint`. Of its ``params`` it reads the assignments only.

    Log-likelihoods cancel where concentrations are large: they are known to about their largest sum times the
    precision of the dtype, and so are derivatives. In float32 these have as a rule four digits where the sum
    is 100, three where it is 1,000, and none beyond 1e4, as of classes whose points are all alike.

    Args:
      params: as `dirichlet_init` makes them.
      hparams: a dict with the scalars ``prior_weight``, ``temperature`` and ``scale``; one left out is 1.
      batch: a task, see `bilevel.em`.

    Returns:
      Params after the step. ``log_prior`` is the logarithm of the shares plus 1e-15.

    Raises:
      TypeError, ValueError: arrays that do not fit, labels out of range, features off the simplex; a strength
        that is unknown, no scalar, or (temperature and scale) not positive. Where values are traced and
        cannot be looked at, what depends on them is nan instead.
    """
    log_u = part(params, "log_assignments", "dirichlet_init")
    check_task(batch, log_u.shape[1])
    queries = batch["query"].shape[0]
    if log_u.shape[0] != queries:
        raise ValueError(
            f'params["log_assignments"] must have a row for each of {queries} queries, got {log_u.shape}.'
        )
    _check_simplex(batch)
    prior_weight, temperature, scale = strengths(hparams, log_u.dtype)
    support, query = (_log_features(batch[name], scale) for name in ("support", "query"))
    weights = weigh(batch["labels"], log_u)
    # A class that nothing belongs to is uniform over the simplex: that is where all a_i are 1.
    flat = digamma(jnp.ones((), log_u.dtype)) - digamma(jnp.asarray(query.shape[1], log_u.dtype))
    mean_log = jnp.where(weights.empty[:, None], flat, weights.means(support, query))
    concentrations = _mle(mean_log)  # Eq. (3)
    log_prior = jnp.log(weights.shares() + _LEAST)  # Eq. (2)
    logits = _log_likelihoods(query, concentrations) + prior_weight * log_prior[None]
    return {
        "log_assignments": jax.nn.log_softmax(logits / temperature, axis=1),  # Eq. (1)
        "log_prior": log_prior,
        "concentrations": concentrations,
    }


def dirichlet_mle(mean_log):
    """Concentrations of largest likelihood given the mean of the logarithms: Eq. (4), solved.

    Four to ten Newton steps as a rule. Differentiable to any order, implicitly: forwards and backwards for
    the price of O(K). Where the data are so alike that ``1 - sum exp(ybar)`` is below ``eps^.6`` of the dtype
    (4e-10 in float64, 7e-5 in float32), concentrations would grow without bound; ybar is then lowered to meet
    it.

    Args:
      mean_log: ybar, of shape (..., K): the mean of ``log z`` over points of the simplex.

    Returns:
      Concentrations, positive, of the same shape. Rows do not depend on each other; one whose ybar is not
      finite is nan.

    Raises:
      TypeError, ValueError: not floating, fewer than two entries, or no mean of logarithms: ``sum exp(ybar)``
        is above 1, as far as that can be read.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> from jax.scipy.special import digamma
      >>> a = jnp.array([0.5, 2.0, 30.0])
      >>> print(bilevel.em.dirichlet_mle(digamma(a) - digamma(a.sum())).round(2))
      [ 0.5  2.  30. ]

    References:
      Minka, "Estimating a Dirichlet distribution", 2000.
    """
    mean_log = jnp.asarray(mean_log)
    if not jnp.issubdtype(mean_log.dtype, jnp.floating):
        raise TypeError(f"mean_log must be floating, got dtype {mean_log.dtype}.")
    if mean_log.ndim == 0 or mean_log.shape[-1] < 2:
        raise ValueError(f"mean_log must have at least two entries, got shape {mean_log.shape}.")
    if readable(mean_log):
        total = np.nan_to_num(np.exp(np.asarray(mean_log, np.float64)).sum(axis=-1)).max(initial=0)
        if total > 1 + _TOLERANCE:
            raise ValueError(
                "mean_log must be the mean of logarithms of points on the simplex, whose exponentials sum to "
                f"at most 1, got {total:.6g}. Of rows z it is jnp.log(z).mean(axis=0)."
            )
    return _mle(mean_log)


def _mle(mean_log):
    """The same unchecked."""
    finite = jnp.all(jnp.isfinite(mean_log), axis=-1, keepdims=True)
    mean_log = mean_log + jnp.where(finite, 0, jnp.nan).astype(mean_log.dtype)
    least = jnp.finfo(mean_log.dtype).eps ** 0.6
    spread = -jnp.expm1(jax.nn.logsumexp(mean_log, axis=-1, keepdims=True))
    return _solved(mean_log - jnp.maximum(least - spread, 0))


@jax.custom_jvp
def _solved(mean_log):
    """Eq. (4) for rows that have a solution."""
    size = mean_log.shape[-1]
    spread = -jnp.expm1(jax.nn.logsumexp(mean_log, axis=-1, keepdims=True))
    total = digamma((size - 1) / (2 * spread))
    target = mean_log + total
    euler = -digamma(jnp.ones((), mean_log.dtype))
    first = jnp.where(target > -2.22, jnp.exp(target) + 0.5, -1 / jnp.minimum(target + euler, -1))
    first -= (digamma(first) - target) / _trigamma(first)
    # What rounding leaves of Eq. (4) in a row: that of the digamma functions, of the size of their values.
    values = 1 + jnp.abs(total) + jnp.max(jnp.abs(mean_log), axis=-1, keepdims=True)
    rounding = 4 * jnp.finfo(mean_log.dtype).eps * values

    def moving(residual):
        return jnp.any(jnp.abs(residual) > rounding, axis=-1, keepdims=True)  # False where it is nan

    def going(loop):
        steps, _, residual = loop
        return (steps < _MAX_STEPS) & jnp.any(moving(residual))

    def body(loop):
        steps, a, residual = loop
        step = _newton(a, residual)
        steepest = jnp.max(-step / a, axis=-1, keepdims=True)
        shortened = a + step * jnp.where(steepest > 0.9, 0.9 / steepest, 1)
        a = jnp.where(moving(residual), shortened, a)
        return steps + 1, a, _residual(a, mean_log)

    return jax.lax.while_loop(going, body, (jnp.int32(0), first, _residual(first, mean_log)))[1]


@_solved.defjvp
def _derivative(primals, tangents):
    a = _solved(*primals)
    return a, _newton(a, *tangents)


def _residual(a, mean_log):
    return mean_log - digamma(a) + digamma(a.sum(axis=-1, keepdims=True))


def _newton(a, residual):
    """Eq. (5)."""
    q = a + _excess(a)
    left = _excess(a.sum(axis=-1, keepdims=True)) - _excess(a).sum(axis=-1, keepdims=True)
    return q * (residual + jnp.sum(q * residual, axis=-1, keepdims=True) / left)


def _series(a):
    """``1 / 2 + 1 / 6a - 1 / 30a^3 + ...``, which is ``a (a psi'(a) - 1)`` from 8 on."""
    i = 1 / a
    i2 = i * i
    return 0.5 + i * (1 / 6 - i2 * (1 / 30 - i2 * (1 / 42 - i2 * (1 / 30 - i2 * 5 / 66))))


def _trigamma(a):
    """psi', to rounding: a is moved past 8, where few terms of its series are enough."""
    moved = a + 8
    return sum(1 / (a + k) ** 2 for k in range(8)) + (1 + _series(moved) / moved) / moved


def _excess(a):
    """``e(a) = 1 / psi'(a) - a``, without cancellation."""
    large = jnp.maximum(a, 8)
    series = _series(large)
    small = jnp.minimum(a, 8)
    return jnp.where(a < 8, 1 / _trigamma(small) - small, -series / (1 + series / large))


def _log_features(features, scale):
    """Logarithms of features raised to a power and normalised; nan off the simplex."""
    features = jnp.asarray(features)
    logs = jax.nn.log_softmax(scale * jnp.log(jnp.maximum(features, _LEAST)), axis=1)
    return jnp.where(_on_simplex(features)[:, None], logs, jnp.nan)


def _on_simplex(features):
    return jnp.all(features >= 0, axis=1) & (jnp.abs(features.sum(axis=1) - 1) <= _TOLERANCE)


def _check_simplex(batch) -> None:
    for name in ("support", "query"):
        features = batch[name]
        off = ~_on_simplex(jnp.asarray(features))
        if readable(off) and off.any():
            row = int(jnp.argmax(off))
            raise ValueError(
                f'batch["{name}"] must lie on the simplex, not negative and of sum 1: row {row} has the '
                f"least entry {float(features[row].min()):.3g} and the sum {float(features[row].sum()):.6g}. "
                "Take jax.nn.softmax."
            )


def _log_likelihoods(logs, concentrations):
    """``log p(z_n | a_k)``, of shape (n, K)."""
    constant = gammaln(concentrations.sum(axis=1)) - gammaln(concentrations).sum(axis=1)
    return constant[None] + logs @ (concentrations - 1).T
