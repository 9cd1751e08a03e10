"""Schedules as hyperparameters, trajectories that explode, and evolution strategies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import central_difference

import bilevel
from bilevel import schedules

T = 24
ROWS = np.random.default_rng(0).normal(size=(12, 4))
DATA = {"x": ROWS[:, :3], "y": np.tanh(ROWS[:, 3])}
W = jnp.asarray([0.3, -0.2, 0.1])
MOMENTUM = bilevel.tuned(lambda h: optax.sgd(h["lr"], momentum=h["momentum"]))


def misfit(w, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ w) - batch["y"]) ** 2)


PROBLEM = bilevel.Problem(
    lambda w, h, batch: misfit(w, batch) + 0.5 * h["l2"] * jnp.sum(w**2),
    lambda w, h, batch: misfit(1.5 * w, batch),
)


def at(estimator, hparams, problem=PROBLEM, params=W, key=None):
    fn = jax.jit(bilevel.hypergradient(problem, estimator))
    return fn(params, hparams, DATA, DATA, key)


def hparams_of(lr, momentum=0.8, l2=0.1):
    return {"lr": jnp.asarray(lr), "momentum": jnp.asarray(momentum), "l2": jnp.asarray(l2)}


def assert_close(a, b, rtol=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-14), a, b)


# --- Schedules as hyperparameters ------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [bilevel.unrolled, bilevel.forward])
def test_a_window_has_the_summed_gradient_of_its_steps(estimator):
    rates = jnp.linspace(0.1, 0.3, 6)
    windows = {"lr": schedules.windows(6, T), "momentum": schedules.windows(3, T)}
    shared = at(estimator(MOMENTUM, T, per_step=windows), hparams_of(rates, jnp.full(3, 0.8)))
    stepwise = at(
        bilevel.unrolled(MOMENTUM, T, per_step={"lr": True, "momentum": True}),
        hparams_of(jnp.repeat(rates, 4), jnp.full(T, 0.8)),
    )
    assert_close(shared.value, stepwise.value)
    assert_close(shared.grad["lr"], stepwise.grad["lr"].reshape(6, 4).sum(1))
    assert_close(shared.grad["momentum"], stepwise.grad["momentum"].reshape(3, 8).sum(1))
    assert_close(shared.grad["l2"], stepwise.grad["l2"])


@pytest.mark.parametrize("truncate", [1, 7, 23])
def test_reverse_and_forward_agree_where_they_are_truncated(truncate):
    hparams = hparams_of(jnp.linspace(0.1, 0.3, 6))
    settings = {"truncate": truncate, "per_step": {"lr": schedules.windows(6, T)}}
    a, b = (at(kind(MOMENTUM, T, **settings), hparams) for kind in (bilevel.unrolled, bilevel.forward))
    assert_close(a.grad, b.grad)


FAMILIES = {
    "cosine": ({"peak": 0.3, "end": 0.02}, lambda h: schedules.cosine(h["peak"], T, warmup=3, end=h["end"])),
    "wsd": (
        {"peak": 0.3, "end": 0.02},
        lambda h: schedules.wsd(h["peak"], T, decay=8, end=h["end"], shape="exponential"),
    ),
    "sqrt": ({"peak": 0.3}, lambda h: schedules.wsd(h["peak"], T, decay=8, warmup=2, shape="sqrt")),
    "power law": (
        {"peak": 0.2, "scale": 0.4, "exponent": -0.5},
        lambda h: schedules.power_law(
            h["peak"], h["scale"], h["exponent"], warmup=2, decay=6, steps=T, batch=1.5
        ),
    ),
    "knots": (np.array([0.1, 0.4, 0.05]), schedules.knots(0, 5, T - 1, interpolation="log")),
    "lines": (np.array([0.1, 0.4, 0.05]), schedules.knots(0, 5, T - 1)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_pass_through_a_family_of_schedules(name):
    """Against finite differences; and training that follows the schedule ends at the same point."""
    given, make = FAMILIES[name]
    given = jax.tree.map(jnp.asarray, given)
    fn = jax.jit(bilevel.hypergradient(PROBLEM, bilevel.unrolled(MOMENTUM, T, per_step={"lr": make})))
    estimate = fn(W, hparams_of(0.0) | {"lr": given}, DATA, DATA)
    flat, unravel = jax.flatten_util.ravel_pytree(given)
    grad = jax.flatten_util.ravel_pytree(estimate.grad["lr"])[0]
    for i in range(flat.size):
        direction = jnp.zeros_like(flat).at[i].set(1)
        expected = central_difference(
            lambda x: fn(W, hparams_of(0.0) | {"lr": unravel(x)}, DATA, DATA).value, flat, direction, 1e-5
        )
        np.testing.assert_allclose(grad[i], expected, rtol=1e-6, atol=1e-9)
    optimizer, params = optax.sgd(make(given), momentum=0.8), W
    state = optimizer.init(params)
    for _ in range(T):
        grads = jax.grad(PROBLEM.inner)(params, hparams_of(0.0), DATA)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert_close(params, estimate.params)


def test_schedules_begin_and_end_where_they_say():
    cosine = schedules.cosine(0.4, 100, warmup=9, end=0.1)
    np.testing.assert_allclose([cosine(0), cosine(9), cosine(100), cosine(500)], [0.04, 0.4, 0.1, 0.1])
    wsd = schedules.wsd(0.4, 100, decay=20, warmup=3, end=0.1)
    np.testing.assert_allclose([wsd(3), wsd(80), wsd(90), wsd(100)], [0.4, 0.4, 0.25, 0.1])
    # 128 sequences, a = 4, b = -0.51 (Shen et al., 2024): the cap of 0.02 binds until 6e8 tokens.
    power = schedules.power_law(0.02, 128 * 4.0, -0.51, batch=1e6, warmup=10, decay=100, steps=10_000)
    np.testing.assert_allclose([power(10), power(400)], 0.02)
    np.testing.assert_allclose(power(1999), 512 * 2e9**-0.51, rtol=1e-6)
    np.testing.assert_allclose([power(9950), power(10_000)], [512 * 9.901e9**-0.51 / 2, 0], rtol=1e-6)
    windows = schedules.windows(4, 100)(np.arange(4.0))
    np.testing.assert_array_equal(jax.vmap(windows)(jnp.array([0, 24, 25, 99, 300])), [0, 0, 1, 3, 3])


def test_a_schedule_is_saved_stretched_and_drawn(tmp_path):
    schedule = schedules.sampled(schedules.cosine(0.4, 100), 100)
    assert schedule.values.shape == (100,)
    schedule.save(tmp_path / "lr.npz")
    again = bilevel.Schedule.load(tmp_path / "lr.npz")
    np.testing.assert_array_equal(again.values, schedule.values)
    np.testing.assert_allclose(again.stretched(4)(200), schedule(50))
    windows = schedules.windows(4, 100)(np.array([1.0, 0.1, 0.01, 0.001]))
    windows.save(tmp_path / "windows.npz")
    again = bilevel.Schedule.load(tmp_path / "windows.npz")
    assert again.interpolation == "constant"
    pytest.importorskip("matplotlib")
    (line,) = again.plot().axes[0].lines
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_xdata()) == [0, 25, 50, 75, 100]
    with pytest.raises(ValueError, match="holds a schedule, not a result"):
        bilevel.load(tmp_path / "windows.npz")


def test_optimize_learns_a_schedule_that_training_can_follow():
    windows = schedules.windows(4, T)
    method = bilevel.alternating(
        bilevel.unrolled(per_step={"lr": windows}), MOMENTUM, optax.adam(0.1), inner_steps=T, restart=True
    )
    start = hparams_of(jnp.full(4, 0.05)) | {"l2": jnp.asarray(0.0)}
    problem = bilevel.Problem(
        PROBLEM.inner,
        PROBLEM.outer,
        constraints={"lr": bilevel.positive(), "momentum": bilevel.fixed(), "l2": bilevel.fixed()},
    )
    result = bilevel.optimize(problem, W, start, DATA, DATA, method, 30, progress=False)
    assert result.best.value < result.history["value"][0] - 1e-3
    assert (result.history["growth"] < np.log(300)).all()
    estimate = at(bilevel.unrolled(MOMENTUM, T, per_step={"lr": windows}), result.best.hparams)
    np.testing.assert_allclose(estimate.value, result.best.value, rtol=1e-10)


def test_parts_of_a_schedule_have_constraints_of_their_own():
    """The losses see one number of the three."""
    law = {"lr": lambda h: schedules.power_law(h["peak"], h["scale"], h["exponent"], batch=32)}
    limits = {"lr": {"peak": bilevel.interval(0, 1), "scale": bilevel.positive(), "exponent": bilevel.real()}}
    problem = bilevel.Problem(PROBLEM.inner, PROBLEM.outer, constraints=limits)
    start = {"lr": {"peak": 0.1, "scale": 1.0, "exponent": -0.5}, "momentum": 0.8, "l2": 0.1}
    method = bilevel.alternating(bilevel.unrolled(per_step=law), MOMENTUM, optax.sgd(0.1), inner_steps=T)
    state = method.init(problem, W, start, DATA, DATA, key=jax.random.key(0))
    np.testing.assert_allclose(state.hparams["lr"]["peak"], 0.1)
    estimate = at(bilevel.unrolled(MOMENTUM, T, per_step=law), start, problem)
    assert np.isfinite(estimate.grad["lr"]["peak"])


def test_memory_is_predicted_from_shapes_alone():
    """Where the start makes the params and a schedule sees the hyperparameters, too."""
    problem = bilevel.Problem(PROBLEM.inner, PROBLEM.outer, start=lambda h, batch, key: jnp.zeros_like(W))
    method = bilevel.alternating(
        bilevel.unrolled(per_step={"lr": schedules.windows(4, T)}), MOMENTUM, optax.sgd(0.1), inner_steps=T
    )
    given = hparams_of(jnp.full(4, 0.05)), DATA, DATA
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), given)
    sampled = [
        bilevel.memory(problem, method, None, h, bilevel.minibatches(x, 4), y) for h, x, y in (given, shapes)
    ]
    assert sampled[0] == sampled[1]
    assert sampled[0].total > 0


# --- Truncation ------------------------------------------------------------------------------------


# Gradient steps on a quadratic with curvatures from mu to 1; d step / d lam = step cos(lam), in all three.
QUADRATIC = bilevel.Problem(
    lambda w, h, curvature: 0.5 * jnp.sum(curvature * w**2) - jnp.sin(h["lam"]) * jnp.sum(w),
    lambda w, h, _: 0.5 * jnp.sum((w - 1) ** 2),
)
DESCENT = bilevel.tuned(lambda h: optax.sgd(h["step"]))


@functools.cache
def _by_lam(kept):
    fn = bilevel.hypergradient(QUADRATIC, bilevel.unrolled(DESCENT, 40, truncate=kept))
    return jax.jit(lambda w, h, curvature: fn(w, h, curvature, curvature))


@given(
    seed=st.integers(0, 10**6),
    kept=st.sampled_from([1, 4, 15]),
    mu=st.floats(0.05, 1),
    step=st.floats(0.1, 1),
)
def test_the_error_of_truncation_is_within_its_bound(seed, kept, mu, step):
    """Shaban et al., 2019: (1 - gamma mu)^K / (gamma mu) |v| max |B|; gamma at most 1 / L = 1 here."""
    curvature = jnp.asarray(np.random.default_rng(seed).uniform(mu, 1, 3)).at[0].set(mu)
    hparams = {"lam": jnp.asarray(0.7), "step": jnp.asarray(step)}
    exact, cut = (_by_lam(k)(jnp.zeros(3), hparams, curvature) for k in (None, kept))
    v, largest = np.linalg.norm(exact.params - 1), step * np.cos(0.7) * np.sqrt(3)
    error = abs(float(exact.grad["lam"] - cut.grad["lam"]))
    assert error <= (1 - step * mu) ** kept / (step * mu) * v * largest + 1e-12
    # Exactly: what the steps before the last ones add.
    ages = np.arange(kept, 40)
    factors = np.asarray(1 - step * curvature)[:, None] ** ages
    older = np.sum(np.asarray(exact.params - 1)[:, None] * factors * step * np.cos(0.7))
    np.testing.assert_allclose(exact.grad["lam"] - cut.grad["lam"], older, rtol=1e-8, atol=1e-12)


# --- Trajectories that explode ---------------------------------------------------------------------

# The Lyapunov exponent of the logistic map at 4 is log 2.
LOGISTIC = bilevel.FixedPoint(lambda x, r, _: r * x * (1 - x), lambda x, r, _: x)


def test_growth_is_the_lyapunov_exponent_of_the_logistic_map():
    steps = 900
    estimate = at(bilevel.unrolled(steps=steps), jnp.asarray(4.0), LOGISTIC, jnp.asarray(0.3))
    assert abs(estimate.growth / steps - np.log(2)) < 0.02
    calm = at(bilevel.unrolled(steps=steps), jnp.asarray(2.5), LOGISTIC, jnp.asarray(0.3))
    assert calm.growth < np.log(2)


@pytest.mark.parametrize("remat", [True, False])
def test_growth_in_closed_form(remat):
    """Descent on -w^2 / 2: every step is 1.1 times as long as the last."""
    problem = bilevel.Problem(lambda w, h, _: -0.5 * w**2 * h, lambda w, h, _: w)
    estimator = bilevel.unrolled(optax.sgd(0.1), 20, remat=remat)
    estimate = at(estimator, jnp.asarray(1.0), problem, jnp.asarray(1.0))
    np.testing.assert_allclose(estimate.growth, 20 * np.log(1.1), rtol=1e-10)
    # alpha_{t} = min(1.1 alpha_{t+1}, 2), B_t = 0.1 w_t, w_t = 1.1^t.
    alphas = np.minimum(1.1 ** np.arange(19, -1, -1), 2.0)
    clipped = at(
        bilevel.unrolled(optax.sgd(0.1), 20, remat=remat, clip=2.0),
        jnp.asarray(1.0),
        problem,
        jnp.asarray(1.0),
    )
    np.testing.assert_allclose(clipped.grad, np.sum(alphas * 0.1 * 1.1 ** np.arange(20)), rtol=1e-10)


def test_tangents_are_clipped_in_forward_mode():
    """Z' = min(1.1 Z + 0.1 w, 1)."""
    problem = bilevel.Problem(lambda w, h, _: -0.5 * w**2 * h, lambda w, h, _: 3 * w)
    estimate = at(bilevel.forward(optax.sgd(0.1), 20, clip=1.0), jnp.asarray(1.0), problem, jnp.asarray(1.0))
    z = 0.0
    for t in range(20):
        z = min(1.1 * z + 0.1 * 1.1**t, 1.0)
    np.testing.assert_allclose(estimate.grad, 3 * z, rtol=1e-10)


