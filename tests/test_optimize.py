"""The driver: how runs end, what they report, and that how they are cut up changes nothing."""

import dataclasses
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import RIDGE, ridge

import bilevel
from bilevel import STOP, Status

CAPACITY = sys.modules["bilevel.preparation"], "_CAPACITY"  # the package's attribute is the function
CHUNK_SECONDS = sys.modules["bilevel.run"], "_CHUNK_SECONDS"
TRAJECTORY_ROWS = sys.modules["bilevel.record"], "_TRAJECTORY_ROWS"
METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.dense()),
    optax.sgd(0.5),
    optax.chain(optax.clip(0.05), optax.sgd(10.0)),
    inner_steps=20,
)


def run(problem=RIDGE, params=None, hparams=0.0, train=None, valid=None, method=METHOD, steps=30, **options):
    return bilevel.optimize(
        problem,
        np.zeros(20) if params is None else params,
        hparams,
        ridge().train if train is None else train,
        ridge().valid if valid is None else valid,
        method,
        steps=steps,
        **{"progress": False, **options},
    )


def assert_same_run(a, b):
    """Bit for bit, but for the time they took."""
    assert a.history.keys() == b.history.keys()
    for name in a.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(a.history[name], b.history[name], err_msg=name)
    for x, y in (
        (a.params, b.params),
        (a.hparams, b.hparams),
        (a.trajectory, b.trajectory),
        (a.best, b.best),
    ):
        jax.tree.map(np.testing.assert_array_equal, _plain(x), _plain(y))
    assert (a.status, a.message) == (b.status, b.message)


def _plain(x):
    return vars(x) if isinstance(x, (bilevel.Trajectory, bilevel.Best)) else x


# --- How runs end --------------------------------------------------------------------------------------


def test_budget():
    result = run(steps=7)
    assert result.status == Status.BUDGET
    assert result.message == "All 7 outer steps are done."
    assert len(result.history["value"]) == 7


@pytest.mark.parametrize("judge_every", [1, 10])
def test_converged_takes_effect_at_judged_steps(judge_every):
    result = run(steps=200, tol=1e-4, judge_every=judge_every)
    norms = result.history["grad_norm"]
    last = len(norms) - 1
    assert result.status == Status.CONVERGED
    assert "tol = 0.0001" in result.message
    assert last % judge_every == 0
    assert norms[last] <= 1e-4
    assert np.all(norms[:last:judge_every] > 1e-4)
    first = int(np.argmax(norms <= 1e-4))
    assert (first == last) if judge_every == 1 else (last - judge_every < first <= last)


def test_no_tolerance_never_converges():
    # Twice as long as the gradient needs to be zero to rounding.
    result = run(steps=200)
    assert result.history["grad_norm"][-1] < 1e-14
    assert result.status == Status.BUDGET


def assert_kept_the_last_good_state(result, params=20):
    assert result.status == Status.DIVERGED
    assert np.all(np.isfinite(result.params))
    assert np.all(np.isfinite(result.hparams))
    accepted = result.history["accepted"]
    assert not accepted[-1]
    assert accepted[:-1].all()
    assert np.isfinite(result.history["value"][:-1]).all()
    if len(accepted) > 1:
        assert result.best.value == np.min(result.history["value"][:-1])
    assert f"Outer step {len(accepted) - 1}:" in result.message
    assert "last good state is kept" in result.message


# Out of range within one outer step; and slowly, where the loss, a square, overflows before params do.
@pytest.mark.parametrize(("rate", "inner_steps"), [(100.0, 200), (0.9, 20)])
def test_diverged_inner_loop(rate, inner_steps):
    method = bilevel.alternating(bilevel.implicit(bilevel.cg()), optax.sgd(rate), optax.sgd(0.1), inner_steps)
    result = run(method=method, steps=500)
    assert_kept_the_last_good_state(result)
    assert "lower the inner learning rate" in result.message


def test_diverged_outer_loop():
    method = bilevel.alternating(
        bilevel.implicit(bilevel.cg()), optax.sgd(0.5), optax.sgd(-1e200), inner_steps=20
    )
    result = run(method=method, steps=50)
    assert_kept_the_last_good_state(result)
    assert 1 < len(result.history["value"]) < 50


