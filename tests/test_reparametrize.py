"""Problems in other coordinates, and the maps to them: against the old coordinates and closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    NETWORK,
    RIDGE,
    central_difference,
    network,
    network_data,
    ridge,
)

import bilevel
from bilevel import maps, penalties
from bilevel.maps.subspaces import hadamard
from bilevel.problem import Composite
from bilevel.reparametrize import reparametrize
from bilevel.transforms import momentum_reset

RNG = np.random.default_rng(0)
MIX = np.linalg.qr(RNG.standard_normal((20, 20)))[0] * np.linspace(0.5, 2.0, 20)
LOG_L2 = np.linspace(-2.0, 0.0, 20)


@dataclasses.dataclass(frozen=True)
class Bent:
    """Invertible, not linear, and of hparams too."""

    def __call__(self, free, log_l2):
        return MIX @ jnp.sinh(free) * jnp.exp(0.1 * log_l2)

    def inverse(self, params, log_l2):
        return jnp.arcsinh(jnp.linalg.solve(MIX, params * jnp.exp(-0.1 * log_l2)))


BENT = Bent()
TRAIN, VALID = ridge().train, ridge().valid


def gradient(problem, params, hparams=LOG_L2, estimator=None, data=(TRAIN, VALID), **settings):
    estimator = estimator or bilevel.implicit(bilevel.dense())
    fn = jax.jit(functools.partial(bilevel.hypergradient(problem, estimator), **settings))
    return fn(params, hparams, *data)


# --- The problem -------------------------------------------------------------------------------------------


def test_at_the_same_minimiser_the_hypergradient_is_the_same():
    w = ridge().solution(LOG_L2)
    estimate = gradient(reparametrize(RIDGE, BENT), BENT.inverse(w, LOG_L2))
    expected = ridge().hypergradient(LOG_L2)
    np.testing.assert_allclose(estimate.grad, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(estimate.value, ridge().value(LOG_L2), rtol=1e-12)


def test_everywhere_it_is_that_of_the_composed_losses():
    by_hand = bilevel.Problem(
        lambda u, h, batch: RIDGE.inner(BENT(u, h), h, batch),
        lambda u, h, batch: RIDGE.outer(BENT(u, h), h, batch),
    )
    u = 0.1 * RNG.standard_normal(20)
    for estimator in (bilevel.implicit(bilevel.neumann(5, 0.1)), bilevel.forward(optax.sgd(0.1), 5)):
        grads = [gradient(p, u, estimator=estimator).grad for p in (reparametrize(RIDGE, BENT), by_hand)]
        np.testing.assert_allclose(*grads, rtol=1e-12, atol=1e-14)


def test_structure_is_kept():
    inner = bilevel.composite(
        lambda w, h, batch: batch[0] @ w,
        lambda z, h, batch: 0.5 * jnp.mean((z - batch[1]) ** 2),
        lambda w, h: 0.5 * jnp.sum(jnp.exp(h) * w**2),
    )

    def outer(w, h, batch, state):
        return RIDGE.outer(w, h, batch) * state, {"length": jnp.sum(w**2)}

    old = bilevel.Problem(inner, RIDGE.outer, constraints=bilevel.box(-5, 5))
    new = reparametrize(old, BENT)
    assert isinstance(new.inner, Composite)
    assert new.constraints == old.constraints
    assert new == reparametrize(old, BENT)
    assert hash(new) == hash(reparametrize(old, BENT))
    assert repr(reparametrize(RIDGE, BENT)).startswith("Problem(inner=ridge_train of Bent(), outer=")
    # The Gauss-Newton matrix is that of predictions by the new coordinates: J^T A^T A J / n + penalty.
    u = BENT.inverse(ridge().solution(LOG_L2), LOG_L2)
    grad = gradient(new, u, estimator=bilevel.implicit(bilevel.dense(), curvature="gauss_newton")).grad
    jacobian = MIX * np.cosh(u) * np.exp(0.1 * LOG_L2)[:, None]
    penalty = jax.jit(jax.hessian(lambda u: inner.penalty(BENT(u, LOG_L2), LOG_L2)))(u)
    matrix = jacobian.T @ ridge().a.T @ ridge().a @ jacobian / 40 + penalty
    v = np.linalg.solve(matrix, jacobian.T @ ridge().outer_grad(ridge().solution(LOG_L2)))

    def lagrangian(h):
        pulled = jnp.vdot(jax.grad(lambda u: inner(BENT(u, h), h, TRAIN))(u), v)
        return RIDGE.outer(BENT(u, h), h, VALID) - pulled

    np.testing.assert_allclose(grad, jax.jit(jax.grad(lagrangian))(LOG_L2), rtol=1e-9, atol=1e-12)
    with_state = bilevel.Problem(lambda *a: (RIDGE.inner(*a[:3]), a[3] + 1.0), outer, has_state=True)
    stepped = gradient(
        reparametrize(with_state, BENT), u, estimator=bilevel.forward(optax.sgd(0.0), 2), model_state=1.0
    )
    np.testing.assert_allclose(stepped.value, 3 * ridge().value(LOG_L2), rtol=1e-12)
    np.testing.assert_allclose(stepped.metrics["length"], np.sum(ridge().solution(LOG_L2) ** 2), rtol=1e-12)


def test_a_start_and_the_map_of_a_fixed_point_go_through_the_inverse():
    def start(h, batch, key):
        return h * jnp.ones(20)

    def update(w, h, batch):
        return w - 0.3 * jax.grad(RIDGE.inner)(w, h, batch)

    old = bilevel.FixedPoint(update, RIDGE.outer, start=start)
    new = reparametrize(old, BENT)
    unrolled = [gradient(p, None, estimator=bilevel.forward(steps=4)) for p in (old, new)]
    np.testing.assert_allclose(*[e.grad for e in unrolled], rtol=1e-10)
    np.testing.assert_allclose(BENT(unrolled[1].params, LOG_L2), unrolled[0].params, rtol=1e-10, atol=1e-12)
    u = BENT.inverse(ridge().solution(LOG_L2), LOG_L2)
    converged = gradient(dataclasses.replace(new, start=None), u)
    np.testing.assert_allclose(converged.grad, ridge().hypergradient(LOG_L2), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("problem", "map_", "error", "words"),
    [
        (3, BENT, TypeError, "problem must be a bilevel.Problem .* got int"),
        (RIDGE, 3, TypeError, r"map must be a function \(free, hparams\) -> params"),
        (bilevel.lift(RIDGE), BENT, ValueError, r"lift last, bilevel\.lift\(bilevel\.reparametrize"),
        (
            dataclasses.replace(RIDGE, smoothness=bilevel.Smoothness(1.0, 2.0, 1.0)),
            BENT,
            ValueError,
            r"replace\(problem, smoothness=None\)",
        ),
        (
            dataclasses.replace(RIDGE, start=lambda h, batch, key: jnp.zeros(20)),
            maps.low_rank(1),
            TypeError,
            r"the problem's start goes, and low_rank\(1\) has none; .*start=None",
        ),
        (
            bilevel.FixedPoint(lambda w, h, b: w, RIDGE.outer),
            maps.low_rank(1),
            TypeError,
            "the map of a FixedPoint goes",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(problem, map_, error, words):
    with pytest.raises(error, match=words):
        reparametrize(problem, map_)


def test_it_is_lifted_and_optimised_like_any_other():
    problem = bilevel.lift(reparametrize(RIDGE, BENT))
    folds = [tuple(np.stack([np.asarray(x)[i::2] for i in range(2)]) for x in d) for d in (TRAIN, VALID)]
    method = bilevel.alternating(bilevel.implicit(), bilevel.newton_cg(max_steps=2), optax.adam(0.1))
    result = bilevel.optimize(problem, np.zeros((2, 20)), np.float64(-1.0), *folds, method, 3, progress=False)
    assert result.params.shape == (2, 20)
    assert result.history["value"][-1] < result.history["value"][0]


# --- Subspaces ---------------------------------------------------------------------------------------------

SUBSPACES = {"fastfood": maps.fastfood, "dense": maps.dense_subspace}


@pytest.mark.parametrize("name", SUBSPACES)
def test_norms_are_kept_in_expectation(name):
    # 2^9 params in 16 blocks of 2^5; the relative variance of a square is at most 6 / 2^9, or 2 / 2^9.
    draws, z = 400, np.linspace(-1.0, 1.0, 27)
    project = SUBSPACES[name](np.zeros(512), 27).project
    keys = jax.random.split(jax.random.key(0), draws)
    squares = jax.jit(jax.vmap(lambda key: jnp.sum(project(key, 512, z) ** 2)))(keys) / np.sum(z**2)
    variance = {"fastfood": 6, "dense": 2}[name] / 512
    assert abs(np.mean(squares) - 1) < 5 * np.sqrt(variance / draws)
    # Of the sample variance of nearly normal numbers the relative standard error is sqrt(2 / draws).
    assert np.var(squares) < variance * (1 + 5 * np.sqrt(2 / draws))


def test_fastfood_is_its_matrices():
    assert np.array_equal(hadamard(np.eye(4)), np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]))
    project = maps.fastfood(np.zeros(11), 3).project
    matrix = np.asarray(jax.jit(jax.jacfwd(lambda z: project(jax.random.key(1), 11, z)))(np.zeros(3)))
    assert np.linalg.matrix_rank(matrix) == 3
    keys = jax.random.split(jax.random.key(1), 3)
    signs = np.asarray(jax.random.rademacher(keys[0], (3, 4), float))
    places = np.argsort(jax.random.bits(keys[1], (4,)))
    normal = np.asarray(jax.random.normal(keys[2], (3, 4)))
    h = np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]])
    blocks = [h @ np.diag(normal[i]) @ np.eye(4)[places] @ h @ np.diag(signs[i]) for i in range(3)]
    expected = np.concatenate(blocks)[:11, :3] / np.sqrt(44)
    np.testing.assert_allclose(matrix, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", SUBSPACES)
def test_they_are_linear_and_their_pullback_is_the_adjoint(name):
    base = {"kernel": RNG.standard_normal((5, 3)), "bias": RNG.standard_normal(4)}
    scales = {"kernel": np.arange(1.0, 6.0)}  # one for each row; 1 for the bias
    subspace = SUBSPACES[name](base, 7, 2, lambda h: h)
    z, v = RNG.standard_normal(7), RNG.standard_normal(19)

    @jax.jit
    def both(z):
        flat, pull = jax.vjp(lambda z: ravel_pytree(subspace(z, scales))[0], z)
        return flat, pull(v)[0], ravel_pytree(subspace(z, None))[0]

    origin = both(np.zeros(7))[0]
    np.testing.assert_array_equal(origin, ravel_pytree(base)[0])
    scaled, pulled, plain = both(z)
    np.testing.assert_allclose(np.vdot(v, scaled - origin), np.vdot(pulled, z), rtol=1e-12)
    by_row = np.concatenate([np.ones(4), np.repeat(scales["kernel"], 3)])
    np.testing.assert_allclose(scaled - origin, by_row * (plain - origin), rtol=1e-12)
    np.testing.assert_allclose(both(3 * z)[0] - origin, 3 * (scaled - origin), rtol=1e-12)


def classify(w, x):
    return jnp.tanh(x @ w["in"]) @ w["out"]


def cross_entropy(w, h, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(classify(w, batch[0]), batch[1]))


def decayed(w, h, batch):
    penalty = penalties.l2(w, jax.tree.map(jnp.exp, h["decay"]))
    return cross_entropy(w, h, batch) + penalty


def test_in_a_subspace_any_network_has_an_exact_hypergradient():
    # 64-16-10 units, and rows of as many numbers as a digit has; the base is a hyperparameter, not tuned.
    base = {"in": RNG.standard_normal((64, 16)) / 8, "out": RNG.standard_normal((16, 10)) / 4}
    x, teacher = RNG.standard_normal((2, 40, 64)), RNG.standard_normal((64, 10))
    train, valid = [(x[i], np.argmax(x[i] @ teacher, 1)) for i in range(2)]
    subspace = maps.fastfood(lambda h: h["base"], 12, scales=lambda h: h["scales"])
    problem = reparametrize(
        bilevel.Problem(decayed, cross_entropy, constraints={"base": bilevel.fixed()}), subspace
    )
    tuned = {"decay": {"in": -3.0, "out": -2.0}, "scales": {"in": 4.0, "out": 3.0}}
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, tuned))
    solve = bilevel.argmin(problem, bilevel.newton(100, atol=1e-13))

    @jax.jit
    def solved(flat, z):
        hparams = unravel(flat) | {"base": base}
        z = solve(hparams, train, init=z)
        return z, cross_entropy(subspace(z, hparams), hparams, valid)

    z, first = solved(flat, subspace.init(float))
    estimate = gradient(problem, z, tuned | {"base": base}, data=(train, valid))
    np.testing.assert_allclose(estimate.value, first, rtol=1e-12)
    by_parts = ravel_pytree({name: estimate.grad[name] for name in tuned})[0]
    expected = [
        central_difference(lambda f: float(solved(f, z)[1]), flat, np.eye(4)[i], 1e-3) for i in range(4)
    ]
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(by_parts, expected, rtol=1e-6)


def test_settings_of_subspaces_are_checked():
    base = {"a": np.zeros(3)}
    with pytest.raises(ValueError, match="dim must be at most the number of params, 3, got 4"):
        maps.fastfood(base, 4)
    with pytest.raises(ValueError, match="dim must be at most the number of params, 3, got 4"):
        maps.dense_subspace(lambda h: h, 4)(np.zeros(4), base)
    with pytest.raises(ValueError, match=r"scales names \['b'\], but base has \['a'\]"):
        maps.fastfood(base, 2, scales={"b": 1.0})
    with pytest.raises(ValueError, match=r"free must have shape \(2,\), got \(3,\)"):
        maps.fastfood(base, 2)(np.zeros(3), None)
    with pytest.raises(TypeError, match=r"base\['a'\] must be floating"):
        maps.fastfood({"a": np.arange(3)}, 2)
    assert repr(maps.fastfood(base, 2)) == "fastfood({a: float64[3]}, dim=2, seed=0)"
    assert maps.fastfood(base, 2).init().dtype == jnp.float32


# --- Companders --------------------------------------------------------------------------------------------

CURVES = {"arctan": maps.arctan(), "tanh": maps.tanh(), "softsign": maps.softsign(), "mu_law": maps.mu_law()}
POINTS = np.array([-3.0, -0.4, 0.2, 7.0])


def of_hparams(curve):
    return maps.compander(curve, lambda h: h["a"], lambda h: h["b"])


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_bounded_odd_and_end_as_the_identity(name):
    curve = CURVES[name]
    fn = jax.jit(of_hparams(curve))
    w = fn(POINTS, {"a": 0.7, "b": 1.3})
    assert np.abs(w).max() < 0.7 * curve.bound
    np.testing.assert_allclose(fn(-POINTS, {"a": 0.7, "b": 1.3}), -w, rtol=1e-13)
    # The next term of the series is smaller by |v| / b (softsign), or mu |v| / (2 b).
    np.testing.assert_allclose(fn(POINTS, {"a": 1e9, "b": 1e9}), POINTS, rtol=7 * 128 / 1e9)
    assert float(jax.grad(curve.fn)(0.0)) == 1.0
    back = of_hparams(curve).inverse(w, {"a": 0.7, "b": 1.3})
    np.testing.assert_allclose(back, POINTS, rtol=1e-12)


def test_the_mu_law_is_that_of_telephony():
    np.testing.assert_allclose(maps.mu_law(255.0).fn(1.0), np.log(256) / 255, rtol=1e-14)


@pytest.mark.parametrize("name", CURVES)
def test_the_three_partials_are_those_of_finite_differences(name):
    fn = jax.jit(lambda x: of_hparams(CURVES[name])(x[0], {"a": x[1], "b": x[2]}))
    at = np.array([0.8, 0.7, 1.3])
    partials = jax.jit(jax.grad(fn))(at)
    expected = [central_difference(lambda x: float(fn(x)), at, np.eye(3)[i], 1e-3) for i in range(3)]
    np.testing.assert_allclose(partials, expected, rtol=1e-8)
    if name == "arctan":  # closed forms
        u = 0.8 / 1.3
        by_hand = [0.7 / 1.3 / (1 + u**2), np.arctan(u), -0.7 * u / 1.3 / (1 + u**2)]
        np.testing.assert_allclose(partials, by_hand, rtol=1e-13)


def test_the_optimum_of_linear_regression_is_unchanged():
    bounded = maps.compander(maps.arctan(), a=1.0, b=0.5)  # weights are below 1, the bound is pi / 2
    w = ridge().solution(0.0)
    problem = reparametrize(RIDGE, bounded)
    solve = jax.jit(bilevel.argmin(problem, bilevel.newton(60, atol=1e-13)))
    v = solve(jnp.array(0.0), TRAIN, init=jnp.zeros(20))
    np.testing.assert_allclose(bounded(v, None), w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(v, bounded.inverse(w, None), rtol=0, atol=1e-12)


def test_a_and_b_are_learned_with_the_weights():
    params = {"in": 0.3 * RNG.standard_normal((3, 4)), "out": 0.3 * RNG.standard_normal(4)}
    learned, given = (maps.compander(maps.tanh(), 2.0, 0.5, learned=flag) for flag in (True, False))
    free = learned.inverse(params, None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), learned(free, None), params)
    np.testing.assert_allclose(free.weights["in"], given.inverse(params, None)["in"], rtol=1e-13)
    np.testing.assert_allclose(np.exp(free.log_a["out"]), 2.0, rtol=1e-14)
    x = RNG.standard_normal((5, 3))
    slopes = jax.jit(jax.grad(lambda f: jnp.sum(network(learned(f, None), x))))(free)
    assert jax.tree.all(jax.tree.map(lambda g: bool(np.all(g != 0)), slopes))


@pytest.mark.parametrize("name", ["arctan", "tanh", "softsign"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bounds_hold_where_curves_are_saturated(name, dtype):
    curve = CURVES[name]
    for a in (1.0, 1.3, 1.9):
        bounded = maps.compander(curve, a)
        w = bounded(jnp.asarray([-1e30, 10.0, 1e30], dtype), None)
        assert w.dtype == dtype
        assert np.abs(np.asarray(w, float)).max() < a * curve.bound
        back = bounded.inverse(w, None).astype(float)
        assert np.isfinite(back).all()
        assert np.array_equal(np.sign(back), [-1, 1, 1])


def test_inverse_takes_numbers():
    for learned in (True, False):
        bounded = maps.compander(maps.tanh(), 2.0, learned=learned)
        made = bounded(bounded.inverse({"w": 0.5}, None), None)
        np.testing.assert_allclose(made["w"], 0.5, rtol=1e-12)


def test_settings_of_companders_are_checked():
    with pytest.raises(TypeError, match="curve must be .* got 'tanh'"):
        maps.compander("tanh")
    with pytest.raises(ValueError, match="a must be a positive number, got -1"):
        maps.compander(maps.tanh(), -1.0)
    with pytest.raises(TypeError, match="not both"):
        maps.compander(maps.tanh(), lambda h: h, learned=True)
    with pytest.raises(ValueError, match=r"params\['w'\] must lie within a times 1, .* largest entry is 2 a"):
        maps.compander(maps.tanh(), 0.5).inverse({"w": np.ones(2)}, None)
    assert np.isnan(jax.jit(lambda w: maps.compander(maps.tanh()).inverse(w, None))(2.0))
    with pytest.raises(TypeError, match="free must be Companded"):
        maps.compander(maps.tanh(), learned=True)(np.ones(2), None)
    by_name = maps.compander(maps.mu_law(255), 0.5)
    assert repr(by_name) == "compander(mu_law(255), a=0.5, b=1)"
    assert by_name == maps.compander(maps.mu_law(255), 0.5)


# --- Masks -------------------------------------------------------------------------------------------------


def test_masks_are_steps_and_gradients_pass_straight_through():
    theta = {"a": np.array([3.0, -2.0, 1.0])}
    masked = maps.masks(theta)
    first = masked.init(theta)
    np.testing.assert_array_equal(first["a"], 0.01)
    np.testing.assert_array_equal(masked(first, None)["a"], theta["a"])
    m = {"a": np.array([0.01, 0.005, -1.0])}
    np.testing.assert_array_equal(masked(m, None)["a"], [3.0, 0.0, 0.0])
    slope = jax.grad(lambda m: jnp.sum(masked(m, None)["a"] ** 2))(m)
    np.testing.assert_array_equal(slope["a"], 2 * np.array([9.0, 0.0, 0.0]))  # 2 w theta
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        maps.masks(theta, temperature=lambda h: h)(m, 0.0)
    with pytest.raises(ValueError, match=r"free\['a'\] must have the shape \(3,\) of base\['a'\]"):
        masked({"a": np.ones(2)}, None)


def test_a_threshold_is_tuned_by_a_temperature_only():
    theta, m = np.array([3.0, -2.0]), np.array([0.02, 0.0])
    hard = maps.masks(lambda h: theta, lambda h: h)
    soft = maps.masks(lambda h: theta, lambda h: h, temperature=0.01)

    def value(of, t):
        return jnp.sum(of(m, t) ** 2)

    assert float(jax.grad(functools.partial(value, hard))(0.005)) == 0
    slope = jax.jit(jax.grad(functools.partial(value, soft)))(0.005)
    expected = central_difference(lambda t: float(value(soft, t)), 0.005, 1.0, 1e-4)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    problem = reparametrize(bilevel.Problem(lambda w, h, b: jnp.sum(w**2), lambda w, h, b: jnp.sum(w)), hard)
    with pytest.raises(ValueError, match="influences neither inner nor outer"):
        bilevel.hypergradient(problem)(m, 0.005, 0.0, 0.0)


def test_gradient_dropout_keeps_what_the_teacher_confirms():
    g, h = np.array([1.0, 1.0, 0.0, -3.0]), np.array([2.0, -3.0, 1.0, 1.0])
    keep = np.array([1.0, 0.25, 1.0, 0.75])  # |g| / (|g| + |h|) where signs differ
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    out = jax.jit(jax.vmap(lambda key: maps.gradient_dropout({"w": g}, {"w": h}, 0.6, key)["w"]))(keys)
    for i in (0, 1, 3):
        kept = np.isclose(out[:, i], g[i])
        np.testing.assert_allclose(out[~kept, i], 0.4 * g[i])
        assert abs(kept.mean() - keep[i]) <= 5 * np.sqrt(keep[i] * (1 - keep[i]) / draws)
    assert np.all(out[:, 2] == 0)
    with pytest.raises(ValueError, match="teacher_grads must have the structure of grads"):
        maps.gradient_dropout({"w": g}, {"v": h}, 1.0, keys[0])
    with pytest.raises(ValueError, match=r"level must be from 0 to 1, got 1\.5"):
        maps.gradient_dropout(g, h, 1.5, keys[0])
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        maps.gradient_dropout(g, h, 1.0, 0)


# --- Factors -----------------------------------------------------------------------------------------------

RANK, X, V = 2, RNG.standard_normal((12, 5)), RNG.standard_normal((9, 5))
TRUE = RNG.standard_normal((5, 4))
Y, T = X @ TRUE + RNG.standard_normal((12, 4)), V @ TRUE
THIN = maps.low_rank(RANK)


def fit(w, log_l2, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2 + jnp.exp(log_l2) * jnp.sum(w**2) / 2


def miss(w, log_l2, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def best_of_rank(log_l2):
    """Reduced-rank ridge regression: the ridge solution, truncated in the metric of its Hessian."""
    metric = X.T @ X / Y.size + np.exp(log_l2) * np.eye(5)
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(root @ np.linalg.solve(metric, X.T @ Y / Y.size))
    return np.linalg.solve(root, u[:, :RANK] * s[:RANK] @ v[:RANK])


def test_hypergradients_do_not_depend_on_the_factors():
    problem = reparametrize(bilevel.Problem(fit, miss), THIN)
    best = best_of_rank(-2.0)
    balanced = THIN.init(best)
    twist = np.array([[2.0, 1.0], [0.5, 3.0]])
    twisted = maps.Factors(balanced.left @ twist, np.linalg.solve(twist, balanced.right))
    again = maps.refactorise(twisted)
    for pair in (balanced, twisted, again):
        np.testing.assert_allclose(THIN(pair, None), best, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(again.left.T @ again.left, again.right @ again.right.T, atol=1e-12)
    assert abs((twisted.left.T @ twisted.left)[0, 1]) > 0.1
    fn = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(bilevel.cg(200, tol=1e-13))))
    grads = [float(fn(pair, -2.0, (X, Y), (V, T)).grad) for pair in (balanced, twisted, again)]
    expected = central_difference(lambda h: float(miss(best_of_rank(h), h, (V, T))), -2.0, 1.0, 1e-3)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(grads, expected, rtol=1e-8)


def test_only_matrices_of_a_larger_rank_are_factored():
    params = {"kernel": TRUE, "thin": TRUE[:, :2], "bias": TRUE[0]}
    free = THIN.init(params)
    assert [isinstance(free[name], maps.Factors) for name in params] == [True, False, False]
    made = THIN(free, None)
    np.testing.assert_array_equal(made["thin"], params["thin"])
    u, s, v = np.linalg.svd(TRUE)
    np.testing.assert_allclose(made["kernel"], u[:, :2] * s[:2] @ v[:2], rtol=1e-12)
    np.testing.assert_array_equal(maps.refactorise(free)["bias"], params["bias"])
    with pytest.raises(ValueError, match="free must hold bilevel.maps.Factors"):
        maps.refactorise(params)


def test_factors_of_short_floats_are_made_in_wider_ones():
    short = jnp.asarray(np.diag([4.0, 1.0, 0.25]), jnp.bfloat16)
    free = maps.low_rank(2).init(short)
    for pair in (free, maps.refactorise(free)):
        assert pair.left.dtype == pair.right.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            pair.product().astype(float), np.diag([4.0, 1.0, 0.0]), atol=4 * float(jnp.finfo(short.dtype).eps)
        )


def test_factors_of_more_than_full_rank_become_as_few_as_needed():
    wide = maps.Factors(RNG.standard_normal((3, 4)), RNG.standard_normal((4, 5)))
    again = maps.refactorise(wide)
    assert (again.left.shape, again.right.shape) == ((3, 3), (3, 5))
    np.testing.assert_allclose(again.product(), wide.product(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(again.left.T @ again.left, again.right @ again.right.T, atol=1e-12)


# --- Momentum, begun anew ----------------------------------------------------------------------------------


def test_momentum_is_reset_every_so_many_updates():
    grads = jnp.asarray(RNG.standard_normal((7, 3)))

    def updates(optimizer, grads):
        def step(state, g):
            out, state = optimizer.update({"w": g}, state)
            return state, out["w"]

        return jax.lax.scan(step, optimizer.init({"w": grads[0]}), grads)[1]

    got = jax.jit(functools.partial(updates, momentum_reset(optax.adam(0.1), 3)))(grads)
    parts = [updates(optax.adam(0.1), grads[i : i + 3]) for i in (0, 3, 6)]
    np.testing.assert_allclose(got, np.concatenate(parts), rtol=1e-12)
    with pytest.raises(ValueError, match="every must be at least 1"):
        momentum_reset(optax.adam(0.1), 0)
    with pytest.raises(TypeError, match="optimizer must be an optax transformation, got 0.1"):
        momentum_reset(0.1, 3)


def test_an_optimiser_whose_state_holds_params_is_begun_at_the_present_ones():
    w, optimizer = jnp.ones(2), momentum_reset(optax.contrib.schedule_free_sgd(0.1), 2)
    state = optimizer.init(w)
    for _ in range(3):
        updates, state = optimizer.update(jnp.ones(2), state, w)
        last, w = w, optax.apply_updates(w, updates)
    np.testing.assert_allclose(state.state.z, last - 0.1, rtol=1e-12)


def test_a_network_in_a_subspace_keeps_float32():
    params, log_decay, train, valid = jax.tree.map(jnp.float32, network_data())
    subspace = maps.fastfood(params, 4)
    estimate = gradient(reparametrize(NETWORK, subspace), subspace.init(), log_decay, data=(train, valid))
    assert {x.dtype for x in jax.tree.leaves((estimate.grad, estimate.value))} == {jnp.dtype("float32")}
