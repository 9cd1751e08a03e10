"""The tuner as an optax transformation: closed forms, the steps of `alternating`, every kind of loop."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import RIDGE, RIDGE_VALUE, central_difference, ridge

import bilevel
from bilevel.online import OnlineState

DATA = ridge()
TRAIN, VALID = DATA.train, DATA.valid
EXACT = bilevel.implicit(bilevel.dense())
POSITIVE = bilevel.Problem(
    inner=lambda w, h, batch: RIDGE.inner(w, jnp.log(h["l2"]), batch),
    outer=lambda w, h, batch: RIDGE.outer(w, None, batch),
    constraints={"l2": bilevel.positive()},
)


def close(got, expected, rtol=1e-12, atol=1e-14):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def one_call(tuner, problem, params, state, train, valid, **settings):
    """A step of a user's loop, in the form of one call."""
    hparams = bilevel.get_hparams(state)
    grads = jax.grad(problem.inner)(params, hparams, train)
    updates, state = tuner.update(grads, state, params, train=train, valid=valid, **settings)
    return optax.apply_updates(params, updates), state


def run(tuner, problem, params, steps, train=TRAIN, valid=VALID):
    """Params and state after so many steps, in one program."""

    def step(carry, _):
        return one_call(tuner, problem, *carry, train, valid), None

    def loop(params):
        return jax.lax.scan(step, (params, tuner.init(params)), length=steps)[0]

    return jax.jit(loop)(params)


def methods_steps(method, problem, params, hparams, steps):
    state = method.init(problem, params, hparams, TRAIN, VALID, key=jax.random.key(0))
    step = jax.jit(lambda state: method.step(problem, state, TRAIN, VALID)[0])
    for _ in range(steps):
        state = step(state)
    return state


# --- The bar ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [-7.0, 2.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "estimator",
    [bilevel.implicit(bilevel.cg(5)), bilevel.implicit(bilevel.cg(20))],
    ids=["warm cg", "cg"],
)
def test_ridge_ends_within_half_a_percent_of_the_optimum(start, dtype, estimator):
    tuner = bilevel.online(
        RIDGE, dtype(start), inner=optax.sgd(0.1), outer=optax.adam(0.05), estimator=estimator,
        every=10, warmup=100,
    )  # fmt: skip
    train, valid = jax.tree.map(lambda x: jnp.asarray(x, dtype), (TRAIN, VALID))
    params, state = run(tuner, RIDGE, jnp.zeros(20, dtype), 6000, train, valid)
    assert state.hparams.dtype == params.dtype == dtype
    assert abs(DATA.value_at(np.asarray(params)) / RIDGE_VALUE - 1) < 0.005
    assert abs(DATA.value(float(state.hparams)) / RIDGE_VALUE - 1) < 0.005
    assert int(state.info.tuned) == 590
    assert int(state.info.rejected) == 0


def test_minibatches_at_both_levels():
    # A tuner that is handed sources draws from them by the key of each call.
    tuner = bilevel.online(
        POSITIVE, {"l2": 5.0}, inner=optax.sgd(0.05), outer=optax.adam(0.03),
        estimator=bilevel.implicit(bilevel.neumann(20, 0.05)), every=5,
    )  # fmt: skip
    train, valid = bilevel.minibatches(TRAIN, 20), bilevel.minibatches(VALID, 50)

    @jax.jit
    def loop(params):
        def step(carry, t):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), t)
            grads = jax.grad(POSITIVE.inner)(params, state.hparams, train.batch(jax.random.key(2), t))
            updates, state = tuner.update(grads, state, params, train=train, valid=valid, key=key)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tuner.init(params)), jnp.arange(4000))[0]

    _, state = loop(jnp.zeros(20))
    # From 2.5 times the optimal value to within 5 % of it.
    assert DATA.value(np.log(5.0)) > 2.5 * RIDGE_VALUE
    assert DATA.value(np.log(float(state.hparams["l2"]))) < 1.05 * RIDGE_VALUE


# --- The same steps as a method's -------------------------------------------------------------------------

SGD, ADAM = optax.sgd(0.1, momentum=0.5), optax.adam(0.1)
TUNED = bilevel.tuned(lambda h: optax.sgd(h["rate"], momentum=h["momentum"]))
TUNING = bilevel.Problem(
    inner=lambda w, h, batch: RIDGE.inner(w, h["log_l2"], batch),
    outer=lambda w, h, batch: RIDGE.outer(w, None, batch),
    constraints={"rate": bilevel.positive(), "momentum": bilevel.interval(0, 1)},
)
SETTINGS = {"log_l2": np.float64(-1.0), "rate": np.float64(0.02), "momentum": np.float64(0.5)}


