"""What every estimator and every method must do, whatever it computes."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import (
    ESTIMATORS,
    LOG_L2,
    METHODS,
    OTHER,
    SOLVERS,
    STEP_SIZE,
    STEPS,
    by_label,
    optimum,
)
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import RIDGE, Quadratic, ridge

import bilevel
from bilevel import archive
from bilevel.problem import NONE, RESIDUAL, Draw, Point

TRAIN_ROWS, VALID_ROWS = 40, 200
EPS32 = np.finfo(np.float32).eps


def assert_close(got, expected, rtol):
    """Relative to the norm of the whole array: single entries may be differences of larger ones."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= rtol * np.linalg.norm(expected)


def sharded(batch, devices=4):
    """The same arrays with their rows spread over devices."""
    return jax.device_put(batch, NamedSharding(_mesh(devices), PartitionSpec("data")))


def replicated(tree, devices=4):
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def _mesh(devices):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices; there is one accelerator")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


# --- The table ---------------------------------------------------------------------------------------------


def test_table_and_public_names_are_the_same_set():
    tabled = {row.factory for row in (*ESTIMATORS, *SOLVERS, *METHODS)}
    assert not tabled & OTHER
    assert tabled | OTHER == set(bilevel.__all__)


@pytest.mark.parametrize("name", sorted(set(bilevel.__all__) - {"STOP"}))
def test_public_names_are_documented(name):
    public = getattr(bilevel, name)
    assert inspect.getdoc(public)
    # A dataclass without a docstring shows its own signature instead.
    assert not inspect.getdoc(public).startswith(f"{name}(")


# --- Estimators --------------------------------------------------------------------------------------------


@functools.cache
def jitted(row):
    return jax.jit(bilevel.hypergradient(row.problem, row.make()))


def at_solution(log_l2):
    problem = ridge()
    return jnp.asarray(problem.solution(log_l2)), jnp.asarray(log_l2), problem.train, problem.valid


@by_label(ESTIMATORS)
def test_matches_closed_form(row):
    estimate = jitted(row)(*at_solution(LOG_L2))
    problem = ridge()
    assert_close(estimate.grad, row.expected(problem, LOG_L2), row.rtol)
    assert_close(estimate.value, problem.value(LOG_L2), 1e-12)
    assert_close(estimate.params, problem.solution(LOG_L2), 1e-12)


@by_label([row for row in ESTIMATORS if not row.exact])
def test_a_biased_estimator_is_not_exact(row):
    # Otherwise the closed form above could not tell a truncated series from a whole one.
    exact = ridge().hypergradient(LOG_L2)
    assert abs(row.expected(ridge(), LOG_L2) - exact) > 1e-4 * abs(exact)


@by_label(ESTIMATORS)
def test_eager_equals_jit(row):
    arguments = at_solution(LOG_L2)
    eager = bilevel.hypergradient(row.problem, row.make())(*arguments)
    chex.assert_trees_all_close(eager, jitted(row)(*arguments), rtol=1e-11, atol=1e-13)


@by_label(ESTIMATORS)
def test_vmap_equals_loop(row):
    log_l2 = np.array([-1.0, 0.0, 0.5])
    params = np.stack([ridge().solution(h) for h in log_l2])
    fn = bilevel.hypergradient(row.problem, row.make())
    batched = jax.jit(jax.vmap(fn, in_axes=(0, 0, None, None)))(
        jnp.asarray(params), jnp.asarray(log_l2), ridge().train, ridge().valid
    )
    assert batched.error_kind == row.error_kind
    for i, h in enumerate(log_l2):
        alone = jitted(row)(*at_solution(h))
        assert_close(batched.grad[i], alone.grad, 1e-11)
        assert_close(batched.value[i], alone.value, 1e-12)
        assert int(batched.solve.steps[i]) == int(alone.solve.steps)


@by_label(ESTIMATORS)
def test_sharded_over_devices_equals_one_device(row):
    params, log_l2, train, valid = at_solution(LOG_L2)
    estimate = jitted(row)(*replicated((params, log_l2)), sharded(train), sharded(valid))
    assert len(estimate.grad.sharding.device_set) == 4
    alone = jitted(row)(params, log_l2, train, valid)
    assert_close(estimate.grad, alone.grad, 1e-10)
    assert_close(estimate.value, alone.value, 1e-10)
    assert_close(estimate.params, alone.params, 1e-10)


