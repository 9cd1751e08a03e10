"""Members of a lifted problem: solved one by one, and drawn by ISGD."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status
from bilevel.problem import Draw, Point

MEMBERS, SIZE = 6, 5
RNG = np.random.default_rng(0)
CLEAN, NOISE = RNG.standard_normal((2, MEMBERS, SIZE))
TARGETS = CLEAN + NOISE
# The condition numbers of the members' inner problems, at h = 0: from 2 to 200.
SCALES = np.geomspace(1.0, 199.0, MEMBERS)[:, None] * np.linspace(0.0, 1.0, SIZE)
TRAIN, VALID = {"y": TARGETS, "scale": SCALES}, CLEAN
ZEROS = np.zeros((MEMBERS, SIZE))


def inner(w, h, batch):
    return 0.5 * jnp.sum((1 + batch["scale"]) * (w - batch["y"]) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2)


def outer(w, h, clean):
    return 0.5 * jnp.sum((w - clean) ** 2)


SINGLE = bilevel.Problem(inner, outer)
LIFTED = dataclasses.replace(
    bilevel.lift(SINGLE),
    smoothness=bilevel.Smoothness(
        lambda h: 1 + jnp.exp(h), lambda h: 200 + jnp.exp(h), 1 / MEMBERS, cross=jnp.exp
    ),
)
SOLVER = bilevel.accelerated(5000)


def solution(h):
    weight = 1 + SCALES
    return weight * TARGETS / (weight + np.exp(h))


def gradient(h):
    """Of the mean outer loss by h."""
    weight = 1 + SCALES
    w = solution(h)
    return np.sum((w - CLEAN) * -w * np.exp(h) / (weight + np.exp(h))) / MEMBERS


def solve(solver, atol=1e-8, problem=LIFTED, train=TRAIN, h=0.3, start=ZEROS):
    point = Point(jnp.asarray(start))
    state = solver.init(problem, point, h)

    def run(h):
        draw = Draw(lambda j: train, 1, False)
        return solver.solve(problem, state, point, h, draw, jax.random.key(0), atol=atol)

    return jax.jit(run)(jax.tree.map(jnp.asarray, h))


@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_each_is_solved_to_its_share_of_the_tolerance(at_once):
    point, _, info = solve(bilevel.memberwise(SOLVER, at_once))
    np.testing.assert_allclose(point.params, solution(0.3), atol=1e-8)
    assert info.residual <= 1e-8
    grad = jax.grad(LIFTED.inner)(point.params, 0.3, TRAIN)
    np.testing.assert_allclose(info.residual, np.linalg.norm(grad), rtol=1e-6)


def test_easy_members_stop_early():
    together = solve(SOLVER)[2]
    one_by_one = solve(bilevel.memberwise(SOLVER))[2]
    alone = []
    for i in range(MEMBERS):
        batch = jax.tree.map(lambda x, i=i: x[i], TRAIN)
        point = Point(jnp.zeros(SIZE))
        draw = Draw(lambda j, batch=batch: batch, 1, False)
        atol = 1e-8 / np.sqrt(MEMBERS)
        alone.append(SOLVER.solve(SINGLE, (), point, 0.3, draw, jax.random.key(0), atol=atol)[2])
    assert one_by_one.steps == max(int(info.steps) for info in alone)
    np.testing.assert_allclose(one_by_one.products, np.mean([int(info.products) for info in alone]))
    assert one_by_one.products < 0.7 * together.products


def test_methods_take_it_and_end_where_they_did():
    settings = {"tol": 1e-6, "judge_every": 1, "progress": False}
    start = np.zeros((MEMBERS, SIZE)), np.array(0.0)
    plain = bilevel.optimize(LIFTED, *start, TRAIN, VALID, bilevel.maid(), 100, **settings)
    method = bilevel.maid(inner=bilevel.memberwise(SOLVER))
    apart = bilevel.optimize(LIFTED, *start, TRAIN, VALID, method, 100, **settings)
    assert plain.status == apart.status == Status.CONVERGED
    np.testing.assert_allclose(apart.hparams, plain.hparams, atol=1e-4)
    assert abs(gradient(float(apart.hparams))) <= 1e-6
    assert apart.counts["inner_grad"] < plain.counts["inner_grad"]


def test_problems_of_pictures_are_solved_one_by_one_and_drawn():
    clean = np.zeros((3, 6, 6))
    clean[:, 2:4, 2:4] = [[[0.5]], [[1.0]], [[2.0]]]
    noisy = clean + 0.1 * np.random.default_rng(0).standard_normal(clean.shape)
    train, problem = {"noisy": noisy, "clean": clean}, bilevel.imaging.tv_denoising(3)
    hparams = {"strength": np.array(0.1), "smoothing": np.array(0.1)}
    point, _, _ = solve(bilevel.memberwise(SOLVER), 1e-8, problem, train, hparams, noisy)
    residual = jax.grad(problem.inner)(point.params, hparams, train)
    assert jnp.linalg.norm(residual) <= 1e-8 * np.sqrt(3)

    step, start = 1e-3, {"params": noisy, "hparams": hparams, "train": train, "valid": train}
    method = bilevel.isgd(optax.sgd(step), 3, accuracy=1e-10, decay=0.0)
    moved = run(method, 1, problem, **start).hparams
    expected = bilevel.hypergradient(problem, bilevel.implicit())(point.params, hparams, train, train).grad
    for name, h in hparams.items():  # a step in the logarithm
        np.testing.assert_allclose(np.log(moved[name] / h), -step * h * expected[name], rtol=1e-5)
    method = bilevel.isgd(optax.sgd(step), 2, accuracy=1e-4)
    result = run(method, 30, problem, **start)
    assert result.history["value"][-1] < result.history["value"][0]


def test_composite_losses_and_keys_of_members():
    composite = bilevel.composite(
        lambda w, h, batch: w, lambda o, h, batch: inner(o, h, batch), lambda w, h: 0.0 * jnp.sum(w)
    )
    problem = bilevel.lift(bilevel.Problem(composite, outer))
    point, _, _ = solve(bilevel.memberwise(SOLVER), problem=problem)
    np.testing.assert_allclose(point.params, solution(0.3), atol=1e-7)

    def noisy(w, h, batch):
        return 0.5 * jnp.sum((w - jax.random.normal(batch[1], (SIZE,))) ** 2)

    key = jax.random.key(3)
    train = (TARGETS, key)
    point, _, _ = solve(
        bilevel.memberwise(SOLVER), problem=bilevel.lift(bilevel.Problem(noisy, outer)), train=train
    )
    expected = jax.vmap(lambda k: jax.random.normal(k, (SIZE,)))(jax.random.split(key, MEMBERS))
    np.testing.assert_allclose(point.params, expected, atol=1e-7)


# --- ISGD ------------------------------------------------------------------------------------------------


def isgd(batch_size=2, rate=0.5, **settings):
    return bilevel.isgd(optax.sgd(lambda t: rate / (t + 1) ** 0.6), batch_size, **settings)


def run(method, steps=300, problem=LIFTED, **options):
    arguments = {
        "params": np.zeros((MEMBERS, SIZE)),
        "hparams": np.array(0.0),
        "train": TRAIN,
        "valid": VALID,
    }
    arguments = {**arguments, "progress": False, **options}
    return bilevel.optimize(problem, method=method, steps=steps, **arguments)


def optimum():
    low, high = -5.0, 5.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) < 0 else (low, middle)
    return low


def test_all_members_at_once_are_gradient_descent():
    method = bilevel.isgd(optax.sgd(0.5), MEMBERS, accuracy=1e-10, decay=0.0)
    result = run(method, steps=4)
    h = np.asarray(result.trajectory.hparams)
    np.testing.assert_allclose(np.diff(h), [-0.5 * gradient(x) for x in h[:-1]], rtol=1e-7)


def test_a_batch_is_unbiased():
    """The mean over one pass is the whole gradient, at hyperparameters that stay."""
    method = bilevel.isgd(optax.sgd(1e-14), 2, accuracy=1e-10, decay=0.0)
    h = np.asarray(run(method, steps=3).trajectory.hparams)
    np.testing.assert_allclose((h[3] - h[0]) / -3e-14, gradient(0.0), rtol=1e-2)


def test_it_settles_at_the_optimum_and_judges_all_members():
    result = run(isgd(3, rate=10.0), hparams=np.array(3.0))
    assert abs(float(result.hparams) - optimum()) < 0.1
    due = result.history["judged"][::10]
    assert np.all(np.isfinite(due))
    assert result.best.value == pytest.approx(np.nanmin(np.append(due, result.best.value)))
    accuracy = 0.1 / (np.arange(300) + 1.0) ** 0.5
    np.testing.assert_allclose(result.history["accuracy"], accuracy)


def test_members_outside_of_the_batch_stay():
    method = isgd()
    state = method.init(LIFTED, np.zeros((MEMBERS, SIZE)), np.array(0.0), TRAIN, VALID, key=jax.random.key(1))
    new, info = jax.jit(lambda s: method.step(LIFTED, s, TRAIN, VALID))(state)
    moved = np.any(np.asarray(new.params) != 0, axis=1)
    assert moved.sum() == 2
    distance = np.linalg.norm(np.asarray(new.params) - solution(0.0), axis=1)
    assert np.all(distance[moved] <= info.extra["accuracy"])
    np.testing.assert_array_equal(info.params, new.params)


def test_populations_devices_and_checkpoints_serve_it(tmp_path):
    whole = run(isgd(), 12)
    run(isgd(), 5, checkpoint=tmp_path)
    np.testing.assert_array_equal(run(isgd(), 12, checkpoint=tmp_path).hparams, whole.hparams)
    key = jax.random.key(0)
    many = run(
        isgd(), 12, params=np.zeros((2, MEMBERS, SIZE)), hparams=np.array([0.0, 1.0]),
        population=bilevel.population(2), key=key,
    )  # fmt: skip
    alone = run(isgd(), 12, key=jax.random.fold_in(key, 0))
    np.testing.assert_allclose(many.member(0).hparams, alone.hparams, rtol=1e-9)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    np.testing.assert_allclose(run(isgd(), 12, mesh=mesh).hparams, whole.hparams, rtol=1e-10)


# --- Mistakes --------------------------------------------------------------------------------------------

BAD = {
    "not lifted": (
        lambda: run(
            isgd(), 2, SINGLE, params=np.zeros(SIZE),
            train=jax.tree.map(lambda x: x[0], TRAIN), valid=CLEAN[0],
        ),
        TypeError,
        r"isgd draws members of bilevel.lift",
    ),
    "memberwise, not lifted": (
        lambda: bilevel.memberwise(SOLVER).init(SINGLE, Point(jnp.zeros(SIZE)), 0.0),
        TypeError,
        r"memberwise\(\) solves the members of bilevel.lift",
    ),
    "batch": (lambda: run(isgd(7), 2), ValueError, "batch_size must be at most the number of members, 6"),
    "solver": (lambda: bilevel.memberwise(optax.sgd(0.1)), TypeError, "solver must be an inner solver"),
    "outer": (lambda: bilevel.isgd(0.1, 2), TypeError, "outer must be an optax optimiser"),
    "decay": (lambda: isgd(decay=-1.0), ValueError, "decay must be"),
    "estimator": (lambda: isgd(estimator=bilevel.unrolled()), TypeError, "must be bilevel.implicit"),
    "minibatches": (
        lambda: run(isgd(), 2, train=bilevel.minibatches(TRAIN, 2)),
        ValueError,
        "minibatches would draw members",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