def test_growth_of_windows_in_forward_mode():
    """The tangent of the first window of two grows by 1.1 in each of the ten steps after it."""
    problem = bilevel.Problem(lambda w, h, _: -0.5 * w**2 * h, lambda w, h, _: w)
    estimator = bilevel.forward(optax.sgd(0.1), 20, per_step=schedules.windows(2, 20))
    estimate = at(estimator, jnp.ones(2), problem, jnp.asarray(1.0))
    np.testing.assert_allclose(estimate.growth, 10 * np.log(1.1), rtol=1e-10)
    assert at(bilevel.forward(optax.sgd(0.1), 20), jnp.asarray(1.0), problem, jnp.asarray(1.0)).growth is None


def test_an_infinite_derivative_is_no_chaos():
    """The root of zero in the first step makes nan, and no growth."""
    problem = bilevel.FixedPoint(lambda w, h, _: 0.5 * w + h * jnp.sqrt(w), lambda w, h, _: w)
    method = bilevel.alternating(bilevel.unrolled(), None, optax.sgd(0.1), inner_steps=4)
    result = bilevel.optimize(problem, 0.0, 0.1, ROWS, ROWS, method, 3, progress=False)
    assert result.status == bilevel.Status.DIVERGED
    assert "sqrt or norm at zero" in result.message


