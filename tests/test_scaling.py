"""Fits of power laws recover what made the points; published starting points have the published values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import scaling, schedules

X = np.geomspace(1, 300, 12)
TRUTH = {"floor": 1.9, "amplitude": 1.3, "exponent": 0.35}
CURVE = 1.9 + 1.3 / X**0.35


# --- Fits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["log", "huber", "squared"])
@pytest.mark.parametrize("unit", [1.0, 1e9])
@pytest.mark.parametrize("exponent", [0.08, 0.35, 1.02, 3.0])
def test_exact_points_give_the_exact_curve(loss, unit, exponent):
    y = 3.43 + 0.05 / X**exponent
    fit = scaling.fit(X * unit, y, loss=loss, bootstrap=2)
    np.testing.assert_allclose(fit.exponent, exponent, rtol=1e-5)
    np.testing.assert_allclose(fit.floor, 3.43, rtol=1e-6)
    np.testing.assert_allclose(fit.amplitude, 0.05 * unit**exponent, rtol=2e-4)
    np.testing.assert_allclose(fit.predict(X * unit), y, rtol=1e-8)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """At 90 %, of 100 data sets: within three binomial standard deviations."""
    rng, beyond = np.random.default_rng(1), 1.9 + 1.3 / 3000**0.35
    inside = dict.fromkeys([*TRUTH, "beyond"], 0)
    for seed in range(100):
        noisy = CURVE + 0.008 * rng.normal(size=12)
        fit = scaling.fit(X, noisy, loss="squared", bootstrap=100, seed=seed)
        for name, (low, high) in fit.intervals(0.9).items():
            inside[name] += low <= TRUTH[name] <= high
        low, high = fit.interval(3000.0)
        inside["beyond"] += low <= beyond <= high
    assert all(81 <= hits <= 99 for hits in inside.values()), inside


def test_a_bootstrap_knows_how_little_is_known_of_the_noise():
    """Of linear least squares its variance is that of Student's t: (n - 3) / (n - 5) of the normal one."""
    y = CURVE + 1e-4 * np.random.default_rng(3).normal(size=12)
    fit = scaling.fit(X, y, loss="squared", lowest=-np.inf, bootstrap=4000)
    power = X**-fit.exponent
    jacobian = np.stack([np.ones(12), power, -fit.amplitude * np.log(X) * power], 1)
    normal = fit.residual**2 * np.diag(np.linalg.inv(jacobian.T @ jacobian))
    # The excess kurtosis of t with 9 degrees of freedom is 1.2: five standard errors of a variance.
    error = 5 * np.sqrt(3.2 / 4000)
    np.testing.assert_allclose(fit.draws.var(0) / normal, 9 / 7, rtol=error)


def test_an_exponent_at_the_end_of_the_range_is_told():
    with pytest.warns(RuntimeWarning, match=r"end of the range searched, 0\.01 to 10"):
        fit = scaling.fit(X[:5], 5 - np.log(X[:5]), loss="squared", lowest=-np.inf, bootstrap=1)
    np.testing.assert_allclose(fit.exponent, 0.01, rtol=1e-4)


def test_intervals_in_logarithms_hold_the_truth_too():
    y = CURVE * np.exp(0.004 * np.random.default_rng(0).normal(size=12))
    for loss in ("log", "huber"):
        fit = scaling.fit(X, y, loss=loss, bootstrap=100)
        for name, (low, high) in fit.intervals(0.95).items():
            assert low < getattr(fit, name) < high
            assert low < TRUTH[name] < high
        assert 0.001 < fit.residual < 0.008
        assert fit.intervals(0.5)["exponent"][1] < fit.intervals(0.95)["exponent"][1]


def test_huber_does_not_mind_a_point_that_is_far_off():
    y = CURVE * np.exp(0.001 * np.random.default_rng(0).normal(size=12))
    y[4] *= 1.2
    errors = {
        loss: abs(scaling.fit(X, y, loss=loss, bootstrap=1).exponent - 0.35) for loss in ("log", "huber")
    }
    assert errors["huber"] < 0.03 < errors["log"]


def test_the_floor_has_a_lower_end_and_squares_allow_any():
    y = CURVE - 2.2  # a floor of -0.3
    free = scaling.fit(X, y, loss="squared", lowest=-np.inf, bootstrap=1)
    np.testing.assert_allclose([free.floor, free.exponent], [-0.3, 0.35], rtol=1e-5)
    assert scaling.fit(X, y, loss="squared", bootstrap=1).floor == 0.0
    assert scaling.fit(X, CURVE, lowest=1.95, bootstrap=1).floor == 1.95


