"""Many runs in one program: each as if it ran alone, whatever becomes of the others."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implementations import METHODS, by_label
from jax.sharding import AxisType
from problems import RIDGE, ridge

import bilevel
from bilevel import Status

KEY = jax.random.key(7)
STEPS = 12
RIDGE_DATA = jax.tree.map(np.asarray, (ridge().train, ridge().valid))
# Starts of three members.
STARTS = (
    np.stack([np.zeros(20), np.full(20, 0.1), np.full(20, -0.1)]),
    np.array([-3.0, -1.0, 0.0]),
)
# They follow the number of steps that a solver takes to a tolerance near rounding.
ADAPTIVE = {"solver_steps", "solver_residual", "error", "hvp"}


def run(problem, params, hparams, train, valid, method, **settings):
    settings = {"steps": STEPS, "key": KEY, "progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, method, **settings)


def close(got, expected, tolerance=1e-10):
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    scale = 1 + np.max(np.abs(expected), where=finite, initial=0.0)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * scale)


def facts(result):
    """Everything that a run computes."""
    history = {k: column for k, column in result.history.items() if k not in ADAPTIVE | {"seconds"}}
    best, trajectory = result.best, result.trajectory
    return (
        history, result.params, result.hparams, result.model_state, best.params, best.hparams, best.value,
        best.step, best.model_state, trajectory.steps, trajectory.hparams, result.test,
    )  # fmt: skip


def assert_same(got, expected, tolerance=1e-10):
    """Two results of single runs."""
    jax.tree.map(functools.partial(close, tolerance=tolerance), facts(got), facts(expected))
    assert (got.status, got.message) == (expected.status, expected.message)
    assert got.trajectory.quantiles == expected.trajectory.quantiles


def assert_identical(got, expected):
    """Bit for bit, solver's steps included."""
    jax.tree.map(np.testing.assert_array_equal, facts(got), facts(expected))
    chex.assert_trees_all_equal(got.state, expected.state)


# --- A member is the run alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [False, True], ids=["whole", "minibatches"])
@by_label([row for row in METHODS if row.label in ("cg", "unrolled", "forward", "period")])
def test_a_member_is_the_run_alone(row, batches):
    train, valid = RIDGE_DATA
    if batches:
        train = bilevel.minibatches(train, 20)
    together = run(RIDGE, *STARTS, train, valid, row.method, population=bilevel.population(3))
    assert together.status.tolist() == [Status.BUDGET] * 3
    assert all(column.shape == (STEPS, 3) for name, column in together.history.items() if name not in TIMES)
    for i in (0, 2):
        start = jax.tree.map(lambda x, i=i: x[i], STARTS)
        alone = run(RIDGE, *start, train, valid, row.method, key=jax.random.fold_in(KEY, i))
        assert_same(together.member(i), alone)
        jax.tree.map(close, together.member(i).state.params, alone.state.params)


TIMES = {"step", "seconds"}


def noisy(w, log_l2, batch):
    data, key = batch
    return RIDGE.inner(w, log_l2, data) + 0.1 * jnp.vdot(w, jax.random.normal(key, w.shape))


def drawn_together():
    rng = np.random.default_rng(0)
    for _ in range(STEPS * 100):
        rows = rng.permutation(40)[:20]
        yield RIDGE_DATA[0][0][rows], RIDGE_DATA[0][1][rows]


def judged():
    return bilevel.minibatches(RIDGE_DATA[1], 50)


