"""What users pick instead: scikit-learn's penalties are ours, and Hyperband counts whole trainings alone."""

import dataclasses
import json
import sys
import types

import jax
import jax.flatten_util
import numpy as np
import optuna
import pytest
from sklearn import linear_model

import bilevel
from benchmarks import found, lasso, runner, search
from benchmarks.peers import by_sklearn, command, handles, pruned, searched
from benchmarks.peers import searches as all_searches
from benchmarks.peers.measured import CANNOT, FAILED, Row
from benchmarks.problems import ridge


@pytest.fixture
def _narrow(monkeypatch):
    monkeypatch.setattr(lasso, "FEATURES", 30)
    monkeypatch.setattr(lasso, "ROWS", 25)
    monkeypatch.setattr(lasso, "USED", 5)


# --- scikit-learn -----------------------------------------------------------------------------------------

ALONE = {
    "ridge": lambda model: linear_model.Ridge(model.alpha_, fit_intercept=False),
    "lasso": lambda model: linear_model.Lasso(model.alpha_, fit_intercept=False, tol=1e-12, max_iter=100_000),
    "logistic": lambda model: linear_model.LogisticRegression(
        C=np.ravel(model.C_)[0], solver="newton-cholesky", tol=1e-10
    ),
}


def defect(problem, params, hparams, train) -> float:
    """How far params are from the inner solution: zero there alone, as the losses are convex."""
    if isinstance(problem, bilevel.FixedPoint):
        return float(np.linalg.norm(problem.update(params, hparams, train) - params))
    grad = jax.grad(problem.inner)(params, hparams, train)
    return float(np.linalg.norm(jax.flatten_util.ravel_pytree(grad)[0]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of scikit-learn's next versions
@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("problem", ALONE)
def test_its_coefficients_are_our_solution_at_its_penalty(problem):
    task = searched.task_of(problem, 0)
    model, x, y = by_sklearn.prepared(task)
    model.fit(x, y)
    rows = len(task.train["y"])
    own = ALONE[problem](model).fit(x[:rows], y[:rows])
    params = own.coef_.ravel()
    if problem == "logistic":
        params = {"w": params, "b": own.intercept_[0]}
    [(name, strength)] = by_sklearn.FITS[problem].found(model, rows).items()
    train = jax.tree.map(lambda leaf: np.asarray(leaf, float), task.train)
    solved, moved = (
        defect(task.problem, params, {name: np.full(task.hparams[name].shape, value)}, train)
        for value in (strength, 1.01 * strength)
    )
    assert solved < 1e-2 * moved


def test_its_penalty_is_the_best_of_its_grid_by_the_validation_rows():
    task = searched.task_of("ridge", 1)
    train, valid = (
        jax.tree.map(lambda leaf: np.asarray(leaf, float), part) for part in (task.train, task.valid)
    )
    grid = np.geomspace(1e-4, 1e2, by_sklearn.GRID)
    best = grid[np.argmin(ridge.closed_form(train, valid)(grid))]
    hparams, seconds = by_sklearn.picked(task)
    assert 1e-4 < best < 1e2
    assert hparams["l2"] == pytest.approx(best, rel=1e-6)
    assert seconds > 0


def test_what_it_has_no_means_for():
    for problem, reason in by_sklearn.MISSING.items():
        assert all_searches.curve(problem, all_searches.SKLEARN, 0, 1.0) == {CANNOT: reason}
    assert {*by_sklearn.FITS, *by_sklearn.MISSING} == set(all_searches.PROBLEMS) == set(searched.AXES)


# --- Problems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem", "axes"), [("logistic", 30), ("cleaning", 810)])
def test_every_hyperparameter_has_an_axis(problem, axes):
    task = searched.task_of(problem, 0)
    assert len(task.box) == axes
    values = search.at(task.box, np.random.default_rng(0).random(axes))
    hparams = task.spread(values)
    assert jax.tree.map(np.shape, hparams) == jax.tree.map(np.shape, task.hparams)
    spread = np.concatenate([np.ravel(hparams[name]) for name in ("weight", "l2") if name in hparams])
    np.testing.assert_array_equal(spread, np.float32(list(values.values())))
    if problem == "cleaning":
        assert hparams["weight"].min() >= np.float32(1e-3)


@pytest.mark.usefixtures("_narrow")
def test_the_lasso_needs_no_intercept():
    task = searched.task_of("lasso", 3)
    for name in "xy":
        np.testing.assert_allclose(np.mean(np.asarray(task.train[name], float), axis=0), 0, atol=1e-6)
    info, [(value, _)] = found.trained(task, {"l1": 0.1}, task.valid)
    assert info.residual <= task.solver.atol
    assert np.isfinite(value)


# --- Hyperband --------------------------------------------------------------------------------------------


@pytest.fixture
def short(_narrow):
    """The lasso with few features, and a solver of few steps."""
    return dataclasses.replace(
        searched.task_of("lasso", 0), solver=bilevel.picard(max_steps=81, atol=1e-5, anderson=10)
    )


def test_pieces_end_where_training_does(short):
    assert [piece.max_steps for piece in pruned.pieces(short.solver)] == [3, 6, 18, 81]
    hparams = {"l1": np.float32(0.1)}
    rungs, values, _ = zip(*pruned.trained(short, hparams), strict=True)
    assert rungs == pruned.RUNGS
    assert values[-1] == pytest.approx(float(runner.trained(short, hparams)[0][0]), rel=all_searches.SLACK)
    assert abs(values[0] / values[-1] - 1) > 1e-2


def asked(prune_at: int):
    study = optuna.create_study(
        pruner=types.SimpleNamespace(prune=lambda study, trial: trial.last_step >= prune_at)
    )
    return study, study.ask()


@pytest.mark.parametrize(
    ("prune_at", "values", "expected", "state"),
    [
        (3, [5.0, 4.0, 3.0, 2.0], (np.nan, 2), "PRUNED"),
        (27, [5.0, 4.0, 3.0, 2.0], (2.0, 4), "COMPLETE"),
        (99, [5.0, np.nan, 3.0, 2.0], (np.nan, 2), "FAIL"),
    ],
)
def test_only_what_was_trained_to_the_end_counts(prune_at, values, expected, state):
    study, trial = asked(prune_at)
    pieces = iter([(rung, value, 1) for rung, value in zip(pruned.RUNGS, values, strict=True)])
    np.testing.assert_equal(pruned.told(study, trial, pieces), expected)
    assert study.trials[0].state.name == state
    assert len(list(pieces)) == len(values) - expected[1]


def test_hyperband_gives_up_some_and_keeps_the_best(short):
    method = pruned.Pruned("Hyperband")
    method.check()
    assert method.refusal(short) == ""
    method.warm_up(short)
    ended = method.run(short, 1.0, 0)
    tried, whole = (int(word) for word in ended.message.split() if word.isdigit())
    assert 0 < whole == len(ended.curve) < tried
    assert np.all(np.diff(ended.curve[:, :2], axis=0) > 0)
    best = ended.curve[ended.marked, 2]
    assert best == np.min(ended.curve[:, 2])
    [hparams] = ended.candidates
    assert ended.later([ended.marked, whole - 1]) == [hparams, hparams]
    assert float(runner.trained(short, hparams)[0][0]) == pytest.approx(best, rel=all_searches.SLACK)


# --- Processes and comparisons ----------------------------------------------------------------------------


def test_a_search_that_trained_nothing_to_the_end_failed(monkeypatch):
    monkeypatch.setattr(pruned.Pruned, "warm_up", lambda self, task: 0.5)
    monkeypatch.setattr(pruned, "trained", lambda task, hparams: iter([(1, np.nan, 1)]))
    said = all_searches.curve("ridge", all_searches.HYPERBAND, 0, 0.01)
    assert said == {FAILED: "trained no configuration to the end in 0.01 s"}


def test_a_process_answers_whatever_happens(monkeypatch, capsys):
    def noisy(*args):
        sys.stdout.write("noise")
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(all_searches, "curve", noisy)
    all_searches.main("ridge", "random", "0", "1.0")
    assert json.loads(capsys.readouterr().out) == {FAILED: "ZeroDivisionError: division by zero"}


def test_every_arm_has_a_process_on_the_core(monkeypatch, tmp_path):
    started = []

    class Recorded:
        def __init__(self, command, core, log):
            started.append((command[3:], core, log))

        def ask(self, request, seconds):
            return {CANNOT: "a test"}

        def close(self):
            pass

    monkeypatch.setattr(all_searches, "Handle", Recorded)
    rows = all_searches.rows("ridge", all_searches.ARMS, [4], 2.0, 1, tmp_path)
    assert rows == [Row(arm, CANNOT, "a test") for arm in all_searches.ARMS]
    assert started == [(["ridge", arm, "4", "2.0"], 1, tmp_path) for arm in all_searches.ARMS]


def test_a_loss_higher_by_the_slack_is_as_good():
    def run(value):
        return {"seconds": [1.0], "values": [value], "compile_seconds": 0.0}

    losses = {"bilevel": 1.0009, all_searches.HYPERBAND: 1.0, "random": 1.0011}
    rows = all_searches.compared({arm: [run(value)] for arm, value in losses.items()})
    assert {row.peer: row.seconds for row in rows} == {
        "bilevel": (1.0,), all_searches.HYPERBAND: (1.0,), "random": (np.inf,),
    }  # fmt: skip


def test_some_of_the_problems_can_be_chosen(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(handles, "PYTHON", tmp_path)
    chosen = []
    monkeypatch.setattr(all_searches, "rows", lambda kind, *args: chosen.append((kind, args)) or [])
    core = handles.cores()[0]
    options = [
        "--kinds",
        "mlp",
        "lasso",
        "--arms",
        "random",
        "grid",
        "--seeds",
        "5",
        "--seconds",
        "2",
        "--core",
        str(core),
        "--out",
        str(tmp_path),
    ]
    assert command.main(options) == 0  # no other task has them
    log = tmp_path / "log.txt"
    assert chosen == [(kind, (["random", "grid"], [5], 2.0, core, log)) for kind in ("lasso", "mlp")]
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"searches-{kind}-1 seed-float32.json" for kind in ("lasso", "mlp")
    }
    for wrong, said in [
        (["--kinds", "nonsense"], "invalid choice: 'nonsense' (choose from "),
        (["cold", "--kinds", "mlp"], "no task that was asked for has the problem mlp"),
    ]:
        with pytest.raises(SystemExit):
            command.main(wrong)
        assert said in capsys.readouterr().err
