"""Linear solvers against numpy, and what they say of themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import SOLVERS, by_label
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import linear_solvers
from bilevel.problem import Draw, Point, Preconditioner

EPS = np.finfo(np.float64).eps
KEY = jax.random.key(0)


def symmetric(eigenvalues, seed=0):
    eigenvalues = np.asarray(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((eigenvalues.size,) * 2))[0]
    matrix = q @ np.diag(eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def matvec_of(matrix, unravel=lambda x: x):
    return lambda v, j=None: unravel(matrix @ ravel_pytree(v)[0])


@functools.partial(jax.jit, static_argnums=0)
def _run(solver, matrix, b, state, rtol, atol):
    return solver.solve(matvec_of(matrix), b, state, KEY, rtol=rtol, atol=atol)


def run(solver, matrix, b, state=None, rtol=None, atol=None):
    """Solve for arrays under jit: ``(x, state, info)``."""
    b = jnp.asarray(b)
    state = solver.init(b) if state is None else state
    return _run(solver, jnp.asarray(matrix, b.dtype), b, state, rtol, atol)


def residual_norm(matrix, x, b):
    return np.linalg.norm(matrix @ np.asarray(x) - b)


class Products:
    """Counts the products that a compiled solve really takes."""

    def __init__(self, matrix):
        self.matrix, self.taken = matrix, 0

    def __call__(self, v, j=None):
        def product(v):
            self.taken += 1 if v.ndim == 1 else len(v)
            return v @ self.matrix.T

        return jax.pure_callback(
            product, jax.ShapeDtypeStruct(v.shape, v.dtype), v, vmap_method="expand_dims"
        )


# --- Every solver ------------------------------------------------------------------------------------------


@by_label(SOLVERS)
@settings(max_examples=6)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_random_pytrees_match_numpy(row, n, m, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (n,), "b": ((m, 2), ())[: 1 + seed % 2]}
    b = jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple) and all(
        isinstance(i, int) for i in x))  # fmt: skip
    b = jax.tree.map(jnp.asarray, b)
    flat, unravel = ravel_pytree(b)
    matrix = symmetric(np.linspace(0.5, 2.0, flat.size), seed)
    solver = row.make()
    x, _, info = solver.solve(matvec_of(matrix, unravel), b, solver.init(b), KEY)
    assert jax.tree.structure(x) == jax.tree.structure(b)
    expected = np.linalg.solve(matrix, flat)
    error = np.linalg.norm(ravel_pytree(x)[0] - expected)
    assert error <= row.rtol * np.linalg.norm(flat) / 0.5
    assert not bool(info.negative_curvature)


@by_label(SOLVERS)
def test_products_are_counted(row):
    matrix, b = symmetric(np.linspace(0.5, 2.0, 9)), jnp.ones(9)
    products, solver = Products(matrix), row.make()
    _, _, info = jax.jit(lambda b: solver.solve(products, b, solver.init(b), KEY))(b)
    jax.block_until_ready(info)
    assert products.taken == int(info.products) == row.products(9, int(info.steps))


@by_label(SOLVERS)
def test_zero_right_hand_side(row):
    x, _, info = run(row.make(), symmetric(np.linspace(0.5, 2.0, 5)), np.zeros(5))
    np.testing.assert_array_equal(x, 0)
    assert float(info.residual) == 0


@by_label(SOLVERS)
def test_indefinite_matrix_is_noticed_and_finite(row):
    # b lies in the span of a negative direction too; x . b < 0 so that the direct solve sees it.
    matrix = np.diag([1.0, 2.0, -0.5])
    x, _, info = run(row.make(), matrix, np.array([0.1, 0.1, 1.0]))
    assert bool(info.negative_curvature)
    assert np.all(np.isfinite(x))


@by_label([row for row in SOLVERS if row.factory != "neumann"])
def test_residual_is_honest(row):
    matrix, b = symmetric(np.geomspace(1e-3, 1.0, 12)), np.ones(12)
    solver = row.make()
    if row.adaptive:
        solver = dataclasses.replace(solver, max_steps=5, tol=0.0)
    x, _, info = run(solver, matrix, b)
    # Products and sums of 12 numbers of the size of |A| |x|, each rounded.
    rounding = 12 * EPS * np.linalg.norm(x)
    assert abs(float(info.residual) - residual_norm(matrix, x, b)) <= rounding


@by_label([row for row in SOLVERS if not row.symmetric])
def test_non_symmetric_matrices(row):
    matrix = np.eye(6) + 0.3 * np.random.default_rng(0).standard_normal((6, 6))
    b = np.arange(6.0)
    x, _, info = run(row.make(), matrix, b)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-12 * np.linalg.cond(matrix))
    assert residual_norm(matrix, x, b) <= 1e-13


@by_label(SOLVERS)
def test_memory_is_the_last_solution(row):
    solver, matrix, b = row.make(), symmetric(np.linspace(0.5, 2.0, 8)), np.ones(8)
    _, state, first = run(solver, matrix, b)
    assert bool(jax.tree.leaves(state)) == row.memory
    _, _, second = run(solver, matrix, b, state)
    assert (int(second.steps) < int(first.steps)) == row.memory


# --- Conjugate gradients -----------------------------------------------------------------------------------

SPREAD = symmetric(np.geomspace(1e-3, 1.0, 30))
RHS = np.random.default_rng(1).standard_normal(30)


def test_cg_warm_start_takes_fewer_steps():
    cg = bilevel.cg(max_steps=200, tol=1e-8)
    _, state, cold = run(cg, SPREAD, RHS)
    x, _, warm = run(cg, SPREAD, RHS * 1.0001, state)
    assert int(warm.steps) <= 1 < int(cold.steps)
    assert residual_norm(SPREAD, x, RHS * 1.0001) <= 1.01e-8 * np.linalg.norm(RHS)


@pytest.mark.parametrize(
    "start", [1e6 * RHS, -np.linalg.solve(SPREAD, RHS), np.full(30, np.nan), np.full(30, np.inf)]
)
@pytest.mark.parametrize("steps", [1, 5, 300])
def test_cg_is_never_worse_than_from_zero(start, steps):
    cg = bilevel.cg(max_steps=steps, tol=1e-10)
    x_cold, state, cold = run(cg, SPREAD, RHS)
    x, _, info = run(cg, SPREAD, RHS, state._replace(x=jnp.asarray(start)))
    assert np.all(np.isfinite(x))
    assert not bool(info.negative_curvature)
    # In the norm that conjugate gradients minimise, |x - solution|_A.
    solution = np.linalg.solve(SPREAD, RHS)

    def distance(x):
        return np.sqrt((x - solution) @ SPREAD @ (x - solution))

    assert distance(np.asarray(x)) <= max(distance(0 * solution), 1e-9)
    if steps == 300:
        assert float(info.residual) <= 1e-10 * np.linalg.norm(RHS)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_cg_takes_one_product_a_step_and_one_to_start(steps):
    products = Products(SPREAD)
    cg = bilevel.cg(max_steps=steps, tol=0.0)
    _, _, info = jax.jit(lambda b: cg.solve(products, b, cg.init(b), KEY))(jnp.asarray(RHS))
    jax.block_until_ready(info)
    assert products.taken == int(info.products) == int(info.steps) + 1
    assert int(info.steps) <= steps


def test_cg_stops_after_max_steps():
    _, _, info = run(bilevel.cg(max_steps=4, tol=0.0), SPREAD, RHS)
    assert int(info.steps) == 4
    assert float(info.residual) > 0.01


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_cg_tolerances_may_be_traced(tol):
    b_norm = np.linalg.norm(RHS)
    by_setting, _, _ = run(bilevel.cg(max_steps=200, tol=tol), SPREAD, RHS)
    cg = bilevel.cg(max_steps=200)
    relative, _, info = run(cg, SPREAD, RHS, rtol=tol)
    absolute, _, _ = run(cg, SPREAD, RHS, rtol=0.0, atol=tol * b_norm)
    np.testing.assert_array_equal(by_setting, relative)
    np.testing.assert_allclose(absolute, relative, rtol=1e-12)
    assert 0 < float(info.residual) <= tol * b_norm
    # It would not have been there one step earlier.
    _, _, before = run(dataclasses.replace(cg, max_steps=int(info.steps) - 1), SPREAD, RHS, rtol=tol)
    assert float(before.residual) > tol * b_norm


def test_cg_default_tolerance_is_that_of_the_dtype():
    for dtype in (np.float32, np.float64):
        tol = np.sqrt(np.finfo(dtype).eps)
        x, _, info = run(bilevel.cg(max_steps=500), symmetric(np.linspace(0.5, 2.0, 30)), RHS.astype(dtype))
        assert x.dtype == dtype
        assert float(info.residual) <= tol * np.linalg.norm(RHS)
        _, _, early = run(
            bilevel.cg(max_steps=int(info.steps) - 1), symmetric(np.linspace(0.5, 2.0, 30)), RHS.astype(dtype)
        )
        assert float(early.residual) > tol * np.linalg.norm(RHS)


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal, found by products with unit vectors."""

    def init(self, params):
        return jax.tree.map(jnp.ones_like, params)

    def update(self, matvec, state, key):
        del key
        return 1 / jnp.diagonal(jax.vmap(matvec)(jnp.eye(state.size)))

    def apply(self, state, v):
        return state * v