def test_objective_becomes_nan():
    problem = bilevel.Problem(
        RIDGE.inner, lambda w, h, batch: jnp.where(h < -2, jnp.nan, 1.0) * RIDGE.outer(w, h, batch)
    )
    result = run(problem)
    assert_kept_the_last_good_state(result)
    assert -2.5 <= float(result.hparams) < -2
    assert "the outer loss is not finite" in result.message
    assert result.best.hparams >= -2
    assert result.best.step == len(result.history["value"]) - 2


def test_indefinite_hessian_is_advised_upon():
    # A saddle in w[1], where gradient steps from zero stay.
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * (w[0] - h) ** 2 - 0.5 * w[1] ** 2 + 0.25 * w[1] ** 4,
        lambda w, h, batch: 0.5 * (w[0] - batch) ** 2 + w[1],
    )
    method = bilevel.alternating(
        bilevel.implicit(bilevel.cg()), optax.sgd(0.5), optax.sgd(0.1), inner_steps=5
    )
    with pytest.warns(RuntimeWarning, match=r"not positive definite in 5 of 5 outer steps.*cg\(damping="):
        result = run(problem, np.zeros(2), 0.0, np.ones(1), np.float64(1.0), method, steps=5)
    assert result.history["negative_curvature"].all()
    assert "not positive definite" in result.message
    assert np.isfinite(result.hparams)


def test_hparams_without_effect_are_advised_upon():
    # The second parameter has a penalty, and nothing to fit: it stays zero, and the outer loss ignores it.
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * (w[0] - batch) ** 2 + 0.5 * (1 + h**2) * w[1] ** 2,
        lambda w, h, batch: 0.5 * (w[0] - batch) ** 2,
    )
    with pytest.warns(RuntimeWarning, match="exactly zero throughout"):
        result = run(problem, np.zeros(2), 1.0, np.float64(1.0), np.float64(2.0), steps=3)
    assert "does the validation loss of the trained parameters depend on hparams" in result.message


def test_too_few_solver_steps_are_advised_upon():
    method = bilevel.alternating(
        bilevel.implicit(bilevel.neumann(2, 1e-3)), optax.sgd(0.5), optax.sgd(0.1), inner_steps=20
    )
    result = run(method=method, steps=3)
    assert "relative residual" in result.message
    assert "more solver steps" in result.message
    assert "relative residual" not in run(steps=3).message
    assert np.all(result.history["error"] > 0.9)


# --- Callbacks and interruption ------------------------------------------------------------------------


class Recorder:
    def __init__(self, returns=None):
        self.calls, self.returns = [], returns

    def __call__(self, step, rows):
        self.calls.append((step, {name: column.copy() for name, column in rows.items()}))
        assert all(type(column) is np.ndarray for column in rows.values())
        return self.returns(step) if self.returns else None


def test_callbacks_get_every_row_once():
    first, second = Recorder(), Recorder()
    result = run(steps=25, callbacks=[first, second])
    assert [step for step, _ in first.calls] == [step for step, _ in second.calls] == [10, 20, 25]
    for name, column in result.history.items():
        np.testing.assert_array_equal(np.concatenate([rows[name] for _, rows in first.calls]), column)
    assert_same_run(result, run(steps=25))


@pytest.mark.parametrize("seconds", [0.0, 1e-3, 100.0])
def test_stop_ends_at_the_same_step_whatever_the_chunks(seconds, monkeypatch):
    monkeypatch.setattr(*CHUNK_SECONDS, seconds)
    result = run(steps=100, callbacks=Recorder(lambda step: STOP if step >= 15 else None))
    assert len(result.history["value"]) == 20
    assert result.status == Status.INTERRUPTED
    assert "STOP" in result.message
    np.testing.assert_array_equal(result.hparams, run(steps=20).hparams)


def test_every_callback_is_called_although_one_stops():
    first, second = Recorder(lambda step: STOP), Recorder()
    run(steps=100, callbacks=[first, second])
    assert len(first.calls) == len(second.calls) == 1


def _press(step, rows):
    if step == 20:
        signal.raise_signal(signal.SIGINT)


