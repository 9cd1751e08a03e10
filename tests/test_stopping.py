"""Early stopping: predictions with honest errors, and what is stopped because of them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.svm import NuSVR

import bilevel
from bilevel import Status, stopping
from bilevel.stopping.predictor import _PENALTIES, Prediction


def search(runs=200, steps=60, seed=0, noise=0.003):
    """Curves of a random search: power laws whose floor and speed depend on two hyperparameters."""
    rng = np.random.default_rng(seed)
    lr, l2 = rng.uniform(-3, 0, runs), rng.uniform(-4, 0, runs)
    floor = 0.3 + 0.15 * (lr + 1.3) ** 2 + 0.05 * (l2 + 2) ** 2
    speed, height = 0.4 + 0.6 * np.exp(-((lr + 1.3) ** 2)), rng.uniform(1.5, 2.5, runs)
    curves = floor[:, None] + height[:, None] * np.arange(1, steps + 1) ** -speed[:, None]
    return curves + noise * rng.normal(size=curves.shape), {"lr": lr, "l2": l2}


CURVES, EXTRA = search()

# --- Features and predictions ----------------------------------------------------------------------------


def test_features_are_values_differences_and_moments():
    names, x = stopping.features([[4.0, 2.0, 1.0]], {"lr": [0.1]})
    assert names == [
        "value_0", "value_1", "value_2", "first_0", "first_1", "second_0", "mean", "std", "lr"
    ]  # fmt: skip
    np.testing.assert_allclose(x, [[4, 2, 1, -2, -1, 1, 7 / 3, np.std([4, 2, 1]), 0.1]])
    assert stopping.features([[4.0]])[1].shape == (1, 3)


def test_the_error_of_ridge_is_that_of_leaving_each_run_out():
    """Against fitting it as often as there are runs; features standardised by all of them."""
    fitted = stopping.predictor(CURVES[:15], {"lr": EXTRA["lr"][:15]})
    model = fitted._at(4)
    x = (stopping.features(CURVES[:15, :4], fitted.extra)[1] - model.mean) / model.scale
    y, largest = CURVES[:15, -1], np.linalg.norm(x - x.mean(0), 2) ** 2

    def left_out(penalty):
        errors = []
        for i in range(15):
            a, b = np.delete(x, i, 0), np.delete(y, i)
            system = np.block([[np.array([[14.0]]), a.sum(0)[None]], [a.sum(0)[:, None], a.T @ a]])
            system[1:, 1:] += penalty * largest * np.eye(x.shape[1])
            w = np.linalg.solve(system, np.concatenate([[b.sum()], a.T @ b]))
            errors.append(y[i] - w[0] - x[i] @ w[1:])
        return np.sqrt(np.mean(np.square(errors)))

    np.testing.assert_allclose(model.sigma, min(map(left_out, _PENALTIES)), rtol=1e-5)


def test_the_error_is_that_on_runs_not_seen():
    """The root mean square on 100 other runs: its standard error is 7 %, and a penalty was chosen."""
    fitted = stopping.predictor(CURVES[:100])
    for steps in (5, 20):
        found = fitted.predict(CURVES[100:, :steps])
        missed = np.sqrt(np.mean((found.value - CURVES[100:, -1]) ** 2))
        assert 0.7 < missed / found.sigma < 1.4
    assert fitted.predict(CURVES[100:, :20]).sigma < fitted.predict(CURVES[100:, :5]).sigma


def test_any_regressor_goes_with_cross_validated_errors():
    fitted = stopping.predictor(CURVES[:50], EXTRA_50, regressor=LinearRegression())
    found = fitted.predict(CURVES[50:60, :3], {name: value[50:60] for name, value in EXTRA.items()})
    x = stopping.features(CURVES[:50, :3], EXTRA_50)[1]
    y, folds, errors = CURVES[:50, -1], np.arange(50) % 5, np.empty(50)
    for fold in range(5):
        out = folds == fold
        errors[out] = y[out] - LinearRegression().fit(x[~out], y[~out]).predict(x[out])
    np.testing.assert_allclose(found.sigma, np.sqrt(np.mean(errors**2)), rtol=1e-6)
    assert fitted.signals(3)["lr"].coefficient is not None
    kernel = stopping.predictor(CURVES[:50], regressor=NuSVR(C=10.0))
    assert kernel.signals(3)["value_0"].coefficient is None


EXTRA_50 = {name: value[:50] for name, value in EXTRA.items()}


def test_a_regressor_whose_fit_returns_nothing_will_do():
    class Silent(LinearRegression):
        def fit(self, x, y):
            super().fit(x, y)

    silent, plain = (
        stopping.predictor(CURVES[:20], regressor=kind()).predict(CURVES[20:22, :3])
        for kind in (Silent, LinearRegression)
    )
    np.testing.assert_array_equal(silent.value, plain.value)
    assert silent.sigma == plain.sigma


def test_the_chance_is_that_of_the_normal_distribution():
    found = Prediction(np.array([1.0, 1.0 + 1.6448536, 1.0 - 1.6448536, np.nan]), 1.0)
    np.testing.assert_allclose(found.chance(1.0), [0.5, 0.05, 0.95, 0.0], atol=1e-8)
    assert found.stop(1.0 - 1e-6).tolist() == [False, True, False, True]
    assert found.stop(1.0, threshold=0.51).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(Prediction(np.array([1.0, 2.0]), 0.0).chance(1.5), [1.0, 0.0])


def test_runs_that_are_not_finite_are_left_out_and_stopped():
    broken = CURVES[:30].copy()
    broken[3, 10:] = np.inf
    fitted = stopping.predictor(broken)
    assert fitted.curves.shape == (29, 60)
    seen = CURVES[30:32, :12].copy()
    seen[1, -1] = np.nan
    assert fitted.predict(seen).stop(best=10.0).tolist() == [False, True]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_a_signal_is_learned(sign):
    """The same gradient norms, in one world a good sign and in the other a bad one."""
    rng = np.random.default_rng(1)
    final, flat = rng.normal(size=60), np.ones((60, 3)) + 0.01 * rng.normal(size=(60, 3))
    extra = {"grad_norm": sign * final + 0.1 * rng.normal(size=60), "noise": rng.normal(size=60)}
    fitted = stopping.predictor(flat, extra, final=final)
    told = fitted.signals(2)
    np.testing.assert_allclose(told["grad_norm"].correlation, sign, atol=0.02)
    low, high = told["grad_norm"].interval
    assert low < told["grad_norm"].correlation < high
    assert sign * low > 0.9
    assert sign * told["grad_norm"].coefficient > 0.8 * final.std()
    low, high = told["noise"].interval
    assert low < 0 < high
    found = fitted.predict(flat[:2, :2], {name: value[:2] for name, value in extra.items()})
    np.testing.assert_allclose(found.value, final[:2], atol=5 * found.sigma)


# --- A search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, EXTRA], ids=["curves", "and hyperparameters"])
def test_a_search_finds_the_same_best_with_a_fraction_of_the_steps(extra):
    found = stopping.replay(CURVES, extra, threshold=0.99)
    assert found.index == int(np.argmin(CURVES[:, -1]))
    assert found.best == CURVES[:, -1].min()
    assert found.fraction < 0.3
    assert found.steps[:20].tolist() == [60] * 20
    np.testing.assert_allclose(found.fraction, found.steps.sum() / CURVES.size)
    assert stopping.replay(CURVES, extra, threshold=0.5).fraction < found.fraction


def test_where_the_beginning_says_nothing_hardly_a_run_is_stopped():
    """The best is one of a hundred: chances below 5 % are then what most runs have. None is below 1e-6."""
    rng = np.random.default_rng(3)
    found = stopping.replay(rng.normal(size=(60, 12)), threshold=1 - 1e-6)
    assert found.fraction > 0.98


# --- A population ----------------------------------------------------------------------------------------

PROBLEM = bilevel.Problem(
    inner=lambda w, h, x: 0.5 * (w - x) ** 2 + 0.5 * jnp.exp(h["l2"]) * w**2,
    outer=lambda w, h, x: 0.5 * (w - x) ** 2 + jnp.square(h["offset"]),
    constraints={"offset": bilevel.fixed()},
)
POPULATIONS = {n: bilevel.population(n) for n in (2, 4, 12)}
METHOD = bilevel.alternating(bilevel.implicit(), optax.sgd(0.1), optax.sgd(0.2))


def population(n, offsets, steps=30, callbacks=(), **settings):
    """Members that fall alike, down to floors of their own: their offsets squared."""
    starts = jnp.zeros(n), {"l2": jnp.full(n, -4.0), "offset": jnp.asarray(offsets)}
    return bilevel.optimize(
        PROBLEM, *starts, 2.0, 2.0, METHOD, steps, population=POPULATIONS[n], judge_every=5,
        callbacks=callbacks, progress=False, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def earlier():
    rng = np.random.default_rng(0)
    return population(12, rng.uniform(0.1, 1, 12))


def test_members_that_will_not_be_best_are_stopped_and_the_others_go_on(earlier):
    fitted = stopping.predictor(earlier.history["value"].T)
    callback = stopping.stop_members(fitted, after=10)
    offsets = [0.02, 0.9, 0.8, 0.02]
    result = population(4, offsets, callbacks=callback)
    assert result.status.tolist() == [Status.BUDGET, Status.INTERRUPTED, Status.INTERRUPTED, Status.BUDGET]
    assert result.members.attempted.tolist() == [30, 10, 10, 30]
    assert result.best.member in (0, 3)
    # They keep what they had, and the others are what they would have been.
    alone = population(4, offsets)
    assert result.member(1).message.startswith("Stopped by a callback at outer step 10.")
    np.testing.assert_array_equal(result.history["value"][:10], alone.history["value"][:10])
    assert np.isnan(result.history["value"][10:, 1]).all()
    for i in (0, 3):
        np.testing.assert_array_equal(result.history["value"][:, i], alone.history["value"][:, i])
    short = population(4, offsets, steps=10)
    np.testing.assert_array_equal(result.params[1], short.params[1])
    np.testing.assert_array_equal(result.members.value[1], short.members.value[1])
    # It may be used again.
    again = population(4, offsets, callbacks=callback)
    assert again.status.tolist() == result.status.tolist()


def test_the_leader_goes_on_where_values_are_noisy():
    """A member's lowest value so far is lower than what it will have in the end: not that is to be beaten."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.5, 1, 40)
    fitted = stopping.predictor(level[:, None] + 0.05 * rng.normal(size=(40, 30)), final=level)
    values = np.array([0.3, 0.4]) + 0.05 * rng.normal(size=(20, 2))
    values[3, 0] = 0.15
    rows = {"step": np.arange(20), "value": values}
    assert stopping.stop_members(fitted)(20, rows).tolist() == [False, True]
    assert stopping.stop_members(fitted, best=0.1)(20, rows).tolist() == [True, True]
    rows["value"][5:, 1] = np.nan
    assert stopping.stop_members(fitted)(20, rows).tolist() == [False, True]