SOURCES = {
    "with_rng": (
        bilevel.Problem(noisy, RIDGE.outer),
        lambda: bilevel.with_rng(RIDGE_DATA[0]),
        lambda: RIDGE_DATA[1],
    ),
    "iterable": (RIDGE, drawn_together, lambda: RIDGE_DATA[1]),
    "judged": (RIDGE, lambda: RIDGE_DATA[0], judged),
}
DENSE = bilevel.alternating(bilevel.implicit(bilevel.dense()), optax.sgd(0.3), optax.adam(0.1), inner_steps=3)


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_source(source):
    problem, train, valid = SOURCES[source]
    settings = {"judge_every": 5, "test": RIDGE_DATA[0] if source == "judged" else None}
    members = bilevel.population(3)
    together = run(problem, *STARTS, train(), valid(), DENSE, population=members, **settings)
    start = jax.tree.map(lambda x: x[1], STARTS)
    key = jax.random.fold_in(KEY, 1)
    alone = run(problem, *start, train(), valid(), DENSE, key=key, **settings)
    assert_same(together.member(1), alone)
    assert ("judged" in together.history) == (source == "judged")
    if source == "judged":
        assert together.best.value == np.min(together.members.value)
        assert together.test["best"]["value"] == together.members.test["best"]["value"][together.best.member]
        assert together.test["last"]["value"].shape == (3,)
        assert np.isfinite(together.history["test"][::5]).all()
        assert np.isnan(together.history["test"][1:5]).all()


# --- A small problem: the inner solution is 2 / (1 + l2), the best l2 is 1 --------------------------------


def pull(w, h, x):
    return 0.5 * jnp.sum((w - x) ** 2) + 0.5 * h["l2"] * jnp.sum(w**2)


def reach(w, h, x):
    del h
    return 0.5 * jnp.sum((w - x) ** 2)


SMALL = bilevel.Problem(pull, reach, constraints={"l2": bilevel.positive()})
X, V = np.array([2.0]), np.array([1.0])
METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.dense()), optax.sgd(0.3), optax.adam(0.2), inner_steps=10
)


def small(l2, method=METHOD, problem=SMALL, **settings):
    hparams = {"l2": np.asarray(l2, float)}
    settings = {"population": bilevel.population(len(l2)), **settings}
    return run(problem, np.zeros((len(l2), 1)), hparams, X, V, method, **settings)


def test_samples_are_the_starts():
    def sample(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (1,)), {"l2": jax.random.uniform(second) + 0.1}

    members = bilevel.population(4, sample=sample)
    result = run(SMALL, None, None, X, V, METHOD, population=members)
    starts = members.start(KEY, None, None)
    values = np.asarray(starts[1]["l2"])
    assert len(set(values)) == 4
    np.testing.assert_allclose(result.trajectory.hparams["l2"][0], values, rtol=1e-14)
    given = run(SMALL, *starts, X, V, METHOD, population=bilevel.population(4))
    jax.tree.map(np.testing.assert_array_equal, facts(result), facts(given))
    # Another key, other starts.
    other = run(SMALL, None, None, X, V, METHOD, population=members, key=jax.random.key(8))
    assert not np.isin(other.trajectory.hparams["l2"][0], values).any()


def test_the_best_of_all():
    result = small([3.0, 0.9, 0.2])
    best = result.best
    lowest = np.argmin(result.members.value)
    assert (best.member, best.value, best.step) == (
        lowest, result.members.value[lowest], result.members.step[lowest],
    )  # fmt: skip
    assert best.value == np.min(result.history["value"]) == result.history["value"][best.step, best.member]
    assert result.members.value.shape == (3,)
    assert best.params.shape == (1,)
    w = np.asarray(best.params)
    np.testing.assert_allclose(best.value, 0.5 * (w[0] - 1) ** 2, rtol=1e-12)


def test_without_best_pairs_they_are_the_last():
    kept, last = small([3.0, 0.9]), small([3.0, 0.9], keep_best=False)
    np.testing.assert_array_equal(last.history["value"], kept.history["value"])
    np.testing.assert_array_equal(last.members.value, last.history["value"][-1])
    np.testing.assert_array_equal(last.members.params, last.params)
    assert last.best.member == np.argmin(last.history["value"][-1])
    assert last.members.step.tolist() == [STEPS - 1] * 2


# --- One that fails leaves the others as they are -----------------------------------------------------------

RATE = bilevel.Problem(
    lambda w, h, x: 0.5 * jnp.sum((w - x) ** 2), reach, constraints={"lr": bilevel.positive()}
)
TUNED = bilevel.alternating(
    bilevel.unrolled(), bilevel.tuned(lambda h: optax.sgd(h["lr"])), optax.sgd(1e-3), inner_steps=3
)