def _raise(step, rows):
    if step == 20:
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [_press, _raise])
def test_interrupted_keeps_everything(interrupt):
    before = signal.getsignal(signal.SIGINT)
    result = run(steps=100, callbacks=interrupt)
    assert result.status == Status.INTERRUPTED
    assert result.message == "Interrupted by the user."
    assert signal.getsignal(signal.SIGINT) is before
    whole = run(steps=20)
    for name in whole.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(result.history[name], whole.history[name])
    np.testing.assert_array_equal(result.params, whole.params)
    assert result.best.value == whole.best.value


def test_an_exception_in_a_callback_carries_the_result():
    def fail(step, rows):
        if step == 20:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        run(steps=100, callbacks=fail)
    partial = caught.value.partial_result
    assert "partial_result" in caught.value.__notes__[0]
    assert partial.status == Status.INTERRUPTED
    assert "OSError" in partial.message
    assert len(partial.history["value"]) == 20
    np.testing.assert_array_equal(partial.params, run(steps=20).params)


# --- What is reported ----------------------------------------------------------------------------------


def test_best_is_the_pair_at_which_its_value_was_taken():
    # From below the optimum with steps that overshoot, so that the last pair is not the best.
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), optax.sgd(0.5), optax.sgd(20.0), inner_steps=100
    )
    result = run(hparams=-4.0, method=method, steps=25)
    value = result.history["value"]
    assert result.best.step == int(np.argmin(value)) < 24
    assert result.best.value == value[result.best.step]
    again = jax.jit(RIDGE.outer)(result.best.params, result.best.hparams, ridge().valid)
    assert float(again) == pytest.approx(result.best.value, rel=4e-16)
    # hparams of that pair are those before the step, as in the trajectory.
    np.testing.assert_array_equal(result.trajectory.hparams[result.best.step], result.best.hparams)
    w = ridge().solution(float(result.best.hparams))
    assert float(again) == pytest.approx(ridge().value_at(w), rel=1e-4)


def test_history_columns():
    result = run(steps=12)
    dtypes = {name: column.dtype for name, column in result.history.items()}
    floats = ["value", "grad_norm", "error", "solver_residual", "seconds", *bilevel.Counts._fields]
    assert dtypes == {
        "step": np.dtype(np.int64),
        "accepted": np.dtype(bool),
        "negative_curvature": np.dtype(bool),
        "nonfinite": np.dtype(np.int32),
        "solver_steps": np.dtype(np.int32),
        **dict.fromkeys(floats, np.dtype(np.float64)),
    }
    assert {column.shape for column in result.history.values()} == {(12,)}
    np.testing.assert_array_equal(result.history["step"], np.arange(12))
    assert np.all(np.diff(result.history["seconds"]) >= 0)
    assert result.history["seconds"][-1] <= result.seconds
    assert result.counts == {
        "inner_grad": 12 * 20 * 40,
        "outer_grad": 12 * 200,
        "hvp": 12 * 20 * 40,
        "cross": 12 * 40,
    }


def test_history_rows_are_the_steps_of_the_method():
    result = run(steps=3)
    data = ridge().train, ridge().valid
    state = METHOD.init(RIDGE, jnp.zeros(20), jnp.float64(0.0), *data, key=jax.random.key(0))
    for k in range(3):
        np.testing.assert_allclose(result.trajectory.hparams[k], state.hparams, rtol=1e-13, atol=1e-15)
        state, info = jax.jit(METHOD.step, static_argnums=0)(RIDGE, state, *data)
        for name in ("value", "grad_norm", "accepted", "nonfinite"):
            assert result.history[name][k] == pytest.approx(float(getattr(info, name)), rel=1e-12)
    np.testing.assert_allclose(result.params, state.params, rtol=1e-12)


def test_metrics_are_columns():
    def outer(w, h, batch):
        return RIDGE.outer(w, h, batch), {"size": jnp.sum(w**2), "rows": len(batch[1]) * jnp.ones(())}

    result = run(bilevel.Problem(RIDGE.inner, outer), test=ridge().train, steps=11)
    assert result.history["size"][0] > result.history["size"][-1] * 0.1 > 0
    assert np.all(result.history["rows"] == 200)
    measured = np.isfinite(result.history["test_rows"])
    np.testing.assert_array_equal(np.flatnonzero(measured), [0, 10])
    assert np.all(result.history["test_rows"][measured] == 40)


