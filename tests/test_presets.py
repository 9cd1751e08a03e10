"""Single-loop and stochastic methods: their updates as written, their noise, their limits, their mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LOGISTIC,
    RIDGE,
    RIDGE_LOG_L2,
    Ridge,
    least_squares,
    logistic_data,
    logistic_solution,
    ridge,
    ridge_train,
    ridge_valid,
)

import bilevel
from bilevel import Status
from bilevel.methods.saba import SabaState
from bilevel.problem import Draw

R = ridge()
KEY = jax.random.key(0)
SGD = optax.sgd(0.05)


def states(method, start, steps, train, valid, problem=RIDGE, size=20):
    """The state before each outer step and after the last, and the infos."""
    state = method.init(problem, jnp.full(size, 0.1), jnp.asarray(start), train, valid, key=KEY)

    def body(state, _):
        new, info = method.step(problem, state, train, valid)
        return new, (state, info)

    last, (before, infos) = jax.jit(lambda s: jax.lax.scan(body, s, None, length=steps))(state)
    return before, last, infos


# --- The updates as written, with whole arrays -------------------------------------------------------------


def by_hand(steps, momentum=0.0, ahead=False):
    """SOBA in numpy: hyperparameter, params and running vector before each step.

    ``ahead``: v makes its first step, from zero, before all others.
    """
    w, u, mean, rows = np.full(20, 0.1), -1.0, 0.0, []
    v = 0.2 * R.outer_grad(w) if ahead else np.zeros(20)
    for k in range(steps):
        rows.append((u, w, v))
        hessian, slope = R.hessian(u), R.outer_grad(w)
        gradient = hessian @ w - R.a.T @ R.b / R.b.size
        new = v - 0.2 * (hessian @ v - slope)
        mean = momentum * mean - (1 - momentum) * R.cross(w, u, v if k or ahead else new)
        w, v, u = w - 0.1 * gradient, new, u - 0.3 * mean
    return (np.array(x) for x in zip(*rows, strict=True))


@pytest.mark.parametrize("name", ["soba", "ma_soba", "saba", "srba"])
def test_a_single_loop_moves_all_from_one_point(name):
    settings = {"momentum": 0.6} if name == "ma_soba" else {}
    method = getattr(bilevel, name)(optax.sgd(0.1), optax.sgd(0.3), 0.2, **settings)
    before, _, infos = states(method, -1.0, 8, R.train, R.valid)
    ahead = name in ("saba", "srba")
    u, w, v = by_hand(8, ahead=ahead, **settings)
    np.testing.assert_allclose(before.hparams, u, rtol=1e-12)
    np.testing.assert_allclose(before.params, w, rtol=1e-11, atol=1e-14)
    running = before.estimator.running.v if ahead else before.estimator.v
    np.testing.assert_allclose(running, v, rtol=1e-11, atol=1e-14)
    assert np.asarray(infos.counts.hvp).tolist() == [40] * 8


def test_steps_of_the_linear_system_may_fall():
    falling = bilevel.soba(optax.sgd(0.1), optax.sgd(0.3), lambda k: 0.2 / (k + 1.0))
    before, last, _ = states(falling, -1.0, 3, R.train, R.valid)
    v = np.zeros(20)
    for k in range(3):
        w, u = np.asarray(before.params[k]), float(before.hparams[k])
        v = v - 0.2 / (k + 1) * (R.hessian(u) @ v - R.outer_grad(w))
    np.testing.assert_allclose(last.estimator.v, v, rtol=1e-12)


# --- Noise -------------------------------------------------------------------------------------------------

BATCHES = {
    "train": bilevel.minibatches(R.train, 10, fixed=True),
    "valid": bilevel.minibatches(R.valid, 50, fixed=True),
}
STEADY = optax.chain(optax.clip(0.1), optax.sgd(0.5))


@functools.cache
def end(name, steps):
    method = getattr(bilevel, name)(optax.sgd(0.1), STEADY, 0.1)
    _, last, infos = states(method, RIDGE_LOG_L2 + 0.5, steps, **BATCHES)
    return last, infos


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_reduced_variance_ends_at_the_solution_with_fixed_steps(name):
    last, infos = end(name, 14000)
    assert abs(float(last.hparams) - RIDGE_LOG_L2) < 1e-6
    np.testing.assert_allclose(last.params, R.solution(RIDGE_LOG_L2), atol=1e-7)
    assert np.asarray(infos.grad_norm[-20:]).max() < 1e-7


def test_plain_batches_do_not():
    last, infos = end("soba", 4000)
    assert np.asarray(infos.grad_norm[-200:]).max() > 1e-3
    assert 1e-4 < abs(float(last.hparams) - RIDGE_LOG_L2) < 0.5


def test_the_table_of_saba_is_what_it_stands_for():
    before, last, _ = states(bilevel.saba(SGD, STEADY, 0.1), -2.0, 40, **BATCHES)
    memory = last.estimator
    assert isinstance(memory, SabaState)
    for mean, table in zip(jax.tree.leaves(memory.mean), jax.tree.leaves(memory.table), strict=True):
        np.testing.assert_allclose(mean, np.mean(table, 0), rtol=1e-11, atol=1e-13)
    # In the mean over the batches of both levels a step is that of all examples.
    state = jax.tree.map(lambda x: x[-1], before)
    method = bilevel.saba(SGD, optax.sgd(1.0), 0.1)

    def moved(count):
        return method.step(RIDGE, dataclasses.replace(state, count=count), **BATCHES)[0].params

    w, u = np.asarray(state.params), float(state.hparams)
    gradient = R.hessian(u) @ w - R.a.T @ R.b / R.b.size
    steps = (w - np.asarray(jax.jit(jax.vmap(moved))(jnp.arange(4000, 4400, dtype=jnp.int32)))) / 0.05
    error = np.abs(steps.mean(0) - gradient)
    assert (error <= 5 * steps.std(0) / np.sqrt(len(steps)) + 1e-12).all()
    assert steps.std(0).max() > 1e-3


def test_srba_passes_over_all_examples_once_a_period():
    method = bilevel.srba(SGD, STEADY, 0.1, period=3)
    _, _, infos = states(method, -2.0, 7, **BATCHES)
    assert np.asarray(infos.counts.inner_grad).tolist() == [40, 20, 20, 40, 20, 20, 40]
    assert np.asarray(infos.counts.outer_grad).tolist() == [200, 100, 100, 200, 100, 100, 200]
    _, _, infos = states(bilevel.srba(SGD, STEADY, 0.1), -2.0, 5, **BATCHES)
    assert np.asarray(infos.counts.cross).tolist() == [40, 20, 20, 20, 40]


def test_srba_keeps_the_solution_of_the_system_in_its_ball():
    method = bilevel.srba(SGD, STEADY, 0.1, radius=0.05)
    before, _, _ = states(method, -2.0, 60, **BATCHES)
    sizes = np.linalg.norm(before.estimator.running.v, axis=1)
    assert sizes.max() <= 0.05 * (1 + 1e-12)
    assert sizes[-1] > 0.0499


# --- On a problem of two thousand rows, with one common setting --------------------------------------------

N, D = 2000, 10


@functools.cache
def large() -> Ridge:
    return random_ridge(N, D, noise=3.0)


def random_ridge(n, d, noise):
    rng = np.random.default_rng(1)
    w = rng.standard_normal(d)

    def rows():
        x = rng.standard_normal((n, d))
        return x, x @ w + noise * rng.standard_normal(n)

    return Ridge(*rows(), *rows())


def least(problem):
    """The best log-L2 and its value."""
    grid = np.linspace(-8, 2, 1001)
    values = [problem.value(u) for u in grid]
    place = int(np.argmin(values))
    assert 0 < place < 1000
    return grid[place], values[place]


PRESETS = {
    "soba": bilevel.soba, "ma_soba": bilevel.ma_soba, "saba": bilevel.saba, "srba": bilevel.srba,
    "stocbio": bilevel.stocbio, "amigo": bilevel.amigo, "ttsa": bilevel.ttsa, "f2sa": bilevel.f2sa,
    "bome": bilevel.bome,
}  # fmt: skip
FIRST_ORDER = ("f2sa", "bome")


@pytest.mark.parametrize("name", PRESETS)
def test_with_one_common_setting_each_closes_the_gap(name):
    system = {} if name in FIRST_ORDER else {"linear_step": 0.05}
    method = PRESETS[name](inner=optax.sgd(0.05), outer=optax.sgd(0.5), **system)
    train, valid = (bilevel.minibatches(part, 64, fixed=True) for part in (large().train, large().valid))
    state = method.init(RIDGE, jnp.zeros(D), jnp.float64(2.0), train, valid, key=KEY)

    def body(_, state):
        return method.step(RIDGE, state, train, valid)[0]

    last = jax.jit(lambda state: jax.lax.fori_loop(0, 4000, body, state))(state)
    place, best = least(large())
    assert abs(float(last.hparams) - place) < 3
    assert large().value(float(last.hparams)) - best <= 0.01 * (large().value(2.0) - best)
    assert int(last.rejected) == 0


# --- Those that no row of the table fits -------------------------------------------------------------------


def test_a_randomized_series_is_right_in_the_mean():
    method, series = bilevel.ttsa(SGD, SGD, 0.3, terms=4), R.neumann(0.0, 4, 0.3)
    fn = bilevel.hypergradient(RIDGE, method.estimator)
    at = jnp.asarray(R.solution(0.0)), jnp.asarray(0.0), R.train, R.valid
    keys = jax.random.split(KEY, 400)
    grads = np.asarray(jax.jit(jax.vmap(lambda key: fn(*at, key=key).grad))(keys))
    terms = np.diff([R.neumann(0.0, k, 0.3) if k else 0.0 for k in range(5)])
    assert len(np.unique(grads.round(9))) == 4
    np.testing.assert_allclose(np.unique(grads.round(9)), np.unique((4 * terms).round(9)), rtol=1e-7)
    assert abs(grads.mean() - series) <= 4 * grads.std() / 20


def test_bome_comes_closer_with_smaller_steps():
    """Where its barrier is stiffer than the inner step allows it cycles: the error is of the step's order."""
    problem = random_ridge(100, 5, noise=3.0)
    solution, ends = least(problem)[0], []
    for rate in (0.2, 0.1, 0.05):
        method = bilevel.bome(optax.sgd(rate), optax.sgd(rate), inner_steps=int(8 / rate))
        before, _, _ = states(method, solution + 0.5, int(400 / rate), problem.train, problem.valid, size=5)
        ends.append(np.abs(np.asarray(before.hparams[-200:]) - solution).max())
    assert 0.1 > ends[0] > 1.5 * ends[1] > 1.5**2 * ends[2] > 0