def rates(lr, params=None, **settings):
    n = len(lr)
    params = np.zeros((n, 1)) if params is None else params
    settings = {"population": bilevel.population(n), **settings}
    return run(RATE, params, {"lr": np.array(lr)}, X, V, TUNED, **settings)


def bad_rate():
    return rates([0.1, 1e200, 0.3]), rates([0.1, 0.2, 0.3])


def bad_start():
    params = np.array([[0.5], [np.nan], [0.0]])
    return rates([0.1, 0.2, 0.3], params), rates([0.1, 0.2, 0.3], np.nan_to_num(params))


@pytest.mark.parametrize("make", [bad_rate, bad_start])
def test_a_member_that_diverges_leaves_the_others(make):
    result, benign = make()
    for i in (0, 2):
        assert_identical(result.member(i), benign.member(i))
        assert result.member(i).message == benign.member(i).message
    assert result.status.tolist() == [Status.BUDGET, Status.DIVERGED, Status.BUDGET]
    failed = result.member(1)
    assert failed.status == Status.DIVERGED
    assert failed.message.startswith("Outer step 0: params became non-finite: the inner loop diverges;")
    assert len(failed.history["value"]) == 1
    assert not failed.history["accepted"].any()
    assert np.isnan(failed.best.value)
    assert np.isnan(result.history["value"][1:, 1]).all()
    assert result.best.member != 1
    assert "1 of 3 members DIVERGED" in result.message
    assert "2 of 3 members BUDGET" in result.message
    # What it touched before it ended is counted, and nothing after.
    assert result.counts["inner_grad"] == sum(result.member(i).counts["inner_grad"] for i in range(3))


def test_a_late_failure_does_not_win():
    def cliff(w, h, x):
        # Lower and lower towards a wall, where it is nan.
        return jnp.where(h["l2"] < 0.5, jnp.nan, h["l2"]) + 0 * jnp.sum(w * x)

    problem = bilevel.Problem(pull, cliff, constraints={"l2": bilevel.positive()})
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), optax.sgd(0.3), optax.sgd(0.1), inner_steps=2
    )
    result = small([0.9, 3.0], method, problem, steps=12)
    assert result.status.tolist() == [Status.DIVERGED, Status.BUDGET]
    assert np.nanmin(result.history["value"][:, 0]) < np.min(result.history["value"][:, 1])
    assert result.best.member == 1
    assert result.best.value == np.min(result.history["value"][:, 1])
    assert np.isfinite(result.hparams["l2"]).all()
    assert result.member(0).best.value == np.nanmin(result.history["value"][:, 0])


def test_rejections_are_each_members_own():
    # Of minibatches three in a row may fail: rows with nan, which each member meets at its own times.
    x = np.where(np.arange(24) % 6 == 0, np.nan, 2.0)
    train = bilevel.minibatches(x, 4)
    method = bilevel.alternating(bilevel.implicit(bilevel.dense()), optax.sgd(0.3), optax.sgd(0.1))
    hparams = {"l2": np.full(4, 0.5)}
    population = bilevel.population(4)
    result = run(SMALL, np.zeros((4, 1)), hparams, train, V, method, population=population, steps=30)
    accepted = result.history["accepted"]
    assert 0 < accepted.sum() < accepted.size
    assert len(set(map(tuple, accepted.T.tolist()))) > 1
    start = np.zeros(1), {"l2": np.float64(0.5)}
    alone = run(SMALL, *start, train, V, method, key=jax.random.fold_in(KEY, 2), steps=30)
    assert_same(result.member(2), alone)


def test_all_failed():
    result = rates([1e200, 2e200])
    assert result.status.tolist() == [Status.DIVERGED] * 2
    assert np.isnan(result.best.value)
    assert np.isnan(result.members.value).all()
    assert len(result.history["value"]) == 1
    assert "2 of 2 members DIVERGED" in result.message
    assert "best nan" in repr(result)