@pytest.mark.parametrize(
    ("problem", "hparams", "inner", "estimator", "simultaneous"),
    [
        (POSITIVE, {"l2": 0.3}, SGD, EXACT, True),
        (POSITIVE, {"l2": 0.3}, SGD, bilevel.implicit(bilevel.cg(3)), True),
        (POSITIVE, {"l2": 0.3}, SGD, bilevel.one_step(), False),
        (TUNING, SETTINGS, TUNED, bilevel.one_step(), False),
        (TUNING, SETTINGS, TUNED, bilevel.look_back(4), False),
    ],
    ids=["dense", "warm cg", "one_step", "tuned one_step", "tuned look_back"],
)
def test_one_call_takes_the_steps_of_alternating(problem, hparams, inner, estimator, simultaneous):
    tuner = bilevel.online(problem, hparams, inner=inner, outer=ADAM, estimator=estimator)
    params, state = run(tuner, problem, jnp.zeros(20), 7)
    method = bilevel.alternating(estimator, inner, ADAM, simultaneous=simultaneous)
    expected = methods_steps(method, problem, jnp.zeros(20), hparams, 7)
    close((params, state.hparams), (expected.params, expected.hparams), rtol=1e-10)


@pytest.mark.parametrize("estimator", [EXACT, bilevel.implicit(bilevel.cg(3))], ids=["dense", "warm cg"])
def test_two_calls_take_the_steps_of_alternating(estimator):
    tuner = bilevel.online(POSITIVE, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=estimator)
    params, state = jnp.zeros(20), tuner.init(jnp.zeros(20))
    for step in range(15):
        grads = jax.grad(POSITIVE.inner)(params, state.hparams, TRAIN)
        updates, state = tuner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step % 5 == 4:
            state = bilevel.tune(state, tuner, params, TRAIN, VALID)
    expected = methods_steps(
        bilevel.alternating(estimator, SGD, ADAM, inner_steps=5), POSITIVE, jnp.zeros(20), {"l2": 0.3}, 3
    )
    close((params, state.hparams), (expected.params, expected.hparams), rtol=1e-10)


def test_a_step_of_look_ahead_is_one_step():
    ends = [
        run(
            bilevel.online(TUNING, SETTINGS, inner=TUNED, outer=ADAM, estimator=estimator),
            TUNING, jnp.zeros(20), 5,
        )
        for estimator in (
            bilevel.one_step(), bilevel.unrolled(steps=1), bilevel.unrolled(truncate=1),
            bilevel.forward(steps=1), bilevel.look_back(1),
        )
    ]  # fmt: skip
    for params, state in ends[1:]:
        close((params, state.hparams), (ends[0][0], ends[0][1].hparams), rtol=1e-10)


# --- Closed forms of what the trajectory family returns ---------------------------------------------------

HEAVY = bilevel.Problem(
    inner=lambda w, h, batch: RIDGE.inner(w, h[0], batch),
    outer=lambda w, h, batch: RIDGE.outer(w, None, batch),
)
HEAVY_INNER = bilevel.tuned(lambda h: optax.sgd(h[1], momentum=h[2]))
HEAVY_AT = np.array([-1.0, 0.05, 0.6])
RNG = np.random.default_rng(5)
WEIGHTS, BUFFER = RNG.standard_normal(20), RNG.standard_normal(20)


def heavy_ball(h, w, buffer):
    buffer = DATA.hessian(h[0]) @ w - DATA.a.T @ DATA.b / DATA.b.size + h[2] * buffer
    return w - h[1] * buffer, buffer


def descent_of(estimator):
    """The hypergradient at a point with momentum, as a move of a plain outer step."""
    tuner = bilevel.online(HEAVY, HEAVY_AT, inner=HEAVY_INNER, outer=optax.sgd(1.0), estimator=estimator)
    state = tuner.init(jnp.asarray(WEIGHTS))
    trace = jax.tree.map(lambda x: jnp.asarray(BUFFER), state.inner)
    new = bilevel.tune(state._replace(inner=trace), tuner, jnp.asarray(WEIGHTS), TRAIN, VALID)
    return HEAVY_AT - np.asarray(new.hparams), new.info


