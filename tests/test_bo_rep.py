"""BO-REP: steps of one length, refined and averaged params, and the tables of its behaviour on toys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    RIDGE,
    RIDGE_LOG_L2,
    least_squares,
    logistic_data,
    logistic_train,
    logistic_valid,
    ridge,
    ridge_train,
)

import bilevel
from bilevel import Status
from bilevel.methods.bo_rep import _ASIDE, PeriodicUpdate, bo_rep
from bilevel.path_smoothness import path_smoothness
from bilevel.problem import Draw, Point, SolveInfo
from bilevel.transforms import normalized_momentum

R = ridge()
KEY = jax.random.key(0)
# Largest eigenvalue of the inner Hessian at the optimum; 40 terms leave a floor of about 0.02 in log-L2.
L = 2.594711
TERMS = 40
NEUMANN = bilevel.implicit(bilevel.neumann(TERMS, 1 / L))
SGD = optax.sgd(1 / L)


def walk(method, start, steps, problem=RIDGE, params=None, train=R.train, valid=R.valid):
    """hparams in free units and params, before each outer step; compiled by the caller."""
    params = jnp.zeros(20) if params is None else params
    state = method.init(problem, params, start, train, valid, key=KEY)

    def body(state, _):
        new, info = method.step(problem, state, train, valid)
        return new, (state.free, info.params)

    return jax.lax.scan(body, state, None, length=steps)[1]


def run(method, problem=RIDGE, start=0.0, train=R.train, valid=R.valid, **options):
    settings = {"steps": 20, "progress": False, **options}
    return bilevel.optimize(problem, np.zeros(20), np.array(start), train, valid, method, **settings)


# --- Normalised momentum ----------------------------------------------------------------------------------


def gradients(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [{"a": rng.standard_normal((3, 2)), "b": rng.standard_normal()} for _ in range(count)]


@pytest.mark.parametrize("step_size", [0.3, lambda k: 0.3 / jnp.sqrt(k + 1.0)], ids=["number", "schedule"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_normalized_momentum_matches_numpy(step_size, momentum):
    optimizer = normalized_momentum(step_size, momentum)
    given = gradients()
    state, mean = optimizer.init(given[0]), np.zeros(7)
    for k, grad in enumerate(given):
        update, state = optimizer.update(grad, state)
        mean = momentum * mean + (1 - momentum) * np.append(grad["a"].ravel(), grad["b"])
        length = step_size(k) if callable(step_size) else step_size
        expected = -length * mean / np.linalg.norm(mean)
        np.testing.assert_allclose(np.append(update["a"].ravel(), update["b"]), expected, rtol=1e-14)
    assert int(state.steps) == len(given)


@pytest.mark.parametrize(("dtype", "scale"), [(np.float64, 1e-200), (np.float64, 1e200), (np.float32, 1e-30)])
def test_lengths_are_exact_whatever_the_size_of_the_gradient(dtype, scale):
    optimizer = normalized_momentum(0.25, 0.5)
    grad = jax.tree.map(lambda g: np.asarray(scale * g, dtype), gradients()[0])
    update, _ = optimizer.update(grad, optimizer.init(grad))
    assert {u.dtype for u in jax.tree.leaves(update)} == {np.dtype(dtype)}
    length = np.sqrt(sum(np.sum(np.float64(u) ** 2) for u in jax.tree.leaves(update)))
    np.testing.assert_allclose(length, 0.25, rtol=4 * np.finfo(dtype).eps)


def test_a_gradient_of_zero_moves_nothing_and_nan_is_not_hidden():
    optimizer = normalized_momentum(0.25)
    zero = {"a": jnp.zeros((3, 2)), "b": jnp.float64(0.0)}
    update, state = optimizer.update(zero, optimizer.init(zero))
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(update))
    bad = {"a": jnp.zeros((3, 2)), "b": jnp.float64(jnp.nan)}
    assert not np.isfinite(optimizer.update(bad, state)[0]["b"])


def test_settings_may_be_traced():
    optimizer = optax.inject_hyperparams(normalized_momentum)(step_size=0.5, momentum=jnp.float64(0.9))
    grad = jnp.array([3.0, -4.0])
    update, _ = jax.jit(optimizer.update)(grad, optimizer.init(grad))
    np.testing.assert_allclose(update, [-0.3, 0.4], rtol=1e-6)


# --- The algorithm as written -----------------------------------------------------------------------------


def by_hand(steps, eta, beta, period, inner_steps, rate, radius=np.inf, refine=None):
    """Log-L2 and params of each outer step, in numpy."""
    u, m, w, rows = 0.0, 0.0, np.zeros(20), []

    def gradient(w):
        return R.hessian(u) @ w - R.a.T @ R.b / R.b.size

    def average(w, count, rate, radius):
        centre, mean = w, np.zeros(20)
        for _ in range(count):
            w = w - rate * gradient(w)
            away = w - centre
            w = centre + away * min(1.0, radius / np.linalg.norm(away))
            mean += w / count
        return mean

    for k in range(steps):
        if k == 0 and refine:
            first, ball, length, epochs = refine
            for s in range(epochs):
                w = average(w, length * 2**s, first / 2**s, ball / 2 ** (s / 2))
        elif k % period == 0:
            w = average(w, inner_steps, rate, radius)
        g = R.neumann(u, TERMS, 1 / L, w)
        rows.append((u, w))
        m = beta * m + (1 - beta) * g
        u = u - eta * m / abs(m)
    return np.array([u for u, _ in rows]), np.stack([w for _, w in rows])


@pytest.mark.parametrize(
    ("period", "inner_steps", "radius", "refine"),
    [(1, 2, None, None), (3, 4, 0.05, None), (2, 3, None, (0.3, 0.5, 4, 3)), (2, 3, 0.05, (0.3, 0.5, 4, 3))],
)
def test_it_is_the_algorithm_as_written(period, inner_steps, radius, refine):
    refinement = bilevel.epoch_sgd(refine[0], refine[1], *refine[2:]) if refine else None
    method = bo_rep(SGD, 0.07, 0.6, period, inner_steps, NEUMANN, refinement, radius)
    got = jax.jit(lambda: walk(method, jnp.array(0.0), 9))()
    expected = by_hand(9, 0.07, 0.6, period, inner_steps, 1 / L, radius or np.inf, refine)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-13)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-13)
    still = [np.array_equal(a, b) for a, b in zip(got[1][1:], got[1], strict=False)]
    assert still == [(k + 1) % period != 0 for k in range(8)]


def test_costs_are_counted():
    method = bo_rep(SGD, 0.07, 0.6, 2, 3, NEUMANN, bilevel.epoch_sgd(0.3, 0.5, 4, 3))
    h = run(method, steps=6).history
    # 4 + 8 + 16 steps, and the gradient measured between epochs and at the end.
    np.testing.assert_array_equal(h["inner_grad"], 40 * np.array([32, 0, 3, 0, 3, 0]))
    np.testing.assert_array_equal(h["hvp"], np.full(6, 40.0 * (TERMS - 1)))
    assert method.batches_per_step == (3, 1)


def test_an_update_stays_in_its_ball():
    method = bo_rep(optax.sgd(0.3), 0.1, period=2, inner_steps=5, estimator=NEUMANN, radius=0.02)
    _, w = jax.jit(lambda: walk(method, jnp.array(0.0), 30))()
    moved = np.linalg.norm(np.diff(np.asarray(w), axis=0), axis=1)
    assert np.all(moved <= 0.02 * (1 + 1e-12))
    assert moved.max() > 0.015


def test_the_refinement_takes_batches_of_its_own():
    @dataclasses.dataclass(frozen=True)
    class Spy:
        def init(self, problem, point, hparams):
            return ()

        def solve(self, problem, state, point, hparams, draw, key, *, atol=None):
            seen = jnp.stack([draw(jnp.int32(j)) for j in range(5)] + [draw.last]).astype(float)
            return Point(seen), state, SolveInfo(0.0, jnp.int32(5), jnp.int32(5), jnp.bool_(False))

    update = PeriodicUpdate(optax.sgd(0.1), 3, None, Spy())
    problem = bilevel.Problem(lambda w, h, j: jnp.sum(w) * j, lambda w, h, j: jnp.sum(w))
    point, draw = Point(jnp.zeros(6)), Draw(lambda j: jnp.asarray(j), 3, True)
    state = update.init(problem, point, 0.0)
    point, state, info = jax.jit(lambda p, s: update.solve(problem, s, p, 0.0, draw, KEY))(point, state)
    np.testing.assert_array_equal(point.params, [0, 1, 2, 3 + _ASIDE, 4 + _ASIDE, 2])
    assert int(info.products) == 5
    again, _, info = update.solve(problem, state, point, 0.0, draw, KEY)
    assert int(info.products) == 3
    # Gradients are the batch's number: the mean of 0, -1, -3 steps of a tenth.
    np.testing.assert_allclose(again.params, point.params - 0.1 * 4 / 3)


def test_inner_steps_advance_model_state():
    def inner(w, h, batch, count):
        return least_squares(w, batch) + jnp.exp(h) * jnp.sum(w**2), count + 1

    problem = bilevel.Problem(inner, lambda w, h, batch, count: least_squares(w, batch), has_state=True)
    result = run(bo_rep(SGD, 0.1, estimator=NEUMANN), problem, steps=5, model_state=np.float64(0.0))
    assert float(result.model_state) == 3 * 3


# --- B1: the Neumann estimator ----------------------------------------------------------------------------

LOG_L2 = -1.0
# Above the largest curvature of a batch of 5 rows, 11.8 + exp(-1).
L_BATCH = 12.5


def estimated(terms, rate, draw, w):
    estimator, point = bilevel.implicit(bilevel.neumann(terms, rate)), Point(jnp.asarray(w))
    memory = estimator.init(RIDGE, point, LOG_L2)
    return estimator.estimate(RIDGE, memory, point, jnp.array(LOG_L2), draw, R.valid, KEY)[0].grad


def test_b1_the_series_converges_at_its_rate():
    w, draw = R.solution(LOG_L2), Draw(lambda j: R.train, 1, False)
    eigenvalues = np.linalg.eigvalsh(R.hessian(LOG_L2))
    rate = 1 / eigenvalues[-1]
    exact, terms = R.hypergradient(LOG_L2, w), (1, 5, 20, 80)
    off = np.array([abs(float(estimated(q, rate, draw, w)) - exact) for q in terms])
    bound = np.linalg.norm(np.exp(LOG_L2) * w) * np.linalg.norm(R.outer_grad(w)) / eigenvalues[0]
    assert np.all(off <= bound * (1 - rate * eigenvalues[0]) ** np.array(terms))
    assert off[-1] <= 1e-4 * abs(exact)


def test_b1_batches_of_independent_factors_leave_no_bias():
    def grad(key):
        def batch(j):
            rows = jax.random.randint(jax.random.fold_in(key, j), (5,), 0, 40)
            return R.train[0][rows], R.train[1][rows]

        return estimated(10, 1 / L_BATCH, Draw(batch, 1, True), R.solution(LOG_L2))

    got = np.asarray(jax.jit(jax.vmap(grad))(jax.random.split(KEY, 10_000)))
    error = got.std() / 100
    expected = R.neumann(LOG_L2, 10, 1 / L_BATCH)
    assert error <= 2e-3 * expected
    assert abs(got.mean() - expected) <= 3 * error


# --- B2: every step has one length ------------------------------------------------------------------------


def test_b2_steps_have_one_length_and_the_solution_moves_little():
    eta = 0.05
    log_l2, _ = jax.jit(lambda: walk(bo_rep(SGD, eta, 0.9, 2, 3, NEUMANN), jnp.array(0.0), 200))()
    np.testing.assert_allclose(np.abs(np.diff(log_l2)), eta, atol=1e-12)
    solutions = np.stack([R.solution(x) for x in np.asarray(log_l2)])
    moved = np.linalg.norm(np.diff(solutions, axis=0), axis=1)
    grid = np.linspace(log_l2.min(), log_l2.max(), 200)
    cross = max(np.linalg.norm(np.exp(x) * R.solution(x)) for x in grid)
    assert moved.max() <= eta * cross / np.linalg.eigvalsh(R.hessian(log_l2.min()))[0]
    assert moved.max() <= 0.8 * eta


def test_steps_have_one_length_over_all_leaves_and_in_free_units():
    def inner(w, h, batch):
        decay = jnp.sum(h["l2"] * w**2) + h["all"] * jnp.sum(w**2)
        return least_squares(w, batch) * h["share"][0] + 0.5 * decay

    problem = bilevel.Problem(
        inner,
        lambda w, h, batch: least_squares(w, batch),
        constraints={
            "l2": bilevel.positive(),
            "all": bilevel.interval(0, 2),
            "share": bilevel.simplex(),
            "still": bilevel.fixed(),
        },
    )
    start = {"l2": jnp.full(20, 0.1), "all": jnp.array(0.5), "share": jnp.array([0.7, 0.3])}
    start["still"] = jnp.array(1.0)
    train = bilevel.minibatches(R.train, 10)
    method = bo_rep(optax.sgd(0.05), lambda k: 0.1 * 0.9**k, 0.9, 2, 3, refinement=bilevel.lbfgs(5))
    free, _ = jax.jit(lambda train: walk(method, start, 12, problem, train=train))(train)
    moved = sum(np.sum(np.diff(x, axis=0).reshape(11, -1) ** 2, axis=1) for x in jax.tree.leaves(free))
    np.testing.assert_allclose(np.sqrt(moved), 0.1 * 0.9 ** np.arange(11), atol=1e-12)


# --- B3 and B7: where it ends -----------------------------------------------------------------------------


def root(hypergradient):
    """Where an increasing function of log-L2 vanishes near the optimum, by bisection."""
    lo, hi = RIDGE_LOG_L2 - 1, RIDGE_LOG_L2 + 1
    while hi - lo > 1e-13:
        middle = 0.5 * (lo + hi)
        lo, hi = (middle, hi) if hypergradient(middle) < 0 else (lo, middle)
    return lo


def tail(step_sizes, momentum, steps):
    """Largest distance from the optimum over the last 500 steps, for each step size."""

    def one(eta):
        return walk(bo_rep(SGD, eta, momentum, 2, 3, NEUMANN), jnp.array(0.0), steps)[0]

    log_l2 = jax.jit(jax.vmap(one))(jnp.array(step_sizes))
    return np.abs(np.asarray(log_l2)[:, -500:] - RIDGE_LOG_L2).max(axis=1)


def test_b3_cycles_shrink_with_the_step():
    """The table of the reference, which started elsewhere: the cycle's phase differs by up to a step."""
    got = tail([0.1, 0.05, 0.01], 0.0, 1500)
    assert np.all(np.abs(got - [0.34, 0.14, 0.047]) <= [0.1, 0.05, 0.04])
    with_momentum = tail([0.05, 0.01, 0.001], 0.9, 6000)
    np.testing.assert_allclose(with_momentum, [0.89, 0.18, 0.036], rtol=0.4)
    assert np.all(with_momentum <= 2 * np.array([0.05, 0.01, 0.001]) / (1 - 0.9) + 0.02)


