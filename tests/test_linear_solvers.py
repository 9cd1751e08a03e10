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
from problems import RIDGE, ridge

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


def run_row(row, matrix, b):
    """As many solves in a row as the solver takes."""
    solver, state = row.make(len(b)), None
    for _ in range(row.solves):
        x, state, info = run(solver, matrix, b, state)
    return x, state, info


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
    solver = row.make(flat.size)
    state = solver.init(b)
    if row.solves > 1:
        state = jax.lax.fori_loop(
            0, row.solves - 1, lambda _, s: solver.solve(matvec_of(matrix, unravel), b, s, KEY)[1], state
        )
    x, _, info = solver.solve(matvec_of(matrix, unravel), b, state, KEY)
    assert jax.tree.structure(x) == jax.tree.structure(b)
    expected = np.linalg.solve(matrix, flat)
    error = np.linalg.norm(ravel_pytree(x)[0] - expected)
    assert error <= row.rtol * np.linalg.norm(flat) / 0.5
    assert not bool(info.negative_curvature)


@by_label(SOLVERS)
def test_products_are_counted(row):
    matrix, b = symmetric(np.linspace(0.5, 2.0, 9)), jnp.ones(9)
    products, solver = Products(matrix), row.make(9)
    _, _, info = jax.jit(lambda b: solver.solve(products, b, solver.init(b), KEY))(b)
    jax.block_until_ready(info)
    assert products.taken == int(info.products) == row.products(9, int(info.steps))


@by_label(SOLVERS)
def test_zero_right_hand_side(row):
    x, _, info = run_row(row, symmetric(np.linspace(0.5, 2.0, 5)), np.zeros(5))
    np.testing.assert_array_equal(x, 0)
    assert float(info.residual) == 0


@by_label([row for row in SOLVERS if row.curvature])
def test_indefinite_matrix_is_noticed_and_finite(row):
    # b lies in the span of a negative direction too; x . b < 0 so that the direct solve sees it.
    matrix = np.diag([1.0, 2.0, -0.5])
    x, _, info = run_row(row, matrix, np.array([0.1, 0.1, 1.0]))
    assert bool(info.negative_curvature)
    assert np.all(np.isfinite(x))


@by_label([row for row in SOLVERS if row.measured])
def test_residual_is_honest(row):
    matrix, b = symmetric(np.geomspace(1e-3, 1.0, 12)), np.ones(12)
    solver = row.make(12)
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
    x, _, info = run_row(row, matrix, b)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-12 * np.linalg.cond(matrix))
    assert residual_norm(matrix, x, b) <= 1e-13


@by_label(SOLVERS)
def test_memory_is_the_last_solution(row):
    solver, matrix, b = row.make(8), symmetric(np.linspace(0.5, 2.0, 8)), np.ones(8)
    _, state, first = run(solver, matrix, b)
    _, _, second = run(solver, matrix, b, state)
    fewer_steps = int(second.steps) < int(first.steps)
    nearer = int(second.steps) == int(first.steps) and float(second.residual) < float(first.residual)
    assert (fewer_steps or nearer) == row.memory


@by_label(SOLVERS)
def test_vmapped_systems_are_solved_alone(row):
    matrices = np.stack([symmetric(np.linspace(0.5, top, 7), seed) for seed, top in enumerate((1.0, 2.0))])
    b, solver = np.arange(1.0, 8.0), row.make(7)
    x, _, info = jax.vmap(
        lambda matrix: solver.solve(matvec_of(matrix), jnp.asarray(b), solver.init(jnp.asarray(b)), KEY)
    )(jnp.asarray(matrices))
    for i, matrix in enumerate(matrices):
        alone, _, alone_info = run(solver, matrix, b)
        np.testing.assert_allclose(x[i], alone, rtol=1e-10)
        assert int(info.products[i]) == int(alone_info.products)