def test_converged_members_are_frozen():
    starts = [1.05, 0.3, 5.0]
    method = bilevel.alternating(
        bilevel.implicit(bilevel.dense()), optax.sgd(0.3), optax.sgd(2.0), inner_steps=80
    )
    settings = {"tol": 1e-4, "steps": 200, "judge_every": 4}
    result = small(starts, method, **settings)
    assert result.status.tolist() == [Status.CONVERGED] * 3
    lengths = result.members.attempted
    assert len(set(lengths.tolist())) > 1
    assert len(result.history["value"]) == max(lengths)
    for i, l2 in enumerate(starts):
        alone = run(SMALL, np.zeros(1), {"l2": l2}, X, V, method, key=jax.random.fold_in(KEY, i), **settings)
        jax.tree.map(close, facts(result.member(i)), facts(alone))
        assert alone.status == Status.CONVERGED
        assert np.isnan(result.history["value"][lengths[i] :, i]).all()
        assert not result.history["accepted"][lengths[i] :, i].any()
    np.testing.assert_allclose(result.hparams["l2"], 1.0, atol=1e-2)


# --- Halving ------------------------------------------------------------------------------------------------

FIVE = [6.0, 0.9, 3.0, 1.3, 0.05]


def halved(n=5, steps=16, **settings):
    return small(FIVE[:n], population=bilevel.population(n, halve_every=4), steps=steps, **settings)


