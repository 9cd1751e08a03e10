"""MAID on the ridge problem: every step lowers the exact outer value, and any first accuracy will do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import RIDGE, RIDGE_LOG_L2, ridge

import bilevel
from bilevel import Status

R = ridge()
EIGENVALUES = np.linalg.eigvalsh(R.a.T @ R.a / R.b.size)
SMOOTH = bilevel.Smoothness(
    strong_convexity=lambda log_l2: EIGENVALUES[0] + jnp.exp(log_l2),
    inner=lambda log_l2: EIGENVALUES[-1] + jnp.exp(log_l2),
    outer=float(np.linalg.eigvalsh(R.v.T @ R.v / R.c.size)[-1]),
    cross=jnp.exp,
)
PROBLEM = dataclasses.replace(RIDGE, smoothness=SMOOTH)
ARMIJO = 1e-8
METHOD = bilevel.maid(descent=1e-4, armijo=ARMIJO)


def run(method=METHOD, problem=PROBLEM, start=0.0, **options):
    settings = {"steps": 100, "tol": 1e-6, "judge_every": 1, "progress": False, **options}
    return bilevel.optimize(problem, np.zeros(20), np.array(start), R.train, R.valid, method, **settings)


@pytest.mark.parametrize("accuracy", [1.0, 0.1, 1e-3, 1e-5])
def test_the_end_does_not_depend_on_the_first_accuracy(accuracy):
    result = run(bilevel.maid(accuracy=accuracy, descent=1e-4, armijo=ARMIJO))
    assert result.status == Status.CONVERGED
    assert len(result.history["value"]) <= 30
    assert abs(float(result.hparams) - RIDGE_LOG_L2) <= 2e-5
    assert result.history["grad_norm"][-1] + result.history["error"][-1] <= 1e-6


@pytest.mark.parametrize("step_size", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("certify", [True, False])
def test_every_step_lowers_the_exact_value(step_size, certify):
    settings = {"step_size": step_size, "certify": certify}
    result = run(dataclasses.replace(METHOD, **settings), steps=20, tol=None)
    h = result.history
    # A run that has converged so far that rounding decides may end.
    assert result.status == Status.BUDGET or h["grad_norm"][-1] < 1e-5
    log_l2 = np.asarray(result.trajectory.hparams)
    exact = np.array([R.value(x) for x in log_l2])
    grads = np.array([R.hypergradient(x) for x in log_l2])[: len(h["value"])]
    for k in range(len(h["value"]) - (result.status != Status.BUDGET)):
        decrease = ARMIJO * h["step_size"][k] * h["grad_norm"][k] ** 2
        assert exact[k + 1] - exact[k] <= -decrease + 1e-14
        assert h["lower"][k] - 1e-14 <= exact[k] <= h["upper"][k] + 1e-14
    size, omega = h["grad_norm"], h["error"]
    if certify:
        assert np.all(np.abs(size - np.abs(grads)) <= omega + 1e-14)
        assert np.all(omega <= (1 - METHOD.descent) * size + 1e-14)


def test_accuracies_tighten_together_and_grow_after_a_success():
    h = run(steps=12, tol=None).history
    np.testing.assert_allclose(h["accuracy"], h["linear_accuracy"])
    ratios = h["accuracy"][1:] / h["accuracy"][:-1]
    halvings = np.log(METHOD.accuracy_grow / ratios) / np.log(2)
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-9)
    assert np.all(np.round(halvings) >= h["tightened"][1:])
    # The first trial of a step is larger by ``grow`` than the one accepted before it.
    first = METHOD.grow * h["step_size"][:-1] / h["step_size"][1:]
    np.testing.assert_allclose(np.log2(first), np.round(np.log2(first)), atol=1e-9)


@pytest.mark.parametrize(("accuracy", "gap"), [(1e-1, 1e-1), (1e-2, 1e-2), (1e-3, 1e-3), (1e-5, 1e-5)])
def test_a_fixed_accuracy_ends_at_a_gap_of_its_own_size(accuracy, gap):
    fixed = bilevel.maid(
        accuracy=accuracy, certify=False, accuracy_grow=1.0, max_rounds=1, descent=1e-4, armijo=ARMIJO
    )
    result = run(fixed, steps=200, tol=None)
    assert "The line search is exhausted" in result.message
    left = float(result.history["value"][-1]) - R.value(RIDGE_LOG_L2)
    assert gap / 20 < left < 5 * gap


@pytest.mark.parametrize("accuracy", [0.1, 1e-3, 1e-5])
def test_the_quadratic_problem(accuracy):
    """Section 4.1 of the paper, with singular values from 1 to 2."""
    rng = np.random.default_rng(0)

    def matrix():
        return np.linalg.qr(rng.standard_normal((100, 4)))[0] * np.linspace(1, 2, 4)

    a1, a2, a3 = matrix(), matrix(), matrix()
    x1, x2, first = (rng.uniform(size=4) for _ in range(3))
    b1 = a1 @ x1 + 0.01 * rng.standard_normal(100)
    b2 = a2 @ x2 + a3 @ first + 0.01 * rng.standard_normal(100)
    hessian = a2.T @ a2
    to_x = np.linalg.solve(hessian, a2.T)
    m, offset = a1 @ to_x @ a3, a1 @ to_x @ b2 - b1
    best = np.linalg.lstsq(m, offset, rcond=None)[0]
    lowest = 0.5 * np.sum((offset - m @ best) ** 2)
    eigenvalues = np.linalg.eigvalsh(hessian)
    problem = bilevel.Problem(
        lambda x, theta, data: 0.5 * jnp.sum((data[0] @ x + data[1] @ theta - data[2]) ** 2),
        lambda x, theta, data: 0.5 * jnp.sum((data[0] @ x - data[1]) ** 2),
        smoothness=bilevel.Smoothness(
            float(eigenvalues[0]), float(eigenvalues[-1]), float(np.linalg.eigvalsh(a1.T @ a1)[-1])
        ),
    )
    method = bilevel.maid(
        accuracy=accuracy,
        step_size=1 / float(np.linalg.eigvalsh(m.T @ m)[-1]),
        descent=1e-4,
        armijo=ARMIJO,
    )
    result = bilevel.optimize(
        problem, x2, np.ones(4), (a2, a3, b2), (a1, b1), method, 400, tol=1e-6, judge_every=1, progress=False
    )
    assert result.status == Status.CONVERGED
    exact = 0.5 * np.sum((offset - m @ np.asarray(result.hparams)) ** 2)
    assert exact - lowest < 1e-10
    np.testing.assert_allclose(result.hparams, best, atol=2e-4)


OPTIONS = {
    "barzilai_borwein": {"barzilai_borwein": True},
    "non_monotone": {"non_monotone": 0.85},
    "both": {"barzilai_borwein": True, "non_monotone": 0.85},
}


@pytest.mark.parametrize("step_size", [1e-2, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_the_search_reach_the_same_end(options, step_size):
    method = bilevel.maid(descent=1e-4, armijo=ARMIJO, step_size=step_size, **options)
    result = run(method)
    assert result.status == Status.CONVERGED
    assert abs(float(result.hparams) - RIDGE_LOG_L2) <= 2e-5
    exact = np.array([R.value(x) for x in np.asarray(result.trajectory.hparams)])
    if "non_monotone" not in options:
        assert np.all(np.diff(exact) < 1e-14)
    if "barzilai_borwein" in options and step_size < 1:
        assert len(result.history["value"]) < 40  # growing steps alone take 68


def test_a_non_monotone_search_compares_with_a_mean():
    method = bilevel.maid(descent=1e-4, armijo=ARMIJO, step_size=60.0, non_monotone=0.85)
    result = run(method, steps=12, tol=None)
    h, log_l2 = result.history, np.asarray(result.trajectory.hparams)
    mean, weight = 0.0, 0.0
    for k, lower in enumerate(h["lower"][:-1]):
        mean, weight = (0.85 * weight * mean + lower) / (0.85 * weight + 1), 0.85 * weight + 1
        limit = max(mean, lower) - ARMIJO * h["step_size"][k] * h["grad_norm"][k] ** 2
        assert R.value(log_l2[k + 1]) <= limit + 1e-14


def test_an_optimum_at_infinity_is_named():
    # outer falls for ever: w = x / (1 + exp(t)) goes to its target 0 only as t grows.
    problem = bilevel.Problem(
        lambda w, t, x: 0.5 * jnp.sum((w - x) ** 2) + 0.5 * jnp.exp(t) * jnp.sum(w**2),
        lambda w, t, x: 0.5 * jnp.sum(w**2),
        smoothness=bilevel.Smoothness(lambda t: 1 + jnp.exp(t), lambda t: 1 + jnp.exp(t), 1.0, cross=jnp.exp),
    )
    x = np.ones(2)
    result = bilevel.optimize(problem, x, np.array(0.0), x, x, bilevel.maid(), 3000, progress=False)
    assert result.status == Status.STALLED
    assert "The optimum seems to lie at infinity" in result.message
    assert "bilevel.interval" in result.message
    assert float(result.hparams) > 8


def test_a_run_that_begins_at_the_optimum_has_converged():
    problem = bilevel.Problem(
        lambda w, t, x: 0.5 * jnp.sum((w - t) ** 2),
        lambda w, t, x: 0.5 * jnp.sum((w - x) ** 2),
        smoothness=bilevel.Smoothness(1.0, 1.0, 1.0),
    )
    x = np.ones(2)
    start = x + 1e-9
    result = bilevel.optimize(problem, start, start, x, x, bilevel.maid(), 20, tol=1e-3, progress=False)
    assert result.status == Status.CONVERGED


def test_a_population_is_as_many_runs():
    starts = np.array([-6.0, -2.0, 0.0, 1.0])
    members = bilevel.population(4)
    options = {"population": members, "steps": 15, "tol": None}
    many = bilevel.optimize(
        PROBLEM, np.zeros((4, 20)), starts, R.train, R.valid, METHOD, **options, progress=False
    )
    for i, start in enumerate(starts):
        one = run(start=start, steps=15, tol=None)
        np.testing.assert_allclose(many.member(i).history["value"], one.history["value"], rtol=1e-9)


def test_devices_and_checkpoints_serve_it(tmp_path):
    mesh = jax.make_mesh((4,), ("data",))
    whole = run(steps=12, tol=None)
    spread = run(steps=12, tol=None, mesh=mesh)
    np.testing.assert_allclose(spread.history["value"], whole.history["value"], rtol=1e-10)
    run(steps=5, tol=None, checkpoint=tmp_path / "run")
    again = run(steps=12, tol=None, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(again.history["value"], whole.history["value"])


def test_the_accuracy_floor_is_named():
    result = run(bilevel.maid(floor=1e-3), steps=100, tol=None)
    assert result.status == Status.STALLED
    assert "The accuracy floor is reached" in result.message
    assert np.isfinite(result.best.value)


def test_an_exhausted_line_search_is_named():
    method = bilevel.maid(step_size=1e12, max_backtracks=2, max_rounds=2)
    result = run(method)
    assert result.status == Status.STALLED
    assert "The line search is exhausted after 5 trials" in result.message
    assert "smaller step_size" in result.message


def whole(**changes):
    arguments = {
        "problem": PROBLEM,
        "params": np.zeros(20),
        "hparams": np.array(0.0),
        "train": R.train,
        "valid": R.valid,
        "method": METHOD,
        "progress": False,
        **changes,
    }
    return lambda: bilevel.optimize(**arguments)


BAD = {
    "no constants": (whole(problem=RIDGE), ValueError, r"maid needs a Problem with smoothness="),
    "float32": (
        whole(params=np.zeros(20, np.float32)), TypeError, r"maid needs float64, got params of.*float32",
    ),
    "minibatches": (
        whole(train=bilevel.minibatches(R.train, 10)), ValueError, r"train must be arrays used whole",
    ),
    "box": (
        whole(problem=dataclasses.replace(PROBLEM, constraints=bilevel.box(-1, 1))),
        ValueError,
        r"refuses.*box",
    ),
    "armijo": (
        lambda: bilevel.maid(descent=0.1, armijo=0.1), ValueError, r"armijo < descent < 1.*armijo=0.1",
    ),
    "shrink": (lambda: bilevel.maid(shrink=1.0), ValueError, r"shrink must be below 1, got 1"),
    "grow": (lambda: bilevel.maid(grow=0.5), ValueError, r"grow must be at least 1, got 0.5"),
    "accuracy": (lambda: bilevel.maid(accuracy=0.0), ValueError, r"accuracy must be a positive number"),
    "gauss_newton": (
        lambda: bilevel.maid(bilevel.implicit(curvature="gauss_newton")), ValueError, r'curvature="hessian"',
    ),
    "non_monotone": (lambda: bilevel.maid(non_monotone=1.0), ValueError, r"non_monotone must be below 1"),
    "start": (
        whole(problem=dataclasses.replace(PROBLEM, start=lambda h, x, key: np.zeros(20)), params=None),
        ValueError,
        r"maid goes on from where it stands",
    ),
    "unrolled": (lambda: bilevel.maid(bilevel.unrolled()), TypeError, r"estimator must be bilevel.implicit"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_tolerance_counts_estimated_bounds_in():
    estimated = dataclasses.replace(SMOOTH, estimated=True)
    result = run(problem=dataclasses.replace(RIDGE, smoothness=estimated))
    assert result.status == Status.CONVERGED
    sums = result.history["grad_norm"] + result.history["error"]
    assert sums[-1] <= 1e-6
    assert np.all(sums[:-1] > 1e-6)