def test_a_run_that_is_gone_on_with_is_judged_by_its_whole_curves(earlier, tmp_path):
    seen, starts = [], [0.02, 0.9, 0.8, 0.02]
    fitted = stopping.predictor(earlier.history["value"].T)
    rule = stopping.stop_members(
        fitted, after=15, extra=lambda rows: seen.append(rows["step"].tolist()) or {}
    )
    whole = population(4, starts, callbacks=rule)
    population(
        4, starts, callbacks=lambda step, rows: bilevel.STOP if step == 10 else None, checkpoint=tmp_path
    )
    resumed = population(4, starts, callbacks=rule, checkpoint=tmp_path)
    assert seen == 2 * [list(range(n)) for n in (15, 20, 25)]
    assert resumed.members.attempted.tolist() == whole.members.attempted.tolist() == [30, 15, 15, 30]


def test_stopping_members_compiles_nothing(compiled):
    def callback(at):
        return lambda step, rows: np.arange(4) == 0 if step == at else None

    population(4, [0.1] * 4, callbacks=callback(5))
    compiled()
    population(4, [0.1] * 4)
    without = compiled()
    result = population(4, [0.1] * 4, callbacks=callback(15))
    assert compiled() == without
    assert result.members.attempted.tolist() == [15, 30, 30, 30]
    everyone = population(4, [0.1] * 4, callbacks=[callback(5), lambda step, rows: np.ones(4, bool)])
    assert len(everyone.history["step"]) == 5
    assert everyone.status.tolist() == [Status.INTERRUPTED] * 4