def test_one_step_is_the_derivative_by_the_coming_update():
    got, info = descent_of(bilevel.one_step())
    w, buffer = heavy_ball(HEAVY_AT, WEIGHTS, BUFFER)
    v = DATA.outer_grad(w)
    by_l2 = -HEAVY_AT[1] * np.exp(HEAVY_AT[0]) * WEIGHTS @ v
    expected = [by_l2, -buffer @ v, -HEAVY_AT[1] * BUFFER @ v]
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    assert abs(float(info.value) - DATA.value_at(w)) < 1e-12
    assert abs(float(info.grad_norm) - np.linalg.norm(expected)) < 1e-10


@pytest.mark.parametrize("make", [bilevel.unrolled, bilevel.forward], ids=["unrolled", "forward"])
def test_looking_ahead_is_the_derivative_by_the_coming_updates(make):
    def loss(h):
        w, buffer = WEIGHTS, BUFFER
        for _ in range(4):
            w, buffer = heavy_ball(h, w, buffer)
        return DATA.value_at(w)

    got, _ = descent_of(make(steps=4))
    expected = [central_difference(loss, HEAVY_AT, row, 1e-3) for row in np.eye(3)]
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("terms", [1, 2, 6])
def test_looking_back_is_truncated_with_the_derivatives_of_the_coming_update(terms):
    l2, rate, momentum = HEAVY_AT
    hessian, eye = DATA.hessian(l2), np.eye(20)
    w, buffer = heavy_ball(HEAVY_AT, WEIGHTS, BUFFER)
    # z = (w, buffer): buffer' = H w - c + momentum buffer, w' = w - rate buffer'
    a = np.block([[eye - rate * hessian, -rate * momentum * eye], [hessian, momentum * eye]])
    shrink = np.exp(l2) * WEIGHTS
    b = np.stack(
        [
            np.concatenate([-rate * shrink, shrink]),
            np.concatenate([-buffer, np.zeros(20)]),
            np.concatenate([-rate * BUFFER, BUFFER]),
        ]
    )
    power = np.concatenate([DATA.outer_grad(w), np.zeros(20)])
    total = np.zeros(40)
    for _ in range(terms):
        total, power = total + power, a.T @ power
    got, _ = descent_of(bilevel.look_back(terms))
    np.testing.assert_allclose(got, b @ total, rtol=1e-10)


def test_looking_ahead_over_batches_of_its_own():
    halves = bilevel.stacked(jax.tree.map(lambda x: x.reshape(2, 20, *x.shape[1:]), TRAIN))
    tuner = bilevel.online(
        HEAVY, HEAVY_AT, inner=HEAVY_INNER, outer=optax.sgd(1.0), estimator=bilevel.unrolled(steps=2)
    )
    state = tuner.init(jnp.asarray(WEIGHTS))
    new = bilevel.tune(state, tuner, jnp.asarray(WEIGHTS), halves, VALID)

    def loss(h):
        w, buffer = WEIGHTS, np.zeros(20)
        for rows in (slice(0, 20), slice(20, 40)):
            a, b = DATA.a[rows], DATA.b[rows]
            buffer = a.T @ (a @ w - b) / 20 + np.exp(h[0]) * w + h[2] * buffer
            w = w - h[1] * buffer
        return DATA.value_at(w)

    expected = [central_difference(loss, HEAVY_AT, row, 1e-3) for row in np.eye(3)]
    np.testing.assert_allclose(HEAVY_AT - np.asarray(new.hparams), expected, rtol=1e-8)


@pytest.mark.parametrize(
    "estimator", [bilevel.one_step(), bilevel.look_back(5)], ids=["one_step", "look_back"]
)
def test_a_learning_rate_that_is_far_too_small_is_raised(estimator):
    problem = bilevel.Problem(
        inner=lambda w, h, batch: RIDGE.inner(w, -3.66, batch),
        outer=lambda w, h, batch: RIDGE.outer(w, None, batch),
        constraints=bilevel.positive(),
    )
    tuner = bilevel.online(
        problem, 1e-4, inner=bilevel.tuned(lambda rate: optax.sgd(rate)), outer=optax.adam(0.05),
        estimator=estimator, every=5,
    )  # fmt: skip
    params, state = run(tuner, problem, jnp.zeros(20), 600)
    plain = np.zeros(20)
    for _ in range(600):
        plain = plain - 1e-4 * (DATA.hessian(-3.66) @ plain - DATA.a.T @ DATA.b / 40)
    assert float(state.hparams) > 1e-2
    assert DATA.value_at(np.asarray(params)) < 1.1 * RIDGE_VALUE < 0.2 * DATA.value_at(plain)