def test_test_split_is_reported_and_changes_nothing():
    other = ridge().train
    with_test, without = run(test=other), run()
    assert without.test is None
    last, best = (with_test.test[name]["value"] for name in ("last", "best"))
    measured = with_test.history.pop("test")
    assert_same_run(with_test, without)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(measured)), [0, 10, 20])
    w = np.zeros(20)
    for _ in range(20):  # the inner steps of the first outer one
        w = w - 0.5 * (ridge().hessian(0.0) @ w - ridge().a.T @ ridge().b / 40)
    assert measured[0] == pytest.approx(0.5 * np.mean((ridge().a @ w - ridge().b) ** 2), rel=1e-12)
    for pair, value in ((with_test, last), (with_test.best, best)):
        assert value == pytest.approx(float(RIDGE.outer(pair.params, pair.hparams, other)), rel=1e-13)


def test_sampled_validation_is_judged_on_all_rows():
    result = run(valid=bilevel.minibatches(ridge().valid, 20), steps=35)
    judged = result.history["judged"]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(judged)), [0, 10, 20, 30])
    assert result.best.step in (0, 10, 20, 30)
    assert result.best.value == np.nanmin(judged) == judged[result.best.step]
    assert ridge().value_at(np.asarray(result.best.params)) == pytest.approx(result.best.value, rel=1e-13)
    # The single batches say something else.
    assert np.abs(result.history["value"] - judged)[[0, 10, 20, 30]].min() > 1e-3


def test_without_best_it_is_the_last():
    result = run(keep_best=False, steps=12)
    np.testing.assert_array_equal(result.best.params, result.params)
    np.testing.assert_array_equal(result.best.hparams, result.hparams)
    kept = run(steps=12)
    np.testing.assert_array_equal(result.hparams, kept.hparams)
    assert result.best.step == 11


def test_trajectory_is_thinned_and_ends_at_the_end(monkeypatch):
    whole = run(steps=30)
    np.testing.assert_array_equal(whole.trajectory.steps, np.arange(31))
    assert float(whole.trajectory.hparams[0]) == 0.0
    np.testing.assert_array_equal(whole.trajectory.hparams[-1], whole.hparams)
    monkeypatch.setattr(*TRAJECTORY_ROWS, 8)
    thin = run(steps=30)
    np.testing.assert_array_equal(thin.trajectory.steps, [0, 4, 8, 12, 16, 20, 24, 28, 30])
    np.testing.assert_array_equal(thin.trajectory.hparams, whole.trajectory.hparams[thin.trajectory.steps])


