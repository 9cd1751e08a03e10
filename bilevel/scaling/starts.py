"""Published starting points as priors: eq. (2) and (3) of `bilevel.scaling`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.constraints import Constraint, interval
from bilevel.problem import HParams
from bilevel.trees import abstract, spread

# Eq. (2): factor and exponents, and the published standard deviations of the exponents.
_RATE = {"factor": 1.79, "params": (-0.713, 0.030), "tokens": (0.307, 0.019)}
_BATCH = {"factor": 0.58, "tokens": (0.571, 0.019)}
# The middles, in logarithms, of the sizes that it was fitted to: 0.215e9 to 1.07e9 and 4e9 to 1e11.
_MIDDLE = {"params": math.sqrt(0.215e9 * 1.07e9), "tokens": math.sqrt(4e9 * 1e11)}


@dataclasses.dataclass(frozen=True, eq=False)
class LogNormal:
    """Independent log-normal priors over a tree of positive hyperparameters; see `log_normal`.

    ``median``: natural units; ``sd``: of the natural logarithm, a tree alike. Priors that were made by
    different calls are not equal.
    """

    median: HParams
    sd: HParams

    def sample(self, key) -> HParams:
        """One draw, traceable.

        A `bilevel.population` takes ``sample=lambda key: (params, prior.sample(key))``.
        """
        leaves, treedef = jax.tree.flatten(self.median)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jnp.asarray(m * jnp.exp(sd * jax.random.normal(k, m.shape, m.dtype)))
            for m, sd, k in zip(leaves, jax.tree.leaves(self.sd), keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, drawn)

    def constraints(self, sds: float = 2.0) -> Any:
        """`bilevel.interval` of so many standard deviations around the median; scalar leaves only.

        Raises:
          ValueError: a leaf that is no scalar.
        """
        sds = validation.number("sds", sds, positive=True)

        def around(median, sd) -> Constraint:
            if median.ndim:
                raise ValueError(f"constraints are those of scalars, got {validation.describe(self.median)}.")
            return interval(float(median * np.exp(-sds * sd)), float(median * np.exp(sds * sd)))

        return jax.tree.map(around, self.median, self.sd)

    def penalty(self, hparams: HParams) -> jax.Array:
        """The negative log density of ``log hparams``, up to a constant: zero at the median; a scalar.

        To be added to an outer loss, in its units: a validation loss that is a mean over n examples takes
        ``penalty(hparams) / n``.
        """

        def part(value, median, sd):
            return jnp.sum(jnp.square((jnp.log(value) - jnp.log(median)) / sd)) / 2

        parts = jax.tree.map(part, hparams, self.median, self.sd)
        return jax.tree.reduce(jnp.add, parts)


def log_normal(median, sd) -> LogNormal:
    """A log-normal prior: where to look for positive hyperparameters, and how far around it.

    Args:
      median: a tree of positive numbers or floating arrays, natural units; values that belong to no batch.
      sd: positive; standard deviation of the natural logarithm (0.7 is a factor of two): one for all, a tree
        like ``median``, or for parts of it by name, the others having that of a factor of two.

    Returns:
      A `LogNormal`, with ``sample(key)`` to start members of a population, ``constraints(sds)`` and
      ``penalty(hparams)`` to keep a search near.

    Raises:
      TypeError, ValueError: not positive, not floating, another tree.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> prior = bilevel.scaling.log_normal({"lr": 1e-3}, sd=0.5)
      >>> print(f"{prior.penalty({'lr': 1e-3 * jnp.exp(1.0)}):.2f}", prior.constraints(sds=2.0))
      2.00 {'lr': interval(0.000367879, 0.00271828)}
    """
    median = validation.floating(median, "median")
    validation.finite(median, "median")
    if any((np.asarray(leaf) <= 0).any() for leaf in jax.tree.leaves(median)):
        raise ValueError(f"median must be positive, got {median!r:.120}.")
    sds = spread(sd, median, math.log(2), _is_setting, "sd", "median")
    sds = [validation.number("sd", s.item() if getattr(s, "ndim", 1) == 0 else s, positive=True) for s in sds]
    leaves = [
        jnp.asarray(one, abstract(m).dtype) for one, m in zip(sds, jax.tree.leaves(median), strict=True)
    ]
    return LogNormal(median, jax.tree.unflatten(jax.tree.structure(median), leaves))


def _is_setting(sd: Any) -> bool:
    return sd is not None and jax.tree_util.all_leaves([sd])


def step_law(params: float, tokens: float, sd: float = math.log(2) / 2) -> LogNormal:
    """Eq. (2): where to start with the peak learning rate and the batch of a language model.

    The published standard deviations are those of the exponents. Fitted exponents and factors are correlated,
    and a line is known best in the middle of its data: here an error of an exponent turns eq. (2) around the
    middle of the sizes it was fitted to (4.8e8 parameters, 2e10 tokens), so that the prior widens away from
    there::

        sd(log rate)^2 = sd^2 + (0.030 log(N / 4.8e8))^2 + (0.019 log(D / 2e10))^2

    The law is for warm-up and a cosine that ends at 1e-5, and sequences of 2,048 tokens.

    Args:
      params: N, parameters without those of the vocabulary.
      tokens: D, of the training run.
      sd: standard deviation of both logarithms in that middle. It is not published: the default is half a
        factor of two.

    Returns:
      The `LogNormal` of ``{"lr": ..., "batch_tokens": ...}``: divide the latter by the tokens of a sequence.

    Raises:
      TypeError, ValueError: numbers that are not positive.

    Example:
      >>> import bilevel
      >>> prior = bilevel.scaling.step_law(params=1e9, tokens=1e11)
      >>> print(f"{prior.median['lr']:.5f} {prior.median['batch_tokens'] / 2048:.0f}")
      0.00163 541
    """
    sizes = {
        "params": validation.number("params", params, positive=True),
        "tokens": validation.number("tokens", tokens, positive=True),
    }
    sd = validation.number("sd", sd, positive=True)
    found = [_law(_RATE, sizes, sd), _law(_BATCH, sizes, sd)]
    names = "lr", "batch_tokens"
    return log_normal(
        {name: median for name, (median, _) in zip(names, found, strict=True)},
        {name: width for name, (_, width) in zip(names, found, strict=True)},
    )


def _law(law: dict[str, Any], sizes: dict[str, float], least: float) -> tuple[float, float]:
    """Median, and standard deviation of its logarithm."""
    exponents = {name: law[name] for name in sizes if name in law}
    median = law["factor"] * math.prod(sizes[name] ** power for name, (power, _) in exponents.items())
    away = [sd * math.log(sizes[name] / _MIDDLE[name]) for name, (_, sd) in exponents.items()]
    return median, math.hypot(least, *away)


def power_law_start(sequences: float) -> dict[str, float]:
    """Eq. (3): what `bilevel.schedules.power_law` starts from, as numbers to be used or tuned.

    For models in the maximal update parametrisation, whose learning rates do not depend on their width.

    Args:
      sequences: in a batch.

    Returns:
      ``{"peak": 0.02, "scale": 4.6 sequences, "exponent": -0.51}``, for a schedule whose ``batch`` is in
      tokens.

    Raises:
      TypeError, ValueError: not a positive number.

    Example:
      >>> import bilevel
      >>> start = bilevel.scaling.power_law_start(sequences=128)
      >>> schedule = bilevel.schedules.power_law(**start, batch=128 * 4096)
      >>> print(f"{schedule(0):.3f} {schedule(1e11 / (128 * 4096)):.4f}")  # after 1e11 tokens
      0.020 0.0014
    """
    sequences = validation.number("sequences", sequences, positive=True)
    return {"peak": 0.02, "scale": 4.6 * sequences, "exponent": -0.51}
