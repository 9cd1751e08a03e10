"""Losses averaged over the devices of a mapped axis: as one device has it, under pmap and shard_map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import bilevel

DEVICES = 4
SGD = optax.sgd(0.3)
RNG = np.random.default_rng(0)
TRAIN = {"x": RNG.standard_normal((64, 5)), "y": RNG.standard_normal(64)}
VALID = {"x": RNG.standard_normal((32, 5)), "y": RNG.standard_normal(32)}
HPARAMS = 0.3 * RNG.standard_normal(5)
PENALTY = np.diag(np.exp(HPARAMS))
SOLUTION = np.linalg.solve(TRAIN["x"].T @ TRAIN["x"] / 64 + PENALTY, TRAIN["x"].T @ TRAIN["y"] / 64)


def error(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def outer(w, h, batch):
    del h
    return error(w, batch), {"mean": jnp.mean(batch["y"]), "rows": jnp.int32(batch["y"].size)}


PROBLEM = bilevel.Problem(lambda w, h, b: error(w, b) + 0.5 * jnp.sum(jnp.exp(h) * w**2), outer)
AVERAGED = bilevel.pmean(PROBLEM, "data")
BARE = bilevel.Problem(
    lambda *args: jax.lax.pmean(PROBLEM.inner(*args), "data"),
    lambda *args: jax.lax.pmean(PROBLEM.outer(*args)[0], "data"),
)
EXACT = bilevel.implicit(bilevel.cg(50, tol=1e-13))
ESTIMATORS = {
    "cg": EXACT,
    "dense": bilevel.implicit(bilevel.dense()),
    "nystrom": bilevel.implicit(bilevel.nystrom(5, 1e-10)),
    "neumann": bilevel.implicit(bilevel.neumann(50, 0.3)),
    "unrolled": bilevel.unrolled(SGD, 60),
    "truncated": bilevel.unrolled(SGD, 60, truncate=7, remat=False),
    "forward": bilevel.forward(SGD, 60),
    "one_step": bilevel.one_step(SGD),
}


def split(batch):
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def by_pmap(fn, *args):
    """``fn(*args, train, valid)`` on each device: the results of all, which have to be the same."""
    axes = (*(None for _ in args), 0, 0)
    out = jax.pmap(fn, "data", in_axes=axes)(*args, split(TRAIN), split(VALID))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], out)


def by_shard_map(check_vma):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    data, one = PartitionSpec("data"), PartitionSpec()

    def run(fn, *args):
        specs = (*(one for _ in args), data, data)
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=one, check_vma=check_vma)
        return jax.jit(mapped)(*args, TRAIN, VALID)

    return run


MAPS = {"pmap": by_pmap, "shard_map": by_shard_map(True), "shard_map, unchecked": by_shard_map(False)}
mapped = pytest.mark.parametrize("run", MAPS.values(), ids=MAPS.keys())


def facts(problem, estimator):
    """Of an estimate: what is one number for all devices."""
    fn = bilevel.hypergradient(problem, estimator)

    def found(params, hparams, train, valid):
        estimate = fn(params, hparams, train, valid)
        means = {name: x for name, x in estimate.metrics.items() if name == "mean"}
        return estimate.value, estimate.grad, estimate.params, estimate.error, means

    return found


@mapped
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_every_estimator_agrees_with_one_device(run, estimator):
    start = jnp.zeros(5) if estimator.trajectory else jnp.asarray(SOLUTION)
    args = start, jnp.asarray(HPARAMS)
    expected = facts(PROBLEM, estimator)(*args, TRAIN, VALID)
    got = run(facts(AVERAGED, estimator), *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), got, expected)


@mapped
def test_the_closed_form(run):
    hessian = TRAIN["x"].T @ TRAIN["x"] / 64 + PENALTY
    b = VALID["x"].T @ (VALID["x"] @ SOLUTION - VALID["y"]) / 32
    exact = -np.exp(HPARAMS) * SOLUTION * np.linalg.solve(hessian, b)
    _, grad, *_ = run(facts(AVERAGED, EXACT), jnp.asarray(SOLUTION), jnp.asarray(HPARAMS))
    np.testing.assert_allclose(grad, exact, rtol=1e-11)


COMPOSITE = dataclasses.replace(
    PROBLEM,
    inner=bilevel.composite(
        lambda w, h, b: jnp.tanh(b["x"] @ w) * jnp.exp(0.1 * h[0]),
        lambda out, h, b: 0.5 * jnp.mean((out - b["y"]) ** 2) * jnp.exp(0.1 * h[1]),
        lambda w, h: 0.5 * jnp.sum(jnp.exp(h) * w**2),
    ),
)


@mapped
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_composite_loss_keeps_its_structure(run, curvature):
    estimator = bilevel.implicit(bilevel.cg(50, tol=1e-13), curvature=curvature)
    args = jnp.asarray(SOLUTION), jnp.asarray(HPARAMS)
    expected = facts(COMPOSITE, estimator)(*args, TRAIN, VALID)
    got = run(facts(bilevel.pmean(COMPOSITE, "data"), estimator), *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, expected)


@pytest.mark.parametrize("estimator", [EXACT, ESTIMATORS["unrolled"], ESTIMATORS["forward"]])
def test_a_bare_mean_is_wrong_under_pmap(estimator):
    # The reason why all this exists: should it ever pass, the primitives can go.
    args = jnp.asarray(SOLUTION), jnp.asarray(HPARAMS)
    fn = bilevel.hypergradient(BARE, estimator)
    axes = None, None, 0, 0
    grads = jax.pmap(lambda *a: fn(*a).grad, "data", in_axes=axes)(*args, split(TRAIN), split(VALID))
    exact = bilevel.hypergradient(PROBLEM, estimator)(*args, TRAIN, VALID).grad
    assert np.max(np.abs(np.asarray(grads) - np.asarray(exact)[None])) > 0.01 * np.max(np.abs(exact))


@pytest.mark.parametrize("run", [by_pmap, by_shard_map(False)], ids=["pmap", "shard_map, unchecked"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_argmin_and_its_second_derivatives(run, mode):
    def curvature(problem):
        solve = bilevel.argmin(problem, bilevel.newton(20, atol=1e-13), bilevel.dense())

        def found(hparams, train, valid):
            def loss(h):
                return problem.outer(solve(h, train, init=jnp.zeros(5)), h, valid)[0]

            return loss(hparams), jax.grad(loss)(hparams), mode(jax.grad(loss))(hparams)

        return found

    expected = jax.jit(curvature(PROBLEM))(jnp.asarray(HPARAMS), TRAIN, VALID)
    got = run(curvature(AVERAGED), jnp.asarray(HPARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)


@mapped
@pytest.mark.parametrize("inner", [SGD, bilevel.newton_cg(1, 0.0), bilevel.lbfgs(3, atol=0.0)])
def test_steps_of_a_method(run, inner):
    method = bilevel.alternating(EXACT, inner, optax.adam(0.1))

    def steps(problem):
        def found(params, hparams, train, valid):
            state = method.init(problem, params, hparams, train, valid, key=jax.random.key(0))
            for _ in range(3):
                state, info = method.step(problem, state, train, valid)
            return state.params, state.hparams, info.value, info.grad_norm

        return found

    args = jnp.zeros(5), jnp.asarray(HPARAMS)
    expected = steps(PROBLEM)(*args, TRAIN, VALID)
    got = run(steps(AVERAGED), *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, expected)


@mapped
def test_vmap_over_hyperparameters_inside(run):
    many = jnp.stack([HPARAMS, HPARAMS + 0.1, HPARAMS - 0.2])
    fn = facts(AVERAGED, EXACT)
    grads = run(lambda w, h, t, v: jax.vmap(lambda x: fn(w, x, t, v)[1])(h), jnp.asarray(SOLUTION), many)
    one = facts(PROBLEM, EXACT)
    for grad, h in zip(grads, many, strict=True):
        expected = one(jnp.asarray(SOLUTION), h, TRAIN, VALID)[1]
        np.testing.assert_allclose(grad, expected, rtol=1e-11)


@mapped
def test_model_state_is_averaged(run):
    def inner(w, h, b, state):
        return PROBLEM.inner(w, h, b), 0.5 * state + jnp.mean(b["y"])

    problem = bilevel.Problem(inner, lambda w, h, b, state: outer(w, h, b)[0] + 0 * state, has_state=True)
    args = jnp.zeros(5), jnp.asarray(HPARAMS)

    def found(problem):
        fn = bilevel.hypergradient(problem, ESTIMATORS["unrolled"])

        def run(params, hparams, train, valid):
            estimate = fn(params, hparams, train, valid, model_state=jnp.float64(1.0))
            return estimate.grad, estimate.point.model_state

        return run

    expected = found(problem)(*args, TRAIN, VALID)
    got = run(found(bilevel.pmean(problem, "data")), *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), got, expected)


@pytest.mark.parametrize("fn", [PROBLEM.inner, AVERAGED.inner], ids=["one", "averaged"])
def test_averaged_losses_are_the_same_value_for_equal_problems(fn):
    again = bilevel.pmean(PROBLEM, "data")
    assert again == AVERAGED
    assert hash(again) == hash(AVERAGED)
    assert dataclasses.replace(again, inner=fn).inner == fn


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bilevel.pmean(lambda w, h, b: 0.0, "data"), TypeError, "problem must be a problem"),
        (lambda: bilevel.pmean(PROBLEM, 0), TypeError, "axis_name must be the name of a mapped axis, got 0"),
        (
            lambda: bilevel.pmean(bilevel.FixedPoint(lambda w, h, b: w, lambda w, h, b: 0.0), "data"),
            TypeError,
            "the mean over devices of a map is not the map",
        ),
        (
            lambda: bilevel.hypergradient(AVERAGED)(SOLUTION, HPARAMS, TRAIN, VALID),
            ValueError,
            'bilevel.pmean: no axis "data" is mapped here',
        ),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call()
