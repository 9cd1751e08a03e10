"""What each estimator computes: exact identities first, then differences of the real outer loss."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LOGISTIC,
    NETWORK,
    QUADRATIC,
    RIDGE,
    RIDGE_LOG_L2,
    RIDGE_VALUE,
    Quadratic,
    central_difference,
    logistic_data,
    logistic_solution,
    logistic_value,
    network_data,
    ridge,
)

import bilevel

DATA = Quadratic.random(size=6, hsize=3, seed=4)
H = np.array([0.3, -0.2, 0.5])
W0 = np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
ETA = 0.4


def estimate(problem, estimator, params, hparams, train, valid, key=None):
    return jax.jit(bilevel.hypergradient(problem, estimator))(params, hparams, train, valid, key)


def unrolled_params(w, h, steps):
    """Gradient steps on the quadratic by numpy; ``w_0, ..., w_steps``."""
    path = [w]
    for _ in range(steps):
        grad = DATA.train["hessian"] @ w + DATA.train["cross"] @ h + DATA.train["shift"]
        w = w - ETA * grad
        path.append(w)
    return path


def test_reference_instance_is_the_published_one():
    # The published minimiser is that of a minimisation, good to the square root of rounding.
    problem = ridge()
    assert abs(problem.value(RIDGE_LOG_L2) - RIDGE_VALUE) <= 1e-12
    assert abs(problem.hypergradient(RIDGE_LOG_L2)) <= 1e-8
    difference = central_difference(problem.value, -2.0, 1.0, 1e-3)
    assert abs(difference - problem.hypergradient(-2.0)) <= 1e-10


# --- Identities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 5, 30])
def test_unrolled_gradient_steps_are_a_neumann_series(terms):
    """From a start without hparams: B_t is constant, so that T steps give the T-term series at w_T."""
    sgd = optax.sgd(ETA)
    unrolled = estimate(QUADRATIC, bilevel.unrolled(sgd, terms), W0, H, DATA.train, DATA.valid)
    end = unrolled_params(W0, H, terms)[-1]
    np.testing.assert_allclose(unrolled.params, end, rtol=1e-12, atol=1e-14)
    by_series = estimate(
        QUADRATIC, bilevel.implicit(bilevel.neumann(terms, ETA)), unrolled.params, H, DATA.train, DATA.valid
    )
    np.testing.assert_allclose(unrolled.grad, by_series.grad, rtol=1e-9)
    np.testing.assert_allclose(unrolled.grad, DATA.neumann(end, H, terms, ETA), rtol=1e-9)


@pytest.mark.parametrize(
    "log_l2", [RIDGE_LOG_L2, np.linspace(-3.0, 0.0, 20)], ids=["one penalty", "one a feature"]
)
def test_unrolled_from_the_solution_of_ridge_is_a_neumann_series(log_l2):
    # B_t = -eta e^log_l2 w_t is constant only where params stay: at the inner solution.
    problem, terms = ridge(), 17
    arguments = problem.solution(log_l2), np.asarray(log_l2), problem.train, problem.valid
    unrolled = estimate(RIDGE, bilevel.unrolled(optax.sgd(ETA), terms), *arguments)
    by_series = estimate(RIDGE, bilevel.implicit(bilevel.neumann(terms, ETA)), *arguments)
    expected = problem.neumann(log_l2, terms, ETA)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(unrolled.grad, expected, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(by_series.grad, expected, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("log_l2", [0.5, RIDGE_LOG_L2, np.linspace(-3.0, 0.0, 20)], ids=repr)
def test_implicit_is_exact_away_from_the_inner_solution_in_its_own_formula(log_l2):
    problem = ridge()
    w = problem.solution(log_l2) + np.linspace(-0.1, 0.1, 20)
    got = estimate(
        RIDGE, bilevel.implicit(bilevel.dense()), w, np.asarray(log_l2), problem.train, problem.valid
    )
    np.testing.assert_allclose(got.grad, problem.hypergradient(log_l2, w), rtol=1e-10, atol=1e-12)


ADAM = optax.adam(0.05, eps_root=1e-6)


@pytest.mark.parametrize(
    ("inner", "truncate"),
    [(optax.sgd(0.1, momentum=0.9), None), (optax.sgd(0.1, momentum=0.9), 1), (ADAM, None), (ADAM, 4)],
    ids=["momentum", "momentum, 1 step", "adam", "adam, 4 steps"],
)
def test_forward_equals_reverse(inner, truncate):
    params, hparams, train, valid = network_data()
    reverse = estimate(NETWORK, bilevel.unrolled(inner, 9, truncate), params, hparams, train, valid)
    forward = estimate(NETWORK, bilevel.forward(inner, 9, truncate), params, hparams, train, valid)
    chex.assert_trees_all_close(forward.grad, reverse.grad, rtol=1e-12, atol=1e-15)
    chex.assert_trees_all_close(forward.point, reverse.point, rtol=1e-13)
    assert float(forward.value) == pytest.approx(float(reverse.value), rel=1e-14)
    assert int(forward.counts.hvp) == 2 * int(reverse.counts.hvp)  # a sweep for each hyperparameter


@pytest.mark.parametrize(
    ("steps", "kept"),
    [(1, None), (2, None), (7, None), (20, None), (23, None), (400, None), (23, 14), (400, 1)],
)
def test_remat_changes_memory_only(steps, kept):
    inner = optax.sgd(0.02, momentum=0.5)
    params, hparams, train, valid = network_data()
    stored = estimate(
        NETWORK, bilevel.unrolled(inner, steps, kept, remat=False), params, hparams, train, valid
    )
    for remat in (True, "steps"):
        again = estimate(
            NETWORK, bilevel.unrolled(inner, steps, kept, remat=remat), params, hparams, train, valid
        )
        chex.assert_trees_all_close(again.grad, stored.grad, rtol=1e-12, atol=1e-16)
        chex.assert_trees_all_close(again.point, stored.point, rtol=1e-13)
        np.testing.assert_array_equal(again.counts, stored.counts)


def test_remat_saves_memory():
    params, hparams, train, valid = network_data()

    def temporary_bytes(remat):
        fn = bilevel.hypergradient(NETWORK, bilevel.unrolled(optax.sgd(0.02), 400, remat=remat))
        return jax.jit(fn).lower(params, hparams, train, valid).compile().memory_analysis().temp_size_in_bytes

    # 40 copies and the steps of one segment of 20 against 400 of everything.
    everything = temporary_bytes(False)
    assert temporary_bytes(True) < 0.3 * everything
    # 400 copies: what a step computes on its way is larger.
    assert temporary_bytes("steps") < 0.7 * everything


def test_one_step_is_its_formula():
    """-eta d_hparams (d_params inner . d_params outer), both where they belong, plus the direct term."""
    got = estimate(QUADRATIC, bilevel.one_step(optax.sgd(ETA)), W0, H, DATA.train, DATA.valid)
    end = unrolled_params(W0, H, 1)[-1]
    expected = H - ETA * DATA.train["cross"].T @ (end - DATA.valid["target"])
    np.testing.assert_allclose(got.grad, expected, rtol=1e-12)
    np.testing.assert_allclose(got.params, end, rtol=1e-13)
    # On ridge the cross derivative depends on params: those before the step count.
    problem, w = ridge(), np.linspace(0.1, 1.0, 20)
    got = estimate(RIDGE, bilevel.one_step(optax.sgd(ETA)), w, np.float64(-1.0), problem.train, problem.valid)
    end = w - ETA * (problem.hessian(-1.0) @ w - problem.a.T @ problem.b / 40)
    expected = -ETA * problem.cross(w, -1.0, problem.outer_grad(end))
    np.testing.assert_allclose(got.grad, expected, rtol=1e-12)


def test_one_step_inside_a_method_differentiates_the_last_step_only():
    data = DATA.train, DATA.valid
    method = bilevel.alternating(bilevel.one_step(), optax.sgd(ETA), optax.sgd(1.0), inner_steps=5)
    state = method.init(QUADRATIC, W0, H, *data, key=jax.random.key(0))
    state, info = jax.jit(functools.partial(method.step, QUADRATIC))(state, *data)
    end = unrolled_params(W0, H, 5)[-1]
    grad = H - ETA * DATA.train["cross"].T @ (end - DATA.valid["target"])
    np.testing.assert_allclose(state.hparams, H - grad, rtol=1e-12)
    np.testing.assert_allclose(info.grad_norm, np.linalg.norm(grad), rtol=1e-12)


@pytest.mark.parametrize("kept", [1, 3, 10, 20, 39])
def test_truncation_bias_is_below_the_stated_bound(kept):
    problem, log_l2, steps = ridge(), -1.0, 40
    start = 2 * np.random.default_rng(0).standard_normal(20)
    fn = {
        k: estimate(
            RIDGE, bilevel.forward(optax.sgd(ETA), steps, k), start, log_l2, problem.train, problem.valid
        )
        for k in (kept, None)
    }
    bias = abs(float(fn[kept].grad - fn[None].grad))
    hessian, w, largest = problem.hessian(log_l2), start, 0.0
    for _ in range(steps):
        largest = max(largest, ETA * np.exp(log_l2) * np.linalg.norm(w))
        w = w - ETA * (hessian @ w - problem.a.T @ problem.b / 40)
    mu = np.linalg.eigvalsh(hessian)[0]
    bound = (1 - ETA * mu) ** kept / (ETA * mu) * np.linalg.norm(problem.outer_grad(w)) * largest
    assert 0 < bias <= bound


# --- Finite differences of the real outer loss ---------------------------------------------------------

# The five-point formula is off by step^4 and by rounding / step: 1e-12 and 1e-13 relative at this step.
STEP = 1e-3


def test_implicit_matches_differences_of_a_newton_solve():
    train, valid = logistic_data()
    log_l2 = np.array([-3.0, -2.0, -4.0, -1.0, -2.5])
    w = logistic_solution(log_l2, train)
    got = estimate(LOGISTIC, bilevel.implicit(), w, log_l2, train, valid)
    exact = estimate(LOGISTIC, bilevel.implicit(bilevel.dense()), w, log_l2, train, valid)
    difference = np.array(
        [central_difference(lambda h: logistic_value(h, train, valid), log_l2, e, STEP) for e in np.eye(5)]
    )
    np.testing.assert_allclose(got.grad, difference, rtol=1e-6)
    np.testing.assert_allclose(exact.grad, difference, rtol=1e-9)
    np.testing.assert_allclose(got.value, logistic_value(log_l2, train, valid), rtol=1e-12)


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
def test_trajectories_match_differences_of_the_training_run(inner, make):
    params, hparams, train, valid = network_data()
    got = estimate(NETWORK, make(inner, 30), params, hparams, train, valid)

    @jax.jit
    def train_and_validate(hparams):  # an ordinary training loop
        def step(carry, _):
            params, state = carry
            updates, state = inner.update(jax.grad(NETWORK.inner)(params, hparams, train), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, inner.init(params)), length=30)
        return NETWORK.outer(end, hparams, valid)

    for name in hparams:

        def along(x, name=name):
            return float(train_and_validate({**hparams, name: x}))

        difference = central_difference(along, hparams[name], 1.0, STEP)
        assert float(got.grad[name]) == pytest.approx(difference, rel=1e-6)
    assert float(got.value) == pytest.approx(float(train_and_validate(hparams)), rel=1e-12)


# --- Direct term, batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.implicit(bilevel.dense()),
        bilevel.unrolled(optax.sgd(ETA), 60),
        bilevel.forward(optax.sgd(ETA), 60),
        bilevel.one_step(optax.sgd(ETA)),
    ],
    ids=["implicit", "unrolled", "forward", "one_step"],
)
def test_direct_term_is_there(estimator):
    problem = ridge()

    def outer(w, log_l2, batch):
        return RIDGE.outer(w, log_l2, batch) + 5 * jnp.sin(log_l2)

    arguments = problem.solution(-1.0), np.float64(-1.0), problem.train, problem.valid
    without = estimate(RIDGE, estimator, *arguments)
    with_direct = estimate(bilevel.Problem(RIDGE.inner, outer), estimator, *arguments)
    difference = float(with_direct.grad - without.grad)
    assert difference == pytest.approx(5 * np.cos(-1.0), rel=1e-12)


def mean_problem():
    """inner: 0.5 (w - mean(batch))^2 + 0.5 h w^2; outer: 0.5 (w - 1)^2. The cross derivative is w."""
    return bilevel.Problem(
        inner=lambda w, h, batch: 0.5 * jnp.mean(batch) * w**2 - w + 0.5 * h * w**2,
        outer=lambda w, h, batch: 0.5 * (w - jnp.mean(batch)) ** 2,
    )


def test_implicit_batches_are_averaged():
    # The Hessian is mean(batch) + h: batches of one row each have Hessians of their own.
    source = bilevel.minibatches(jnp.array([1.0, 2.0, 4.0, 8.0]), 1)
    key, w, h = jax.random.key(3), np.float64(0.5), np.float64(0.25)
    seen = {}
    for n in (1, 2, 4):
        got = estimate(
            mean_problem(), bilevel.implicit(bilevel.dense(), batches=n), w, h, source, np.ones(1), key
        )
        # grad = -w (w - 1) / (mean Hessian)
        seen[n] = -0.5 * (0.5 - 1) / float(got.grad) - 0.25
        assert float(got.counts.hvp) == n
    for n, mean in seen.items():
        means = {sum(drawn) / n for drawn in itertools.combinations_with_replacement((1.0, 2.0, 4.0, 8.0), n)}
        assert min(abs(mean - m) for m in means) <= 1e-12
    assert len(set(seen.values())) > 1


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
def test_stacked_batches_are_used_one_per_step(make):
    batches = np.array([[1.0], [2.0], [0.5]])
    w, h, eta = 0.5, 0.25, 0.1
    got = estimate(
        mean_problem(),
        make(optax.sgd(eta), 3),
        np.float64(w),
        np.float64(h),
        bilevel.stacked(batches),
        np.ones(1),
    )
    slope = 0.0  # dw/dh
    for (a,) in batches:
        w, slope = w - eta * ((a + h) * w - 1), slope - eta * ((a + h) * slope + w)
    assert float(got.params) == pytest.approx(w, rel=1e-13)
    assert float(got.grad) == pytest.approx((w - 1) * slope, rel=1e-12)


def test_implicit_uses_the_last_batch_of_the_step():
    source = bilevel.stacked(np.array([[3.0]]))
    got = estimate(
        mean_problem(),
        bilevel.implicit(bilevel.dense()),
        np.float64(0.5),
        np.float64(0.25),
        source,
        np.ones(1),
    )
    assert float(got.grad) == pytest.approx(-0.5 * (0.5 - 1) / 3.25, rel=1e-12)
    # In a method with several inner steps.
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), optax.sgd(0.0), optax.sgd(1.0), inner_steps=3
    )
    data = bilevel.stacked(np.array([[3.0], [5.0], [7.0]])), np.ones(1)
    state = method.init(mean_problem(), 0.5, 0.25, *data, key=jax.random.key(0))
    _, info = jax.jit(functools.partial(method.step, mean_problem()))(state, *data)
    assert float(info.grad_norm) == pytest.approx(0.25 / 7.25, rel=1e-12)


def test_implicit_at_a_zero_outer_gradient():
    # b = 0: no direction to solve for, and no division by |b|.
    problem = bilevel.Problem(mean_problem().inner, lambda w, h, batch: 0.5 * (w - 0.5) ** 2 + h)
    got = estimate(problem, bilevel.implicit(), np.float64(0.5), np.float64(0.25), np.ones(1), np.ones(1))
    assert (float(got.grad), float(got.error)) == (1.0, 0.0)