def test_a_run_whose_derivative_overflows_says_what_to_do():
    method = bilevel.alternating(bilevel.unrolled(), None, optax.sgd(0.1), inner_steps=2000)
    with jax.enable_x64(False):
        result = bilevel.optimize(
            LOGISTIC, np.float32(0.3), np.float32(4.0), np.float32(ROWS), np.float32(ROWS), method, 2,
            progress=False,
        )  # fmt: skip
    assert result.status == bilevel.Status.DIVERGED
    assert "derivative of the inner loop overflows" in result.message


def test_a_run_through_chaos_says_what_to_do():
    method = bilevel.alternating(bilevel.unrolled(), None, optax.sgd(0.0), inner_steps=60)
    run = functools.partial(bilevel.optimize, LOGISTIC, progress=False)
    with pytest.warns(RuntimeWarning, match="chaotic.*bilevel.pes"):
        result = run(jnp.asarray(0.3), jnp.asarray(4.0), ROWS, ROWS, method, 3)
    assert "truncate=" in result.message
    assert (result.history["growth"] > np.log(300)).all()
    assert "chaotic" not in run(jnp.asarray(0.3), jnp.asarray(2.5), ROWS, ROWS, method, 3).message


# --- Evolution strategies --------------------------------------------------------------------------

# s' = 0.9 s + theta from 1, L = s^2 / 2 summed over 20 steps, theta = 0.3.
TOY = bilevel.FixedPoint(lambda s, theta, _: 0.9 * s + theta, lambda s, theta, _: 0.5 * s**2)
TRUE, TRUNCATED = 288.71, 118.74


