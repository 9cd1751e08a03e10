"""Structure that problems and sources may have: folds, composite losses, simplexes, strata, episodes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implementations import OUTER
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import (
    NETWORK,
    QUADRATIC,
    RIDGE,
    Quadratic,
    central_difference,
    logistic,
    network,
    network_data,
    ridge,
)

import bilevel
from bilevel.constraints import bind
from bilevel.problem import Composite, Draw, Point, SolveInfo

KEY = jax.random.key(0)


def run(problem, params, hparams, train, valid, method, steps, **settings):
    settings = {"progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, method, steps, **settings)


def at(problem, estimator, *args):
    """One estimate, compiled."""
    return jax.jit(bilevel.hypergradient(problem, estimator))(*args)


# --- One set of hyperparameters for many problems ----------------------------------------------------------


def folds(k=4):
    """Training and validation rows of each fold of the reference instance, stacked."""
    split = np.arange(40).reshape(k, -1)
    kept = np.stack([np.setdiff1d(np.arange(40), held) for held in split])
    a, b = ridge().a, ridge().b
    return (a[kept], b[kept]), (a[split], b[split])


def cross_validation(log_l2):
    """Mean validation loss over the folds, for many penalties at once."""
    (a, b), (v, c) = folds()
    loss = 0.0
    for x, y, v_fold, c_fold in zip(a, b, v, c, strict=True):
        d, q = np.linalg.eigh(x.T @ x / y.size)
        w = (q.T @ (x.T @ y / y.size)) / (d + np.exp(log_l2)[:, None]) @ q.T
        loss = loss + 0.5 * np.mean((w @ v_fold.T - c_fold) ** 2, axis=1) / len(a)
    return loss


def test_lift_is_cross_validation():
    grid = np.linspace(-6.0, 2.0, 8001)
    losses = cross_validation(grid)
    best = int(np.argmin(losses))
    assert 0 < best < len(grid) - 1
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.3), OUTER, inner_steps=100)
    result = run(bilevel.lift(RIDGE), np.zeros((4, 20)), np.float64(-3.0), *folds(), method, 60)
    assert abs(float(result.hparams) - grid[best]) <= 1e-3
    assert abs(result.history["value"][-1] - losses[best]) <= 1e-7


def test_a_lifted_problem_is_a_value():
    assert bilevel.lift(RIDGE) == bilevel.lift(RIDGE)
    assert hash(bilevel.lift(RIDGE)) == hash(bilevel.lift(RIDGE))
    assert bilevel.lift(RIDGE) != bilevel.lift(NETWORK)
    constrained = dataclasses.replace(RIDGE, constraints=bilevel.box(-5, 5))
    assert bilevel.lift(constrained).constraints == constrained.constraints
    with pytest.raises(TypeError, match="problem"):
        bilevel.lift(lambda w, h, batch: 0.0)


def test_lift_sums_inner_and_averages_outer_and_metrics():
    members = [Quadratic.random(3, 2, seed) for seed in range(3)]
    train, valid = (
        jax.tree.map(lambda *xs: np.stack(xs), *(getattr(m, half) for m in members))
        for half in ("train", "valid")
    )
    w, h = np.random.default_rng(1).standard_normal((3, 3)), jnp.array([0.3, -0.5])
    lifted = bilevel.lift(QUADRATIC)
    inner = [QUADRATIC.inner(w[i], h, m.train) for i, m in enumerate(members)]
    outer = [QUADRATIC.outer(w[i], h, m.valid) for i, m in enumerate(members)]
    np.testing.assert_allclose(lifted.inner(w, h, train), np.sum(inner), rtol=1e-12)
    value, metrics = lifted.outer(w, h, valid)
    np.testing.assert_allclose(value, np.mean([v for v, _ in outer]), rtol=1e-12)
    np.testing.assert_allclose(metrics["distance"], np.mean([m["distance"] for _, m in outer]), rtol=1e-12)
    at_solutions = np.stack([m.solution(np.asarray(h)) for m in members])
    estimate = at(lifted, bilevel.implicit(bilevel.dense()), at_solutions, h, train, valid)
    expected = np.mean([m.hypergradient(np.asarray(h)) for m in members], axis=0)
    np.testing.assert_allclose(estimate.grad, expected, rtol=1e-9)


def test_lift_keeps_fixed_points_starts_and_model_state():
    def update(w, h, batch, count):
        return 0.5 * w + h * batch, count + 1

    problem = bilevel.FixedPoint(
        update,
        lambda w, h, batch, count: 0.5 * (w - batch) ** 2,
        start=lambda h, batch, key: h * batch + jax.random.normal(key),
        has_state=True,
    )
    train, valid = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.2, -1.0])
    fn = jax.jit(bilevel.hypergradient(bilevel.lift(problem), bilevel.unrolled(steps=3)))
    estimate = fn(None, 0.4, train, valid, model_state=np.zeros(3, np.int32))
    np.testing.assert_array_equal(estimate.point.model_state, [3, 3, 3])
    # w_3 = (h batch + noise) / 8 + 1.75 h batch: each member starts with noise of its own
    noise = 8 * (np.asarray(estimate.params) - 0.4 * 1.875 * train)
    assert np.abs(np.diff(noise)).min() > 1e-3
    expected = np.mean((np.asarray(estimate.params) - valid) * 1.875 * train)
    assert abs(float(estimate.grad) - expected) <= 1e-12


def test_lifted_losses_with_model_state():
    def inner(w, h, batch, mean):
        mean = 0.5 * mean + 0.5 * batch
        return 0.5 * (w - h * mean) ** 2, mean

    def outer(w, h, batch, mean):
        return 0.5 * (w - batch) ** 2, {"mean": mean}

    problem = bilevel.lift(bilevel.Problem(inner, outer, has_state=True))
    w, mean, train = np.array([1.0, 2.0]), np.array([0.2, -0.4]), np.array([1.0, 3.0])
    after = 0.5 * mean + 0.5 * train
    loss, state = problem.inner(w, 0.3, train, mean)
    np.testing.assert_allclose(loss, np.sum(0.5 * (w - 0.3 * after) ** 2), rtol=1e-12)
    np.testing.assert_allclose(state, after, rtol=1e-12)
    _, metrics = problem.outer(w, 0.3, train, mean)
    np.testing.assert_allclose(metrics["mean"], mean.mean(), rtol=1e-12)
    method = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.5), optax.sgd(0.1), inner_steps=2)
    result = run(problem, w, np.float64(0.3), train, train, method, 5, model_state=mean)
    np.testing.assert_allclose(result.model_state, train + (mean - train) * 0.5**10, rtol=1e-12)


@pytest.mark.parametrize("where", ["train", "valid"])
@pytest.mark.parametrize("wrap", [lambda source: source, bilevel.with_rng], ids=["plain", "with_rng"])
def test_a_lifted_problem_refuses_sampled_sources(where, wrap):
    # Their rows would be the folds: which fold meets which params would change from step to step.
    def drop_key(loss):
        return lambda w, h, batch: loss(w, h, batch[0] if isinstance(batch[0], tuple) else batch)

    problem = bilevel.lift(bilevel.Problem(drop_key(RIDGE.inner), drop_key(RIDGE.outer)))
    data = dict(zip(("train", "valid"), folds(), strict=True))
    data[where] = wrap(bilevel.minibatches(data[where], 4))
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.3), OUTER)
    args = problem, np.zeros((4, 20)), np.float64(-3.0)
    words = f"{where}.*sampled.*bilevel.lift.*whole arrays.*bilevel.stacked"
    with pytest.raises(ValueError, match=words):
        method.init(*args, data["train"], data["valid"], key=KEY)
    with pytest.raises(ValueError, match=words):
        run(*args, data["train"], data["valid"], method, 2)
    with pytest.raises(ValueError, match=words):
        bilevel.hypergradient(problem)(*args[1:], data["train"], data["valid"])
    # Of another number than there are folds, they do not even fit.
    data[where] = wrap(bilevel.minibatches(folds()[where == "valid"], 2))
    with pytest.raises(ValueError, match="params have 4 members.*a batch has 2.*minibatches would draw"):
        run(*args, data["train"], data["valid"], method, 2)


def test_each_member_of_a_lifted_problem_has_a_key_of_its_own():
    def noisy(w, h, batch):
        data, key = batch
        return 0.5 * (w - h * data * jax.random.normal(key)) ** 2

    def drawn(hparams, batch, key):
        data, own = batch
        return hparams * data * (jax.random.normal(key) + jax.random.normal(own))

    problem = bilevel.lift(bilevel.Problem(noisy, lambda w, h, batch: w**2, start=drawn))
    train, valid, h = jnp.ones(3), jnp.ones(3), jnp.float64(2.0)
    batch, keys = (train, KEY), jax.random.split(KEY, 3)
    inner = jax.jit(jax.grad(problem.inner))(jnp.zeros(3), h, batch)
    np.testing.assert_allclose(inner, -2.0 * jax.vmap(jax.random.normal)(keys), rtol=1e-12)
    start = jax.jit(problem.start)(h, batch, jax.random.key(1))
    assert np.unique(np.round(inner, 6)).size == np.unique(np.round(start, 6)).size == 3
    estimate = at(problem, bilevel.unrolled(optax.sgd(0.1), 2), None, h, bilevel.with_rng(train), valid)
    assert np.isfinite(estimate.grad)
    twice = bilevel.lift(bilevel.lift(bilevel.Problem(noisy, lambda w, h, batch: w**2)))
    both = jax.grad(twice.inner)(jnp.zeros((2, 3)), h, (jnp.ones((2, 3)), KEY))
    assert np.unique(np.round(both, 6)).size == 6


@pytest.mark.parametrize("estimator", [bilevel.implicit(), bilevel.unrolled(optax.sgd(0.1), 5)])
def test_examples_are_counted_over_all_members(estimator):
    (a, b), (v, c) = folds()
    fn = jax.jit(bilevel.hypergradient(bilevel.lift(RIDGE), estimator))
    counts = fn(np.zeros((4, 20)), np.float64(-3.0), (a, b), (v, c)).counts
    assert counts.outer_grad == 40
    assert counts.cross == 120 * (5 if estimator.trajectory else 1)
    nested = jax.jit(bilevel.hypergradient(bilevel.lift(bilevel.lift(RIDGE)), estimator))
    more = jax.tree.map(lambda x: np.stack([x, x]), ((a, b), (v, c)))
    doubled = nested(np.zeros((2, 4, 20)), np.float64(-3.0), *more).counts
    assert (doubled.outer_grad, doubled.cross) == (2 * counts.outer_grad, 2 * counts.cross)
    if not estimator.trajectory:
        method = bilevel.alternating(estimator, optax.sgd(0.1), OUTER, inner_steps=3)
        result = run(bilevel.lift(RIDGE), np.zeros((4, 20)), np.float64(-3.0), (a, b), (v, c), method, 1)
        assert result.history["inner_grad"][0] == 3 * 120


def test_lifted_shapes_that_do_not_fit():
    train, valid = folds()
    for params, words in (
        (np.zeros((3, 20)), "inner"),
        (np.zeros(20), "inner"),
        (np.zeros((4, 19)), "inner"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s){words}\(params.*failed on what it was given.*params = float64"
        ):
            bilevel.hypergradient(bilevel.lift(RIDGE))(params, np.float64(0.0), train, valid)


# --- Composite losses --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Columns:
    """A linear solver that makes the whole matrix, solves with it, and hands it on as its state."""

    def init(self, params):
        flat = ravel_pytree(params)[0]
        return jnp.zeros((flat.size, flat.size))

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        flat, unravel = ravel_pytree(b)
        matrix = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size)).T
        return (
            unravel(jnp.linalg.solve(matrix, flat)),
            matrix,
            SolveInfo(jnp.float64(0), jnp.int32(0), jnp.int32(0), jnp.bool_(False)),
        )


def curvature(problem, kind, params, h, train, valid):
    """The estimate, and the matrix that it solved with."""
    estimator = bilevel.implicit(Columns(), curvature=kind)
    point = Point(jax.tree.map(jnp.asarray, params))
    draw = Draw(lambda j: train, 1, False)
    estimate, matrix = jax.jit(
        lambda point, h: estimator.estimate(
            problem, estimator.init(problem, point, h), point, h, draw, valid, KEY
        )
    )(point, jax.tree.map(jnp.asarray, h))
    return estimate, np.asarray(matrix)


def squares(outputs, h, batch):
    del h
    return jnp.mean((outputs - batch[1]) ** 2)


def decay(params, h):
    return 0.5 * sum(jnp.exp(h[name]) * jnp.sum(params[name] ** 2) for name in ("in", "out"))


COMPOSITE = bilevel.composite(lambda params, h, batch: network(params, batch[0]), squares, decay)


def test_a_composite_loss_is_the_loss_that_it_composes():
    params, h, train, _ = network_data()
    np.testing.assert_allclose(COMPOSITE(params, h, train), NETWORK.inner(params, h, train), rtol=1e-12)
    bare = bilevel.composite(COMPOSITE.predict, COMPOSITE.loss)
    np.testing.assert_allclose(
        bare(params, h, train) + decay(params, h), COMPOSITE(params, h, train), rtol=1e-12
    )
    assert bilevel.composite(COMPOSITE.predict, squares, decay) == COMPOSITE


def test_gauss_newton_is_the_hessian_where_outputs_are_linear():
    linear = bilevel.composite(
        lambda w, h, batch: batch[0] @ w,
        lambda outputs, h, batch: jnp.mean(jax.nn.softplus(-batch[1] * outputs)),
        lambda w, h: 0.5 * jnp.exp(h) * jnp.sum(w**2),
    )
    problem = bilevel.Problem(linear, lambda w, h, batch: logistic(w, batch))
    rng = np.random.default_rng(3)
    train, valid = ((rng.standard_normal((n, 4)), np.sign(rng.standard_normal(n))) for n in (30, 20))
    args = problem, rng.standard_normal(4), np.float64(-1.0), train, valid
    newton, hessian = (curvature(args[0], kind, *args[1:]) for kind in ("gauss_newton", "hessian"))
    np.testing.assert_allclose(newton[1], hessian[1], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(newton[0].grad, hessian[0].grad, rtol=1e-10)


def test_gauss_newton_is_positive_where_the_hessian_is_not():
    params, h, train, valid = network_data()
    problem = bilevel.Problem(COMPOSITE, NETWORK.outer)
    estimate, matrix = curvature(problem, "gauss_newton", params, h, train, valid)
    _, hessian = curvature(problem, "hessian", params, h, train, valid)
    assert np.linalg.eigvalsh(hessian)[0] < -0.01
    assert np.linalg.eigvalsh(matrix)[0] >= np.exp(-3.0) - 1e-12  # of the penalty

    # J^T (2/n) J and the penalty's diagonal, by differences of the outputs
    flat, unravel = ravel_pytree(params)
    outputs = lambda flat: np.asarray(network(unravel(flat), train[0]))  # noqa: E731
    size, n = flat.size, len(train[1])
    jacobian = np.stack(
        [central_difference(outputs, np.asarray(flat), e, 1e-3) for e in np.eye(size)], axis=1
    )
    expected = 2 / n * jacobian.T @ jacobian + np.diag(np.exp([-3.0] * 12 + [-2.0] * 4))
    np.testing.assert_allclose(matrix, expected, atol=1e-9)

    residual = np.asarray(network(params, valid[0])) - valid[1]
    valid_outputs = lambda flat: np.asarray(network(unravel(flat), valid[0]))  # noqa: E731
    jacobian = np.stack(
        [central_difference(valid_outputs, np.asarray(flat), e, 1e-3) for e in np.eye(size)], 1
    )
    v = np.linalg.solve(expected, 2 / len(residual) * jacobian.T @ residual)
    cross = np.exp([-3.0] * 12 + [-2.0] * 4) * np.asarray(flat) * v
    grad = {"in": -cross[:12].sum(), "out": -cross[12:].sum()}
    for name, value in grad.items():
        assert abs(float(estimate.grad[name]) - value) <= 1e-8 * abs(value) + 1e-9
    assert float(estimate.error) <= 1e-12
    by_cg = at(problem, bilevel.implicit(bilevel.cg(tol=1e-12), "gauss_newton"), params, h, train, valid)
    np.testing.assert_allclose(by_cg.grad["in"], estimate.grad["in"], rtol=1e-9)


def test_a_lifted_composite_is_a_composite():
    params, h, train, valid = network_data()
    problem = bilevel.lift(bilevel.Problem(COMPOSITE, NETWORK.outer))
    assert isinstance(problem.inner, Composite)
    pair = lambda tree: jax.tree.map(lambda x: np.stack([x, 0.9 * x]), tree)  # noqa: E731
    estimator = bilevel.implicit(bilevel.dense(), "gauss_newton")
    lifted = at(problem, estimator, pair(params), h, pair(train), pair(valid))
    single = bilevel.Problem(COMPOSITE, NETWORK.outer)
    scaled = [jax.tree.map(lambda x, s=s: s * x, (params, train, valid)) for s in (1.0, 0.9)]
    alone = [at(single, estimator, p, h, t, v) for p, t, v in scaled]
    for name in ("in", "out"):
        expected = np.mean([estimate.grad[name] for estimate in alone])
        np.testing.assert_allclose(lifted.grad[name], expected, rtol=1e-9)


def test_gauss_newton_needs_a_composite_loss():
    estimator = bilevel.implicit(curvature="gauss_newton")
    args = np.zeros(20), np.float64(0.0), ridge().train, ridge().valid
    for call in (
        lambda: bilevel.hypergradient(RIDGE, estimator)(*args),
        lambda: run(RIDGE, *args, bilevel.alternating(estimator, optax.sgd(0.1), OUTER), 2),
        lambda: bilevel.hypergradient(bilevel.FixedPoint(RIDGE.outer, RIDGE.outer), estimator)(*args),
    ):
        with pytest.raises((TypeError, ValueError), match="bilevel.composite|update must return"):
            call()


# --- Weights that sum to one -------------------------------------------------------------------------------


def test_simplex_round_trip():
    h = {"mix": jnp.array([[0.1, 0.2], [0.3, 0.4]]), "l2": jnp.float64(2.0)}
    bound = bind({"mix": bilevel.simplex()}, h)
    free = bound.to_free(h)
    assert abs(float(free["mix"].sum())) <= 1e-14
    back = bound.to_natural(free)
    np.testing.assert_allclose(back["mix"], h["mix"], rtol=1e-14)
    assert back["l2"] == 2.0
    far = bound.to_natural({"mix": jnp.array([[0.0, -800.0], [800.0, 1.0]]), "l2": free["l2"]})["mix"]
    assert float(far.min()) > 0
    assert float(far.sum()) == 1.0
    moved = bound.project({"mix": free["mix"] + 3.0, "l2": free["l2"]}, free)
    np.testing.assert_allclose(moved["mix"], free["mix"], atol=1e-14)  # the mean says nothing
    # A gradient along (1, ..., 1) cannot be followed.
    grad = {"mix": jnp.full((2, 2), 5.0), "l2": jnp.float64(0.0)}
    assert float(bound.grad_norm(free, grad)) <= 1e-14


def test_optimize_over_a_simplex():
    rng = np.random.default_rng(2)
    root = rng.standard_normal((4, 4))
    q, target = root @ root.T + np.eye(4), np.array([0.5, 0.3, 0.3, 0.4])
    ones = np.linalg.solve(q, np.ones(4))
    solution = target - ones * (target.sum() - 1) / ones.sum()
    assert solution.min() > 0.05
    problem = bilevel.Problem(
        lambda w, h, batch: 0.5 * jnp.sum((w - h["mix"]) ** 2),
        lambda w, h, batch: 0.5 * jnp.vdot(w - target, q @ (w - target)),
        constraints={"mix": bilevel.simplex()},
    )
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(1.0), optax.sgd(0.5), inner_steps=1)
    start = {"mix": np.full(4, 0.25)}
    result = run(problem, np.zeros(4), start, np.zeros(1), np.zeros(1), method, 1000, tol=1e-9)
    assert result.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(result.hparams["mix"], solution, atol=1e-7)
    np.testing.assert_allclose(result.trajectory.hparams["mix"].sum(1), 1.0, rtol=1e-12)


# --- Batches by strata, and fixed ones ---------------------------------------------------------------------


def epoch(source, number, key=KEY):
    """Row numbers of an epoch's batches, a row for each batch."""
    first = number * source.num_batches
    return np.stack([np.asarray(source.index(key, first + t)) for t in range(source.num_batches)])