def test_preconditioner_slot():
    assert isinstance(Jacobi(), Preconditioner)
    scale = np.geomspace(1, 1e3, 30)
    well = symmetric(np.linspace(0.8, 1.2, 30))
    matrix = scale[:, None] * well * scale  # badly scaled, and well conditioned once it is not
    plain, jacobi = bilevel.cg(max_steps=2000, tol=1e-10), bilevel.cg(2000, 1e-10, preconditioner=Jacobi())
    _, _, without = run(plain, matrix, RHS)
    x, state, with_jacobi = run(jacobi, matrix, RHS)
    assert int(with_jacobi.steps) <= 25 < int(without.steps)
    assert residual_norm(matrix, x, RHS) <= 1.01e-10 * np.linalg.norm(RHS)
    np.testing.assert_allclose(state.preconditioner, 1 / np.diag(matrix), rtol=1e-13)
    # A diagonal matrix is inverted at once.
    x, _, info = run(jacobi, np.diag(scale), RHS)
    assert int(info.steps) <= 2
    np.testing.assert_allclose(x, RHS / scale, rtol=1e-12)
    # From the last solution, too.
    x, _, info = run(jacobi, matrix, RHS, state)
    assert int(info.steps) <= 1


def test_cg_damping_is_the_stated_bias():
    x, _, info = run(bilevel.cg(max_steps=200, tol=1e-12, damping=0.1), SPREAD, RHS)
    np.testing.assert_allclose(x, np.linalg.solve(SPREAD + 0.1 * np.eye(30), RHS), rtol=1e-9)
    assert residual_norm(SPREAD, x, RHS) > 0.1 * np.linalg.norm(RHS)