# --- The schedule, and what it is without -----------------------------------------------------------------


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (3, 0), (1, 4), (3, 2)])
def test_schedule(every, warmup):
    tuner = bilevel.online(
        POSITIVE, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=EXACT, every=every, warmup=warmup
    )
    step = jax.jit(functools.partial(one_call, tuner, POSITIVE))
    params, state, moved = jnp.ones(20), tuner.init(jnp.ones(20)), []
    for t in range(9):
        before = state.hparams["l2"]
        params, state = step(params, state, TRAIN, VALID)
        if state.hparams["l2"] != before:
            moved.append(t)
    assert moved == list(range(warmup, 9, every))
    assert int(state.info.tuned) == len(moved)


def test_without_batches_it_is_the_inner_optimiser():
    inner = optax.adam(0.1)
    tuner = bilevel.online(POSITIVE, {"l2": 0.3}, inner=inner, outer=ADAM)
    params, state, plain = jnp.zeros(20), tuner.init(jnp.zeros(20)), inner.init(jnp.zeros(20))
    for _ in range(3):
        grads = jax.grad(POSITIVE.inner)(params, {"l2": 0.3}, TRAIN)
        updates, state = tuner.update(grads, state, params)
        expected, plain = inner.update(grads, plain, params)
        np.testing.assert_array_equal(updates, expected)
        params = optax.apply_updates(params, updates)
    close((state.inner, state.hparams), (plain, {"l2": 0.3}), rtol=0)
    # Not even params, where the inner optimiser does without.
    tuner.update(grads, state)


def test_tune_moves_at_once_unless_told_to_keep_to_the_schedule():
    tuner = bilevel.online(POSITIVE, {"l2": 0.3}, inner=SGD, outer=ADAM, every=3, warmup=2)
    state, params = tuner.init(jnp.zeros(20)), jnp.zeros(20)
    assert int(bilevel.tune(state, tuner, params, TRAIN, VALID).info.tuned) == 1
    counts = []
    for _ in range(8):
        state = bilevel.tune(state, tuner, params, TRAIN, VALID, on_schedule=True)
        counts.append(int(state.info.tuned))
        _, state = tuner.update(jnp.zeros(20), state, params)
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2]


def test_what_is_not_for_the_tuner_is_for_the_inner_optimiser():
    inner = optax.contrib.reduce_on_plateau(patience=0, cooldown=0)
    tuner = bilevel.online(POSITIVE, {"l2": 0.3}, inner=optax.chain(optax.sgd(0.1), inner), outer=ADAM)
    params = jnp.ones(20)
    state = tuner.init(params)
    for value in (1.0, 2.0, 3.0):
        updates, state = tuner.update(
            params, state, params, value=jnp.float64(value), train=TRAIN, valid=VALID
        )
    assert abs(float(updates[0])) < 0.09  # it has seen the values rise


# --- A bad hypergradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [EXACT, bilevel.implicit(bilevel.cg(3)), bilevel.one_step()])
def test_a_hypergradient_that_is_not_finite_is_rejected_and_counted(estimator):
    tuner = bilevel.online(POSITIVE, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=estimator)
    step = jax.jit(functools.partial(one_call, tuner, POSITIVE))
    bad = VALID[0], VALID[1].at[3].set(jnp.nan)
    params, state = step(jnp.zeros(20), tuner.init(jnp.zeros(20)), TRAIN, VALID)
    params, after = step(params, state, TRAIN, bad)
    assert (int(after.info.tuned), int(after.info.rejected)) == (1, 1)
    assert np.isnan(after.info.value)
    close((after.hparams, after.free, after.outer), (state.hparams, state.free, state.outer), rtol=0)
    assert np.isfinite(params).all()  # training goes on
    for _ in range(2):
        params, after = step(params, after, TRAIN, VALID)
    assert (int(after.info.tuned), int(after.info.rejected)) == (3, 1)
    info = after.info.value, after.info.grad_norm  # the error of the trajectory family is inf
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after._replace(info=()), info)))


# --- Kinds of loops ---------------------------------------------------------------------------------------


def make(**settings):
    return bilevel.online(
        POSITIVE, {"l2": 0.3},
        **{"inner": SGD, "outer": ADAM, "estimator": EXACT, "every": 2, **settings},
    )  # fmt: skip


@functools.cache
def reference():
    """Params and hparams after six steps of `make`'s tuner on one device."""
    params, state = run(make(), POSITIVE, jnp.zeros(20), 6)
    return np.asarray(params), {"l2": float(state.hparams["l2"])}


def test_a_loop_that_is_not_compiled_agrees_and_compiles_once(compiled):
    tuner = make()
    params, state = jnp.zeros(20), tuner.init(jnp.zeros(20))
    for t in range(6):
        params, state = one_call(tuner, POSITIVE, params, state, TRAIN, VALID)
        if t < 3:
            compiled()
    assert compiled() == 0
    close((params, state.hparams), reference(), rtol=1e-10)


