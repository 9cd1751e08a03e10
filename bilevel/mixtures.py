"""Mixtures of domains as hyperparameters: how much of each source of data to train on.

With domains k = 1 ... K, weights pi on the simplex, and l_i the loss of row i, which is of domain d(i), the
inner loss is::

    inner = sum_k pi_k mean_{i of domain k} l_i = mean_i (pi_{d(i)} / q_{d(i)}) l_i                  (1)

q are the shares in which rows of the domains come: those of all rows, where batches are drawn from all rows
alike, or others, where they are drawn so. The second form is what is computed: on whole arrays it is the
first; on a minibatch its expectation is, whichever domains are in it. (Means over the rows of each domain in
a batch are biased: a domain that happens to be absent would drop out.) The hypergradient by pi_k is minus the
influence of domain k: its mean gradient at the solution times the inverse Hessian times the outer gradient.

The noise of (1) grows with the largest pi_k / q_k. For a mixture far from q draw rows in proportions nearer
to it, with `sample`.

References:
  Chen et al., "ADMIRE-BayesOpt: accelerated data mixture re-weighting for language models with Bayesian
  optimization", 2025, arXiv:2508.11551 (mixtures as hyperparameters).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import data, validation
from bilevel.problem import Batch, HParams, Params
from bilevel.trees import readable


@dataclasses.dataclass(frozen=True)
class MixtureLoss:
    """See `loss`."""

    row_loss: Callable
    shares: tuple[float, ...]
    name: Any
    domain: str

    def __call__(self, params: Params, hparams: HParams, batch: Batch) -> jax.Array:
        weights = jnp.asarray(hparams if self.name is None else hparams[self.name])
        if jnp.shape(weights) != (len(self.shares),):
            raise ValueError(
                f"the mixture must have a weight for each of {len(self.shares)} domains, got shape "
                f"{jnp.shape(weights)}."
            )
        losses, domains = self.row_loss(params, hparams, batch), batch[self.domain]
        if jnp.shape(losses) != jnp.shape(domains):
            raise ValueError(
                f"row_loss must return one loss for each row, of shape {jnp.shape(domains)}, got "
                f"{jnp.shape(losses)}."
            )
        self._check_domains(domains)
        ratios = weights / jnp.asarray(self.shares, weights.dtype)
        return jnp.mean(ratios[domains].astype(losses.dtype) * losses)  # Eq. (1)

    def _check_domains(self, domains) -> None:
        """ValueError where domains can be read and one has no share; indexing would take another's."""
        if readable(domains) and np.size(domains):
            known = np.asarray(domains)  # of a jax.Array itself a minimum would be traced under jit
            least, most = known.min(), known.max()
            if least < 0 or most >= len(self.shares):
                raise ValueError(
                    f"batch[{self.domain!r}] must be from 0 to {len(self.shares) - 1}, the domains that have "
                    f"shares, got {least} to {most}."
                )


def loss(row_loss: Callable, shares, *, name: Any = "mixture", domain: str = "domain") -> MixtureLoss:
    """Eq. (1), the inner loss of a mixture whose weights are tuned.

    Args:
      row_loss: ``(params, hparams, batch) -> losses`` of the rows of a batch, shape (rows,).
      shares: q, what `shares` finds, or the proportions in which rows are drawn; K positive numbers that sum
        to one, fixed.
      name: of the weights among ``hparams``; None where hparams are the weights. Constrain them by
        `bilevel.simplex`.
      domain: name in the batch of each row's domain, a whole number below K.

    Returns:
      ``(params, hparams, batch) -> scalar``; add penalties in a function of your own.

    Raises:
      TypeError, ValueError: no function, shares that are not positive or do not sum to one; when called,
        weights or losses of another shape, domains that can be read and are not below K.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> rows = {"x": jnp.array([1.0, 3.0, 10.0]), "domain": jnp.array([0, 0, 1])}
      >>> inner = bilevel.mixtures.loss(lambda w, h, b: w * b["x"], bilevel.mixtures.shares(rows, 2))
      >>> print(inner(1.0, {"mixture": jnp.array([0.75, 0.25])}, rows))  # 0.75 * 2 + 0.25 * 10
      4.0
    """
    if not callable(row_loss):
        raise TypeError(
            f"row_loss must be a function (params, hparams, batch) -> losses, got {row_loss!r:.80}."
        )
    given = np.asarray(shares, np.float64)
    if given.ndim != 1 or not (given > 0).all() or abs(given.sum() - 1) > 1e-5:
        raise ValueError(
            f"shares must be positive numbers that sum to one, one a domain, got {shares!r:.120}."
        )
    return MixtureLoss(row_loss, tuple(given.tolist()), name, domain)