# Moves nothing; its state is the last gradient.
REPORT = optax.GradientTransformation(jnp.zeros_like, lambda grad, state, params=None: (0 * grad, grad))


def _truncations(estimator, runs: int = 64):
    """Estimates of the toy's four truncations, of many runs; (runs, 4)."""
    method, data = bilevel.alternating(estimator, None, REPORT, inner_steps=5), np.zeros(1)

    def one(key):
        def step(state, _):
            state, _ = method.step(TOY, state, data, data)
            return state, state.outer

        state = method.init(TOY, jnp.asarray(1.0), jnp.asarray(0.3), data, data, key=key)
        return jax.lax.scan(step, state, None, 4)[1]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), runs)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"evaluations": 5}, TRUE / 20),
        ({"evaluations": 5, "persistent": False}, TRUNCATED / 20),
        ({"evaluations": 5, "analytic": True}, TRUE / 20),
        ({"objective": "final"}, None),
    ],
    ids=["pes", "es", "analytic", "final"],
)
def test_pes_is_unbiased_under_truncation_and_es_is_not(settings, expected):
    if expected is None:  # s_20 ds_20/dtheta
        sensitivity = 10 * (1 - 0.9**20)
        expected = (0.9**20 + 0.3 * sensitivity) * sensitivity
    means = _truncations(bilevel.pes(20, 1000, **settings)).mean(1)
    error = 4 * means.std() / np.sqrt(len(means))
    assert abs(means.mean() - expected) < error
    assert error < 0.06 * expected


