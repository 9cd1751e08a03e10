"""Stochastic methods of the literature that are compositions of what is there.

Each is `bilevel.alternating` with an estimator and a rule for when params move; what their docstrings write
is the update of one outer step, w for params, v for the solution of the linear system ``H v = d_w outer``, u
for hyperparameters in free units, and g for the hypergradient ``d_u outer - d_u (d_w inner . v)``. Every
oracle takes a batch of its own where the source has them: each inner step, each product with H, the cross
product, and the outer gradients (but what `f2sa` subtracts); a Python iterable has one for each inner step,
the last of which serves the others.
"""

from __future__ import annotations

import optax

from bilevel import validation
from bilevel.estimators.implicit import implicit
from bilevel.estimators.penalty import penalty
from bilevel.inner_loops.optax_loop import optax_loop
from bilevel.linear_solvers import neumann, sgd
from bilevel.methods.alternating import Alternating, alternating
from bilevel.methods.bo_rep import BoRep, PeriodicUpdate
from bilevel.methods.directions import checked, single_loop


def soba(inner, outer, linear_step) -> Alternating:
    """All three variables by one step each, from one point.

    The update::

        w <- w - inner(d_w inner),   v <- v - linear_step (H v - d_w outer),   u <- u - outer(g)

    with g at the old v (at the first step, where that is zero, at the new one). One outer step costs an inner
    gradient, an outer gradient, a Hessian-vector and a cross product, on batches of their own (in the paper
    the three of the inner loss share one). With fixed steps it ends in a ball around the solution, with steps
    that fall like ``1 / sqrt(t)`` at it; `saba` and `srba` converge with fixed ones. Memory: one vector
    beside the optimisers' states.

    Args:
      inner: the optax optimiser of params; of the paper ``optax.sgd``.
      outer: the optax optimiser of hyperparameters, in free units.
      linear_step: step size of the linear system, about the inverse of the largest curvature of the inner
        loss on a batch; or an optax schedule of it.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    Example:
      >>> import bilevel, optax
      >>> bilevel.soba(optax.sgd(0.05), optax.sgd(0.5), linear_step=0.05).batches_per_step
      (1, 1)

    References:
      Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and
      global variance reduction algorithms", 2022, arXiv:2201.13409.
    """
    return single_loop(inner, outer, linear_step)


def ma_soba(inner, outer, linear_step, momentum: float = 0.9) -> Alternating:
    """`soba` with a moving average of hypergradients.

    The update is that of `soba`, but for ``h <- momentum h + (1 - momentum) g``, ``u <- u - outer(h)``, which
    reaches the rate of single-level stochastic gradients without smoothness of higher order. In the paper u
    moves by h before it takes in the new g, one step later. The average begins at zero, so that the first
    steps are short. Cost per outer step as of `soba`; memory, one vector of hyperparameters more.

    Args:
      inner: as of `soba`.
      outer: as of `soba`.
      linear_step: as of `soba`.
      momentum: weight of the past, at least 0 and less than 1; ``1 - theta`` of the paper.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Chen, Xiao and Balasubramanian, "Optimal algorithms for stochastic bilevel optimization under relaxed
      smoothness conditions", 2023, arXiv:2306.12067.
    """
    momentum = validation.number("momentum", momentum, minimum=0.0, below=1.0)
    validation.kind("outer", outer, "an optax optimiser")
    return single_loop(inner, optax.chain(optax.ema(momentum, debias=False), outer), linear_step)


def stocbio(inner, outer, linear_step, terms: int = 10, inner_steps: int = 10) -> Alternating:
    """Inner steps, a Neumann series with a batch for each factor, an outer step.

    The update::

        inner_steps times   w <- w - inner(d_w inner)
        v = linear_step sum_{k < terms} prod_{j <= k} (I - linear_step H_j) d_w outer,   u <- u - outer(g)

    One outer step costs ``inner_steps`` inner gradients, an outer gradient, ``terms - 1`` Hessian-vector
    products and a cross product. Params go on from where they stand; v does not, and what is left out of the
    series is a bias, of at most ``(1 - linear_step mu)^terms`` relative to ``|d_w outer| / mu``.

    Args:
      inner: as of `soba`.
      outer: as of `soba`.
      linear_step: step size of the series, below two over the largest curvature on a batch.
      terms: of the series.
      inner_steps: inner steps per outer step.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Ji, Yang and Liang, "Bilevel optimization: convergence analysis and enhanced design", 2021,
      arXiv:2010.07962.
    """
    validation.kind("inner", inner, "an optax optimiser")
    linear_step = validation.number("linear_step", linear_step, positive=True)
    return alternating(implicit(neumann(terms, linear_step), batches=1), inner, outer, inner_steps)