def test_bome_moves_as_written():
    w, u, rate = R.solution(-1.0) + 0.1, -1.0, 0.1
    method = bilevel.bome(optax.sgd(rate), optax.sgd(0.3), inner_steps=3, ratio=5.0)
    state = method.init(RIDGE, jnp.asarray(w), jnp.asarray(u), R.train, R.valid, key=KEY)
    after, info = method.step(RIDGE, state, R.train, R.valid)

    def gradient(w):
        return R.hessian(u) @ w - R.a.T @ R.b / R.b.size

    lower = w
    for _ in range(3):
        lower = lower - rate * gradient(lower)
    rise = np.append(gradient(w), 0.5 * np.exp(u) * (w @ w - lower @ lower))
    slope = np.append(R.outer_grad(w), 0.0)
    weight = max(5.0 - slope @ rise / (rise @ rise), 0)
    assert weight > 0
    direction = slope + weight * rise
    np.testing.assert_allclose(after.params, w - rate * direction[:-1], rtol=1e-11)
    np.testing.assert_allclose(after.hparams, u - 0.3 * direction[-1], rtol=1e-11)
    np.testing.assert_allclose(info.value, R.value_at(np.asarray(after.params)), rtol=1e-12)


def test_f2sa_with_a_growing_multiplier_ends_at_the_solution():
    method = bilevel.f2sa(optax.sgd(0.5), STEADY, lambda k: 10.0 * 1.01**k, inner_steps=100)
    _, last, _ = states(method, RIDGE_LOG_L2 + 0.5, 1200, R.train, R.valid)
    assert abs(float(last.hparams) - RIDGE_LOG_L2) < 1e-4
    fixed = bilevel.f2sa(optax.sgd(0.5), STEADY, 10.0, inner_steps=100)
    _, last, _ = states(fixed, RIDGE_LOG_L2 + 0.5, 1200, R.train, R.valid)
    assert abs(float(last.hparams) - RIDGE_LOG_L2) > 0.05


