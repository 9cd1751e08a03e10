"""The inner solution as a function: against closed forms, in every mode and order of derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import LOGISTIC, RIDGE, central_difference, logistic_data, logistic_solution, ridge, ridge_valid

import bilevel
from bilevel.argmin import argmin
from bilevel.inner_loops import lbfgs, newton, optax_loop, picard

EXACT = bilevel.cg(max_steps=200, tol=1e-14)
START = jnp.zeros(20)
LOG_L2 = np.linspace(-2.0, 1.0, 20)


def newton_steps(problem, steps):
    """A solver of our own, quick to compile: to rounding in one step on ridge regression."""

    def solve(params, hparams, batch):
        def step(_, w):
            grad = jax.grad(problem.inner)
            return w - jnp.linalg.solve(jax.jacfwd(grad)(w, hparams, batch), grad(w, hparams, batch))

        return jax.lax.fori_loop(0, steps, step, params)

    return solve


SOLVE = argmin(RIDGE, newton_steps(RIDGE, 2), EXACT)
SOLVE_LOGISTIC = argmin(LOGISTIC, newton_steps(LOGISTIC, 10), EXACT)


def outer(log_l2, train=None):
    train = ridge().train if train is None else train
    return ridge_valid(SOLVE(log_l2, train, init=START), log_l2, ridge().valid)


def logistic_outer(log_l2, x=None):
    """A loss that is not quadratic, so that the second derivatives have all their terms."""
    (features, y), valid = logistic_data()
    params = SOLVE_LOGISTIC(log_l2, (features if x is None else x, y), init=jnp.zeros(5))
    return LOGISTIC.outer(params, log_l2, valid)


# --- First derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, newton(atol=1e-15)])
def test_gradient_by_hparams_is_the_closed_form(solver):
    solve = argmin(RIDGE, solver, EXACT)

    def loss(log_l2):
        return ridge_valid(solve(log_l2, ridge().train, init=START), log_l2, ridge().valid)

    for log_l2 in (np.float64(-1.0), LOG_L2):
        value, grad = jax.jit(jax.value_and_grad(loss))(log_l2)
        # The default tolerance of the inner solver is 1.5e-8.
        atol = 1e-10 if solver is not None else 1e-7
        np.testing.assert_allclose(value, ridge().value(log_l2), atol=atol)
        np.testing.assert_allclose(grad, ridge().hypergradient(log_l2), atol=atol)


def test_gradient_by_the_batch_is_the_closed_form():
    grad_a, grad_b = jax.jit(jax.grad(outer, argnums=1))(jnp.asarray(LOG_L2), ridge().train)
    a, b, n = ridge().a, ridge().b, ridge().b.size
    w = ridge().solution(LOG_L2)
    v = np.linalg.solve(ridge().hessian(LOG_L2), ridge().outer_grad(w))
    # w = H^-1 a^T b / n, differentiated by hand.
    np.testing.assert_allclose(grad_b, a @ v / n, atol=1e-10)
    np.testing.assert_allclose(grad_a, (np.outer(b - a @ w, v) - np.outer(a @ v, w)) / n, atol=1e-10)


def test_reverse_and_forward_mode_agree():
    solution = functools.partial(SOLVE, batch=ridge().train, init=START)
    forward = jax.jit(jax.jacfwd(solution))(jnp.asarray(LOG_L2))
    reverse = jax.jit(jax.jacrev(solution))(jnp.asarray(LOG_L2))
    np.testing.assert_allclose(forward, reverse, atol=1e-12)
    w = ridge().solution(LOG_L2)
    exact = -np.linalg.solve(ridge().hessian(LOG_L2), np.diag(np.exp(LOG_L2) * w))
    np.testing.assert_allclose(forward, exact, atol=1e-12)


def test_derivative_by_init_is_zero():
    grad = jax.grad(lambda w: jnp.sum(SOLVE(jnp.float64(0.0), ridge().train, w)))(jnp.ones(20))
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("linear_solver", [None, bilevel.dense(), bilevel.neumann(400, 0.3)])
def test_linear_solvers(linear_solver):
    solve = argmin(RIDGE, newton_steps(RIDGE, 2), linear_solver)
    loss = lambda h: ridge_valid(solve(h, ridge().train, START), h, ridge().valid)  # noqa: E731
    grad = jax.jit(jax.grad(loss))(jnp.float64(0.0))
    np.testing.assert_allclose(
        grad, ridge().hypergradient(0.0), rtol=1e-7 if linear_solver is None else 1e-10
    )


# --- Second derivatives -------------------------------------------------------------------------------------

MODES = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


@functools.cache
def logistic_hessian():
    """By differences of gradients that are themselves closed forms at numpy's solution."""
    (x, y), (xv, yv) = logistic_data()
    h = np.linspace(-3.0, -1.0, 5)

    def gradient(log_l2):
        w, penalty = logistic_solution(log_l2, (x, y), steps=20), np.exp(log_l2)
        p = 1 / (1 + np.exp(y * (x @ w)))
        hessian = (x.T * (p * (1 - p))) @ x / y.size + np.diag(penalty)
        q = 1 / (1 + np.exp(yv * (xv @ w)))
        v = np.linalg.solve(hessian, -(xv.T @ (q * yv)) / yv.size)
        return 0.02 * log_l2 - penalty * w * v

    columns = [central_difference(gradient, h, e, 1e-3) for e in np.eye(5)]
    return h, np.array(columns).T