def test_a_stopped_member_stays_stopped_when_a_run_goes_on(tmp_path):
    def callback(step, rows):
        return [True, False] if step == 5 else bilevel.STOP if step == 10 else None

    population(2, [0.1, 0.2], callbacks=callback, checkpoint=tmp_path)
    result = population(2, [0.1, 0.2], checkpoint=tmp_path)
    assert result.members.attempted.tolist() == [5, 30]
    assert result.status.tolist() == [Status.INTERRUPTED, Status.BUDGET]


def test_halving_and_stopping_go_together():
    def callback(step, rows):
        return np.arange(4) == 1 if step == 10 else None

    starts = jnp.zeros(4), {"l2": jnp.full(4, -3.0), "offset": jnp.array([0.1, 0.0, 0.9, 0.8])}
    result = bilevel.optimize(
        PROBLEM, *starts, 2.0, 2.0, METHOD, 20, population=bilevel.population(4, halve_every=5),
        judge_every=5, callbacks=callback, progress=False,
    )  # fmt: skip
    # The first halving leaves members 0 and 1, the second, after member 1 was stopped, the better: member 1.
    assert result.status.tolist() == [
        Status.DROPPED, Status.INTERRUPTED, Status.DROPPED, Status.DROPPED
    ]  # fmt: skip
    assert result.members.attempted.tolist() == [10, 10, 5, 5]
    assert result.best.member == 1