def test_b7_a_falling_step_ends_at_the_floor_of_the_series():
    method = bo_rep(SGD, lambda k: 0.3 / jnp.sqrt(k + 1.0), 0.9, 2, 3, NEUMANN)
    log_l2, _ = jax.jit(lambda: walk(method, jnp.array(0.0), 8000))()
    assert abs(float(log_l2[-1]) - RIDGE_LOG_L2) <= 0.04
    # Of the mean over the last cycles nothing but the floor is left.
    floor = root(lambda x: R.neumann(x, TERMS, 1 / L))
    assert 0.005 < RIDGE_LOG_L2 - floor < 0.01
    assert abs(np.mean(log_l2[-2000:]) - floor) <= 0.001


# --- B4: unbounded smoothness -----------------------------------------------------------------------------

TOY = bilevel.Problem(
    inner=lambda y, x, data: 0.5 * (y - jnp.sin(x)) ** 2,
    outer=lambda y, x, data: x**4 / 4 + 0.5 * y**2,
)
# The inner Hessian is 1: one term is exact.
EXACT = bilevel.implicit(bilevel.neumann(1, 1.0))


def on_toy(method, steps, start=20.0):
    zero = np.zeros(1)
    return bilevel.optimize(
        TOY, np.array(0.0), np.array(start), zero, zero, method, steps, judge_every=1, progress=False
    )


