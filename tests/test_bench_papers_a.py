"""Problems of papers at tiny sizes: dropout, activations, kernels, a schedule, optimisers without a rate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import agrees

import bilevel
from benchmarks.problems import (
    graph_kernel,
    interpolated_activation,
    power_schedule,
    repeated_data,
    tuning_free,
)

# --- Repeated data ----------------------------------------------------------------------------------------


@pytest.fixture
def _short(monkeypatch):
    """Four steps, of two epochs."""
    for name, value in {"CONTEXT": 2, "HIDDEN": 4, "ROWS": 16, "BATCH": 8, "STEPS": 4}.items():
        monkeypatch.setattr(repeated_data, name, value)


def rows_of_text():
    return jax.random.randint(jax.random.key(3), (16, 3), 0, repeated_data.SYMBOLS)


@pytest.mark.usefixtures("_short")
def test_every_epoch_has_all_repeated_rows_in_another_order():
    order = np.asarray(repeated_data.order_of(jax.random.key(0))).reshape(2, 16)
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(16), (2, 16)))
    assert (order[0] != order[1]).any()


@pytest.mark.usefixtures("_short")
def test_the_rates_of_dropout_have_the_gradient_of_differences():
    rows = rows_of_text()
    params = repeated_data.start(None, None, jax.random.key(1))
    train = rows, jax.random.key(2)
    estimator = bilevel.unrolled(repeated_data.OPTIMIZER, steps=4, remat=False)

    @jax.jit
    def estimate(hparams):
        return bilevel.hypergradient(repeated_data.PROBLEM, estimator)(params, hparams, train, rows)

    agrees(estimate, repeated_data.of_each({"input": 0.3, "hidden": 0.5}))


@pytest.mark.usefixtures("_short")
def test_without_dropout_a_noisy_pass_is_the_plain_one():
    rows, params = rows_of_text(), repeated_data.start(None, None, jax.random.key(1))
    batch = rows, jax.random.key(2)
    without, some = (repeated_data.inner(params, repeated_data.both(rate), batch) for rate in (0.0, 0.5))
    np.testing.assert_allclose(without, repeated_data.outer(params, None, rows), rtol=1e-12)
    assert abs(some - without) > 0.01


# --- Many tasks -------------------------------------------------------------------------------------------


def test_activations_between_two_have_their_ends():
    z = jnp.array([-3.0, -0.5, 0.5, 3.0])
    made = [interpolated_activation.activation(z, alpha) for alpha in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(made, [[1, 0.25, 0.25, 1], [0.5, 0.125, 0.375, 2], [0, 0, 0.5, 3]])


def test_activations_have_the_gradient_of_differences(monkeypatch):
    """Of the errors that answers are judged by."""
    monkeypatch.setattr(interpolated_activation, "HIDDEN", 3)
    monkeypatch.setattr(interpolated_activation, "STEPS", 5)
    train, valid = interpolated_activation.tasks(0, 2)
    estimator = bilevel.unrolled(interpolated_activation.OPTIMIZER, steps=5, remat=False)
    key = jax.random.key(0)
    params = interpolated_activation.PROBLEM.start(None, train, key)
    problem = dataclasses.replace(interpolated_activation.PROBLEM, start=None)
    fn = jax.jit(lambda h: bilevel.hypergradient(problem, estimator)(params, h, train, valid))
    hparams = {"alpha": jnp.array([0.7, 0.4])}
    agrees(fn, hparams)
    judged = interpolated_activation.errors(hparams["alpha"], key, (train, valid))
    np.testing.assert_allclose(fn(hparams).value, judged.mean(), rtol=1e-9)


def test_the_gap_is_the_optimism_of_the_lowest():
    """Two alphas whose errors are 0 and 1 at random: that on the tasks is the lower of two binomials."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (2, 4096)).astype(float)
    one, four = interpolated_activation.gaps(values, (1, 4), 4000)
    np.testing.assert_allclose([one.mean(), four.mean()], [0.25, 0.5 - lower_of_two(4) / 4], atol=0.02)


def lower_of_two(n: int) -> float:
    """Expected lower of two binomials of n fair draws."""
    above = [sum(math.comb(n, k) for k in range(i, n + 1)) / 2**n for i in range(1, n + 1)]
    return sum(p**2 for p in above)


@pytest.fixture
def _two(monkeypatch):
    """Components, of sixteen."""
    monkeypatch.setattr(graph_kernel, "FEATURES", 2)


def one_task():
    """In float64, with a row of labels."""
    parts = graph_kernel.tasks(np.arange(600), 1, np.random.default_rng(0))
    return [
        {"y": p["y"][0], "x": np.float64(p["x"][0, :, :2]), "similarity": np.float64(p["similarity"][0])}
        for p in parts
    ]


@pytest.mark.usefixtures("_two")
def test_a_flat_kernel_says_nothing():
    """All nodes have the mean of the features then: no weights are best, as many labels are of each class."""
    train, _ = one_task()
    hparams = {"offset": 1e9, "l2": 0.1}
    np.testing.assert_array_equal(np.bincount(train["y"]), np.full(10, 2))
    value, grad = jax.value_and_grad(graph_kernel.TASK.inner)(graph_kernel.zeros(), hparams, train)
    np.testing.assert_allclose(value, np.log(10))
    for leaf in grad.values():
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