def test_the_bounded_least_squares_satisfies_its_optimality_conditions():
    """Of the convex problem for one exponent: the gradient vanishes, or points into an active bound."""
    from bilevel.scaling.power_fit import _linear

    rng = np.random.default_rng(2)
    basis, target = rng.uniform(0.1, 1, (200, 6)), rng.normal(size=(200, 6))
    weight = rng.uniform(0.5, 2, (200, 6))
    floor, amplitude = _linear(basis, target, weight, 0.0)
    residual = weight * (floor[:, None] + amplitude[:, None] * basis - target)
    for value, slope in ((floor, residual.sum(1)), (amplitude, (residual * basis).sum(1))):
        assert (np.where(value > 0, abs(slope), -slope) < 1e-9).all()
    assert (floor == 0).any()
    assert (amplitude == 0).any()


def test_where_it_flattens_is_the_inverse_of_the_reducible_part():
    fit = scaling.fit(X, CURVE, bootstrap=20)
    x, low, high = fit.flattens(amount=0.01)
    np.testing.assert_allclose(x, (1.3 / 0.01) ** (1 / 0.35), rtol=1e-5)
    np.testing.assert_allclose([low, high], x, rtol=1e-4)  # nothing is uncertain
    x, _, _ = fit.flattens(fraction=0.1)
    np.testing.assert_allclose(1.3 / x**0.35, 0.1 * fit.predict(x), rtol=1e-5)
    noisy = scaling.fit(X, CURVE * np.exp(0.004 * np.random.default_rng(0).normal(size=12)), bootstrap=100)
    x, low, high = noisy.flattens(fraction=0.05)
    assert low < x < high
    assert scaling.fit(X, CURVE - 1.95, loss="squared", bootstrap=1).flattens(fraction=0.1)[0] == np.inf


def test_three_points_are_fitted_and_say_nothing_of_the_noise():
    fit = scaling.fit(X[:3], CURVE[:3])
    np.testing.assert_allclose(fit.exponent, 0.35, rtol=1e-4)
    assert np.isnan([*fit.intervals()["exponent"], *fit.flattens(amount=0.1)[1:], *fit.interval(2.0)]).all()
    assert fit.interval(X)[0].shape == (12,)


@pytest.mark.parametrize(
    ("x", "y", "settings", "part"),
    [
        ([1.0, 2.0], [3.0, 2.0], {}, "at least 3 different scales"),
        ([1.0, 2.0, 2.0, 1.0], [3.0, 2.0, 2.0, 3.0], {}, "got 2"),
        ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0], {}, "x must be positive"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, -1.0], {}, 'loss="squared" takes any'),
        ([1.0, 2.0, 3.0], [3.0, np.nan, 1.0], {}, "y must be finite"),
        ([1.0, 2.0, 3.0], [3.0, 2.0], {}, "vectors of one length"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], {}, "does not fall"),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], {}, "does not fall"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], {"loss": "l1"}, "loss must be"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], {"lowest": -1.0}, "lowest"),
        (
            [1.0, 2.0, 3.0],
            [3.0, 2.0, 1.0],
            {"lowest": np.nan, "loss": "squared"},
            "lowest must be a finite number, got nan",
        ),
    ],
)
def test_bad_points(x, y, settings, part):
    with pytest.raises(ValueError, match=part):
        scaling.fit(x, y, **settings)


def test_bad_questions():
    fit = scaling.fit(X, CURVE, bootstrap=1)
    for wrong in ({}, {"fraction": 0.1, "amount": 0.1}, {"fraction": 1.0}, {"amount": 0.0}):
        with pytest.raises(ValueError, match="fraction|amount"):
            fit.flattens(**wrong)
    with pytest.raises(ValueError, match="level"):
        fit.intervals(1.0)


# --- Starting points -------------------------------------------------------------------------------------


def test_the_step_law_has_its_published_values():
    prior = scaling.step_law(params=4.8e8, tokens=2e10)
    np.testing.assert_allclose(prior.median["lr"], 1.79 * 4.8e8**-0.713 * 2e10**0.307, rtol=1e-12)
    np.testing.assert_allclose(prior.median["batch_tokens"], 0.58 * 2e10**0.571, rtol=1e-12)
    # In the middle of what was fitted only the given width is left; a decade away errors of exponents count.
    np.testing.assert_allclose(prior.sd["batch_tokens"], np.log(2) / 2, rtol=1e-6)
    away = scaling.step_law(params=4.8e8, tokens=2e11)
    np.testing.assert_allclose(
        away.sd["batch_tokens"], np.hypot(np.log(2) / 2, 0.019 * np.log(10)), rtol=1e-6
    )
    assert away.sd["lr"] < scaling.step_law(params=4.8e9, tokens=2e11).sd["lr"]