@pytest.mark.parametrize(("eta", "steps"), [(0.01, 2500), (0.1, 500)])
def test_b4_it_converges_where_smoothness_has_no_bound(eta, steps):
    result = on_toy(bo_rep(optax.sgd(0.5), eta, 0.9, 2, 3, EXACT), steps)
    assert result.status == Status.BUDGET
    x = np.asarray(result.trajectory.hparams)
    assert np.abs(x[-200:]).max() <= 2 * eta / (1 - 0.9)
    falling = on_toy(bo_rep(optax.sgd(0.5), lambda k: 50 * eta * 0.99**k, 0.9, 2, 3, EXACT), 1000)
    assert abs(float(falling.hparams)) <= 0.5 * eta


@pytest.mark.parametrize(
    ("outer", "within"),
    [
        (optax.sgd(0.01, momentum=0.9), 5),
        (optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1)), 5),
    ],
    ids=["heavy ball", "mean of gradients"],
)
def test_b4_momentum_without_normalisation_diverges_there(outer, within):
    method = bilevel.alternating(EXACT, optax.sgd(0.5), outer, inner_steps=3, period=2)
    result = on_toy(method, 60)
    assert result.status == Status.DIVERGED
    assert np.abs(np.asarray(result.trajectory.hparams)[: within + 1]).max() > 1e3


