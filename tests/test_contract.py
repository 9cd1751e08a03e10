"""Problems beyond two plain losses: fixed points, and starts of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implementations import LOG_L2, METHODS, OUTER, optimum
from problems import RIDGE, central_difference, ridge, ridge_train, ridge_valid

import bilevel

KEY = jax.random.key(0)


def run(problem, params, hparams, train, valid, method, steps, **settings):
    settings = {"progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, method, steps, **settings)


def at(problem, estimator, *args, **settings):
    """One estimate, compiled."""
    return jax.jit(functools.partial(bilevel.hypergradient(problem, estimator), **settings))(*args)


# --- Fixed points ------------------------------------------------------------------------------------------


def gradient_step(w, log_l2, batch):
    return w - 0.3 * jax.grad(ridge_train)(w, log_l2, batch)


DESCENT = bilevel.FixedPoint(gradient_step, ridge_valid)

# An estimator, and its error where |I - 0.3 H|^80 = 2e-14.
FIXED_POINT_ESTIMATORS = {
    "dense": (bilevel.implicit(bilevel.dense()), 1e-9),
    "neumann": (bilevel.implicit(bilevel.neumann(80, 1.0)), 1e-9),
    "gmres": (bilevel.implicit(bilevel.gmres(max_steps=60, tol=1e-12)), 1e-9),
    "gmres by default": (bilevel.implicit(bilevel.gmres()), 1e-6),
    "unrolled": (bilevel.unrolled(steps=80), 1e-9),
    "forward": (bilevel.forward(steps=80, truncate=75), 1e-9),
}


@pytest.mark.parametrize("name", FIXED_POINT_ESTIMATORS)
def test_a_map_of_gradient_steps_has_the_hypergradient_of_ridge(name):
    estimator, rtol = FIXED_POINT_ESTIMATORS[name]
    params = jnp.asarray(ridge().solution(LOG_L2))
    estimate = at(DESCENT, estimator, params, jnp.asarray(LOG_L2), ridge().train, ridge().valid)
    expected = ridge().hypergradient(LOG_L2)
    assert abs(float(estimate.grad) - expected) <= rtol * abs(expected)
    np.testing.assert_allclose(estimate.params, params, rtol=1e-12)


@pytest.mark.parametrize("name", ["dense", "gmres", "unrolled"])
def test_optimize_solves_a_fixed_point_problem(name):
    estimator = {
        "dense": bilevel.implicit(bilevel.dense()),
        "gmres": bilevel.implicit(bilevel.gmres(max_steps=60, tol=1e-12)),
        # The slowest direction shrinks by 1 - 0.3 * 0.1 a step there.
        "unrolled": bilevel.unrolled(),
    }[name]
    steps = 1000 if name == "unrolled" else 100
    method = bilevel.alternating(estimator, None, OUTER, inner_steps=steps)
    result = run(DESCENT, np.zeros(20), np.float64(-2.0), ridge().train, ridge().valid, method, 120)
    assert abs(float(result.hparams) - optimum(METHODS[0])) <= 1e-10


RNG = np.random.default_rng(5)
# Not symmetric, and a contraction: the largest singular value is 0.6.
MIX = RNG.standard_normal((4, 4))
MIX *= 0.6 / np.linalg.norm(MIX, 2)
ENTER, SHIFT, TARGET = RNG.standard_normal((4, 2)), RNG.standard_normal(4), RNG.standard_normal(4)


def relax(w, h, batch):
    return jnp.tanh(MIX @ w + ENTER @ h + batch)


def miss(w, h, batch):
    return 0.5 * jnp.sum((w - batch) ** 2) + 0.1 * jnp.sum(h**2)


def relaxed(h, steps=200):
    w = np.zeros(4)
    for _ in range(steps):
        w = np.tanh(MIX @ w + ENTER @ h + SHIFT)
    return w


def missed(h):
    return 0.5 * np.sum((relaxed(h) - TARGET) ** 2) + 0.1 * np.sum(h**2)


RELAX = bilevel.FixedPoint(relax, miss)


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.implicit(bilevel.dense()),
        bilevel.implicit(bilevel.gmres(tol=1e-12)),
        bilevel.implicit(bilevel.neumann(60, 1.0)),
        bilevel.unrolled(steps=60),
        bilevel.forward(steps=60),
    ],
    ids=["dense", "gmres", "neumann", "unrolled", "forward"],
)
def test_a_map_whose_jacobian_is_not_symmetric(estimator):
    h = np.array([0.3, -0.2])
    estimate = at(RELAX, estimator, jnp.asarray(relaxed(h)), jnp.asarray(h), SHIFT, TARGET)
    for i in range(2):
        expected = central_difference(missed, h, np.eye(2)[i], 1e-3)
        assert abs(float(estimate.grad[i]) - expected) <= 1e-9


@pytest.mark.parametrize("solver", [bilevel.cg(max_steps=8), bilevel.nystrom(4, 1e-9)], ids=["cg", "nystrom"])
def test_a_solver_for_symmetric_systems_is_refused_on_it(solver, request):
    h = jnp.array([0.3, -0.2])
    args = jnp.asarray(relaxed(h)), h, SHIFT, TARGET
    name = request.node.callspec.id
    words = rf"not symmetric, which bilevel\.{name}\(\) needs; take bilevel\.gmres\(\), .*neumann.*dense"
    with pytest.raises(TypeError, match=words):
        at(RELAX, bilevel.implicit(solver), *args)
    with pytest.raises(TypeError, match=words):
        bilevel.argmin(RELAX, linear_solver=solver)


def test_a_fixed_point_takes_no_inner_optimiser():
    args = jnp.zeros(4), jnp.zeros(2), SHIFT, TARGET
    for call in (
        lambda: bilevel.hypergradient(RELAX, bilevel.unrolled(optax.sgd(0.1), 3))(*args),
        lambda: bilevel.alternating(bilevel.implicit(), optax.sgd(0.1), OUTER).init(RELAX, *args, key=KEY),
    ):
        with pytest.raises(ValueError, match="inner must be None for a FixedPoint"):
            call()
    with pytest.raises(ValueError, match="batches"):
        bilevel.hypergradient(RELAX, bilevel.implicit(bilevel.dense(), batches=2))(*args)


def test_a_map_must_return_what_it_takes():
    other = bilevel.FixedPoint(lambda w, h, batch: relax(w, h, batch)[:3], miss)
    with pytest.raises(ValueError, match="update must return what it was given.*4.*3"):
        bilevel.hypergradient(other, bilevel.unrolled(steps=2))(jnp.zeros(4), jnp.zeros(2), SHIFT, TARGET)


def test_model_state_of_a_map():
    def update(w, h, batch, average):
        w = relax(w, h, batch)
        return w, 0.8 * average + 0.2 * w

    def outer(w, h, batch, average):
        return miss(w, h, batch) + jnp.vdot(average, average)

    def by_hand(h, steps=7):
        w, average = np.zeros(4), np.zeros(4)
        for _ in range(steps):
            w = np.tanh(MIX @ w + ENTER @ h + SHIFT)
            average = 0.8 * average + 0.2 * w
        return 0.5 * np.sum((w - TARGET) ** 2) + 0.1 * np.sum(h**2) + average @ average

    problem, h = bilevel.FixedPoint(update, outer, has_state=True), np.array([0.3, -0.2])
    args = jnp.zeros(4), jnp.asarray(h), SHIFT, TARGET
    for estimator in (bilevel.unrolled(steps=7), bilevel.forward(steps=7)):
        estimate = at(problem, estimator, *args, model_state=jnp.zeros(4))
        assert abs(float(estimate.value) - by_hand(h)) <= 1e-12
        for i in range(2):
            assert abs(float(estimate.grad[i]) - central_difference(by_hand, h, np.eye(2)[i], 1e-3)) <= 1e-9
    with pytest.raises(ValueError, match="model_state must be given"):
        bilevel.hypergradient(problem, bilevel.unrolled(steps=7))(*args)


# --- Starts of their own -----------------------------------------------------------------------------------

CURVATURE = np.array([0.5, 1.0, 2.0])


def bowl(w, h, batch):
    return 0.5 * jnp.sum(CURVATURE * (w - batch) ** 2) + 0.5 * jnp.exp(h["log_l2"]) * jnp.sum(w**2)


def distance(w, h, batch):
    del h
    return 0.5 * jnp.sum((w - batch) ** 2)


def scaled_start(h, batch, key):
    del key
    return jnp.sin(h["scale"]) * batch


STARTED = bilevel.Problem(bowl, distance, start=scaled_start)
STARTED_AT = {"log_l2": jnp.asarray(-1.0), "scale": jnp.asarray(0.4)}
CENTRE, GOAL = np.array([1.0, -2.0, 0.5]), np.array([0.4, 0.3, -1.0])


def from_its_start(h, steps=5):
    w = np.sin(h[1]) * CENTRE
    for _ in range(steps):
        w = w - 0.2 * (CURVATURE * (w - CENTRE) + np.exp(h[0]) * w)
    return w


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
def test_derivatives_go_through_the_start(make):
    h = np.array([-1.0, 0.4])
    loss = lambda h: 0.5 * np.sum((from_its_start(h) - GOAL) ** 2)  # noqa: E731
    expected = [central_difference(loss, h, np.eye(2)[i], 1e-3) for i in range(2)]
    assert abs(expected[1]) > 0.1
    args = STARTED_AT, CENTRE, GOAL
    for params in (None, jnp.ones(3)):  # what is given is a shape only
        estimate = at(STARTED, make(optax.sgd(0.2), 5), params, *args)
        np.testing.assert_allclose(estimate.params, from_its_start(h), rtol=1e-12)
        np.testing.assert_allclose([estimate.grad["log_l2"], estimate.grad["scale"]], expected, atol=1e-9)
    truncated = at(STARTED, make(optax.sgd(0.2), 5, truncate=2), None, *args)
    assert float(truncated.grad["scale"]) == 0.0
    np.testing.assert_allclose(truncated.value, estimate.value, rtol=1e-12)


@pytest.mark.parametrize("estimator", [bilevel.unrolled(), bilevel.implicit()], ids=["unrolled", "implicit"])
def test_every_outer_step_begins_at_the_start(estimator):
    # With momentum, so that an optimiser state that is carried over shows; hparams stay where they are.
    inner = optax.sgd(0.2, momentum=0.9)
    method = bilevel.alternating(estimator, inner, optax.sgd(1e-300), inner_steps=3)
    given = dataclasses.replace(STARTED, constraints={"scale": bilevel.fixed()})
    result = run(given, None, STARTED_AT, CENTRE, GOAL, method, 4)
    assert np.ptp(result.history["value"]) == 0.0

    w, memory = np.sin(0.4) * CENTRE, np.zeros(3)
    for _ in range(3):
        memory = 0.9 * memory + CURVATURE * (w - CENTRE) + np.exp(-1.0) * w
        w = w - 0.2 * memory
    np.testing.assert_allclose(result.params, w, rtol=1e-12)


def test_a_start_may_draw():
    drawn = dataclasses.replace(
        STARTED, start=lambda h, batch, key: h["scale"] * jax.random.normal(key, (3,))
    )
    method = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.2), optax.sgd(1e-300), inner_steps=1)
    runs = [run(drawn, None, STARTED_AT, CENTRE, GOAL, method, 4, key=KEY).history["value"] for _ in range(2)]
    assert len(set(runs[0].tolist())) == 4
    np.testing.assert_array_equal(*runs)


TASKS = np.random.default_rng(2).standard_normal((5, 3))
MAML = bilevel.Problem(
    lambda w, h, batch: 0.5 * jnp.sum(CURVATURE * (w - batch) ** 2),
    distance,
    start=lambda h, batch, key: h["init"],
)
META = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.2), optax.sgd(1.0), inner_steps=2)


def test_a_learned_initialisation_moves_to_the_optimum_of_the_tasks():
    # After T steps w - c = (1 - eta d)^T (init - c): the loss over tasks is smallest at the mean of c, and a
    # step of gradient descent multiplies the distance by 1 - (1 - eta d)^4, at most 0.87.
    h = {"init": np.zeros(3)}
    whole = run(bilevel.lift(MAML), None, h, TASKS, TASKS, META, 200)
    np.testing.assert_allclose(whole.hparams["init"], TASKS.mean(0), atol=1e-10)
    stacks = bilevel.episodes((TASKS, TASKS) for _ in range(200))
    fed = run(bilevel.lift(MAML), None, h, stacks, None, META, 200)
    np.testing.assert_allclose(fed.hparams["init"], whole.hparams["init"], rtol=1e-12)
    # One task after the other, in the order of the list, ends near it.
    pairs = bilevel.episodes([(task, task) for _ in range(20) for task in TASKS])
    slow = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.2), optax.sgd(0.02), inner_steps=2)
    online = run(MAML, None, h, pairs, None, slow, 100)
    assert np.linalg.norm(online.hparams["init"] - TASKS.mean(0)) < 0.8 * np.linalg.norm(TASKS.mean(0))


def test_a_start_that_ignores_hparams_influences_nothing():
    idle = dataclasses.replace(MAML, start=lambda h, batch, key: jnp.zeros(3))
    for params in (None, np.zeros(3)):
        with pytest.raises(ValueError, match=r"hparams\['init'\] influences neither"):
            run(idle, params, {"init": np.zeros(3)}, CENTRE, GOAL, META, 2)


def test_implicit_gradients_see_nothing_of_a_start():
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.2), optax.sgd(1.0), inner_steps=2)
    with pytest.raises(ValueError, match=r"hparams\['init'\] acts through start only.*implicit\(\) sees"):
        run(MAML, None, {"init": np.zeros(3)}, CENTRE, GOAL, method, 3)


@pytest.mark.parametrize(
    ("start", "params", "error", "words"),
    [
        (lambda h, batch, key: h["init"][:2], np.zeros(3), ValueError, r"start must return.*3.*2"),
        (lambda h, batch, key: {"w": h["init"]}, np.zeros(3), ValueError, "start must return.*w: float64"),
        (lambda h, batch, key: h["init"].astype(jnp.float32), np.zeros(3), ValueError, "start .*float32"),
        (lambda h, batch: h["init"], None, TypeError, r"start is called as start\(hparams, batch, key\)"),
        (lambda h, batch, key: h["begin"], None, ValueError, r"start\(hparams, batch, key\) failed.*begin"),
        (lambda h, batch, key: jnp.arange(3), None, TypeError, r"start\(hparams, batch, key\) must be float"),
        (lambda h, batch, key: {}, None, ValueError, r"start\(hparams, batch, key\) must hold"),
    ],
)
def test_a_start_that_does_not_fit(start, params, error, words):
    problem = dataclasses.replace(MAML, start=start)
    h = {"init": jnp.zeros(3)}
    for call in (
        lambda: run(problem, params, h, CENTRE, GOAL, META, 2),
        lambda: META.init(problem, params, h, CENTRE, GOAL, key=KEY),
        lambda: bilevel.hypergradient(problem, bilevel.unrolled(optax.sgd(0.2), 2))(params, h, CENTRE, GOAL),
    ):
        with pytest.raises(error, match=words):
            call()


def test_params_may_be_none_only_with_a_start():
    with pytest.raises(ValueError, match="params must hold"):
        run(RIDGE, None, np.float64(-1.0), ridge().train, ridge().valid, META, 2)
