"""The problems of the studies: closed forms, known conditioning, and what every task promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.found import solve
from benchmarks.problems import PROBLEMS, cleaning, quadratic, ridge
from bilevel.constraints import bind

SMALL = ("ridge", "logistic", "kfold", "quadratic")


def value_at(task, hparams):
    _, info, [(value, _)] = solve(task.problem, task.solver, task.params, hparams, task.train, task.valid)
    return float(value), float(info.residual)


def middle(task):
    return {name: np.sqrt(low * high) for name, (low, high) in task.box.items()}


def fold_values(train, valid, grid):
    """Outer values of ridge regression by one dense solve for each penalty."""
    x, y = np.asarray(train["x"], float), np.asarray(train["y"], float)
    identity = np.eye(x.shape[1])
    params = [np.linalg.solve(x.T @ x / len(y) + l2 * identity, x.T @ y / len(y)) for l2 in grid]
    return np.array([0.5 * np.mean((valid["x"] @ w - valid["y"]) ** 2) for w in params])


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_every_task_promises(name):
    task, again, other = PROBLEMS[name].make(0), PROBLEMS[name].make(0), PROBLEMS[name].make(1)
    assert task.name == name
    assert task.problem is other.problem
    assert 200 <= task.steps <= 500
    floating = [x for x in jax.tree.leaves((task.params, task.hparams, task.train)) if x.dtype.kind == "f"]
    assert {x.dtype for x in floating} == {np.dtype(np.float32)}
    bind(task.problem.constraints, task.hparams).check(task.hparams)

    spread = task.spread(middle(task))
    assert jax.tree.map(jnp.shape, spread) == jax.tree.map(jnp.shape, task.hparams)
    assert {x.dtype for x in jax.tree.leaves(spread)} == {np.dtype(np.float32)}
    bind(task.problem.constraints, task.hparams).check(spread)

    data = [jax.tree.leaves((t.train, t.valid, t.test)) for t in (task, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(data[0], data[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(data[0], data[2], strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_solver_trains_accurately(name):
    task = PROBLEMS[name].make(0)
    for hparams in (task.hparams, task.spread(middle(task))):
        value, residual = value_at(task, hparams)
        assert np.isfinite(value)
        assert residual < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_ridge_optimum_is_the_lowest_of_a_fine_grid(seed):
    task, grid = ridge.make(seed), np.geomspace(1e-6, 1e4, 3001)
    values = fold_values(task.train, task.valid, grid)
    # The arrays of the task are rounded to float32, the closed form's are not.
    assert task.optimum == pytest.approx(values.min(), rel=1e-5)
    assert task.optimum <= values.min() * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_kfold_optimum_is_the_lowest_mean_of_the_folds(seed):
    task, grid = PROBLEMS["kfold"].make(seed), np.geomspace(1e-6, 1e4, 2001)
    folds = [jax.tree.map(lambda x, i=i: x[i], (task.train, task.valid)) for i in range(5)]
    values = np.mean([fold_values(*fold, grid) for fold in folds], axis=0)
    assert task.optimum == pytest.approx(values.min(), rel=1e-5)


def test_folds_share_no_row_and_cover_all():
    task = PROBLEMS["kfold"].make(0)
    assert task.train["x"].shape == (5, 120, 10)
    assert task.valid["x"].shape == (5, 30, 10)
    assert task.test["x"].shape == (5, 292, 10)


def test_trained_ridge_has_the_value_of_the_closed_form():
    task = ridge.make(0)
    for l2 in (1e-3, 0.1, 10.0):
        expected = fold_values(task.train, task.valid, [l2])[0]
        assert value_at(task, {"l2": np.float32(l2)})[0] == pytest.approx(expected, rel=1e-4)


def test_lowest_finds_a_minimum_between_grid_points():
    found = ridge.lowest(lambda l2: (np.log(l2) - np.log(0.12345)) ** 2 - 1)
    assert found == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_quadratic_has_its_condition_number_and_optimum(seed):
    matrix, shift, target, log_penalty = quadratic.instance(seed)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues == pytest.approx(np.geomspace(1e-3, 1, quadratic.SIZE), rel=1e-9)
    w = np.linalg.solve(matrix + np.diag(np.exp(log_penalty)), shift)
    assert 0.5 * np.sum((w - target) ** 2) == pytest.approx(quadratic.OPTIMUM, rel=1e-9)
    for scale in (0.1, 1.0, 3.0):
        moved = log_penalty + scale * np.random.default_rng(1).standard_normal(quadratic.SIZE)
        moved[-1] = -20.0
        w = np.linalg.solve(matrix + np.diag(np.exp(moved)), shift)
        assert 0.5 * np.sum((w - target) ** 2) > quadratic.OPTIMUM


def test_half_of_the_labels_are_wrong():
    labels = np.arange(800) % 10
    noisy = cleaning.corrupted(labels, np.random.default_rng(0))
    assert np.sum(noisy != labels) == 400
    assert set(noisy) == set(range(10))
    task = PROBLEMS["cleaning"].make(0)
    assert task.train["x"].shape == (800, 64)
    value, metrics = task.problem.outer(task.params, task.hparams, task.test)
    assert float(value) == pytest.approx(np.log(10), rel=1e-5)
    assert 0 <= float(metrics["accuracy"]) <= 1