# --- B5 and B6: how close params are ----------------------------------------------------------------------


def test_b5_tracking_grows_with_the_period_and_falls_with_the_inner_steps():
    def worst(period, inner_steps):
        method = bo_rep(SGD, 0.01, 0.9, period, inner_steps, NEUMANN)
        log_l2, w = jax.jit(lambda: walk(method, jnp.array(0.0), 360))()
        solutions = np.stack([R.solution(x) for x in np.asarray(log_l2)])
        return np.linalg.norm(w - solutions, axis=1)[50:].max()

    got = [worst(*pair) for pair in ((2, 3), (10, 3), (10, 30), (50, 30))]
    np.testing.assert_allclose(got, [0.048, 0.23, 0.077, 0.38], rtol=0.1)


def test_b6_refinement_has_the_best_rate_under_noise():
    def noisy(w, log_l2, batch):
        batch, key = batch
        noise = 0.5 * jax.random.normal(key, (20,))
        return ridge_train(w, log_l2, batch) + noise @ w

    problem = bilevel.Problem(noisy, lambda w, h, batch: least_squares(w, batch))
    train = bilevel.with_rng(bilevel.minibatches(R.train, 40))  # all rows, and noise anew for each step

    def end(epochs, key):
        refinement = bilevel.epoch_sgd(0.27, 6.0, steps=8, epochs=epochs)
        method = bo_rep(SGD, 0.1, estimator=NEUMANN, refinement=refinement)
        state = method.init(problem, jnp.zeros(20), jnp.array(0.0), train, R.valid, key=key)
        return method.step(problem, state, train, R.valid)[1].params

    keys, errors = jax.random.split(KEY, 32), []
    for epochs in (2, 4, 6):
        w = jax.jit(jax.vmap(functools.partial(end, epochs)))(keys)
        errors.append(np.mean(np.sum((np.asarray(w) - R.solution(0.0)) ** 2, axis=1)))
    steps = [8 * (2**epochs - 1) for epochs in (2, 4, 6)]
    assert -1.2 < np.polyfit(np.log(steps), np.log(errors), 1)[0] < -0.8