def test_slip_warms_up_and_then_takes_steps_of_one_length():
    outer = bilevel.normalized_momentum(0.01, 0.9)
    method = bilevel.slip(optax.sgd(0.1), outer, 0.1, terms=20, warm_start=50)
    before, _, infos = states(method, RIDGE_LOG_L2 + 1, 800, **BATCHES)
    u = np.asarray(before.free)
    assert u[1] == u[0]
    np.testing.assert_allclose(np.abs(np.diff(u[1:])), 0.01, rtol=1e-12)
    assert np.asarray(infos.counts.inner_grad[:3]).tolist() == [510, 10, 10]  # one to measure the end
    assert np.abs(u[-50:] - RIDGE_LOG_L2).max() < 1.0
    # The solution at the first hyperparameters, to where 50 steps of batches come.
    assert np.linalg.norm(before.params[1] - R.solution(u[0])) < 0.3 * np.linalg.norm(R.solution(u[0]))


def test_hyperparameters_are_in_natural_units_and_move_in_free_ones():
    natural = bilevel.Problem(
        lambda w, l2, b: least_squares(w, b) + 0.5 * l2 * w @ w, ridge_valid, constraints=bilevel.positive()
    )
    for name in ("srba", "bome"):
        system = () if name == "bome" else (0.1,)
        method = getattr(bilevel, name)(SGD, optax.sgd(0.3), *system)
        free, _, _ = states(method, -1.0, 20, R.train, R.valid)
        own, _, _ = states(method, np.exp(-1.0), 20, R.train, R.valid, natural)
        np.testing.assert_allclose(own.hparams, np.exp(free.hparams), rtol=1e-9)