@by_label(SOLVERS)
def test_dtype_follows_the_right_hand_side(row):
    b, solver = {"w": jnp.ones((2, 2), np.float32), "c": jnp.float32(1.0)}, row.make(5)
    with jax.numpy_dtype_promotion("strict"):
        x, state, info = jax.jit(lambda b: solver.solve(lambda v, j=None: v, b, solver.init(b), KEY))(b)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), x) == jax.tree.map(lambda x: (x.shape, x.dtype), b)
    assert all(leaf.dtype != np.float64 for leaf in jax.tree.leaves((state, info)))
    # What it returns it takes, without another program.
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, solver.init(b))
    jax.eval_shape(lambda s: jax.lax.cond(True, lambda: s, lambda: state), solver.init(b))


# --- Conjugate gradients -----------------------------------------------------------------------------------

SPREAD = symmetric(np.geomspace(1e-3, 1.0, 30))
RHS = np.random.default_rng(1).standard_normal(30)


@by_label(SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_shows_in_the_residual(row, bad):
    matrix = np.eye(4)
    matrix[2, 2] = bad
    _, _, info = run_row(row, matrix, np.ones(4))
    assert not np.isfinite(info.residual)
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * w @ batch @ w + h * jnp.sum(w), lambda w, h, batch: jnp.sum(w)
    )
    estimate = bilevel.hypergradient(problem, bilevel.implicit(row.make(4)))(
        jnp.zeros(4), jnp.float64(1.0), jnp.asarray(matrix), jnp.ones(4)
    )
    assert not np.isfinite(estimate.error)


@pytest.mark.parametrize("make", [bilevel.cg, bilevel.gmres])
def test_a_product_that_is_not_finite_met_late_is_nan(make):
    # Products with the first direction are finite; those with the next are not.
    def matvec(v, j=None):
        product = jnp.array([1.0, 2.0, 3.0]) * v
        return jnp.where(jnp.abs(v[0] - v[1]) > 1e-3, jnp.inf, product)

    solver, b = make(), jnp.ones(3)
    x, _, info = jax.jit(lambda b: solver.solve(matvec, b, solver.init(b), KEY))(b)
    assert np.isnan(info.residual)
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
    ("dtype", "unit"), [(np.float32, 1e-23), (np.float32, 1e25), (np.float64, 1e-200), (np.float64, 1e200)]
)
def test_squares_of_right_hand_sides_may_leave_the_range_of_gmres(dtype, unit):
    solver = bilevel.gmres()
    matrix, b = symmetric(np.linspace(0.5, 2.0, 6)).astype(dtype), np.linspace(1.0, 2.0, 6).astype(dtype)
    plain, _, about_one = run(solver, matrix, b)
    for start in (None, unit):
        state = solver.init(jnp.asarray(b))
        if start is not None:
            state = state._replace(x=jnp.asarray(unit * b))
        x, _, info = run(solver, matrix, (unit * b).astype(dtype), state)
        np.testing.assert_allclose(x / dtype(unit), plain, rtol=1e-3 if dtype is np.float32 else 1e-7)
        assert 0 <= float(info.residual) <= 4e-4 * unit * np.linalg.norm(b)
        if start is None:
            assert int(info.steps) == int(about_one.steps)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("solver", "rtol"),
    [
        (bilevel.dense(), 2e-2),
        (bilevel.nystrom(8, 1e-3), 2e-2),
        (bilevel.cg(preconditioner=bilevel.nystrom(4, 0.1)), 0.1),
    ],
    ids=["dense", "nystrom", "preconditioned"],
)
def test_half_precision(solver, rtol, dtype):
    matrix, b = symmetric(np.linspace(0.5, 2.0, 8)), np.linspace(1.0, 2.0, 8)
    x, state, info = run(solver, matrix, jnp.asarray(b, dtype))
    x, _, _ = run(solver, matrix, jnp.asarray(b, dtype), state)
    assert x.dtype == dtype
    expected = np.linalg.solve(matrix, b)
    assert np.linalg.norm(np.asarray(x, np.float64) - expected) <= rtol * np.linalg.norm(expected)
    assert float(info.residual) <= 0.1 * np.linalg.norm(b)