@pytest.mark.parametrize(("rows", "size", "strata"), [(24, 6, 3), (26, 4, 2), (1201, 12, 4)])
def test_strata_take_equal_shares(rows, size, strata):
    source = bilevel.minibatches(np.arange(float(rows)), size, strata=strata)
    block = rows // strata
    for number in (0, 3):
        index = epoch(source, number)
        counts = [np.bincount(batch // block, minlength=strata) for batch in index]
        np.testing.assert_array_equal(counts, np.full((len(index), strata), size // strata))
        flat = np.sort(index.ravel())
        assert len(set(flat.tolist())) == len(flat)
        assert len(flat) == source.num_batches * size
        if block % (size // strata) == 0:
            np.testing.assert_array_equal(flat, np.arange(block * strata))
        at_once = np.asarray(source.batch(KEY, number * source.num_batches + 1))
        np.testing.assert_array_equal(at_once, index[1])
    assert not np.array_equal(epoch(source, 0), epoch(source, 1))


@pytest.mark.parametrize("strata", [1, 3])
def test_fixed_batches_come_back_in_other_orders(strata):
    source = bilevel.minibatches(np.arange(24.0), 3, strata=strata, fixed=True)
    epochs = [[tuple(sorted(batch.tolist())) for batch in epoch(source, number)] for number in range(4)]
    assert {frozenset(batches) for batches in epochs} == {frozenset(epochs[0])}
    assert sorted(i for batch in epochs[0] for i in batch) == list(range(24))
    assert len({tuple(batches) for batches in epochs}) == 4
    other = epoch(source, 0, jax.random.key(1))
    assert {tuple(sorted(batch.tolist())) for batch in other} != set(epochs[0])


def test_strata_do_not_depend_on_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(ridge().train, NamedSharding(mesh, PartitionSpec("data")))
    method = bilevel.alternating(
        bilevel.implicit(bilevel.neumann(5, 0.3)), optax.sgd(0.1), OUTER, inner_steps=3
    )
    alone, many = (
        run(
            RIDGE,
            np.zeros(20),
            np.float64(0.0),
            bilevel.minibatches(train, 8, strata=4),
            ridge().valid,
            method,
            6,
        )
        for train in (ridge().train, spread)
    )
    np.testing.assert_allclose(many.history["value"], alone.history["value"], rtol=1e-10)
    np.testing.assert_allclose(many.hparams, alone.hparams, rtol=1e-10)


# --- Episodes ----------------------------------------------------------------------------------------------


def pull(w, h, batch):
    return 0.5 * (w - h * batch) ** 2


EPISODIC = bilevel.Problem(pull, lambda w, h, batch: (0.5 * (w - batch) ** 2, {"seen": batch}))
PULL = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.5), optax.sgd(0.01), inner_steps=3)
PAIRS = [(float(i), 10.0 + i) for i in range(20)]


@pytest.mark.parametrize("kind", [list, tuple, iter], ids=lambda kind: kind.__name__)
def test_episodes_are_pairs_in_order(kind):
    result = run(EPISODIC, np.float64(0.0), np.float64(0.5), bilevel.episodes(kind(PAIRS)), None, PULL, 50)
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    assert "20" in result.message
    np.testing.assert_array_equal(result.history["seen"], [valid for _, valid in PAIRS])
    w, h = 0.0, 0.5
    for step, (train, valid) in enumerate(PAIRS):
        w = h * train + (w - h * train) / 8  # the whole pair at each of three steps
        assert abs(result.history["value"][step] - 0.5 * (w - valid) ** 2) <= 1e-10
        h = h - 0.01 * (w - valid) * train * 7 / 8
    assert abs(float(result.hparams) - h) <= 1e-12


def test_episodes_stop_with_the_budget():
    pairs = iter(PAIRS)
    result = run(EPISODIC, np.float64(0.0), np.float64(0.5), bilevel.episodes(pairs), None, PULL, 4)
    assert result.status == bilevel.Status.BUDGET
    np.testing.assert_array_equal(result.history["seen"], [10.0, 11.0, 12.0, 13.0])
