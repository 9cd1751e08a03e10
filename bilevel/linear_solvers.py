"""Solvers of ``A x = b`` for pytrees, where A is known by its products; all of them can be imported here.

The systems are those of implicit differentiation, ``H v = d_params outer`` with the inner Hessian H.
Every solver reports what is left: the norm of the residual, its iterations, and whether it met negative
curvature, in which case H is not that of a minimum and the answer means little.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import validation
from bilevel.gmres import gmres
from bilevel.nystrom import nystrom
from bilevel.problem import Preconditioner, PyTree, SolveInfo
from bilevel.vectors import axpy, cast, norm, scaled, size_of, threshold, vdot, where, widened

__all__ = ["axpy", "cg", "dense", "gmres", "neumann", "norm", "nystrom", "sgd", "vdot", "where"]

# Solutions are followed where the cosine of two changes is above the first, once a solve took as
# many steps as the second.
_STRAIGHT, _MANY_STEPS = 0.8, 4
# Above this many parameters a dense matrix is refused (it would hold 200 MB in float64).
DENSE_LIMIT = 5000


class _CGLoop(NamedTuple):
    x: PyTree
    residual: PyTree
    direction: PyTree
    rz: jax.Array  # residual . preconditioned residual
    rr: jax.Array | None  # residual . residual, where it is another number
    steps: jax.Array
    negative_curvature: jax.Array


class CGState(NamedTuple):
    """The last solution, the preconditioner's state, and how the solution differs from the one before.

    With ``follow`` the next solve starts at ``x + reach change``; ``reach`` is 0 unless solutions move on in
    one direction. Else both are empty.
    """

    x: PyTree
    preconditioner: PyTree
    change: PyTree = ()
    reach: Any = ()


@runtime_checkable
class Counted(Protocol):
    """State of a preconditioner that says how many products its last update took."""

    products: Any


@dataclasses.dataclass(frozen=True)
class CG:
    """See `cg`."""

    max_steps: int
    tol: float | None
    atol: float
    preconditioner: Preconditioner | None
    damping: float
    follow: bool
    symmetric_only = True

    def init(self, params):
        """Zeros: the first solve starts cold."""
        preconditioner = self.preconditioner.init(params) if self.preconditioner else ()
        state = CGState(jax.tree.map(jnp.zeros_like, params), preconditioner)
        if not self.follow:
            return state
        # In buffers of their own, which can be donated.
        reach = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        return state._replace(change=jax.tree.map(jnp.zeros_like, params), reach=reach)

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """``(A + damping I) x = b``; ``rtol``, ``atol`` replace the settings."""
        bb = vdot(b, b)
        rtol, atol = self.tol if rtol is None else rtol, self.atol if atol is None else atol
        target = threshold(bb, rtol, atol)

        def product(v):
            return axpy(self.damping, v, matvec(v)) if self.damping else matvec(v)

        if self.preconditioner:
            # It may work in more digits than b has.
            preconditioner = self.preconditioner.update(
                lambda v: product(cast(v, b)), state.preconditioner, key
            )
        else:
            preconditioner = ()

        def precondition(r):
            rr = vdot(r, r)
            if not self.preconditioner:
                return r, rr, None
            z = self.preconditioner.apply(preconditioner, r)
            return z, vdot(r, z), rr

        def going(loop):
            rr = loop.rz if loop.rr is None else loop.rr
            more = (loop.steps < 0) | ((loop.steps < self.max_steps) & (rr > target))
            return more & ~loop.negative_curvature

        def step(loop):
            # The first pass of a warm start, step -1, searches along its start from x = 0, by the same
            # formulas: never worse than a cold start, and one product in the program instead of two.
            first = loop.steps < 0
            ap = product(loop.direction)
            curvature = vdot(loop.direction, ap)
            negative = (curvature < 0) | ((curvature == 0) & ~first)
            alpha = jnp.where(curvature > 0, loop.rz / jnp.where(curvature > 0, curvature, 1), 0)
            x = axpy(alpha, loop.direction, loop.x)
            r = axpy(-alpha, ap, loop.residual)
            z, rz, rr = precondition(r)
            beta = jnp.where(first | (loop.rz == 0), 0, rz / jnp.where(loop.rz == 0, 1, loop.rz))
            return _CGLoop(x, r, axpy(beta, loop.direction, z), rz, rr, loop.steps + 1, negative)

        cold = jax.tree.map(jnp.zeros_like, b)
        z, rz, rr = precondition(b)
        ahead = state.x
        if self.follow:
            ahead = where(state.reach > 0, axpy(state.reach, state.change, state.x), state.x)
        slope = vdot(b, ahead)
        # A start that is not finite, or without a slope, as zero is, is dropped.
        warm = jnp.isfinite(slope) & (slope != 0)
        direction, rz = where(warm, ahead, z), jnp.where(warm, slope, rz)
        extra = warm.astype(jnp.int32)
        start = _CGLoop(cold, b, direction, rz, rr, -extra, jnp.bool_(False))
        end = jax.lax.while_loop(going, step, start)
        residual = jnp.sqrt(end.rz if end.rr is None else end.rr)
        spent = preconditioner.products if isinstance(preconditioner, Counted) else 0
        info = SolveInfo(residual, end.steps, end.steps + extra + spent, end.negative_curvature)
        new = CGState(end.x, preconditioner)
        if self.follow:
            change = axpy(-1.0, state.x, end.x)
            reach = _reach(state.change, change, (end.steps >= _MANY_STEPS) | (state.reach > 0))
            new = new._replace(change=change, reach=reach)
        return end.x, new, info


def _reach(before, change, worth):
    """How much of its change the next solution is expected to change by; 0 where solutions turn or jump."""
    sizes = norm(before), norm(change)
    on = worth & (vdot(before, change) > _STRAIGHT * sizes[0] * sizes[1])
    return jnp.where(on, jnp.minimum(1, sizes[1] / jnp.where(on, sizes[0], 1)), 0).astype(sizes[1].dtype)


def cg(
    max_steps: int = 100,
    tol: float | None = None,
    atol: float = 0.0,
    preconditioner: Preconditioner | None = None,
    damping: float = 0.0,
    follow: bool = False,
) -> CG:
    """Conjugate gradients, for symmetric positive definite systems.

    Stops at ``|r| <= max(tol |b|, atol)``, after ``max_steps`` steps, or at a direction of non-positive
    curvature (then it keeps what it had and says so). Inside a method every solve starts at the best
    multiple of the solution before. One product per step and one for a warm start; three vectors of memory.

    Args:
      max_steps: steps at most.
      tol: relative to the right-hand side; default the square root of the dtype's rounding unit
        (1.5e-8 in float64, 3.5e-4 in float32); 0 for a fixed number of steps.
      atol: absolute.
      preconditioner: such as `bilevel.nystrom`, or any object with the three functions of
        `bilevel.problem.Preconditioner`. Products that its state has in a field ``products`` are counted.
      damping: solve ``(A + damping I) x = b`` instead. This is a bias, and the error of an
        implicit estimate, measured against A, shows it.
      follow: while the solutions of a method move in one direction, start at the last one and as much of its
        last change again. Along a run of even steps that takes 5 % fewer products at a condition number of 10
        and half as many at 1e5; where solutions jump, as with minibatches, as many. Three vectors more.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    References:
      Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        raise TypeError(
            "preconditioner must have init(params), update(matvec, state, key) and apply(state, v), "
            f"got {preconditioner!r}."
        )
    return CG(
        validation.whole_number("max_steps", max_steps, 1),
        None if tol is None else validation.number("tol", tol, minimum=0.0),
        validation.number("atol", atol, minimum=0.0),
        preconditioner,
        validation.number("damping", damping, minimum=0.0),
        validation.flag("follow", follow),
    )


