"""The check of hypergradients passes what is right and says what is wrong with the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import LOGISTIC, RIDGE, logistic_data, logistic_solution, ridge

import bilevel
from bilevel.check import check_hypergradient
from bilevel.estimators.implicit import Implicit
from bilevel.inner_loops import lbfgs, picard

LOG_L2 = jnp.linspace(-2.0, 0.0, 20)
SOLUTION = jnp.asarray(ridge().solution(np.asarray(LOG_L2)))
SGD = optax.sgd(0.25)


def exact(params, log_l2, batch):
    """Ridge regression's own solver: nothing to compile."""
    a, b = batch
    penalty = jnp.diag(jnp.broadcast_to(jnp.exp(log_l2), params.shape))
    return jnp.linalg.solve(a.T @ a / b.size + penalty, a.T @ b / b.size)


def check(estimator=None, params=SOLUTION, problem=RIDGE, hparams=LOG_L2, **kwargs):
    kwargs = {
        "verbose": False,
        "solver": exact if getattr(problem, "inner", None) is RIDGE.inner else None,
    } | kwargs
    return check_hypergradient(problem, estimator, params, hparams, ridge().train, ridge().valid, **kwargs)


class Broken(Implicit):
    """Forgets a percent of the gradient."""

    def estimate(self, *args):
        estimate, state = super().estimate(*args)
        return dataclasses.replace(estimate, grad=0.99 * estimate.grad), state


def test_a_right_implicit_gradient_passes_and_both_derivatives_are_the_closed_form():
    found = check(keys=3, solver=None)
    assert found.ok
    assert not found.advice
    assert found.error_kind == "residual"
    assert max(found.inner_residual, found.solver_residual) < 1e-13
    assert np.all(found.relative_errors < 1e-6)
    assert np.all(found.uncertainties < 1e-9)
    # Unit vectors in the 20 free units: the derivative is that of the closed form along them.
    assert found.estimated.shape == found.differences.shape == (3,)
    assert np.all(np.abs(found.differences) <= np.linalg.norm(ridge().hypergradient(np.asarray(LOG_L2))))
    one = check(hparams=jnp.float64(-1.0), params=jnp.asarray(ridge().solution(-1.0)))
    np.testing.assert_allclose(np.abs(one.differences), np.abs(ridge().hypergradient(-1.0)), rtol=1e-9)


def test_a_wrong_gradient_is_flagged():
    found = check(Broken(bilevel.cg(), "hessian", 0))
    assert not found.ok
    np.testing.assert_allclose(found.estimated, 0.99 * found.differences, rtol=1e-6)
    assert "bug in an estimator" in found.advice[-1]


def test_a_truncated_linear_solve_is_flagged():
    for solver in (bilevel.cg(max_steps=2), bilevel.neumann(3, 0.2)):
        found = check(bilevel.implicit(solver))
        assert not found.ok
        assert len(found.advice) == 1
        assert "raise max_steps or lower tol" in found.advice[0]


def test_an_inner_problem_that_is_not_solved_is_flagged():
    found = check(params=0.9 * SOLUTION)
    assert not found.ok
    assert len(found.advice) == 1
    assert "params are not the inner solution" in found.advice[0]
    assert found.inner_residual > 1e-2
    assert np.all(found.solved_errors < 1e-6)


def test_a_solver_that_stops_early_is_flagged():
    found = check(solver=lbfgs(3))
    assert not found.ok
    assert found.solver_residual > 1e-5
    assert "give solver= one with more steps" in found.advice[0]


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward])
def test_trajectories_are_compared_with_their_own_value(make):
    found = check(make(SGD, 8), params=jnp.zeros(20), keys=2)
    assert found.ok
    assert np.all(found.relative_errors < 1e-8)
    assert found.inner_residual is None
    # Far from the inner solution: the derivative of what eight steps lead to is another one.
    assert np.abs(found.differences[0] / check(keys=2).differences[0] - 1) > 1e-3


def test_a_truncated_trajectory_is_flagged():
    found = check(bilevel.unrolled(SGD, 8, truncate=2), params=jnp.zeros(20))
    assert not found.ok
    assert "truncate=" in found.advice[0]