@pytest.mark.parametrize("epochs", [1, 4])
def test_b6_epochs_stay_in_their_balls(epochs):
    far = bilevel.Problem(
        lambda w, h, batch: 1e6 * jnp.sum(w * jnp.exp(h)), lambda w, h, batch: jnp.sum(w * h)
    )
    method = bo_rep(SGD, 0.1, estimator=NEUMANN, refinement=bilevel.epoch_sgd(0.5, 1.0, 4, epochs))
    result = run(method, far, steps=1)
    reach = sum(2 ** (-s / 2) for s in range(epochs))
    np.testing.assert_allclose(np.linalg.norm(result.params), reach, rtol=1e-12)


# --- Smoothness along the path ----------------------------------------------------------------------------

QUARTIC = bilevel.Problem(lambda y, x, data: 0.5 * (y - x) ** 2, lambda y, x, data: y**4 / 4)
ZERO = np.zeros(1)


def test_smoothness_of_a_quartic_grows_with_its_gradient():
    x = np.geomspace(8.0, 1.0, 40)
    seen = path_smoothness(QUARTIC, x, ZERO, ZERO, params=np.array(8.0))
    np.testing.assert_allclose(seen.grad_norm, x[:-1] ** 3, rtol=1e-6)
    np.testing.assert_allclose(seen.length, -np.diff(x), rtol=1e-12)
    expected = (x[:-1] ** 3 - x[1:] ** 3) / (x[:-1] - x[1:])
    np.testing.assert_allclose(seen.smoothness, expected, rtol=1e-5)
    assert abs(seen.power - 2 / 3) <= 1e-3
    slope, constant = np.polyfit(seen.grad_norm, seen.smoothness, 1)
    np.testing.assert_allclose([seen.slope, seen.constant], [slope, constant], rtol=1e-9)
    assert seen.inner_residual <= 1e-7
    assert "power 0.67" in repr(seen)