# --- In the driver -----------------------------------------------------------------------------------------


def every(names=(*PRESETS, "slip")):
    for name in names:
        outer = bilevel.normalized_momentum(0.01) if name == "slip" else STEADY
        system = {} if name in FIRST_ORDER else {"linear_step": 0.1}
        few = {"inner_steps": 2} if name in ("stocbio", "amigo", *FIRST_ORDER) else {}
        factory = PRESETS.get(name, bilevel.slip)
        yield pytest.param(factory(optax.sgd(0.1), outer, **system, **few), id=name)


@pytest.mark.parametrize("method", list(every(tuple(name for name in (*PRESETS, "slip") if name != "srba"))))
def test_a_nan_batch_is_rejected_and_counted(method):
    a, b = np.array(R.a), np.array(R.b)
    a[3, 0] = np.nan
    train = bilevel.minibatches((a, b), 4, fixed=True)
    state = method.init(RIDGE, jnp.zeros(20), jnp.float64(-1.0), train, R.valid, key=KEY)
    step = jax.jit(functools.partial(method.step, RIDGE))
    rejected = 0
    for _ in range(40):
        before = state
        state, info = step(before, train, R.valid)
        if not bool(info.accepted):
            rejected += 1
            assert int(state.rejected) == int(before.rejected) + 1
            np.testing.assert_array_equal(state.params, before.params)
            np.testing.assert_array_equal(state.hparams, before.hparams)
            kept = jax.tree.leaves(state.estimator), jax.tree.leaves(before.estimator)
            assert all(np.array_equal(x, y) for x, y in zip(*kept, strict=True))
        assert int(state.count) == int(before.count) + 1
    assert 0 < rejected < 40  # one batch of ten is bad, and a step takes up to a dozen
    assert np.isfinite(state.params).all()
    assert np.isfinite(state.hparams)


def test_srba_rejects_a_nan_batch_between_two_passes():
    """A pass over all rows meets every nan; these turn up after it."""
    a = np.array(R.a)
    a[3, 0] = np.nan
    clean, bad = (bilevel.minibatches((x, R.b), 4, fixed=True) for x in (R.a, a))
    method = bilevel.srba(optax.sgd(0.1), STEADY, 0.1, period=100)
    step = jax.jit(functools.partial(method.step, RIDGE))
    state = method.init(RIDGE, jnp.zeros(20), jnp.float64(-1.0), clean, R.valid, key=KEY)
    state, info = step(state, clean, R.valid)
    assert bool(info.accepted)
    seen = []
    for _ in range(30):
        before = state
        state, info = step(before, bad, R.valid)
        seen.append(bool(info.accepted))
        if not seen[-1]:
            kept = (
                jax.tree.leaves((state.estimator, state.params)),
                jax.tree.leaves((before.estimator, before.params)),
            )
            assert all(np.array_equal(x, y) for x, y in zip(*kept, strict=True))
    assert seen.count(False) == 3  # in each epoch of ten batches one