@dataclasses.dataclass(frozen=True)
class Neumann:
    """See `neumann`."""

    terms: int
    step_size: float
    randomized: bool

    def init(self, params):
        """No state."""
        del params
        return ()

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """The truncated series; a fixed number of terms, so that tolerances do not apply."""
        del rtol, atol
        if self.randomized:
            return self._one_term(matvec, b, state, key)

        def step(j, carry):
            power, total, negative = carry
            product = matvec(power, j - 1)
            curvature = vdot(power, product)
            power = axpy(-self.step_size, product, power)
            return power, axpy(1.0, power, total), negative | (curvature < 0)

        carry = (b, b, jnp.bool_(False))
        power, total, negative = jax.lax.fori_loop(1, self.terms, step, carry)
        x = jax.tree.map(lambda s: (self.step_size * s).astype(s.dtype), total)
        # b - A x = (I - step_size A)^terms b, one product beyond the last power: not formed.
        products = jnp.int32(self.terms - 1)
        info = SolveInfo(norm(power), products + 1, products, negative)
        return x, state, info

    def _one_term(self, matvec, b, state, key):
        """A term drawn at random, ``terms`` times."""

        def step(j, carry):
            power, negative = carry
            product = matvec(power, j)
            return axpy(-self.step_size, product, power), negative | (vdot(power, product) < 0)

        drawn = jax.random.randint(key, (), 0, self.terms, jnp.int32)
        power, negative = jax.lax.fori_loop(0, drawn, step, (b, jnp.bool_(False)))
        x = scaled(power, self.terms * self.step_size)
        return x, state, SolveInfo(norm(power), drawn + 1, drawn, negative)


