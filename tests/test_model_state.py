"""Mutable model state: advanced by inner steps, returned, differentiated through; BatchNorm."""

import dataclasses
import functools

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import central_difference

import bilevel

KEY = jax.random.key(0)


def run(problem, params, hparams, train, valid, method, steps, **settings):
    settings = {"progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, method, steps, **settings)


def at(problem, estimator, *args, **settings):
    """One estimate, compiled."""
    return jax.jit(functools.partial(bilevel.hypergradient(problem, estimator), **settings))(*args)


# --- A running mean ---------------------------------------------------------------------------------------

RATE = 0.3
FEATURES = np.random.default_rng(4).standard_normal((12, 3)) + np.array([1.0, -0.5, 2.0])
LABELS = FEATURES @ np.array([1.0, 0.5, -1.0]) + 0.1 * np.random.default_rng(6).standard_normal(12)
ROWS = (FEATURES[:8], LABELS[:8]), (FEATURES[8:], LABELS[8:])


def centred_train(w, h, batch, state):
    """Features less a running mean, through which derivatives flow."""
    x, y = batch
    mean = (1 - RATE) * state["mean"] + RATE * jnp.mean(x * (1 + h["shift"]), 0)
    loss = jnp.mean(((x - mean[None]) @ w - y) ** 2) + jnp.exp(h["log_l2"]) * jnp.sum(w**2)
    return loss, {"mean": mean, "steps": state["steps"] + 1}


def centred_valid(w, h, batch, state):
    x, y = batch
    return jnp.mean(((x - state["mean"][None]) @ w - y) ** 2), {"seen": state["steps"]}


CENTRED = bilevel.Problem(centred_train, centred_valid, has_state=True)
FRESH = {"mean": np.zeros(3), "steps": np.int32(0)}
CENTRED_AT = {"log_l2": np.float64(-2.0), "shift": np.float64(0.2)}


def centred_end(h, w, mean, steps, train, valid):
    """``(w, mean, outer)`` after so many gradient steps of 0.05; ``h`` is (log_l2, shift)."""
    (x, y), (v, c) = train, valid
    for _ in range(steps):
        mean = (1 - RATE) * mean + RATE * x.mean(0) * (1 + h[1])
        gradient = 2 * (x - mean).T @ ((x - mean) @ w - y) / y.size + 2 * np.exp(h[0]) * w
        w = w - 0.05 * gradient
    return w, mean, np.mean(((v - mean) @ w - c) ** 2)


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
def test_derivatives_go_through_the_model_state(make):
    h = np.array([-2.0, 0.2])
    loss = lambda h: centred_end(h, np.zeros(3), np.zeros(3), 6, *ROWS)[2]  # noqa: E731
    estimate = at(
        CENTRED, make(optax.sgd(0.05), 6), jnp.zeros(3), CENTRED_AT, *ROWS, model_state=FRESH
    )  # fmt: skip
    assert abs(float(estimate.value) - loss(h)) <= 1e-12
    expected = [central_difference(loss, h, np.eye(2)[i], 1e-3) for i in range(2)]
    assert abs(expected[1]) > 0.1  # it acts through the state alone
    np.testing.assert_allclose([estimate.grad["log_l2"], estimate.grad["shift"]], expected, atol=1e-9)
    assert int(estimate.point.model_state["steps"]) == 6


def test_model_state_is_advanced_by_inner_steps_only(tmp_path):
    method = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.05), optax.sgd(0.5), inner_steps=3)
    result = run(CENTRED, np.zeros(3), CENTRED_AT, *ROWS, method, 6, model_state=FRESH, test=ROWS[1])
    h, w, mean, values, ends = np.array([-2.0, 0.2]), np.zeros(3), np.zeros(3), [], []
    for _ in range(6):
        loss = lambda h, w=w, mean=mean: centred_end(h, w, mean, 3, *ROWS)[2]  # noqa: E731
        gradient = [central_difference(loss, h, np.eye(2)[i], 1e-3) for i in range(2)]
        w, mean, value = centred_end(h, w, mean, 3, *ROWS)
        h = h - 0.5 * np.array(gradient)
        values.append(value)
        ends.append((w, mean))
    np.testing.assert_allclose(result.history["value"], values, rtol=1e-9)
    np.testing.assert_allclose(result.params, w, rtol=1e-9)
    np.testing.assert_allclose(result.model_state["mean"], mean, rtol=1e-9)
    assert int(result.model_state["steps"]) == 18
    np.testing.assert_array_equal(result.history["seen"], 3 * np.arange(1, 7))
    # The best pair with the state that it was judged with.
    best = int(np.argmin(values))
    assert result.best.step == best
    np.testing.assert_allclose(result.best.model_state["mean"], ends[best][1], rtol=1e-9)
    assert abs(result.test["best"]["value"] - result.best.value) <= 1e-12
    result.save(tmp_path / "run.bilevel")
    loaded = bilevel.load(tmp_path / "run.bilevel")
    chex.assert_trees_all_equal(loaded.model_state, jax.device_get(result.model_state))
    chex.assert_trees_all_equal(loaded.best.model_state, jax.device_get(result.best.model_state))


