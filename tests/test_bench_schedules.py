"""The studies of schedules and of long horizons, at tiny sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from benchmarks import long_horizons, schedules
from benchmarks.problems import training_run
from benchmarks.problems.training_run import Losses, Split

STEPS = 20  # one shape, (2, STEPS) in one run, for all that is judged: one program


def tiny(seed: int = 0) -> Split:
    """Sixty of the training rows, of which the network sees all digits."""
    split = training_run.digits(seed)
    return Split(*(jax.tree.map(lambda x: x[:60], part) for part in split))


# --- The training run -------------------------------------------------------------------------------------


def test_a_share_of_the_training_labels_is_wrong_and_of_no_others():
    clean, noisy = training_run.digits(3, 0.0), training_run.digits(3)
    changed = np.mean(clean.train["y"] != noisy.train["y"])
    assert 0.15 < changed < 0.2  # a tenth of those replaced by chance are right
    for part in ("valid", "test"):
        for a, b in zip(
            jax.tree.leaves(getattr(clean, part)), jax.tree.leaves(getattr(noisy, part)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    rows = np.concatenate([part["x"] for part in noisy])
    assert len(np.unique(rows, axis=0)) == 1797


def test_training_at_a_table_is_that_of_the_schedule():
    split, key = tiny(), jax.random.key(5)
    rates = jnp.linspace(0.1, 0.01, STEPS)
    params = training_run.start(None, None, jax.random.split(key)[0])
    optimizer = optax.sgd(lambda step: rates[step], momentum=training_run.MOMENTUM)

    @jax.jit
    def step(carry, j):
        params, state = carry
        key_order = jax.random.fold_in(jax.random.split(key)[1], j)
        chosen = jax.random.choice(key_order, 60, (training_run.BATCH,))
        batch = jax.tree.map(lambda x: x[chosen], split.train)
        updates, state = optimizer.update(jax.grad(training_run.loss)(params, None, batch), state)
        return optax.apply_updates(params, updates), state

    carry = params, optimizer.init(params)
    for j in range(STEPS):
        carry = step(carry, j)
    found = training_run.judged(jnp.stack([rates, rates]), key[None], split)
    for which in ("valid", "test"):
        expected = training_run.loss(carry[0], None, getattr(split, which))
        np.testing.assert_allclose(getattr(found, which)[1, 0], expected, rtol=1e-6)


# --- Schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", schedules.FAMILIES)
def test_every_family_has_as_many_schedules(family):
    points = schedules.FAMILIES[family](STEPS)
    assert len(points) == 64
    tables = np.stack(list(points.values()))
    assert tables.shape == (64, STEPS)
    assert np.isfinite(tables).all()
    assert (tables >= 0).all()
    assert len(np.unique(tables.round(9), axis=0)) > 32


def test_a_stretched_schedule_has_the_same_rates():
    rates = np.array([0.3, 0.2, 0.2, 0.1])
    np.testing.assert_allclose(schedules.stretched(rates, 4)[::4], rates)
    assert schedules.stretched(rates, 4).shape == (16,)


def test_a_search_spends_its_time_and_takes_the_best():
    points = {"none": np.zeros(STEPS), "some": np.full(STEPS, 0.1)}
    found = schedules.searched(points, tiny(), 1e-6, jax.random.key(0))
    assert (found.name, found.tried) == ("some", 2)
    assert found.seconds > 0


def test_learning_lowers_the_loss_and_is_judged_in_other_runs():
    split = tiny()
    found = schedules.learned(split, 0.003, jax.random.key(0), STEPS, 4, 30)
    assert found.rates.shape == (STEPS,)
    assert (np.diff(found.rates.reshape(4, 5)) == 0).all()
    tables = {"first": np.full(STEPS, 0.003), schedules.LEARNED: found.rates}
    judged = schedules.judge(tables, split, jax.random.key(1), 1)
    assert judged["first"].valid.shape == (1,)
    assert judged[schedules.LEARNED].valid.mean() < judged["first"].valid.mean() - 0.1


def test_differences_are_of_paired_runs():
    def losses(valid, test):
        return Losses(np.array(valid), np.array(test), np.array([0.5, 0.5]))

    runs = [
        {"learned": losses([1.0, 2.0], [1.0, 1.0]), "cosine": losses([2.0, 2.0], [1.0, 2.0])},
        {"learned": losses([3.0, 3.0], [2.0, 2.0]), "cosine": losses([2.5, 2.5], [1.0, 1.0])},
    ]
    learned, cosine = schedules.compared(runs)
    assert learned[1:] == ("2.2500 +- 0.7500", "1.5000 +- 0.5000", "50.00 +- 0.00", "", "", "")
    assert cosine[4:] == ("0.0000 +- 0.5000", "-0.2500 +- 0.7500", "1 of 2")


def test_a_seed_is_reported_and_drawn(tmp_path, capsys):
    runs = Losses(*np.full((3, schedules.JUDGES), 0.5))
    found = {
        arm: schedules.Found(np.full(STEPS, 0.1), "name", 1, 2.0, 0.3)
        for arm in (schedules.LEARNED, *schedules.FAMILIES)
    }
    judged = dict.fromkeys(found, runs)
    seeds = [
        schedules.Seed(i, found, judged, judged, judged, {0.1: found[schedules.LEARNED]}, {"0.1": runs})
        for i in range(2)
    ]
    schedules.show(seeds)
    schedules.draw(seeds, tmp_path)
    printed = capsys.readouterr().out
    assert "learned better" in printed
    assert "largest distance between starts, of each seed: 0.0000 0.0000" in printed
    assert (tmp_path / "schedules.png").stat().st_size > 1000


# --- Long horizons ----------------------------------------------------------------------------------------


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(long_horizons, "SIZES", (64, 4, 10))
    monkeypatch.setattr(long_horizons, "LARGE", (64, 4, 10))


@pytest.mark.thorough
@pytest.mark.usefixtures("_small")
def test_a_short_run_agrees_with_differences():
    growth, grad, differences, same = long_horizons.growth_row("sgd, momentum", 0.05, 5)
    assert same
    assert 0 <= growth < np.log(10)
    np.testing.assert_allclose(differences, grad, rtol=0.01)


def test_numbers_agree_within_a_percent():
    assert long_horizons.agree(1.0, 1.005, 0.996)
    assert not long_horizons.agree(1.0, 1.02)
    assert not long_horizons.agree(1.0, -1.0)


@pytest.mark.thorough
@pytest.mark.usefixtures("_small")
def test_the_outer_step_by_hand_is_that_of_the_library():
    """On the same batches: all of them are one row."""
    train, valid = (jax.tree.map(lambda x: x[:1], part) for part in long_horizons.digits(np.float64))
    params, rates = long_horizons.network((64, 4, 10), np.float64), jnp.full(2, 0.05)
    method = long_horizons.outer_method(6, 2)
    state = method.init(
        long_horizons.PROBLEM,
        params,
        {"lr": rates},
        bilevel.minibatches(train, 1),
        valid,
        key=jax.random.key(0),
    )
    state, info = method.step(long_horizons.PROBLEM, state, bilevel.minibatches(train, 1), valid)
    free = jnp.log(rates)
    args = free, long_horizons.OUTER.init(free), params, jax.random.key(0), train, valid
    moved, _, value = jax.jit(long_horizons.by_hand(6, 2))(*args)
    np.testing.assert_allclose(value, info.value, rtol=1e-9)
    np.testing.assert_allclose(moved, state.free["lr"], rtol=1e-6)


def test_a_column_has_params_and_state():
    params = {"w": jnp.zeros(1000, jnp.float32)}
    np.testing.assert_allclose(long_horizons.column_megabytes(params), 2 * 4000 / 1e6)


def test_the_toy_has_the_gradients_of_its_closed_form():
    def total(theta, kept):
        s, out = 1.0, 0.0
        for t in range(20):
            if t % kept == 0:
                s = jax.lax.stop_gradient(s)
            s = 0.9 * s + theta
            out += 0.5 * s**2
        return out

    for kept, expected in ((20, long_horizons.TRUE), (5, long_horizons.TRUNCATED)):
        np.testing.assert_allclose(jax.grad(total)(0.3, kept), expected, atol=0.01)


def test_balancing_rests_where_its_loss_says():
    problem, s = long_horizons.balancing(), jnp.zeros(23)
    for _ in range(300):
        s = problem.update(s, 0.5, None)
    np.testing.assert_allclose(s[0], -6 * 0.5, rtol=1e-6)


def test_strategies_are_told_apart_by_few_particles():
    with jax.enable_x64(False):
        mean, error = long_horizons.linear_toy({}, 100, 20)
    assert abs(mean - long_horizons.TRUE) < 4 * error