@by_label(ESTIMATORS)
def test_float32_stays_within_rounding(row):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), at_solution(LOG_L2))
    estimate = jitted(row)(*arguments)
    assert {x.dtype for x in (estimate.grad, estimate.value, estimate.error, estimate.params)} == {
        jnp.dtype(jnp.float32)
    }
    problem = ridge()
    w, b = problem.solution(LOG_L2), problem.outer_grad(problem.solution(LOG_L2))
    eigenvalues = np.linalg.eigvalsh(problem.hessian(LOG_L2))
    condition = eigenvalues[-1] / eigenvalues[0]
    # |cross| |b| / mu is the scale of the indirect term. Off by the relative residual of the solve, which is
    # measured, and by rounding: sums of 200 rows, sqrt(200) eps each, amplified by the condition number.
    scale = np.exp(LOG_L2) * np.linalg.norm(w) * np.linalg.norm(b) / eigenvalues[0]
    residual = 0.0
    if row.error_kind == RESIDUAL and row.exact:
        residual = float(estimate.error)
        assert residual <= np.sqrt(EPS32)
    amplified = row.multiplier or row.amplified
    bound = scale * (residual + np.sqrt(VALID_ROWS) * EPS32 * condition * amplified)
    expected = row.expected(problem, LOG_L2)
    assert abs(float(estimate.grad) - expected) <= bound + row.random * abs(expected)


def _shapes():
    return st.lists(st.integers(1, 3), max_size=2).map(tuple)


def _trees():
    names = st.sampled_from(["a", "b", "w"])
    return st.recursive(
        _shapes(),
        lambda children: (
            st.dictionaries(names, children, min_size=1, max_size=2)
            | st.lists(children, min_size=1, max_size=2).map(lambda x: ("tuple", x))
        ),
        max_leaves=4,
    )


def _build(spec, rng):
    """A pytree of random arrays of the shapes that ``_trees`` drew."""
    if isinstance(spec, dict):
        return {name: _build(child, rng) for name, child in spec.items()}
    if spec and spec[0] == "tuple":
        return tuple(_build(child, rng) for child in spec[1])
    return jnp.asarray(rng.standard_normal(spec))


