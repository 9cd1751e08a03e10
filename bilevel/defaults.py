"""The methods that `bilevel.optimize` takes where none is given."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from bilevel import data
from bilevel.estimators.implicit import implicit
from bilevel.estimators.unrolled import unrolled
from bilevel.inner_loops.newton_cg import newton_cg
from bilevel.inner_loops.picard import picard
from bilevel.linear_solvers import cg, gmres
from bilevel.methods.alternating import alternating
from bilevel.problem import FixedPoint, Method, Problem
from bilevel.proximal import is_proximal


def _outer(first: float, scale: int) -> optax.GradientTransformation:
    """Adam of rate ``first / sqrt(1 + t / scale)``: bold at first, and any distance is covered in the end.

    Hypergradients fall by orders of magnitude along a run: a long memory of their squares would stop it.
    """
    return optax.adam(lambda t: first / jnp.sqrt(1 + t / scale), b1=0.8, b2=0.9)


# Measured, with other choices, by `python -m benchmarks default_method`. Newton steps need no rate and follow
# the solution within a few per cent; both systems are solved as far as hypergradients profit from.
DEFAULT_METHOD = alternating(
    implicit(cg(max_steps=50, tol=0.03)),
    inner=newton_cg(max_steps=1, atol=0.0, cg_steps=50, rtol=0.1),
    outer=_outer(0.3, 20),
)
# Curvature of one batch is not worth many products, nor its noise bold steps.
DEFAULT_SAMPLED = alternating(
    implicit(cg(max_steps=5, tol=0.1)),
    inner=optax.adam(1e-2),
    outer=_outer(0.1, 50),
    inner_steps=20,
)
# Every outer step begins anew, so that derivatives have to go through all inner steps.
DEFAULT_FROM_START = alternating(
    unrolled(),
    inner=optax.adam(1e-2, eps_root=1e-8),
    outer=_outer(0.1, 50),
    inner_steps=20,
)
DEFAULT_FIXED_POINT = alternating(implicit(gmres(max_steps=20)), outer=_outer(0.3, 20), inner_steps=20)
# The support is found by few accelerated steps, and the system is symmetric.
DEFAULT_PROXIMAL = alternating(
    implicit(cg(max_steps=50, tol=0.03)), inner=picard(max_steps=50, anderson=10), outer=_outer(0.3, 20)
)


def default_method(problem: Problem | FixedPoint, train) -> Method:
    """What `optimize` takes where no method is given.

    Args:
      problem: a fixed point or one with a ``start`` has a method of its own; model state, which only inner
        steps advance, that of batches.
      train: the training data, as given to `optimize`.
    """
    if isinstance(problem, FixedPoint):
        return DEFAULT_PROXIMAL if is_proximal(problem) else DEFAULT_FIXED_POINT
    batches = isinstance(train, data.Episodes | data.Source) and not isinstance(train, data.Whole)
    if problem.start is not None:
        method = DEFAULT_FROM_START
    elif batches or data.is_iterable(train) or problem.has_state:
        method = DEFAULT_SAMPLED
    else:
        return DEFAULT_METHOD
    if isinstance(train, data.Stacked):
        return dataclasses.replace(method, inner_steps=train.num_batches)
    return method
