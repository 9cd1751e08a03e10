"""The inner solution as a differentiable function of hparams and data.

At the solution the inner condition ``c(params, theta) = 0`` holds, with ``theta`` the hparams and the batch:
the gradient of the loss, or ``params - update(params)`` for a fixed point. Hence, whatever found the
solution::

    (d_params c) dparams = -(d_theta c) dtheta                                          (1)

Eq. (1) is the rule of a `jax.custom_jvp`, its left side solved by `jax.lax.custom_linear_solve`, which JAX
can transpose: one rule gives forward mode, reverse mode and, as it is made of differentiable parts itself,
every order of derivative.

Cost of a first derivative: one linear solve, whose products are Hessian-vector products, and one cross
product. Memory: a few vectors of the size of params, whatever the number of steps the solver took. Error: of
first order in the distance to the solution and in the residual of the linear solve; neither can be reported
from inside a derivative, so measure them once with `bilevel.check_hypergradient`.

References:
  Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-Lopez, Pedregosa and Vert, "Efficient and modular
  implicit differentiation", 2022, arXiv:2105.15183.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data, validation
from bilevel.constraints import bind
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.inner_loops.picard import picard
from bilevel.linear_solvers import cg, gmres
from bilevel.placement import refuse_explicit
from bilevel.problem import (
    Batch,
    Draw,
    FixedPoint,
    HParams,
    InnerSolver,
    LinearSolver,
    Params,
    Point,
    Problem,
    PyTree,
    inner_value,
    updated,
)
from bilevel.vectors import axpy, size_of


class _Arguments(NamedTuple):
    """What has derivatives; None stands in ``smooth`` for the leaves of the batch that have none."""

    hparams: HParams
    smooth: PyTree


def argmin(
    problem: Problem | FixedPoint,
    solver: InnerSolver | Callable | None = None,
    linear_solver: LinearSolver | None = None,
) -> Callable[..., Params]:
    """The inner solution as a function that JAX differentiates implicitly.

    The function returned may stand anywhere in a larger program: inside a loss, below other layers, under
    ``jit``, ``vmap``, ``grad``, ``jvp`` and any composition of them. Its derivatives by hparams and by the
    floating leaves of the batch are those of Eq. (1) of this module, exact at the exact solution. Its
    derivative by ``init`` is zero: the solution, where it is isolated, does not depend on where the search
    began. (Of several solutions, init selects one, and stays on it under small changes.) For a start that is
    learned, differentiate the trajectory with `bilevel.unrolled`.

    Args:
      problem: its inner level is solved; the outer loss is not used. The Hessian at the solution has to be
        positive definite, or ``I - d_params update`` invertible.
      solver: an inner solver, or any function ``(params, hparams, batch) -> params``, which may be as opaque
        as it likes as long as it is traceable: nothing differentiates it. Default `bilevel.lbfgs`, which
        needs no constants, takes losses that are not convex, and on badly conditioned ones takes several
        times fewer gradients than `bilevel.accelerated` without constants; `bilevel.picard` for a fixed
        point.
      linear_solver: of Eq. (1); default `bilevel.cg`, and `bilevel.gmres` for a fixed point, whose system
        is not symmetric. These defaults end at their usual tolerance, or after 20 steps for each number in
        params (at least 100, at most 10,000); gmres keeps at most as many vectors as there are numbers in
        params and as a million numbers hold, but 20.

    Returns:
      ``solve(hparams, batch, init, key=None) -> params``; ``init`` is where the search begins, ``key`` is for
      solvers that draw. Params are nan where the inner solver ended at a loss that is not finite, and
      derivatives are where the linear solver says that its system is not.

    Raises:
      TypeError, ValueError: from this call, for a problem with a start or model state or a solver of the
        wrong kind; from the function's, for params, hparams and batches that do not fit the problem.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> solve = argmin(problem)
      >>> h, data = jnp.float32(1.0), jnp.float32(2.0)
      >>> print(f"{solve(h, data, init=jnp.float32(0.0)):.3f}")  # data / (1 + lam)
      1.000
      >>> print(f"{jax.grad(solve)(h, data, init=jnp.float32(0.0)):.3f}")  # -data / (1 + lam)^2
      -0.500
    """
    validation.kind("problem", problem, "a problem")
    _refuse(problem)
    fixed_point = isinstance(problem, FixedPoint)
    if solver is None:
        solver = picard() if fixed_point else lbfgs()
    if not callable(solver):
        validation.kind("solver", solver, "an inner solver")
    if linear_solver is not None:
        validation.kind("linear_solver", linear_solver, "a linear solver")
        validation.linear_system("linear_solver", linear_solver, problem)
    solution = _differentiable(problem, solver, linear_solver)

    def solve(hparams: HParams, batch: Batch, init: Params, key=None) -> Params:
        refuse_explicit(hparams=hparams, batch=batch, init=init)
        hparams = validation.floating(hparams, "hparams")
        init = validation.floating(init, "init")
        validation.finite(hparams, "hparams")
        validation.finite(init, "init")
        bind(problem.constraints, hparams).check(hparams)
        key = jax.random.key(0) if key is None else validation.random_key("key", key)
        smooth, rest = _split(_arrays(batch))
        theta = _Arguments(hparams, smooth)
        _check_fit(problem, init, theta, rest)
        return solution(theta, rest, init, key)

    return solve


def _refuse(problem) -> None:
    if problem.start is not None:
        raise ValueError(
            "problem has start=, but argmin begins where init= says. Drop it from the problem; if hparams "
            "enter through the start, take bilevel.unrolled(...)."
        )
    if problem.has_state:
        raise ValueError(
            "problem has has_state=True, but a solution has no model state beside it. Close over a constant "
            "one, or make what is to be solved for a part of params."
        )


def _differentiable(problem, solver, linear_solver: Any) -> Callable:
    @jax.custom_jvp
    def solution(theta, rest, init, key):
        batch = _merge(theta.smooth, rest)
        if callable(solver):
            params = solver(init, theta.hparams, batch)
            _check_same(init, params)
        else:
            point, draw = Point(init), Draw(lambda j: batch, 1, False)
            state = solver.init(problem, point, theta.hparams)
            end, _, info = solver.solve(problem, state, point, theta.hparams, draw, key)
            params = _nan_unless(info, end.params)
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), params, init)

    @solution.defjvp
    def jvp(primals, tangents):
        theta, rest, init, key = primals
        params = solution(theta, rest, init, key)

        def at(params, theta):
            return condition(problem, params, theta.hparams, _merge(theta.smooth, rest))

        _, slope = jax.jvp(lambda theta: at(params, theta), (theta,), (tangents[0],))

        def product(v):
            return jax.jvp(lambda params: at(params, theta), (params,), (v,))[1]

        def solve(matvec, b):
            def product(v, j=None):
                del j  # there is one batch
                return matvec(v)

            chosen = _default_solver(problem, b) if linear_solver is None else linear_solver
            x, _, info = chosen.solve(product, b, chosen.init(b), key)
            return _nan_unless(info, x)

        # JAX transposes the solve only where all of its right-hand side depends on the tangents; what theta
        # does not act on, as a penalty does not on a bias, depends on nothing.
        nothing = sum((0 * jnp.sum(t).real for t in jax.tree.leaves(tangents[0])), start=jnp.float32(0))
        # Eq. (1)
        tangent = jax.lax.custom_linear_solve(
            product,
            jax.tree.map(lambda s: nothing.astype(s.dtype) - s, slope),
            solve,
            transpose_solve=solve,
            symmetric=not isinstance(problem, FixedPoint),
        )
        return params, tangent

    return solution


def _default_solver(problem, params) -> Any:
    """Its steps grow with the system: one for each unknown, and more where rounding acts."""
    size = size_of(params)
    steps = min(max(100, 20 * size), 10_000)
    if isinstance(problem, FixedPoint):
        return gmres(steps, restart=max(20, min(size, 10**6 // size)))
    return cg(steps)


def _nan_unless(info, tree: PyTree) -> PyTree:
    """The tree, or nan where the solve that ended there measured no finite residual."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(info.residual), x, jnp.nan), tree)