def test_a_state_may_be_donated():
    tuner = make()
    step = jax.jit(functools.partial(one_call, tuner, POSITIVE), donate_argnums=(0, 1))
    for _ in range(2):  # the tuner's own arrays are not given away
        params, state = jnp.zeros(20), tuner.init(jnp.zeros(20))
        for _ in range(6):
            params, state = step(params, state, TRAIN, VALID)
        close((params, state.hparams), reference(), rtol=1e-10)


def test_vmap_over_starts():
    def end(start):
        tuner = bilevel.online(POSITIVE, {"l2": start}, inner=SGD, outer=ADAM, estimator=EXACT, every=2)
        params, state = jnp.zeros(20), tuner.init(jnp.zeros(20))
        for _ in range(6):
            params, state = one_call(tuner, POSITIVE, params, state, TRAIN, VALID)
        return params, state.hparams

    params, hparams = jax.jit(jax.vmap(end))(jnp.array([0.3, 1.0]))
    close((params[0], {"l2": hparams["l2"][0]}), reference(), rtol=1e-10)
    assert hparams["l2"][1] != hparams["l2"][0]


def split(batch):
    return jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)


def mapped_loop(tuner, problem):
    def loop(params, train, valid):
        def step(carry, _):
            return one_call(tuner, problem, *carry, train, valid), None

        params, state = jax.lax.scan(step, (params, tuner.init(params)), length=6)[0]
        return params, state.hparams

    return loop


@pytest.mark.parametrize(
    "estimator",
    [bilevel.implicit(bilevel.cg(30, tol=1e-13)), bilevel.one_step(), bilevel.look_back(3)],
    ids=["cg", "one_step", "look_back"],
)
@pytest.mark.parametrize("how", ["pmap", "shard_map", "shard_map, unchecked", "sharded arrays"])
def test_devices_agree_with_one(how, estimator):
    tuner = make(estimator=estimator)
    expected = jax.jit(mapped_loop(tuner, POSITIVE))(jnp.zeros(20), TRAIN, VALID)
    averaged = bilevel.pmean(POSITIVE, "data")
    tuner = bilevel.online(averaged, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=estimator, every=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data, one = PartitionSpec("data"), PartitionSpec()
    if how == "pmap":
        run = jax.pmap(mapped_loop(tuner, averaged), "data", in_axes=(None, 0, 0), out_axes=None)
        got = run(jnp.zeros(20), split(TRAIN), split(VALID))
    elif how == "sharded arrays":
        placed = jax.device_put((TRAIN, VALID), NamedSharding(mesh, data))
        got = jax.jit(mapped_loop(make(estimator=estimator), POSITIVE))(jnp.zeros(20), *placed)
    else:
        mapped = jax.shard_map(
            mapped_loop(tuner, averaged), mesh=mesh, in_specs=(one, data, data), out_specs=one,
            check_vma=how == "shard_map",
        )  # fmt: skip
        got = jax.jit(mapped)(jnp.zeros(20), TRAIN, VALID)
    close(got, expected, rtol=1e-9)


# --- Wherever its state sits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tuner: tuner,
        lambda tuner: optax.chain(optax.clip_by_global_norm(1e9), tuner),
        lambda tuner: optax.chain(optax.identity(), optax.chain(optax.identity(), tuner)),
        lambda tuner: optax.apply_if_finite(tuner, 3),
        lambda tuner: optax.MultiSteps(tuner, 1, accumulator_dtype=jnp.float64).gradient_transformation(),
    ],
    ids=["bare", "chain", "nested", "apply_if_finite", "MultiSteps"],
)
def test_wrapped(wrap):
    tuner = make()
    whole = wrap(tuner)
    params, state = run(whole, POSITIVE, jnp.zeros(20), 6)
    close((params, bilevel.get_hparams(state)), reference(), rtol=1e-10)
    # And by two calls.
    params, state = jnp.zeros(20), whole.init(jnp.zeros(20))

    @jax.jit
    def step(params, state):
        before = bilevel.tune(state, tuner, params, TRAIN, VALID, on_schedule=True)
        grads = jax.grad(POSITIVE.inner)(params, bilevel.get_hparams(state), TRAIN)
        updates, state = whole.update(grads, before, params)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
    close((params, bilevel.get_hparams(state)), reference(), rtol=1e-10)
    assert int(optax.tree.get(state, "tuned")) == 3


