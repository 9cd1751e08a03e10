"""BO-REP: normalised momentum outside, refined and then periodically updated params inside.

For outer problems whose smoothness grows with their gradient, as with recurrent networks. With u the
hyperparameters in free units and w the params, outer step k is::

    w   <- refined at u_0                                         for k = 0                       (1)
    w   <- (w_1 + ... + w_N) / N,   w_j = P(w_(j-1) + inner update on a batch),   w_0 = w
                                                                  for k = period, 2 period, ...   (2)
    g_k <- estimator at (w, hparams(u)), pulled back to free units                                (3)
    m_k = momentum m_(k-1) + (1 - momentum) g_k,   u <- u - step_size m_k / |m_k|                 (4)

N is ``inner_steps``; P projects onto the ball of ``radius`` around the w that the update began with. Every
outer step has the length ``step_size``, so that the inner solution moves by at most that times its Lipschitz
constant: this is why w may be left alone in the steps between two updates, and why few inner steps keep it
close. Eq. (1) makes it close to begin with, to which end the paper takes `bilevel.epoch_sgd`.

It is `bilevel.alternating` with an inner solver for Eq. (1) and (2) and `bilevel.normalized_momentum` for
Eq. (4). The authors' released code differs from their paper: it neither refines, projects nor averages, and
keeps one running vector for the linear system. That is
``alternating(implicit(sgd(1e-2)), inner, normalized_momentum(step_size), inner_steps, period)``.

References:
  Hao, Gong and Liu, "Bilevel optimization under unbounded smoothness: a new algorithm and convergence
  analysis", 2024, arXiv:2401.09587.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.constraints import Box, bind
from bilevel.control import once
from bilevel.estimators.implicit import implicit
from bilevel.inner_solvers import inner_step
from bilevel.linear_solvers import cg, where
from bilevel.methods.alternating import Alternating, alternating
from bilevel.methods.inexact import refuse_unfit
from bilevel.problem import Draw, Estimator, InnerSolver, Point, PyTree, SolveInfo
from bilevel.transforms import normalized_momentum
from bilevel.vectors import into_ball

# The refinement's fresh batches are counted from here on, beyond those of the first step's estimator.
_ASIDE = 1 << 20


class _UpdateState(NamedTuple):
    """State of the optimiser and of the refinement, and whether the latter is still to be done."""

    opt_state: PyTree
    refinement: PyTree
    begins: jax.Array


@dataclasses.dataclass(frozen=True)
class PeriodicUpdate:
    """An inner solver: Eq. (1) at its first solve where there is a refinement, Eq. (2) at the others."""

    optimizer: Any
    steps: int
    radius: float | None
    refinement: Any

    def init(self, problem, point, hparams):
        """Fresh states."""
        refined = self.refinement.init(problem, point, hparams) if self.refinement else ()
        return _UpdateState(
            self.optimizer.init(point.params), refined, jnp.bool_(self.refinement is not None)
        )

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Batch ``j`` of the draw for step ``j``; a fixed number of steps, tolerances do not apply."""
        del atol
        if not self.refinement:
            point, state, taken = self._update(problem, state, point, hparams, draw)
        else:
            # Loops of at most one pass: a population, in which conditions become selections, passes by.
            point, state, taken = once(
                state.begins,
                lambda at: self._refine(problem, at, hparams, draw, key),
                once(
                    ~state.begins,
                    lambda at: self._update(problem, at[1], at[0], hparams, draw),
                    (point, state, jnp.int32(0)),
                ),
            )
            state = state._replace(begins=jnp.bool_(False))
        info = SolveInfo(jnp.inf, taken, taken, jnp.bool_(False))  # no gradient is measured at the mean
        return point, state, info

    def _update(self, problem, state, point, hparams, draw):
        """Eq. (2)."""
        centre = point.params

        def step(j, carry):
            at, mean = carry
            at = inner_step(problem, self.optimizer, at, hparams, draw(j))
            if self.radius is not None:
                at = dataclasses.replace(at, params=into_ball(at.params, centre, self.radius))
            mean = jax.tree.map(lambda m, w: m + (w - m) / (j + 1).astype(m.dtype), mean, at.params)
            return at, mean

        start = Point(centre, state.opt_state, point.model_state)
        at, mean = jax.lax.fori_loop(0, self.steps, step, (start, centre))
        point = Point(mean, point.opt_state, at.model_state)
        return point, state._replace(opt_state=at.opt_state), jnp.int32(self.steps)

    def _refine(self, problem, at, hparams, draw, key):
        """Eq. (1)."""
        point, state, _ = at

        def batch(j):
            return draw(jnp.where(j < draw.steps, j, j + _ASIDE))

        point, refined, info = self.refinement.solve(
            problem, state.refinement, point, hparams, Draw(batch, draw.steps, draw.sampled), key
        )
        taken = jnp.asarray(info.products).astype(jnp.int32)
        return point, state._replace(refinement=refined), taken