def amigo(inner, outer, linear_step, linear_steps: int = 10, inner_steps: int = 10) -> Alternating:
    """Inner steps, gradient steps on the linear system, an outer step; both systems warm-started.

    The update::

        inner_steps times    w <- w - inner(d_w inner)
        linear_steps times   v <- v - linear_step (H v - d_w outer)
        u <- u - outer(g)

    One outer step costs ``inner_steps`` inner gradients, an outer gradient, ``linear_steps`` Hessian-vector
    products and a cross product. One of each makes it `soba` in turns.

    Args:
      inner: as of `soba`.
      outer: as of `soba`.
      linear_step: as of `soba`.
      linear_steps: steps of the linear system per outer step.
      inner_steps: inner steps per outer step.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", 2022,
      arXiv:2111.14580.
    """
    validation.kind("inner", inner, "an optax optimiser")
    linear_steps = validation.whole_number("linear_steps", linear_steps, 1)
    return alternating(
        implicit(sgd(checked(linear_step), linear_steps), batches=1), inner, outer, inner_steps
    )


def ttsa(inner, outer, linear_step, terms: int = 20) -> Alternating:
    """One inner step, a randomly truncated Neumann series, an outer step on a slower scale.

    The update, with k drawn uniformly from 0 to ``terms - 1``::

        w <- w - inner(d_w inner)
        v = terms linear_step prod_{j <= k} (I - linear_step H_j) d_w outer,   u <- u - outer(g)

    One outer step costs an inner gradient, an outer gradient, half of ``terms`` Hessian-vector products in
    the mean and a cross product. In the mean over k it is the series of `stocbio`; a single one is noise
    also with arrays used whole. The paper's steps fall, those of ``outer`` like ``t^-3/5`` and faster than
    those of ``inner``, like ``t^-2/5``: give optax schedules.

    Args:
      inner: as of `soba`.
      outer: as of `soba`.
      linear_step: as of `stocbio`.
      terms: of the series.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Hong, Wai, Wang and Yang, "A two-timescale framework for bilevel optimization: complexity analysis and
      application to actor-critic", 2020, arXiv:2007.05170.
    """
    validation.kind("inner", inner, "an optax optimiser")
    linear_step = validation.number("linear_step", linear_step, positive=True)
    return alternating(implicit(neumann(terms, linear_step, randomized=True), batches=1), inner, outer)


def f2sa(inner, outer, multiplier=10.0, inner_steps: int = 10) -> Alternating:
    """First derivatives only: params beside those that the outer loss pulls at, an outer step.

    The update, with y the second copy and m the multiplier::

        inner_steps times   w <- w - inner(d_w inner(w)),   y <- y - inner(d_w inner(y) + d_w outer(y) / m)
        u <- u - outer(d_u outer(y) + m (d_u inner(y) - d_u inner(w)))

    One outer step costs ``2 inner_steps + 2`` inner gradients and ``inner_steps + 1`` outer ones; no second
    derivatives, no linear system. Biased by about ``1 / m``, while noise grows with m; in the paper m grows
    along the run. Where noise would be multiplied by m it is shared: both copies step on the same batches,
    and the two inner terms of the last line take one; so do the outer terms of one outer step.

    Args:
      inner: the optax optimiser of params, and of the second copy with a state of its own.
      outer: as of `soba`.
      multiplier: m, positive; or a function of the number of accepted outer steps, such as
        ``lambda k: 10 + 0.1 * k``.
      inner_steps: steps of both copies per outer step.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Kwon, Kwon, Wright and Nowak, "A fully first-order method for stochastic bilevel optimization", 2023,
      arXiv:2301.10945.
    """
    validation.kind("inner", inner, "an optax optimiser")
    return alternating(penalty(multiplier, inner, inner_steps), inner, outer, inner_steps)


def slip(inner, outer, linear_step, terms: int = 10, warm_start: int = 10) -> BoRep:
    """Inner steps at first, then params and hyperparameters at once, the latter by normalised momentum.

    The first outer step takes ``warm_start`` steps of ``inner`` and leaves hyperparameters where they are;
    the update of the others::

        w <- w - inner(d_w inner)
        v = linear_step sum_{k < terms} prod_{j <= k} (I - linear_step H_j) d_w outer,   u <- u - outer(g)

    with g at the old w. One outer step costs an inner gradient, an outer gradient, ``terms - 1``
    Hessian-vector products and a cross product. It is `bo_rep` with an update at every step instead of every
    so many, for outer losses of unbounded smoothness. The authors' released code keeps one running
    vector for v, which is ``alternating(implicit(sgd(linear_step)), ..., simultaneous=True)``.

    Args:
      inner: as of `soba`.
      outer: an optax optimiser; of the paper `bilevel.normalized_momentum`, whose steps have one length.
      linear_step: as of `stocbio`.
      terms: of the series.
      warm_start: inner steps before the first outer step, which cost one gradient more.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    References:
      Gong, Hao and Liu, "A nearly optimal single loop algorithm for stochastic bilevel optimization under
      unbounded smoothness", 2024, arXiv:2412.20017.
    """
    validation.kind("inner", inner, "an optax optimiser")
    linear_step = validation.number("linear_step", linear_step, positive=True)
    warm_start = validation.whole_number("warm_start", warm_start, 1)
    update = PeriodicUpdate(inner, 1, None, optax_loop(inner, warm_start))
    estimator = implicit(neumann(terms, linear_step), batches=1)
    return BoRep(alternating(estimator, update, outer, simultaneous=True), "slip", waits=True)