def test_smoothness_of_a_quadratic_is_constant():
    problem = bilevel.Problem(lambda y, x, data: 0.5 * (y - x) ** 2, lambda y, x, data: 1.5 * y**2)
    seen = path_smoothness(problem, np.linspace(4.0, 1.0, 10), ZERO, ZERO, params=np.array(0.0))
    np.testing.assert_allclose(seen.smoothness, 3.0, rtol=1e-6)
    assert max(abs(seen.slope), abs(seen.power)) <= 1e-6
    assert abs(seen.constant - 3.0) <= 1e-5


def test_smoothness_along_a_run_is_in_free_units_and_of_all_rows():
    problem = bilevel.Problem(
        lambda w, l2, batch: least_squares(w, batch) + 0.5 * l2 * jnp.sum(w**2),
        lambda w, l2, batch: least_squares(w, batch),
        constraints=bilevel.positive(),
    )
    train = bilevel.minibatches(R.train, 10)
    result = run(bo_rep(optax.sgd(0.1), 0.1), problem, 1.0, train, steps=30)
    seen = path_smoothness(problem, result, train, R.valid)
    log_l2 = np.log(np.asarray(result.trajectory.hparams))
    exact = np.array([R.hypergradient(x) for x in log_l2])
    np.testing.assert_allclose(seen.length, 0.1, atol=1e-12)
    np.testing.assert_allclose(seen.grad_norm, np.abs(exact[:-1]), rtol=1e-5)
    np.testing.assert_allclose(seen.smoothness, np.abs(np.diff(exact)) / 0.1, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(seen.step, np.arange(30))


def test_moves_of_no_length_are_left_out_and_few_points_have_no_fit():
    seen = path_smoothness(QUARTIC, np.array([2.0, 2.0, 1.0]), ZERO, ZERO, params=np.array(2.0))
    np.testing.assert_array_equal(seen.step, [1])
    np.testing.assert_allclose(seen.smoothness, 7.0, rtol=1e-6)
    assert np.isnan([seen.constant, seen.slope, seen.power]).all()
    nothing = path_smoothness(QUARTIC, np.array([2.0, 2.0]), ZERO, ZERO, params=np.array(2.0))
    assert repr(nothing) == "PathSmoothness(no moves)"


def test_it_is_drawn():
    seen = path_smoothness(QUARTIC, np.geomspace(8.0, 1.0, 20), ZERO, ZERO, params=np.array(8.0))
    ax = seen.plot().axes[0]
    assert ax.get_xlabel() == "gradient norm (free units)"
    assert len(ax.collections[0].get_offsets()) == 19
    assert len(ax.lines) == 1


# --- In runs ------------------------------------------------------------------------------------------------

LOGISTIC = bilevel.Problem(logistic_train, logistic_valid)


STOCHASTIC = bo_rep(
    optax.adam(0.1), 0.2, 0.8, 2, 3,
    estimator=bilevel.implicit(bilevel.neumann(5, 0.5), batches=1),
    refinement=bilevel.epoch_sgd(0.5, 2.0, 4, 3),
    radius=0.5,
)  # fmt: skip


def stochastic(steps=8, **options):
    """With batches at both levels, of a logistic regression with one penalty per feature."""
    train, valid = (bilevel.minibatches(half, 20) for half in logistic_data())
    return bilevel.optimize(
        LOGISTIC, np.zeros(5), np.full(5, -2.0), train, valid, STOCHASTIC, steps, progress=False, **options
    )


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = stochastic()
    assert whole.history["accepted"].all()
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(whole.trajectory.hparams, axis=0), axis=1), 0.2, atol=1e-12
    )
    stochastic(steps=3, checkpoint=tmp_path)
    again = stochastic(checkpoint=tmp_path)
    for name in ("value", "grad_norm", "judged"):
        np.testing.assert_array_equal(again.history[name], whole.history[name])