def test_halving_drops_the_worse_and_leaves_the_rest():
    whole, result = small(FIVE, steps=16), halved()
    lowest = np.minimum.accumulate(whole.history["value"], axis=0)
    alive, left = np.arange(5), {}
    for step in (4, 8, 12):
        order = alive[np.argsort(lowest[step - 1, alive])]
        kept = np.sort(order[: -(-len(alive) // 2)])
        left.update(dict.fromkeys(np.setdiff1d(alive, kept).tolist(), step))
        alive = kept
    assert len(alive) == 1
    assert sorted(left.values()) == [4, 4, 8, 12]
    for i in range(5):
        attempted = left.get(i, 16)
        assert result.members.attempted[i] == attempted
        member, twin = result.member(i), whole.member(i)
        assert len(member.history["value"]) == attempted
        for name in set(member.history) - {"seconds"}:
            close(member.history[name], twin.history[name][:attempted], 1e-12)
            if i in left and name in ("value", "grad_norm"):
                assert np.isnan(result.history[name][attempted:, i]).all()
        # The hyperparameters at which it was dropped.
        np.testing.assert_array_equal(member.trajectory.steps, range(attempted + 1))
        close(member.trajectory.hparams["l2"], twin.trajectory.hparams["l2"][: attempted + 1], 1e-12)
        close(member.hparams["l2"], twin.trajectory.hparams["l2"][attempted], 1e-12)
        close(member.best.value, lowest[attempted - 1, i], 1e-12)
        if i in left:
            assert member.status == Status.DROPPED
            assert member.message == f"Dropped by successive halving at outer step {attempted}."
        else:
            assert member.status == Status.BUDGET
            np.testing.assert_array_equal(member.params, twin.params)
    # Over all members, dropped ones too.
    assert result.best.value == np.min(result.members.value)
    assert result.best.member == np.argmin(result.members.value)
    assert "4 of 5 members DROPPED (member 0): Dropped by successive halving at" in result.message
    assert result.counts["outer_grad"] == sum(result.members.attempted)


def test_members_that_failed_are_dropped_first():
    lr = [1e200, 0.1, 0.2, 0.3]
    result = rates(lr, population=bilevel.population(4, halve_every=4))
    assert result.status.tolist()[0] == Status.DIVERGED
    assert sorted(result.members.attempted.tolist()) == [1, 4, 8, 12]
    assert result.member(0).message.startswith("Outer step 0: params became non-finite")


def test_a_member_that_converged_is_judged_by_its_best_value():
    """Also where no best pairs are kept, and its last row is empty."""
    norms = small(FIVE[:4], steps=4).history["grad_norm"]
    tol = float(np.sort(norms[1])[0]) * 1.001
    for keep_best in (True, False):
        result = halved(4, keep_best=keep_best, tol=tol, judge_every=1)
        # Of the first four values its is the second lowest.
        assert (result.status[3], result.members.attempted[3]) == (Status.CONVERGED, 2)
        assert result.status[[0, 2]].tolist() == [Status.DROPPED] * 2
        assert result.members.attempted[[0, 2]].tolist() == [4, 4]


def test_halving_without_best_pairs_and_with_callbacks():
    seen = []
    result = halved(4, keep_best=False, callbacks=lambda step, rows: seen.append((step, rows)), judge_every=4)
    assert [step for step, _ in seen] == [4, 8, 12, 16]
    assert {rows["value"].shape for _, rows in seen} == {(4, 4)}
    stacked = np.concatenate([rows["value"] for _, rows in seen])
    np.testing.assert_array_equal(stacked, result.history["value"])
    assert np.isfinite(result.history["value"]).sum(axis=1).tolist() == [4] * 4 + [2] * 4 + [1] * 8


@pytest.mark.parametrize(("n", "left"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (7, [7, 4, 2, 1])])
def test_counts_of_survivors(n, left):
    result = small(np.linspace(0.2, 3.0, n), population=bilevel.population(n, halve_every=2), steps=8)
    going = np.isfinite(result.history["value"]).sum(axis=1)[::2].tolist()
    assert [count for count, _ in itertools.groupby(going)] == left


# --- Kinds of problems -----------------------------------------------------------------------------------


def test_objectives_weighted_by_each_member_make_a_front():
    # The inner solution is w = h; of a (w - 1)^2 + (1 - a) (w + 1)^2 the best is 2 a - 1.
    def both(w, h, x):
        first, second = (w[0] - x[0]) ** 2, (w[0] + x[0]) ** 2
        return h["a"] * first + (1 - h["a"]) * second, {"first": first, "second": second}

    problem = bilevel.Problem(
        lambda w, h, x: 0.5 * jnp.sum((w - h["target"] * x) ** 2), both, constraints={"a": bilevel.fixed()}
    )
    a = np.linspace(0.0, 1.0, 5)
    method = bilevel.alternating(bilevel.implicit(bilevel.dense()), optax.sgd(1.0), optax.sgd(0.25))
    hparams = {"a": a, "target": np.full(5, 0.3)}
    result = run(problem, np.zeros((5, 1)), hparams, V, V, method, population=bilevel.population(5), steps=60)
    np.testing.assert_array_equal(result.hparams["a"], a)
    np.testing.assert_allclose(result.hparams["target"], 2 * a - 1, atol=1e-12)
    np.testing.assert_allclose(result.history["first"][-1], 4 * (1 - a) ** 2, atol=1e-11)
    np.testing.assert_allclose(result.history["second"][-1], 4 * a**2, atol=1e-11)
    assert result.status.tolist() == [Status.BUDGET] * 5


def test_model_state_is_each_members_own():
    def inner(w, h, x, state):
        return pull(w, h, x), 0.9 * state + 0.1 * jnp.mean(w)

    problem = bilevel.Problem(
        inner, lambda w, h, x, state: reach(w, h, x), constraints=SMALL.constraints, has_state=True
    )
    method = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.3), optax.adam(0.1), inner_steps=3)
    result = small([0.2, 3.0], method, problem, model_state=np.float64(5.0))
    alone = run(
        problem, np.zeros(1), {"l2": 3.0}, X, V, method, model_state=np.float64(5.0),
        key=jax.random.fold_in(KEY, 1),
    )  # fmt: skip
    assert_same(result.member(1), alone)
    assert result.model_state.shape == result.members.model_state.shape == (2,)
    assert result.model_state[0] != result.model_state[1]


def test_a_start_of_the_problem_is_each_members_own():
    def start(h, x, key):
        return jnp.exp(-h["s"]) * x + jax.random.normal(key, x.shape)

    problem = bilevel.Problem(lambda w, h, x: reach(w, h, 0 * x), reach, start=start)
    method = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.1), optax.adam(0.1), inner_steps=2)
    hparams = {"s": np.array([0.1, 1.0])}
    result = run(problem, None, hparams, X, V, method, population=bilevel.population(2))
    alone = run(problem, None, {"s": 1.0}, X, V, method, key=jax.random.fold_in(KEY, 1))
    assert_same(result.member(1), alone)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (1, 4)])
