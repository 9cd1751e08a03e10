"""Hypergradients by implicit differentiation of the inner optimality condition.

At an inner solution ``d_params inner = 0``, so that with the Hessian ``H = d^2_params inner``::

    H v = d_params outer                                                             (1)
    dF/dhparams = d_hparams outer - d_hparams (d_params inner . v)                   (2)

Cost: one outer gradient, one product with H per solver step, one cross product. Memory: a few vectors
of the size of params, whatever the number of hyperparameters or inner steps.

For a fixed point ``params = u(params, hparams)`` the condition is ``params - u = 0``: H becomes
``(I - d_params u)^T``, which is not symmetric, and the cross product ``-(d_hparams u)^T v``. Of a proximal
gradient step it has a symmetric form, see `bilevel.proximal_gradient`, which solvers for symmetric systems
are given.

Exact at an exact inner solution and an exact solve of (1). Away from it the error is of the first
order in both. Not for hyperparameters of the optimiser (the solution does not depend on them) nor for
inner problems without an isolated minimum; there, differentiate the trajectory (`bilevel.unrolled`).

References:
  Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, arXiv:1602.02355.
  Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation",
  2020, arXiv:1911.02590.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bilevel import certificates, validation
from bilevel.lift import examples
from bilevel.linear_solvers import axpy, cg, norm
from bilevel.problem import (
    RESIDUAL,
    SETTLED,
    Composite,
    Counts,
    Estimate,
    FixedPoint,
    LinearSolver,
    inner_value,
    outer_value,
    updated,
)
from bilevel.proximal import is_proximal, restricted_system

# Rounding units of params that a map at its fixed point moves them by; up to 4 are seen in practice.
_ROUNDING = 8


@dataclasses.dataclass(frozen=True)
class Implicit:
    """See `implicit`."""

    solver: LinearSolver
    curvature: str
    batches: int
    trajectory = False

    @property
    def forgets(self) -> bool:
        """Whether the solver's state is a mere warm start."""
        return not getattr(self.solver, "remembers", False)

    def init(self, problem, point, hparams):
        """The linear solver's state."""
        del hparams
        if self.curvature == "gauss_newton" and not isinstance(getattr(problem, "inner", None), Composite):
            raise TypeError(
                'curvature="gauss_newton" needs an inner loss of known structure: '
                "bilevel.composite(predict, loss, penalty)."
            )
        validation.linear_system("solver", self.solver, problem)
        if self.batches and isinstance(problem, FixedPoint):
            raise ValueError("batches= averages inner losses, and a FixedPoint has none.")
        return self.solver.init(point.params)

    def estimate(self, problem, state, point, hparams, draw, valid, key, *, atol=None):
        """Eq. (2) at the point given, with the last batch of the draw or fresh ones.

        ``atol``: absolute residual of the system to ask for, in place of the solver's tolerances.
        """

        def outer(params, hparams):
            return outer_value(problem, params, hparams, valid, point.model_state)

        (value, metrics), (b, direct) = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(
            point.params, hparams
        )
        matvec, both = self._products(problem, point, hparams, draw)
        rtol = None if atol is None else 0.0
        if is_proximal(problem) and getattr(self.solver, "symmetric_only", False):
            restricted, right, whole = restricted_system(problem.update, point.params, hparams, draw.last, b)
            v, state, solve = self.solver.solve(restricted, right, state, key, rtol=rtol, atol=atol)
            v = whole(v)
        else:
            v, state, solve = self.solver.solve(matvec, b, state, key, rtol=rtol, atol=atol)
            if isinstance(problem, FixedPoint):  # its matrix is not symmetric: definiteness says nothing
                solve = solve._replace(negative_curvature=jnp.bool_(False))
        hv, cross = both(v)
        b_norm = norm(b)
        # A running vector is met on a batch of its own, which serves; else it is that of the cross product.
        measured = draw.sampled and getattr(self.solver, "measured", False)
        left = solve.residual if measured else norm(axpy(-1.0, hv, b))
        # What the solver found to be no number is none here, even where its answer hides it.
        left = jnp.where(jnp.isnan(solve.residual), jnp.nan, left)
        certificate = self._certificate(problem, point, hparams, draw, b, left)
        batch = draw.last
        averaged = max(1, self.batches) if draw.sampled else 1
        maps = 2 if isinstance(problem, FixedPoint) else 0  # of the contraction
        train_rows, valid_rows = examples(problem, batch) * averaged, examples(problem, valid)
        error = left / jnp.where(b_norm == 0, 1, b_norm)
        estimate = Estimate(
            value=value,
            grad=axpy(-1.0, cross, direct),
            point=point,
            error=error,
            counts=Counts(
                inner_grad=jnp.float32(maps * train_rows),
                outer_grad=jnp.float32(valid_rows),
                hvp=(solve.products * train_rows).astype(jnp.float32),
                cross=jnp.float32(train_rows),
            ),
            solve=solve._replace(residual=left),
            metrics=metrics,
            settled=True if self.forgets else error <= SETTLED,
            contraction=_contraction(problem, point, hparams, batch),
            error_kind=RESIDUAL,
        )
        return _certified(estimate, certificate, problem, hparams, train_rows), state

    def _certificate(self, problem, point, hparams, draw, b, left) -> certificates.Certificate | None:
        """Bounds of the errors, where the problem has constants and the system is that of all its data."""
        if getattr(problem, "smoothness", None) is None or draw.sampled or self.curvature != "hessian":
            return None

        def inner(params, hparams):
            return inner_value(problem, params, hparams, draw.last, point.model_state)[0]

        return certificates.certify(problem.smoothness, inner, point.params, hparams, b, left)

    def _products(self, problem, point, hparams, draw):
        """The system of Eq. (1): ``v -> H v``, and ``v -> (H v, cross product of Eq. (2))``."""
        if isinstance(problem, FixedPoint):
            return _fixed_point_products(problem, point, hparams, draw)

        def inner_on(batch):
            return lambda params, hparams: inner_value(problem, params, hparams, batch, point.model_state)[0]

        def inner(params, hparams):
            if not (self.batches and draw.sampled):
                return inner_on(draw.last)(params, hparams)
            fresh = jnp.arange(draw.steps, draw.steps + self.batches)
            return jnp.mean(jax.vmap(lambda j: inner_on(draw(j))(params, hparams))(fresh))

        def slope(params, hparams, v):
            return jax.jvp(lambda p: inner(p, hparams), (params,), (v,))[1]

        def gauss_newton(v, j=None):
            fresh = j is not None and draw.sampled
            batch = draw(draw.steps + self.batches + j) if fresh else draw.last
            return _gauss_newton(problem.inner, point.params, hparams, batch, v)

        if self.curvature == "gauss_newton":
            return gauss_newton, lambda v: (
                gauss_newton(v),
                jax.grad(slope, argnums=1)(point.params, hparams, v),
            )

        def matvec(v, j=None):
            fresh = j is not None and draw.sampled
            at = inner_on(draw(draw.steps + self.batches + j)) if fresh else inner
            return jax.jvp(lambda p: jax.grad(at)(p, hparams), (point.params,), (v,))[1]

        # The gradient of the slope along v is (H v, d_hparams (d_params inner . v)): the residual of Eq. (1)
        # is measured, not taken from the solver's recursion, at almost no cost.
        return matvec, lambda v: jax.grad(slope, argnums=(0, 1))(point.params, hparams, v)