@pytest.mark.parametrize("method", list(every(("soba", "stocbio", "ttsa", "f2sa", "bome", "slip"))))
def test_iterables_have_one_batch_for_each_inner_step(method):
    rng = np.random.default_rng(0)

    def batches(arrays):
        while True:
            rows = rng.permutation(len(arrays[1]))[:10]
            yield arrays[0][rows], arrays[1][rows]

    result = bilevel.optimize(
        RIDGE, np.zeros(20), np.array(-1.0), batches((R.a, R.b)), batches((R.v, R.c)), method, 6,
        progress=False,
    )  # fmt: skip
    assert result.status == Status.BUDGET
    assert np.isfinite(result.history["value"]).all()


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    method = getattr(bilevel, name)(SGD, STEADY, 0.1)

    def run(steps, folder):
        return bilevel.optimize(
            RIDGE, np.zeros(20), np.array(-1.0), *BATCHES.values(), method, steps, progress=False,
            checkpoint=bilevel.checkpoints(tmp_path / folder, every=5),
        )  # fmt: skip

    run(7, "parts")
    resumed, whole = run(12, "parts"), run(12, "whole")
    np.testing.assert_array_equal(resumed.params, whole.params)
    np.testing.assert_array_equal(resumed.history["value"], whole.history["value"])


def test_a_population_of_srba_runs_as_its_members_would_alone():
    starts = np.array([-3.0, -1.0])
    method = bilevel.srba(SGD, STEADY, 0.1, period=3)
    keys = jax.random.split(KEY, 2)

    def begun(start, key):
        return method.init(RIDGE, jnp.zeros(20), start, *BATCHES.values(), key=key)

    together = jax.vmap(begun)(jnp.asarray(starts), keys)

    def seven(state):
        return jax.lax.fori_loop(0, 7, lambda _, s: method.step(RIDGE, s, *BATCHES.values())[0], state)

    together = jax.jit(jax.vmap(seven))(together)
    for i, start in enumerate(starts):
        state = jax.jit(seven)(begun(jnp.asarray(start), keys[i]))
        np.testing.assert_allclose(together.params[i], state.params, rtol=1e-11)
        np.testing.assert_allclose(together.hparams[i], state.hparams, rtol=1e-11)


@pytest.mark.parametrize("start", [0.0, 0.1], ids=["zero", "elsewhere"])
@pytest.mark.parametrize("name", ["soba", "srba"])
def test_a_first_gradient_of_zero_is_not_taken_for_the_last(name, start):
    """At params of zero, or with a running vector of zero, a penalty has no influence yet."""
    method = getattr(bilevel, name)(optax.sgd(0.5), STEADY, 0.5)
    result = bilevel.optimize(
        RIDGE, np.full(20, start), np.array(-1.0), R.train, R.valid, method, 400, tol=1e-3, judge_every=1,
        progress=False,
    )  # fmt: skip
    assert result.status == Status.CONVERGED
    assert len(result.history["value"]) > 20
    assert (result.history["grad_norm"][0] == 0) == (start == 0)


# --- Mistakes ----------------------------------------------------------------------------------------------


def init(method, train=None, valid=None, problem=RIDGE, **options):
    train = BATCHES["train"] if train is None else train
    valid = BATCHES["valid"] if valid is None else valid
    return method.init(problem, jnp.zeros(20), jnp.asarray(-1.0), train, valid, key=KEY, **options)


def with_state(w, h, batch, state):
    return ridge_train(w, h, batch), state