def test_cg_warm_start_takes_fewer_steps():
    cg = bilevel.cg(max_steps=200, tol=1e-8)
    _, state, cold = run(cg, SPREAD, RHS)
    x, _, warm = run(cg, SPREAD, RHS * 1.0001, state)
    assert int(warm.steps) <= 1 < int(cold.steps)
    assert residual_norm(SPREAD, x, RHS * 1.0001) <= 1.01e-8 * np.linalg.norm(RHS)


def in_a_row(cg, systems, follow=True):
    """Products and reaches of solves that start where the last ones ended; ``follow``: or beyond."""
    state, products, reaches = cg.init(jnp.asarray(RHS)), 0, []
    for matrix, b in systems:
        x, state, info = run(cg, matrix, b, state)
        assert residual_norm(matrix, x, b) <= 1.01 * cg.tol * np.linalg.norm(b)
        products += int(info.products)
        reaches.append(float(state.reach))
        state = state if follow else state._replace(reach=jnp.zeros_like(state.reach))
    return products, reaches


def test_cg_follows_solutions_that_move_on():
    cg, more = bilevel.cg(max_steps=200, tol=1e-4, follow=True), symmetric(np.linspace(1, 2, 30), 5)
    smooth = [(SPREAD + t * more, RHS + t * more[0]) for t in np.linspace(0, 0.1, 20)]
    products, reaches = in_a_row(cg, smooth)
    assert products <= 0.8 * in_a_row(cg, smooth, follow=False)[0]
    assert reaches[0] == 0.0
    assert all(0 < reach <= 1 for reach in reaches[4:])


def test_cg_finds_solutions_on_a_line_at_once():
    """With one matrix and right sides on a line, two solutions give the third."""
    cg, state, along = bilevel.cg(max_steps=200, tol=1e-6, follow=True), None, np.linspace(1, 2, 30)
    steps = []
    for t in range(8):
        _, state, info = run(cg, SPREAD, RHS + 0.1 * t * along, state)
        steps.append(int(info.steps))
    assert min(steps[:3]) >= 4
    assert max(steps[3:5]) <= 1  # later on errors within the tolerance add up


def test_the_state_of_cg_can_be_donated():
    state = bilevel.cg(follow=True).init(jnp.asarray(RHS))
    kept = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(np.all(x == 1) for x in jax.tree.leaves(kept))


def test_cg_does_not_follow_noise():
    cg, rng = bilevel.cg(max_steps=200, tol=1e-4, follow=True), np.random.default_rng(0)
    drawn = [(SPREAD, RHS + 0.1 * rng.standard_normal(30)) for _ in range(12)]
    assert in_a_row(cg, drawn)[1] == [0.0] * 12


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_cg_gets_over_a_change_that_is_not_finite(reach, bad):
    cg = bilevel.cg(max_steps=200, tol=1e-8, follow=True)
    _, state, _ = run(cg, SPREAD, RHS)
    state = state._replace(change=jnp.full(30, bad), reach=jnp.asarray(reach))
    for most in (200 if reach else 1, 1):
        x, state, info = run(cg, SPREAD, RHS, state)
        assert residual_norm(SPREAD, x, RHS) <= 1.01e-8 * np.linalg.norm(RHS)
        assert int(info.steps) <= most
    assert np.all(np.isfinite(state.change))


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
def test_cg_takes_one_product_a_step_and_one_for_a_warm_start(steps):
    products = Products(SPREAD)
    cg = bilevel.cg(max_steps=steps, tol=0.0)
    solve = jax.jit(lambda b, state: cg.solve(products, b, state, KEY))
    state = cg.init(jnp.asarray(RHS))
    for warm in (0, 1):
        before = products.taken
        _, state, info = jax.block_until_ready(solve(jnp.asarray(RHS), state))
        assert products.taken - before == int(info.products) == int(info.steps) + warm
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
    x, _, damped = run(bilevel.cg(damping=0.3, tol=1e-12), matrix, b)
    assert bool(plain.negative_curvature)
    assert not bool(damped.negative_curvature)
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.3 * np.eye(10), b), rtol=1e-10)


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