def shares(source, num_domains: int, *, domain: str = "domain") -> np.ndarray:
    """Shares q of eq. (1): the part of each domain in the rows that batches are drawn from.

    Args:
      source: whole arrays, or `bilevel.minibatches`, whose strata may leave rows out at the end.
      num_domains: K.
      domain: as in `loss`.

    Returns:
      Shape (K,), numpy.

    Raises:
      TypeError, ValueError: domains that are no whole numbers from 0 to K - 1; one without rows.
    """
    num_domains = validation.whole_number("num_domains", num_domains, 1)
    arrays, rows = source, None
    if isinstance(source, data.Minibatches):
        arrays = source.arrays
        rows = data.rows(arrays) // source.strata * source.strata
    domains = _domains(arrays, num_domains, domain)[:rows]
    counts = np.bincount(domains, minlength=num_domains)
    if (counts == 0).any():
        raise ValueError(
            f"domain {', '.join(map(str, np.flatnonzero(counts == 0)))} of {num_domains} has no rows, so "
            "that its weight would mean nothing: leave it out, and number the others from 0."
        )
    return counts / counts.sum()


def sample(key, proportions, domains, size: int) -> jax.Array:
    """Rows of given domains in given proportions, with replacement: for a run on a mixture that was found.

    Row i has the probability ``proportions[d(i)] / (rows of its domain)``. With them a plain loss is an
    unbiased estimate of eq. (1) for pi = proportions; for tuning give the same proportions to `loss` as
    shares.

    Args:
      key: PRNG key.
      proportions: shape (K,), on the simplex; may be traced. Those of a domain without rows are ignored.
      domains: of all rows, shape (n,). Rows of a domain of K or more are never drawn.
      size: rows to draw.

    Returns:
      Row numbers, shape (size,).

    Raises:
      TypeError, ValueError: a size that is no whole number, shapes that do not fit.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> domains = jnp.array([0] * 90 + [1] * 10)
      >>> rows = bilevel.mixtures.sample(jax.random.key(0), jnp.array([0.5, 0.5]), domains, 1000)
      >>> print(f"{jnp.mean(domains[rows] == 1):.1f}")
      0.5
    """
    size = validation.whole_number("size", size, 1)
    proportions, domains = jnp.asarray(proportions), jnp.asarray(domains)
    if proportions.ndim != 1 or domains.ndim != 1:
        raise ValueError(
            f"proportions and domains must be vectors, got shapes {proportions.shape} and {domains.shape}."
        )
    proportions = proportions.astype(jnp.promote_types(proportions.dtype, jnp.float32))
    counts = jnp.bincount(domains, length=len(proportions))
    # A domain, then one of its rows: a sum over all rows in float32 would favour some of them.
    key_domain, key_row = jax.random.split(key)
    usable = jnp.where(counts > 0, proportions, 0)
    chosen = jax.random.choice(key_domain, len(proportions), (size,), p=usable)
    place = jax.random.randint(key_row, (size,), 0, jnp.maximum(counts, 1)[chosen])
    return jnp.argsort(domains)[(jnp.cumsum(counts) - counts)[chosen] + place]


def _domains(arrays, num_domains: int, name: str) -> np.ndarray:
    try:
        domains = np.asarray(arrays[name])
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"the data must have the domain of each row under {name!r}, got {validation.describe(arrays)}."
        ) from None
    if domains.dtype.kind not in "iu" or domains.ndim != 1:
        raise TypeError(f"domains must be a vector of whole numbers, got {validation.describe(domains)}.")
    if domains.min() < 0 or domains.max() >= num_domains:
        raise ValueError(
            f"domains must be from 0 to num_domains - 1 = {num_domains - 1}, got {domains.min()} to "
            f"{domains.max()}."
        )
    return domains
