"""Bounds hold: the error of an estimate is never above what `bilevel.implicit` certifies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import RIDGE, ridge

import bilevel
from bilevel import certificates
from bilevel.constraints import bind
from bilevel.problem import CERTIFIED, ESTIMATED, RESIDUAL

R = ridge()
EIGENVALUES = np.linalg.eigvalsh(R.a.T @ R.a / R.b.size)
OUTER = np.linalg.eigvalsh(R.v.T @ R.v / R.c.size)[-1]


def largest(log_l2):
    return jnp.max(jnp.exp(log_l2))


SMOOTH = bilevel.Smoothness(
    strong_convexity=lambda log_l2: EIGENVALUES[0] + jnp.min(jnp.exp(log_l2)),
    inner=lambda log_l2: EIGENVALUES[-1] + largest(log_l2),
    outer=float(OUTER),
    cross=largest,
)


def with_constants(problem, smoothness):
    return bilevel.Problem(problem.inner, problem.outer, smoothness=smoothness)


CERTIFIED_RIDGE = with_constants(RIDGE, SMOOTH)


def exactly_away(rng, solution, distance):
    direction = rng.standard_normal(solution.shape)
    return solution + distance * direction / np.linalg.norm(direction)


def loosely_solved(terms):
    """An estimator whose linear residual is anything but small."""
    return bilevel.implicit(bilevel.cg(max_steps=terms, tol=0.0))


def assert_bounds(estimates, exact_grads, exact_values):
    """Eq. (1) and (2) of the module, to rounding; returns how loose (1) is."""
    grads = np.asarray(estimates.grad).reshape(len(exact_grads), -1)
    errors = np.linalg.norm(grads - np.reshape(exact_grads, grads.shape), axis=1)
    slack = 1e-12 * (1 + np.linalg.norm(grads, axis=1))
    bounds = np.asarray(estimates.error)
    assert np.all(errors <= bounds + slack)
    assert np.all(
        np.abs(np.asarray(estimates.value) - exact_values) <= np.asarray(estimates.value_error) + 1e-12
    )
    return bounds / np.maximum(errors, 1e-300)


@pytest.mark.parametrize("steps", [2, 5, 30])
@pytest.mark.parametrize("size", [(), (20,)], ids=["scalar", "vector"])
def test_the_bound_holds_on_ridge(steps, size):
    rng = np.random.default_rng(steps)
    log_l2 = rng.uniform(-6, 1, (500, *size))
    solutions = np.stack([R.solution(h) for h in log_l2])
    away = 10.0 ** rng.uniform(-6, -0.5, 500)
    params = np.stack([exactly_away(rng, w, d) for w, d in zip(solutions, away, strict=True)])
    fn = bilevel.hypergradient(CERTIFIED_RIDGE, loosely_solved(steps))
    found = jax.jit(jax.vmap(fn, in_axes=(0, 0, None, None)))(params, log_l2, R.train, R.valid)
    assert found.error_kind == CERTIFIED
    exact = [R.hypergradient(h) for h in log_l2]
    looseness = assert_bounds(found, exact, np.array([R.value(h) for h in log_l2]))
    assert 1 < np.median(looseness) < 1e4


def test_the_bound_shrinks_with_what_is_measured():
    w = jnp.asarray(R.solution(-2.0))
    fn = bilevel.hypergradient(CERTIFIED_RIDGE, bilevel.implicit(bilevel.cg(60, tol=1e-14)))
    errors = [float(fn(w + d, jnp.asarray(-2.0), R.train, R.valid).error) for d in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2] > 0
    rough = bilevel.hypergradient(CERTIFIED_RIDGE, loosely_solved(3))
    assert float(rough(w, jnp.asarray(-2.0), R.train, R.valid).error) > 1e-4


def test_the_direct_term_counts():
    # dF/dl = d/dl (5 l w*) with w* = l: 10 l, and at w it is 5 (w + l).
    problem = bilevel.Problem(
        lambda w, lam, x: 0.5 * (w - lam) ** 2 + 0 * x,
        lambda w, lam, x: 5.0 * lam * w + 0 * x,
        smoothness=bilevel.Smoothness(1.0, 1.0, 0.0, direct=5.0),
    )
    estimate = bilevel.hypergradient(problem)(jnp.array(2.3), jnp.array(2.0), jnp.array(0.0), jnp.array(0.0))
    assert float(estimate.grad) == pytest.approx(5 * 4.3)
    assert float(estimate.error) == pytest.approx(5 * 0.3)


def logistic(params, hparams, batch):
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ params)))


def penalised(params, hparams, batch):
    return logistic(params, hparams, batch) + 0.5 * jnp.exp(hparams) * jnp.sum(params**2)


@functools.cache
def logistic_case():
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((60, 5)), rng.standard_normal((40, 5))
    truth = rng.standard_normal(5)
    train, valid = ((d, np.sign(d @ truth + 0.5 * rng.standard_normal(len(d)))) for d in (x, v))
    gram = np.linalg.eigvalsh(x.T @ x / 60)[-1]
    # The Hessian's third derivative: |s''| <= 1 / (6 sqrt 3), times |x|^3 on the mean.
    third = np.mean(np.linalg.norm(x, axis=1) ** 3) / (6 * np.sqrt(3))
    smooth = bilevel.Smoothness(
        strong_convexity=jnp.exp,
        inner=lambda h: 0.25 * gram + jnp.exp(h),
        outer=float(0.25 * np.linalg.eigvalsh(v.T @ v / 40)[-1]),
        cross=jnp.exp,
        inverse_hessian=lambda h: third / jnp.exp(h) ** 2,
    )
    problem = bilevel.Problem(penalised, logistic, smoothness=smooth)
    return problem, train, valid


def test_the_bound_holds_where_the_hessian_changes():
    problem, train, valid = logistic_case()
    rng = np.random.default_rng(1)
    solve = jax.jit(bilevel.argmin(problem, bilevel.newton(50, atol=1e-14), bilevel.dense()))
    exact = jax.jit(jax.value_and_grad(lambda h: logistic(solve(h, train, init=jnp.zeros(5)), h, valid)))
    hparams = rng.uniform(-4, 0, 200)
    values, grads = map(np.stack, zip(*(exact(h) for h in hparams), strict=True))
    solutions = np.stack([solve(h, train, init=jnp.zeros(5)) for h in hparams])
    away = 10.0 ** rng.uniform(-5, -0.5, 200)
    params = np.stack([exactly_away(rng, w, d) for w, d in zip(solutions, away, strict=True)])
    fn = bilevel.hypergradient(problem, loosely_solved(3))
    found = jax.jit(jax.vmap(fn, in_axes=(0, 0, None, None)))(params, hparams, train, valid)
    assert_bounds(found, grads, values)


def test_many_hyperparameters_are_estimated():
    rng = np.random.default_rng(0)
    n = certificates.EXACT_HPARAMS + 8
    target = rng.standard_normal(n)
    smooth = bilevel.Smoothness(
        strong_convexity=lambda h: 1 + jnp.min(jnp.exp(h)),
        inner=lambda h: 1 + largest(h),
        outer=1.0,
        cross=largest,
    )
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * jnp.sum((w - b) ** 2) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
        lambda w, h, b: 0.5 * jnp.sum((w - 0.5 * b) ** 2),
        smoothness=smooth,
    )
    h = rng.uniform(-2, 1, (50, n))
    solutions = target / (1 + np.exp(h))
    params = solutions + 1e-3 * rng.standard_normal((50, n))
    fn = bilevel.hypergradient(problem, bilevel.implicit(bilevel.cg(3, tol=0.0)))
    found = jax.jit(jax.vmap(fn, in_axes=(0, 0, None, None)))(params, h, target, target)
    assert found.error_kind == ESTIMATED
    slope = -target * np.exp(h) / (1 + np.exp(h)) ** 2
    outer = solutions - 0.5 * target
    assert_bounds(found, slope * outer, 0.5 * np.sum(outer**2, axis=1))


def test_the_norm_of_the_cross_derivative():
    rng = np.random.default_rng(0)
    for size in (3, 200):
        matrix = jnp.asarray(rng.standard_normal((50, size)))
        got, products = certificates._operator_norm(lambda h, m=matrix: m @ h, jnp.zeros(size))
        exact = np.linalg.norm(matrix, 2)
        low, high = (1 - 1e-12, 1 + 1e-12) if size == 3 else (1.0, 1.1 + 1e-12)
        assert low * exact <= float(got) <= high * exact
        assert products == (6 if size == 3 else 60)


def test_an_invalid_constant_certifies_nothing():
    bad = bilevel.Smoothness(strong_convexity=lambda h: -h, inner=1.0, outer=1.0)
    problem = with_constants(RIDGE, bad)
    fn = jax.jit(bilevel.hypergradient(problem))
    assert float(fn(jnp.zeros(20), jnp.asarray(0.5), R.train, R.valid).error) == np.inf
    with pytest.raises(
        ValueError, match=r"smoothness: strong_convexity must be a finite number, positive.*-0.5"
    ):
        bilevel.hypergradient(problem)(jnp.zeros(20), jnp.asarray(0.5), R.train, R.valid)


def test_sampled_data_and_gauss_newton_certify_nothing():
    source = bilevel.minibatches(R.train, 10)
    estimate = bilevel.hypergradient(CERTIFIED_RIDGE)(jnp.zeros(20), jnp.asarray(0.5), source, R.valid)
    assert (estimate.error_kind, float(estimate.value_error)) == (RESIDUAL, np.inf)


def test_a_missing_direct_constant_is_named():
    problem = bilevel.Problem(
        lambda w, lam, x: 0.5 * (w - lam) ** 2,
        lambda w, lam, x: lam * w,
        smoothness=bilevel.Smoothness(1.0, 1.0, 0.0),
    )
    with pytest.raises(ValueError, match=r"outer depends on hparams itself.*needs direct="):
        bilevel.hypergradient(problem)(jnp.array(2.3), jnp.array(2.0), jnp.array(0.0), jnp.array(0.0))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strong_convexity": 0.0}, ValueError, "strong_convexity must be positive, got 0"),
        ({"outer": -1.0}, ValueError, "outer must be finite and not negative, got -1"),
        ({"inner": float("nan")}, ValueError, "inner must be finite"),
        ({"cross": "1"}, TypeError, "cross must be a number or a function"),
        ({"direct": True}, TypeError, "direct must be a number or a function"),
    ],
)
def test_constants_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        bilevel.Smoothness(**{"strong_convexity": 1.0, "inner": 1.0, "outer": 1.0, **settings})


def test_smoothness_is_of_inner_losses():
    with pytest.raises(TypeError, match=r"smoothness must be bilevel\.Smoothness"):
        bilevel.Problem(penalised, logistic, smoothness=1.0)
    with pytest.raises(TypeError, match="a FixedPoint has none"):
        bilevel.FixedPoint(lambda p, h, b: p, logistic, smoothness=bilevel.Smoothness(1.0, 1.0, 1.0))


CONSTRAINTS = {
    "positive": (bilevel.positive(), np.array([0.3, 2.0])),
    "interval": (bilevel.interval(-1.0, 5.0), np.array([0.3, 4.9])),
    "simplex": (bilevel.simplex(), np.array([0.5, 0.5])),
    "real": (bilevel.real(), np.array([0.3, -2.0])),
}


@pytest.mark.parametrize(("constraint", "value"), CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_a_bound_in_free_units_is_stretched_as_gradients_are(constraint, value):
    bound = bind(constraint, value)
    free = bound.to_free(jnp.asarray(value))
    exact = np.linalg.norm(jax.jacobian(bound.to_natural)(free), 2)
    assert float(bound.stretch(free)) == pytest.approx(exact, rel=1e-9)


def test_a_run_converges_by_its_certificate():
    # In log-L2 with a natural l2: grad_norm and error are both in free units.
    def natural(fn):
        return lambda l2: fn(jnp.log(l2))

    problem = bilevel.Problem(
        lambda w, l2, b: RIDGE.inner(w, jnp.log(l2), b),
        lambda w, l2, b: RIDGE.outer(w, jnp.log(l2), b),
        constraints=bilevel.positive(),
        smoothness=bilevel.Smoothness(
            natural(SMOOTH.strong_convexity), natural(SMOOTH.inner), SMOOTH.outer, cross=1.0
        ),
    )
    exact = bilevel.implicit(bilevel.cg(40, tol=1e-10))
    method = bilevel.alternating(exact, bilevel.newton(20, atol=1e-4), optax.adam(0.1))
    start = np.zeros(20), np.array(0.5), R.train, R.valid, method
    result = bilevel.optimize(problem, *start, steps=300, tol=1e-3, progress=False)
    assert result.status == bilevel.Status.CONVERGED
    last = {name: column[-1] for name, column in result.history.items()}
    assert last["grad_norm"] + last["error"] <= 1e-3
    assert last["error"] > 1e-6
    slope = R.hypergradient(float(np.log(result.trajectory.hparams[-2])))
    assert abs(abs(slope) - last["grad_norm"]) <= last["error"]