def test_members_of_a_population_run_as_they_would_alone():
    method = bo_rep(SGD, 0.07, 0.6, 2, 3, NEUMANN, bilevel.epoch_sgd(0.3, 0.5, 4, 3), 0.1)
    starts = np.array([0.0, -2.0])
    many = bilevel.optimize(
        RIDGE, np.zeros((2, 20)), starts, R.train, R.valid, method, 8,
        population=bilevel.population(2), progress=False,
    )  # fmt: skip
    for i, start in enumerate(starts):
        alone = run(method, start=start, steps=8)
        own = many.member(i).history
        np.testing.assert_allclose(own["value"], alone.history["value"], rtol=1e-9)
        np.testing.assert_array_equal(own["inner_grad"][0], alone.history["inner_grad"][0])
        np.testing.assert_allclose(many.member(i).params, alone.params, rtol=1e-9)


def test_four_devices_agree_with_one():
    method = bo_rep(SGD, 0.07, 0.6, 2, 3, NEUMANN, bilevel.epoch_sgd(0.3, 0.5, 4, 3), 0.1)
    alone, spread = run(method, steps=8), run(method, steps=8, mesh=jax.make_mesh((4,), ("data",)))
    np.testing.assert_allclose(spread.history["value"], alone.history["value"], rtol=1e-10)
    np.testing.assert_allclose(spread.params, alone.params, rtol=1e-10)


@pytest.mark.parametrize(
    "refinement", [None, bilevel.epoch_sgd(0.1, 1.0, 2, 2)], ids=["update", "refinement"]
)
def test_a_nan_batch_is_rejected_and_counted(refinement):
    train = (np.array(R.a), np.array(R.b))
    train[1][7] = np.nan
    method = bo_rep(optax.sgd(0.05), 0.1, 0.9, 1, 1, bilevel.implicit(bilevel.neumann(1, 0.1)), refinement)
    # At both levels a batch is a row; that one is met about once in a pass.
    result = run(method, train=bilevel.minibatches(train, 1), steps=60)
    accepted = result.history["accepted"]
    assert 0 < np.sum(~accepted) < 10
    assert np.isfinite(result.params).all()
    moved = np.abs(np.diff(result.trajectory.hparams))
    np.testing.assert_allclose(moved, np.where(accepted, 0.1, 0.0), atol=1e-12)


def test_the_variant_of_the_released_code():
    """A running vector for the linear system and the last iterate: a composition of what is there."""
    estimator = bilevel.implicit(bilevel.sgd(0.3))
    method = bilevel.alternating(
        estimator, optax.sgd(0.3), normalized_momentum(lambda k: 0.3 / jnp.sqrt(k + 1.0)), 3, 2
    )
    for each in (method, bo_rep(optax.sgd(0.3), lambda k: 0.3 / jnp.sqrt(k + 1.0), estimator=estimator)):
        log_l2, _ = jax.jit(functools.partial(walk, each, jnp.array(0.0), 6000))()
        assert abs(np.mean(log_l2[-1000:]) - RIDGE_LOG_L2) <= 0.02


def test_a_falling_step_reaches_the_known_optimum_and_the_second_call_compiles_nothing(compiled):
    exact = bilevel.implicit(bilevel.dense())
    method = bo_rep(optax.sgd(0.5), lambda k: 0.2 * 0.97**k, 0.5, 2, 100, exact, bilevel.lbfgs())
    for start in (-6.0, 0.0):
        compiled()
        result = run(method, start=start, steps=700)
        assert abs(float(result.hparams) - root(R.hypergradient)) <= 2e-9
    assert compiled() == 0


def test_no_dtype_is_promoted():
    method = bo_rep(SGD, 0.1, 0.9, 2, 3, NEUMANN, bilevel.newton(3), 0.1)
    with jax.numpy_dtype_promotion("strict"):
        for train in (R.train, bilevel.minibatches(R.train, 20)):
            state = method.init(RIDGE, jnp.zeros(20), jnp.array(0.0), train, R.valid, key=KEY)
            jax.eval_shape(functools.partial(method.step, RIDGE), state, train, R.valid)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_params_of_low_precision(dtype):
    half = jax.tree.map(lambda x: x.astype(dtype), (R.train, R.valid))
    method = bo_rep(optax.sgd(0.2), 0.1, 0.9, 2, 3, bilevel.implicit(bilevel.neumann(5, 0.2)), radius=1.0)
    result = bilevel.optimize(
        RIDGE, jnp.zeros(20, dtype), jnp.zeros((), dtype), *half, method, 20, progress=False
    )
    assert result.params.dtype == result.hparams.dtype == dtype
    np.testing.assert_allclose(float(result.hparams), -2.0, rtol=20 * float(jnp.finfo(dtype).eps))


# --- Mistakes -----------------------------------------------------------------------------------------------