def test_on_a_mesh(sizes):
    mesh = jax.make_mesh(sizes, ("population", "data"), axis_types=(AxisType.Auto,) * 2)
    x, v = np.linspace(1.0, 3.0, 8), np.linspace(0.0, 2.0, 8)

    def fit(w, h, x):
        return 0.5 * jnp.mean((w - x) ** 2) + 0.5 * h["l2"] * jnp.sum(w**2)

    problem = bilevel.Problem(fit, lambda w, h, x: 0.5 * jnp.mean((w - x) ** 2), SMALL.constraints)
    hparams = {"l2": np.linspace(0.2, 3.0, 8)}

    def members(mesh, halve_every=None):
        population = bilevel.population(8, halve_every=halve_every)
        start = np.zeros((8, 1)), hparams
        return run(problem, *start, x, v, METHOD, population=population, mesh=mesh, steps=16)

    one, many = members(None), members(mesh)
    close(many.history["value"], one.history["value"])
    jax.tree.map(close, facts(many), facts(one))
    carried = jax.tree.leaves((many.state, many.hparams, many.members.params))
    assert {x.sharding.spec[0] for x in carried} == {"population"}
    # Where fewer stay than the axis has devices, some of those dropped stay in the program.
    fewer = members(mesh, halve_every=4)
    going = np.isfinite(fewer.history["value"]).sum(axis=1)[::4].tolist()
    assert going == [8, 4, 2, 1]
    for i in np.flatnonzero(fewer.members.attempted == 16):
        assert_same(fewer.member(i), one.member(i))
    for i, steps in enumerate(fewer.members.attempted):
        close(fewer.history["value"][:steps, i], one.history["value"][:steps, i])
    assert fewer.best.member == np.argmin(fewer.members.value)
    gathered = jax.tree.leaves((fewer.state, fewer.hparams, fewer.members.params))
    assert {x.sharding.spec[0] for x in gathered} == {"population"}


def test_members_on_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("population", "data"), axis_types=(AxisType.Explicit,) * 2)
    start = np.zeros((4, 4)), {"l2": np.linspace(0.2, 3.0, 4)}
    x = np.linspace(1.0, 3.0, 4)

    def run_on(mesh):
        population = bilevel.population(4)
        return run(SMALL, *start, x, x - 1, METHOD, population=population, mesh=mesh, steps=3)

    got, expected = run_on(mesh).member(1), run_on(None).member(1)
    assert_same(got, expected)
    assert got.params.sharding.mesh == mesh


# --- What a person sees -----------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    result = rates([0.1, 1e200, 0.3], test=V)
    result.save(tmp_path / "population.npz")
    again = bilevel.load(tmp_path / "population.npz")
    jax.tree.map(np.testing.assert_array_equal, facts(again), facts(result))
    np.testing.assert_array_equal(again.status, result.status)
    assert (again.message, again.best.member) == (result.message, result.best.member)
    assert repr(again) == repr(result)
    for i in range(3):
        got, expected = again.member(i), result.member(i)
        jax.tree.map(np.testing.assert_array_equal, facts(got), facts(expected))
        assert (got.status, got.message) == (expected.status, expected.message)
        assert repr(got) == repr(expected)


def test_repr():
    result = halved(2)
    lines = repr(result).splitlines()
    assert lines[0].startswith("Result(population of 2 after 16 outer steps in ")
    best = result.best
    assert lines[1] == f"  value: best {best.value:.6g} at step {best.step} of member {best.member}"
    assert lines[2] == f"  hparams: ['l2'] = {float(best.hparams['l2']):.4g}"
    assert "1 of 2 members DROPPED: Dropped by successive halving at outer step 4." in lines[3]