STATEFUL = bilevel.Problem(with_state, lambda w, h, batch, state: ridge_valid(w, h, batch), has_state=True)
STARTED = bilevel.Problem(ridge_train, ridge_valid, start=lambda h, batch, key: jnp.zeros(20))
FIXED_POINT = bilevel.FixedPoint(lambda w, h, batch: 0.5 * w, ridge_valid)
BOX = bilevel.Problem(ridge_train, ridge_valid, constraints=bilevel.box(-8.0, 0.0))
PLAIN = bilevel.minibatches(R.train, 10)

MISTAKES = [
    (lambda: bilevel.soba(SGD, SGD, -0.1), ValueError, "linear_step must be a positive number, got -0.1"),
    (lambda: bilevel.soba(SGD, SGD, 0.0), ValueError, "linear_step must be a positive number"),
    (lambda: bilevel.soba(SGD, SGD, "0.1"), TypeError, "linear_step must be a number"),
    (lambda: bilevel.soba(0.1, SGD, 0.1), TypeError, "inner must be an optax optimiser"),
    (lambda: bilevel.soba(SGD, 0.1, 0.1), TypeError, "outer must be an optax optimiser"),
    (lambda: bilevel.soba(bilevel.lbfgs(), SGD, 0.1), TypeError, "inner must be an optax optimiser"),
    (lambda: bilevel.ma_soba(SGD, SGD, 0.1, momentum=1.0), ValueError, "at least 0 and less than 1, got 1"),
    (lambda: bilevel.ma_soba(SGD, SGD, 0.1, momentum=-0.1), ValueError, "at least 0 and less than 1"),
    (lambda: bilevel.ma_soba(SGD, 0.1, 0.1), TypeError, "outer must be an optax optimiser"),
    (lambda: bilevel.stocbio(SGD, SGD, 0.1, terms=0), ValueError, "terms must be at least 1"),
    (lambda: bilevel.stocbio(SGD, SGD, 0.1, inner_steps=0), ValueError, "inner_steps must be at least 1"),
    (lambda: bilevel.amigo(SGD, SGD, 0.1, linear_steps=0), ValueError, "linear_steps must be at least 1"),
    (lambda: bilevel.amigo(SGD, SGD, -1.0), ValueError, "linear_step must be a positive number"),
    (lambda: bilevel.ttsa(SGD, SGD, 0.1, terms=1.5), TypeError, "terms must be a whole number"),
    (lambda: bilevel.f2sa(SGD, SGD, multiplier=0.0), ValueError, "multiplier must be a positive number"),
    (lambda: bilevel.f2sa(bilevel.tuned(optax.sgd), SGD), TypeError, "inner must be an optax optimiser"),
    (lambda: bilevel.penalty(1.0, SGD, steps=0), ValueError, "steps must be at least 1"),
    (lambda: bilevel.penalty(1.0, 0.1), TypeError, "inner must be"),
    (lambda: bilevel.bome(SGD, SGD, ratio=0.0), ValueError, "ratio must be a positive number"),
    (lambda: bilevel.bome(bilevel.tuned(optax.sgd), SGD), TypeError, "inner must be an optax optimiser"),
    (lambda: bilevel.srba(SGD, SGD, 0.1, period=0), ValueError, "period must be at least 1"),
    (lambda: bilevel.srba(SGD, SGD, 0.1, radius=0.0), ValueError, "radius must be a positive number"),
    (lambda: bilevel.slip(SGD, SGD, 0.1, warm_start=0), ValueError, "warm_start must be at least 1"),
    (lambda: bilevel.sgd(0.1, steps=0), ValueError, "steps must be at least 1"),
    (lambda: bilevel.sgd(0.1, steps=2, before=True), ValueError, "one step starts from, got steps=2"),
    (lambda: bilevel.neumann(3, 0.1, randomized=1), TypeError, "randomized must be True or False"),
    (lambda: init(bilevel.saba(SGD, SGD, 0.1), PLAIN), ValueError, "train: saba keeps a table .*fixed=True"),
    (lambda: init(bilevel.saba(SGD, SGD, 0.1), valid=PLAIN), ValueError, "valid: saba keeps a table"),
    (
        lambda: init(bilevel.saba(SGD, SGD, 0.1), bilevel.with_rng(BATCHES["train"])),
        ValueError, "the same at each visit",
    ),
    (lambda: init(bilevel.srba(SGD, SGD, 0.1), bilevel.with_rng(PLAIN)), ValueError, "one draw of the noise"),
    (
        lambda: init(bilevel.f2sa(SGD, SGD), problem=STARTED), ValueError, "start= begins anew at every step"
    ),
    (
        lambda: bilevel.alternating(bilevel.penalty(1.0, SGD), SGD, SGD, restart=True),
        ValueError, "restart=True does not go with bilevel.penalty",
    ),
    (
        lambda: bilevel.hoag(estimator=bilevel.implicit(bilevel.neumann(3, 0.1, randomized=True))),
        ValueError, "randomized Neumann series",
    ),
    (
        lambda: bilevel.saba(optax.polyak_sgd(), SGD, 0.1).step(
            RIDGE, init(bilevel.saba(optax.polyak_sgd(), SGD, 0.1)), *BATCHES.values()
        ),
        TypeError, "needs gradients only",
    ),
    (
        lambda: init(bilevel.srba(SGD, SGD, 0.1), bilevel.stacked((R.a[None], R.b[None]))),
        ValueError, "train: srba passes over all examples",
    ),
    (
        lambda: bilevel.optimize(
            RIDGE, np.zeros(20), np.array(-1.0), iter([R.train] * 9), R.valid, bilevel.saba(SGD, SGD, 0.1), 3
        ),
        ValueError, "saba keeps a table .* batches of an iterable come once",
    ),
    (lambda: init(bilevel.saba(SGD, SGD, 0.1), problem=STATEFUL, model_state=0.0), ValueError, "model state"),
    (lambda: init(bilevel.srba(SGD, SGD, 0.1), problem=FIXED_POINT), TypeError, "srba minimises an inner"),
    (lambda: init(bilevel.bome(SGD, SGD), problem=FIXED_POINT), (TypeError, ValueError), "FixedPoint"),
    (lambda: init(bilevel.f2sa(SGD, SGD), problem=FIXED_POINT), (TypeError, ValueError), "FixedPoint"),
    (
        lambda: init(bilevel.slip(SGD, bilevel.normalized_momentum(0.1), 0.1), problem=BOX),
        ValueError, "cut short the steps of slip",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_values_equal_and_hash():
    for name, factory in PRESETS.items():
        system = {} if name in FIRST_ORDER else {"linear_step": 0.1}
        one, other = (factory(SGD, SGD, **system) for _ in range(2))
        assert hash(one) is not None
        if name != "ma_soba":  # it makes an optax transformation of its own
            assert one == other
        assert "0.1" in repr(one) or name in FIRST_ORDER


def test_logistic_regression_without_second_derivatives():
    """The first-order estimator against the implicit one on a loss that is no quadratic."""
    train, valid = logistic_data()
    h = np.full(5, -2.0)
    w = logistic_solution(h, train)
    exact = bilevel.hypergradient(LOGISTIC, bilevel.implicit(bilevel.dense()))(w, h, train, valid).grad
    fn = jax.jit(bilevel.hypergradient(LOGISTIC, bilevel.penalty(1e4, bilevel.newton())))
    grad = fn(w, h, train, valid).grad
    np.testing.assert_allclose(grad, exact, rtol=2e-3, atol=2e-4 * np.abs(exact).max())


@jax.custom_vjp
def square(x):
    return x**2


# Its second derivative, to JAX, is zero.
square.defvjp(lambda x: (x**2, x), lambda x, g: (g * 2 * jax.lax.stop_gradient(x),))


def test_second_derivatives_are_never_taken():
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * jnp.mean(square(b[0] @ w - b[1])) + 0.5 * jnp.exp(h) * jnp.sum(square(w)),
        lambda w, h, b: 0.5 * jnp.mean(square(b[0] @ w - b[1])),
    )
    at = jnp.asarray(R.solution(0.0)), jnp.asarray(0.0), R.train, R.valid
    grad = jax.jit(bilevel.hypergradient(problem, bilevel.penalty(10.0, optax.sgd(0.3), 80)))(*at).grad
    np.testing.assert_allclose(grad, R.penalty(0.0, 10.0), rtol=1e-9)
    for method in (bilevel.f2sa(SGD, STEADY), bilevel.bome(SGD, STEADY)):
        own, _, _ = states(method, -1.0, 5, R.train, R.valid, problem)
        twice, _, _ = states(method, -1.0, 5, R.train, R.valid)
        np.testing.assert_allclose(own.hparams, twice.hparams, rtol=1e-11)


def test_slip_with_all_examples_and_falling_steps_ends_where_its_series_is_stationary():
    outer = bilevel.normalized_momentum(lambda k: 0.1 * 0.99**k, 0.9)
    method = bilevel.slip(optax.sgd(0.3), outer, 0.3, terms=40, warm_start=100)
    _, last, _ = states(method, RIDGE_LOG_L2 + 0.5, 1500, R.train, R.valid)
    slopes = [R.neumann(float(last.hparams) + away, 40, 0.3) for away in (-0.02, 0.02)]
    assert slopes[0] < 0 < slopes[1]


# --- What is not taken for convergence ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soba", "srba"])
def test_a_single_loop_that_has_hardly_moved_has_not_converged(name):
    """Hypergradients are small at first because params and the running vector are."""
    slow = optax.sgd(1e-3)
    method = getattr(bilevel, name)(slow, slow, 1e-3)
    result = bilevel.optimize(
        RIDGE, np.full(20, 1e-4), np.array(1.0), R.train, R.valid, method, 30,
        tol=1e-3, judge_every=1, progress=False,
    )  # fmt: skip
    assert result.history["grad_norm"][0] < 1e-3
    assert result.status == Status.BUDGET


def test_bome_never_takes_its_direction_for_a_hypergradient():
    result = bilevel.optimize(
        RIDGE, np.full(20, 5.0), np.array(-1.0), R.train, R.valid, bilevel.bome(SGD, SGD), 30,
        tol=1e6, judge_every=1, progress=False,
    )  # fmt: skip
    assert result.status == Status.BUDGET


def test_a_certificate_is_not_made_of_the_residual_of_another_vector():
    problem = bilevel.Problem(
        inner=lambda w, lam, x: 0.5 * (w - x) ** 2 + 0.5 * lam * w**2,
        outer=lambda w, lam, x: 0.5 * (w - x) ** 2,
        smoothness=bilevel.Smoothness(2.0, 2.0, 1.0, cross=1.0),
    )
    fn = bilevel.hypergradient(problem, bilevel.implicit(bilevel.sgd(2.0, before=True)))
    estimate = fn(jnp.array(1.0), jnp.array(1.0), jnp.array(2.0), jnp.array(3.0))  # exactly 1 at w* = 1
    assert estimate.error_kind == "certified"
    assert float(estimate.error) >= abs(float(estimate.grad) - 1.0) * (1 - 1e-12)


def test_f2sa_steps_both_copies_on_the_same_batches():
    """Noise that both share is not in their difference, which is multiplied."""
    estimator = bilevel.penalty(10.0, optax.sgd(0.1), steps=30)
    point = bilevel.Point(jnp.asarray(R.solution(-1.0)))
    state = estimator.init(RIDGE, point, jnp.asarray(-1.0))
    seen = []

    def batch(j):
        jax.debug.callback(lambda j: seen.append(int(j)), j)
        return R.train

    draw = Draw(batch, 30, True)
    estimator.estimate(RIDGE, state, point, jnp.asarray(-1.0), draw, R.valid, KEY)
    jax.effects_barrier()
    assert set(range(30)) < set(seen)
    assert max(seen) > 10_000
    assert len(set(seen)) == 31


def test_slip_warms_up_before_it_moves_even_after_a_rejected_step():
    a = np.array(R.a)
    a[3, 0] = np.nan
    train = bilevel.minibatches((a, R.b), 4)
    method = bilevel.slip(optax.sgd(0.1), bilevel.normalized_momentum(0.01), 0.1, terms=2, warm_start=3)
    step = jax.jit(functools.partial(method.step, RIDGE))
    first_rejected = 0
    for seed in range(40):
        state = method.init(RIDGE, jnp.zeros(20), jnp.float64(-1.0), train, R.valid, key=jax.random.key(seed))
        warm = False
        for k in range(3):
            state, info = step(state, train, R.valid)
            first_rejected += k == 0 and not bool(info.accepted)
            moved = float(state.hparams) != -1.0
            assert warm or not moved
            warm = warm or bool(info.accepted)
    assert first_rejected > 0
