"""Inner loops beyond one optimiser: schedules, optimisers whose settings are tuned, inner solvers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implementations import LOG_L2, METHODS, OUTER, optimum
from problems import (
    RIDGE,
    central_difference,
    least_squares,
    ridge,
    ridge_valid,
)

import bilevel
from bilevel import lbfgs, picard

KEY = jax.random.key(0)


def run(problem, params, hparams, train, valid, method, steps, **settings):
    settings = {"progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, method, steps, **settings)


def at(problem, estimator, *args):
    """One estimate, compiled."""
    return jax.jit(bilevel.hypergradient(problem, estimator))(*args)


# --- Schedules ---------------------------------------------------------------------------------------------


def scheduled(h):
    return optax.sgd(h["lr"])


SCHEDULE = np.array([0.3, 0.1, 0.2, 0.05])
SCHEDULED = {"lr": jnp.asarray(SCHEDULE), "log_l2": jnp.asarray(-1.0)}


def descent(rates, log_l2):
    """Outer loss of the ridge problem after a gradient step at each rate."""
    w = np.zeros(20)
    for rate in rates:
        w = w - rate * (ridge().hessian(log_l2) @ w - ridge().a.T @ ridge().b / 40)
    return ridge().value_at(w)


BY_NAME = dataclasses.replace(
    RIDGE,
    inner=lambda w, h, batch: RIDGE.inner(w, h["log_l2"], batch),
    outer=lambda w, h, batch: ridge_valid(w, h, batch),
)


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
@pytest.mark.parametrize("truncate", [None, 2])
def test_a_schedule_of_learning_rates(make, truncate):
    estimator = make(bilevel.tuned(scheduled), 4, truncate=truncate, per_step={"lr": True})
    estimate = at(BY_NAME, estimator, jnp.zeros(20), SCHEDULED, ridge().train, ridge().valid)
    assert abs(float(estimate.value) - descent(SCHEDULE, -1.0)) <= 1e-12
    for j in range(4):
        expected = central_difference(lambda rates: descent(rates, -1.0), SCHEDULE, np.eye(4)[j], 1e-3)
        cut = truncate is not None and j < 2
        assert abs(float(estimate.grad["lr"][j]) - (0.0 if cut else expected)) <= 1e-9
    if truncate is None:
        expected = central_difference(lambda h: descent(SCHEDULE, h), -1.0, 1.0, 1e-3)
        assert abs(float(estimate.grad["log_l2"]) - expected) <= 1e-9


@pytest.mark.parametrize("per_step", [True, {"a": True}, {"a": {"b": True, "c": True}}], ids=str)
def test_per_step_is_a_prefix(per_step):
    inner = lambda w, h, batch: 0.5 * (w - h["a"]["b"] * batch) ** 2 + h["a"]["c"] * w  # noqa: E731
    problem = bilevel.Problem(inner, lambda w, h, batch: 0.5 * (w - batch) ** 2 + h["a"]["c"])
    h = {"a": {"b": jnp.array([1.0, 2.0, 3.0]), "c": jnp.array([0.1, 0.2, 0.4])}}
    estimate = at(
        problem, bilevel.unrolled(optax.sgd(0.5), 3, per_step=per_step), jnp.float64(0.0), h, 1.0, 2.0
    )
    shrink = 0.5 ** np.array([3, 2, 1])
    w = shrink @ (np.array([1.0, 2.0, 3.0]) - [0.1, 0.2, 0.4])
    np.testing.assert_allclose(estimate.params, w, rtol=1e-12)
    np.testing.assert_allclose(estimate.value, 0.5 * (w - 2.0) ** 2 + 0.4, rtol=1e-12)  # outer sees the last
    np.testing.assert_allclose(estimate.grad["a"]["b"], (w - 2.0) * shrink, rtol=1e-12)
    np.testing.assert_allclose(estimate.grad["a"]["c"], -(w - 2.0) * shrink + [0, 0, 1], rtol=1e-12)


def test_a_schedule_in_a_run():
    method = bilevel.alternating(
        bilevel.unrolled(per_step={"lr": True}),
        bilevel.tuned(scheduled),
        optax.adam(0.05),
        inner_steps=4,
        restart=True,
    )
    problem = dataclasses.replace(BY_NAME, constraints={"lr": bilevel.positive()})
    args = problem, np.zeros(20), SCHEDULED, ridge().train, ridge().valid, method
    result = run(*args, 20, test=ridge().valid)
    assert result.history["value"][-1] < 0.9 * result.history["value"][0]
    found = np.asarray(result.best.hparams["lr"]), float(result.best.hparams["log_l2"])
    assert abs(descent(*found) - result.best.value) <= 1e-10
    assert abs(result.test["best"]["value"] - result.best.value) <= 1e-12


@pytest.mark.parametrize(
    ("per_step", "lr", "error", "words"),
    [
        (
            {"lr": True},
            jnp.ones(3),
            ValueError,
            r"hparams\['lr'\] is declared per_step.*4 inner steps.*\(3,\)",
        ),
        ({"lr": True}, jnp.float64(1.0), ValueError, r"hparams\['lr'\] is declared per_step.*4.*\(\)"),
        (True, jnp.ones(4), ValueError, r"hparams\['log_l2'\] is declared per_step"),
        ({"rate": True}, jnp.ones(4), ValueError, r"per_step names \['rate'\].*\['lr'\]"),
    ],
)
def test_per_step_that_does_not_fit(per_step, lr, error, words):
    h = {"lr": lr, "log_l2": jnp.float64(-1.0)}
    args = BY_NAME, np.zeros(20), h, ridge().train, ridge().valid
    inner = bilevel.tuned(scheduled)
    method = bilevel.alternating(bilevel.unrolled(per_step=per_step), inner, OUTER, inner_steps=4)
    for call in (
        lambda: run(*args, method, 2),
        lambda: method.init(*args, key=KEY),
        lambda: bilevel.hypergradient(BY_NAME, bilevel.unrolled(inner, 4, per_step=per_step))(*args[1:]),
    ):
        with pytest.raises(error, match=words):
            call()


def test_per_step_needs_to_know_the_steps():
    estimator = bilevel.unrolled(per_step={"lr": True})
    with pytest.raises(ValueError, match=r"unrolled\(\) has no inner optimiser or number of steps"):
        bilevel.hypergradient(BY_NAME, estimator)(np.zeros(20), SCHEDULED, ridge().train, ridge().valid)


# --- Optimisers whose settings are tuned -------------------------------------------------------------------


def sgd_by_hand(h, steps=5):
    w, memory = np.full(20, 0.1), np.zeros(20)
    for _ in range(steps):
        memory = h[1] * memory + ridge().hessian(LOG_L2) @ w - ridge().a.T @ ridge().b / 40
        w = w - h[0] * memory
    return ridge().value_at(w)


def adamw_by_hand(h, steps=5, b1=0.9, b2=0.999):
    w, m, v = np.full(20, 0.1), np.zeros(20), np.zeros(20)
    for t in range(1, steps + 1):
        g = ridge().hessian(LOG_L2) @ w - ridge().a.T @ ridge().b / 40
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        move = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t) + 1e-8) + 1e-8)
        w = w - h[0] * (move + h[1] * w)
    return ridge().value_at(w)


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
@pytest.mark.parametrize(
    ("by_hand", "optimizer", "h"),
    [
        (sgd_by_hand, lambda h: optax.sgd(h[0], momentum=h[1]), [0.1, 0.8]),
        (adamw_by_hand, lambda h: optax.adamw(h[0], weight_decay=h[1], eps_root=1e-8), [0.05, 0.1]),
    ],
    ids=["sgd", "adamw"],
)
def test_derivatives_by_settings_of_the_optimiser(make, by_hand, optimizer, h):
    h = np.array(h)
    problem = bilevel.Problem(lambda w, h, batch: RIDGE.inner(w, jnp.float64(LOG_L2), batch), ridge_valid)
    estimator = make(bilevel.tuned(optimizer), 5)
    args = jnp.full(20, 0.1), jnp.asarray(h), ridge().train, ridge().valid
    estimate = at(problem, estimator, *args)
    assert abs(float(estimate.value) - by_hand(h)) <= 1e-11
    for i in range(2):
        expected = central_difference(by_hand, h, np.eye(2)[i], 1e-4)
        assert abs(expected) > 1e-3
        assert abs(float(estimate.grad[i]) - expected) <= 1e-8
    # Settings of an optimiser that is not tuned influence nothing.
    with pytest.raises(ValueError, match=r"influence.* neither.*bilevel\.tuned"):
        bilevel.hypergradient(problem, make(optimizer(h), 5))(*args)


def test_a_setting_kept_in_the_state_of_the_optimiser():
    # optax.inject_hyperparams reads it there, where init has put it.
    kept = bilevel.tuned(lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h["lr"]))
    args = jnp.asarray(FAR), {"lr": jnp.float64(0.3)}, jnp.zeros(3), jnp.zeros(3)
    with pytest.raises(ValueError, match="tuned: the first state of this optimiser holds hyperparameters"):
        at(VALLEY, bilevel.unrolled(kept, 5), *args)


SPREAD, FAR = np.array([1.0, 0.3, 0.1]), np.array([3.0, 3.0, 3.0])
VALLEY = bilevel.Problem(
    lambda w, h, batch: 0.5 * jnp.sum(SPREAD * (w - batch) ** 2),
    lambda w, h, batch: 0.5 * jnp.sum(SPREAD * (w - batch) ** 2),
    constraints=bilevel.positive(),
)
TUNED_SGD = bilevel.tuned(lambda h: optax.sgd(h["lr"]))


def test_restarts_learn_the_rate_that_is_best_after_all_steps():
    method = bilevel.alternating(
        bilevel.unrolled(), TUNED_SGD, optax.adam(0.03), inner_steps=10, restart=True
    )
    result = run(VALLEY, FAR, {"lr": np.float64(0.3)}, np.zeros(3), np.zeros(3), method, 300)
    grid = np.linspace(0.01, 2.1, 20901)
    losses = 0.5 * np.sum(SPREAD * (1 - grid[:, None] * SPREAD) ** 20 * FAR**2, axis=1)
    assert abs(float(result.best.hparams["lr"]) - grid[np.argmin(losses)]) <= 1e-3
    assert abs(result.best.value - losses.min()) <= 1e-7


def test_without_restarts_the_horizon_is_short():
    # Gradients with noise, far from the solution: from the start a large rate pays, near it a small one does.
    noise = np.random.default_rng(0).standard_normal((400, 3))
    source = bilevel.minibatches(noise - noise.mean(0), 1)
    problem = dataclasses.replace(
        VALLEY, inner=lambda w, h, batch: 0.5 * jnp.sum(SPREAD * (w - 2 * batch[0]) ** 2)
    )
    rates = []
    for restart in (True, False):
        method = bilevel.alternating(
            bilevel.unrolled(), TUNED_SGD, optax.adam(0.05), inner_steps=5, restart=restart
        )
        result = run(problem, 5 * FAR, {"lr": np.float64(0.3)}, source, np.zeros(3), method, 150)
        rates.append(float(result.hparams["lr"]))
    assert rates[1] < 0.3 * rates[0]


def test_adam_without_eps_root_is_found_before_the_run():
    # The first feature is always zero, and so is the first entry of every gradient.
    rows = ridge().a * (np.arange(20) > 0), ridge().b
    free = bilevel.Problem(
        lambda w, h, batch: jnp.exp(h) * least_squares(w, batch), lambda w, h, batch: least_squares(w, batch)
    )
    args = free, {"w": np.full(20, 0.1)}, np.float64(0.0)
    by_name = dataclasses.replace(
        free,
        inner=lambda w, h, batch: free.inner(w["w"], h, batch),
        outer=lambda w, h, batch: free.outer(w["w"], h, batch),
    )
    args = by_name, *args[1:]

    def method(optimizer, estimator=None):
        estimator = bilevel.unrolled() if estimator is None else estimator
        return bilevel.alternating(estimator, optimizer, OUTER, inner_steps=2)

    for optimizer in (optax.adam(1e-2), bilevel.tuned(lambda h: optax.adam(1e-2 * jnp.exp(h)))):
        with pytest.raises(ValueError, match=r"1 of 20 are in params\['w'\].*eps_root=1e-8"):
            run(*args, rows, ridge().valid, method(optimizer), 2)
    accepted = [
        (rows, method(optax.adam(1e-2, eps_root=1e-8))),
        (ridge().train, method(optax.adam(1e-2))),
        (rows, method(optax.sgd(1e-2))),
        (rows, method(optax.adam(1e-2), bilevel.implicit(bilevel.neumann(2, 0.1)))),
    ]
    for train, chosen in accepted:
        assert run(*args, train, ridge().valid, chosen, 2).history["accepted"].all()


@pytest.mark.parametrize("given", [None, np.ones(3)], ids=["none", "given"])
def test_the_trap_is_looked_for_where_the_problem_starts(given):
    problem = bilevel.Problem(
        lambda w, h, batch: jnp.exp(h) * jnp.sum(w**2),
        lambda w, h, batch: jnp.sum((w - batch) ** 2) + h**2,
        start=lambda h, batch, key: jnp.zeros(3),
    )
    method = bilevel.alternating(bilevel.unrolled(), optax.adam(0.1), optax.sgd(0.1), inner_steps=2)
    with pytest.raises(ValueError, match="3 of 3 are in params at the start.*eps_root=1e-8"):
        run(problem, given, np.float64(0.1), np.ones(3), np.ones(3), method, 2)


# --- Inner solvers in place of inner steps -----------------------------------------------------------------


def test_an_inner_solver_reaches_the_ridge_optimum():
    method = bilevel.alternating(bilevel.implicit(bilevel.dense()), lbfgs(atol=1e-11), OUTER)
    result = run(RIDGE, np.zeros(20), np.float64(-2.0), ridge().train, ridge().valid, method, 100)
    assert abs(float(result.hparams) - optimum(METHODS[0])) <= 1e-9
    np.testing.assert_allclose(result.params, ridge().solution(float(result.hparams)), rtol=1e-7)
    gradients = result.history["inner_grad"] / 40
    np.testing.assert_array_equal(gradients, np.round(gradients))
    # It starts at the last solution: once hparams stand still one gradient says that nothing is left to do.
    assert gradients[0] > 10
    assert gradients[-1] <= 2


@functools.cache
def solver_method(**settings):
    return bilevel.alternating(bilevel.implicit(bilevel.dense()), lbfgs(), OUTER, **settings)


def test_an_inner_solver_with_a_start_and_with_a_period():
    started = dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20))
    args = np.zeros(20), np.float64(-2.0), ridge().train, ridge().valid
    cold = run(started, *args, solver_method(), 12).history["inner_grad"] / 40
    assert cold[1:].min() > 10
    seldom = run(RIDGE, *args, solver_method(period=3), 6).history["inner_grad"] / 40
    np.testing.assert_array_equal(seldom == 0, [False, True, True] * 2)


def test_a_fixed_point_takes_an_inner_solver():
    def update(w, h, batch):
        return 0.5 * jnp.cos(w) + h * batch

    problem = bilevel.FixedPoint(update, lambda w, h, batch: 0.5 * jnp.sum((w - batch) ** 2))
    method = bilevel.alternating(bilevel.implicit(bilevel.dense()), picard(), optax.sgd(0.1))
    result = run(problem, np.zeros(3), np.float64(0.5), np.arange(3.0), np.ones(3), method, 3)
    w = np.asarray(result.best.params)
    np.testing.assert_allclose(w, 0.5 * np.cos(w) + float(result.best.hparams) * np.arange(3.0), atol=1e-7)
    # hparams moved against (d w / d h)^T (w - 1), with (1 + sin(w) / 2) d w / d h = batch.
    h, slopes = 0.5, []
    for _ in range(3):
        w = np.zeros(3)
        for _ in range(200):
            w = 0.5 * np.cos(w) + h * np.arange(3.0)
        slopes.append(np.sum((w - 1) * np.arange(3.0) / (1 + 0.5 * np.sin(w))))
        h -= 0.1 * slopes[-1]
    np.testing.assert_allclose(result.history["grad_norm"], np.abs(slopes), rtol=1e-6)
    np.testing.assert_allclose(float(result.hparams), h, rtol=1e-6)


@pytest.mark.parametrize("restart", [True, False], ids=["restart", "start"])
def test_skipped_steps_leave_params_where_they_are(restart):
    problem = RIDGE if restart else dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20))
    implicit = bilevel.implicit(bilevel.dense())
    method = bilevel.alternating(
        implicit, optax.sgd(0.3), optax.sgd(1e-300), inner_steps=50, period=2, restart=restart
    )
    result = run(problem, np.zeros(20), np.float64(-1.0), ridge().train, ridge().valid, method, 4)
    # Not the loss at the params of the start, which are far from the inner solution.
    np.testing.assert_allclose(result.history["value"], result.history["value"][0], rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "inner", "words"),
    [
        (bilevel.implicit(), bilevel.cg(), "inner must be .*got a linear solver"),
        (bilevel.implicit(), lbfgs, r"inner must be .*lbfgs\(\.\.\.\)"),
        (bilevel.unrolled(), lbfgs(), "inner must be an inner optimiser.*got an inner solver"),
    ],
    ids=["linear", "not called", "trajectory"],
)
def test_inner_solvers_in_the_wrong_place(estimator, inner, words):
    with pytest.raises(TypeError, match=words):
        bilevel.alternating(estimator, inner, OUTER)


# --- Where an inner solver begins --------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("restart", [True, False], ids=["restart", "start"])
def test_a_restart_renews_the_state_of_an_inner_solver(restart, period):
    problem = RIDGE if restart else dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20))

    def values(inner, steps):
        method = bilevel.alternating(
            bilevel.implicit(), inner, optax.sgd(0.1), inner_steps=steps, restart=restart, period=period
        )
        args = problem, np.zeros(20), np.float64(-1.0), ridge().train, ridge().valid, method, 4
        return run(*args).history["value"]

    adam = optax.adam(0.05)
    solver = bilevel.optax_loop(adam, 5)
    np.testing.assert_array_equal(values(solver, 1), values(adam, 5))


# --- Fixed points ------------------------------------------------------------------------------------------


def relax(z, h, batch):
    return 0.5 * z + h * batch


RELAX = bilevel.FixedPoint(relax, lambda z, h, batch: jnp.sum((z - batch) ** 2))


def test_one_step_alone_is_one_step_of_a_fixed_point():
    # Through the last application of the map: d outer / d z = 2 (z - batch), d z / d h = train.
    z, train, valid = np.array([0.4, 1.0]), np.array([0.2, 0.5]), np.ones(2)
    estimate = at(RELAX, bilevel.one_step(), z, np.float64(1.0), train, valid)
    end = 0.5 * z + train
    np.testing.assert_allclose(estimate.params, end, rtol=1e-14)
    np.testing.assert_allclose(estimate.grad, 2 * (end - valid) @ train, rtol=1e-14)


@pytest.mark.parametrize("name", ["one_step", "unrolled", "forward"])
def test_estimators_are_called_by_their_factory(name):
    with pytest.raises(ValueError, match=rf"^{name}\(\) has no inner optimiser"):
        bilevel.hypergradient(RIDGE, getattr(bilevel, name)())(
            np.zeros(20), np.float64(0.0), ridge().train, ridge().valid
        )
    if name == "one_step":
        with pytest.raises(ValueError, match=r"\(one_step\)"):
            bilevel.alternating(bilevel.one_step(optax.sgd(0.1)), optax.sgd(0.1), OUTER)


# --- Schedules that are not declared -----------------------------------------------------------------------


def test_a_schedule_that_is_not_declared_is_explained():
    words = r"hparams\['lr'\] has as many entries.*inner steps, 4.*per_step={'lr': True}"
    inner, args = bilevel.tuned(scheduled), (np.zeros(20), SCHEDULED, ridge().train, ridge().valid)
    with pytest.raises(ValueError, match=words):
        at(BY_NAME, bilevel.unrolled(inner, 4), *args)
    method = bilevel.alternating(bilevel.forward(), inner, OUTER, inner_steps=4)
    with pytest.raises(ValueError, match=words):
        run(BY_NAME, *args, method, 2)


def test_a_setting_of_the_wrong_shape_is_explained():
    inner, hparams = bilevel.tuned(scheduled), SCHEDULED | {"lr": jnp.ones(3)}
    words = r"inner: a step of the tuned optimiser failed.*float64\[3\]"
    with pytest.raises(ValueError, match=words) as info:
        at(BY_NAME, bilevel.unrolled(inner, 4), np.zeros(20), hparams, ridge().train, ridge().valid)
    assert "per_step" not in str(info.value)


# --- Hyperparameters that act through the start only -------------------------------------------------------

STARTED = dataclasses.replace(BY_NAME, start=lambda h, batch, key: h["init"])
WITH_INIT = {"init": np.ones(20), "log_l2": np.float64(-1.0)}


@pytest.mark.parametrize(
    ("estimator", "inner_steps"),
    [(bilevel.implicit(), 1), (bilevel.one_step(), 3), (bilevel.unrolled(truncate=1), 3)],
    ids=["implicit", "one_step", "truncated"],
)
def test_a_start_that_the_estimator_does_not_see_is_refused(estimator, inner_steps):
    method = bilevel.alternating(estimator, optax.sgd(0.1), OUTER, inner_steps=inner_steps)
    words = r"hparams\['init'\] acts? through start only.*bilevel.unrolled\(\) or bilevel.forward\(\)"
    args = None, WITH_INIT, ridge().train, ridge().valid
    with pytest.raises(ValueError, match=words):
        method.init(STARTED, *args, key=KEY)
    with pytest.raises(ValueError, match=words):
        run(STARTED, *args, method, 2)
    # It may act elsewhere, too; and what is not tuned needs no derivative.
    also = dataclasses.replace(
        STARTED, inner=lambda w, h, batch: BY_NAME.inner(w, h, batch) + 1e-3 * jnp.sum(w * h["init"])
    )
    method.init(also, *args, key=KEY)
    fixed = dataclasses.replace(STARTED, constraints={"init": bilevel.fixed()})
    method.init(fixed, *args, key=KEY)


@pytest.mark.parametrize("estimator", [bilevel.unrolled(), bilevel.forward(), bilevel.one_step()])
def test_a_start_that_the_estimator_sees_is_taken(estimator):
    steps = 1 if estimator == bilevel.one_step() else 3
    method = bilevel.alternating(estimator, optax.sgd(0.1), OUTER, inner_steps=steps)
    method.init(STARTED, None, WITH_INIT, ridge().train, ridge().valid, key=KEY)


def test_a_start_is_refused_by_an_estimate_alone():
    with pytest.raises(ValueError, match="start only"):
        bilevel.hypergradient(STARTED, bilevel.implicit())(None, WITH_INIT, ridge().train, ridge().valid)