def test_cg_damping_heals_an_indefinite_matrix():
    matrix = symmetric(np.linspace(-0.1, 1.0, 10))
    b = np.ones(10)
    _, _, plain = run(bilevel.cg(), matrix, b)
    x, _, damped = run(bilevel.cg(damping=0.3), matrix, b)
    assert bool(plain.negative_curvature)
    assert not bool(damped.negative_curvature)
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.3 * np.eye(10), b), rtol=1e-6)


def test_cg_reports_negative_curvature_met_late_and_keeps_what_it_had():
    matrix = symmetric(np.concatenate([np.linspace(1.0, 2.0, 9), [-1e-3]]))
    b = np.ones(10)
    x, _, info = run(bilevel.cg(tol=1e-12), matrix, b)
    assert bool(info.negative_curvature)
    assert int(info.steps) > 2
    before, _, positive = run(bilevel.cg(max_steps=int(info.steps) - 1, tol=1e-12), matrix, b)
    assert not bool(positive.negative_curvature)
    np.testing.assert_array_equal(x, before)
    assert np.all(np.isfinite(x))


def test_cg_in_float32_does_not_hide_stagnation():
    # The recursion of the residual goes on falling where the residual itself, |b - A x|, cannot.
    matrix = symmetric(np.geomspace(1e-4, 1.0, 30)).astype(np.float32)
    b = RHS.astype(np.float32)
    solver = bilevel.cg(max_steps=400, tol=1e-12)
    problem = bilevel.Problem(
        inner=lambda w, h, batch: 0.5 * jnp.vdot(w, batch @ w) + jnp.sum(h * w),
        outer=lambda w, h, batch: jnp.vdot(batch, w),
    )
    estimator, point, h = bilevel.implicit(solver), Point(jnp.zeros(30, np.float32)), jnp.float32(1.0)
    draw = Draw(lambda j: jnp.asarray(matrix), 1, False)
    estimate, state = jax.jit(
        lambda state, valid: estimator.estimate(problem, state, point, h, draw, valid, KEY)
    )(estimator.init(problem, point, h), jnp.asarray(b))
    v = np.asarray(state.x, np.float64)
    left = residual_norm(matrix.astype(np.float64), v, b) / np.linalg.norm(b)
    assert left > 1e-6  # far from the tolerance, which the recursion of the solver claims to have reached
    _, _, info = run(solver, matrix, b)
    assert float(info.residual) < 1e-7 * np.linalg.norm(b)
    assert 0.5 * left < float(estimate.error) < 2 * left


