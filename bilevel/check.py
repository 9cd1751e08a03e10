"""A hypergradient compared with finite differences of what it claims to be the derivative of.

Along a direction d in the free units of hparams, with F the outer loss that hparams lead to::

    <grad, d>   against   (8 (F(t) - F(-t)) - (F(2t) - F(-2t))) / 12 t,   F(t) = F(hparams + t d)     (1)

For the implicit family F is the outer loss at the inner *solution*, found by an accurate solver; for the
trajectory family it is the value that the estimator itself returns. Eq. (1) is taken with several t, and the
two neighbours that agree best give the derivative and how uncertain it is: large t are wrong by curvature,
small ones by rounding, and a difference that no t settles proves nothing.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import data, validation
from bilevel.argmin import argmin, condition
from bilevel.constraints import Box, Fixed, bind
from bilevel.hypergradient import default_estimator, hypergradient
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.inner_loops.newton import newton
from bilevel.inner_loops.picard import picard
from bilevel.problem import RESIDUAL, Estimator, FixedPoint, Problem, outer_value
from bilevel.vectors import norm

_STEPS = {8: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6), 4: (3e-1, 1e-1, 3e-2, 1e-2, 3e-3)}
_TOLERANCE = {8: 1e-5, 4: 1e-2}
# Up to so many params Newton's method is the accurate solver.
_NEWTON_SIZE = 200


@dataclasses.dataclass(frozen=True, repr=False)
class HypergradientCheck:
    """What `check_hypergradient` found; prints as a verdict. One entry per direction.

    ``estimated`` and ``differences``: directional derivatives, by the estimate and by finite differences, in
    free units. ``uncertainties``: of the latter. ``relative_errors``: of the former. ``solved_errors``: the
    same, had the estimate been taken at the inner solution (implicit family). ``inner_residual`` and
    ``solver_residual``: norm of the inner gradient at the params given, and where the accurate solver
    ended at worst.
    ``error`` and ``error_kind``: what the estimate says of itself.
    """

    ok: bool
    estimated: np.ndarray
    differences: np.ndarray
    uncertainties: np.ndarray
    relative_errors: np.ndarray
    tolerance: float
    dtype: str
    error: float
    error_kind: str
    solved_errors: np.ndarray | None = None
    inner_residual: float | None = None
    solver_residual: float | None = None
    advice: tuple[str, ...] = ()

    def __repr__(self) -> str:
        worst = float(np.max(self.relative_errors))
        lines = [
            f"hypergradient {'agrees' if self.ok else 'DOES NOT AGREE'} with finite differences "
            f"({self.dtype}): relative error {worst:.1e}, tolerance {self.tolerance:.0e}",
            f"  {'estimated':>14} {'differences':>14} {'+-':>9} {'rel. error':>11}",
        ]
        rows = zip(self.estimated, self.differences, self.uncertainties, self.relative_errors, strict=True)
        lines += [f"  {e:14.6e} {d:14.6e} {u:9.1e} {r:11.1e}" for e, d, u, r in rows]
        if self.inner_residual is not None:
            lines.append(f"  inner residual at the params given {self.inner_residual:.1e}")
        if self.error_kind == RESIDUAL:
            lines.append(f"  relative residual of the linear solve {self.error:.1e}")
        return "\n".join(lines + [f"- {line}" for line in self.advice])


def check_hypergradient(
    problem: Problem | FixedPoint,
    estimator: Estimator | None,
    params,
    hparams,
    train,
    valid,
    solver=None,
    keys: int = 1,
    *,
    tolerance: float | None = None,
    key=None,
    verbose: bool = True,
) -> HypergradientCheck:
    """Compare an estimator with finite differences along random directions, and say what to change.

    It runs the inner problem twenty times per direction: for small instances of a problem, before the large
    one. Do it in float64 (``jax.config.update("jax_enable_x64", True)``, and params, hparams and data of that
    dtype): rounding limits the comparison to about 1e-9 there and to about 1e-3 in float32.

    A sampled source counts as one batch of all its rows for the implicit family, and gives the trajectory
    family the same batches at every evaluation.

    Args:
      problem: without model state.
      estimator: any; None for the default of `bilevel.hypergradient`. Biased ones (few Neumann terms,
        truncated trajectories, damping) are told from exact ones by their bias.
      params: for the implicit family where the estimate is made, (near) the inner solution; for the
        trajectory family where it begins.
      hparams: natural units, inside their constraints.
      train: as in `bilevel.hypergradient`.
      valid: as in `bilevel.hypergradient`; used whole.
      solver: finds the inner solution for the implicit family: an inner solver with a small ``atol``, or any
        function ``(params, hparams, batch) -> params``. Default `bilevel.newton` for up to 200 parameters,
        else `bilevel.lbfgs`; `bilevel.picard` for a fixed point.
      keys: number of directions.
      tolerance: relative error that passes; default 1e-5 in float64, 1e-2 in float32.
      key: of the directions and of sampled sources.
      verbose: write the verdict to the standard output.

    Returns:
      a `HypergradientCheck`, ``ok`` where every direction agrees within the tolerance and the differences are
      certain to it.

    Raises:
      TypeError, ValueError: as `bilevel.hypergradient`; model state; no hyperparameter that could be moved.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> w, lam = jnp.float32(1.0), jnp.float32(1.0)
      >>> train, valid = jnp.float32(2.0), jnp.float32(3.0)
      >>> check = check_hypergradient(problem, bilevel.implicit(), w, lam, train, valid, verbose=False)
      >>> check.ok
      True
    """
    validation.kind("problem", problem, "a problem")
    chosen: Any = default_estimator(problem) if estimator is None else estimator
    validation.kind("estimator", chosen, "an estimator")
    if problem.has_state:
        raise ValueError(
            "problem has has_state=True: what implicit estimators hold constant, finite differences move. "
            "Check a version without model state."
        )
    keys = validation.whole_number("keys", keys, 1)
    key = jax.random.key(0) if key is None else validation.random_key("key", key)
    hparams = validation.floating(hparams, "hparams")
    validation.finite(hparams, "hparams")
    bound = bind(problem.constraints, hparams)
    bound.check(hparams)
    train, valid = data.as_source(train, "train"), data.whole_source(data.as_source(valid, "valid"), "valid")
    valid = data.as_source(valid.whole(key), "valid")
    if not chosen.trajectory:
        # The solution depends on no start, and one batch of all rows has one solution.
        problem = dataclasses.replace(problem, start=None)
        batch = train.batch(key, train.num_batches - 1) if train.restarts else train.whole(key)
        train = data.as_source(batch, "train")

    estimate = jax.jit(hypergradient(problem, chosen))
    found = estimate(params, hparams, train, valid, key)
    free = bound.to_free(hparams)
    dtypes = [x.dtype for x in jax.tree.leaves((hparams, found.params, found.value))]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    size = 8 if min(dtype.itemsize for dtype in dtypes) >= 8 else 4
    if tolerance is None:
        tolerance = _TOLERANCE[size]
    tolerance = validation.number("tolerance", tolerance, positive=True)

    facts: dict[str, Any] = {}
    solved = None
    if chosen.trajectory:

        @jax.jit
        def value(free):
            found = estimate(params, bound.to_natural(free), train, valid, key).value
            return found, jnp.zeros_like(found)
    else:
        batch, valid_batch = train.whole(key), valid.whole(key)
        params = validation.floating(params, "params")
        solve = argmin(problem, _accurate(problem, params, eps) if solver is None else solver)
        solution = jax.jit(solve)(hparams, batch, params)
        solved = estimate(solution, hparams, train, valid, key)
        residual = jax.jit(lambda p: norm(condition(problem, p, hparams, batch)))
        facts = {"inner_residual": float(residual(params)), "solver_residual": 0.0}

        @jax.jit
        def value(free):
            hparams = bound.to_natural(free)
            params = solve(hparams, batch, solution)
            left = norm(condition(problem, params, hparams, batch))
            return outer_value(problem, params, hparams, valid_batch, None)[0], left

    directions = [_direction(bound, free, k, 2 * _STEPS[size][0]) for k in jax.random.split(key, keys)]
    derivatives = [_derivative(value, free, d, _STEPS[size], eps) for d in directions]
    differences, uncertainties, left, outside = np.transpose(derivatives)
    if solved is not None:
        facts["solver_residual"] = float(np.max(left))

    def along(grad) -> tuple[np.ndarray, np.ndarray]:
        pulled = np.asarray(ravel_pytree(bound.pull_back(free, grad))[0], np.float64)
        flat = np.array([np.asarray(ravel_pytree(d)[0], np.float64) for d in directions])
        # A direction that happens to be orthogonal to the gradient is no reason to ask for more digits.
        typical = np.linalg.norm(pulled * flat, axis=1)
        least = np.cbrt(eps) * abs(float(found.value)) + np.finfo(np.float64).tiny
        scale = np.maximum(np.maximum(np.abs(differences), typical), least)
        return flat @ pulled, scale

    estimated, scale = along(found.grad)
    relative = _relative(estimated, differences, scale)
    if solved is not None:
        at_solution, solved_scale = along(solved.grad)
        facts["solved_errors"] = _relative(at_solution, differences, solved_scale)
    certain = bool(np.all(uncertainties <= tolerance * scale))
    check = HypergradientCheck(
        ok=bool(np.all(relative <= tolerance)) and certain,
        estimated=estimated,
        differences=differences,
        uncertainties=uncertainties,
        relative_errors=relative,
        tolerance=tolerance,
        dtype="float64" if size == 8 else "float32 or less",
        error=float(found.error),
        error_kind=found.error_kind,
        **facts,
    )
    advice = _advice(check, chosen, found, certain, scale, outside=bool(np.any(outside)))
    check = dataclasses.replace(check, advice=advice)
    if verbose:
        sys.stdout.write(f"{check}\n")
    return check


def _relative(estimated, differences, scale) -> np.ndarray:
    error = np.abs(estimated - differences) / scale
    return np.where(np.isnan(error), np.inf, error)


def _accurate(problem, params, eps: float):
    """An inner solver that goes as far as rounding allows."""
    if isinstance(problem, FixedPoint):
        return picard(100_000, atol=eps**0.75)
    if sum(x.size for x in jax.tree.leaves(params)) <= _NEWTON_SIZE:
        return newton(200, atol=16 * eps)
    return lbfgs(5000, atol=eps**0.75)


def _direction(bound, free, key, reach: float):
    """Unit length, along what may move: nothing fixed, and no entry that would leave its box."""
    leaves, treedef = jax.tree.flatten(free)
    moves = []
    for leaf, constraint, k in zip(leaves, bound.leaves, jax.random.split(key, len(leaves)), strict=True):
        move = jax.random.normal(k, leaf.shape, leaf.dtype)
        if isinstance(constraint, Fixed):
            move = jnp.zeros_like(move)
        if isinstance(constraint, Box):
            inside = (leaf - reach >= constraint.lo) & (leaf + reach <= constraint.hi)
            move = jnp.where(inside, move, 0)
        moves.append(move)
    length = float(norm(moves))
    if length == 0:
        raise ValueError(
            "no hyperparameter can be moved: all are bilevel.fixed(), or nearer to the end of their "
            f"bilevel.box than {reach:g}. Check at hparams inside."
        )
    return jax.tree.unflatten(treedef, [m / jnp.asarray(length, m.dtype) for m in moves])


def _derivative(value, free, direction, steps, eps: float) -> tuple[float, float, float, bool]:
    """Eq. (1) at the step size that its neighbour confirms best, and how far the two are apart.

    Then the largest residual, and whether a step led to where there is no loss.
    """
    found, rounding, residuals, outside = [], [], [0.0], False

    def at(t: float) -> float:
        moved = jax.tree.map(lambda x, d: x + jnp.asarray(t, x.dtype) * d, free, direction)
        outer, left = map(float, value(moved))
        nonlocal outside
        if math.isfinite(outer):
            residuals.append(left)
        else:
            outside = True
        return outer

    for t in steps:
        near, far = (at(t), at(-t)), (at(2 * t), at(-2 * t))
        found.append((8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * t))
        rounding.append(eps * max(map(abs, near)) / t)
    apart = np.abs(np.diff(found)) + np.asarray(rounding[1:])
    best = int(np.argmin(np.where(np.isnan(apart), np.inf, apart)))
    uncertainty = apart[best] if np.isfinite(apart[best]) else np.inf
    return found[best + 1], float(uncertainty), max(residuals), outside


def _advice(
    check: HypergradientCheck, estimator, found, certain: bool, scale, outside: bool
) -> tuple[str, ...]:
    """What stands behind a disagreement, likeliest first."""
    if check.ok:
        return ()
    if not np.all(np.isfinite(check.estimated)):
        return ("The estimate is not finite. Look for a log or square root of zero at these params.",)
    advice = []
    if not certain:
        accuracy = float(np.max(check.uncertainties / scale))
        advice.append(
            f"The finite differences themselves are only good to {accuracy:.1e} here: they cannot decide."
        )
        if outside:
            advice[-1] += (
                " Some of their steps leave the domain of the loss (a log or square root?): name that of "
                "hparams in the problem, such as constraints=bilevel.positive(), and they stay inside."
            )
        if check.dtype != "float64":
            advice.append("Check in float64, with params, hparams and data of that dtype.")
        elif outside:
            pass
        elif check.solver_residual is not None:
            advice.append(
                f"The inner solver ended at a residual of {check.solver_residual:.1e}: give solver= one with "
                "more steps or a smaller atol, or an outer loss that is smooth in hparams."
            )
        else:
            advice.append("The trajectory may be chaotic: take fewer steps or a smaller step size.")
    wrong = bool(np.any(np.abs(check.estimated - check.differences) > 2 * check.uncertainties))
    if not wrong:
        return tuple(advice)
    if bool(found.solve.negative_curvature):
        advice.append(
            "The linear solve met negative curvature: params are not at a minimum of the inner loss, or the "
            "loss is not convex there. Solve it further, or add damping= to bilevel.cg, which is a bias."
        )
    if check.error_kind == RESIDUAL and check.error > check.tolerance:
        advice.append(
            f"The linear solve left a relative residual of {check.error:.1e}: {_remedy(estimator)}."
        )
    if check.solved_errors is not None:
        at_solution = float(np.max(check.solved_errors))
        if at_solution < 0.1 * float(np.max(check.relative_errors)):
            advice.append(
                f"params are not the inner solution: the inner residual there is {check.inner_residual:.1e}, "
                f"and at the solution the relative error is {at_solution:.1e}. Solve the inner problem "
                "further before the estimate (more inner steps, or an inner solver with a smaller atol)."
            )
    limit = 1e-8 if check.dtype == "float64" else 1e-4
    ended, begun = check.solver_residual, check.inner_residual
    if ended is not None and begun is not None and ended > max(limit, 10 * begun):
        advice.append(
            f"The solver that the differences rely on ended at a residual of {ended:.1e}, "
            "above that of params: give solver= one with more steps or a smaller atol."
        )
    if getattr(estimator, "truncate", None) is not None:
        advice.append("truncate= leaves older steps out of the derivative: raise it, or accept that bias.")
    if getattr(estimator, "clip", None) is not None:
        advice.append("clip= shortens derivatives of the trajectory: raise it, or accept that bias.")
    if hasattr(estimator, "particles"):
        advice.append("It is made of random perturbations: take more particles, or a smaller sigma.")
    if not advice or (len(advice) <= 2 and not certain):
        advice.append(
            "Nothing in the solves explains it. Likely causes: a loss that does not depend smoothly on "
            "hparams (rounding, a discrete draw, stop_gradient), an inner problem with several solutions, a "
            "linear solver that does not fit the matrix, a bug in an estimator of your own."
        )
    return tuple(advice)


def _remedy(estimator) -> str:
    """What lowers the residual of an estimator's linear solve."""
    solver = getattr(estimator, "solver", None)
    if getattr(solver, "damping", 0.0):
        rank = "raise rank= or " if hasattr(solver, "rank") else ""
        return f"{rank}lower damping= of bilevel.{validation.called(solver)}, which is a bias"
    return "raise max_steps or lower tol of the estimator's linear solver (terms, for bilevel.neumann)"