def test_large_leaves_are_recorded_by_quantiles():
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * jnp.sum((w - batch - h["many"] - h["shift"]) ** 2),
        lambda w, h, batch: 0.5 * jnp.sum(w**2),
    )
    start = {"many": np.random.default_rng(0).standard_normal(40), "shift": np.zeros(3)[0]}
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), optax.sgd(0.5), optax.sgd(0.01), inner_steps=3
    )
    result = run(problem, np.zeros(40), start, np.ones(40), np.ones(40), method, steps=25)
    trail = result.trajectory
    assert trail.quantiles == (True, False)
    np.testing.assert_array_equal(trail.steps, [0, 10, 20, 25])
    assert trail.hparams["many"].shape == (4, 5)
    assert trail.hparams["shift"].shape == (4,)
    for row, many in ((0, start["many"]), (-1, result.hparams["many"])):
        np.testing.assert_allclose(
            trail.hparams["many"][row], np.quantile(many, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-12
        )
    assert np.all(np.diff(trail.hparams["shift"]) < 0)


def test_repr_is_readable():
    result = run(steps=12, hparams=-1.0)
    text = re.sub(r"in \d+\.\d s", "in SECONDS s", repr(result))
    value = result.history["value"]
    assert text.splitlines() == [
        "Result(BUDGET after 12 outer steps in SECONDS s",
        f"  value: last {value[-1]:.6g}, best {value.min():.6g} at step {value.argmin()}",
        f"  hparams: value = {float(result.hparams):.4g}",
        "  All 12 outer steps are done.)",
    ]


def test_plot_is_labelled():
    figure = run(steps=12).plot()
    assert type(figure).__name__ == "Figure"
    assert [ax.get_title() for ax in figure.axes] == ["outer loss", "gradient norm (free units)", "hparams"]
    assert {ax.get_xlabel() for ax in figure.axes} == {"outer step"}
    figure.canvas.draw()


def test_progress_goes_to_stderr_and_changes_nothing(capsys):
    quiet = run(steps=12)
    assert capsys.readouterr() == ("", "")
    shown = run(steps=12, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "outer steps" in err
    assert "12/12" in err
    assert_same_run(quiet, shown)


# --- Chunks and programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 1e-3, 100.0])
def test_chunk_length_is_no_input(seconds, monkeypatch):
    expected = run(steps=47, test=ridge().train)
    monkeypatch.setattr(*CHUNK_SECONDS, seconds)
    assert_same_run(run(steps=47, test=ridge().train), expected)


def test_chunk_capacity_is_no_input(monkeypatch):
    expected = run(steps=47)
    monkeypatch.setattr(*CAPACITY, 5)
    monkeypatch.setattr(*CHUNK_SECONDS, 100.0)
    assert_same_run(run(steps=47), expected)


def test_the_second_call_compiles_and_traces_nothing(compiled):
    traced = []

    def inner(w, h, batch):
        traced.append(None)
        return RIDGE.inner(w, h, batch)

    problem = bilevel.Problem(inner, RIDGE.outer)
    run(problem, steps=30)
    assert 0 < len(traced) <= 20
    traced.clear()
    compiled()
    run(problem, steps=30)
    run(problem, steps=45)
    run(problem, hparams=-1.0, steps=45, tol=1e-3)
    assert (compiled(), traced) == (0, [])
    key = jax.random.key(7)
    compiled()
    run(problem, steps=30, key=key)
    assert (compiled(), traced) == (0, [])  # a key is an argument like any other


def test_scalars_of_any_kind_share_one_program(compiled):
    results = [run(hparams=-1.0, steps=12)]
    kinds = (np.float64(-1.0), np.array(-1.0), jnp.float64(-1.0), jnp.asarray(-1.0))
    compiled()
    results += [run(hparams=hparams, steps=12) for hparams in kinds]
    assert compiled() <= 1  # the cast that makes jnp.asarray(-1.0), weakly typed, an ordinary float64
    for result in results[1:]:
        assert_same_run(result, results[0])


def test_arrays_of_the_user_stay_theirs():
    params, hparams = jnp.zeros(20), jnp.float64(-1.0)
    train, valid, key = ridge().train, ridge().valid, jax.random.key(1)
    for _ in range(2):
        result = run(params=params, hparams=hparams, train=train, valid=valid, key=key, steps=12)
    for array in jax.tree.leaves((params, hparams, train, valid, key, result.params, result.best.params)):
        assert not array.is_deleted()
    np.testing.assert_array_equal(params, 0)
    # What a run returns can be where the next one starts.
    run(params=result.params, hparams=result.hparams, steps=12)
    assert not result.params.is_deleted()


# --- End to end ----------------------------------------------------------------------------------------


def test_dropout_with_keys_in_the_batch():
    def inner(w, h, batch):
        (a, b), key = batch
        mask = jax.random.bernoulli(key, 0.9, a.shape) / 0.9
        return RIDGE.inner(w, h, (a * mask, b))

    def outer(w, h, batch):
        return RIDGE.outer(w, h, batch)

    problem, source = bilevel.Problem(inner, outer), bilevel.with_rng(ridge().train)
    first = run(problem, train=source, steps=15, key=jax.random.key(1))
    assert_same_run(run(problem, train=source, steps=15, key=jax.random.key(1)), first)
    other = run(problem, train=source, steps=15, key=jax.random.key(2))
    assert not np.array_equal(first.history["value"], other.history["value"])
    assert first.history["value"][-1] < first.history["value"][0]
    assert first.history["accepted"].all()


def test_flax_state_as_params(tmp_path):
    from flax import nnx

    graph, params = nnx.split(nnx.Linear(20, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64))

    def penalised(state, h, batch):
        weights = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state))
        return loss(state, h, batch) + 0.5 * jnp.exp(h["log_l2"]) * weights

    def loss(state, h, batch):
        a, b = batch
        return 0.5 * jnp.mean((nnx.merge(graph, state)(a)[:, 0] - b) ** 2)

    result = run(bilevel.Problem(penalised, loss), params, {"log_l2": 0.0}, steps=150)
    assert result.status == Status.BUDGET
    # Ridge regression on one more feature, the bias; at its stationary point.
    with_bias = dataclasses.replace(
        ridge(), a=np.c_[ridge().a, np.ones(40)], v=np.c_[ridge().v, np.ones(200)]
    )
    log_l2 = float(result.hparams["log_l2"])
    assert abs(with_bias.hypergradient(log_l2)) <= 1e-8
    assert result.history["value"][-1] == pytest.approx(with_bias.value(log_l2), rel=1e-8)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    result.save(tmp_path / "run.npz")
    loaded = bilevel.load(tmp_path / "run.npz", like=(params, {"log_l2": 0.0}))
    assert type(loaded.params) is type(params)
    assert_same_run(loaded, result)
    reached = nnx.merge(graph, loaded.best.params)(ridge().valid[0])[:, 0]
    assert 0.5 * float(jnp.mean((reached - ridge().valid[1]) ** 2)) == pytest.approx(
        result.best.value, rel=1e-12
    )