def test_a_mask_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="one for each of 2 members"):
        population(2, [0.1, 0.2], callbacks=lambda step, rows: np.zeros(3, bool))
    for wrong in (np.array([0, 1]), (1, 0)):
        with pytest.raises(ValueError, match=r"returned int64 values .* expected booleans"):
            population(2, [0.1, 0.2], callbacks=lambda step, rows, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="no population"):
        bilevel.optimize(
            PROBLEM, 0.0, {"l2": -3.0, "offset": 0.1}, 2.0, 1.0, METHOD, 5,
            callbacks=lambda step, rows: jnp.zeros(3, bool), progress=False,
        )  # fmt: skip


def test_extra_features_of_members_may_come_from_the_history(earlier):
    history = earlier.history
    extra = {"early_gradient": history["grad_norm"][:5].mean(0)}
    fitted = stopping.predictor(history["value"].T, extra)

    def of_members(rows):
        return {"early_gradient": rows["grad_norm"][:5].mean(0)}

    rule = stopping.stop_members(fitted, after=5, extra=of_members, best=0.0)
    rows = {name: history[name][:5] for name in history}
    stopped = rule(5, rows)
    np.testing.assert_array_equal(stopped, fitted.predict(rows["value"].T, extra).stop(0.0))
    assert rule(30, history) is None  # nothing is left to predict


# --- Optuna ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_pruner_saves_steps_of_a_study(direction):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sign = 1 if direction == "minimize" else -1
    pruner = stopping.optuna_pruner(finish=15, after=5, threshold=0.95)
    study = optuna.create_study(
        direction=direction, pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    taken = []

    def objective(trial):
        lr, _ = trial.suggest_float("lr", 1e-3, 1, log=True), trial.suggest_categorical("kind", ["a", "b"])
        floor = 0.3 + 0.1 * (np.log10(lr) + 1.3) ** 2
        for step in range(30):
            value = floor + 2 * (step + 1) ** -0.8
            trial.report(sign * value, step)
            taken.append(trial.number)
            if trial.should_prune():
                raise optuna.TrialPruned
        return sign * value

    study.optimize(objective, n_trials=60)
    states = [t.state.name for t in study.trials]
    assert states[:15] == ["COMPLETE"] * 15
    assert states.count("PRUNED") > 30
    assert len(taken) < 0.6 * 60 * 30
    everything = [0.3 + 0.1 * (np.log10(t.params["lr"]) + 1.3) ** 2 for t in study.trials]
    assert study.best_trial.number == int(np.argmin(everything))


def test_the_pruner_leaves_out_trials_that_were_not_finite():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(pruner=stopping.optuna_pruner(finish=5, after=2))

    def objective(trial):
        for step in range(3):
            trial.report(np.inf if trial.number in (0, 7) else 1.0 + trial.number / (step + 1), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 1.0 + trial.number / 3

    study.optimize(objective, n_trials=8)
    # Trials 1 to 5 are the five that count: the first to be judged is trial 6.
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6 + ["PRUNED"] * 2


def test_without_optuna_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"bilevel\[optuna\]"):
        stopping.optuna_pruner()


# --- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: stopping.predictor(CURVES[:4]), ValueError, "at least 5 finite runs"),
        (lambda: stopping.predictor(CURVES[0]), ValueError, "shape"),
        (lambda: stopping.predictor(CURVES, {"lr": np.ones(3)}), ValueError, r"extra\['lr'\]"),
        (lambda: stopping.predictor(CURVES, final=np.ones(3)), ValueError, "final must have"),
        (lambda: stopping.predictor(CURVES, regressor="ridge"), TypeError, "regressor"),
        (lambda: stopping.predictor(CURVES).predict(np.ones(61)), ValueError, "1 to 60 steps"),
        (lambda: stopping.predictor(CURVES).predict(CURVES[:, :3], EXTRA), ValueError, "got l2, lr"),
        (lambda: stopping.predictor(CURVES).signals(61), ValueError, "at most the 60"),
        (lambda: stopping.replay(CURVES[:10]), ValueError, "at least finish = 20"),
        (lambda: stopping.replay(np.where(CURVES > 2.5, np.nan, CURVES)), ValueError, "must be finite"),
        (lambda: stopping.replay(CURVES, {"lr": np.ones(201)}), ValueError, "each of 200 runs"),
        (lambda: stopping.replay(CURVES, threshold=1.0), ValueError, "threshold"),
        (lambda: stopping.replay(CURVES, finish=2), ValueError, "finish"),
        (lambda: stopping.stop_members(CURVES), TypeError, "stopping.predictor"),
        (lambda: stopping.stop_members(stopping.predictor(CURVES), threshold=0), ValueError, "threshold"),
    ],
)
def test_bad_input(call, error, part):
    with pytest.raises(error, match=part):
        call()


def test_the_callback_is_for_a_population():
    rule = stopping.stop_members(stopping.predictor(CURVES))
    with pytest.raises(ValueError, match="single run"):
        rule(10, {"step": np.arange(10), "value": np.ones(10)})
