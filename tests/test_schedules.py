"""The path of a hyperparameter as a schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import RIDGE, ridge

import bilevel


@pytest.fixture(scope="module")
def result():
    problem = bilevel.Problem(
        lambda w, h, batch: RIDGE.inner(w, h["reg"]["l2"], batch) + 0 * jnp.sum(h["weights"]),
        lambda w, h, batch: RIDGE.outer(w, h, batch) + 1e-3 * jnp.sum(h["weights"] ** 2),
    )
    hparams = {"reg": {"l2": np.float64(-1.0)}, "weights": np.ones(3)}
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.3), optax.adam(0.1), inner_steps=4)
    return bilevel.optimize(
        problem, np.zeros(20), hparams, ridge().train, ridge().valid, method, 25, progress=False
    )


@pytest.mark.parametrize("name", ["reg.l2", ("reg", "l2")])
def test_it_goes_through_what_was_recorded_and_is_linear_between(result, name):
    schedule = result.schedule(name, inner_steps=4)
    path = result.trajectory.hparams["reg"]["l2"]
    np.testing.assert_array_equal(schedule.steps, 4 * np.arange(26))
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(0, 104, 4)), path, rtol=1e-12)
    np.testing.assert_allclose(schedule(5), 0.75 * path[1] + 0.25 * path[2], rtol=1e-12)
    np.testing.assert_allclose([schedule(-3), schedule(1000)], path[[0, -1]], rtol=1e-12)
    assert result.schedule("weights")(3).shape == (3,)


def test_another_run_follows_it_with_any_optimiser(result):
    schedule = result.schedule("reg.l2", inner_steps=4)

    @jax.jit
    def train(w):
        optimizer = optax.adam(lambda step: 1e-2 * jnp.exp(schedule(step)))

        def step(k, at):
            w, state = at
            grads = jax.grad(RIDGE.inner)(w, schedule(k), ridge().train)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(w, updates), state

        return jax.lax.fori_loop(0, 100, step, (w, optimizer.init(w)))[0]

    assert np.isfinite(train(jnp.zeros(20))).all()


def test_it_is_saved_with_the_result(result, tmp_path):
    result.save(tmp_path / "run.npz")
    again = bilevel.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.schedule("weights").values, result.schedule("weights").values)


def test_a_single_hyperparameter_needs_no_name():
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.3), optax.adam(0.1))
    run = bilevel.optimize(
        RIDGE, np.zeros(20), np.float64(-1.0), ridge().train, ridge().valid, method, 3, progress=False
    )
    assert run.schedule().values.shape == (4,)
    float32 = bilevel.Schedule(np.array([0, 2]), np.array([0, 1], np.float32))
    assert float32(jnp.int32(1)).dtype == jnp.float32
    one_row = bilevel.Schedule(np.array([0]), np.array([2.0]))
    assert float(one_row(7)) == 2.0


@pytest.mark.parametrize(
    ("name", "part"), [(None, "needs a name"), ("l2", "knows no 'l2'"), ("weight", "reg.l2, weights")]
)
def test_unknown_names_say_what_there_is(result, name, part):
    with pytest.raises(KeyError, match=part):
        result.schedule(name)


def test_long_schedules_in_half_precision_keep_their_steps():
    half = bilevel.Schedule(np.arange(2000), jnp.linspace(0, 1, 2000).astype(jnp.bfloat16))
    assert half(1010).dtype == jnp.bfloat16
    np.testing.assert_allclose(float(half(300)), 0.15, rtol=0.01)
    np.testing.assert_allclose(float(half(1700)), 0.85, rtol=0.01)


@pytest.mark.parametrize(
    ("steps", "values", "part"),
    [([2, 1], [0.0, 1.0], "increasing"), ([0, 1], [0.0], "row for each of 2"), ([], [], "increasing")],
)
def test_a_schedule_has_increasing_steps_and_a_value_for_each(steps, values, part):
    with pytest.raises(ValueError, match=part):
        bilevel.Schedule(np.array(steps), np.array(values))


def test_inner_steps_are_a_positive_number(result):
    with pytest.raises(ValueError, match="inner_steps"):
        result.schedule("weights", inner_steps=-1)
    with pytest.raises(TypeError, match="inner_steps"):
        result.schedule("weights", inner_steps="2")


def test_quantiles_and_populations_have_no_schedule():
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.3), optax.adam(0.1))
    run = bilevel.optimize(
        RIDGE, np.zeros((2, 20)), np.zeros(2), ridge().train, ridge().valid, method, 3,
        population=bilevel.population(2), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"member\(i\)"):
        run.schedule()
    assert run.member(0).schedule().values.shape == (4,)
    many = bilevel.Problem(
        lambda w, h, batch: 0.5 * (w - batch.mean()) ** 2 + 1e-3 * w * jnp.sum(h),
        lambda w, h, batch: 0.5 * w**2,
    )
    data = jnp.ones(2)
    large = bilevel.optimize(many, jnp.zeros(()), jnp.zeros(5000), data, data, method, 3, progress=False)
    with pytest.raises(ValueError, match="only quantiles"):
        large.schedule()
