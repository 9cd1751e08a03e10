"""Inner solvers: tolerances met and measured, caps reported, and the rates that theory promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import NETWORK, RIDGE, Quadratic, network_data, network_train, ridge, ridge_train

import bilevel
from bilevel import data, linear_solvers
from bilevel.inner_loops import accelerated, epoch_sgd, lbfgs, newton, newton_cg, optax_loop, picard
from bilevel.problem import Draw, InnerSolver, Point

KEY = jax.random.key(0)
DETERMINISTIC = {
    "optax_loop": optax_loop(optax.sgd(0.25), 20_000, 1e-9),
    "accelerated": accelerated(20_000, 1e-9),
    "accelerated, constants": accelerated(
        20_000, 1e-9, lambda h: jnp.min(jnp.exp(h)), lambda h: 4.0 + jnp.max(jnp.exp(h))
    ),
    "lbfgs": lbfgs(atol=1e-9),
    "newton": newton(atol=1e-9),
    "newton_cg": newton_cg(atol=1e-9),
}
EVERY = DETERMINISTIC | {"epoch_sgd": epoch_sgd(0.25, 1.0, steps=16, epochs=9, atol=1e-9)}
each = pytest.mark.parametrize("solver", DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
every = pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY.keys())


def constant(batch):
    return Draw(lambda j: batch, 1, False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(solver, problem, params, hparams, batch, atol=None):
    point = Point(params)
    state = solver.init(problem, point, hparams)
    point, _, info = solver.solve(problem, state, point, hparams, constant(batch), KEY, atol=atol)
    return point.params, info


def ridge_residual(w, log_l2):
    r = ridge()
    return np.linalg.norm(r.hessian(log_l2) @ np.asarray(w) - r.a.T @ r.b / r.b.size)


# --- Every solver -------------------------------------------------------------------------------------------


@every
def test_protocol_and_hash(solver):
    assert isinstance(solver, InnerSolver)
    assert hash(solver) == hash(dataclasses.replace(solver))


@each
@pytest.mark.parametrize("log_l2", [-3.0])
def test_tolerance_is_met_and_the_residual_measured(solver, log_l2):
    w, info = solve(solver, RIDGE, jnp.zeros(20), jnp.float64(log_l2), ridge().train)
    assert 0 < float(info.residual) <= 1e-9
    assert abs(float(info.residual) - ridge_residual(w, log_l2)) <= 1e-14
    error = np.linalg.norm(w - ridge().solution(log_l2))
    smallest = np.linalg.eigvalsh(ridge().hessian(log_l2))[0]
    assert error <= 1.001 * float(info.residual) / smallest  # Eq. (1) of the module
    assert int(info.products) > int(info.steps) > 0


@each
def test_pytrees_with_a_norm_over_all_leaves(solver):
    params, hparams, train, _ = network_data()
    solver = dataclasses.replace(solver, atol=1e-3)
    if getattr(solver, "smoothness", None):
        solver = dataclasses.replace(solver, strong_convexity=1e-3, smoothness=20.0)
    end, info = solve(solver, NETWORK, params, hparams, train)
    grad = jax.grad(network_train)(end, hparams, train)
    assert float(info.residual) <= solver.atol
    np.testing.assert_allclose(np.linalg.norm(ravel_pytree(grad)[0]), info.residual, rtol=1e-6, atol=1e-12)


@every
def test_a_point_that_is_good_enough_is_left_alone(solver):
    w = jnp.asarray(ridge().solution(-1.0))
    end, info = solve(solver, RIDGE, w, jnp.float64(-1.0), ridge().train)
    np.testing.assert_array_equal(end, w)
    assert (int(info.steps), int(info.products)) == (0, 1)


@each
def test_warm_start_takes_fewer_gradients(solver):
    _, cold = solve(solver, QUARTIC, jnp.ones(6), jnp.float64(0.0), BOWL)
    _, warm = solve(solver, QUARTIC, 1e-4 * jnp.ones(6), jnp.float64(0.0), BOWL)
    assert int(warm.products) < int(cold.products)


@each
def test_tolerance_of_the_call_may_be_traced(solver):
    _, coarse = solve(solver, QUARTIC, jnp.ones(6), jnp.float64(0.0), BOWL, atol=jnp.float64(1e-2))
    _, fine = solve(solver, QUARTIC, jnp.ones(6), jnp.float64(0.0), BOWL, atol=jnp.float64(1e-6))
    assert float(fine.residual) <= 1e-6 < float(coarse.residual) <= 1e-2
    assert int(coarse.steps) < int(fine.steps)


def bowl(w, h, batch):
    return jnp.exp(h) * (0.5 * jnp.vdot(w, batch * w) + 0.05 * jnp.sum(w**4))


QUARTIC = bilevel.Problem(inner=bowl, outer=lambda w, h, batch: jnp.sum(w))
BOWL = np.linspace(0.5, 2.0, 6)


@each
def test_a_cap_shows_in_the_residual(solver):
    capped = dataclasses.replace(solver, max_steps=3)
    w, info = solve(capped, QUARTIC, jnp.ones(6), jnp.float64(0.0), BOWL, atol=1e-13)
    assert int(info.steps) == 3
    assert float(info.residual) > 1e-13
    grad = jax.grad(bowl)(w, 0.0, BOWL)
    np.testing.assert_allclose(np.linalg.norm(grad), info.residual, rtol=1e-12)


@every
def test_a_loss_that_is_not_finite_is_reported(solver):
    problem = bilevel.Problem(
        inner=lambda w, h, batch: h * jnp.sum(jnp.sqrt(w)) + jnp.sum(batch), outer=lambda w, h, batch: h
    )
    w, info = solve(solver, problem, -jnp.ones(3), jnp.float64(1.0), jnp.ones(3))
    np.testing.assert_array_equal(w, -1)
    assert np.isinf(info.residual)
    assert int(info.products) == 1


@every
def test_optimiser_state_and_model_state_are_handed_through(solver):
    point = Point(jnp.zeros(20), {"moment": jnp.ones(2)}, {"count": jnp.int32(3)})
    h = jnp.float64(0.0)
    end, _, _ = solver.solve(RIDGE, solver.init(RIDGE, point, h), point, h, constant(ridge().train), KEY)
    assert end.opt_state is point.opt_state
    assert jax.tree.structure(end.model_state) == jax.tree.structure(point.model_state)
    np.testing.assert_array_equal(end.model_state["count"], 3)


@each
def test_members_of_a_vmap_converge_each_in_its_own_time(solver):
    log_l2 = jnp.asarray([1.0, 0.0, -3.0])
    draw = constant(ridge().train)

    @jax.jit
    @jax.vmap
    def run(h):
        point = Point(jnp.zeros(20))
        point, _, info = solver.solve(RIDGE, solver.init(RIDGE, point, h), point, h, draw, KEY)
        return point.params, info

    w, info = run(log_l2)
    if not isinstance(solver, type(newton())):
        assert int(info.steps[0]) != int(info.steps[2])
    for i, h in enumerate(log_l2):
        alone, alone_info = solve(solver, RIDGE, jnp.zeros(20), h, ridge().train)
        assert abs(int(info.steps[i]) - int(alone_info.steps)) <= 2  # rounding may differ
        np.testing.assert_allclose(w[i], alone, atol=1e-7)
        assert float(info.residual[i]) <= 1e-9


@each
def test_float32_keeps_its_dtype_and_default_tolerance(solver):
    if hasattr(solver, "optimizer"):
        solver = dataclasses.replace(solver, atol=3e-4)
    else:
        solver = dataclasses.replace(solver, atol=None)
    f32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (jnp.zeros(20), 0.0, ridge().train))
    w, info = solve(solver, RIDGE, *f32)
    assert w.dtype == info.residual.dtype == jnp.float32
    assert float(info.residual) <= np.sqrt(np.finfo(np.float32).eps)
    assert ridge_residual(w, 0.0) <= np.sqrt(np.finfo(np.float32).eps) + 1e-5


def test_a_fixed_point_has_no_loss_to_minimise():
    fixed = bilevel.FixedPoint(lambda w, h, b: 0.5 * w + h, lambda w, h, b: w)
    for solver in EVERY.values():
        with pytest.raises(TypeError, match=r"FixedPoint does not have; take bilevel\.picard\(\)"):
            solver.init(fixed, Point(jnp.zeros(2)), 0.0)
    with pytest.raises(TypeError, match=r"take bilevel\.lbfgs\(\)"):
        picard().init(RIDGE, Point(jnp.zeros(2)), 0.0)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: optax_loop("adam", 10), TypeError, "optimizer must be an optax optimiser"),
        (lambda: optax_loop(optax.sgd(0.1), 0), ValueError, "max_steps must be at least 1"),
        (lambda: optax_loop(optax.sgd(0.1), 10, -1.0), ValueError, "atol"),
        (lambda: accelerated(strong_convexity=1.0), ValueError, "come together"),
        (lambda: accelerated(strong_convexity=0.0, smoothness=1.0), ValueError, "strong_convexity must be"),
        (lambda: lbfgs(memory=0), ValueError, "memory must be at least 1"),
        (lambda: lbfgs(max_steps=1.5), TypeError, "max_steps must be a whole number"),
        (lambda: newton(damping=-1.0), ValueError, "damping"),
        (lambda: newton_cg(cg_steps=0), ValueError, "cg_steps must be at least 1"),
        (lambda: newton_cg(rtol=-1.0), ValueError, "rtol"),
        (lambda: newton_cg(rtol=1.0), ValueError, "rtol must be below 1, got 1.0"),
        (lambda: epoch_sgd(0.0, 1.0), ValueError, "step_size must be a positive number"),
        (lambda: epoch_sgd(0.1, 1.0, epochs=40), ValueError, "Take fewer"),
        (lambda: picard(atol="x"), TypeError, "atol must be a number"),
    ],
)
def test_settings_are_checked(make, error, match):
    with pytest.raises(error, match=match):
        make()


# --- One by one ---------------------------------------------------------------------------------------------


def steps_to(solver, condition):
    quadratic = Quadratic.random(40, 2, seed=1, smallest=1.0 / condition, largest=1.0)
    problem = bilevel.Problem(
        inner=lambda w, h, b: 0.5 * jnp.vdot(w, b["hessian"] @ w) + jnp.vdot(b["shift"], w) + 0 * h,
        outer=lambda w, h, b: jnp.sum(w),
    )
    _, info = solve(solver, problem, jnp.zeros(40), jnp.float64(0.0), quadratic.train)
    assert float(info.residual) <= 1e-8
    return int(info.steps)


@pytest.mark.parametrize("known", [True, False])
def test_accelerated_beats_gradient_descent_by_the_root_of_the_condition_number(known):
    plain, fast = [], []
    for condition in (100.0, 2500.0):
        constants = (1 / condition, 1.0) if known else (None, None)
        plain.append(steps_to(optax_loop(optax.sgd(1.0), 100_000, 1e-8), condition))
        fast.append(steps_to(accelerated(100_000, 1e-8, *constants), condition))
        assert fast[-1] < 3 * plain[-1] / np.sqrt(condition)
    # Twenty-five times the condition number: gradient descent takes about as many times the steps.
    assert plain[1] / plain[0] > 12
    assert fast[1] / fast[0] < 8


def test_accelerated_keeps_no_constant_of_other_hparams():
    # The curvature grows by e^8: a step size kept from the first solve would diverge at once.
    solver = accelerated(2000, 1e-8)
    point, state = Point(jnp.ones(6)), ()
    for h in (0.0, 8.0, -2.0):
        point, state, info = solver.solve(QUARTIC, state, point, jnp.float64(h), constant(BOWL), KEY)
        assert float(info.residual) <= 1e-8
        point = Point(jnp.ones(6))
    functions = accelerated(2000, 1e-8, lambda h: 0.5 * jnp.exp(h), lambda h: 3.0 * jnp.exp(h))
    for h in (0.0, 8.0):
        _, info = solve(functions, QUARTIC, jnp.ones(6), jnp.float64(h), BOWL)
        assert float(info.residual) <= 1e-8


def test_accelerated_takes_steps_back_that_left_the_domain():
    # -log w + h w has its minimum at 1 / h; beyond zero the loss is not a number.
    problem = bilevel.Problem(
        inner=lambda w, h, batch: jnp.sum(batch * (h * w - jnp.log(w))), outer=lambda w, h, batch: jnp.sum(w)
    )
    w, info = solve(accelerated(5000, 1e-9), problem, 3.0 * jnp.ones(2), jnp.float64(4.0), jnp.ones(2))
    assert float(info.residual) <= 1e-9
    np.testing.assert_allclose(w, 0.25, rtol=1e-9)


def test_wrong_constants_show_in_the_residual():
    solver = accelerated(300, 1e-8, 0.01, 0.5)
    _, info = solve(solver, RIDGE, jnp.zeros(20), jnp.float64(0.0), ridge().train)
    assert float(info.residual) > 1e-8


def test_newton_converges_quadratically():
    tilted = bilevel.Problem(inner=lambda w, h, b: bowl(w, h, b) - jnp.sum(w), outer=lambda w, h, b: h)
    sizes = []
    for steps in range(2, 7):
        _, info = solve(newton(steps, 0.0), tilted, 3.0 * jnp.ones(6), jnp.float64(0.0), BOWL)
        assert int(info.products) == 7 * steps + 1
        sizes.append(float(info.residual))
    # Twice as many right digits with each step: b = c a^2, until rounding.
    factors = [b / a**2 for a, b in zip(sizes, sizes[1:], strict=False) if b > 1e-14]
    assert len(factors) >= 3
    assert max(factors) < 1
    assert sizes[-1] < 1e-14


def test_newton_backtracks_and_reports_negative_curvature():
    problem = bilevel.Problem(
        inner=lambda w, h, batch: jnp.sum(batch * (w**4 / 4 - h * w**2 / 2)), outer=lambda w, h, batch: h
    )
    w, info = solve(newton(60, 1e-12), problem, jnp.array([0.1, -0.3]), jnp.float64(1.0), jnp.ones(2))
    assert bool(info.negative_curvature)
    np.testing.assert_allclose(w, [1.0, -1.0], rtol=1e-12)
    # Newton's own step on sqrt(1 + w^2) overshoots beyond |w| = 1.
    problem = bilevel.Problem(
        inner=lambda w, h, batch: h * jnp.sum(jnp.sqrt(1 + w**2) * batch), outer=lambda w, h, batch: h
    )
    w, info = solve(newton(60, 1e-12), problem, jnp.array([3.0, -2.0]), jnp.float64(1.0), jnp.ones(2))
    assert float(info.residual) <= 1e-12
    assert not bool(info.negative_curvature)


def test_newton_of_many_members_takes_the_same_steps_without_a_cholesky_factorisation():
    """One of a large batch inside a loop may never end on a CPU."""

    problem = bilevel.Problem(  # saddles at zero coordinates, minima around
        lambda w, h, batch: jnp.sum(jnp.cos(3 * w) * batch) + 0.5 * h * w @ w, lambda w, h, batch: h
    )

    def end(w):
        return solve(newton(60, 1e-12), problem, w, jnp.float64(1.0), jnp.array([1.0, 2.0, 0.5]))

    starts = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (5, 3)))
    members, infos = jax.vmap(end)(starts)
    assert infos.negative_curvature.any()
    for member, negative, start in zip(members, infos.negative_curvature, starts, strict=True):
        alone, own = end(start)
        np.testing.assert_allclose(member, alone, atol=1e-10)
        assert negative == own.negative_curvature
    assert "cholesky" in str(jax.make_jaxpr(end)(starts[0]))
    assert "cholesky" not in str(jax.make_jaxpr(jax.vmap(end))(starts))


def test_newton_goes_to_rounding_and_damping_keeps_the_solution():
    w, info = solve(newton(atol=0.0), RIDGE, jnp.zeros(20), jnp.float64(-3.0), ridge().train)
    assert float(info.residual) <= 1e-14
    assert int(info.steps) < 50
    damped, info = solve(
        newton(300, atol=1e-12, damping=0.1), RIDGE, jnp.zeros(20), jnp.float64(-3.0), ridge().train
    )
    assert int(info.steps) > 5
    np.testing.assert_allclose(damped, w, atol=1e-10)


def test_one_newton_step_of_exact_cg_solves_a_quadratic():
    w, info = solve(newton_cg(1, 0.0, 40, 1e-14), RIDGE, jnp.zeros(20), jnp.float64(-3.0), ridge().train)
    np.testing.assert_allclose(w, ridge().solution(-3.0), rtol=1e-9)
    assert int(info.steps) == 1
    assert 20 <= int(info.products) - 2 <= 40  # two gradients beside the products of CG


def test_cg_stops_at_its_tolerance():
    params = jnp.zeros(20), jnp.float64(-3.0), ridge().train
    before = ridge_residual(params[0], -3.0)
    products = []
    for rtol in (0.5, 0.1, 1e-3):
        _, info = solve(newton_cg(1, 0.0, 100, rtol), RIDGE, *params)
        assert float(info.residual) <= rtol * before * (1 + 1e-9)
        products.append(int(info.products))
    assert products == sorted(set(products))
    _, info = solve(newton_cg(1, 0.0, 3, 0.0), RIDGE, *params)
    assert int(info.products) == 5


def test_newton_cg_goes_downhill_at_a_saddle_and_beyond():
    def inner(w, h, batch):
        return jnp.sum(batch * (0.25 * w**4 - 0.5 * h * w**2))  # minima at +-1

    problem = bilevel.Problem(inner=inner, outer=lambda w, h, batch: jnp.sum(w))
    for start in ([0.1, -0.3], [3.0, -2.0], [1e4, 1e-4]):
        w, info = solve(newton_cg(atol=1e-12), problem, jnp.array(start), jnp.float64(1.0), jnp.ones(2))
        np.testing.assert_allclose(jnp.abs(w), 1.0, rtol=1e-12)
        assert bool(info.negative_curvature) == (min(map(abs, start)) < 1)


def test_newton_cg_backtracks_where_whole_steps_overshoot():
    # From beyond 1 whole Newton steps on sqrt(1 + w^2) leap ever farther.
    problem = bilevel.Problem(
        inner=lambda w, h, batch: jnp.sum(jnp.sqrt(1 + (w - batch) ** 2)) + 0 * h,
        outer=lambda w, h, batch: jnp.sum(w),
    )
    for far in (1.0, 3.0, 1e3):
        w, info = solve(newton_cg(200, 1e-12), problem, jnp.full(3, far), jnp.float64(0.0), jnp.arange(3.0))
        assert float(info.residual) <= 1e-12
        np.testing.assert_allclose(w, np.arange(3), atol=1e-11)


@pytest.mark.parametrize(
    ("inner", "start"),
    [
        (lambda w, h, b: jnp.sum(jnp.abs(w) ** 1.5), [3.0, -1.0]),  # Newton steps flip the sign
        (lambda w, h, b: jnp.sum(jnp.logaddexp(0, -20 * w) + 1e-3 * w), [-40.0, -1.0]),  # no curvature
        (lambda w, h, b: jnp.sum(jnp.logaddexp(0, -10 * w) + 1e-3 * w), [-5.0, 1.0]),  # hardly any
        (lambda w, h, b: jnp.sum(jax.nn.relu(1 - w)) + 1e-3 * jnp.sum(w**2), [-3.0, -7.0]),
    ],
)
def test_newton_cg_moves_where_the_curvature_says_nothing(inner, start):
    problem = bilevel.Problem(inner=inner, outer=lambda w, h, b: jnp.sum(w))
    before = inner(jnp.asarray(start), 0.0, None)
    w, info = solve(newton_cg(100, 1e-9), problem, jnp.asarray(start), jnp.float64(0.0), jnp.zeros(1))
    assert inner(w, 0.0, None) < 0.1 * before
    assert int(info.steps) > 0


def test_newton_cg_ends_where_rounding_allows_no_more():
    # With no tolerance it must neither go on for ever nor take steps that change nothing.
    w, info = solve(newton_cg(1000, 0.0), RIDGE, jnp.zeros(20), jnp.float64(0.0), ridge().train)
    assert int(info.steps) < 30
    np.testing.assert_allclose(w, ridge().solution(0.0), atol=1e-13)


def test_newton_refuses_what_does_not_fit():
    point = Point(jax.ShapeDtypeStruct((linear_solvers.DENSE_LIMIT + 1,), np.float64))
    with pytest.raises(ValueError, match=r"5001 x 5001.*bilevel\.lbfgs\(\)"):
        newton().init(RIDGE, point, 0.0)


def test_lbfgs_stops_where_nothing_moves_any_more():
    _, info = solve(lbfgs(5000, atol=0.0), RIDGE, jnp.zeros(20), jnp.float64(-2.0), ridge().train)
    assert float(info.residual) < 1e-12
    assert int(info.steps) < 5000


def test_optax_loop_counts_and_continues():
    source = data.as_source(ridge().train, "train")
    solver, h = optax_loop(optax.adam(0.05), 7), jnp.float64(0.0)
    point = Point(jnp.zeros(20))
    draw = data.draw(source, KEY, 0, 1)
    state = solver.init(RIDGE, point, h)
    first, state, info = solver.solve(RIDGE, state, point, h, draw, KEY)
    second, _, _ = solver.solve(RIDGE, state, first, h, draw, KEY)
    assert (int(info.steps), int(info.products)) == (7, 8)
    w, adam = jnp.zeros(20), optax.adam(0.05)
    moments = adam.init(w)
    for _ in range(14):
        updates, moments = adam.update(jax.grad(ridge_train)(w, h, ridge().train), moments)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(second.params, w, rtol=1e-12, atol=1e-14)


def test_optax_loop_takes_a_batch_for_each_step():
    problem = bilevel.Problem(
        inner=lambda w, h, b: 0.5 * (w - b[0]) ** 2 * jnp.exp(h), outer=lambda w, h, b: w
    )
    draw = data.draw(bilevel.stacked(np.array([[1.0], [2.0], [4.0]])), KEY, 0, 3)
    solver, point, h = optax_loop(optax.sgd(0.5), 3), Point(jnp.float64(0.0)), jnp.float64(0.0)
    end, _, info = solver.solve(problem, solver.init(problem, point, h), point, h, draw, KEY)
    assert float(end.params) == 0.5 * (0.5 * (0.5 * 1.0) + 0.5 * 2.0) + 0.5 * 4.0
    assert float(info.residual) == abs(float(end.params) - 4.0)


def test_optax_loop_advances_model_state_by_its_steps_only():
    def inner(w, h, batch, count):
        return 0.5 * jnp.sum((w - batch) ** 2) * jnp.exp(h), count + 1

    problem = bilevel.Problem(inner=inner, outer=lambda w, h, b, s: jnp.sum(w), has_state=True)
    solver, h = optax_loop(optax.sgd(0.5), 100, 1e-3), jnp.float64(0.0)
    point = Point(jnp.zeros(2), None, jnp.float64(0.0))
    draw = constant(jnp.ones(2))
    end, _, info = solver.solve(problem, solver.init(problem, point, h), point, h, draw, KEY)
    assert float(end.model_state) == int(info.steps) > 5
    held, _, _ = lbfgs(atol=1e-3).solve(problem, (), point, h, draw, KEY)
    assert float(held.model_state) == 0


def test_picard():
    fixed = bilevel.FixedPoint(lambda w, h, b: 0.5 * jnp.cos(b * w) + h, lambda w, h, b: jnp.sum(w))
    b = np.array([0.3, 1.0])
    w, info = solve(picard(atol=1e-12), fixed, jnp.zeros(2), jnp.float64(0.2), b)
    np.testing.assert_allclose(w, 0.5 * np.cos(b * w) + 0.2, atol=1e-12)
    np.testing.assert_allclose(
        info.residual, np.linalg.norm(0.5 * np.cos(b * w) + 0.2 - w), rtol=1e-3, atol=1e-16
    )
    assert int(info.products) == int(info.steps) + 1
    _, info = solve(picard(2, atol=1e-12), fixed, jnp.zeros(2), jnp.float64(0.2), b)
    assert int(info.steps) == 2
    assert float(info.residual) > 1e-12


# --- Epoch-SGD ----------------------------------------------------------------------------------------------

NOISY = bilevel.Problem(
    inner=lambda w, h, batch: 0.5 * jnp.mean(jnp.sum((w[None] - batch) ** 2 * jnp.exp(h), axis=-1)),
    outer=lambda w, h, batch: jnp.sum(w),
)


def test_epoch_sgd_has_the_best_rate_under_noise():
    # Batches of one row without end: the minimiser is their mean, zero.
    def end(solver, key):
        draw = Draw(lambda j: jax.random.normal(jax.random.fold_in(key, j), (1, 3)), 1, True)
        point = Point(jnp.ones(3))
        return solver.solve(NOISY, (), point, jnp.float64(0.0), draw, KEY)

    keys = jax.random.split(jax.random.key(5), 256)
    steps, errors = [], []
    for epochs in (2, 4, 6, 8):
        solver = epoch_sgd(0.5, 4.0, steps=8, epochs=epochs)
        point, _, info = jax.jit(jax.vmap(functools.partial(end, solver)))(keys)
        steps.append(int(info.steps[0]))
        errors.append(float(jnp.mean(jnp.sum(point.params**2, axis=-1))))
        assert steps[-1] == 8 * (2**epochs - 1)
        assert int(info.products[0]) == steps[-1] + epochs + 1
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.15 < slope < -0.85


def test_epoch_sgd_matches_numpy():
    batches = np.random.default_rng(0).standard_normal((21, 1, 2)) + 0.5
    draw = Draw(lambda j: jnp.asarray(batches)[j], 21, False)
    solver, point = epoch_sgd(0.4, 0.7, steps=3, epochs=3), Point(jnp.zeros(2))
    end, _, info = solver.solve(NOISY, (), point, jnp.float64(0.0), draw, KEY)
    y, j, projected = np.zeros(2), 0, 0
    for s in range(3):
        w, mean = y.copy(), []
        radius = 0.7 / 2 ** (s / 2)
        for _ in range(3 * 2**s):
            w = w - 0.4 / 2**s * (w - batches[j, 0])
            j += 1
            distance = np.linalg.norm(w - y)
            if distance > radius:
                w, projected = y + (w - y) * radius / distance, projected + 1
            mean.append(w)
        y = np.mean(mean, axis=0)
    assert 0 < projected < 21  # the test sees both sides of the ball
    np.testing.assert_allclose(end.params, y, rtol=1e-13)
    np.testing.assert_allclose(info.residual, np.linalg.norm(y - batches[-1, 0]), rtol=1e-12)


def test_epoch_sgd_stays_in_its_balls():
    # The minimiser is far outside: each epoch goes at most its radius.
    draw = constant(1e6 * jnp.ones((1, 3)))
    for epochs in (1, 2, 5):
        end, _, _ = epoch_sgd(0.5, 1.0, 4, epochs).solve(
            NOISY, (), Point(jnp.zeros(3)), jnp.float64(0.0), draw, KEY
        )
        reach = sum(2 ** (-s / 2) for s in range(epochs))
        assert 0.5 * reach < np.linalg.norm(end.params) <= reach * (1 + 1e-12)


# --- Precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [lbfgs(), newton()], ids=["lbfgs", "newton"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("data_dtype", [None, jnp.float64])
def test_params_of_low_precision(solver, dtype, data_dtype):
    train = jax.tree.map(lambda x: x.astype(data_dtype or dtype), ridge().train)
    w, info = solve(solver, RIDGE, jnp.zeros(20, dtype), jnp.asarray(0.0, data_dtype or dtype), train)
    assert w.dtype == dtype
    atol = 4 * float(jnp.finfo(dtype).eps) ** 0.5
    np.testing.assert_allclose(w.astype(np.float64), ridge().solution(0.0), atol=atol)
    assert float(info.residual) <= atol


@pytest.mark.parametrize("solver", [lbfgs(), newton()], ids=["lbfgs", "newton"])
def test_leaves_of_different_precision(solver):
    params = {"a": jnp.zeros(12, jnp.float32), "b": jnp.zeros(8)}
    joined = bilevel.Problem(
        lambda w, h, batch: RIDGE.inner(jnp.concatenate([w["a"], w["b"]]), h, batch), RIDGE.outer
    )
    w, _ = solve(solver, joined, params, jnp.float64(0.0), ridge().train)
    assert (w["a"].dtype, w["b"].dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(ravel_pytree(w)[0], ridge().solution(0.0), atol=1e-3)


# --- Newton where its own step is useless ------------------------------------------------------------------


@pytest.mark.parametrize("start", [1e3, 1e5, 1e6])
def test_newton_comes_back_from_afar(start):
    # The Hessian is next to nothing there: Newton's step is longer than halvings can mend.
    problem = bilevel.Problem(lambda w, h, batch: jnp.sum(jnp.sqrt(1 + (w - h) ** 2)), lambda w, h, b: h)
    w, info = solve(newton(), problem, jnp.array([start, -0.3 * start]), jnp.float64(1.0), jnp.ones(2))
    assert float(info.residual) <= 1e-8
    np.testing.assert_allclose(w, 1.0, atol=1e-7)


def test_newton_leaves_the_flat_side_of_logistic_regression():
    x = np.random.default_rng(1).standard_normal((40, 2))
    y = np.where(x[:, 0] > 0, 1.0, -1.0)

    def loss(w, h, batch):
        return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w))) + 0.5 * h * w @ w

    problem = bilevel.Problem(loss, lambda w, h, batch: h)
    _, info = solve(newton(), problem, jnp.full(2, -2000.0), jnp.float64(1e-14), (x, y))
    assert float(info.residual) <= 1e-7


def test_a_tolerance_below_rounding_costs_few_steps():
    """The gradient stops to fall at about 1e-13; 100,000 steps more would change nothing."""
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.standard_normal((30, 30)))[0] * np.geomspace(1, 30, 30)
    b = 100 * rng.standard_normal(30)
    problem = bilevel.Problem(lambda w, h, x: 0.5 * jnp.sum((a @ w - b) ** 2), lambda w, h, x: jnp.sum(w * h))
    eigenvalues = np.linalg.eigvalsh(a.T @ a)
    solver = bilevel.accelerated(
        100_000, strong_convexity=float(eigenvalues[0]), smoothness=float(eigenvalues[-1])
    )
    draw = Draw(lambda j: np.zeros(1), 1, False)
    point, _, info = jax.jit(
        lambda atol: solver.solve(
            problem, (), Point(jnp.zeros(30)), jnp.array(1.0), draw, jax.random.key(0), atol=atol
        )
    )(1e-30)
    assert 1e-30 < info.residual < 1e-9
    assert info.steps < 5000
    np.testing.assert_allclose(point.params, np.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