# --- Nystrom -----------------------------------------------------------------------------------------------


def by_formula(matrix, indices, damping, b):
    """``(C W^-1 C^T + damping I)^-1 b`` by numpy."""
    columns = matrix[:, indices]
    low = columns @ np.linalg.solve(matrix[np.ix_(indices, indices)], columns.T)
    return np.linalg.solve(low + damping * np.eye(len(b)), b)


def drawn(size, rank, key=KEY):
    """The columns that a solve with this key takes."""
    return np.asarray(jax.random.choice(key, size, (rank,), replace=False))


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_nystrom_is_its_formula(rank, damping):
    matrix, b = symmetric(np.geomspace(1e-2, 1.0, 12)), RHS[:12]
    x, _, info = run(bilevel.nystrom(rank, damping), matrix, b)
    indices = drawn(12, rank)
    assert len(set(indices)) == rank
    np.testing.assert_allclose(x, by_formula(matrix, indices, damping, b), rtol=1e-9)
    assert not bool(info.negative_curvature)


def test_nystrom_draws_its_columns_from_all_leaves():
    tree = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(()), jnp.zeros(3))}
    flat, unravel = ravel_pytree(tree)
    matrix, b, solver = symmetric(np.geomspace(1e-2, 1.0, 10)), RHS[:10], bilevel.nystrom(3, 0.1)
    for seed in range(5):
        key = jax.random.key(seed)
        x, _, _ = solver.solve(matvec_of(matrix, unravel), unravel(jnp.asarray(b)), solver.init(tree), key)
        expected = by_formula(matrix, drawn(10, 3, key), 0.1, b)
        np.testing.assert_allclose(ravel_pytree(x)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_nystrom_at_full_rank_and_tiny_damping_is_a_direct_solve(condition):
    matrix = symmetric(np.geomspace(1 / condition, 1.0, 40))
    b = np.random.default_rng(2).standard_normal(40)
    x, _, _ = run(bilevel.nystrom(40, 1e-8), matrix, b)
    # Rounding of the matrix times its condition number; Woodbury's identity in its plain form leaves 1e-8.
    expected = np.linalg.solve(matrix + 1e-8 * np.eye(40), b)
    assert np.linalg.norm(x - expected) <= 40 * EPS * condition * np.linalg.norm(expected)


def test_nystrom_of_a_matrix_of_low_rank_is_exact():
    # W is singular: 12 columns of a matrix of rank 3, some of them zero.
    factor = np.random.default_rng(3).standard_normal((20, 3))
    factor[:5] = 0
    matrix = factor @ factor.T
    x, _, info = run(bilevel.nystrom(12, 0.1), matrix, RHS[:20])
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.1 * np.eye(20), RHS[:20]), rtol=1e-9)
    assert not bool(info.negative_curvature)
    x, _, info = run(bilevel.nystrom(5, 0.1), np.zeros((20, 20)), RHS[:20])
    np.testing.assert_allclose(x, RHS[:20] / 0.1, rtol=1e-12)


def test_nystrom_in_float32():
    matrix, b = symmetric(np.geomspace(1e-2, 1.0, 30)), RHS.astype(np.float32)
    x, _, _ = run(bilevel.nystrom(30, 1e-8), matrix, b)
    expected = np.linalg.solve(matrix, b)
    rounding = 30 * np.finfo(np.float32).eps * 1e2
    assert np.linalg.norm(x - expected) <= rounding * np.linalg.norm(expected)


