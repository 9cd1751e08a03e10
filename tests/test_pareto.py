"""Fronts by their definition, volumes by counting cubes, and populations on fronts with a formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import pareto

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("objectives", "divisions", "count"), [(2, 7, 8), (3, 4, 15), (4, 3, 20)])
def test_weights_are_all_multiples_that_sum_to_one(objectives, divisions, count):
    made = np.round(pareto.weights(objectives, divisions) * divisions).astype(int)
    expected = [w for w in itertools.product(range(divisions + 1), repeat=objectives) if sum(w) == divisions]
    assert made.tolist() == sorted(map(list, expected))
    assert len(made) == count


@pytest.mark.parametrize("k", [2, 3])
def test_the_front_is_that_of_the_definition(k):
    points = RNG.integers(5, size=(80, k)).astype(float)  # with ties and equal points
    points = points[points.sum(axis=1) >= 5]
    points[3], points[4] = np.nan, -np.inf
    finite = [p for p in points if np.isfinite(p).all()]
    expected = [np.isfinite(p).all() and not any(all(q <= p) and any(q < p) for q in finite) for p in points]
    assert 4 < sum(expected) < 20
    np.testing.assert_array_equal(pareto.front(points), expected)
    assert pareto.front(np.full((2, k), np.inf)).tolist() == [False, False]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_hypervolume_is_the_number_of_cubes(k):
    points = RNG.integers(7, size=(9, k))  # some of them beyond the reference
    corner = np.full(k, 5)
    cubes = itertools.product(range(5), repeat=k)
    expected = sum(any(all(p <= cube) for p in points) for cube in cubes)
    assert pareto.hypervolume(points, corner) == expected > 0
    assert pareto.hypervolume(points + 7, corner) == 0


def test_chebyshev_is_a_smooth_maximum_of_weighted_distances():
    f, w, ideal = RNG.uniform(1, 2, 3), RNG.uniform(size=3), np.array([0.5, 0.0, -1.0])
    distance, mu = w * (f - ideal), 0.1
    sharp = pareto.chebyshev(f, w, ideal, smoothing=0)
    np.testing.assert_allclose(sharp, distance.max(), rtol=1e-12)
    smooth, slope = jax.jit(jax.value_and_grad(lambda f, w: pareto.chebyshev(f, w, ideal, mu)))(f, w)
    terms = np.exp(distance / mu)
    np.testing.assert_allclose(smooth, mu * np.log(terms.sum()), rtol=1e-12)
    np.testing.assert_allclose(slope, w * terms / terms.sum(), rtol=1e-12)
    assert sharp <= smooth <= sharp + mu * np.log(3)
    assert pareto.chebyshev(jnp.float32([1, 2]), jnp.float32([0.5, 0.5])).dtype == jnp.float32


# --- A population over weights. Training gives w = x, so that objectives are functions of x. ---------------


def swept(objectives, scalarise, start):
    """Where the members end that share eleven weights, one each."""
    weights = pareto.weights(2, 10)
    problem = bilevel.Problem(
        lambda w, h, _: 0.5 * jnp.sum((w - h["x"]) ** 2),
        lambda w, h, _: scalarise(objectives(w), h["weights"]),
        constraints={"weights": bilevel.fixed()},
    )
    method = bilevel.alternating(bilevel.implicit(bilevel.cg(2)), bilevel.newton(), optax.adam(0.03))
    start = np.broadcast_to(start, (11, *np.shape(start)))
    none = np.zeros(1)
    result = bilevel.optimize(
        problem, start, {"x": start, "weights": weights}, none, none, method, 600,
        population=bilevel.population(11), progress=False,
    )  # fmt: skip
    return weights, np.asarray(result.hparams["x"])


A, B = np.array([1.0, 0.0]), np.array([0.0, 2.0])


def squares(x):
    return jnp.stack([0.5 * jnp.sum((x - A) ** 2), 0.5 * jnp.sum((x - B) ** 2)])


def test_weighted_sums_of_two_quadratics_end_on_the_line_between_their_minima():
    weights, ends = swept(squares, jnp.vdot, np.zeros(2))
    np.testing.assert_allclose(ends, weights @ np.stack([A, B]), atol=1e-6)
    assert pareto.front(jax.vmap(squares)(ends)).all()


def hills(x):
    """On the front for x from -1 to 1; the front is concave but near its ends."""
    return jnp.stack([1 - jnp.exp(-((x - 1) ** 2)), 1 - jnp.exp(-((x + 1) ** 2))])


def test_chebyshev_reaches_the_concave_part_of_a_front_and_the_sum_does_not():
    grid = np.linspace(-1, 1, 20_001)
    values = np.asarray(jax.vmap(hills)(grid))
    weights, by_chebyshev = swept(hills, pareto.chebyshev, 0.1)
    _, by_sum = swept(hills, jnp.vdot, 0.1)
    # Where its derivative is zero, the second one of a weighted sum has the sign of 2 x^2 - 1.
    assert np.abs(by_sum).min() > np.sqrt(0.5)
    inside = (weights > 0).all(axis=1)
    expected = [grid[np.argmin(np.log(np.exp(values * w / 0.01).sum(axis=1)))] for w in weights[inside]]
    np.testing.assert_allclose(by_chebyshev[inside], expected, atol=1e-4)  # a step of the grid
    assert np.abs(by_chebyshev).min() < 1e-6
    volumes = [pareto.hypervolume(jax.vmap(hills)(x), [1, 1]) for x in (by_sum, by_chebyshev)]
    assert volumes[0] < volumes[1]


def test_the_picture_marks_the_front():
    fig = pareto.plot([[1, 3], [2, 2], [2, 3], [3, 1]], ["error", "size"])
    (ax,) = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("error", "size")
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[2, 3]])
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 3], [2, 2], [3, 1]])
    three = pareto.plot(RNG.uniform(size=(5, 3)))
    assert [ax.get_ylabel() for ax in three.axes] == ["objective 2", "objective 3", "objective 3"]


def test_wrong_input_is_named():
    for call, error, words in [
        (lambda: pareto.weights(1, 3), ValueError, "objectives must be at least 2"),
        (lambda: pareto.weights(8, 40), ValueError, "62891499 weights of 8 objectives"),
        (lambda: pareto.front([1.0, 2.0]), ValueError, r"shape \(points, objectives\).*got \(2,\)"),
        (lambda: pareto.front([[1.0], [2.0]]), ValueError, "at least two objectives"),
        (lambda: pareto.front([[1.0, 2.0], [3.0]]), TypeError, "objectives must be an array"),
        (lambda: pareto.hypervolume(np.ones((2, 2)), [3.0]), ValueError, "reference must be 2 finite"),
        (
            lambda: pareto.chebyshev([1.0, 2.0], [0.5, -0.1]),
            ValueError,
            "not be negative, got -0.1",
        ),
        (
            lambda: jax.jit(lambda f: pareto.chebyshev(f, np.array([0.5, -0.1])))(np.ones(2)),
            ValueError,
            "not be negative, got -0.1",
        ),
        (lambda: pareto.chebyshev([1.0, 2.0], [1.0, 1.0], smoothing=-1), ValueError, "smoothing"),
        (lambda: pareto.chebyshev([1.0, 2.0], 0.5), ValueError, r"got \(2,\) and \(\); take jax.vmap"),
        (lambda: pareto.plot(np.ones((2, 2)), ["error"]), ValueError, "names must be 2"),
    ]:
        with pytest.raises(error, match=words):
            call()