def begin(problem=RIDGE, hparams=0.0, method=None):
    method = bo_rep(SGD, 0.1) if method is None else method
    return method.init(problem, np.zeros(20), hparams, R.train, R.valid, key=KEY)


BOXED = {"box": bilevel.box(-2.0, 1.0), "half": bilevel.box(0.0, np.inf)}
BAD = {
    "step_size": (
        lambda: bo_rep(SGD, -0.1),
        ValueError,
        "step_size must be a positive number or a schedule, g",
    ),
    "step_size 0": (lambda: bo_rep(SGD, jnp.zeros(())), ValueError, "step_size must be a positive.*got 0"),
    "step_size nan": (lambda: bo_rep(SGD, float("nan")), ValueError, "step_size must be .*got nan"),
    "step_size text": (lambda: bo_rep(SGD, "0.1"), TypeError, "step_size must be .*got '0.1'"),
    "momentum 1": (lambda: bo_rep(SGD, 0.1, 1.0), ValueError, "momentum must be .*less than 1, got 1"),
    "momentum": (lambda: normalized_momentum(0.1, -0.1), ValueError, "momentum must be .*got -0.1"),
    "momentum fn": (
        lambda: bo_rep(SGD, 0.1, lambda k: 0.9),
        TypeError,
        "momentum must be a number.*schedule",
    ),
    "period": (lambda: bo_rep(SGD, 0.1, period=0), ValueError, "period must be at least 1, got 0"),
    "inner_steps": (
        lambda: bo_rep(SGD, 0.1, inner_steps=0),
        ValueError,
        "inner_steps must be at least 1, got 0",
    ),
    "inner_steps 1.5": (lambda: bo_rep(SGD, 0.1, inner_steps=1.5), TypeError, "inner_steps must be a whole"),
    "radius": (lambda: bo_rep(SGD, 0.1, radius=0.0), ValueError, "radius must be a positive number, got 0"),
    "radius text": (lambda: bo_rep(SGD, 0.1, radius="1"), TypeError, "radius must be a number, got '1'"),
    "inner": (lambda: bo_rep(bilevel.lbfgs(), 0.1), TypeError, "inner must be an optax optimiser"),
    "refinement": (lambda: bo_rep(SGD, 0.1, refinement=SGD), TypeError, "refinement must be an inner solver"),
    "estimator": (lambda: bo_rep(SGD, 0.1, estimator=3), TypeError, "estimator must be an estimator"),
    "trajectory": (
        lambda: bo_rep(SGD, 0.1, estimator=bilevel.unrolled()),
        TypeError,
        r"estimator must be of the implicit family, .*got bilevel.unrolled\(\)",
    ),
    "fixed point": (
        lambda: begin(bilevel.FixedPoint(lambda w, t, x: 0.5 * w, lambda w, t, x: jnp.sum(w * t))),
        TypeError,
        "bo_rep minimises an inner loss, which a FixedPoint does not have",
    ),
    "start": (
        lambda: begin(dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20))),
        ValueError,
        "bo_rep goes on from where it stands; a problem with start=",
    ),
    "box": (
        lambda: begin(dataclasses.replace(RIDGE, constraints=BOXED["box"])),
        ValueError,
        r"constraints: hparams has box\(-2, 1\).*all of one length.*bilevel.interval\(-2, 1\)",
    ),
    "half box": (
        lambda: begin(dataclasses.replace(RIDGE, constraints=BOXED["half"])),
        ValueError,
        r"has box\(0, inf\).*bilevel.positive\(\)",
    ),
    "path": (
        lambda: path_smoothness(QUARTIC, np.array(2.0), ZERO, ZERO, params=np.array(2.0)),
        ValueError,
        "path must have an axis of at least 2 points",
    ),
    "no params": (
        lambda: path_smoothness(QUARTIC, np.ones(3), ZERO, ZERO),
        ValueError,
        "params must be given where path is no Result",
    ),
    "path's estimator": (
        lambda: path_smoothness(
            QUARTIC, np.ones(3), ZERO, ZERO, np.array(2.0), estimator=bilevel.unrolled(SGD, 3)
        ),
        TypeError,
        "estimator must be of the implicit family",
    ),
    "path's problem": (
        lambda: path_smoothness(bilevel.FixedPoint(lambda w, t, x: w, lambda w, t, x: w), ZERO, ZERO, ZERO),
        TypeError,
        "path_smoothness minimises an inner loss",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