def test_implicit_gradients_hold_model_state_constant():
    w, mean = np.array([0.3, -0.2, 0.1]), np.array([0.5, 0.1, 1.0])
    state = {"mean": mean, "steps": np.int32(3)}
    estimate = at(CENTRED, bilevel.implicit(bilevel.dense()), w, CENTRED_AT, *ROWS, model_state=state)

    def gradient(h):
        x, y = ROWS[0]
        after = (1 - RATE) * mean + RATE * x.mean(0) * (1 + h[1])
        return 2 * (x - after).T @ ((x - after) @ w - y) / y.size + 2 * np.exp(h[0]) * w

    h, (x, y), (v, c) = np.array([-2.0, 0.2]), *ROWS
    after = (1 - RATE) * mean + RATE * x.mean(0) * 1.2
    hessian = 2 * (x - after).T @ (x - after) / y.size + 2 * np.exp(-2.0) * np.eye(3)
    # outer sees the state as it stands, not the one that another inner step would make
    adjoint = np.linalg.solve(hessian, 2 * (v - mean).T @ ((v - mean) @ w - c) / c.size)
    for i, name in enumerate(("log_l2", "shift")):
        cross = central_difference(lambda h: gradient(h) @ adjoint, h, np.eye(2)[i], 1e-3)
        assert abs(float(estimate.grad[name]) + cross) <= 1e-9
    chex.assert_trees_all_equal(estimate.point.model_state, jax.tree.map(jnp.asarray, state))


METHOD = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.1), optax.sgd(0.1), inner_steps=2)
PLAIN = bilevel.Problem(
    lambda w, h, batch: jnp.exp(h["log_l2"] + h["shift"]) * jnp.sum(w**2), lambda w, h, batch: jnp.sum(w)
)
STATE_ERRORS = [
    ("missing", CENTRED, None, ValueError, "model_state must be given.*has_state=True"),
    ("not asked for", PLAIN, FRESH, ValueError, "model_state is given.*without has_state"),
    (
        "another shape",
        dataclasses.replace(
            CENTRED, inner=lambda w, h, b, s: (centred_train(w, h, b, s)[0], {**s, "mean": s["mean"][:2]})
        ),
        FRESH,
        ValueError,
        r"inner's model_state must return.*float64\[3\].*float64\[2\]",
    ),
    (
        "another dtype",
        dataclasses.replace(
            CENTRED, inner=lambda w, h, b, s: (centred_train(w, h, b, s)[0], {**s, "steps": s["mean"][0]})
        ),
        FRESH,
        ValueError,
        r"inner's model_state must return.*int32\[\].*float64\[\]",
    ),
    (
        "another structure",
        dataclasses.replace(CENTRED, inner=lambda w, h, b, s: (centred_train(w, h, b, s)[0], s["mean"])),
        FRESH,
        ValueError,
        "inner's model_state must return.*steps",
    ),
    (
        "no state returned",
        dataclasses.replace(CENTRED, inner=lambda w, h, b, s: centred_train(w, h, b, s)[0]),
        FRESH,
        TypeError,
        r"inner must return \(loss, model_state\)",
    ),
    (
        "three arguments",
        dataclasses.replace(CENTRED, inner=lambda w, h, b: jnp.sum(w)),
        FRESH,
        TypeError,
        r"inner is called as inner\(params, hparams, batch, model_state\)",
    ),
    (
        "three arguments outside",
        dataclasses.replace(CENTRED, outer=lambda w, h, b: jnp.sum(w)),
        FRESH,
        TypeError,
        r"outer is called as outer\(params, hparams, batch, model_state\)",
    ),
    (
        "a composite loss",
        dataclasses.replace(CENTRED, inner=bilevel.composite(lambda *a: a[0], lambda *a: jnp.sum(a[0]))),
        FRESH,
        TypeError,
        r"inner is called as inner\(params, hparams, batch, model_state\)",
    ),
]