@pytest.mark.usefixtures("_two")
def test_the_kernel_has_the_gradient_of_differences():
    """At solutions found to the last digit."""
    train, valid = one_task()
    solve = bilevel.argmin(graph_kernel.TASK, bilevel.newton(atol=1e-12))

    @jax.jit
    def estimate(hparams):
        params = solve(hparams, train, graph_kernel.zeros())
        fn = bilevel.hypergradient(graph_kernel.TASK, bilevel.implicit(bilevel.dense()))
        return fn(params, hparams, train, valid)

    agrees(estimate, {"offset": 0.5, "l2": 0.02})


# --- A power of the step ----------------------------------------------------------------------------------


def test_the_law_is_a_power_of_the_step_where_it_binds():
    numbers = {"peak": 0.1, "scale": 0.3, "fall": 0.5}
    rates = bilevel.schedules.sampled(power_schedule.rate(numbers, 100), 100).values
    t = np.arange(1, 101)
    np.testing.assert_allclose(rates[:80], np.minimum(0.1, 0.3 / np.sqrt(t[:80])), rtol=1e-12)
    np.testing.assert_allclose(rates[90], 0.3 / 9 / 2)  # halfway down from that of step 80
    cosine = bilevel.schedules.sampled(power_schedule.rate({"peak": 0.1}, 100), 100).values
    np.testing.assert_allclose(cosine[50], 0.05)
    found = [power_schedule.of_numbers({"peak": 0.1, "scale": 0.3, "fall": 1e-9})]
    assert power_schedule.binding(found) == 0.0


def test_learning_the_law_is_training_by_it(monkeypatch):
    """The hypergradient is that of the loss that answers are judged by; both see the same rows."""
    monkeypatch.setattr(power_schedule, "BATCH", 4)
    monkeypatch.setattr(repeated_data, "CONTEXT", 2)
    monkeypatch.setattr(repeated_data, "HIDDEN", 4)
    steps, key = 6, jax.random.key(0)
    rows = jax.random.randint(jax.random.key(3), (24, 3), 0, repeated_data.SYMBOLS)
    key_start, key_order = jax.random.split(key)
    order = jax.random.permutation(key_order, 24).reshape(6, 4)
    estimator = bilevel.unrolled(
        power_schedule.METHOD.inner,
        steps=steps,
        remat=False,
        per_step={"lr": lambda numbers: power_schedule.rate(numbers, steps)},
    )
    problem = dataclasses.replace(power_schedule.PROBLEM, start=None)
    params = repeated_data.start(None, None, key_start)
    train = bilevel.stacked(rows[order])
    fn = jax.jit(lambda hparams: bilevel.hypergradient(problem, estimator)(params, hparams, train, rows))
    hparams = power_schedule.of_numbers({"peak": 0.3, "scale": 0.4, "fall": 0.5})
    agrees(fn, hparams)
    judged = power_schedule.judge(hparams, key, (rows, rows, rows), steps)
    np.testing.assert_allclose(fn(hparams).value, judged.valid, rtol=1e-9)


# --- Optimisers without a rate ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tuning_free.FREE)
def test_they_are_inner_optimisers_as_they_are(name):
    """Below implicit derivatives, whose closed form holds wherever params are."""
    problem = bilevel.Problem(
        lambda w, lam, batch: 0.5 * jnp.sum((w - batch) ** 2) + 0.5 * lam * jnp.sum(w**2),
        lambda w, lam, batch: 0.5 * jnp.sum((w - batch) ** 2),
    )
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), tuning_free.FREE[name], optax.sgd(0.5), inner_steps=300
    )
    first, train, valid, lam = jnp.array([0.5, -1.0]), jnp.array([3.0, 2.0]), jnp.array([1.0, 1.0]), 1.0
    state = method.init(problem, first, jnp.asarray(lam), train, valid, key=jax.random.key(0))
    state, info = jax.jit(lambda s: method.step(problem, s, train, valid))(state)
    w = np.asarray(state.params)
    assert bool(info.accepted)
    assert problem.inner(w, lam, train) < problem.inner(first, lam, train)
    grad = -w @ (w - valid) / (1 + lam)
    np.testing.assert_allclose(state.hparams, lam - 0.5 * grad, rtol=1e-10)


def test_networks_train_alone_as_they_do_together(monkeypatch):
    """By NadamW; those of fewer weights have zeros behind."""
    for name, value in {"HIDDEN": 2, "STEPS": 3, "GROUPS": 20}.items():
        monkeypatch.setattr(tuning_free, name, value)
    monkeypatch.setattr(repeated_data, "HIDDEN", 4)
    train = {
        "digits": {"x": jnp.ones((20, 1, 64)) / 64, "y": jnp.arange(20).reshape(20, 1) % 10},
        "text": jax.random.randint(jax.random.key(3), (20, 1, repeated_data.CONTEXT + 1), 0, 9),
        "diabetes": {"x": jax.random.normal(jax.random.key(4), (20, 1, 10)), "y": jnp.ones((20, 1))},
    }
    hparams = {"rate": 0.01, "forget": 0.1, "decay": 0.1, "warmup": 0.5}
    key = jax.random.key(0)
    together = tuning_free.trained(hparams, key, train)
    alone = tuning_free.trained_alone(tuning_free.nadamw(hparams), key, train)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_profile_counts_the_workloads_within_a_factor():
    found = {"a": np.array([1.0, 3.0]), "b": np.array([2.0, 1.0]), "c": np.array([1.5, np.inf])}
    curves = tuning_free.profiles(found, np.array([1.0, 1.5, 3.0]))
    expected = {"a": [0.5, 0.5, 1.0], "b": [0.5, 0.5, 1.0], "c": [0.0, 0.5, 0.5]}
    for name, curve in curves.items():
        np.testing.assert_array_equal(curve, expected[name])
