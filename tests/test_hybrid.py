"""Optuna outside, hypergradients inside."""

import json
import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)

# Training gives 2 / (1 + l2), validation wants 1: l2 = 1, whatever the kind; its offset says which is best.
LIMITS = {"l2": bilevel.positive(), "offset": bilevel.fixed()}
PROBLEM = bilevel.Problem(
    lambda w, h, x: 0.5 * (w - x) ** 2 + 0.5 * h["l2"] * w**2,
    lambda w, h, x: 0.5 * (w - x) ** 2 + h["offset"],
    constraints=LIMITS,
)
METHOD = bilevel.alternating(bilevel.implicit(), bilevel.newton(), optax.adam(0.3))
COMMON = {
    "problem": PROBLEM, "params": jnp.asarray(0.0), "train": jnp.asarray(2.0), "valid": jnp.asarray(1.0),
    "method": METHOD, "steps": 60,
}  # fmt: skip
OFFSETS = {"a": 0.3, "b": 0.1, "c": 0.2}


def build(trial):
    return {"hparams": {"l2": 0.1, "offset": OFFSETS[trial.suggest_categorical("kind", list(OFFSETS))]}}


def grid(kinds=tuple(OFFSETS)):
    return optuna.samplers.GridSampler({"kind": list(kinds)})


def test_the_discrete_choice_and_the_continuous_optimum_are_found():
    objective = bilevel.optuna_objective(build, **COMMON)
    study = bilevel.optuna_study(None, sampler=grid())
    study.optimize(objective, n_trials=3)
    assert study.best_params == {"kind": "b"}
    np.testing.assert_allclose(study.best_value, 0.1, atol=1e-4)
    assert objective.best_trial == study.best_trial.number
    np.testing.assert_allclose(objective.best.best.hparams["l2"], 1.0, atol=0.02)
    stored = json.loads(study.best_trial.user_attrs["hparams"])
    np.testing.assert_allclose(stored["['l2']"], objective.best.best.hparams["l2"])
    assert list(study.best_trial.intermediate_values) == [10, 20, 30, 40, 50, 60]
    values = list(study.best_trial.intermediate_values.values())
    assert values == sorted(values, reverse=True)


def test_a_study_lives_in_a_file_that_others_share(tmp_path):
    path = tmp_path / "study.journal"
    one, two = (bilevel.optuna_study(path, "shared", sampler=grid()) for _ in range(2))
    objective = bilevel.optuna_objective(build, **COMMON)
    one.optimize(objective, n_trials=1)
    two.optimize(objective, n_trials=2)
    assert sorted(trial.params["kind"] for trial in one.trials) == ["a", "b", "c"]
    assert bilevel.optuna_study(path, "shared").best_params == {"kind": "b"}
    with pytest.raises(ValueError, match="is not there"):
        bilevel.optuna_study(tmp_path / "none" / "study.journal")


def work(path):
    """Two trials of this process; the second begins when the study shows a trial of another."""

    def build_here(trial):
        trial.set_user_attr("process", os.getpid())
        return build(trial)

    objective = bilevel.optuna_objective(build_here, **COMMON)
    study = bilevel.optuna_study(path, "shared", sampler=optuna.samplers.RandomSampler(seed=os.getpid()))
    study.optimize(objective, n_trials=1)
    until = time.monotonic() + 300
    while all(trial.user_attrs.get("process", os.getpid()) == os.getpid() for trial in study.trials):
        assert time.monotonic() < until, "no trial of the other process was seen"
        time.sleep(0.05)
    study.optimize(objective, n_trials=1)
    return study


def test_two_processes_share_a_study_while_both_run(tmp_path):
    path = tmp_path / "study.journal"
    other = subprocess.Popen([sys.executable, __file__, path])
    try:
        study = work(path)
        assert other.wait(300) == 0
    finally:
        other.kill()
    trials = study.trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    processes = [trial.user_attrs["process"] for trial in trials]
    assert sorted(processes) == sorted(2 * [os.getpid(), other.pid])
    expected = [OFFSETS[trial.params["kind"]] for trial in trials]
    np.testing.assert_allclose([trial.value for trial in trials], expected, atol=1e-4)


def test_a_pruner_stops_the_run():
    class Third(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.last_step == 30

    study = bilevel.optuna_study(None, pruner=Third())
    study.optimize(bilevel.optuna_objective(build, **COMMON), n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [10, 20, 30]
    assert "hparams" in trial.user_attrs


def test_a_run_that_diverges_is_pruned_and_one_that_cannot_begin_fails():
    """Kind a is nan at the start, kind c after its first step."""
    problem = bilevel.Problem(
        lambda w, h, x: PROBLEM.inner(w, h, x) + jnp.where(h["offset"] > 0.25, jnp.nan, 0),
        lambda w, h, x: PROBLEM.outer(w, h, x) + jnp.where((h["offset"] > 0.15) & (w > 0), jnp.nan, 0),
        constraints=LIMITS,
    )
    given = {**COMMON, "problem": problem}

    study = bilevel.optuna_study(None, sampler=grid())
    study.optimize(bilevel.optuna_objective(build, **given), n_trials=3, catch=ValueError)
    states = {trial.params["kind"]: trial.state.name for trial in study.trials}
    assert states == {"a": "FAIL", "b": "COMPLETE", "c": "PRUNED"}


def test_a_persons_interruption_ends_the_study_and_keeps_the_trial():
    def impatient(step, rows):
        if step >= 20:
            raise KeyboardInterrupt

    objective = bilevel.optuna_objective(build, **COMMON, callbacks=impatient)
    study = bilevel.optuna_study(None)
    study.optimize(objective, n_trials=5)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.user_attrs["status"] == "INTERRUPTED"
    assert objective.best is not None


def test_a_callback_that_stops_a_run_ends_the_trial_alone():
    objective = bilevel.optuna_objective(build, **COMMON, callbacks=lambda step, rows: bilevel.STOP)
    study = bilevel.optuna_study(None)
    study.optimize(objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="build must be a function"):
        bilevel.optuna_objective({"problem": PROBLEM})
    study = bilevel.optuna_study(None)
    with pytest.raises(TypeError, match="must return a dict of arguments"):
        study.optimize(bilevel.optuna_objective(lambda trial: PROBLEM), n_trials=1)
    several = bilevel.optuna_objective(build, **COMMON, population=bilevel.population(2))
    with pytest.raises(ValueError, match="a trial is one run"):
        study.optimize(several, n_trials=1)
    for directions in (["maximize"], ["minimize", "minimize"]):
        other = optuna.create_study(directions=directions)
        with pytest.raises(ValueError, match="the study must minimise"):
            other.optimize(bilevel.optuna_objective(build, **COMMON), n_trials=1)


if __name__ == "__main__":
    work(sys.argv[1])