def test_stacked_and_sampled_sources():
    a, b = ridge().train
    stack = bilevel.stacked((a.reshape(4, 10, 20), b.reshape(4, 10)))
    args = (jnp.zeros(20), LOG_L2)
    for train in (stack, bilevel.minibatches(ridge().train, 8)):
        estimator = bilevel.unrolled(SGD, 4)
        assert check_hypergradient(RIDGE, estimator, *args, train, ridge().valid, verbose=False).ok
    source = bilevel.minibatches(ridge().train, 8)
    args = (SOLUTION, LOG_L2)
    assert check_hypergradient(RIDGE, None, *args, source, ridge().valid, exact, verbose=False).ok
    # The last of the stack is what implicit estimators take; its solution is another one.
    found = check_hypergradient(RIDGE, None, *args, stack, ridge().valid, exact, verbose=False)
    assert "params are not the inner solution" in found.advice[0]


def test_constraints_are_respected():
    def inner(w, h, batch):
        return RIDGE.inner(w, jnp.log(h["l2"]), batch) + 0.5 * h["shift"] * jnp.sum(w) * h["share"] * h["off"]

    def outer(w, h, batch):
        return RIDGE.outer(w, h["l2"], batch)

    problem = bilevel.Problem(
        inner,
        outer,
        constraints={
            "l2": bilevel.positive(),
            "share": bilevel.interval(0, 1),
            "shift": bilevel.box(0.0, 1.0),
            "off": bilevel.fixed(),
        },
    )
    # A step of 0.02 in natural units would make l2 negative, and shift stands on the end of its box.
    hparams = {"l2": 1e-3, "share": 0.999, "shift": 0.0, "off": 2.0}

    def solver(params, h, batch):
        del params
        a, b = batch
        pull = a.T @ b / b.size - 0.5 * h["shift"] * h["share"] * h["off"]
        return jnp.linalg.solve(a.T @ a / b.size + h["l2"] * jnp.eye(20), pull)

    params = solver(None, hparams, ridge().train)
    found = check(params=params, problem=problem, hparams=hparams, keys=2, solver=solver)
    assert found.ok
    edge = {
        "l2": bilevel.fixed(),
        "share": bilevel.fixed(),
        "shift": bilevel.box(0, 1),
        "off": bilevel.fixed(),
    }
    with pytest.raises(ValueError, match="no hyperparameter can be moved"):
        check(params=params, problem=dataclasses.replace(problem, constraints=edge), hparams=hparams)


def test_a_loss_that_jumps_is_not_passed():
    problem = bilevel.Problem(
        RIDGE.inner, lambda w, h, batch: RIDGE.outer(w, h, batch) + 1e-3 * jnp.sum(jnp.round(1e4 * h))
    )
    found = check(problem=problem)
    assert not found.ok
    assert any("smooth" in line for line in found.advice)


def test_negative_curvature_is_named():
    problem = bilevel.Problem(
        lambda w, h, batch: jnp.sum(w**4 / 4 - jnp.exp(h) * w**2 / 2) + 0 * jnp.sum(batch[1]),
        lambda w, h, batch: jnp.sum((w - 0.3) ** 2),
    )
    found = check(params=0.1 * jnp.ones(3), problem=problem, hparams=jnp.float64(0.0))
    assert not found.ok
    assert any("negative curvature" in line for line in found.advice)


def test_not_finite_estimates_are_flagged():
    problem = bilevel.Problem(RIDGE.inner, lambda w, h, b: RIDGE.outer(w, h, b) + jnp.sum(jnp.sqrt(0 * h)))
    found = check(problem=problem)
    assert not found.ok
    assert "not finite" in found.advice[0]
    assert np.isinf(found.relative_errors[0])


def test_a_gradient_of_zero_passes():
    problem = bilevel.Problem(RIDGE.inner, lambda w, h, batch: 1.0 + jnp.sum(h**2))
    at_zero = jnp.zeros(20)
    assert check(params=jnp.asarray(ridge().solution(0.0)), problem=problem, hparams=at_zero).ok


def test_fixed_points():
    problem = bilevel.FixedPoint(
        lambda w, h, batch: jnp.tanh(batch @ w) + h, lambda w, h, batch: jnp.sum(w**3) + batch
    )
    mix, h = 0.3 * np.random.default_rng(0).standard_normal((4, 4)), np.linspace(-0.3, 0.4, 4)
    w = np.zeros(4)
    for _ in range(300):
        w = np.tanh(mix @ w) + h
    for solver in (None, picard(2000, 1e-15)):
        estimator = bilevel.implicit(bilevel.dense())
        found = check_hypergradient(problem, estimator, w, h, mix, 0.0, solver, keys=2, verbose=False)
        assert found.ok
    far = check_hypergradient(problem, estimator, 0.5 * w, h, mix, 0.0, verbose=False)
    assert "params are not the inner solution" in far.advice[0]