@dataclasses.dataclass(frozen=True)
class BoRep:
    """See `bo_rep`; ``name`` is that of the factory. ``waits``: hparams stay until params are refined."""

    method: Alternating
    name: str = "bo_rep"
    waits: bool = False
    differentiated = None

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """Training and validation batches that one outer step takes."""
        return self.method.batches_per_step

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        return self.method.seen(hparams, j)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; the problem checked on the data's shapes."""
        refuse_unfit(self.name, problem)
        _refuse_box(self.name, problem, validation.floating(hparams, "hparams"))
        return self.method.init(problem, params, hparams, train, valid, key=key, model_state=model_state)

    def step(self, problem, state, train, valid):
        """Eq. (1) to (4); rejected as a whole where a result is not finite."""
        after, info = self.method.step(problem, state, train, valid)
        if self.waits:
            stay, moved = (state.free, state.outer), (after.free, after.outer)
            free, outer = where(state.inner.begins, stay, moved)
            after = dataclasses.replace(after, free=free, outer=outer)
        return after, info


def _refuse_box(name: str, problem, hparams) -> None:
    bound = bind(problem.constraints, hparams)
    paths = jax.tree_util.tree_flatten_with_path(hparams)[0]
    for (path, _), constraint in zip(paths, bound.leaves, strict=True):
        if isinstance(constraint, Box):
            lo, hi = constraint.lo, constraint.hi
            open_ended = math.isinf(lo) or math.isinf(hi)
            fix = "bilevel.positive()" if open_ended else f"bilevel.interval({lo:g}, {hi:g})"
            raise ValueError(
                f"constraints: hparams{validation.name_of(path)} has {constraint!r}, whose projection would "
                f"cut short the steps of {name}, all of one length, and stop the others with it. Take a "
                f"constraint that is a change of units, such as {fix}."
            )


def bo_rep(
    inner,
    step_size,
    momentum=0.9,
    period: int = 2,
    inner_steps: int = 3,
    estimator: Estimator | None = None,
    refinement: InnerSolver | None = None,
    radius: float | None = None,
) -> BoRep:
    """Normalised momentum on hypergradients, params updated every so many outer steps: Eq. (1) to (4).

    Stochastic at both levels: each inner step, each factor of a `neumann` series and each outer step has a
    batch of its own. An outer step costs ``inner_steps / period`` inner gradients, one outer gradient, the
    solver's products and one cross product. Memory: four vectors of the size of params beside the states of
    optimiser and solver. In a population every outer step makes the update, and only some use it.

    ``step_size`` is a length in free units: a hyperparameter under `positive` moves by that much of its
    logarithm. It ends in a cycle around the solution, of a radius of one or two times
    ``step_size / (1 - momentum)``, so that a schedule is needed to come to rest; where the outer loss is flat
    it keeps walking at the same speed.

    Not for hyperparameters of the optimiser, nor for a `bilevel.FixedPoint` or a problem with a ``start``. A
    `bilevel.box` is refused: its projection would shorten steps.

    Args:
      inner: the optax optimiser of Eq. (2); of the paper ``optax.sgd(rate)``. Its state lives on from update
        to update.
      step_size: length of every outer step; a number or an optax schedule, positive.
      momentum: weight of the past gradients, at least 0 and less than 1; the larger, the less noise and the
        more it overshoots.
      period: outer steps from one update of params to the next.
      inner_steps: steps of an update, over which it averages.
      estimator: of the implicit family. The paper's is ``implicit(neumann(terms, 1 / L), batches=1)``: L is
        the largest curvature of the inner loss on a batch, and ``batches=1`` gives the cross product a fresh
        batch too. The released code's is ``implicit(sgd(1e-2))``. Default
        ``implicit(cg(max_steps=5, tol=0.1), batches=1)``, which needs no L.
      refinement: an inner solver that runs once, in the first outer step in place of Eq. (2); of the paper
        `epoch_sgd`. None: an ordinary update.
      radius: of the ball that an update of params stays in, in Euclidean norm; None for no bound. At least
        the distance that the solution moves in a period.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(  # smoothness of F = x^4 / 4 + sin(x)^2 / 2 has no bound
      ...     inner=lambda y, x, data: 0.5 * (y - jnp.sin(x)) ** 2,
      ...     outer=lambda y, x, data: x**4 / 4 + 0.5 * y**2,
      ... )
      >>> method = bilevel.bo_rep(
      ...     optax.sgd(0.5),
      ...     step_size=lambda k: 0.5 * 0.99**k,
      ...     estimator=bilevel.implicit(bilevel.neumann(1, 1.0)),
      ... )
      >>> start, data = jnp.float32(20.0), jnp.zeros(1)
      >>> result = bilevel.optimize(problem, start, start, data, data, method, 1000, progress=False)
      >>> print(f"{abs(result.hparams):.2f}")
      0.00

    References:
      Hao, Gong and Liu, 2024, arXiv:2401.09587.
    """
    validation.kind("inner", inner, "an optax optimiser")
    inner_steps = validation.whole_number("inner_steps", inner_steps, 1)
    if radius is not None:
        radius = validation.number("radius", radius, positive=True)
    if refinement is not None:
        validation.kind("refinement", refinement, "an inner solver")
    if estimator is None:
        estimator = implicit(cg(max_steps=5, tol=0.1), batches=1)
    validation.kind("estimator", estimator, "an estimator")
    if estimator.trajectory:
        raise TypeError(
            "estimator must be of the implicit family, such as bilevel.implicit(bilevel.neumann(20, 0.1)), "
            f"got bilevel.{validation.called(estimator)}(), which advances params itself in every outer step."
        )
    update = PeriodicUpdate(inner, inner_steps, radius, refinement)
    outer = normalized_momentum(step_size, momentum)
    return BoRep(alternating(estimator, update, outer, inner_steps, period))
