"""Self-tuning networks: closed forms, every kind of hyperparameter, what is refused, how runs end."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import RIDGE, RIDGE_LOG_L2, RIDGE_VALUE, ridge

import bilevel
from bilevel import responses
from bilevel.constraints import bind
from bilevel.estimators.best_response import _linearised
from bilevel.methods.stn import Perturbed, Training
from bilevel.problem import Draw, Point


def response_at(problem, params, hparams, train, valid, estimator):
    """The columns of a fitted response, d params / d free units, for each hyperparameter."""
    point = Point(params)
    state = estimator.init(problem, point, hparams)
    draw = Draw(lambda j: train, 1, False)
    estimate, state = jax.jit(
        lambda state: estimator.estimate(problem, state, point, hparams, draw, valid, jax.random.key(0))
    )(state)
    scale = jax.nn.softplus(state.scales.raw)
    unit = jnp.eye(scale.size) / estimator.noise.unit(scale.size)
    return estimate, [responses.change(params, state.response, column) for column in unit]


# --- The best response of a two-layer linear network is gated ----------------------------------------------


def linear_network(structured):
    """y = s^T Q x with the penalty e^lam |dy/dx|^2, as a composite or as one function."""

    def predict(params, lam, batch):
        return batch[0] @ (params["q"] @ params["s"])  # q: (inputs, hidden)

    def loss(outputs, lam, batch):
        return jnp.sum((outputs - batch[1]) ** 2)

    def penalty(params, lam):
        return jnp.exp(lam) * jnp.sum((params["q"] @ params["s"]) ** 2)

    if structured:
        inner = bilevel.composite(predict, loss, penalty)
    else:

        def inner(params, lam, batch):
            return loss(predict(params, lam, batch), lam, batch) + penalty(params, lam)

    def outer(params, lam, batch):
        return jnp.sum((batch[0] @ (params["q"] @ params["s"]) - batch[1]) ** 2)

    return bilevel.Problem(inner, outer)


def gated(lam, x, t):
    """Exact best response: hidden unit i is multiplied by d_i^2 / (d_i^2 + e^lam)."""
    u, d, vt = np.linalg.svd(x, full_matrices=False)
    gate = 1 / (1 + np.exp(lam - 2 * np.log(d)))
    return vt.T * gate, (u.T @ t) / d, gate, vt.T


@pytest.fixture(scope="module")
def two_layers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 4))
    return x, x @ rng.standard_normal(4) + 0.3 * rng.standard_normal(12)


@pytest.mark.parametrize("lam", [-3.0, 0.0, 2.0])
def test_the_gates_are_the_best_response(two_layers, lam):
    x, t = two_layers
    q, s, *_ = gated(lam, x, t)
    ridge_solution = np.linalg.solve(x.T @ x + np.exp(lam) * np.eye(4), x.T @ t)
    np.testing.assert_allclose(q @ s, ridge_solution, rtol=1e-12)
    grad = jax.grad(linear_network(False).inner)({"q": q, "s": s}, lam, (x, t))
    assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) < 1e-11


@pytest.mark.parametrize("structured", [True, False])
def test_the_response_that_is_fitted_is_the_slope_of_the_gates(two_layers, structured):
    # Of the hidden layer alone, whose rows the gates rescale; the output layer is left out.
    x, t = two_layers
    lam = 0.5
    q, s, gate, q0 = gated(lam, x, t)
    params = {"q": jnp.asarray(q), "s": jnp.asarray(s)}
    estimator = bilevel.best_response(optax.sgd(0.01), steps=6000, scale=1e-5, response={"q": 1, "s": False})
    train = jnp.asarray(x), jnp.asarray(t)
    problem = linear_network(structured)
    estimate, (column,) = response_at(problem, params, jnp.asarray(lam), train, train, estimator)
    slope = -gate * (1 - gate)  # d sigmoid(-lam + c) / d lam
    np.testing.assert_allclose(column["q"], q0 * slope, rtol=0, atol=2e-10)
    assert not np.any(column["s"])
    penalised = x.T @ x + np.exp(lam) * np.eye(4)
    w = q @ s
    exact = 2 * (x.T @ (x @ w - t)) @ np.linalg.solve(penalised, -np.exp(lam) * w)
    np.testing.assert_allclose(estimate.grad, exact, rtol=1e-9)


# --- The Jacobian of the response is the implicit one ------------------------------------------------------


def test_a_full_response_is_the_implicit_jacobian():
    log_l2 = np.linspace(-1.0, 0.5, 20)
    problem = ridge()
    w = problem.solution(log_l2)
    exact = np.linalg.solve(problem.hessian(log_l2), -np.diag(np.exp(log_l2) * w))
    estimator = bilevel.best_response(optax.sgd(0.4), steps=8000, scale=1e-5)
    estimate, columns = response_at(
        RIDGE, jnp.asarray(w), jnp.asarray(log_l2), problem.train, problem.valid, estimator
    )
    np.testing.assert_allclose(np.stack(columns, 1), exact, rtol=0, atol=1e-8 * np.abs(exact).max())
    np.testing.assert_allclose(estimate.grad, problem.hypergradient(log_l2), rtol=1e-7)


# --- The bias of perturbations that are not small ----------------------------------------------------------

H, CENTRE, LOG_LAM, SIGMA = 1.7, 0.9, 0.7, 0.6
BIG = np.exp(LOG_LAM)


def scalar_inner(w, lam, batch):
    return 0.5 * H * (w - CENTRE) ** 2 + 0.5 * jnp.exp(lam) * w**2


SCALAR = bilevel.Problem(scalar_inner, lambda w, lam, batch: 0.5 * w**2)


def normal_nodes():
    """Gauss-Hermite: means over a standard normal z, exact for what is smooth."""
    z, weights = np.polynomial.hermite_e.hermegauss(60)
    return jnp.asarray(z), jnp.asarray(weights / weights.sum())


def expected(loss):
    """The mean of ``loss(noise)``, noise of shape (1, 1), over normal perturbations."""
    z, weights = normal_nodes()
    return jnp.vdot(weights, jax.vmap(lambda z: loss(z[None, None]))(z))


def test_finite_perturbations_bias_stn_as_the_closed_form_says():
    mean = np.exp(SIGMA**2 / 2)
    # (h + L M0) p0 + L s^2 M0 p1 = h w and p1 = -L M0 p0 / (h + L M0 (1 + s^2))
    per = -BIG * mean / (H + BIG * mean * (1 + SIGMA**2))
    p0 = H * CENTRE / (H + BIG * mean + BIG * SIGMA**2 * mean * per)
    np.testing.assert_allclose([p0, per * p0], [0.414564, -0.200745], atol=1e-6)
    method = bilevel.stn(optax.sgd(0.1), optax.sgd(0.1), centred=True, scale=SIGMA)
    args = jnp.asarray(0.0), jnp.asarray(LOG_LAM), jnp.zeros(1), jnp.zeros(1)
    state = method.init(SCALAR, *args, key=jax.random.key(0))
    scale = jax.nn.softplus(state.estimator.scales.raw)
    training = Training(Perturbed(SCALAR, method, state.constraints, state.free, scale))
    unit = method.noise.unit(1)
    response = state.estimator.response._replace(gates=jnp.full(1, per * p0 * unit))

    def loss(w, gates):
        variables = w, response._replace(gates=gates)
        return expected(lambda noise: training.loss(variables, jnp.zeros(1), noise, None)[0])

    grads = jax.grad(loss, argnums=(0, 1))(jnp.asarray(p0), response.gates)
    np.testing.assert_allclose(grads[0], 0, atol=1e-8)
    np.testing.assert_allclose(grads[1], 0, atol=1e-8)


def test_delta_stn_is_centred_at_the_solution_itself():
    # p0 = w* = h w / (h + L), p1 = -L M0 p0 / (h + L M0 (1 + s^2)): the true slope is -.223394.
    mean, p0 = np.exp(SIGMA**2 / 2), H * CENTRE / (H + BIG)
    p1 = -BIG * mean * p0 / (H + BIG * mean * (1 + SIGMA**2))
    np.testing.assert_allclose([p0, p1], [0.411982, -0.199494], atol=1e-6)
    estimator = bilevel.best_response(optax.sgd(0.1), scale=SIGMA)
    point, hparams = Point(jnp.asarray(p0)), jnp.asarray(LOG_LAM)
    state = estimator.init(SCALAR, point, hparams)
    unit = estimator.noise.unit(1)
    constraints = bind(None, hparams)

    def loss(gates):
        response = state.response._replace(gates=gates)
        return expected(
            lambda noise: estimator.fit_loss(
                SCALAR, response, point, constraints, hparams, state.scales, jnp.zeros(1), noise
            )
        )

    grads = jax.grad(loss)(jnp.full(1, p1 * unit))
    np.testing.assert_allclose(grads, 0, atol=1e-8)


# --- End to end --------------------------------------------------------------------------------------------

INNER, OUTER, ADAM = optax.sgd(0.1), optax.adam(1e-2), optax.adam(3e-2)
# The uncentred response is to hyperparameters themselves, whose zero is put near the solution.
SHIFTED = bilevel.Problem(lambda w, h, batch: RIDGE.inner(w, h - 3, batch), RIDGE.outer)
END_TO_END = {
    "stn": lambda entropy: bilevel.stn(ADAM, OUTER, entropy=entropy, warmup=100),
    "stn, centred": lambda entropy: bilevel.stn(OUTER, OUTER, entropy=entropy, centred=True, warmup=100),
    "delta_stn": lambda entropy: bilevel.delta_stn(OUTER, OUTER, 2, entropy=entropy, warmup=100),
}


def curvature(log_l2):
    """Of the outer loss along the response, which is linear."""
    problem = ridge()
    slope = np.linalg.solve(problem.hessian(log_l2), -np.exp(log_l2) * problem.solution(log_l2))
    return np.sum((problem.v @ slope) ** 2) / problem.c.size


@pytest.mark.parametrize("start", [-6.0, 0.0])
@pytest.mark.parametrize("name", END_TO_END)
def test_ridge_to_the_known_solution_with_scales_of_the_closed_form(name, start):
    entropy, method = 1e-3, END_TO_END[name](1e-3)
    problem, shift = (SHIFTED, 3.0) if name == "stn" else (RIDGE, 0.0)
    given = np.zeros(20), np.float64(start + shift), ridge().train, ridge().valid
    result = bilevel.optimize(problem, *given, method, steps=6000, progress=False)
    assert result.status == bilevel.Status.BUDGET
    log_l2 = float(np.mean(result.trajectory.hparams[-1000:])) - shift
    assert abs(log_l2 - RIDGE_LOG_L2) < 0.1
    assert abs(ridge().value(log_l2) - RIDGE_VALUE) < 3e-4
    scale = np.mean(result.history["largest_scale"][-1000:])
    assert abs(scale / np.sqrt(entropy / curvature(RIDGE_LOG_L2)) - 1) < 0.1
    # What is returned are the weights at the hyperparameters.
    solution = ridge().solution(float(result.hparams) - shift)
    assert np.linalg.norm(result.params - solution) < 0.02 * np.linalg.norm(solution)


def test_centring_takes_the_size_of_hyperparameters_out_of_the_conditioning():
    # Curvature of E_e in (w, response) of a loss of curvature 1, at lam = 5 with scale .5.
    problem = bilevel.Problem(lambda w, lam, batch: 0.5 * (w - lam) ** 2, lambda w, lam, batch: w**2)
    args = jnp.asarray(0.0), jnp.asarray(5.0), jnp.zeros(1), jnp.zeros(1)

    def condition(centred, units=1.0):
        method = bilevel.stn(INNER, OUTER, centred=centred, scale=0.5)
        state = method.init(problem, *args, key=jax.random.key(0))
        scale = jax.nn.softplus(state.estimator.scales.raw)
        training = Training(Perturbed(problem, method, state.constraints, state.free, scale))

        def loss(variables):
            response = state.estimator.response._replace(gates=variables[1:] * units)
            return expected(
                lambda noise: training.loss((variables[0], response), jnp.zeros(1), noise, None)[0]
            )

        return np.linalg.cond(jax.hessian(loss)(jnp.zeros(2)))

    assert abs(condition(False) - 2754) < 1
    in_units_of_one = 0.5 * np.sqrt(3)  # of the paper
    np.testing.assert_allclose(condition(True, in_units_of_one), 4, rtol=1e-6)
    np.testing.assert_allclose(condition(True), 3, rtol=1e-6)  # in units of the first scale


def test_plain_steps_leave_what_predictions_do_not_see_of_a_response(two_layers):
    # Of the two-layer network only the product of its layers is seen.
    x, t = two_layers
    data, start = (jnp.asarray(x), jnp.asarray(t / 4)), jax.random.normal(jax.random.key(0), (4, 4)) / 2
    params = {"q": start, "s": start[0]}
    problem = linear_network(True)
    sizes = {}
    for name, fit in {"adam": optax.adam(1e-2), "sgd": optax.sgd(1e-3)}.items():
        method = bilevel.delta_stn(optax.adam(1e-3), optax.adam(1e-2), 2, warmup=2000, fit=fit)
        result = bilevel.optimize(problem, params, 0.0, data, data, method, 2000, progress=False)
        sizes[name] = result.history["response"][-1]
    assert sizes["adam"] > 3 * sizes["sgd"]


# --- Linearised predictions --------------------------------------------------------------------------------


def test_linearised_predictions_agree_with_finite_differences_on_an_mlp():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (5,), "c": (5, 2)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    change = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.standard_normal((7, 3))), jnp.asarray(rng.standard_normal((7, 2)))

    def predict(params, rate, batch):
        return jnp.tanh((1 - rate) * batch[0] @ params["a"] + params["b"][None]) @ params["c"]

    def loss(outputs, rate, batch):
        return jnp.mean((outputs - batch[1]) ** 2)

    def penalty(params, rate):
        return rate * jnp.sum(params["a"] ** 2)

    problem = bilevel.Problem(bilevel.composite(predict, loss, penalty), RIDGE.outer)
    rate, step = 0.3, 1e-6
    shifted = [jax.tree.map(lambda p, c: p + s * c, params, change) for s in (step, -step)]  # noqa: B023
    slope = (predict(shifted[0], rate, batch) - predict(shifted[1], rate, batch)) / (2 * step)
    moved = jax.tree.map(jnp.add, params, change)
    by_hand = loss(predict(params, rate, batch) + slope, rate, batch) + penalty(moved, rate)
    np.testing.assert_allclose(_linearised(problem, Point(params), change, rate, batch), by_hand, rtol=1e-8)
    nonlinear = bilevel.Problem(lambda p, h, b: loss(predict(p, h, b), h, b) + penalty(p, h), RIDGE.outer)
    whole = _linearised(nonlinear, Point(params), change, rate, batch)
    assert abs(float(whole) - float(by_hand)) > 0.1  # the change is not small


# --- Kinds of hyperparameters ------------------------------------------------------------------------------


def masked(w, hparams, batch):
    """Least squares where only the first features are seen, ``kept`` of them."""
    a, b = batch
    seen = (jnp.arange(a.shape[1]) < hparams["kept"]).astype(a.dtype)
    return 0.5 * jnp.mean(((a * seen[None]) @ w - b) ** 2) + 0.01 * jnp.sum(w**2)


def all_features(w, hparams, batch):
    a, b = batch
    return 0.5 * jnp.mean((a @ w - b) ** 2)


@pytest.mark.parametrize("start", [2.0, 18.0])
@pytest.mark.parametrize(("make", "entropy"), [(bilevel.stn, 0.01), (bilevel.delta_stn, 0.03)])
def test_whole_numbers_are_tuned_through_the_response(make, entropy, start):
    # Each feature matters less than the one before, and there are too many of them for the rows.
    rng = np.random.default_rng(0)
    w = 0.75 ** np.arange(20)
    a, v = rng.standard_normal((30, 20)), rng.standard_normal((400, 20))
    train = a, a @ w + rng.standard_normal(30)
    valid = v, v @ w + rng.standard_normal(400)
    problem = bilevel.Problem(masked, all_features, constraints={"kept": bilevel.integer(0, 20)})
    method = make(optax.adam(1e-2), optax.adam(1e-2), entropy=entropy, warmup=200)
    result = bilevel.optimize(
        problem, np.zeros(20), {"kept": start}, train, valid, method, steps=3000, progress=False
    )

    def value(kept):
        seen = a * (np.arange(20) < kept)
        solution = np.linalg.solve(seen.T @ seen / 30 + 0.02 * np.eye(20), seen.T @ train[1] / 30)
        return 0.5 * np.mean((v @ solution - valid[1]) ** 2)

    kept = float(result.hparams["kept"])
    assert kept == round(kept)
    assert value(kept) <= 1.02 * min(map(value, range(21)))
    assert value(start) > 1.5 * value(kept)


def test_integer_is_refused_where_losses_are_differentiated():
    problem = bilevel.Problem(masked, all_features, constraints={"kept": bilevel.integer(0, 12)})
    data = jnp.ones((4, 12)), jnp.ones(4)
    for call in (
        lambda: bilevel.hypergradient(problem)(jnp.zeros(12), {"kept": 9.0}, data, data),
        lambda: bilevel.optimize(problem, jnp.zeros(12), {"kept": 9.0}, data, data, progress=False),
    ):
        with pytest.raises(ValueError, match=r"hparams\['kept'\] is bilevel.integer\(0, 12\).*bilevel.stn"):
            call()


@pytest.mark.parametrize("value", [0.0, 3.0, 5.0])
def test_integer_is_rounded_between_its_ends(value):
    constraint = bilevel.integer(0, 5)
    free = constraint.to_free(jnp.asarray(value))
    assert float(constraint.to_natural(free)) == value
    assert float(constraint.to_natural(free + 0.01)) == value
    assert float(constraint.to_natural(jnp.asarray(50.0))) == 5
    assert float(constraint.to_natural(jnp.asarray(-50.0))) == 0
    assert float(jax.grad(constraint.to_natural)(free)) > 0


@pytest.mark.parametrize(
    ("make", "error", "part"),
    [
        (lambda: bilevel.integer(0.5, 3), TypeError, "whole number"),
        (lambda: bilevel.integer(3, 3), ValueError, "lo < hi"),
        (lambda: bind(bilevel.integer(0, 3), 1.5).check(1.5), ValueError, "whole number from 0 to 3"),
        (lambda: bind(bilevel.integer(0, 3), 4.0).check(4.0), ValueError, "whole number from 0 to 3"),
    ],
)
def test_integer_says_what_it_takes(make, error, part):
    with pytest.raises(error, match=part):
        make()


def test_hyperparameters_behind_stop_gradient_are_taken_and_absent_ones_are_not():
    def inner(w, hparams, batch):
        strength = jax.jit(lambda h: jax.lax.stop_gradient(h["l2"]))(hparams)
        return 0.5 * (w - batch.mean()) ** 2 + 0.5 * strength * w**2

    def outer(w, hparams, batch):
        return 0.5 * (w - batch.mean()) ** 2

    problem = bilevel.Problem(inner, outer, constraints=bilevel.positive())
    data = jnp.full(2, 2.0), jnp.full(2, 1.0)
    with pytest.raises(ValueError, match="influences neither"):
        bilevel.optimize(problem, jnp.zeros(()), {"l2": 0.3}, *data, progress=False)
    method = bilevel.delta_stn(INNER, OUTER, warmup=100)
    result = bilevel.optimize(problem, jnp.zeros(()), {"l2": 0.3}, *data, method, steps=1500, progress=False)
    assert abs(float(result.hparams["l2"]) - 1) < 0.1
    with pytest.raises(ValueError, match=r"hparams\['idle'\] enters neither inner nor outer"):
        bilevel.optimize(problem, jnp.zeros(()), {"l2": 0.3, "idle": 1.0}, *data, method, progress=False)


def test_what_is_fixed_does_not_move_and_has_no_gradient():
    problem = bilevel.Problem(
        lambda w, h, batch: RIDGE.inner(w, h["l2"], batch),
        lambda w, h, batch: h["weight"] * RIDGE.outer(w, 0.0, batch),
        constraints={"weight": bilevel.fixed()},
    )
    hparams = {"l2": jnp.asarray(0.0), "weight": jnp.asarray(2.0)}
    w = jnp.asarray(ridge().solution(0.0))
    for settings in ({}, {"entropy": 1e-3, "scales": OUTER}):
        estimator = bilevel.best_response(optax.sgd(0.3), 300, scale=1e-3, **settings)
        est = jax.jit(bilevel.hypergradient(problem, estimator))(w, hparams, *rows(ridge()))
        assert float(est.grad["weight"]) == 0
        np.testing.assert_allclose(est.grad["l2"], 2 * ridge().hypergradient(0.0), rtol=1e-3)


def test_hyperparameters_at_the_ends_of_a_box_and_on_a_simplex():
    problem = bilevel.Problem(
        lambda w, h, batch: RIDGE.inner(w, h["l2"], batch) + 0.1 * jnp.vdot(h["share"], w[:2] ** 2),
        RIDGE.outer,
        constraints={"l2": bilevel.box(-2.0, 0.0), "share": bilevel.simplex()},
    )
    start = {"l2": np.float64(-1.9), "share": np.full(2, 0.5)}
    result = bilevel.optimize(
        problem, np.zeros(20), start, *rows(ridge()), METHODS["delta_stn"], 400, progress=False
    )
    assert float(result.hparams["l2"]) == -2.0
    np.testing.assert_allclose(result.hparams["share"].sum(), 1, rtol=1e-12)


# --- Where it runs -----------------------------------------------------------------------------------------

METHODS = {
    "stn": bilevel.stn(optax.adam(1e-2), OUTER, perturbations=2),
    "delta_stn": bilevel.delta_stn(optax.adam(1e-2), OUTER, 2, perturbations=2),
}


def rows(problem):
    """Batches as whole arrays of the ridge problem."""
    return problem.train, problem.valid


@pytest.mark.parametrize("name", METHODS)
def test_minibatches_with_keys_and_groups(name):
    method = METHODS[name]
    train = bilevel.with_rng(bilevel.minibatches(ridge().train, 8))
    valid = bilevel.minibatches(ridge().valid, 20)
    seen = []

    def inner(w, log_l2, batch):
        rows, key = batch
        seen.append(rows[0].shape)
        mask = jax.random.bernoulli(key, 0.9, rows[0].shape)
        return RIDGE.inner(w, log_l2, (rows[0] * mask, rows[1]))

    problem = bilevel.Problem(inner, RIDGE.outer)
    result = bilevel.optimize(
        problem, np.zeros(20), np.float64(-1.0), train, valid, method, 30, progress=False
    )
    assert np.isfinite(result.history["value"]).all()
    assert (4, 20) in seen  # half of a batch each


@pytest.mark.parametrize("name", METHODS)
def test_model_state_advances_once_a_step(name):
    def inner(w, log_l2, batch, state):
        return RIDGE.inner(w, log_l2, batch), {"mean": batch[0].mean(), "steps": state["steps"] + 1}

    def outer(w, log_l2, batch, state):
        return RIDGE.outer(w, log_l2, batch)

    method = METHODS[name]
    state = {"mean": jnp.zeros(()), "steps": jnp.int32(0)}
    result = bilevel.optimize(
        bilevel.Problem(inner, outer, has_state=True),
        np.zeros(20), np.float64(-1.0), *rows(ridge()), method, steps=5, model_state=state, progress=False,
    )  # fmt: skip
    assert int(result.model_state["steps"]) == 5 * 2
    np.testing.assert_allclose(result.model_state["mean"], ridge().a.mean(), rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_valid_steps_are_outer_steps_between_two_trainings(name):
    make = {"stn": bilevel.stn, "delta_stn": bilevel.delta_stn}[name]
    method = make(INNER, OUTER, train_steps=2, valid_steps=3)
    state = method.init(RIDGE, jnp.zeros(20), jnp.asarray(-1.0), *rows(ridge()), key=jax.random.key(0))
    step = jax.jit(functools.partial(method.step, RIDGE))
    positions = []
    for _ in range(6):
        state, info = step(state, *rows(ridge()))
        positions.append(int(state.position))
    assert positions == [2, 2, 2, 4, 4, 4]


def test_params_of_stn_are_the_weights_at_the_hyperparameters():
    method = METHODS["stn"]
    state = method.init(RIDGE, jnp.ones(20), jnp.asarray(-1.0), *rows(ridge()), key=jax.random.key(0))
    np.testing.assert_array_equal(state.params, jnp.ones(20))
    step = jax.jit(functools.partial(method.step, RIDGE))
    for _ in range(20):
        before, (state, info) = state, step(state, *rows(ridge()))
    gates = state.estimator.response.gates
    np.testing.assert_allclose(state.params, state.point.params + state.free * gates[0], rtol=1e-12)
    assert np.abs(gates).max() > 1e-3
    np.testing.assert_array_equal(info.hparams, before.hparams)
    np.testing.assert_allclose(info.value, RIDGE.outer(info.params, info.hparams, ridge().valid), rtol=1e-12)


@pytest.mark.parametrize("make", [bilevel.stn, bilevel.delta_stn])
def test_members_of_a_population_are_runs_of_their_own(make):
    problem = bilevel.Problem(lambda w, h, batch: RIDGE.inner(w, h["a"] + h["b"], batch), RIDGE.outer)
    starts = {"a": np.array([-2.0, -1.0]), "b": np.array([0.1, 0.2])}
    data, method = rows(ridge()), make(INNER, OUTER, 2)
    settings = {"test": ridge().valid, "progress": False}
    together = bilevel.optimize(
        problem, np.zeros((2, 20)), starts, *data, method, 20, population=bilevel.population(2), **settings
    )
    assert together.history["value"].shape == (20, 2)
    for i in range(2):
        member = together.member(i)
        assert "largest_scale" in member.history
        test = member.test["last"]["value"]
        np.testing.assert_allclose(test, RIDGE.outer(member.params, None, ridge().valid), rtol=1e-10)
        state = member.state
        np.testing.assert_allclose(member.params, state.params, rtol=1e-10)
        if make is bilevel.stn:
            gates = state.estimator.response.gates
            away = state.free["a"] * gates[0] + state.free["b"] * gates[1]
            np.testing.assert_allclose(member.params, state.point.params + away, rtol=1e-10)


def test_a_lifted_problem_shares_hyperparameters_between_folds():
    problem = bilevel.lift(RIDGE)
    train = tuple(jnp.stack([x[:20], x[20:]]) for x in ridge().train)
    valid = tuple(jnp.stack([x, x]) for x in ridge().valid)
    method = bilevel.delta_stn(INNER, OUTER, 2)
    result = bilevel.optimize(
        problem, np.zeros((2, 20)), np.float64(-1.0), train, valid, method, 50, progress=False
    )
    assert result.state.estimator.response.gates.shape == (1, 2, 20)
    with pytest.raises(ValueError, match="perturbations=2 deals out the rows"):
        bilevel.optimize(
            problem, np.zeros((2, 20)), np.float64(-1.0), train, valid, METHODS["delta_stn"], progress=False
        )


def test_online_tunes_by_a_best_response():
    estimator = bilevel.best_response(INNER, scale=1e-3)
    tuner = bilevel.online(
        RIDGE, jnp.asarray(-1.0), inner=optax.sgd(0.3), outer=OUTER, estimator=estimator, every=1
    )
    params = jnp.zeros(20)
    state = tuner.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(RIDGE.inner)(params, state.hparams, ridge().train)
        updates, state = tuner.update(grads, state, params, train=ridge().train, valid=ridge().valid)
        return optax.apply_updates(params, updates), state

    for _ in range(1500):
        params, state = step(params, state)
    assert abs(float(state.hparams) - RIDGE_LOG_L2) < 0.05


# --- How runs end ------------------------------------------------------------------------------------------


def test_a_plateau_ends_as_stalled_with_the_reason():
    method = bilevel.delta_stn(INNER, optax.sgd(0.1), 2)
    result = bilevel.optimize(
        RIDGE, np.zeros(20), np.float64(-16.0), *rows(ridge()), method, 2000, progress=False
    )
    assert result.status == bilevel.Status.STALLED
    assert len(result.history["value"]) < 200
    assert "response has vanished" in result.message
    assert "start them elsewhere" in result.message


@pytest.mark.parametrize("make", [bilevel.stn, bilevel.delta_stn])
def test_hyperparameters_of_the_outer_loss_alone_are_no_plateau(make):
    def inner(w, h, batch):
        return 0.5 * jnp.mean((w - batch) ** 2)

    def outer(w, h, batch):
        return 0.5 * jnp.mean((w - batch) ** 2) + (h - 3) ** 2

    method = make(INNER, optax.adam(1e-2))
    start, data = (jnp.ones(()), 0.0), (jnp.ones(4), jnp.ones(4))
    result = bilevel.optimize(bilevel.Problem(inner, outer), *start, *data, method, 800, progress=False)
    assert result.status == bilevel.Status.BUDGET
    assert abs(float(result.hparams) - 3) < 0.05


@pytest.mark.parametrize(
    ("constraint", "free"),
    [(bilevel.integer(0, 1), -0.45), (bilevel.integer(0, 1), 0.4), (bilevel.interval(0, 0.9), 20.0)],
)
def test_the_step_is_that_of_free_units_where_natural_ones_are_rounded(constraint, free):
    # outer is h itself: its slope is that of the map from free to natural units.
    def inner(w, h, batch):
        return 0.5 * jnp.mean((w - h * batch) ** 2)

    problem = bilevel.Problem(inner, lambda w, h, batch: h, constraints=constraint)
    method = bilevel.delta_stn(INNER, optax.sgd(1.0), entropy=0.0)
    data = jnp.ones(4), jnp.ones(4)
    start = constraint.to_natural(jnp.asarray(0.4))
    state = method.init(problem, jnp.ones(()), start, *data, key=jax.random.key(0))
    state = dataclasses.replace(state, free=jnp.asarray(free))
    after, info = jax.jit(functools.partial(method.step, problem))(state, *data)
    slope = jax.grad(constraint.to_natural)(jnp.asarray(free))
    np.testing.assert_allclose(info.grad_norm, slope, rtol=1e-9)
    np.testing.assert_allclose(after.free, free - slope, rtol=1e-9)


@pytest.mark.parametrize("hi", [1.0, 2.0])
def test_at_the_end_of_a_box_the_response_is_to_what_moves(hi):
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * (w - batch.mean()) ** 2 + 0.5 * h * w**2,
        lambda w, h, batch: 0.5 * (w - batch.mean()) ** 2,
        constraints=bilevel.box(0.0, hi),
    )
    estimator = bilevel.best_response(optax.sgd(0.2), steps=1500, scale=1e-2)
    data = jnp.full(2, 2.0), jnp.full(2, 3.0)
    est = jax.jit(bilevel.hypergradient(problem, estimator))(jnp.asarray(1.0), jnp.asarray(1.0), *data)
    np.testing.assert_allclose(est.grad, 1.0, rtol=0.02)


@pytest.mark.filterwarnings("ignore:The hypergradient was exactly zero")
def test_a_runaway_scale_ends_as_stalled_with_the_reason():
    # Params respond, but not those that the outer loss looks at.
    def inner(params, shift, batch):
        return 0.5 * (params["seen"] - batch.mean()) ** 2 + 0.5 * (params["unseen"] - shift) ** 2

    def outer(params, shift, batch):
        return 0.5 * (params["seen"] - batch.mean()) ** 2

    start, data = {"seen": jnp.zeros(()), "unseen": jnp.ones(())}, jnp.ones(2)
    method = bilevel.delta_stn(OUTER, optax.adam(0.1), entropy=1e-2, warmup=100)
    problem = bilevel.Problem(inner, outer)
    result = bilevel.optimize(problem, start, 1.0, data, data, method, 5000, progress=False)
    assert result.status == bilevel.Status.STALLED
    assert "run away" in result.message
    assert "Lower entropy=" in result.message


def test_a_batch_of_nans_is_rejected():
    a, b = ridge().train
    calls = bilevel.minibatches((a.at[5].set(np.nan), b), 8)
    for method in METHODS.values():
        result = bilevel.optimize(
            RIDGE, np.zeros(20), np.float64(-1.0), calls, ridge().valid, method, 12, progress=False
        )
        assert 0 < (~result.history["accepted"]).sum() < 12
        chex.assert_tree_all_finite((result.params, result.hparams))


def test_optimisers_that_know_names_are_told_apart():
    by_name = optax.multi_transform({"a": optax.sgd(0.1)}, {"l2": "a"})
    problem = bilevel.Problem(lambda w, h, batch: RIDGE.inner(w["w"], h["l2"], batch), _outer_of_dict)
    args = problem, {"w": np.zeros(20)}, {"l2": np.float64(-1.0)}, *rows(ridge())
    for make in (bilevel.stn, bilevel.delta_stn):
        with pytest.raises(ValueError, match=r"optimiser of the scales is applied to a vector.*scales="):
            bilevel.optimize(*args, make(INNER, by_name), progress=False)
        taken = bilevel.optimize(*args, make(INNER, by_name, scales=OUTER), 3, progress=False)
        assert len(taken.history["value"]) == 3
        plateau = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau())
        bilevel.optimize(*args, make(INNER, plateau), 3, progress=False)
        with pytest.raises(ValueError, match="failed to begin"):
            bilevel.optimize(*args, make(optax.adamw(0.1, mask={"w": True}), OUTER), progress=False)


def _outer_of_dict(w, h, batch):
    return RIDGE.outer(w["w"], None, batch)


# --- What is refused ---------------------------------------------------------------------------------------

BAD = [
    (lambda: bilevel.stn(INNER, OUTER, scale=0.0), ValueError, ["scale", "positive", "0"]),
    (lambda: bilevel.stn(INNER, OUTER, scale=-1.0), ValueError, ["scale", "positive", "-1"]),
    (lambda: bilevel.delta_stn(INNER, OUTER, entropy=-1e-3), ValueError, ["entropy", "at least 0", "-0.001"]),
    (lambda: bilevel.stn(INNER, OUTER, train_steps=0), ValueError, ["train_steps", "at least 1"]),
    (lambda: bilevel.stn(INNER, OUTER, valid_steps=1.5), TypeError, ["valid_steps", "whole number"]),
    (lambda: bilevel.stn(INNER, OUTER, perturbations=0), ValueError, ["perturbations", "at least 1"]),
    (lambda: bilevel.stn(INNER, OUTER, centred=1), TypeError, ["centred", "True or False"]),
    (lambda: bilevel.stn(bilevel.newton(), OUTER), TypeError, ["inner", "optax optimiser"]),
    (lambda: bilevel.delta_stn(INNER, None), TypeError, ["outer", "optax optimiser", "None"]),
    (lambda: bilevel.best_response(INNER, entropy=1e-3), TypeError, ["scales", "entropy is not 0"]),
    (lambda: bilevel.delta_stn(INNER, OUTER, fit=1e-2), TypeError, ["fit", "optax optimiser", "0.01"]),
    (lambda: bilevel.best_response(None), TypeError, ["optimizer", "optax optimiser"]),
    (lambda: bilevel.stn(INNER, OUTER, perturbations=None), TypeError, ["perturbations", "whole number"]),
    (lambda: bilevel.delta_stn(INNER, OUTER, perturbations="examples"), TypeError, ["perturbations"]),
    (lambda: bilevel.stn(INNER, OUTER, scales=1e-2), TypeError, ["scales", "optax optimiser", "0.01"]),
]


@pytest.mark.parametrize(("call", "error", "parts"), BAD)
def test_wrong_settings_are_told_at_the_call(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def _start(hparams, batch, key):
    return jnp.zeros(20)


@pytest.mark.parametrize(
    ("problem", "change", "error", "parts"),
    [
        (bilevel.FixedPoint(lambda w, h, b: w, RIDGE.outer), {}, TypeError, ["FixedPoint", "gmres"]),
        (bilevel.Problem(RIDGE.inner, RIDGE.outer, start=_start), {}, ValueError, ["start=", "unrolled"]),
        (RIDGE, {"params": np.arange(20)}, TypeError, ["params", "floating", "int64"]),
        (RIDGE, {"train": (np.zeros((41, 20)), np.zeros(41))}, ValueError, ["perturbations=2", "41 rows"]),
        (RIDGE, {"hparams": np.float64(np.nan)}, ValueError, ["hparams", "finite"]),
        (
            bilevel.Problem(RIDGE.inner, RIDGE.outer, constraints=bilevel.fixed()),
            {},
            ValueError,
            ["all are bilevel.fixed()"],
        ),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_problems_that_do_not_fit(name, problem, change, error, parts):
    given = {"params": np.zeros(20), "hparams": np.float64(0.0), "train": ridge().train} | change
    with pytest.raises(error) as caught:
        bilevel.optimize(problem, **given, valid=ridge().valid, method=METHODS[name], progress=False)
    for part in parts:
        assert part in str(caught.value)
