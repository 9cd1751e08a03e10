"""Constants of common problems, and estimated ones: never too small where known, and not far too large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import RIDGE, RIDGE_LOG_L2, ridge

import bilevel
from benchmarks import certificates as study
from bilevel.problem import CERTIFIED, ESTIMATED
from bilevel.row_norms import row_norms

R = ridge()
KEY = jax.random.key(0)
REFERENCE = bilevel.ridge_smoothness(R.a, R.v, jnp.exp)


def at(constant, hparams):
    return float(constant(hparams)) if callable(constant) else constant


# --- Closed forms -----------------------------------------------------------------------------------------


def test_the_reference_ridge():
    assert REFERENCE.outer == pytest.approx(1.688395, abs=1e-6)
    assert at(REFERENCE.strong_convexity, RIDGE_LOG_L2) == pytest.approx(0.122907, abs=1e-6)
    assert at(REFERENCE.inner, RIDGE_LOG_L2) == pytest.approx(2.594711, abs=1e-6)
    assert at(REFERENCE.cross, RIDGE_LOG_L2) == pytest.approx(np.exp(RIDGE_LOG_L2), rel=1e-12)
    assert (REFERENCE.inverse_hessian, REFERENCE.direct, REFERENCE.estimated) == (0.0, None, False)


def test_fewer_rows_than_features_leave_the_penalty():
    smooth = bilevel.ridge_smoothness(R.a[:7], R.v, lambda h: h["l2"])
    assert at(smooth.strong_convexity, {"l2": np.float64(0.3)}) == 0.3
    largest = np.linalg.eigvalsh(R.a[:7].T @ R.a[:7] / 7)[-1]
    assert at(smooth.inner, {"l2": np.float64(0.3)}) == pytest.approx(largest + 0.3, rel=1e-12)


@pytest.mark.parametrize("classes", [None, 2, 4])
def test_the_bound_of_the_third_derivative_is_met(classes):
    # One row of one feature: the Hessian changes fastest where two classes have odds of 2 + sqrt(3).
    smooth = bilevel.logistic_smoothness(np.ones((1, 1)), np.ones((1, 1)), jnp.exp, classes)
    third = smooth.inverse_hessian.third
    if classes is None:
        assert third == pytest.approx(1 / (6 * np.sqrt(3)), rel=1e-12)
        step, loss = np.array([1e-4]), jax.nn.softplus
        z = np.array([np.log(2 + np.sqrt(3))])
        hessian = jax.hessian(lambda z: jnp.sum(loss(z)))
    else:
        assert third == pytest.approx(np.sqrt(6) / 9, rel=1e-12)
        far = [-60.0] * (classes - 2)
        z = np.array([np.log(2 + np.sqrt(3)), 0.0, *far])
        step = 1e-4 * np.array([1.0, -1.0, *(0 * x for x in far)]) / np.sqrt(2)
        hessian = jax.hessian(jax.nn.logsumexp)
    change = np.linalg.norm(hessian(z + step) - hessian(z - step), 2) / (2 * np.linalg.norm(step))
    assert 0.999 * third <= change <= third * (1 + 1e-6)


def test_no_softmax_has_a_larger_third_derivative():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4000, 5))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    p = rng.dirichlet(np.full(5, 0.3), 4000)
    centred = values - np.sum(p * values, axis=1, keepdims=True)
    moments = np.abs(np.sum(p * centred**3, axis=1))
    assert 0.7 * np.sqrt(6) / 9 <= moments.max() <= np.sqrt(6) / 9


# --- Against pairs of points ------------------------------------------------------------------------------


def quotients(problem, smooth, hparams, train, valid, shape, radius, seed, pairs=200):
    """The largest quotient of each inequality over pairs of params, as a share of its constant.

    "third" is that of the Hessian itself. Directions are random, unit vectors, and eigenvectors of the
    Hessian; half the pairs lie close together.
    """
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    to_h, unravel_h = ravel_pytree(hparams)

    def inner(w, h):
        return problem.inner(w.reshape(shape), unravel_h(h), train)

    def outer(w):
        return problem.outer(w.reshape(shape), hparams, valid)

    @jax.jit
    def every(w):
        hessians = jax.hessian(inner)(w, to_h), jax.hessian(outer)(w)
        slopes = jax.grad(inner)(w, to_h), jax.grad(outer)(w)
        return *slopes, jax.jacobian(jax.grad(inner), argnums=1)(w, to_h), *hessians

    best = dict.fromkeys(("strong_convexity", "inner", "outer", "cross", "inverse_hessian"), 0.0)
    known = {name: at(getattr(smooth, name), hparams) for name in best}
    best["third"] = 0.0
    for i in range(pairs):
        w = rng.uniform(0, radius) * rng.standard_normal(size) / np.sqrt(size)
        g0, o0, j0, h0, outer_h = map(np.asarray, every(w))
        stiff, eigenvectors = np.linalg.eigh(outer_h)[1][:, -1], np.linalg.eigh(h0)[1]
        kinds = rng.standard_normal(size), np.eye(size)[i // 5 % size], *eigenvectors.T[[0, -1]], stiff
        d = kinds[i % len(kinds)]
        step = (1e-3 if i % 2 else radius) * d / np.linalg.norm(d)
        g1, o1, j1, h1, _ = map(np.asarray, every(w + step))
        length = np.linalg.norm(step)
        found = {
            "strong_convexity": known["strong_convexity"] * length**2 / np.vdot(g1 - g0, step),
            "inner": np.linalg.norm(g1 - g0) / length / known["inner"],
            "outer": np.linalg.norm(o1 - o0) / length / known["outer"],
            "cross": np.linalg.norm(j1 - j0, 2) / length / known["cross"],
        }
        if smooth.inverse_hessian:
            change = np.linalg.norm(np.linalg.inv(h1) - np.linalg.inv(h0), 2) / length
            found["third"] = np.linalg.norm(h1 - h0, 2) / length / smooth.inverse_hessian.third
            found["inverse_hessian"] = change / known["inverse_hessian"]
        best = {name: max(share, found.get(name, 0.0)) for name, share in best.items()}
    return best


RIDGE_STRENGTHS = {
    "scalar": (jnp.exp, np.float64(-2.0), 1.0),
    "per feature": (jnp.exp, np.linspace(-4.0, 0.0, 20), 0.15),
    "dict": (
        lambda h: h["scale"] * h["l2"],
        {"l2": np.linspace(0.1, 0.5, 20), "scale": np.float64(2.0)},
        0.45,
    ),
    "mixed": (lambda h: jnp.exp(jnp.cumsum(h)), np.full(20, -0.1), 0.15),
}


@pytest.mark.parametrize(
    ("strength", "hparams", "tight"), RIDGE_STRENGTHS.values(), ids=RIDGE_STRENGTHS.keys()
)
def test_ridge_constants_hold(strength, hparams, tight):
    smooth = bilevel.ridge_smoothness(R.a, R.v, strength)
    problem = bilevel.Problem(
        lambda w, h, b: study.squares(w, h, b) + 0.5 * jnp.sum(strength(h) * w**2), study.squares
    )
    shares = quotients(problem, smooth, hparams, R.train, R.valid, (20,), 2.0, seed=0)
    assert max(shares.values()) <= 1 + 1e-9
    assert shares["cross"] >= 1 - 1e-9  # the smallest constant that there is
    assert min(shares["outer"], shares["inner"]) >= 0.7
    assert shares["outer"] >= 1 - 1e-9
    assert shares["strong_convexity"] >= tight * (1 - 1e-9)


@pytest.mark.parametrize("classes", [None, 3], ids=["sigmoid", "softmax"])
def test_logistic_constants_hold(classes):
    instance = study.logistic(np.random.default_rng(1), classes)
    problem, shape = instance.problem, instance.params.shape
    hparams = np.random.default_rng(2).uniform(-3, -1, shape)
    shares = quotients(
        problem, problem.smoothness, hparams, instance.train, instance.valid, shape, 1.0, seed=3
    )
    assert max(shares.values()) <= 1 + 1e-9
    assert shares["cross"] >= 1 - 1e-9
    assert min(shares["inner"], shares["outer"]) >= 0.6
    assert shares["strong_convexity"] >= 0.3
    assert shares["third"] >= 0.1
    assert shares["inverse_hessian"] >= 0.003  # mu is not where the Hessian changes most


def test_other_outer_losses():
    squares = bilevel.logistic_smoothness(R.a, R.v, jnp.exp, outer="squares").outer
    assert squares == REFERENCE.outer
    assert bilevel.logistic_smoothness(R.a, R.v, jnp.exp).outer == 0.25 * squares
    assert bilevel.logistic_smoothness(R.a, R.v, jnp.exp, 3).outer == 0.5 * squares
    assert bilevel.ridge_smoothness(R.a, R.v, jnp.exp, outer="softmax").outer == 0.5 * squares


def test_equal_calls_make_equal_constants():
    for make in (bilevel.ridge_smoothness, bilevel.logistic_smoothness):
        again = make(R.a.copy(), R.v, jnp.exp)
        assert again == make(R.a, R.v, jnp.exp)
        assert hash(again) == hash(make(R.a, R.v, jnp.exp))
        assert again != make(2 * R.a, R.v, jnp.exp)


# --- Rows of Jacobians ------------------------------------------------------------------------------------

VECTOR = np.random.default_rng(5).standard_normal(6)
FUNCTIONS = {
    "scalar": (jnp.exp, np.float64(0.3), True),
    "entries": (jax.nn.softplus, VECTOR, True),
    "a column": (lambda h: jnp.exp(h)[:, None], VECTOR, True),
    "branches": (lambda h: jnp.where(h > 0, h, jnp.exp(h)), VECTOR, True),
    "two leaves": (lambda h: h["a"] ** 2 * h["b"], {"a": VECTOR, "b": np.float64(2.0)}, True),
    "flipped": (lambda h: h[::-1] ** 2, VECTOR, False),
    "turned": (lambda h: jnp.exp(h.T), VECTOR.reshape(2, 3), False),
    "mixed": (lambda h: jnp.sin(jnp.cumsum(h)), VECTOR, False),
    "a sum": (lambda h: jnp.sum(h**2), VECTOR, False),
    "rows and columns": (lambda h: h["r"][:, None] * h["c"][None, :], {"r": VECTOR, "c": VECTOR[:2]}, False),
    "with itself": (lambda h: (h[:, None] * h[None, :]) ** 3, VECTOR, False),
    "with its column": (lambda h: h[:, None] - 0.5 * h[None, :], VECTOR, False),
    "unused": (lambda h: h["a"], {"a": VECTOR, "b": VECTOR}, True),
}


@pytest.mark.parametrize(("fn", "hparams", "at_once"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_row_norms_are_those_of_the_jacobian(fn, hparams, at_once):
    hparams = jax.tree.map(jnp.asarray, hparams)
    blocks = jax.tree.leaves(jax.jacobian(lambda h: jnp.ravel(fn(h)))(hparams))
    rows = blocks[0].shape[0]
    expected = np.sqrt(sum(np.sum(np.reshape(block, (rows, -1)) ** 2, axis=1) for block in blocks))
    np.testing.assert_allclose(jax.jit(lambda h: row_norms(fn, h))(hparams), expected, rtol=1e-12)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), hparams)
    np.testing.assert_allclose(jax.vmap(lambda h: row_norms(fn, h))(pair)[1], expected, rtol=1e-12)
    program = str(jax.make_jaxpr(lambda h: row_norms(fn, h))(hparams))
    assert at_once == ("while" not in program and "scan" not in program)


def test_a_jacobian_of_many_strengths_is_never_formed():
    size = 1440

    for fn in (jnp.exp, lambda h: jnp.exp(jnp.cumsum(h))):
        program = str(jax.make_jaxpr(lambda h, fn=fn: row_norms(fn, h))(jnp.zeros(size)))
        assert f"f64[{size}]" in program
        assert f"{size},{size}" not in program


# --- Estimates --------------------------------------------------------------------------------------------


def estimated(problem, params, hparams, train, valid, **settings):
    return bilevel.estimate_smoothness(problem, params, hparams, train, valid, key=KEY, **settings)


@pytest.fixture(scope="module")
def of_ridge():
    h = np.linspace(-4.0, 0.0, 20)
    return h, estimated(RIDGE, jnp.zeros(20), h, R.train, R.valid, samples=4, safety=1.0)


def test_estimates_of_a_quadratic_are_exact(of_ridge):
    h, found = of_ridge
    eigenvalues = np.linalg.eigvalsh(R.hessian(h))
    assert found.strong_convexity == pytest.approx(eigenvalues[0], rel=1e-9)
    assert found.inner == pytest.approx(eigenvalues[-1], rel=1e-9)
    assert found.outer == pytest.approx(REFERENCE.outer, rel=1e-3)
    assert found.cross == pytest.approx(1.0, rel=1e-6)
    assert (found.inverse_hessian, found.direct, found.estimated) == (0.0, 0.0, True)


def test_safety_widens_every_constant(of_ridge):
    h, found = of_ridge
    wide = estimated(RIDGE, jnp.zeros(20), h, R.train, R.valid, samples=4, safety=2.0)
    assert wide.strong_convexity == pytest.approx(found.strong_convexity / 2)
    for name in ("inner", "outer", "cross"):
        assert getattr(wide, name) == pytest.approx(2 * getattr(found, name))


@pytest.mark.parametrize("classes", [None, 3], ids=["sigmoid", "softmax"])
def test_estimates_beside_known_constants(classes):
    instance = study.logistic(np.random.default_rng(1), classes)
    h = np.full(instance.hparams.shape, -2.0)
    data = instance.train, instance.valid
    found = estimated(instance.problem, jnp.asarray(instance.params), h, *data, samples=8, safety=1.0)
    known = instance.problem.smoothness
    for name in ("inner", "outer", "cross", "inverse_hessian"):
        share = getattr(found, name) / at(getattr(known, name), h)
        assert (0.1 if name == "inverse_hessian" else 0.5) <= share <= 1 + 1e-9, name
    assert 1 - 1e-9 <= found.strong_convexity / at(known.strong_convexity, h) <= 2


def test_the_direct_constant_is_estimated():
    # d_hparams outer = (w_0, 3 w_1): it changes fastest along the second.
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * jnp.sum((w - h) ** 2) + 0 * b,
        lambda w, h, b: h[0] * w[0] + 3 * h[1] * w[1] + 0 * b,
    )
    zero = np.float64(0.0)
    found = estimated(problem, np.zeros(2), np.array([0.3, 0.5]), zero, zero, samples=1, safety=1.0)
    assert found.direct == pytest.approx(3.0, rel=1e-9)
    assert (found.outer, found.cross) == (0.0, 0.0)


def test_spread_is_in_free_units():
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * h["l2"] * jnp.sum((w - b) ** 2),
        lambda w, h, b: 0.5 * jnp.sum(w**2) * h["fixed"] + 0 * b,
        constraints={"l2": bilevel.positive(), "fixed": bilevel.fixed()},
    )
    h = {"l2": np.float64(0.5), "fixed": np.float64(2.0)}
    found = estimated(problem, np.ones(3), h, 1.0, 1.0, samples=64, safety=1.0, spread=1.0)
    assert 0.5 * np.exp(-1) <= found.strong_convexity <= 0.5 * np.exp(-0.8)
    assert 0.5 * np.exp(0.8) <= found.inner <= 0.5 * np.exp(1)
    assert found.outer == pytest.approx(2.0)


def test_many_params_take_lanczos():
    x = np.random.default_rng(0).standard_normal((60, 200))
    known = bilevel.ridge_smoothness(x, x, jnp.exp)
    problem = bilevel.Problem(study.penalised(study.squares), study.squares)
    h = np.float64(-5.0)
    # 61 distinct eigenvalues: the method ends before its 64 steps, and goes on from elsewhere.
    args = problem, np.zeros(200), h, (x, x[:, 0]), (x, x[:, 0])
    found = estimated(*args, samples=1, safety=1.0)
    assert found.strong_convexity == pytest.approx(np.exp(-5.0), rel=1e-6)
    assert found.inner == pytest.approx(at(known.inner, h), rel=1e-9)


def test_what_lanczos_does_not_resolve_is_refused():
    scales = np.geomspace(1e-4, 1.0, 200)
    problem = bilevel.Problem(
        lambda w, h, b: 0.5 * jnp.sum((scales * w) ** 2) + h * w[0] + 0 * b, lambda w, h, b: w[0]
    )
    with pytest.raises(ValueError, match=r"so ill-conditioned.*at most .*e-0.*, the largest 1\b"):
        estimated(problem, np.zeros(200), np.float64(0.0), 0.0, 0.0, samples=1)


def test_bounds_of_estimated_constants_are_estimates(of_ridge):
    h, found = of_ridge
    for smooth, kind in ((found, ESTIMATED), (REFERENCE, CERTIFIED)):
        problem = dataclasses.replace(RIDGE, smoothness=smooth)
        estimate = jax.jit(bilevel.hypergradient(problem))(jnp.zeros(20), h, R.train, R.valid)
        assert estimate.error_kind == kind
        assert float(estimate.error) >= np.linalg.norm(estimate.grad - R.hypergradient(h))


# --- The study in small -----------------------------------------------------------------------------------

STUDY = {
    "quadratic": (lambda rng: study.quadratic(rng, uniform=False), 30.0),
    "softmax": (lambda rng: study.logistic(rng, classes=3), 1e4),
}


@pytest.mark.parametrize(("make", "loosest"), STUDY.values(), ids=STUDY.keys())
def test_bounds_hold_exactly_where_the_points_are_placed(make, loosest):
    found, way = study.cases(make(np.random.default_rng(0)), 150, seed=0)
    assert np.all(found.error <= found.bound)
    assert np.all(found.value_error <= found.value_bound)
    assert np.all(found.error > 0)
    assert np.median(found.bound / found.error) <= loosest
    assert found.unsolved.max() <= 1e-12
    assert found.unlike.max() <= 1e-7
    assert np.bincount(way).tolist() == [50, 50, 50]


# --- Errors -----------------------------------------------------------------------------------------------

ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(ONES.astype(int), ONES, jnp.exp), TypeError, "train_features must be floating"),
        (lambda f: f(ONES, np.ones(3), jnp.exp), ValueError, r"valid_features must have .*got \(3,\)"),
        (lambda f: f(np.ones((0, 2)), ONES, jnp.exp), ValueError, r"train_features must have the shape"),
        (lambda f: f(ONES, np.full((1, 2), np.nan), jnp.exp), ValueError, "valid_features must be finite"),
        (lambda f: f(ONES, np.ones((3, 5)), jnp.exp), ValueError, "columns of train_features, 2, got 5"),
        (lambda f: f(ONES, ONES, 0.1), TypeError, r"strength must be a function of hparams.*got 0\.1"),
        (lambda f: f(ONES, ONES, Unhashable()), TypeError, "strength must be hashable"),
        (lambda f: f(ONES, ONES, jnp.exp, outer="hinge"), ValueError, "outer must be one of .*'hinge'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [bilevel.ridge_smoothness, bilevel.logistic_smoothness])
def test_bad_input_is_named(make, call, error, message):
    with pytest.raises(error, match=message):
        call(make)


class Unhashable:
    __hash__ = None

    def __call__(self, hparams):
        return hparams


def test_classes_are_at_least_two():
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        bilevel.logistic_smoothness(ONES, ONES, jnp.exp, 1)


def bowl(curvature=1.0):
    return bilevel.Problem(lambda w, h, b: 0.5 * curvature * w**2 + h * w + 0 * b, lambda w, h, b: w + 0 * b)


@pytest.mark.parametrize(
    ("problem", "settings", "error", "message"),
    [
        (bowl(-1.0), {}, ValueError, "inner is not strongly convex: its Hessian has the eigenvalue -1 at"),
        (bowl(), {"samples": 0}, ValueError, "samples must be at least 1"),
        (bowl(), {"radius": -1.0}, ValueError, "radius must be a finite number of at least 0"),
        (bowl(), {"spread": np.inf}, ValueError, "spread must be a finite number"),
        (bowl(), {"safety": 0.5}, ValueError, "safety must be a finite number of at least 1, got 0.5"),
        (
            bilevel.Problem(lambda w, h, b: jnp.sqrt(w - 1) + h + b, lambda w, h, b: w),
            {}, ValueError, "inner has derivatives that are not finite",
        ),
        (
            bilevel.Problem(lambda w, h, b: 0.5 * w**2 + h * w, lambda w, h, b: jnp.sqrt(w - 1)),
            {}, ValueError, "outer has derivatives that are not finite",
        ),
        (bilevel.FixedPoint(lambda w, h, b: w, lambda w, h, b: w), {}, TypeError, "has no inner loss"),
        (
            bilevel.Problem(lambda w, h, b, s: (w, s), lambda w, h, b, s: w, has_state=True),
            {}, ValueError, "has_state=True",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused(problem, settings, error, message):
    with pytest.raises(error, match=message):
        estimated(problem, np.float64(0.5), np.float64(0.1), 0.0, 0.0, **settings)


def test_estimated_is_a_flag():
    with pytest.raises(TypeError, match="estimated must be True or False"):
        bilevel.Smoothness(1.0, 1.0, 1.0, estimated=1)