def _certified(estimate: Estimate, certificate, problem, hparams, rows: int) -> Estimate:
    """The estimate with bounds in place of the relative residual."""
    if certificate is None:
        return estimate
    counts = estimate.counts
    return dataclasses.replace(
        estimate,
        error=certificate.error,
        value_error=certificate.value_error,
        counts=counts._replace(
            inner_grad=counts.inner_grad + certificate.gradients * rows,
            cross=counts.cross + certificate.products * rows,
        ),
        error_kind=certificates.error_kind(problem.smoothness, hparams),
    )


def _fixed_point_products(problem, point, hparams, draw):
    """For ``params = u``: ``v -> (I - d_params u)^T v``, and that together with ``-(d_hparams u)^T v``."""

    def pulled(v, batch):
        def update(params, hparams):
            return updated(problem, params, hparams, batch, point.model_state)[0]

        at_params, at_hparams = jax.vjp(update, point.params, hparams)[1](v)
        return axpy(-1.0, at_params, v), jax.tree.map(jnp.negative, at_hparams)

    def matvec(v, j=None):
        fresh = j is not None and draw.sampled
        return pulled(v, draw(draw.steps + j) if fresh else draw.last)[0]

    return matvec, lambda v: pulled(v, draw.last)


def _contraction(problem, point, hparams, batch):
    """By what factor the map of a fixed point shrinks its own step; inf where a step is not finite.

    What rounding may have made of the step is taken off, so that it is 0 where that is all.
    """
    if not isinstance(problem, FixedPoint):
        return None

    def step(params):
        return axpy(-1.0, params, updated(problem, params, hparams, batch, point.model_state)[0])

    first = step(point.params)
    second = step(axpy(1.0, first, point.params))
    size, left = norm(first), norm(second)
    moved = jax.tree.map(lambda x, d: jnp.where(d == 0, 0, x), point.params, first)
    rounding = _ROUNDING * jnp.finfo(size.dtype).eps * norm(moved)
    factor = jnp.maximum(left - rounding, 0) / jnp.where(size == 0, 1, size)
    return jnp.where(jnp.isfinite(size + left + rounding), factor, jnp.inf)