def test_multi_steps_moves_hyperparameters_when_it_moves_params():
    tuner = make(every=1)
    whole = optax.MultiSteps(tuner, 3, should_skip_update_fn=optax.skip_not_finite)
    params, state = jnp.zeros(20), whole.init(jnp.zeros(20))
    step, seen = jax.jit(functools.partial(one_call, whole, POSITIVE)), []
    for t in range(9):
        # Of three batches that are gathered the last one counts.
        valid = VALID[0], VALID[1] if t % 3 == 2 else jnp.full(200, jnp.nan)
        before = params
        params, state = step(params, state, TRAIN, valid)
        seen.append((int(optax.tree.get(state, "tuned")), bool(jnp.any(params != before))))
    assert seen == [(t // 3, t % 3 == 0) for t in range(1, 10)]
    assert int(optax.tree.get(state, "rejected")) == 0


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: optax.chain(optax.clip(1e9), t)], ids=["bare", "chain"]
)
def test_train_state(wrap):
    problem = bilevel.Problem(
        lambda p, h, batch: POSITIVE.inner(p["w"], h, batch),
        lambda p, h, batch: POSITIVE.outer(p["w"], h, batch),
        POSITIVE.constraints,
    )
    tuner = bilevel.online(problem, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=EXACT, every=2)
    ts = TrainState.create(apply_fn=None, params={"w": jnp.zeros(20)}, tx=wrap(tuner))

    @jax.jit
    def step(ts):
        hparams = bilevel.get_hparams(ts.opt_state)
        grads = jax.grad(problem.inner)(ts.params, hparams, TRAIN)
        tuned = bilevel.tune(ts.opt_state, tuner, ts.params, TRAIN, VALID, on_schedule=True)
        return ts.replace(opt_state=tuned).apply_gradients(grads=grads)

    for _ in range(6):
        ts = step(ts)
    close((ts.params["w"], bilevel.get_hparams(ts)), reference(), rtol=1e-10)
    assert int(ts.step) == 6
    # It goes through flax's checkpoints.
    again = flax.serialization.from_bytes(ts, flax.serialization.to_bytes(ts))
    close(step(again), step(ts), rtol=0, atol=0)


def test_trees_of_params_are_found_in_the_state():
    tuner = make(inner=optax.adam(0.1), estimator=bilevel.implicit(bilevel.cg()))
    ones = optax.tree.map_params(tuner, jnp.ones_like, tuner.init(jnp.zeros(20)))
    np.testing.assert_array_equal(ones.inner[0].mu, np.ones(20))
    assert float(ones.hparams["l2"]) == pytest.approx(0.3)


class Linear(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.zeros(20))

    def __call__(self, x):
        return x @ self.w[...]


GRAPH, _ = nnx.split(Linear(), nnx.Param)
NNX = bilevel.Problem(
    inner=lambda p, h, batch: POSITIVE.inner(nnx.merge(GRAPH, p, copy=True).w[...], h, batch),
    outer=lambda p, h, batch: POSITIVE.outer(nnx.merge(GRAPH, p, copy=True).w[...], h, batch),
    constraints=POSITIVE.constraints,
)


@pytest.mark.parametrize("compile", [nnx.jit, lambda fn: fn], ids=["jit", "eager"])
@pytest.mark.parametrize("calls", [1, 2])
def test_nnx_optimizer(calls, compile):
    tuner = bilevel.online(NNX, {"l2": 0.3}, inner=SGD, outer=ADAM, estimator=EXACT, every=2)
    model = Linear()
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip(1e9), tuner), wrt=nnx.Param)

    @compile
    def step(model, optimizer, train, valid):
        hparams = bilevel.get_hparams(optimizer.opt_state)
        grads = nnx.grad(lambda model: POSITIVE.inner(model.w[...], hparams, train))(model)
        if calls == 1:
            optimizer.update(model, grads, train=train, valid=valid)
        else:
            optimizer.opt_state = bilevel.tune(
                optimizer.opt_state, tuner, nnx.state(model, nnx.Param), train, valid, on_schedule=True
            )
            optimizer.update(model, grads)

    for _ in range(6):
        step(model, optimizer, TRAIN, VALID)
    close((model.w[...], bilevel.get_hparams(optimizer)), reference(), rtol=1e-10)


# --- Model state, keys, dtypes ----------------------------------------------------------------------------