@pytest.mark.parametrize("mode", MODES)
def test_hessians_by_hparams(mode):
    h, expected = logistic_hessian()
    found = jax.jit(MODES[mode](logistic_outer))(jnp.asarray(h))
    np.testing.assert_allclose(found, expected, atol=1e-8)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


@pytest.mark.parametrize("mode", ["reverse over reverse"])
def test_hessians_by_the_batch(mode):
    (x, _), _ = logistic_data()
    h = jnp.linspace(-3.0, -1.0, 5)
    direction = jax.random.normal(jax.random.key(1), x.shape)

    def along(t):
        return logistic_outer(h, x + t * direction)

    found = jax.jit(MODES[mode](along))(jnp.float64(0.0))
    first = jax.jit(jax.grad(along))
    expected = central_difference(lambda t: float(first(jnp.float64(t))), 0.0, 1.0, 1e-3)
    np.testing.assert_allclose(found, expected, atol=1e-8)


# --- Transformations ----------------------------------------------------------------------------------------


def test_vmap_over_hparams():
    grids = jnp.stack([jnp.asarray(LOG_L2), jnp.zeros(20), -jnp.asarray(LOG_L2)])
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(outer)))(grids)
    for h, value, grad in zip(np.asarray(grids), values, grads, strict=True):
        np.testing.assert_allclose(value, ridge().value(h), rtol=1e-12)
        np.testing.assert_allclose(grad, ridge().hypergradient(h), atol=1e-10)


def test_the_second_call_compiles_nothing(compiled):
    grad = jax.jit(jax.grad(outer))
    grad(jnp.asarray(LOG_L2)).block_until_ready()
    one = jnp.asarray(LOG_L2) + 1.0
    compiled()
    grad(one).block_until_ready()
    assert compiled() == 0