@by_label(ESTIMATORS)
@settings(max_examples=2)
@given(_trees(), _trees())
def test_any_pytree_donated_under_jit(row, params_spec, hparams_spec):
    rng = np.random.default_rng(0)
    params, hparams = _build(params_spec, rng), _build(hparams_spec, rng)
    flat, h = ravel_pytree(params)[0], np.asarray(ravel_pytree(hparams)[0])
    data = Quadratic.random(flat.size, h.size, seed=1, smallest=1.1, largest=3.5)
    w, unravel = data.solution(h), ravel_pytree(params)[1]
    # A long way from the instance of the table, same spectrum: every row's settings still fit.
    expected = row.expected_of_quadratic(data, h)
    fn = jax.jit(bilevel.hypergradient(row.quadratic, row.make()), donate_argnums=0)
    estimate = fn(unravel(jnp.asarray(w)), hparams, data.train, data.valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(estimate.grad, hparams)
    chex.assert_trees_all_equal_shapes_and_dtypes(estimate.params, params)
    # Relative to the indirect term, which the solve's tolerance refers to.
    indirect = np.linalg.norm(expected - h)
    assert np.linalg.norm(ravel_pytree(estimate.grad)[0] - expected) <= row.rtol * (indirect + 1)
    distance = np.abs(w - data.valid["target"]).max()
    assert abs(float(estimate.metrics["distance"]) - distance) <= 1e-9 * (1 + distance)


@by_label(ESTIMATORS)
def test_counts_examples_touched(row):
    estimate = jitted(row)(*at_solution(LOG_L2))
    counts = jax.tree.map(float, estimate.counts)
    assert counts.outer_grad == row.outer_grads * VALID_ROWS
    if not row.solver:
        differentiated = row.kept * row.passes * TRAIN_ROWS
        assert counts[:1] + counts[2:] == (row.steps * TRAIN_ROWS, differentiated, differentiated)
    else:
        products = int(estimate.solve.products)
        assert products > 0
        # The contraction of a fixed point is measured by two applications of its map.
        maps = 2 * isinstance(row.problem, bilevel.FixedPoint)
        assert counts[:1] + counts[2:] == (maps * TRAIN_ROWS, products * TRAIN_ROWS, TRAIN_ROWS)


@dataclasses.dataclass(frozen=True)
class Recording:
    """A linear solver that keeps its last solution in its state, for a test to look at."""

    solver: object

    def init(self, params):
        return self.solver.init(params), jax.tree.map(jnp.zeros_like, params)

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        x, inner, info = self.solver.solve(matvec, b, state[0], key, rtol=rtol, atol=atol)
        return x, (inner, x), info


def estimate_once(row, estimator, w, state=None, draw=None):
    """One estimate through the protocol: ``(estimate, state)``."""
    point, log_l2 = Point(jnp.asarray(w)), jnp.asarray(LOG_L2)
    state = estimator.init(row.problem, point, log_l2) if state is None else state
    draw = Draw(lambda j: ridge().train, 1, False) if draw is None else draw
    return jax.jit(
        lambda state, point, valid, key: estimator.estimate(
            row.problem, state, point, log_l2, draw, valid, key
        )
    )(state, point, ridge().valid, jax.random.key(1))


@by_label([row for row in ESTIMATORS if row.solver])
def test_error_is_the_relative_residual(row):
    estimator = row.make()
    w = ridge().solution(LOG_L2) + 0.1  # the residual is measured at any params
    estimate, (_, v) = estimate_once(
        row, dataclasses.replace(estimator, solver=Recording(estimator.solver)), w
    )
    b = ridge().outer_grad(w)
    residual = np.linalg.norm(row.scale * ridge().hessian(LOG_L2) @ np.asarray(v) - b)
    # Both are rounded at eps times the terms of the difference.
    rounding = 100 * np.finfo(float).eps * np.linalg.cond(ridge().hessian(LOG_L2))
    assert estimate.error_kind == RESIDUAL
    assert abs(float(estimate.error) - residual / np.linalg.norm(b)) <= rounding
    assert abs(float(estimate.solve.residual) - residual) <= rounding * np.linalg.norm(b)
    if row.terms is not None:
        assert float(estimate.error) > 1e-3  # a short series is told from a long one


@by_label([row for row in ESTIMATORS if row.error_kind == NONE])
def test_no_error_is_stated_as_infinite(row):
    assert np.isinf(jitted(row)(*at_solution(LOG_L2)).error)


@by_label([row for row in ESTIMATORS if row.trajectory])
def test_trajectories_move(row):
    start = jitted(row)(jnp.zeros(20), *at_solution(LOG_L2)[1:])
    assert np.linalg.norm(start.params) > 0.1  # it moves


@by_label([row for row in ESTIMATORS if not row.trajectory])
def test_implicit_estimates_stay_where_they_are(row):
    params = jnp.asarray(ridge().solution(LOG_L2) + 0.1)
    estimate = jitted(row)(params, *at_solution(LOG_L2)[1:])
    np.testing.assert_array_equal(estimate.params, params)


@by_label(ESTIMATORS)
def test_error_kind_is_structure(row):
    abstract = jax.eval_shape(jitted(row), *at_solution(LOG_L2))
    assert abstract.error_kind == row.error_kind
    assert row.make().trajectory == row.trajectory


@by_label(ESTIMATORS)
def test_settings_hash_and_compare(row):
    assert row.make() == row.make()
    assert hash(row.make()) == hash(row.make())


@by_label([row for row in ESTIMATORS if not row.trajectory])
def test_fresh_batches_are_asked_for_where_stated(row):
    train = ridge().train

    def batch(j):
        scale = jnp.where(jnp.asarray(j) < 1, 1.0, 2.0)  # later batches have other rows
        return train[0] * scale, train[1]

    w = ridge().solution(LOG_L2)
    plain, _ = estimate_once(row, row.make(), w)
    fresh, _ = estimate_once(row, row.make(), w, draw=Draw(batch, 1, True))
    assert (abs(float(fresh.grad) - float(plain.grad)) > 1e-3) == row.fresh
    assert float(fresh.counts.cross) == (TRAIN_ROWS * max(1, row.batches) if row.solver else 0)


@by_label(ESTIMATORS)
def test_memory_is_a_state_of_arrays(row):
    state = row.make().init(row.problem, Point(jnp.zeros(20)), jnp.asarray(LOG_L2))
    assert bool(jax.tree.leaves(state)) == row.memory


@by_label([row for row in ESTIMATORS if row.memory and row.solver])
def test_memory_warm_starts_and_survives_a_file(row, tmp_path):
    estimator, w = row.make(), ridge().solution(LOG_L2)
    cold, state = estimate_once(row, estimator, w)
    warm, _ = estimate_once(row, estimator, w + 1e-6, state)
    assert 0 < int(warm.solve.steps) < int(cold.solve.steps)
    archive.write(tmp_path / "state.npz", {"state": state}, {})
    trees, _ = archive.read(tmp_path / "state.npz", like={"state": state})
    again, _ = estimate_once(row, estimator, w + 1e-6, trees["state"])
    chex.assert_trees_all_equal(warm, again)


@by_label(ESTIMATORS)
def test_no_estimator_promotes_dtypes(row):
    fn = bilevel.hypergradient(row.problem, row.make())
    params, log_l2, train, valid = at_solution(LOG_L2)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(fn, params, log_l2, train, valid)


# --- Methods -----------------------------------------------------------------------------------------------

SOURCES = bilevel.minibatches(ridge().train, 20, fixed=True), ridge().valid


@functools.cache
def jitted_step(row):
    return jax.jit(functools.partial(row.method.step, RIDGE))


def first_state(row, log_l2, seed):
    return row.method.init(RIDGE, jnp.full(20, 0.1), jnp.asarray(log_l2), *SOURCES, key=jax.random.key(seed))


@by_label(METHODS)
def test_step_reports_and_keeps_its_structure(row):
    state = first_state(row, -1.0, 0)
    for k in range(6):
        before = state
        state, info = jitted_step(row)(before, *SOURCES)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
        moved = not np.array_equal(before.hparams, state.hparams)
        assert moved == (k >= row.frozen)
        assert (int(state.position) > int(before.position)) == (k % row.period == 0)
        assert bool(info.accepted)
        assert info.status == bilevel.Status.RUNNING
        # value is outer at the pair of the info
        np.testing.assert_array_equal(info.hparams, before.hparams)
        assert_close(info.value, ridge().value_at(np.asarray(info.params)), 1e-12)


@by_label(METHODS)
def test_step_vmapped_over_seeds_and_hparams_equals_a_loop(row):
    members = [first_state(row, log_l2, seed) for seed, log_l2 in enumerate((-3.0, -1.0, 0.0))]
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    step = jax.jit(jax.vmap(functools.partial(row.method.step, RIDGE), in_axes=(0, None, None)))
    for _ in range(3):
        states, infos = step(states, *SOURCES)
    for i, state in enumerate(members):
        for _ in range(3):
            state, info = jitted_step(row)(state, *SOURCES)
        assert_close(infos.value[i], info.value, 1e-11)
        assert_close(states.params[i], state.params, 1e-10)
        assert_close(states.hparams[i], state.hparams, 1e-10)


@by_label(METHODS)
def test_state_survives_a_file_in_mid_run(row, tmp_path):
    state = first_state(row, -1.0, 0)
    for _ in range(2):
        state, _ = jitted_step(row)(state, *SOURCES)
    archive.write(tmp_path / "state.npz", {"state": state}, {})
    trees, _ = archive.read(tmp_path / "state.npz", like={"state": state})
    expected = jitted_step(row)(state, *SOURCES)
    chex.assert_trees_all_equal(jitted_step(row)(trees["state"], *SOURCES), expected)


def solve(row, start, train, valid, steps):
    return bilevel.optimize(
        RIDGE, np.zeros(20), np.float64(start), train, valid, row.method, steps=steps, progress=False
    )


@by_label(METHODS)
def test_optimize_reaches_the_known_solution_from_two_starts(row, compiled):
    solution = optimum(row)
    for start in (-6.0, 0.0):
        compiled()
        result = solve(row, start, ridge().train, ridge().valid, row.steps)
        if start == 0.0:
            assert compiled() == 0  # the second call
        assert result.status == bilevel.Status.BUDGET
        # The gradient there is right to about 1e-14 times the condition number 26; its slope is 0.01 to 0.08.
        assert abs(float(result.hparams) - solution) <= 1e-9
        assert abs(result.history["value"][-1] - ridge().value(solution)) <= 1e-9
        assert_close(result.params, ridge().solution(solution), 1e-7)


@by_label(METHODS)
def test_a_sharded_run_equals_one_device(row):
    steps = 12
    alone = solve(row, -1.0, ridge().train, ridge().valid, steps)
    spread = solve(row, -1.0, sharded(ridge().train), sharded(ridge().valid), steps)
    assert_close(spread.history["value"], alone.history["value"], 1e-10)
    assert_close(spread.hparams, alone.hparams, 1e-10)
    assert_close(spread.params, alone.params, 1e-10)


@by_label(METHODS)
def test_no_method_promotes_dtypes(row):
    method = row.method
    with jax.numpy_dtype_promotion("strict"):
        for sources in ((ridge().train, ridge().valid), SOURCES):
            state = method.init(RIDGE, jnp.zeros(20), jnp.asarray(LOG_L2), *sources, key=jax.random.key(0))
            jax.eval_shape(functools.partial(method.step, RIDGE), state, *sources)


def test_rows_have_enough_steps():
    # The table's claim that a trajectory of STEPS steps is exact there.
    smallest = np.linalg.eigvalsh(ridge().hessian(LOG_L2))[0]
    assert STEPS * (1 - STEP_SIZE * smallest) ** STEPS < 1e-11