def _gauss_newton(inner, params, hparams, batch, v):
    """``(J^T (d^2 loss) J + d^2 penalty) v`` with J the Jacobian of the outputs."""
    outputs, jv = jax.jvp(lambda p: inner.predict(p, hparams, batch), (params,), (v,))
    loss_grad = jax.grad(lambda o: inner.loss(o, hparams, batch))
    _, curved = jax.jvp(loss_grad, (outputs,), (jv,))
    (product,) = jax.vjp(lambda p: inner.predict(p, hparams, batch), params)[1](curved)
    if inner.penalty is None:
        return product
    penalty_grad = jax.grad(lambda p: inner.penalty(p, hparams))
    return axpy(1.0, jax.jvp(penalty_grad, (params,), (v,))[1], product)


def implicit(solver: LinearSolver | None = None, curvature: str = "hessian", batches: int = 0) -> Implicit:
    """Implicit differentiation at (near) the inner solution.

    The error of an estimate is the relative residual ``|H v - d_params outer| / |d_params outer|``,
    measured; it says nothing of how far params are from the inner solution, and the relative error of the
    gradient can be larger by the condition number of H. With float64 and the default solver it is below
    1.5e-8, and the hypergradient of a well-conditioned problem right to 1e-6. With float32 rounding leaves a
    residual of up to about 1e-7 times the condition number of H, often far less, so that a smaller ``tol``
    may be out of reach.

    Where the problem has a `bilevel.Smoothness`, the error is a bound on ``|grad - dF/dhparams|`` instead,
    from the inner gradient and the residual measured: "certified" for up to 32 hyperparameters, with more
    "estimated", because the norm of the cross derivative is (30 power iterations, times 1.1), as with
    constants that are estimates themselves. It has the constants' say that they hold; data that are sampled,
    and Gauss-Newton curvature, keep the residual.

    Args:
      solver: of ``H v = d_params outer``; default `bilevel.cg`.
      curvature: "hessian"; "gauss_newton" for a `bilevel.composite` inner loss.
      batches: average the inner loss over so many fresh batches of a sampled source; 0 for the last
        batch of the outer step's own. Hyperparameters that belong to single examples get a gradient from
        the examples of these batches only.

    Raises:
      TypeError, ValueError: a solver that is none, an unknown curvature.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> fn = bilevel.hypergradient(problem, bilevel.implicit())
      >>> est = fn(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0))
      >>> print(f"{est.grad:.3f}")  # w* = 2 / (1 + lam): (w* - 3) * (-2 / (1 + lam)^2) = 1
      1.000
    """
    if curvature not in ("hessian", "gauss_newton"):
        raise ValueError(f'curvature must be "hessian" or "gauss_newton", got {curvature!r}.')
    batches = validation.whole_number("batches", batches, 0)
    if batches and curvature == "gauss_newton":
        raise ValueError("batches= averages Hessians; with Gauss-Newton curvature enlarge the batch instead.")
    solver = cg() if solver is None else validation.kind("solver", solver, "a linear solver")
    return Implicit(solver, curvature, batches)