def test_cg_vmapped_members_converge_each_in_its_own_time():
    matrices = np.stack([symmetric(np.linspace(1.0, ratio, 40)) for ratio in (1.0, 10.0, 1000.0)])
    cg, b = bilevel.cg(max_steps=100, tol=1e-8), np.ones(40)
    x, _, info = jax.jit(
        jax.vmap(lambda matrix: cg.solve(matvec_of(matrix), jnp.asarray(b), cg.init(jnp.asarray(b)), KEY))
    )(jnp.asarray(matrices))
    steps = np.asarray(info.steps)
    assert steps[0] < steps[1] < steps[2]
    for i, matrix in enumerate(matrices):
        alone, _, alone_info = run(cg, matrix, b)
        assert steps[i] == int(alone_info.steps)
        np.testing.assert_allclose(x[i], alone, rtol=1e-11)


# --- Neumann -----------------------------------------------------------------------------------------------


def series(matrices, b, step_size):
    """``step_size sum_k prod_{j<=k} (I - step_size A_j) b`` by numpy."""
    power, total = b, b.copy()
    for matrix in matrices:
        power = power - step_size * matrix @ power
        total = total + power
    return step_size * total


@pytest.mark.parametrize("terms", [1, 2, 13])
def test_neumann_matches_its_series_and_its_bias_bound(terms):
    matrix, b, step_size = symmetric(np.linspace(0.2, 1.0, 8)), RHS[:8], 0.9
    x, _, info = run(bilevel.neumann(terms, step_size), matrix, b)
    np.testing.assert_allclose(x, series([matrix] * (terms - 1), b, step_size), rtol=1e-13)
    error = np.linalg.norm(x - np.linalg.solve(matrix, b))
    bound = (1 - step_size * 0.2) ** terms * np.linalg.norm(b) / 0.2
    assert error <= bound
    assert error >= (1 - step_size) ** terms * np.linalg.norm(b)  # it is a bias
    assert (int(info.steps), int(info.products)) == (terms, terms - 1)


def test_neumann_takes_a_fresh_batch_for_each_factor():
    matrices = jnp.stack([jnp.asarray(symmetric(np.linspace(0.2, 1.0, 6), seed)) for seed in range(4)])
    b = jnp.asarray(RHS[:6])
    x, _, _ = bilevel.neumann(5, 0.9).solve(lambda v, j: matrices[j] @ v, b, (), KEY)
    np.testing.assert_allclose(x, series(np.asarray(matrices), np.asarray(b), 0.9), rtol=1e-13)


# --- Dense -------------------------------------------------------------------------------------------------


def test_dense_refuses_what_does_not_fit(monkeypatch):
    solver = bilevel.dense()
    solver.init(jnp.zeros(linear_solvers.DENSE_LIMIT))
    too_large = {"w": jax.ShapeDtypeStruct((linear_solvers.DENSE_LIMIT,), np.float64), "b": jnp.zeros(1)}
    with pytest.raises(ValueError, match=r"5001 x 5001.*bilevel\.cg\(\)"):
        solver.init(too_large)
