"""Runs that are cut short, judged, skipped or fed with unusual numbers keep their promises."""

import importlib
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status, diagnosis
from bilevel.run import Run

DATA = {"x": np.linspace(-1, 1, 8), "y": np.linspace(-1, 1, 8) ** 2}
W, H = np.float64(0.5), {"l2": np.float64(0.3)}


def inner(params, hparams, batch):
    return jnp.mean((batch["x"] * params - batch["y"]) ** 2) + 0.5 * hparams["l2"] * params**2


def outer(params, hparams, batch):
    del hparams
    return jnp.mean((batch["x"] * params - batch["y"] - 0.2) ** 2 + 0.1 * params)


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())


def method(outer=None, **settings):
    return bilevel.alternating(
        bilevel.implicit(),
        optax.sgd(0.3),
        optax.adam(0.05) if outer is None else outer,
        **{"inner_steps": 3, **settings},
    )


METHOD = method()


def run(problem=PROBLEM, train=DATA, valid=DATA, method=METHOD, steps=12, **options):
    return bilevel.optimize(problem, W, H, train, valid, method, steps, **{"progress": False, **options})


def test_two_interrupts_in_a_row_keep_whole_chunks(monkeypatch):
    collect, calls = Run._collect, []

    def struck(self):
        calls.append(self.done)
        if len(calls) == 3:  # while a chunk is under way
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        collect(self)

    monkeypatch.setattr(Run, "_collect", struck)
    result = run(steps=1000)
    assert result.status == Status.INTERRUPTED
    done = len(result.history["value"])
    assert calls == [0, 1, 2]
    assert 2 < done < 1000
    assert int(result.state.count) == done
    assert len(result.history["seconds"]) == done
    assert result.trajectory.steps[-1] == done
    assert result.best.value == result.history["value"][result.best.step]


def test_a_noisy_validation_is_judged_on_one_draw():
    def noisy(params, hparams, batch):
        arrays, key = batch
        return outer(params, hparams, arrays) + jax.random.normal(key) ** 2

    problem = bilevel.Problem(inner, noisy, constraints=bilevel.positive())
    result = run(problem, valid=bilevel.with_rng(DATA), steps=60)
    judged = result.history["judged"]
    assert np.isfinite(judged).sum() == 6
    assert result.best.value <= np.nanmin(judged)
    assert result.history["value"].min() < result.best.value  # a lucky draw is no best


def test_a_short_run_with_sampled_validation_judges_its_end():
    result = run(valid=bilevel.minibatches(DATA, 4), steps=9)
    assert np.isfinite(result.history["judged"]).sum() == 1
    end = float(outer(result.params, result.hparams, DATA))
    assert end < result.history["judged"][0]
    assert result.best.value == pytest.approx(end, rel=1e-12)
    assert (result.best.step, float(result.best.hparams["l2"])) == (9, float(result.hparams["l2"]))


def test_period_refuses_an_iterable():
    with pytest.raises(ValueError, match=r"period would waste the batches of an iterable"):
        run(train=iter([DATA] * 40), method=method(period=2))


def test_skipped_steps_draw_fresh_batches():
    seen = []

    def recorded(params, hparams, batch):
        jax.debug.callback(lambda i: seen.append(int(i[0])), batch["i"])
        return inner(params, hparams, batch)

    source = bilevel.minibatches({**DATA, "i": np.arange(8)}, 1)
    problem = bilevel.Problem(recorded, outer, constraints=bilevel.positive())
    chosen = bilevel.alternating(
        bilevel.implicit(bilevel.neumann(1, 0.1)), optax.sgd(0.1), optax.sgd(0.1), period=4
    )
    state = chosen.init(problem, W, H, source, DATA, key=jax.random.key(0))
    step = jax.jit(lambda s: chosen.step(problem, s, source, DATA)[0])
    jax.effects_barrier()
    drawn = []
    for _ in range(4):
        seen.clear()
        state = step(state)
        jax.effects_barrier()
        drawn.append(set(seen))
    assert int(state.position) == 1
    assert len(set().union(*drawn[1:])) > 1


def test_a_metric_may_be_a_python_number():
    problem = bilevel.Problem(
        inner, lambda p, h, b: (outer(p, h, b), {"c": 1.5}), constraints=bilevel.positive()
    )
    result = run(problem, test=DATA)
    assert result.history["c"].tolist() == [1.5] * 12
    assert result.test["last"]["c"] == 1.5


def test_a_loss_in_low_precision_does_not_round_the_counts():
    problem = bilevel.Problem(
        lambda p, h, b: inner(p, h, b).astype(jnp.bfloat16),
        lambda p, h, b: outer(p, h, b).astype(jnp.bfloat16),
        constraints=bilevel.positive(),
    )
    rows = {"x": np.linspace(-1, 1, 501), "y": np.zeros(501)}
    result = run(problem, train=rows, valid=rows, steps=2)
    assert result.history["outer_grad"].tolist() == [501.0, 501.0]
    assert result.history["inner_grad"].tolist() == [1503.0, 1503.0]
    assert result.trajectory.hparams["l2"].dtype == np.float64


def test_optimisers_may_start_from_an_infinite_state():
    plateau = optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(accumulation_size=50))
    chosen = bilevel.alternating(bilevel.implicit(), plateau, optax.adam(0.05), inner_steps=3)
    result = run(method=chosen)
    assert result.status == Status.BUDGET
    assert result.history["accepted"].all()


def test_a_warning_that_is_an_error_carries_the_result():
    problem = bilevel.Problem(inner, lambda p, h, b: jnp.mean(b["x"]) + 0 * p, constraints=bilevel.positive())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="exactly zero") as caught:
            run(problem)
    assert caught.value.partial_result.status == Status.STALLED
    assert len(caught.value.partial_result.history["value"]) == 12