def test_pes_begins_anew_where_its_horizon_does():
    """The unperturbed trajectory is that of four truncations, and then again."""
    method = bilevel.alternating(bilevel.pes(20, 4), None, optax.sgd(0.0), inner_steps=5)
    data = np.zeros(1)
    result = bilevel.optimize(TOY, jnp.asarray(1.0), jnp.asarray(0.3), data, data, method, 12, progress=False)
    s, values = 1.0, []
    for t in range(20):
        s = 0.9 * s + 0.3
        if t % 5 == 4:
            values.append(0.5 * s**2)
    np.testing.assert_allclose(result.history["value"], 3 * values, rtol=1e-10)
    with pytest.raises(ValueError, match="restart=True"):
        bilevel.alternating(bilevel.pes(20, 4), None, optax.sgd(0.1), inner_steps=5, restart=True)


def test_pes_descends_where_derivatives_explode():
    """A parabola with its minimum at 1, and ripples of a chaotic map that the hyperparameter bends."""

    def update(state, lam, _):
        x = (4 - 0.05 * jax.nn.sigmoid(lam)) * state["x"] * (1 - state["x"])
        return {"x": x, "miss": (lam + 0.2 * (x - 0.5) - 1.0) ** 2}

    problem = bilevel.FixedPoint(update, lambda state, lam, _: state["miss"])
    start = {"x": jnp.asarray(0.3), "miss": jnp.asarray(0.0)}
    unrolled = at(bilevel.unrolled(steps=200), jnp.asarray(0.0), problem, start)
    assert unrolled.growth > np.log(300)
    assert abs(unrolled.grad) > 1e20  # that of the parabola is -2
    method = bilevel.alternating(
        bilevel.pes(200, 32, sigma=0.1, evaluations=20), None, optax.adam(0.05), inner_steps=20
    )
    data = np.zeros(1)
    result = bilevel.optimize(problem, start, jnp.asarray(0.0), data, data, method, 120, progress=False)
    assert abs(float(result.hparams) - 1) < 0.1