def test_nystrom_keeps_its_columns_between_solves():
    products = Products(symmetric(np.geomspace(1e-2, 1.0, 30)))
    solver = bilevel.nystrom(5, 0.1, refresh=3)
    solve = jax.jit(lambda state, key: solver.solve(products, jnp.asarray(RHS), state, key))
    state, seen = solver.init(jnp.asarray(RHS)), []
    for seed in range(7):
        before = products.taken
        x, state, info = jax.block_until_ready(solve(state, jax.random.key(seed)))
        assert products.taken - before == int(info.products)
        seen.append(int(info.products))
        indices = drawn(30, 5, jax.random.key(seed - seed % 3))
        np.testing.assert_allclose(x, by_formula(products.matrix, indices, 0.1, RHS), rtol=1e-9)
    assert seen == [6, 1, 1, 6, 1, 1, 6]


def test_nystrom_refuses_more_columns_than_there_are():
    bilevel.nystrom(4, 0.1).init({"a": jnp.zeros(3), "b": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"rank .* at most the number of parameters, 4, got 5"):
        bilevel.nystrom(5, 0.1).init({"a": jnp.zeros(3), "b": jnp.zeros(())})


# A few large eigenvalues above many small ones.
SPIKED = symmetric(np.concatenate([np.geomspace(10.0, 1e4, 8), np.linspace(0.5, 1.5, 72)]))
LONG = np.random.default_rng(4).standard_normal(80)


def inverse_of(preconditioner, matrix, key=KEY):
    """The preconditioner as a matrix."""
    size = len(matrix)
    matvec = matvec_of(jnp.asarray(matrix))
    state = jax.jit(lambda: preconditioner.update(matvec, preconditioner.init(jnp.zeros(size)), key))()
    return np.asarray(jax.vmap(lambda e: preconditioner.apply(state, e), out_axes=1)(jnp.eye(size)))


def test_nystrom_preconditioner_takes_far_fewer_steps():
    nystrom = bilevel.nystrom(16, 0.5)
    assert isinstance(nystrom, Preconditioner)
    x_plain, _, plain = run(bilevel.cg(max_steps=400, tol=1e-8), SPIKED, LONG)
    x, state, info = run(bilevel.cg(max_steps=400, tol=1e-8, preconditioner=nystrom), SPIKED, LONG)
    assert int(info.steps) < int(plain.steps) / 2
    assert residual_norm(SPIKED, x, LONG) <= 1.01e-8 * np.linalg.norm(LONG)
    assert int(info.products) == int(info.steps) + 16
    preconditioned = inverse_of(nystrom, SPIKED) @ SPIKED
    eigenvalues = np.sort(np.linalg.eigvals(preconditioned).real)
    assert eigenvalues[-1] / eigenvalues[0] < 20 < 2e4 == np.linalg.cond(SPIKED).round(-2)


def test_nystrom_preconditioner_is_kept_between_solves():
    products = Products(SPIKED)
    cg = bilevel.cg(max_steps=400, preconditioner=bilevel.nystrom(16, 0.5, refresh=2))
    solve = jax.jit(lambda state, key, b: cg.solve(products, b, state, key))
    state, updates = cg.init(jnp.asarray(LONG)), []
    for seed in range(4):
        before = products.taken
        b = jnp.asarray(np.roll(LONG, seed))
        _, state, info = jax.block_until_ready(solve(state, jax.random.key(seed), b))
        assert products.taken - before == int(info.products)
        updates.append(int(info.products) - int(info.steps) - (seed > 0))  # all but the first start warm
    assert updates == [16, 0, 16, 0]


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.concatenate([np.linspace(0.5, 100.0, 39), [-0.3]]),
        np.concatenate([np.linspace(0.0, 1.0, 20), np.linspace(-1e-3, 0.0, 20)]),
        np.linspace(-1.0, 1.0, 40),
        np.full(40, -1.0),
        np.zeros(40),
        np.concatenate([[1e12], np.full(39, 1e-8)]),
    ],
)
@pytest.mark.parametrize("rank", [6, 40])
def test_nystrom_preconditioner_is_positive_definite_whatever_the_matrix(eigenvalues, rank):
    nystrom = bilevel.nystrom(rank, 1e-2)
    for seed in range(3):
        inverse = inverse_of(nystrom, symmetric(eigenvalues), jax.random.key(seed))
        np.testing.assert_allclose(inverse, inverse.T, atol=1e-13)
        smallest, *_, largest = np.linalg.eigvalsh((inverse + inverse.T) / 2)
        assert smallest > 0
        assert 0.5 < largest < 1 + 1e-12  # what it does not know of is left as it is