def neumann(terms: int, step_size: float, randomized: bool = False) -> Neumann:
    """Truncated Neumann series ``x = step_size sum_{k < terms} (I - step_size A)^k b``.

    It is what ``terms`` unrolled gradient steps of the same size compute at the solution of a
    quadratic. ``terms - 1`` products, each with a fresh batch where the source is sampled. It converges
    for ``0 < step_size < 2 / lambda_max(A)``; its bias is at most
    ``(1 - step_size mu)^terms |b| / mu`` for the smallest eigenvalue mu.

    Args:
      terms: of the series, at least 1.
      step_size: about the inverse of the largest eigenvalue; for a mini-batch, of its Hessian.
      randomized: one of the terms, drawn at random, times their number: the same in the mean for half of the
        products, and never exact. `bilevel.hypergradient` draws another one only for another ``key``.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    References:
      Ghadimi and Wang, "Approximation methods for bilevel programming", 2018, arXiv:1802.02246 (randomized).
      Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
      differentiation", 2020, arXiv:1911.02590.
    """
    return Neumann(
        validation.whole_number("terms", terms, 1),
        validation.number("step_size", step_size, positive=True),
        validation.flag("randomized", randomized),
    )


@dataclasses.dataclass(frozen=True)
class Dense:
    """See `dense`."""

    def init(self, params):
        """No state; refuses what does not fit."""
        size = size_of(params)
        if size > DENSE_LIMIT:
            raise ValueError(
                f"bilevel.dense() would form a matrix of {size} x {size}; it takes at most {DENSE_LIMIT} "
                "parameters. Take bilevel.cg(), which needs products only."
            )
        return ()

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """By LU factorisation of the matrix formed from its products with unit vectors."""
        del key, rtol, atol
        flat, unravel = ravel_pytree(b)
        columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        columns, right = widened((columns, flat))
        x = jnp.linalg.solve(columns.T, right)
        residual = jnp.linalg.norm(columns.T @ x - right)
        products = jnp.int32(flat.size)
        return (
            unravel(x.astype(flat.dtype)),
            state,
            SolveInfo(residual, jnp.int32(1), products, jnp.vdot(x, right) < 0),
        )


def dense() -> Dense:
    """Direct solve of the matrix itself: for tests and for a few thousand parameters at most.

    As many products as parameters, in one batch, and the square of their number in memory.
    """
    return Dense()


class SGDState(NamedTuple):
    """The running vector, and the solves so far."""

    v: PyTree
    solves: jax.Array


@dataclasses.dataclass(frozen=True)
class SGD:
    """See `sgd`."""

    step_size: Any
    steps: int
    before: bool
    remembers = True

    @property
    def measured(self) -> bool:
        """Whether the residual it reports is that of its answer."""
        return self.before

    def init(self, params):
        """Zeros."""
        return SGDState(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def step_at(self, state: SGDState):
        """Size of the coming step."""
        return self.step_size(state.solves) if callable(self.step_size) else self.step_size

    def after(self, state: SGDState, v) -> SGDState:
        """The state after a solve."""
        return SGDState(v, jnp.minimum(state.solves, _LAST_SOLVE) + 1)

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """Steps from the running vector, each with the curvature of a fresh batch where there are some."""
        del key, rtol, atol
        step_size = self.step_at(state)

        def step(j, carry):
            v, _, negative = carry
            product = matvec(v, j)
            left = axpy(-1.0, b, product)
            return axpy(-step_size, left, v), norm(left), negative | (vdot(v, product) < 0)

        v, residual, negative = step(0, (state.v, None, jnp.bool_(False)))
        if self.steps > 1:
            v, residual, negative = jax.lax.fori_loop(1, self.steps, step, (v, residual, negative))
        taken = jnp.int32(self.steps)
        info = SolveInfo(residual, taken, taken, negative)
        # A first hypergradient with v = 0 would have no indirect term, and a run could take it for the last.
        answer = where(state.solves > 0, state.v, v) if self.before else v
        return answer, self.after(state, v), info


_LAST_SOLVE = np.iinfo(np.int32).max - 1


def sgd(step_size, steps: int = 1, before: bool = False) -> SGD:
    """A running vector that makes one gradient step per solve, for single-loop methods.

    The step is ``v <- v - step_size (A v - b)``. Params, v and hparams then move at the same pace, one step
    each, and v is right once all have settled: on the way it lags behind, and so does the hypergradient. One
    product per step, with a fresh batch where the source is sampled, and one vector of memory. The residual
    it reports is that of v before the last step.

    Converges for ``0 < step_size < 2 / lambda_max(A)``: while A and b stay, each step multiplies the error
    by ``1 - step_size mu`` at most, for small steps and the smallest eigenvalue mu. T steps from zero are
    `neumann` with T terms.

    Args:
      step_size: about the inverse of the largest eigenvalue; smaller with mini-batches. Or a function of the
        number of solves so far, an optax schedule; it has to be positive.
      steps: of each solve.
      before: answer with v as it was before the step, so that it and params can move from one point; for one
        step only. The first solve, from zero, answers with v after it.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.

    References:
      Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and
      global variance reduction algorithms", 2022, arXiv:2201.13409.
    """
    if not callable(step_size):
        step_size = validation.number("step_size", step_size, positive=True)
    steps = validation.whole_number("steps", steps, 1)
    if validation.flag("before", before) and steps != 1:
        raise ValueError(f"before=True answers with what one step starts from, got steps={steps}.")
    return SGD(step_size, steps, before)
