"""HOAG on the ridge problem: schedules as written, steps that come back, ends that are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import RIDGE_LOG_L2, ridge
from test_maid import PROBLEM

import bilevel
from bilevel import Status

R = ridge()


def run(method, problem=PROBLEM, start=0.0, **options):
    settings = {"steps": 100, "tol": 1e-6, "judge_every": 1, "progress": False, **options}
    return bilevel.optimize(problem, np.zeros(20), np.array(start), R.train, R.valid, method, **settings)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("geometric", lambda k: 0.1 * 0.9**k),
        ("quadratic", lambda k: 0.1 / (k + 1) ** 2),
        ("cubic", lambda k: 0.1 / (k + 1) ** 3),
        ("exact", lambda k: 1e-12 + 0 * k),
    ],
)
def test_accuracies_follow_the_schedule(schedule, at):
    h = run(bilevel.hoag(schedule), steps=12, tol=None).history
    assert not h["taken_back"].any()
    np.testing.assert_allclose(h["accuracy"], at(np.arange(12.0)), rtol=1e-12)
    # The accuracy is a distance to the inner solution, and a residual; the bound follows from it.
    assert np.all(h["solver_residual"] <= np.maximum(h["accuracy"], 1e-11))
    exact = np.array([R.hypergradient(x) for x in np.asarray(result_hparams(schedule))])
    assert np.all(np.abs(np.abs(exact) - h["grad_norm"]) <= h["error"] + 1e-12)


def result_hparams(schedule):
    return run(bilevel.hoag(schedule), steps=12, tol=None).trajectory.hparams[:12]


@pytest.mark.parametrize("schedule", ["cubic", "exact"])
def test_it_reaches_the_known_optimum(schedule):
    result = run(bilevel.hoag(schedule))
    assert result.status == Status.CONVERGED
    assert abs(float(result.hparams) - RIDGE_LOG_L2) <= 1e-4


def test_the_first_step_moves_by_one_and_each_is_made_once():
    """The released implementation subtracts the step twice."""
    result = run(bilevel.hoag("exact"), steps=5, tol=None)
    h, log_l2 = result.history, np.asarray(result.trajectory.hparams)
    np.testing.assert_allclose(log_l2[1], -1.0, rtol=1e-12)
    exact = np.array([R.hypergradient(x) for x in log_l2])
    np.testing.assert_allclose(np.diff(log_l2), -h["step_size"] * exact[:-1], rtol=1e-8)
    np.testing.assert_allclose(h["step_size"][1:] / h["step_size"][:-1], 1 / 0.95)


def test_a_bad_step_is_taken_back():
    # One parameter, outer (w - 1)^2 at w = t: from t = 1.6 the first step, of length 1, is right; a steep
    # outer makes the next ones too long.
    problem = bilevel.Problem(
        lambda w, t, x: 0.5 * (w - t) ** 2, lambda w, t, x: 10 * (w - x) ** 2 + 10 * (w - x) ** 4
    )
    result = bilevel.optimize(
        problem, np.array(1.3), np.array(1.3), np.array(1.0), np.array(1.0), bilevel.hoag("exact"), 40,
        progress=False,
    )  # fmt: skip
    h, t = result.history, np.asarray(result.trajectory.hparams)
    back = np.flatnonzero(h["taken_back"])
    assert len(back) >= 1
    k = back[0]
    # Half the step before it, from where that came.
    np.testing.assert_allclose(t[k + 1] - t[k - 1], 0.5 * (t[k] - t[k - 1]), rtol=0.06)
    np.testing.assert_allclose(result.hparams, 1.0, atol=1e-3)


def test_in_float32_and_without_constants():
    problem = bilevel.Problem(PROBLEM.inner, PROBLEM.outer)
    data = jax.tree.map(lambda x: x.astype(np.float32), (R.train, R.valid))
    result = bilevel.optimize(
        problem, np.zeros(20, np.float32), np.float32(0.0), *data, bilevel.hoag("cubic", floor=1e-6), 60,
        progress=False,
    )  # fmt: skip
    assert result.hparams.dtype == np.float32
    assert abs(float(result.hparams) - RIDGE_LOG_L2) <= 2e-2


def test_box_constraints_rest_at_an_end():
    problem = bilevel.Problem(PROBLEM.inner, PROBLEM.outer, constraints=bilevel.box(-2.0, 1.0))
    result = run(bilevel.hoag("exact"), problem, steps=30, tol=None)
    np.testing.assert_allclose(result.hparams, -2.0, atol=1e-12)


def test_populations_devices_and_checkpoints_serve_it(tmp_path):
    method = bilevel.hoag("cubic")
    starts = np.array([-6.0, 0.0])
    many = bilevel.optimize(
        PROBLEM, np.zeros((2, 20)), starts, R.train, R.valid, method, 10,
        population=bilevel.population(2), progress=False,
    )  # fmt: skip
    whole = run(method, steps=10, tol=None)
    np.testing.assert_allclose(many.member(1).history["value"], whole.history["value"], rtol=1e-9)
    spread = run(method, steps=10, tol=None, mesh=jax.make_mesh((4,), ("data",)))
    np.testing.assert_allclose(spread.history["value"], whole.history["value"], rtol=1e-10)
    run(method, steps=4, tol=None, checkpoint=tmp_path)
    again = run(method, steps=10, tol=None, checkpoint=tmp_path)
    np.testing.assert_array_equal(again.history["value"], whole.history["value"])


def test_a_diverging_outer_value_ends_the_run():
    problem = bilevel.Problem(PROBLEM.inner, lambda w, t, x: jnp.log(t) + jnp.sum(w**2))
    result = run(bilevel.hoag("exact"), problem, start=0.5, steps=20, tol=None)
    assert result.status == Status.DIVERGED
    assert np.isfinite(result.best.value)


BAD = {
    "schedule": (lambda: bilevel.hoag("linear"), ValueError, "schedule must be one of geometric"),
    "accuracy": (lambda: bilevel.hoag(accuracy=-1.0), ValueError, "accuracy must be a positive number"),
    "estimator": (lambda: bilevel.hoag(estimator=bilevel.unrolled()), TypeError, "must be bilevel.implicit"),
    "inner": (lambda: bilevel.hoag(inner=bilevel.cg()), TypeError, "inner must be an inner solver"),
    "minibatches": (
        lambda: bilevel.optimize(
            PROBLEM, np.zeros(20), np.array(0.0), bilevel.minibatches(R.train, 10), R.valid, bilevel.hoag()
        ),
        ValueError,
        "train must be arrays used whole: hoag",
    ),
    "fixed point": (
        lambda: bilevel.optimize(
            bilevel.FixedPoint(lambda w, t, x: 0.5 * w, lambda w, t, x: jnp.sum(w * t)),
            np.zeros(2), np.array(0.0), R.train, R.valid, bilevel.hoag(),
        ),
        TypeError,
        "hoag minimises an inner loss, which a FixedPoint does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