def test_model_state():
    def inner(w, h, batch, state):
        return RIDGE.inner(w - state, jnp.log(h["l2"]), batch), 0.5 * state + 1.0

    problem = bilevel.Problem(
        inner, lambda w, h, b, state: RIDGE.outer(w - state, None, b), POSITIVE.constraints, has_state=True
    )
    moved = []
    for estimator in (EXACT, bilevel.one_step()):
        tuner = bilevel.online(problem, {"l2": 0.3}, inner=SGD, outer=optax.sgd(1.0), estimator=estimator)
        state = tuner.init(jnp.zeros(20))
        with pytest.raises(ValueError, match="model_state must be given for a problem with has_state=True"):
            tuner.update(jnp.zeros(20), state, jnp.zeros(20), train=TRAIN, valid=VALID)
        shift = jnp.full(20, 0.1)
        _, one = tuner.update(
            jnp.zeros(20), state, jnp.zeros(20), train=TRAIN, valid=VALID, model_state=shift
        )
        two = bilevel.tune(state, tuner, jnp.zeros(20), TRAIN, VALID, model_state=shift)
        close(one.hparams, two.hparams)
        method = bilevel.hypergradient(problem, estimator if estimator is EXACT else bilevel.one_step(SGD))
        grad = method(jnp.zeros(20), {"l2": 0.3}, TRAIN, VALID, model_state=shift).grad["l2"]
        close(one.hparams["l2"], 0.3 * np.exp(-0.3 * grad), rtol=1e-10)
        moved.append(float(one.hparams["l2"]))
    assert moved[0] != moved[1]


def test_keys():
    train = bilevel.minibatches(TRAIN, 10)
    tuner = make()
    state = tuner.init(jnp.ones(20))

    def found(state=state, **settings):
        return float(bilevel.tune(state, tuner, jnp.ones(20), train, VALID, **settings).info.grad_norm)

    assert found(key=jax.random.key(1)) == found(key=jax.random.PRNGKey(1)) != found(key=jax.random.key(2))
    assert found() == found() != found(bilevel.tune(state, tuner, jnp.ones(20), TRAIN, VALID))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_and_the_boundaries_of_constraints(dtype):
    problem = bilevel.Problem(
        inner=lambda w, h, batch: RIDGE.inner(w, h["a"] + h["b"] + h["c"], batch),
        outer=lambda w, h, batch: RIDGE.outer(w, None, batch) + 0 * h["a"],
        constraints={"a": bilevel.interval(-1, 1), "b": bilevel.box(-1, 1), "c": bilevel.fixed()},
    )
    hparams = {"a": dtype(0.5), "b": dtype(0.5), "c": dtype(2.0)}
    tuner = bilevel.online(problem, hparams, inner=optax.sgd(0.05), outer=optax.sgd(1e3), estimator=EXACT)
    train, valid = jax.tree.map(lambda x: jnp.asarray(x, dtype), (TRAIN, VALID))
    _, state = run(tuner, problem, jnp.zeros(20, dtype), 40, train, valid)
    assert all(x.dtype in (dtype, np.int32) for x in jax.tree.leaves(state))
    assert -1 < float(state.hparams["a"]) < -0.9
    assert float(state.hparams["b"]) == -1
    assert float(state.hparams["c"]) == 2


# --- Mistakes ---------------------------------------------------------------------------------------------