def test_the_power_schedule_has_its_published_values():
    start, tokens = scaling.power_law_start(sequences=128), 128 * 4096
    schedule = schedules.power_law(**start, batch=tokens)
    np.testing.assert_allclose(schedule(1e11 / tokens), 1.4e-3, rtol=0.05)
    np.testing.assert_allclose(schedule(5.5e8 / tokens), 0.02, rtol=1e-6)  # the cap binds until about 6e8
    assert schedule(6.5e8 / tokens) < 0.02
    with pytest.raises(ValueError, match="sequences"):
        scaling.power_law_start(0)


def test_a_prior_samples_and_penalises_as_the_normal_of_the_logarithm():
    prior = scaling.log_normal({"lr": 1e-3, "l2": {"w": jnp.array([1.0, 10.0])}}, {"lr": 0.5, "l2": 0.2})
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(prior.sample)(keys)
    logs = jnp.log(drawn["l2"]["w"])
    np.testing.assert_allclose(logs.mean(0), np.log([1, 10]), atol=5 * 0.2 / np.sqrt(4000))
    np.testing.assert_allclose(logs.std(0), 0.2, rtol=5 / np.sqrt(8000))
    np.testing.assert_allclose(jnp.log(drawn["lr"]).std(), 0.5, rtol=5 / np.sqrt(8000))
    assert abs(np.corrcoef(logs.T)[0, 1]) < 5 / np.sqrt(4000)

    one_up = {"lr": 1e-3 * np.exp(0.5), "l2": {"w": jnp.array([1.0, 10.0]) * np.exp(-0.4)}}
    np.testing.assert_allclose(prior.penalty(one_up), 0.5 * (1 + 4 + 4), rtol=1e-12)
    slope = jax.grad(prior.penalty)(one_up)
    np.testing.assert_allclose(slope["lr"] * one_up["lr"], 1 / 0.5, rtol=1e-12)  # by the logarithm


@pytest.mark.parametrize("kind", [np.float32, np.array, jnp.array])
def test_a_width_is_any_kind_of_number(kind):
    prior = scaling.log_normal({"lr": 1e-3, "l2": 1.0}, kind(0.25))
    assert [float(sd) for sd in prior.sd.values()] == [0.25, 0.25]
    by_name = scaling.log_normal({"lr": 1e-3, "l2": 1.0}, {"l2": kind(0.25)})
    assert float(by_name.sd["l2"]) == 0.25
    assert len({prior, by_name}) == 2  # no comparison by value of what holds arrays


def test_a_prior_starts_and_bounds_a_population():
    """A flat validation loss: with the penalty the hyperparameter goes to the median of its prior."""
    prior = scaling.log_normal({"lr": np.float32(0.01)}, sd=1.0)
    assert prior.median["lr"].dtype == prior.sample(jax.random.key(0))["lr"].dtype == jnp.float32
    problem = bilevel.Problem(
        inner=lambda w, h, x: 0.5 * (w - x) ** 2 + 0 * h["lr"],
        outer=lambda w, h, x: 0.5 * (w - x) ** 2 + prior.penalty(h),
        constraints=prior.constraints(sds=3),
    )
    members = bilevel.population(3, lambda key: (jnp.zeros((), jnp.float32), prior.sample(key)))
    data = jnp.ones((), jnp.float32)
    result = bilevel.optimize(problem, None, None, data, data, steps=100, population=members, progress=False)
    assert np.ptp(result.trajectory.hparams["lr"][0]) > 1e-3
    np.testing.assert_allclose(result.hparams["lr"], 0.01, rtol=0.05)


@pytest.mark.parametrize(
    ("median", "sd", "error", "part"),
    [
        ({"lr": -1.0}, 1.0, ValueError, "median must be positive"),
        ({"lr": 1}, 1.0, TypeError, "floating"),
        ({"lr": 1.0}, 0.0, ValueError, "sd must be"),
        ({"lr": 1.0}, np.ones(1), TypeError, "sd must be a number"),
        ({"lr": 1.0}, {"rate": 1.0}, ValueError, "names \\['rate'\\]"),
        ({"lr": np.inf}, 1.0, ValueError, "finite"),
    ],
)
def test_bad_priors(median, sd, error, part):
    with pytest.raises(error, match=part):
        scaling.log_normal(median, sd)


def test_constraints_are_those_of_scalars():
    with pytest.raises(ValueError, match="scalars"):
        scaling.log_normal(np.ones(2), 1.0).constraints()
    with pytest.raises(ValueError, match="params"):
        scaling.step_law(-1.0, 1e9)