@pytest.mark.parametrize(
    ("problem", "state", "error", "words"),
    [row[1:] for row in STATE_ERRORS],
    ids=[r[0] for r in STATE_ERRORS],
)
def test_model_state_that_does_not_fit(problem, state, error, words):
    args = problem, np.zeros(3), CENTRED_AT, *ROWS
    for call in (
        lambda: run(*args, METHOD, 2, model_state=state),
        lambda: METHOD.init(*args, key=KEY, model_state=state),
        lambda: bilevel.hypergradient(problem, bilevel.unrolled(optax.sgd(0.1), 2))(
            *args[1:], model_state=state
        ),
        lambda: bilevel.hypergradient(problem)(*args[1:], model_state=state),
    ):
        with pytest.raises(error, match=words):
            call()


# --- BatchNorm --------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))[:, 0]


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train: bool):
        x = flax.linen.Dense(4)(x)
        x = flax.linen.BatchNorm(momentum=0.8, use_running_average=not train)(x)
        return flax.linen.Dense(1)(jnp.tanh(x))[:, 0]


def penalised(log_l2, params, residual):
    return jnp.mean(residual**2) + jnp.exp(log_l2) * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))


def nnx_recipe():
    """``(inner, outer, params, statistics)``."""
    graph, params, statistics = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def inner(params, log_l2, batch, statistics):
        model = nnx.merge(graph, params, statistics, copy=True)
        model.train()
        loss = penalised(log_l2, params, model(batch[0]) - batch[1])
        return loss, nnx.state(model, nnx.BatchStat)

    def outer(params, log_l2, batch, statistics):
        model = nnx.merge(graph, params, statistics, copy=True)
        model.eval()
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    return inner, outer, params, statistics


def linen_recipe():
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.zeros((2, 3), jnp.float32), train=True)

    def inner(params, log_l2, batch, statistics):
        out, new = net.apply(
            {"params": params, "batch_stats": statistics}, batch[0], train=True, mutable=["batch_stats"]
        )
        return penalised(log_l2, params, out - batch[1]), new["batch_stats"]

    def outer(params, log_l2, batch, statistics):
        out = net.apply({"params": params, "batch_stats": statistics}, batch[0], train=False)
        return jnp.mean((out - batch[1]) ** 2)

    return inner, outer, variables["params"], variables["batch_stats"]


def rows32():
    """64 and 32 rows in float32, as the models are."""
    rng = np.random.default_rng(8)
    x = (2.0 * rng.standard_normal((96, 3)) + 1.0).astype(np.float32)
    y = (np.sin(x[:, 0]) + 0.2 * rng.standard_normal(96)).astype(np.float32)
    return (x[:64], y[:64]), (x[64:], y[64:])


ADAM = optax.adam(0.03, eps_root=1e-8)


