"""Every estimator, linear solver and method, once: what it computes and what it is able to do.

The shared tests iterate over these rows and ask for capabilities, never for names. The closed forms are those
of `problems.Ridge`; estimators are compared at `LOG_L2`, where the inner problem is well conditioned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from problems import QUADRATIC, RIDGE, RIDGE_LOG_L2, Quadratic, Ridge, ridge

import bilevel
from bilevel.problem import NONE, RESIDUAL

# Eigenvalues of the inner Hessian there: 1.1 and 3.6.
LOG_L2 = 0.0
STEP_SIZE = 0.3
# (1 - 0.3 * 1.09)^80 = 2e-14.
STEPS = 80
SGD = optax.sgd(STEP_SIZE)
# A fit with noise that vanishes with its error, in units that make it a third as fast or less.
FITS, SCALE = 1000, 1e-3
# Of evolution strategies; a mean of half as many squares of normal numbers, within four standard errors.
PARTICLES = 512
RANDOM = 4 * (2 / (PARTICLES / 2)) ** 0.5


def descent(problem):
    """The same problem as a fixed point: of a gradient step."""

    def update(params, hparams, batch):
        grad = jax.grad(problem.inner)(params, hparams, batch)
        return jax.tree.map(lambda x, g: x - STEP_SIZE * g, params, grad)

    return bilevel.FixedPoint(update, problem.outer)


RIDGE_MAP, QUADRATIC_MAP = descent(RIDGE), descent(QUADRATIC)


@dataclasses.dataclass(frozen=True)
class EstimatorRow:
    """An estimator with its settings.

    ``rtol``: of what it returns at the inner solution, in float64. ``terms``: of the Neumann series it
    amounts to there, ``multiplier``: of the penalty, both None where it is exact. ``trajectory``: moves
    params, by ``steps`` inner steps of which ``kept`` are differentiated in ``passes`` sweeps. ``memory``:
    its state has leaves. ``fresh``: it takes batches beyond the step's own, ``batches`` of them at once.
    ``error_kind``: what its error means. ``solver``: it solves a linear system, with ``scale`` times the
    inner Hessian. ``outer_grads``: how many it takes. ``amplified``: so many times larger is its rounding.
    ``random``: relative error of its own random numbers, four times the standard one. ``problem`` and
    ``quadratic``: the ridge problem and the quadratic one as it takes them.
    """

    factory: str
    label: str
    make: Callable[[], Any]
    rtol: float
    terms: int | None = None
    trajectory: bool = False
    steps: int = 1
    kept: int = 0
    passes: int = 0
    memory: bool = False
    fresh: bool = False
    batches: int = 0
    error_kind: str = NONE
    solver: bool = False
    scale: float = 1.0
    outer_grads: int = 1
    amplified: float = 1.0
    random: float = 0.0
    multiplier: float | None = None
    problem: Any = RIDGE
    quadratic: Any = QUADRATIC

    @property
    def exact(self) -> bool:
        return self.terms is None and self.multiplier is None

    def expected(self, problem: Ridge, log_l2):
        if self.multiplier is not None:
            return problem.penalty(log_l2, self.multiplier)
        if self.terms is None:
            return problem.hypergradient(log_l2)
        return problem.neumann(log_l2, self.terms, STEP_SIZE)

    def expected_of_quadratic(self, data: Quadratic, h):
        if self.multiplier is not None:
            return data.penalty(h, self.multiplier)
        if self.terms is None:
            return data.hypergradient(h)
        return data.neumann(data.solution(h), h, self.terms, STEP_SIZE)

    def __repr__(self) -> str:
        return self.label


def _solving(label, make, **settings) -> EstimatorRow:
    """A row of the implicit family."""
    return EstimatorRow("implicit", label, make, error_kind=RESIDUAL, solver=True, **settings)


ESTIMATORS = (
    _solving("implicit", lambda: bilevel.implicit(), rtol=1e-6, memory=True),
    _solving(
        "implicit(cg exact)",
        lambda: bilevel.implicit(bilevel.cg(max_steps=30, tol=1e-13)),
        rtol=1e-9,
        memory=True,
    ),
    _solving("implicit(dense)", lambda: bilevel.implicit(bilevel.dense()), rtol=1e-9),
    _solving(
        "implicit(neumann)",
        lambda: bilevel.implicit(bilevel.neumann(STEPS, STEP_SIZE)),
        rtol=1e-9,
        fresh=True,
    ),
    _solving(
        "implicit(neumann, 5 terms)",
        lambda: bilevel.implicit(bilevel.neumann(5, STEP_SIZE)),
        rtol=1e-9,
        terms=5,
        fresh=True,
    ),
    _solving(
        "implicit(batches=3)",
        lambda: bilevel.implicit(bilevel.dense(), batches=3),
        rtol=1e-9,
        fresh=True,
        batches=3,
    ),
    EstimatorRow(
        "unrolled",
        "unrolled",
        lambda: bilevel.unrolled(SGD, STEPS),
        rtol=1e-9,
        trajectory=True,
        steps=STEPS,
        kept=STEPS,
        passes=1,
    ),
    EstimatorRow(
        "unrolled",
        "unrolled(truncate=7)",
        lambda: bilevel.unrolled(SGD, STEPS, truncate=7, remat=False),
        rtol=1e-9,
        terms=7,
        trajectory=True,
        steps=STEPS,
        kept=7,
        passes=1,
    ),
    EstimatorRow(
        "forward",
        "forward",
        lambda: bilevel.forward(SGD, STEPS),
        rtol=1e-9,
        trajectory=True,
        steps=STEPS,
        kept=STEPS,
        passes=1,  # one hyperparameter, one sweep
    ),
    EstimatorRow(
        "one_step",
        "one_step",
        lambda: bilevel.one_step(SGD),
        rtol=1e-9,
        terms=1,
        trajectory=True,
        steps=1,
        kept=1,
        passes=1,
    ),
    EstimatorRow(
        "look_back",
        "look_back",
        lambda: bilevel.look_back(5, SGD),
        rtol=1e-9,
        terms=5,
        trajectory=True,
        steps=1,
        kept=1,
        passes=5,
    ),
    EstimatorRow(
        "penalty",
        "penalty",
        lambda: bilevel.penalty(10.0, SGD, STEPS),
        rtol=1e-9,
        multiplier=10.0,
        steps=STEPS + 2,  # with both terms of the difference
        outer_grads=STEPS + 1,
        memory=True,
        fresh=True,
    ),
    EstimatorRow(
        "best_response",
        "best_response",
        lambda: bilevel.best_response(SGD, FITS, scale=SCALE, response="full"),
        rtol=10 * SCALE**2,
        steps=2 * FITS,  # both signs
        memory=True,
        fresh=True,
        amplified=1 / SCALE,
    ),
    EstimatorRow(
        "pes",
        "pes",
        lambda: bilevel.pes(STEPS, PARTICLES, SCALE, SGD, STEPS),
        rtol=RANDOM,
        random=RANDOM,
        trajectory=True,
        steps=(PARTICLES + 1) * STEPS,
        outer_grads=PARTICLES + 1,
        memory=True,
        amplified=1 / SCALE,
    ),
    EstimatorRow(
        "pes",
        "pes(analytic)",
        lambda: bilevel.pes(STEPS, 2, SCALE, SGD, STEPS, analytic=True),
        rtol=1e-9,
        trajectory=True,
        steps=3 * STEPS,
        outer_grads=3,
        kept=STEPS,
        passes=2,
        memory=True,
    ),
    _solving(
        "implicit(dense), fixed point",
        lambda: bilevel.implicit(bilevel.dense()),
        rtol=1e-9,
        scale=STEP_SIZE,
        problem=RIDGE_MAP,
        quadratic=QUADRATIC_MAP,
    ),
    EstimatorRow(
        "unrolled",
        "unrolled, fixed point",
        lambda: bilevel.unrolled(steps=STEPS),
        rtol=1e-9,
        trajectory=True,
        steps=STEPS,
        kept=STEPS,
        passes=1,
        problem=RIDGE_MAP,
        quadratic=QUADRATIC_MAP,
    ),
)


@dataclasses.dataclass(frozen=True)
class SolverRow:
    """A linear solver that solves what `tests/test_linear_solvers.py` asks to ``rtol``, and what it can do.

    ``make``: of the number of unknowns. ``products``: with the matrix, for ``(size, steps)``. ``solves``:
    in a row that it takes to get there. ``memory``: it starts at its last solution. ``adaptive``: stops at
    a tolerance. ``symmetric``: needs a symmetric matrix. ``curvature``: notices a negative one.
    ``measured``: its residual is that of what it returns.
    """

    factory: str
    make: Callable[[int], Any]
    rtol: float
    products: Callable[[int, int], int]
    solves: int = 1
    memory: bool = False
    adaptive: bool = False
    symmetric: bool = True
    curvature: bool = True
    measured: bool = True

    def __repr__(self) -> str:
        return self.factory


# For matrices with eigenvalues in [0.5, 2].
SOLVERS = (
    SolverRow(
        "cg",
        lambda size: bilevel.cg(max_steps=40, tol=1e-12),
        rtol=1e-11,
        products=lambda size, steps: steps,
        memory=True,
        adaptive=True,
    ),
    # (1 - 0.8 * 0.5)^60 = 5e-14
    SolverRow(
        "neumann",
        lambda size: bilevel.neumann(60, 0.8),
        rtol=1e-11,
        products=lambda size, steps: 59,
        measured=False,  # that of one term less
    ),
    SolverRow(
        "dense", lambda size: bilevel.dense(), rtol=1e-11, products=lambda size, steps: size, symmetric=False
    ),
    SolverRow(
        "gmres",
        lambda size: bilevel.gmres(max_steps=40, tol=1e-12),
        rtol=1e-11,
        products=lambda size, steps: steps + 2,  # to measure the start, and the end of the one cycle
        memory=True,
        adaptive=True,
        symmetric=False,
        curvature=False,
    ),
    # Of full rank; off by damping / 0.5, and by rounding / damping.
    SolverRow(
        "nystrom", lambda size: bilevel.nystrom(size, 1e-9), rtol=1e-8, products=lambda size, steps: size + 1
    ),
    SolverRow(
        "sgd",
        lambda size: bilevel.sgd(0.8),
        rtol=1e-11,
        products=lambda size, steps: 1,
        solves=60,
        memory=True,
        measured=False,
    ),
)

# --- Methods ------------------------------------------------------------------------------------------

# Both levels of the ridge problem from log-L2 -6 to 0, with eigenvalues of the inner Hessian in [0.1, 3.6].
INNER = optax.sgd(0.5)
# The outer loss is not convex in log-L2: steps of at most 0.5, and 0.08 * 10 < 1 at the solution.
OUTER = optax.chain(optax.clip(0.05), optax.sgd(10.0))
# For params that lag behind by some outer steps.
SLOW_OUTER = optax.chain(optax.clip(0.25), optax.sgd(2.0))
# For all three variables of a single loop at one pace.
SINGLE_OUTER = optax.chain(optax.clip(0.1), optax.sgd(0.7))


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """A method with its settings, and the root its iterations converge to.

    ``terms``: of the Neumann series that its hypergradient amounts to at a fixed point, ``multiplier``: of
    the penalty that it makes, None where exact. ``steps``: outer steps by which it is there. ``frozen``:
    hparams do not move in so many first steps. ``period``: params move every so many outer steps.
    """

    factory: str
    label: str
    method: Any
    terms: int | None = None
    steps: int = 150
    frozen: int = 0
    period: int = 1
    multiplier: float | None = None

    def stationary(self, problem: Ridge, log_l2: float) -> float:
        """Zero at the hyperparameter that the method converges to."""
        if self.multiplier is not None:
            return problem.penalty(log_l2, self.multiplier)
        if self.terms is None:
            return problem.hypergradient(log_l2)
        return problem.neumann(log_l2, self.terms, 0.5)

    def __repr__(self) -> str:
        return self.label


def _alternating(estimator, inner_steps=100, outer=OUTER, **settings):
    return bilevel.alternating(estimator, INNER, outer, inner_steps, **settings)


_CG = bilevel.implicit(bilevel.cg(max_steps=30, tol=1e-12))
_COLD = bilevel.implicit(bilevel.dense())

METHODS = (
    MethodRow("alternating", "cg", _alternating(_CG)),
    MethodRow("alternating", "neumann", _alternating(bilevel.implicit(bilevel.neumann(20, 0.5))), terms=20),
    MethodRow("alternating", "dense", _alternating(_COLD)),
    MethodRow("alternating", "unrolled", _alternating(bilevel.unrolled(), inner_steps=50), terms=50),
    MethodRow("alternating", "forward", _alternating(bilevel.forward(), inner_steps=50), terms=50),
    MethodRow("alternating", "one_step", _alternating(bilevel.one_step()), terms=1, steps=1200),
    MethodRow("alternating", "look_back", _alternating(bilevel.look_back(5)), terms=5, steps=1200),
    MethodRow("alternating", "period", _alternating(_COLD, outer=SLOW_OUTER, period=3), period=3, steps=400),
    MethodRow("alternating", "warmup", _alternating(_COLD, warmup=5), frozen=5),
    MethodRow("alternating", "restart", _alternating(_COLD, inner_steps=400, restart=True)),
    MethodRow("alternating", "simultaneous", _alternating(_COLD, simultaneous=True), steps=300),
    MethodRow("soba", "soba", bilevel.soba(INNER, SINGLE_OUTER, 0.5), steps=2500),
    MethodRow("ma_soba", "ma_soba", bilevel.ma_soba(INNER, SINGLE_OUTER, 0.5, momentum=0.5), steps=2500),
    MethodRow("saba", "saba", bilevel.saba(INNER, SINGLE_OUTER, 0.5), steps=2500),
    MethodRow("srba", "srba", bilevel.srba(INNER, SINGLE_OUTER, 0.5), steps=2500),
    MethodRow("stocbio", "stocbio", bilevel.stocbio(INNER, OUTER, 0.5, 20, 100), terms=20),
    MethodRow("amigo", "amigo", bilevel.amigo(INNER, OUTER, 0.5, 100, 100)),
    # What a perturbation changes to second order, 1e-10, is what is left.
    MethodRow(
        "delta_stn",
        "delta_stn",
        bilevel.delta_stn(INNER, OUTER, 200, scale=1e-5, entropy=0.0),
    ),
    MethodRow(
        "stn",
        "stn, centred",
        bilevel.stn(INNER, OUTER, 200, scale=1e-5, entropy=0.0, centred=True),
    ),
    MethodRow("f2sa", "f2sa", bilevel.f2sa(INNER, OUTER, 10.0, 100), multiplier=10.0),
)

# Public names that are neither an estimator, a linear solver nor a method. Inner solvers have their tests
# in `tests/test_inner_loops.py`.
OTHER = {
    "STOP",
    *("accelerated", "epoch_sgd", "lbfgs", "newton", "memberwise", "newton_cg", "optax_loop", "picard"),
    *(
        "Problem",
        "FixedPoint",
        "Smoothness",
        "composite",
        "lift",
        "hypergradient",
        "optimize",
        "load",
        "argmin",
    ),
    "check_hypergradient",
    *("pmean", "population", "checkpoints", "memory"),
    *("estimate_smoothness", "logistic_smoothness", "ridge_smoothness"),
    # In files of their own: they take whole arrays, lifted problems, or problems with constants.
    *("maid", "hoag", "isgd"),
    *("imaging", "em", "prox", "proximal_gradient", "schedules"),
    *("mixtures", "scaling", "soups", "stopping", "maps", "penalties", "reparametrize", "momentum_reset"),
    *("optuna_objective", "optuna_study"),
    *("online", "tune", "get_hparams"),
    # Random or in a cycle also with whole arrays; with the other presets in a file of their own.
    *("ttsa", "bome", "slip"),
    # A fixed step ends in a cycle; in a file of its own, with its transformation and its diagnosis.
    *("bo_rep", "normalized_momentum", "path_smoothness", "PathSmoothness"),
    *(
        "Best",
        "Members",
        "Memory",
        "Result",
        "Schedule",
        "Trajectory",
        "Counts",
        "Estimate",
        "HypergradientCheck",
        "Info",
        "Point",
        "SolveInfo",
        "Status",
    ),
    "callbacks",
    "pareto",
    *("box", "fixed", "integer", "interval", "positive", "real", "simplex"),
    *("minibatches", "stacked", "with_rng", "episodes", "tuned"),
}


def by_label(rows):
    """Decorator: the test runs once for each row."""
    return pytest.mark.parametrize("row", rows, ids=repr)


def optimum(row: MethodRow) -> float:
    """The log-L2 at which a method's fixed point stands, by bisection around that of the exact one."""
    fn = lambda log_l2: row.stationary(ridge(), log_l2)  # noqa: E731
    lo, hi = RIDGE_LOG_L2 - 2.0, RIDGE_LOG_L2 + 1.0
    assert fn(lo) < 0 < fn(hi)
    while hi - lo > 1e-13:
        middle = 0.5 * (lo + hi)
        lo, hi = (middle, hi) if fn(middle) < 0 else (lo, middle)
    return float(np.mean((lo, hi)))