def test_memory_does_not_grow_with_the_steps_of_the_solver():
    def memory(steps):
        def descent(params, hparams, batch):
            def step(w, _):
                return w - 0.2 * jax.grad(RIDGE.inner)(w, hparams, batch), None

            return jax.lax.scan(step, params, None, steps)[0]

        solve = argmin(RIDGE, descent, EXACT)
        loss = lambda h: jnp.sum(solve(h, ridge().train, START) ** 2)  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(jnp.float64(0.0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(5000) <= memory(50) + 1024


def test_a_layer_of_a_larger_program():
    # A ridge head on learned features: its closed form is differentiated by JAX on its own.
    (x, y), (xv, yv) = logistic_data()
    head = argmin(RIDGE, newton_steps(RIDGE, 2), EXACT)

    def features(theta, x):
        return jnp.tanh(x @ theta["w"]) * theta["scale"]

    def by_argmin(theta):
        w = head(theta["log_l2"], (features(theta, x), y), init=jnp.zeros(3))
        return jnp.mean((features(theta, xv) @ w - yv) ** 2)

    def by_hand(theta):
        phi = features(theta, x)
        matrix = phi.T @ phi / y.size + jnp.exp(theta["log_l2"]) * jnp.eye(3)
        w = jnp.linalg.solve(matrix, phi.T @ y / y.size)
        return jnp.mean((features(theta, xv) @ w - yv) ** 2)

    theta = {
        "w": 0.5 * jax.random.normal(jax.random.key(0), (5, 3)),
        "scale": jnp.float64(1.3),
        "log_l2": jnp.float64(-2.0),
    }
    found, expected = jax.jit(jax.grad(by_argmin))(theta), jax.grad(by_hand)(theta)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    # And it trains.
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(theta, state):
        value, grad = jax.value_and_grad(by_argmin)(theta)
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(theta, updates), state, value

    state = optimizer.init(theta)
    values = []
    for _ in range(20):
        theta, state, value = step(theta, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


def test_any_function_is_a_solver():
    def exact(params, log_l2, batch):
        del params, log_l2, batch
        w = ridge().solution(LOG_L2)
        return jax.pure_callback(lambda: w, jax.ShapeDtypeStruct(w.shape, w.dtype))

    solve = argmin(RIDGE, exact, EXACT)
    grad = jax.grad(lambda h: ridge_valid(solve(h, ridge().train, START), h, ridge().valid))(LOG_L2)
    np.testing.assert_allclose(grad, ridge().hypergradient(LOG_L2), atol=1e-10)


def test_integers_and_keys_in_the_batch_pass_through():
    def inner(w, h, batch):
        noise = jax.random.normal(batch["key"], (2,))
        target = batch["x"][batch["rows"]] + 0.1 * noise
        return 0.5 * jnp.exp(h["fit"]) * jnp.sum((w - target) ** 2) + 0.5 * jnp.sum(w**2)

    problem = bilevel.Problem(inner=inner, outer=lambda w, h, batch: jnp.sum(w))
    solve = argmin(problem, newton_steps(problem, 2), EXACT)
    batch = {"x": jnp.arange(3.0), "rows": jnp.array([0, 2]), "key": jax.random.key(1), "none": None}
    target = np.asarray(batch["x"])[[0, 2]] + 0.1 * np.asarray(jax.random.normal(batch["key"], (2,)))

    def total(h, x, key=None):
        return jnp.sum(solve(h, batch | {"x": x}, jnp.zeros(2), key) ** 2)

    h = {"fit": jnp.float64(0.3)}
    share = 1 / (1 + np.exp(-0.3))
    np.testing.assert_allclose(
        jax.jit(jax.grad(total))(h, batch["x"], jax.random.key(3))["fit"],
        2 * share**2 * (1 - share) * np.sum(target**2),
        rtol=1e-10,
    )
    by_x = jax.jit(jax.grad(total, argnums=1))(h, batch["x"])
    np.testing.assert_allclose(by_x, 2 * share**2 * np.array([target[0], 0, target[1]]), atol=1e-10)
    second = jax.jit(jax.hessian(total))(h, batch["x"])["fit"]["fit"]
    expected = 2 * share**2 * (1 - share) * (2 - 3 * share) * np.sum(target**2)
    np.testing.assert_allclose(second, expected, rtol=1e-9)


# --- Fixed points -------------------------------------------------------------------------------------------

MIX = np.random.default_rng(0).standard_normal((4, 4)) * 0.3
RELAX = bilevel.FixedPoint(lambda w, h, batch: jnp.tanh(batch @ w) + h, lambda w, h, batch: jnp.sum(w))


def fixed_point(h):
    w = np.zeros(4)
    for _ in range(300):
        w = np.tanh(MIX @ w) + h
    return w


@pytest.mark.parametrize("linear_solver", [bilevel.gmres(tol=1e-14), bilevel.neumann(300, 1.0)])
def test_fixed_points(linear_solver):
    solve = argmin(RELAX, picard(atol=1e-15), linear_solver)
    h = np.linspace(-0.3, 0.4, 4)
    w = fixed_point(h)
    default = argmin(RELAX)(jnp.asarray(h), MIX, np.zeros(4))
    np.testing.assert_allclose(default, w, atol=1e-7)
    slope = (1 - np.tanh(MIX @ w) ** 2)[:, None] * MIX
    exact = np.linalg.inv(np.eye(4) - slope)
    assert np.abs(exact - exact.T).max() > 0.1  # a wrong transpose would show
    for mode in (jax.jacfwd, jax.jacrev):
        found = jax.jit(mode(lambda h: solve(h, MIX, np.zeros(4))))(jnp.asarray(h))
        np.testing.assert_allclose(found, exact, atol=1e-11)


@pytest.mark.parametrize("mode", ["forward over reverse"])
def test_hessians_of_fixed_points(mode):
    solve = argmin(RELAX, picard(atol=1e-15), bilevel.dense())
    h = jnp.linspace(-0.3, 0.4, 4)

    def total(h):
        return jnp.sum(solve(h, MIX, np.zeros(4)) ** 3)

    found = jax.jit(MODES[mode](total))(h)
    grad = jax.jit(jax.grad(total))
    columns = [central_difference(grad, h, e, 1e-3) for e in np.eye(4)]
    np.testing.assert_allclose(found, np.array(columns).T, atol=1e-8)


def test_parts_that_hparams_do_not_act_on():
    """A bias that is not penalised: its gradient does not depend on hparams, and JAX asserts that all do."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 3)), rng.standard_normal(30)

    def inner(params, h, batch):
        residual = batch[0] @ params["w"] + params["b"] - batch[1]
        return 0.5 * jnp.mean(residual**2) + 0.5 * h * jnp.sum(params["w"] ** 2)

    def descent(params, h, batch):
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(inner)(params, h, batch))

    def by_hand(h):
        a = np.concatenate([x, np.ones((30, 1))], axis=1)
        return np.linalg.solve(a.T @ a / 30 + h * np.diag([1, 1, 1, 0]), a.T @ y / 30)[3]

    init, expected = {"w": np.zeros(3), "b": 0.0}, central_difference(by_hand, 0.5, 1.0, 1e-3)
    for solve in (
        argmin(bilevel.Problem(inner, inner), lbfgs(atol=1e-12), bilevel.cg(tol=1e-13)),
        argmin(bilevel.FixedPoint(descent, inner), picard(atol=1e-13), bilevel.dense()),
    ):
        for grad in (jax.grad, jax.jacfwd):
            found = jax.jit(grad(lambda h, solve=solve: solve(h, (x, y), init)["b"]))(0.5)
            np.testing.assert_allclose(found, expected, rtol=1e-8)


# --- What does not fit --------------------------------------------------------------------------------------


def test_wrong_problems_and_solvers():
    with_start = bilevel.Problem(RIDGE.inner, RIDGE.outer, start=lambda h, batch, key: START)
    with pytest.raises(ValueError, match="argmin begins where init= says"):
        argmin(with_start)
    with_state = bilevel.Problem(RIDGE.inner, RIDGE.outer, has_state=True)
    with pytest.raises(ValueError, match="no model state"):
        argmin(with_state)
    with pytest.raises(TypeError, match="problem must be a problem"):
        argmin(RIDGE.inner)
    with pytest.raises(TypeError, match="solver must be an inner solver"):
        argmin(RIDGE, bilevel.cg())
    with pytest.raises(TypeError, match="linear_solver must be a linear solver"):
        argmin(RIDGE, None, newton())
    with pytest.raises(TypeError, match=r"symmetric.*bilevel\.gmres\(\)"):
        argmin(RELAX, picard(), bilevel.cg())
    with pytest.raises(TypeError, match=r"solver must be an inner solver.*bilevel\.optax_loop\("):
        argmin(RIDGE, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"take bilevel\.picard\(\)"):
        argmin(RELAX, lbfgs())(jnp.zeros(4), MIX, jnp.zeros(4))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"Does init fit it\? init = float64\[3\]"):
        SOLVE(LOG_L2, ridge().train, jnp.zeros(3))
    with pytest.raises(TypeError, match="hparams must be floating"):
        SOLVE(3, ridge().train, START)
    with pytest.raises(ValueError, match="hparams must be finite"):
        SOLVE(np.nan, ridge().train, START)
    with pytest.raises(TypeError, match="init must be floating"):
        SOLVE(0.0, ridge().train, np.zeros(20, int))
    with pytest.raises(TypeError, match="batch must be arrays, got the source Minibatches"):
        SOLVE(0.0, bilevel.minibatches(ridge().train, 8), START)
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        SOLVE(0.0, ridge().train, START, key=3)
    positive = bilevel.Problem(RIDGE.inner, RIDGE.outer, constraints=bilevel.positive())
    with pytest.raises(ValueError, match="must be greater than 0"):
        argmin(positive)(-1.0, ridge().train, START)
    with pytest.raises(ValueError, match="solver must return params like init"):
        argmin(RIDGE, lambda params, hparams, batch: params[:3])(0.0, ridge().train, START)


def test_float32_stays_float32():
    f32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (LOG_L2, ridge().train, START))
    solve = argmin(RIDGE, optax_loop(optax.sgd(0.2), 300))
    value, grad = jax.jit(jax.value_and_grad(lambda h: jnp.sum(solve(h, *f32[1:]) ** 2)))(f32[0])
    assert value.dtype == grad.dtype == jnp.float32


# --- What is not finite, and what is far -------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [None, newton(), optax_loop(optax.sgd(0.1), 5)], ids=["default", "newton", "optax"]
)
def test_a_loss_that_is_not_finite_gives_no_params(solver):
    a, b = ridge().train
    train = a.at[0, 0].set(jnp.nan), b
    solve = argmin(RIDGE, solver)
    assert np.all(np.isnan(solve(jnp.float64(0.0), train, START)))
    grad = jax.grad(lambda h: ridge_valid(solve(h, train, START), h, ridge().valid))(jnp.float64(0.0))
    assert np.isnan(grad)
    assert np.all(np.isfinite(solve(jnp.float64(0.0), ridge().train, START)))


@pytest.mark.parametrize("linear_solver", [None, bilevel.gmres(), bilevel.dense()], ids=str)
def test_a_hessian_that_is_not_finite_gives_no_derivative(linear_solver):
    # At w = 0 the gradient is zero and the second derivative infinite.
    def cusp(w, h, batch):
        return jnp.sum(jnp.abs(w - h * batch) ** 1.5)

    solve = argmin(bilevel.Problem(cusp, RIDGE.outer), None, linear_solver)
    grad = jax.grad(lambda h: jnp.sum(solve(h, jnp.ones(3), jnp.zeros(3))))(jnp.float64(0.0))
    assert np.isnan(grad)


def test_fixed_points_without_a_derivative_have_none():
    problem = bilevel.FixedPoint(lambda z, h, batch: jnp.sqrt(z) * h, RIDGE.outer)
    solve = argmin(problem, lambda z, h, batch: z)
    assert np.isnan(jax.grad(lambda h: jnp.sum(solve(h, None, jnp.zeros(3))))(jnp.float64(1.0)))


@pytest.mark.parametrize("log_l2", [-11.5, -16.0])
def test_the_default_linear_solver_takes_as_many_steps_as_the_size_asks_for(log_l2):
    n, rng = 300, np.random.default_rng(0)
    a = rng.standard_normal((600, n)) * np.geomspace(1, 1e-3, n)
    b = a @ np.ones(n)
    hessian = a.T @ a / 600 + np.exp(log_l2) * np.eye(n)
    w = np.linalg.solve(hessian, a.T @ b / 600)
    expected = -np.exp(log_l2) * np.sum(np.linalg.solve(hessian, w))
    solve = argmin(RIDGE, lambda params, h, batch: jnp.asarray(w))
    found = jax.jit(jax.grad(lambda h: jnp.sum(solve(h, (a, b), np.zeros(n)))))(jnp.float64(log_l2))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_the_default_linear_solver_of_fixed_points_grows_with_them():
    # A slow rotation in many planes: Krylov spaces shorter than the space do little.
    n = 120
    shift = np.roll(np.eye(n), 1, axis=1)
    problem = bilevel.FixedPoint(lambda z, h, batch: 0.99 * (shift @ z) + h * batch, RIDGE.outer)
    batch = np.random.default_rng(0).standard_normal(n)
    exact = np.linalg.solve(np.eye(n) - 0.99 * shift, batch)
    solve = argmin(problem, lambda z, h, b: jnp.asarray(exact))
    found = jax.jit(jax.jacfwd(lambda h: solve(h, batch, np.zeros(n))))(jnp.float64(1.0))
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_params_of_lower_precision_than_the_data(dtype):
    eps = float(jnp.finfo(dtype).eps)
    solve = argmin(RIDGE)
    w = solve(jnp.float64(0.0), ridge().train, START.astype(dtype))
    assert w.dtype == dtype
    np.testing.assert_allclose(w.astype(np.float64), ridge().solution(0.0), atol=4 * eps**0.5)