def test_fixed_hyperparameters_stand_still_without_advice():
    result = run(bilevel.Problem(inner, outer, constraints=bilevel.fixed()))
    assert result.status == Status.BUDGET
    assert result.message == "All 12 outer steps are done."


STEPS = np.arange(50)


@pytest.mark.parametrize(
    ("outer", "test", "named"),
    [
        (1 - STEPS / 100, 1 + (STEPS - 10.0) ** 2 / 400, True),
        (1 + STEPS / 100, 1 + (STEPS - 10.0) ** 2 / 400, False),
        (1 - STEPS / 100, 1 - STEPS / 200, False),
        (1 - STEPS / 100, 1e-3 * (1 + STEPS % 2), False),
    ],
    ids=["overfits", "outer rises too", "both fall", "noise"],
)
def test_overfitting_is_named_where_outer_falls_and_test_rises(outer, test, named):
    history = {
        "step": STEPS,
        "value": outer,
        "test": test,
        "accepted": np.ones(50, bool),
        "grad_norm": np.ones(50),
        "error": np.zeros(50),
        "solver_steps": np.ones(50),
        "negative_curvature": np.zeros(50, bool),
    }
    status, advice, warned = diagnosis.final(Status.BUDGET, history, may_rest=False, bounded=False)
    assert (status, warned) == (Status.BUDGET, [])
    assert any("overfit the validation data" in sentence for sentence in advice) == named


def test_outer_line_searches_are_refused():
    with pytest.raises(TypeError, match="outer must be an optax optimiser that needs gradients only"):
        run(method=method(outer=optax.lbfgs()))


def test_unrolling_a_line_search_is_refused():
    chosen = bilevel.alternating(bilevel.unrolled(), optax.lbfgs(), optax.adam(0.1), inner_steps=2)
    with pytest.raises(ValueError, match="reverse mode cannot pass through the while loop"):
        run(method=chosen)


def test_one_iterable_cannot_be_both():
    both = iter([DATA] * 10)
    with pytest.raises(ValueError, match="the same iterable"):
        run(train=both, valid=both)


def test_a_restarting_state_can_be_donated():
    chosen = method(restart=True)
    state = chosen.init(PROBLEM, W, H, DATA, DATA, key=jax.random.key(0))
    step = jax.jit(lambda s: chosen.step(PROBLEM, s, DATA, DATA)[0], donate_argnums=0)
    assert np.isfinite(float(step(step(state)).params))


def test_losses_must_be_hashable():
    class Loss:
        __hash__ = None

        def __call__(self, params, hparams, batch):
            return inner(params, hparams, batch)

    with pytest.raises(TypeError, match="inner must be hashable"):
        bilevel.Problem(Loss(), outer)


IDENTITY = bilevel.Problem(
    lambda w, h, b: 0.5 * jnp.sum((w - b - h["l2"]) ** 2),
    lambda w, h, b: 0.5 * jnp.sum((w - 1 + b) ** 2) + 0 * h["l2"],
)


@pytest.mark.parametrize(
    "solver", [bilevel.neumann(5, 1.0), bilevel.dense(), bilevel.cg()], ids=["neumann", "dense", "cg"]
)
@pytest.mark.parametrize("w", [1.0, 0.5], ids=["zero right-hand side", "exact powers"])
def test_solvers_do_not_cry_wolf(solver, w):
    estimate = bilevel.hypergradient(IDENTITY, bilevel.implicit(solver))(
        np.full(3, w), {"l2": np.float64(0.1)}, np.zeros(3), np.zeros(3)
    )
    assert not estimate.solve.negative_curvature
    assert float(estimate.error) == 0
    assert float(estimate.grad["l2"]) == pytest.approx(3 * (w - 1), abs=1e-15)


def test_neumann_remembers_a_negative_direction_met_early():
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * jnp.sum(b * w**2) - jnp.sum(h["l2"] * w),
        lambda w, h, b: jnp.sum(jnp.array([1.0, 0.1]) * w),
    )
    for terms in (2, 3, 4, 6):
        estimate = bilevel.hypergradient(problem, bilevel.implicit(bilevel.neumann(terms, 0.5)))(
            np.ones(2), {"l2": np.float64(0.1)}, np.array([-0.05, 3.0]), np.zeros(2)
        )
        assert estimate.solve.negative_curvature, terms


def test_a_status_prints_its_name():
    assert (str(Status.BUDGET), f"{Status.DIVERGED}") == ("BUDGET", "DIVERGED")


def test_a_failure_of_the_device_is_not_masked(monkeypatch):
    def fails(self):
        if self.done == 2:
            carry, _ = self.pending
            jax.tree.map(lambda x: x.delete(), carry)
            raise OSError("the device is gone")
        collect(self)

    collect = Run._collect
    monkeypatch.setattr(Run, "_collect", fails)
    with pytest.raises(OSError, match="the device is gone"):
        run(steps=50)


def test_a_run_that_needs_more_memory_than_there_is_says_so(monkeypatch):
    # The module, whose name in the package is that of the function.
    module = importlib.import_module("bilevel.memory")
    monkeypatch.setattr(module, "_device_memory", lambda: 10)
    with pytest.warns(RuntimeWarning, match="needs more memory than the device has: Memory"):
        run(steps=2)


def test_a_state_does_not_look_like_a_mapping():
    """Orbax asks a tree of shapes for the attributes of one, and a property would compute with shapes."""
    state = METHOD.init(PROBLEM, W, H, DATA, DATA, key=jax.random.key(0))
    assert not set(dir(state)) & set(dir(dict)) - set(dir(object))
