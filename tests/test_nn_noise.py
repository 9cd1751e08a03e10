"""Noise and augmentations with strengths that are traced, one for each example or one for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.nn import affine, cutout, dropout, gaussian_noise


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
def test_both_kinds_keep_the_mean_and_raise_the_second_moment(kind, rate):
    x = 2.0 * np.ones((400_000,))
    y = jax.jit(lambda r: dropout(x, r, jax.random.key(0), kind))(rate)
    # Three standard errors of the moments of 400,000 draws at the largest rate.
    np.testing.assert_allclose(jnp.mean(y), 2, atol=0.02)
    np.testing.assert_allclose(jnp.mean(y**2), 4 / (1 - rate), rtol=0.03)


@pytest.mark.parametrize("rate", [0.01, 0.02])
def test_half_precision_does_not_round_the_rate(rate):
    y = dropout(jnp.ones(400_000, jnp.bfloat16), rate, jax.random.key(0))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose((y == 0).mean(), rate, rtol=0.05)


def test_rates_of_examples_and_channels():
    x = jnp.ones((3, 8, 8, 500))
    y = dropout(x, jnp.array([0.0, 0.5, 0.9]), jax.random.key(0), broadcast_dims=(1, 2))
    np.testing.assert_allclose((y == 0).mean((1, 2, 3)), [0, 0.5, 0.9], atol=0.05)
    assert (y == y[:, :1, :1]).all()
    kernel = dropout(jnp.ones((50, 60)), 0.5, jax.random.key(1))
    assert 0.4 < (kernel == 0).mean() < 0.6


def test_a_bernoulli_rate_is_not_differentiated_and_a_gaussian_one_is():
    x, key = jnp.arange(1.0, 5.0), jax.random.key(0)
    assert jax.grad(lambda r: dropout(x, r, key).sum())(0.3) == 0
    slope = jax.grad(lambda r: dropout(x, r, key, "gaussian").sum())(0.3)
    difference = [dropout(x, 0.3 + d, key, "gaussian").sum() for d in (1e-6, -1e-6)]
    np.testing.assert_allclose(slope, (difference[0] - difference[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: dropout(jnp.ones(3), 0.5, jax.random.key(0), kind="alpha"), ValueError, "'alpha'"),
        (lambda: dropout(jnp.ones((3, 2)), jnp.zeros(2), jax.random.key(0)), ValueError, r"shape \(3,\)"),
        (lambda: dropout(jnp.ones(3), 1.5, jax.random.key(0)), ValueError, r"\[0, 1\), got 1.5"),
        (lambda: dropout(jnp.arange(3), 0.5, jax.random.key(0)), TypeError, "floating"),
        (lambda: gaussian_noise(jnp.ones(()), jnp.ones(1), jax.random.key(0)), ValueError, "strength"),
        (lambda: affine(jnp.ones((3, 4, 4)), jax.random.key(0)), ValueError, "height, width, channels"),
        (lambda: cutout(jnp.ones((3, 4, 4, 1)), jnp.ones(2), jax.random.key(0)), ValueError, "length"),
    ],
)
def test_what_does_not_fit_is_said(call, error, part):
    with pytest.raises(error, match=part):
        call()


# --- Correlated inputs: what is right and what is wrong for a dropout rate ---------------------------------

# Least squares with dropout on the inputs has a closed form: (E of mask) ridge with the diagonal of X^T X.


def correlated():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, 8)) + 0.3 * np.eye(3, 8)
    x, v = (rng.standard_normal((n, 3)) @ mix + 0.3 * rng.standard_normal((n, 8)) for n in (30, 400))
    w = rng.standard_normal(8)
    return (x, x @ w + rng.standard_normal(30)), (v, v @ w + rng.standard_normal(400))


def solution(rate, train):
    x, y = train
    gram = x.T @ x
    return np.linalg.solve(gram + rate / (1 - rate) * np.diag(np.diag(gram)), x.T @ y)


def exact(rate, train, valid, step=1e-5):
    at = [0.5 * np.mean((valid[0] @ solution(rate + d, train) - valid[1]) ** 2) for d in (step, -step)]
    return (at[0] - at[1]) / (2 * step)


def dropped(kind):
    """The training loss, over many masks of the key in its batch."""

    def masked(x, rate, key):
        if kind == "by hand":  # the factor 1 / (1 - rate) is differentiated, the mask cannot be
            return x * jax.random.bernoulli(key, 1 - rate, x.shape) / (1 - rate)
        return dropout(x, rate, key, kind)

    def inner(w, rate, batch):
        (x, y), keys = batch
        return jnp.mean(jax.vmap(lambda key: 0.5 * jnp.mean((masked(x, rate, key) @ w - y) ** 2))(keys))

    return bilevel.Problem(inner, lambda w, rate, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2))


@pytest.fixture(scope="module")
def at_solution():
    train, valid = jax.tree.map(jnp.asarray, correlated())
    keys = jax.random.split(jax.random.key(0), 20_000)
    rate = 0.3
    return jnp.asarray(solution(rate, train)), jnp.asarray(rate), (train, keys), valid


def test_implicit_is_right_through_gaussian_noise_and_wrong_through_a_mask(at_solution):
    w, rate, (train, keys), valid = at_solution
    truth = exact(0.3, train, valid)
    found = {
        kind: float(jax.jit(bilevel.hypergradient(dropped(kind)))(w, rate, (train, keys), valid).grad)
        for kind in ("gaussian", "by hand")
    }
    assert abs(found["gaussian"] / truth - 1) < 0.05  # 20,000 masks
    assert abs(found["by hand"] / truth - 1) > 0.5
    with pytest.raises(ValueError, match="stop_gradient"):
        bilevel.hypergradient(dropped("bernoulli"))(w, rate, (train, keys), valid)


def test_a_fitted_response_is_right_through_a_bernoulli_mask(at_solution):
    w, rate, (train, _), valid = at_solution
    problem = bilevel.Problem(
        dropped("bernoulli").inner, dropped("bernoulli").outer, constraints=bilevel.interval(0, 0.9)
    )
    estimator = bilevel.best_response(optax.adam(optax.cosine_decay_schedule(3e-2, 1500)), 1500, scale=0.3)
    # Each fitting step has 200 masks of its own.
    keys = jax.random.split(jax.random.key(1), (1500, 200))
    batches = bilevel.stacked((jax.tree.map(lambda x: jnp.broadcast_to(x, (1500, *x.shape)), train), keys))
    grad = jax.jit(bilevel.hypergradient(problem, estimator))(w, rate, batches, valid).grad
    assert abs(float(grad) / exact(0.3, train, valid) - 1) < 0.1


# --- Images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    return jnp.asarray(np.random.default_rng(0).random((2, 9, 9, 3)))


def test_no_strength_leaves_images_alone(picture):
    np.testing.assert_allclose(affine(picture, jax.random.key(0)), picture, atol=1e-12)
    np.testing.assert_array_equal(cutout(picture, 0.0, jax.random.key(0)), picture)
    large = jnp.asarray(np.random.default_rng(1).random((1, 300, 300, 1)), jnp.bfloat16)
    np.testing.assert_array_equal(affine(large, jax.random.key(0)), large)


def test_a_quarter_turn_is_a_rotation_of_the_array(picture, monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype, lo, hi: jnp.ones(shape, dtype))
    turned = affine(picture, jax.random.key(0), degrees=jnp.array([90.0, 0.0]))
    quarter = [np.allclose(turned[0], np.rot90(picture[0], k), atol=1e-10) for k in (1, 3)]
    assert any(quarter)
    np.testing.assert_allclose(turned[1], picture[1], atol=1e-10)
    shifted = affine(picture, jax.random.key(0), translate=2 / 9)
    np.testing.assert_allclose(shifted[:, 2:, 2:], picture[:, :-2, :-2], atol=1e-10)
    assert not np.any(shifted[:, :2])


def test_zoom_and_its_derivative(picture):
    key = jax.random.key(3)
    slope = jax.grad(lambda s: affine(picture, key, scale=s).sum())(0.1)
    difference = [affine(picture, key, scale=0.1 + d).sum() for d in (1e-6, -1e-6)]
    np.testing.assert_allclose(slope, (difference[0] - difference[1]) / 2e-6, rtol=1e-5)


def test_cutout_makes_squares_of_the_length_asked_for():
    images = jnp.ones((500, 16, 16, 2))
    cut = cutout(images, jnp.where(jnp.arange(500) < 250, 4.0, 6.0), jax.random.key(0))
    gone = (cut == 0).sum((1, 2, 3)) / 2
    assert (gone[:250].max(), gone[250:].max()) == (16, 36)
    several = cutout(images, 4.0, jax.random.key(0), holes=jnp.full(500, 2.6), most_holes=3)
    assert 32 < ((several == 0).sum((1, 2, 3)) / 2).max() <= 48