# Batch normalisation makes the loss flat along the scale of a layer, so that its Hessian is not definite.
@pytest.mark.filterwarnings("ignore:The inner Hessian was not positive definite:RuntimeWarning")
@pytest.mark.parametrize(
    ("recipe", "estimator"),
    [
        (nnx_recipe, bilevel.unrolled(remat=False)),
        (nnx_recipe, bilevel.implicit(bilevel.neumann(5, 0.05))),
        (linen_recipe, bilevel.unrolled(remat=False)),
    ],
    ids=["nnx unrolled", "nnx implicit", "linen unrolled"],
)
def test_batch_norm_trains_and_tunes(recipe, estimator):
    inner, outer, params, statistics = recipe()
    problem = bilevel.Problem(inner, outer, has_state=True)
    train, valid = rows32()
    method = bilevel.alternating(estimator, ADAM, optax.adam(0.1), inner_steps=10)
    source, start = bilevel.minibatches(train, 32), np.float32(-3.0)
    result = run(problem, params, start, source, valid, method, 40, model_state=statistics)
    assert result.status == bilevel.Status.BUDGET
    assert result.history["accepted"].all()
    assert result.history["value"][-1] < 0.5 * result.history["value"][0]
    assert float(result.hparams) < -4.0  # the penalty that it starts with is too large
    chex.assert_trees_all_equal_shapes_and_dtypes(result.model_state, statistics)
    for before, after in zip(*map(jax.tree.leaves, (statistics, result.model_state)), strict=True):
        assert np.abs(before - after).min() > 0.01
    measured = outer(result.params, result.hparams, valid, result.model_state)
    best = outer(result.best.params, result.best.hparams, valid, result.best.model_state)
    assert abs(float(measured) - result.history["value"][-1]) <= 1e-5
    assert abs(float(best) - result.best.value) <= 1e-5


def test_statistics_among_params_are_never_updated():
    # The trap that has_state is for: the training loss does not depend on the running statistics, so that no
    # optimiser moves them, and validation is measured with those of the start.
    inner, outer, weights, statistics = linen_recipe()
    problem = bilevel.Problem(
        lambda p, h, batch: inner(p["weights"], h, batch, p["statistics"])[0],
        lambda p, h, batch: outer(p["weights"], h, batch, p["statistics"]),
    )
    args = {"weights": weights, "statistics": statistics}, jnp.float32(-3.0), *rows32()
    estimate = at(problem, bilevel.one_step(optax.sgd(0.1)), *args)
    chex.assert_trees_all_equal(jax.device_get(estimate.params["statistics"]), jax.device_get(statistics))
    assert not np.array_equal(*(jax.tree.leaves(p["weights"])[1] for p in (estimate.params, args[0])))
    # Adam's derivative is nan there, which is refused before the run.
    adam = bilevel.alternating(bilevel.unrolled(), optax.adam(0.03), optax.sgd(0.1), inner_steps=5)
    with pytest.raises(ValueError, match=r"params\['statistics'\].*eps_root"):
        run(problem, *args, adam, 5)
    # The Hessian is singular there, and the linear system has no solution.
    assert float(at(problem, bilevel.implicit(bilevel.cg(max_steps=10)), *args).error) > 0.1


def test_a_hyperparameter_that_acts_through_the_state_alone():
    """The loss reads the old state and beta makes the new one: seen from the second step on."""

    def inner(w, h, batch, mean):
        return 0.5 * (w - mean) ** 2, h * mean + (1 - h) * batch

    def by_hand(beta, steps=10):
        w, mean = 0.0, 0.0
        for _ in range(steps):
            w, mean = w - 0.2 * (w - mean), beta * mean + (1 - beta)
        return 0.5 * (w - 2.0) ** 2

    problem = bilevel.Problem(inner, lambda w, h, batch, mean: 0.5 * (w - batch) ** 2, has_state=True)
    args = jnp.float64(0.0), jnp.float64(0.5), jnp.float64(1.0), jnp.float64(2.0)
    slope = (by_hand(0.5 + 1e-6) - by_hand(0.5 - 1e-6)) / 2e-6
    for estimator in (bilevel.unrolled, bilevel.forward):
        fn = bilevel.hypergradient(problem, estimator(optax.sgd(0.2), 10))
        np.testing.assert_allclose(fn(*args, model_state=jnp.float64(0.0)).grad, slope, rtol=1e-7)
    for estimator in (bilevel.unrolled(optax.sgd(0.2), 1), bilevel.implicit()):
        with pytest.raises(ValueError, match="hparams influences neither inner nor outer"):
            bilevel.hypergradient(problem, estimator)(*args, model_state=jnp.float64(0.0))