def test_pes_tunes_through_a_start_of_its_own_and_constraints():
    problem = bilevel.Problem(
        PROBLEM.inner,
        PROBLEM.outer,
        start=lambda h, batch, key: 0.1 * jax.random.normal(key, (3,)),
        constraints={"lr": bilevel.positive(), "momentum": bilevel.fixed(), "l2": bilevel.positive()},
    )
    method = bilevel.alternating(
        bilevel.pes(T, 16, per_step={"lr": schedules.windows(4, T)}),
        MOMENTUM,
        optax.adam(0.05),
        inner_steps=8,
    )
    result = bilevel.optimize(
        problem, W, hparams_of(jnp.full(4, 0.02)), DATA, DATA, method, 150, progress=False
    )
    values = result.history["value"][2::3]  # at the ends of horizons
    assert values[-5:].mean() < values[:5].mean() - 0.01
    assert result.hparams["momentum"] == 0.8


# --- Bad input -------------------------------------------------------------------------------------

WRONG = {
    "odd particles": (lambda: bilevel.pes(20, 3), "even number, got 3"),
    "no particles": (lambda: bilevel.pes(20, 0), "particles must be at least 2, got 0"),
    "sigma": (lambda: bilevel.pes(20, 4, sigma=0.0), "sigma must be a positive number, got 0"),
    "objective": (lambda: bilevel.pes(20, 4, objective="sum"), "'mean' or 'final', got 'sum'"),
    "analytic": (lambda: bilevel.pes(20, 4, objective="final", analytic=True), 'objective="mean"'),
    "horizon": (lambda: at(bilevel.pes(21, 4, steps=5), 0.3, TOY, 1.0), "multiple of .* 5, got 21"),
    "evaluations": (
        lambda: at(bilevel.pes(20, 4, steps=5, evaluations=2), 0.3, TOY, 1.0),
        "evaluations must divide the 5 steps",
    ),
    "windows": (lambda: schedules.windows(7, 1000), "7 of them do not divide 1000 steps; take 5 or 8"),
    "knots out of order": (lambda: schedules.knots(0, 10, 5), "steps that increase, got 0, 10, 5"),
    "no knots": (lambda: schedules.knots(), "increase, got none"),
    "negative rate": (lambda: schedules.cosine(-0.1, 100), "peak must be .* got -0.1"),
    "no rate": (lambda: schedules.wsd(0.0, 100, decay=10), "peak must be positive, got 0"),
    "vector": (lambda: schedules.cosine(jnp.ones(3), 100), "peak must be a scalar"),
    "too long": (lambda: schedules.wsd(0.1, 100, decay=60, warmup=50), "longer than all 100 steps"),
    "exponential to zero": (
        lambda: schedules.wsd(0.1, 100, decay=10, shape="exponential"),
        "end must be positive",
    ),
    "growing power": (lambda: schedules.power_law(0.1, 1.0, 0.5), "exponent must not be positive"),
    "decay of what": (lambda: schedules.power_law(0.1, 1.0, -0.5, decay=5), "needs steps="),
    "interpolation": (
        lambda: schedules.knots(0, 5, interpolation="cubic"),
        "'linear' or 'log' or 'constant'",
    ),
    "wrong length": (
        lambda: at(
            bilevel.unrolled(MOMENTUM, T, per_step={"lr": schedules.windows(6, T)}), hparams_of(jnp.ones(5))
        ),
        r"hparams\['lr'\] .* 6 windows .* float64\[5\]",
    ),
    "scalar": (
        lambda: at(bilevel.unrolled(MOMENTUM, T, per_step={"lr": schedules.knots(0, 5)}), hparams_of(0.1)),
        r"hparams\['lr'\] .* 2 knots",
    ),
    "knots beyond": (
        lambda: at(
            bilevel.unrolled(MOMENTUM, T, per_step={"lr": schedules.windows(2, 100)}), hparams_of(jnp.ones(2))
        ),
        "step 50 of a run with steps from 0 to 23",
    ),
    "no schedule": (
        lambda: at(bilevel.unrolled(MOMENTUM, T, per_step={"lr": jnp.sum}), hparams_of(jnp.ones(2))),
        r"per_step\['lr'\] must make a schedule",
    ),
    "per_step": (lambda: bilevel.unrolled(MOMENTUM, T, per_step={"lr": 3}), "per_step must hold True, False"),
    "clip": (lambda: bilevel.unrolled(MOMENTUM, T, clip=-1.0), "clip must be a positive number"),
    "nan backwards": (
        lambda: bilevel.optimize(
            PROBLEM,
            W,
            {"l2": 0.1},
            DATA,
            DATA,
            bilevel.alternating(bilevel.unrolled(), optax.radam(0.1), optax.sgd(0.1), inner_steps=8),
            steps=2,
            progress=False,
        ),
        "radam.*bilevel.forward",
    ),
    "online": (
        lambda: bilevel.online(
            PROBLEM,
            {"l2": 0.1},
            inner=optax.sgd(0.1),
            outer=optax.sgd(0.1),
            estimator=bilevel.pes(20, 4, steps=5),
        ),
        "begins a training run anew",
    ),
    "line search": (
        lambda: at(bilevel.unrolled(optax.lbfgs(), 4), {"l2": jnp.asarray(0.1)}),
        "reverse mode cannot pass through the while loop",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_probes_of_an_optimiser_are_compiled_once(compiled):
    """Also where each run makes the optimiser anew, of another rate."""
    method = bilevel.alternating(bilevel.unrolled(), MOMENTUM, optax.sgd(0.1), inner_steps=3)

    def run(lr):
        bilevel.optimize(PROBLEM, W, hparams_of(lr), DATA, DATA, method, 2, progress=False)

    run(0.1)
    compiled()
    run(0.2)
    assert compiled() == 0


def test_strategies_take_optimisers_that_have_no_derivative():
    """Adam without eps_root at a zero gradient is one, of which unrolled says so."""
    problem = bilevel.Problem(
        lambda w, h, batch: h["l2"] * jnp.sum(w[:1] ** 2), lambda w, h, batch: jnp.sum(w**2)
    )
    given = W, {"l2": jnp.asarray(0.1)}, DATA, DATA

    def run(estimator):
        method = bilevel.alternating(estimator, optax.adam(0.1), optax.sgd(0.1), inner_steps=2)
        return bilevel.optimize(problem, *given, method, 1, progress=False)

    assert np.isfinite(run(bilevel.pes(2, 4)).history["value"]).all()
    with pytest.raises(ValueError, match="eps_root"):
        run(bilevel.unrolled())