STATE = make().init(jnp.zeros(20))
ZERO = jnp.zeros(20)
RATE = bilevel.tuned(lambda h: optax.sgd(h["l2"]))
IDLE = bilevel.online(POSITIVE, {"l2": 1.0, "idle": 1.0}, inner=SGD, outer=ADAM)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: make(every=2.5), TypeError, "every must be a whole number, got 2.5"),
        (lambda: make(warmup=-1), ValueError, "warmup must be at least 0, got -1"),
        (lambda: make(inner=0.1), TypeError, "inner must be an inner optimiser"),
        (lambda: make(inner=bilevel.newton()), TypeError, "inner must be an inner optimiser"),
        (lambda: make(inner=optax.MultiSteps(SGD, 2)), TypeError, "gradient_transformation"),
        (lambda: make(outer=None), TypeError, "outer must be an optax optimiser"),
        (lambda: make(estimator=bilevel.cg()), TypeError, "estimator must be an estimator"),
        (lambda: make(inner=RATE), TypeError, "inner: bilevel.tuned needs an estimator of the trajectory"),
        (
            lambda: make(estimator=bilevel.unrolled()),
            ValueError,
            r"unrolled\(\) needs steps= in bilevel.online, got None",
        ),
        (lambda: make(estimator=bilevel.forward(truncate=2)), ValueError, r"forward\(\) needs steps="),
        (lambda: make(estimator=bilevel.unrolled(SGD, 3)), ValueError, "inner is given twice"),
        (
            lambda: make(estimator=bilevel.unrolled(steps=3, per_step={"l2": True})),
            ValueError,
            "an entry for each step of a loop that restarts",
        ),
        (
            lambda: bilevel.online(POSITIVE, {"l2": -1.0}, inner=SGD, outer=ADAM),
            ValueError,
            "must be greater than 0, got -1",
        ),
        (lambda: bilevel.online(POSITIVE, {"l2": 1}, inner=SGD, outer=ADAM), TypeError, "write 1.0 instead"),
        (
            lambda: bilevel.online(
                bilevel.FixedPoint(lambda w, h, b: w, lambda w, h, b: 0.0), 1.0, inner=SGD, outer=ADAM
            ),
            TypeError,
            "takes a Problem, got a FixedPoint",
        ),
        (
            lambda: bilevel.online(
                bilevel.Problem(POSITIVE.inner, POSITIVE.outer, start=lambda h, b, k: ZERO),
                1.0, inner=SGD, outer=ADAM,
            ),
            ValueError,
            "problem has start=",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, train=TRAIN),
            ValueError,
            "valid must be given together with train, got None",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, valid=VALID),
            ValueError,
            "train must be given together with valid, got None",
        ),
        (lambda: bilevel.tune(STATE, make(), ZERO, TRAIN, None), ValueError, "valid must be given together"),
        (lambda: make().update(ZERO, STATE, train=TRAIN, valid=VALID), ValueError, "params must be given"),
        (
            lambda: make().update(ZERO, (STATE,), ZERO, train=TRAIN, valid=VALID),
            TypeError,
            "state must be what the tuner's init returned, got tuple",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, train=iter([TRAIN]), valid=VALID),
            TypeError,
            "train is a Python iterable",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, train=bilevel.stacked(split(TRAIN)), valid=VALID),
            ValueError,
            "stacked for 4 inner steps, but 1 is taken",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, train=TRAIN, valid=VALID, key=3),
            TypeError,
            "key must be one PRNG key",
        ),
        (
            lambda: make().update(ZERO, STATE, ZERO, train=TRAIN, valid=VALID, model_state=1.0),
            ValueError,
            "model_state is given, but",
        ),
        (
            lambda: bilevel.tune((STATE,), optax.chain(make()), ZERO, TRAIN, VALID),
            TypeError,
            "tuner must be what bilevel.online",
        ),
        (
            lambda: bilevel.tune(SGD.init(ZERO), make(), ZERO, TRAIN, VALID),
            ValueError,
            "opt_state must hold the state of one bilevel.online.*, got 0 of them",
        ),
        (lambda: bilevel.get_hparams(SGD.init(ZERO)), ValueError, "got 0 of them in tuple"),
        (lambda: bilevel.get_hparams((STATE, STATE)), ValueError, "got 2 of them in tuple"),
        (
            lambda: bilevel.tune(
                STATE, bilevel.online(RIDGE, 1.0, inner=SGD, outer=ADAM), ZERO, TRAIN, VALID
            ),
            ValueError,
            "tuner is not the one that made the state in opt_state.*hparams, free, outer",
        ),
        (
            lambda: bilevel.tune(STATE, make(inner=optax.adam(0.1)), ZERO, TRAIN, VALID),
            ValueError,
            "tuner is not the one that made the state in opt_state.*: inner would be",
        ),
        (
            lambda: bilevel.tune(STATE, make(), jnp.zeros(3), TRAIN, VALID),
            ValueError,
            "or params are not those it was made for",
        ),
        (
            lambda: bilevel.tune(STATE, make(), ZERO, TRAIN, VALID, on_schedule=1),
            TypeError,
            "on_schedule must be True or False",
        ),
        (
            lambda: optax.masked(make(), {"a": True, "b": False}).init({"a": ZERO, "b": ZERO}),
            ValueError,
            "pruned by optax.masked",
        ),
        (
            lambda: IDLE.update(ZERO, IDLE.init(ZERO), ZERO, train=TRAIN, valid=VALID),
            ValueError,
            r"hparams\['idle'\] influences neither inner nor outer",
        ),
        (
            lambda: make(outer=optax.lbfgs()).update(
                ZERO, make(outer=optax.lbfgs()).init(ZERO), ZERO, train=TRAIN, valid=VALID
            ),
            TypeError,
            "outer must be an optax optimiser that needs gradients only",
        ),
    ],
)  # fmt: skip
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_it_is_an_optax_transformation():
    tuner = make()
    assert isinstance(tuner, optax.GradientTransformationExtraArgs)
    assert isinstance(tuner.init(ZERO), OnlineState)
    hash(tuner)  # a static field of a TrainState