# --- Without a method -----------------------------------------------------------------------------------


def whole(arrays, n):
    return jax.tree.map(lambda x: np.stack([x] * n), arrays)


DATA = ridge().train
FROM_START = dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20) + 0 * h)
ISTA = bilevel.FixedPoint(
    bilevel.proximal_gradient(RIDGE.inner, lambda w, h, s: bilevel.prox.l1(w, 1e-3 * s), 0.1), RIDGE.outer
)
MAP = bilevel.FixedPoint(lambda w, h, batch: w - 0.25 * jax.grad(RIDGE.inner)(w, h, batch), outer=RIDGE.outer)


@pytest.mark.parametrize(
    ("problem", "train", "name"),
    [
        (RIDGE, DATA, "DEFAULT_METHOD"),
        (RIDGE, bilevel.minibatches(DATA, 4), "DEFAULT_SAMPLED"),
        (RIDGE, [DATA] * 2000, "DEFAULT_SAMPLED"),
        (RIDGE, bilevel.stacked(whole(DATA, 7)), "DEFAULT_SAMPLED"),
        (FROM_START, DATA, "DEFAULT_FROM_START"),
        (FROM_START, bilevel.stacked(whole(DATA, 7)), "DEFAULT_FROM_START"),
        (MAP, DATA, "DEFAULT_FIXED_POINT"),
        (ISTA, DATA, "DEFAULT_PROXIMAL"),
        (MAP, bilevel.minibatches(DATA, 4), "DEFAULT_FIXED_POINT"),
    ],
)
def test_each_kind_of_problem_and_data_has_a_default(problem, train, name):
    module = sys.modules["bilevel.defaults"]
    train = iter(train) if isinstance(train, list) else train
    method = module.default_method(problem, train)
    if isinstance(train, bilevel.data.Stacked):
        assert method == dataclasses.replace(getattr(module, name), inner_steps=7)
    else:
        assert method is getattr(module, name)
    start = ridge().value_at(np.zeros(20))
    result = run(problem, train=train, method=None, steps=40)
    assert result.status == Status.BUDGET
    assert ridge().value_at(result.params) < start


def test_default_of_model_state_is_that_whose_inner_steps_advance_it():
    module = sys.modules["bilevel.defaults"]
    problem = bilevel.Problem(
        inner=lambda w, h, b, state: (RIDGE.inner(w, h, b), state + 1),
        outer=lambda w, h, b, state: RIDGE.outer(w, h, b),
        has_state=True,
    )
    assert module.default_method(problem, DATA) is module.DEFAULT_SAMPLED
    result = run(problem, method=None, steps=3, model_state=np.zeros(()))
    assert result.model_state == 60


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("log_l2", [-8.0, 1.0])
def test_the_default_finds_the_optimum_from_afar(log_l2, dtype):
    lowest = min(ridge().value(h) for h in np.linspace(-6, 1, 2001))
    args = np.zeros(20), log_l2, ridge().train, ridge().valid
    result = run(RIDGE, *jax.tree.map(lambda x: np.asarray(x, dtype), args), method=None, steps=400)
    assert result.status == Status.BUDGET
    reached = ridge().value(float(result.hparams))
    assert reached <= 1.001 * lowest
    np.testing.assert_allclose(result.history["value"][-1], reached, rtol=1e-3)