def test_nystrom_preconditioner_does_not_depend_on_the_unit():
    one = inverse_of(bilevel.nystrom(16, 0.5), SPIKED)
    other = inverse_of(bilevel.nystrom(16, 0.5e3), 1e3 * SPIKED)
    np.testing.assert_allclose(other, one, atol=1e-10)


def test_nystrom_preconditioner_of_an_indefinite_matrix_makes_nothing_large_up():
    # Small curvatures that are differences of larger ones, divided by, would give values of a hundred.
    matrix, nystrom = jnp.asarray(symmetric(np.linspace(-1.0, 1.0, 40))), bilevel.nystrom(6, 1e-2)
    update = jax.jit(lambda key: nystrom.update(matvec_of(matrix), nystrom.init(jnp.zeros(40)), key))
    for seed in range(10):
        state = update(jax.random.key(seed))
        assert bool(state.negative_curvature)
        assert float(jnp.max(state.values)) < 10


# --- GMRES -------------------------------------------------------------------------------------------------


def non_symmetric(size, seed=0):
    """``I - A`` with the spectral radius of A below 0.8: the system of a fixed point that attracts."""
    a = np.random.default_rng(seed).standard_normal((size, size))
    return np.eye(size) - 0.8 * a / np.linalg.norm(a, 2)