def test_float32_says_what_it_can_tell():
    f32 = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (SOLUTION, LOG_L2, ridge().train, ridge().valid)
    )
    found = check_hypergradient(RIDGE, None, *f32, exact, verbose=False)
    assert found.ok
    assert found.dtype.startswith("float32")
    assert found.tolerance == 1e-2
    # No difference of float32 numbers settles nine digits.
    strict = check_hypergradient(RIDGE, None, *f32, exact, tolerance=1e-9, verbose=False)
    assert not strict.ok
    assert "they cannot decide" in strict.advice[0]
    assert "Check in float64" in strict.advice[1]


def test_verdict_is_printed(capsys):
    (x, y), valid = logistic_data()
    h = np.full(5, -2.0)
    w = logistic_solution(h, (x, y))
    found = check_hypergradient(LOGISTIC, bilevel.implicit(), w, h, (x, y), valid, keys=2)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert printed.startswith("hypergradient agrees with finite differences (float64)")
    assert len(printed.splitlines()) == 6
    bad = check_hypergradient(LOGISTIC, bilevel.implicit(bilevel.cg(1)), w, h, (x, y), valid)
    printed = capsys.readouterr().out
    assert "DOES NOT AGREE" in printed
    assert printed.splitlines()[-1] == f"- {bad.advice[-1]}"


def test_wrong_arguments():
    state = bilevel.Problem(lambda w, h, b, s: (h * jnp.sum(w), s), lambda w, h, b, s: h, has_state=True)
    with pytest.raises(ValueError, match="has_state=True"):
        check(problem=state)
    with pytest.raises(TypeError, match="estimator must be an estimator"):
        check(bilevel.cg())
    with pytest.raises(ValueError, match="keys must be at least 1"):
        check(keys=0)
    with pytest.raises(ValueError, match="hparams must be finite"):
        check(hparams=jnp.float64(np.inf))


def quadratic(w, h, batch):
    return 0.5 * jnp.sum((w - batch) ** 2 * jnp.arange(1.0, 4.0)) + 0.5 * h * jnp.sum(w**2)


def to_twice(w, h, batch):
    return 0.5 * jnp.sum((w - 2 * batch) ** 2)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (bilevel.cg(damping=0.5), ": lower damping= of bilevel.cg"),
        (bilevel.nystrom(3, 0.5), "lower damping= of bilevel.nystrom"),
        (bilevel.nystrom(1, 1e-3), "raise rank= or lower damping= of bilevel.nystrom"),
    ],
)
def test_damping_and_rank_are_named(solver, words):
    problem, batch = bilevel.Problem(quadratic, to_twice), jnp.arange(1.0, 4.0)
    w = jnp.arange(1.0, 4.0) * batch / (jnp.arange(1.0, 4.0) + 1.0)
    found = check_hypergradient(
        problem, bilevel.implicit(solver), w, jnp.float64(1.0), batch, batch, verbose=False
    )
    assert not found.ok
    advice = "\n".join(found.advice)
    assert words in advice
    assert "max_steps" not in advice
    assert "which is a bias" in advice


def test_differences_that_leave_the_domain_are_named():
    problem = bilevel.Problem(lambda w, h, b: quadratic(w, jnp.sqrt(h), b), to_twice)
    batch, h = jnp.arange(1.0, 4.0), jnp.float64(1e-4)
    w = jnp.arange(1.0, 4.0) * batch / (jnp.arange(1.0, 4.0) + jnp.sqrt(h))
    found = check_hypergradient(problem, None, w, h, batch, batch, verbose=False)
    assert not found.ok
    assert "leave the domain" in found.advice[0]
    assert "constraints=" in found.advice[0]
    positive = dataclasses.replace(problem, constraints=bilevel.positive())
    assert check_hypergradient(positive, None, w, h, batch, batch, verbose=False).ok


def test_the_default_estimator_of_a_fixed_point():
    problem = bilevel.FixedPoint(lambda w, h, batch: 0.5 * w * h + batch, lambda w, h, b: jnp.sum(w**2))
    batch = jnp.arange(1.0, 4.0)
    assert check_hypergradient(problem, None, 2 * batch, jnp.float64(1.0), batch, batch, verbose=False).ok


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_cannot_decide(dtype):
    problem = bilevel.Problem(
        lambda w, h, b: jnp.sum(w**2 * h - w * b), lambda w, h, b: jnp.sum((w - b) ** 2)
    )
    batch = jnp.ones(3, dtype)
    found = check_hypergradient(problem, None, batch / 2, dtype(1.0), batch, batch, verbose=False)
    assert np.isfinite(found.estimated).all()
    assert found.ok or "they cannot decide" in found.advice[0]