def test_members_are_counted_from_both_ends():
    result = small([3.0, 0.9])
    assert_identical(result.member(-1), result.member(1))
    for wrong in (2, -3):
        with pytest.raises(IndexError, match=f"member must be from 0 to 1, got {wrong}"):
            result.member(wrong)
    with pytest.raises(ValueError, match="a population; this result is of a single run"):
        result.member(0).member(0)


def test_plot():
    result = halved()
    figure = result.plot()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["outer loss", "gradient norm (free units)", "hparams['l2']"]
    for ax in figure.axes:
        lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
        assert len(lines) == 5
        (best,) = [line for line in lines if line.get_linewidth() > 1]
        assert best.get_zorder() > max(line.get_zorder() for line in lines if line is not best)
    # A member that blows up does not hide the others.
    worst = np.nanmax(result.history["value"])
    assert worst > 1e6 * result.best.value
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < result.best.value < top < 10 * np.max(result.history["value"][0])
    best = next(line for line in figure.axes[0].lines if line.get_linewidth() > 1)
    member = result.best.member
    np.testing.assert_array_equal(best.get_ydata(), result.member(member).history["value"])
    assert best.get_label() == f"validation, member {member}"
    figure.canvas.draw()


def test_plot_of_many_entries_and_failed_members():
    def per_feature(w, h, x):
        return 0.5 * jnp.sum((w - x) ** 2) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    problem = bilevel.Problem(per_feature, reach)
    hparams = np.linspace(-1, 1, 3)[:, None] + np.linspace(0, 1, 40)
    params = np.zeros((3, 40)) + np.array([0.0, np.nan, 0.0])[:, None]
    result = run(
        problem, params, hparams, np.full(40, 2.0), np.ones(40), METHOD,
        population=bilevel.population(3), test=np.ones(40), judge_every=2,
    )  # fmt: skip
    assert result.status.tolist()[1] == Status.DIVERGED
    result.plot().canvas.draw()
    result.member(0).plot().canvas.draw()


# --- Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(population=4), TypeError, r"population must be bilevel.population\(n, ...\), got 4"),
        (
            dict(params=np.zeros((2, 1))),
            ValueError,
            r"params has shape \(2, 1\), but in a population of 3 each array has an axis of members in front",
        ),
        (dict(hparams={"l2": 0.5}), ValueError, r"hparams\['l2'\] has shape \(\), but in a population of 3"),
        (dict(params=None), ValueError, "params"),
        (
            dict(hparams={"l2": np.array([1.0, -1.0, 1.0])}),
            ValueError,
            r"hparams\['l2'\] must be greater than 0",
        ),
        (
            dict(population=bilevel.population(3, sample=lambda key: (jnp.zeros(1), {"l2": 1.0}))),
            ValueError,
            r"params and hparams must be None where bilevel.population\(n, sample=...\) makes them",
        ),
        (
            dict(
                params=None, hparams=None, population=bilevel.population(3, sample=lambda key: jnp.zeros(1))
            ),
            TypeError,
            r"sample must return a pair \(params, hparams\)",
        ),
        (
            dict(
                params=None,
                hparams=None,
                population=bilevel.population(3, sample=lambda key: (jnp.zeros(1), {"l2": -1.0})),
            ),
            ValueError,
            r"hparams\['l2'\] must be greater than 0",
        ),
    ],
)
def test_mistakes(settings, error, words):
    given = {
        "params": np.zeros((3, 1)),
        "hparams": {"l2": np.ones(3)},
        "population": bilevel.population(3),
        **settings,
    }
    params, hparams = given.pop("params"), given.pop("hparams")
    with pytest.raises(error, match=words):
        run(SMALL, params, hparams, X, V, METHOD, **given)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((0,), ValueError, "n must be"),
        ((2.5,), TypeError, "n must be"),
        ((2, 3), TypeError, r"sample must be a function key -> \(params, hparams\), got 3"),
        ((2, None, 0), ValueError, "halve_every must be"),
    ],
)
def test_mistakes_in_a_population(args, error, words):
    with pytest.raises(error, match=words):
        bilevel.population(*args)