@pytest.mark.parametrize("restart", [5, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_gmres_matches_numpy(restart, seed):
    matrix, b = non_symmetric(50, seed), np.random.default_rng(seed).standard_normal(50)
    x, _, info = run(bilevel.gmres(max_steps=300, tol=1e-12, restart=restart), matrix, b)
    expected = np.linalg.solve(matrix, b)
    assert np.linalg.norm(x - expected) <= 1e-10 * np.linalg.norm(expected)
    left = residual_norm(matrix, x, b)
    assert abs(float(info.residual) - left) <= 50 * EPS * np.linalg.norm(x)
    assert left <= 1.01e-12 * np.linalg.norm(b)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_gmres_residual_is_the_smallest_of_its_space(steps):
    matrix, b = non_symmetric(12), RHS[:12]
    _, _, info = run(bilevel.gmres(max_steps=steps, tol=0.0), matrix, b)
    space = np.stack([np.linalg.matrix_power(matrix, k + 1) @ b for k in range(steps)], axis=1)
    left = b - space @ np.linalg.lstsq(space, b)[0]
    np.testing.assert_allclose(float(info.residual), np.linalg.norm(left), rtol=1e-9)
    assert (int(info.steps), int(info.products)) == (steps, steps + 2)


def test_gmres_basis_stays_orthogonal():
    # Without the second orthogonalisation 1e-7 is left.
    scale = np.geomspace(1e-6, 1.0, 40)
    matrix = np.diag(scale) + 0.3 * np.diag(scale[:-1], 1)
    b = np.random.default_rng(0).standard_normal(40)
    _, _, info = run(bilevel.gmres(max_steps=40, tol=1e-12, restart=40), matrix, b)
    assert float(info.residual) <= 1e-10 * np.linalg.norm(b)


def test_gmres_counts_over_cycles():
    products = Products(non_symmetric(50))
    b = jnp.asarray(np.random.default_rng(0).standard_normal(50))
    gmres = bilevel.gmres(max_steps=14, tol=0.0, restart=4)
    _, _, info = jax.block_until_ready(jax.jit(lambda b: gmres.solve(products, b, gmres.init(b), KEY))(b))
    assert int(info.steps) == 14
    assert products.taken == int(info.products) == 14 + 4 + 1  # cycles of 4, 4, 4, 2 and the start


def test_gmres_ends_where_the_space_does():
    # Three eigenvalues: the space of b has three dimensions.
    matrix = symmetric(np.repeat([1.0, 2.0, 3.0], 4))
    x, _, info = run(bilevel.gmres(tol=1e-14), matrix, RHS[:12])
    np.testing.assert_allclose(x, np.linalg.solve(matrix, RHS[:12]), rtol=1e-12)
    assert int(info.steps) == 3
    x, _, info = run(bilevel.gmres(), np.eye(12), RHS[:12])
    np.testing.assert_allclose(x, RHS[:12], rtol=1e-14)
    assert int(info.steps) == 1


@pytest.mark.parametrize("b", [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
def test_gmres_of_a_singular_matrix_is_finite_and_says_so(b):
    matrix = np.diag([1.0, 2.0, 0.0])
    x, _, info = run(bilevel.gmres(), matrix, np.array(b))
    assert np.all(np.isfinite(x))
    np.testing.assert_allclose(float(info.residual), 1.0, rtol=1e-12)
    np.testing.assert_allclose(residual_norm(matrix, x, np.array(b)), 1.0, rtol=1e-12)


def test_gmres_that_stagnates_stops():
    # A cyclic shift: no step before the last lowers the residual.
    matrix = np.roll(np.eye(8), 1, axis=0)
    b = np.eye(8)[0]
    _, _, short = run(bilevel.gmres(max_steps=100, restart=4), matrix, b)
    assert int(short.steps) == 4
    assert float(short.residual) == 1
    x, _, _ = run(bilevel.gmres(max_steps=100, restart=8), matrix, b)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_gmres_drops_a_start_that_is_not_finite(bad):
    matrix, b, gmres = non_symmetric(12), RHS[:12], bilevel.gmres(tol=1e-12)
    start = gmres.init(jnp.asarray(b))
    cold, _, _ = run(gmres, matrix, b, start)
    x, _, _ = run(gmres, matrix, b, start._replace(x=jnp.full(12, bad)))
    np.testing.assert_array_equal(x, cold)


@pytest.mark.parametrize("start", [1e6 * RHS[:12], -np.linalg.solve(non_symmetric(12), RHS[:12])])
@pytest.mark.parametrize("steps", [1, 4])
def test_gmres_is_never_worse_than_zero(start, steps):
    gmres = bilevel.gmres(max_steps=steps, tol=0.0)
    state = gmres.init(jnp.asarray(RHS[:12]))._replace(x=jnp.asarray(start))
    _, _, info = run(gmres, non_symmetric(12), RHS[:12], state)
    assert float(info.residual) <= np.linalg.norm(RHS[:12])


def test_gmres_starts_at_the_last_solution():
    gmres, matrix, b = bilevel.gmres(tol=1e-10), non_symmetric(12), RHS[:12]
    _, state, cold = run(gmres, matrix, b)
    _, _, warm = run(gmres, matrix, 3.0 * b, state)
    assert int(warm.steps) <= 1 < int(cold.steps)
    _, _, warm = run(gmres, matrix + 1e-6 * non_symmetric(12, 1), b, state)
    assert int(warm.steps) < int(cold.steps)


# --- One running step --------------------------------------------------------------------------------------


def test_sgd_is_its_recursion():
    matrices = np.stack([symmetric(np.linspace(0.2, 1.0, 6), seed) for seed in range(9)])
    sgd, b, v = bilevel.sgd(0.7), RHS[:6], np.zeros(6)
    state = sgd.init(jnp.asarray(b))
    for matrix in matrices:
        x, state, info = run(sgd, matrix, b, state)
        residual = matrix @ v - b
        np.testing.assert_allclose(float(info.residual), np.linalg.norm(residual), rtol=1e-12)
        v = v - 0.7 * residual
        np.testing.assert_allclose(x, v, rtol=1e-12)
        assert (int(info.steps), int(info.products)) == (1, 1)
        assert not bool(info.negative_curvature)


def test_sgd_takes_the_first_fresh_batch():
    matrices = jnp.stack([2.0 * jnp.eye(3), 5.0 * jnp.eye(3)])
    sgd, b = bilevel.sgd(0.1), jnp.ones(3)
    start = sgd.init(b)._replace(v=jnp.ones(3))
    x, _, _ = sgd.solve(lambda v, j=1: matrices[j] @ v, b, start, KEY)
    np.testing.assert_allclose(x, 1 - 0.1 * (2.0 - 1.0))


@pytest.mark.parametrize("terms", [1, 4, 30])
def test_solves_of_sgd_from_zero_are_terms_of_the_series(terms):
    matrix, b, sgd = symmetric(np.linspace(0.2, 1.0, 8)), RHS[:8], bilevel.sgd(0.9)
    state = None
    for _ in range(terms):
        x, state, _ = run(sgd, matrix, b, state)
    expected, _, _ = run(bilevel.neumann(terms, 0.9), matrix, b)
    np.testing.assert_allclose(x, expected, rtol=1e-12)


# --- In an estimate ----------------------------------------------------------------------------------------


def ridge_estimate(solver, log_l2, solves=1):
    """Estimates in a row at the inner solution, and the closed form."""
    problem = ridge()
    w, log_l2 = jnp.asarray(problem.solution(log_l2)), jnp.asarray(log_l2)
    estimator, draw = bilevel.implicit(solver), Draw(lambda j: problem.train, 1, False)
    state = estimator.init(RIDGE, Point(w), log_l2)
    estimate = jax.jit(
        lambda state: estimator.estimate(RIDGE, state, Point(w), log_l2, draw, problem.valid, KEY)
    )
    for _ in range(solves):
        found, state = estimate(state)
    return found, problem.hypergradient(np.asarray(log_l2))


@pytest.mark.parametrize("log_l2", [0.0, -4.0, np.linspace(-6.0, 1.0, 20)], ids=["0", "-4", "each"])
@pytest.mark.parametrize(
    ("solver", "solves", "rtol"),
    [
        (bilevel.nystrom(20, 1e-8), 1, 1e-4),
        (bilevel.nystrom(20, 1e-12), 1, 1e-8),
        (bilevel.gmres(tol=1e-13), 1, 1e-9),
        (bilevel.cg(max_steps=100, tol=1e-13, preconditioner=bilevel.nystrom(5, 1e-3)), 1, 1e-9),
        (bilevel.sgd(0.3), 12000, 1e-9),
    ],
    ids=["nystrom 1e-8", "nystrom 1e-12", "gmres", "cg, nystrom", "sgd"],
)
def test_ridge_hypergradient_is_the_closed_form(solver, solves, rtol, log_l2):
    found, exact = ridge_estimate(solver, log_l2, solves)
    assert np.linalg.norm(found.grad - exact) <= rtol * np.linalg.norm(exact)


# --- Settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "fragments"),
    [
        (lambda: bilevel.nystrom(0, 0.1), ValueError, "rank must be at least 1, got 0"),
        (lambda: bilevel.nystrom(2.0, 0.1), TypeError, "rank must be a whole number"),
        (lambda: bilevel.nystrom(2, 0.0), ValueError, "damping must be a positive number"),
        (lambda: bilevel.nystrom(2, 0.1, refresh=0), ValueError, "refresh must be at least 1"),
        (lambda: bilevel.gmres(max_steps=0), ValueError, "max_steps must be at least 1"),
        (lambda: bilevel.gmres(tol=-1.0), ValueError, "tol must be a finite number of at least 0"),
        (lambda: bilevel.gmres(atol="0"), TypeError, "atol must be a number"),
        (lambda: bilevel.gmres(restart=0), ValueError, "restart must be at least 1"),
        (lambda: bilevel.sgd(0.0), ValueError, "step_size must be a positive number"),
        (lambda: bilevel.sgd(None), TypeError, "step_size must be a number"),
    ],
)
def test_settings_out_of_range(make, error, fragments):
    with pytest.raises(error, match=fragments):
        make()