def condition(problem, params, hparams, batch) -> Params:
    """What is zero at the inner solution: the gradient of the loss, or ``params - update(params)``."""
    if isinstance(problem, FixedPoint):
        return axpy(-1.0, updated(problem, params, hparams, batch, None)[0], params)
    return jax.grad(lambda p: inner_value(problem, p, hparams, batch, None)[0])(params)


# --- Batches ------------------------------------------------------------------------------------------------


def _arrays(batch):
    if isinstance(batch, data.Source):
        raise TypeError(
            f"batch must be arrays, got the source {type(batch).__name__}: argmin solves on one batch. Pass "
            "the arrays themselves."
        )
    return data.as_arrays(batch, "batch") if jax.tree.leaves(batch) else batch


def _split(batch):
    """The leaves with derivatives and the others (integers, keys), each with None in place of the rest."""

    def smooth(x):
        return jnp.issubdtype(x.dtype, jnp.inexact)

    return (
        jax.tree.map(lambda x: x if smooth(x) else None, batch),
        jax.tree.map(lambda x: None if smooth(x) else x, batch),
    )


def _merge(smooth, rest):
    return jax.tree.map(lambda x, y: y if x is None else x, smooth, rest, is_leaf=lambda x: x is None)


# --- What does not fit --------------------------------------------------------------------------------------


def _check_fit(problem, init, theta, rest) -> None:
    batch = _merge(theta.smooth, rest)
    try:
        jax.eval_shape(lambda *args: condition(problem, *args), init, theta.hparams, batch)
    except Exception as error:
        level = "update" if isinstance(problem, FixedPoint) else "inner"
        shapes = "; ".join(
            f"{name} = {validation.describe(tree)}"
            for name, tree in (("init", init), ("hparams", theta.hparams), ("batch", batch))
        )
        raise ValueError(
            f"{level}(params, hparams, batch) failed on what it was given ({type(error).__name__}: {error}). "
            f"Does init fit it? {shapes}."
        ) from error


def _check_same(init, params) -> None:
    def shapes(tree):
        return [(path, jnp.shape(x)) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]

    if shapes(init) != shapes(params):
        raise ValueError(
            "solver must return params like init; it returned "
            f"{validation.describe(params)} for {validation.describe(init)}."
        )
