"""How the smoothness of the outer problem changes along a run.

With F the outer value at the inner solution, as a function of the hyperparameters in free units, and u_k the
points of a run, the local smoothness of step k is::

    s_k = |grad F(u_(k+1)) - grad F(u_k)| / |u_(k+1) - u_k|                                      (1)

Where a bound on it holds everywhere, gradient descent with a step below two over that bound is safe. Relaxed
smoothness allows ``s_k <= K_0 + K_1 |grad F(u_k)|``: then no step is safe where gradients are large, and the
step has to be normalised or clipped (`bilevel.bo_rep`).

References:
  Zhang, He, Sra and Jadbabaie, "Why gradient clipping accelerates training: a theoretical justification for
  adaptivity", 2020, arXiv:1905.11881.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from bilevel import data, validation
from bilevel.constraints import bind
from bilevel.estimators.implicit import implicit
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.methods.inexact import refuse_unfit
from bilevel.plots import figure
from bilevel.problem import Draw, Estimator, InnerSolver, Point, Problem
from bilevel.result import Result
from bilevel.vectors import axpy, norm


@dataclasses.dataclass(frozen=True)
class PathSmoothness:
    """Local smoothness against gradient norm, one entry for each move of the path.

    ``step``: row of the path where the move began. ``grad_norm``: there, ``smoothness``: Eq. (1) of the
    module, ``length``: of the move; all in free units. ``constant`` and ``slope``: least squares of
    ``smoothness = constant + slope grad_norm``. ``power``: p of the best line
    ``log smoothness = p log grad_norm + const``; about 0 where the smoothness is bounded, and 2/3 for a
    quartic. Fits are nan where gradients hardly differ. ``inner_residual``: the largest inner gradient norm
    that was left, ``residual``: the largest of the linear systems.
    """

    step: np.ndarray
    grad_norm: np.ndarray
    smoothness: np.ndarray
    length: np.ndarray
    constant: float
    slope: float
    power: float
    inner_residual: float
    residual: float

    def __repr__(self) -> str:
        if not self.step.size:
            return "PathSmoothness(no moves)"
        g, s = self.grad_norm, self.smoothness
        return (
            f"PathSmoothness({self.step.size} moves, gradient norm {g.min():.3g} to {g.max():.3g}, "
            f"smoothness {s.min():.3g} to {s.max():.3g}, about {self.constant:.3g} + {self.slope:.3g} * "
            f"gradient norm, power {self.power:.2f})"
        )

    def plot(self):
        """Smoothness against gradient norm, coloured by step, with the line of the fit; a matplotlib Figure.

        Raises:
          ImportError: matplotlib is missing (``pip install 'bilevel[plots]'``).
        """
        fig = figure(figsize=(4.6, 3.4))
        ax = fig.subplots()
        seen = (self.grad_norm > 0) & (self.smoothness > 0)
        points = ax.scatter(self.grad_norm[seen], self.smoothness[seen], c=self.step[seen], s=12)
        if np.isfinite(self.slope) and seen.any():
            g = np.geomspace(self.grad_norm[seen].min(), self.grad_norm[seen].max(), 200)
            line = self.constant + self.slope * g
            label = f"{self.constant:.3g} + {self.slope:.3g} |grad|"
            ax.plot(g[line > 0], line[line > 0], color="0.4", lw=1, label=label)
            ax.legend(frameon=False, fontsize=8)
        ax.set(xscale="log", yscale="log", xlabel="gradient norm (free units)", ylabel="local smoothness")
        fig.colorbar(points, ax=ax, label="outer step")
        return fig


def path_smoothness(
    problem: Problem,
    path,
    train,
    valid,
    params=None,
    solver: InnerSolver | None = None,
    estimator: Estimator | None = None,
    model_state=None,
) -> PathSmoothness:
    """Local smoothness of the outer problem along a run, against the norm of its gradient.

    At every point of the path the inner problem is solved, warm started at the point before, and the
    hypergradient taken, on all rows of the data: no noise of minibatches enters. Differences of gradients
    lose digits over short moves; float64, or a path of which every so many rows are kept, has enough.
    Model state is held constant.

    Args:
      problem: the problem of the run.
      path: a `Result`, whose trajectory is taken (thinned, so that a move may span several outer steps), or
        hparams of which every leaf has an axis of points in front, natural units.
      train: training data: arrays, or `minibatches`, whose arrays are used whole.
      valid: validation data, likewise.
      params: where the first inner solve begins; default those of the result.
      solver: of the inner problem; default `lbfgs`.
      estimator: default `implicit`.
      model_state: for problems with ``has_state``; default that of the result.

    Raises:
      TypeError, ValueError: arguments of the wrong kind; a population, or a trajectory that kept quantiles
        only.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda y, x, data: 0.5 * (y - x) ** 2,
      ...     outer=lambda y, x, data: y**4 / 4,
      ... )
      >>> path, data = jnp.geomspace(8.0, 1.0, 30), jnp.zeros(1)
      >>> seen = bilevel.path_smoothness(problem, path, data, data, params=jnp.float32(8.0))
      >>> print(f"{seen.smoothness.max():.0f} to {seen.smoothness.min():.1f}, power {seen.power:.2f}")
      179 to 3.2, power 0.67
    """
    refuse_unfit("path_smoothness", problem)
    if isinstance(path, Result):
        params = path.params if params is None else params
        model_state = path.model_state if model_state is None else model_state
        path = _trajectory(path)
    path = validation.floating(path, "path")
    rows = {leaf.shape[:1] for leaf in jax.tree.leaves(path)}
    if len(rows) > 1 or rows == {()} or min(rows) < (2,):
        raise ValueError(
            "path must have an axis of at least 2 points in front of every leaf of hparams, got "
            f"{validation.describe(path)}."
        )
    if params is None:
        raise ValueError("params must be given where path is no Result: the first inner solve begins there.")
    params = validation.floating(params, "params")
    solver = lbfgs() if solver is None else validation.kind("solver", solver, "an inner solver")
    estimator = implicit() if estimator is None else validation.kind("estimator", estimator, "an estimator")
    if estimator.trajectory:
        raise TypeError("estimator must be of the implicit family: the solver makes the inner solution.")
    key = jax.random.key(0)
    batches = (data.as_source(each, name).whole(key) for each, name in ((train, "train"), (valid, "valid")))
    bound = bind(problem.constraints, jax.tree.map(lambda x: x[0], path))
    static = problem, bound, solver, estimator
    free = jax.vmap(bound.to_free)(path)
    moves = _moves(*static, Point(params, (), validation.strong(model_state)), free, *batches)
    return _fitted(*jax.tree.map(np.asarray, moves))


def _trajectory(result: Result) -> Any:
    if result.members is not None:
        raise ValueError("path is a population's result; take that of one member, result.member(i).")
    if any(result.trajectory.quantiles):
        raise ValueError(
            "path has leaves of so many entries that the trajectory holds only their quantiles; pass the "
            "hparams themselves, gathered by a callback or in a loop of your own."
        )
    return result.trajectory.hparams


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _moves(problem, bound, solver, estimator, point, path, train, valid):
    """For each move: gradient norm at its start, difference of gradients, length, what solves left."""
    key = jax.random.key(0)
    draw = Draw(lambda j: train, 1, False)

    def at(stands, free):
        point, inner, memory = stands
        hparams = bound.to_natural(free)
        point, inner, solved = solver.solve(problem, inner, point, hparams, draw, key)
        estimate, memory = estimator.estimate(problem, memory, point, hparams, draw, valid, key)
        left = solved.residual, estimate.solve.residual
        return (point, inner, memory), bound.pull_back(free, estimate.grad), left

    def move(carry, free):
        stands, before, grad = carry
        stands, new, left = at(stands, free)
        out = norm(grad), norm(axpy(-1.0, grad, new)), norm(axpy(-1.0, before, free)), left
        return (stands, free, new), out

    first = jax.tree.map(lambda x: x[0], path)
    hparams = bound.to_natural(first)
    memory = estimator.init(problem, point, hparams)
    stands, grad, _ = at((point, solver.init(problem, point, hparams), memory), first)
    return jax.lax.scan(move, (stands, first, grad), jax.tree.map(lambda x: x[1:], path))[1]


def _fitted(grad_norm, difference, length, left) -> PathSmoothness:
    """Eq. (1), and both fits; moves of no length are left out."""
    finite = np.isfinite(grad_norm) & np.isfinite(difference)
    moved = np.flatnonzero((length > 0) & finite)
    g, length = grad_norm[moved].astype(np.float64), length[moved].astype(np.float64)
    smoothness = difference[moved] / length
    line, power = (np.nan, np.nan), np.nan
    if g.size >= 3 and np.ptp(g) > 1e-3 * g.max():
        slope, constant = np.polyfit(g, smoothness, 1)
        line = float(constant), float(slope)
        seen = (g > 0) & (smoothness > 0)
        if seen.sum() >= 3:
            power = float(np.polyfit(np.log(g[seen]), np.log(smoothness[seen]), 1)[0])
    worst = (float(each.max(initial=0.0)) for each in left)
    return PathSmoothness(moved, g, smoothness, length, *line, power, *worst)
