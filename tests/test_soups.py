"""Averages of members: exact where closed forms say so, never worse than the best where that is promised."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import Status, soups

RNG = np.random.default_rng(0)
STACK = {"w": RNG.normal(size=(4, 3)), "b": RNG.normal(size=4)}
APART = [{"w": STACK["w"][i], "b": STACK["b"][i]} for i in range(4)]


def test_uniform_is_the_mean_however_members_are_given():
    for members in (STACK, APART, tuple(APART)):
        soup = soups.uniform(members)
        np.testing.assert_allclose(soup.params["w"], STACK["w"].mean(0), rtol=1e-15)
        np.testing.assert_allclose(soup.params["b"], STACK["b"].mean(), rtol=1e-15)
        assert soup.members == (0, 1, 2, 3)
        np.testing.assert_array_equal(soup.weights, np.full(4, 0.25))


def test_it_keeps_the_dtype_and_adds_up_in_a_wider_one():
    half = jnp.ones((1000, 1), jnp.float16) * 100
    assert soups.uniform(half).params.dtype == jnp.float16
    assert float(soups.uniform(half).params[0]) == 100.0  # the sum, 100000, is beyond float16


def test_it_is_traceable():
    params = jax.jit(lambda stack: soups.uniform(stack).params)(STACK)
    np.testing.assert_allclose(params["w"], STACK["w"].mean(0), rtol=1e-15)
    several = jax.vmap(lambda stack: soups.uniform(stack).params)(jax.tree.map(lambda x: x[None], STACK))
    np.testing.assert_allclose(several["w"][0], STACK["w"].mean(0), rtol=1e-15)


class Pair(NamedTuple):
    w: np.ndarray
    b: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Unequal:
    w: np.ndarray


def test_any_tree_is_a_member():
    """A NamedTuple of stacks is one, no list of members; trees alike need not be equal."""
    stack = soups.uniform(Pair(STACK["w"], STACK["b"]))
    apart = soups.uniform([Pair(**one) for one in APART])
    for soup in (stack, apart):
        np.testing.assert_allclose(soup.params.w, STACK["w"].mean(0), rtol=1e-15)
    soup = soups.uniform([Unequal(one["w"]) for one in APART])
    np.testing.assert_allclose(soup.params.w, STACK["w"].mean(0), rtol=1e-15)


# --- Greedy ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.integers(0, 2**31))
def test_greedy_is_never_below_its_best_member(points, seed):
    """On a bumpy function, where an average may be much worse than its parts."""
    a, b, c = np.random.default_rng(seed).normal(size=3)

    def value(x):
        return np.sin(5 * a * float(x) + b) + c * float(x) ** 2 / 10

    soup = soups.greedy(np.array(points), value)
    alone = [value(x) for x in points]
    assert soup.value == value(soup.params) <= min(alone)
    assert soup.members[0] == int(np.argmin(alone))
    mean = np.mean([points[i] for i in soup.members])
    np.testing.assert_allclose(float(soup.params), mean, rtol=1e-12, atol=1e-12)
    assert np.flatnonzero(soup.weights).tolist() == sorted(soup.members)


def test_greedy_adds_what_helps_and_nothing_else():
    soup = soups.greedy(np.array([3.0, 0.5, -1.0, 100.0]), lambda x: abs(float(x)))
    assert (soup.members, soup.value) == ((1, 2), 0.25)  # with 3 it would be 5/6
    short = soups.greedy(np.array([3.0, 0.5, -1.0]), lambda x: jnp.abs(x).astype(jnp.bfloat16))
    assert (short.members, short.value) == ((1, 2), 0.25)


def test_greedy_passes_by_values_that_are_not_finite():
    soup = soups.greedy(np.array([2.0, 1.0, 7.0]), lambda x: float(x) if x in (2.0, 1.0) else float("nan"))
    assert (soup.members, soup.value) == ((1,), 1.0)
    with pytest.raises(ValueError, match="finite for no member"):
        soups.greedy(np.array([2.0, 1.0]), lambda x: float("nan"))


# --- Learned ---------------------------------------------------------------------------------------------


def quadratic(params, hparams, batch):
    del hparams
    return jnp.sum((params["w"] - batch["w"]) ** 2) + jnp.sum((params["b"] - batch["b"]) ** 2)


def test_learned_finds_the_weights_that_made_the_target():
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    target = jax.tree.map(lambda x: np.tensordot(weights, x, 1), STACK)
    soup = soups.learned(STACK, quadratic, target, steps=800)
    np.testing.assert_allclose(soup.weights, weights, atol=1e-4)
    assert soup.value < 1e-8
    assert soup.value == float(quadratic(soup.params, None, target))


def test_learned_per_leaf_with_a_temperature():
    """The target of b is another mixture; what the loss sees has to be three times as large."""
    stack = {"w": RNG.normal(size=(3, 8)), "b": RNG.normal(size=(3, 8))}
    weights = {"w": np.array([0.2, 0.3, 0.5]), "b": np.array([0.7, 0.2, 0.1])}
    target = jax.tree.map(lambda w, x: 3 * np.tensordot(w, x, 1), weights, stack)

    def loss(params, hparams, batch):
        return quadratic(jax.tree.map(lambda x: x * hparams["inverse_temperature"], params), None, batch)

    outer = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    soup = soups.learned(stack, loss, target, per_leaf=True, inverse_temperature=True, steps=600, outer=outer)
    np.testing.assert_allclose(soup.weights["w"], weights["w"], atol=1e-4)
    np.testing.assert_allclose(soup.weights["b"], weights["b"], atol=1e-4)
    np.testing.assert_allclose(soup.inverse_temperature, 3, rtol=1e-4)


def test_learned_is_never_worse_than_uniform():
    target = jax.tree.map(lambda x: x[0] + 3, STACK)
    soup = soups.learned(STACK, quadratic, target, steps=3)
    assert soup.value <= float(quadratic(soups.uniform(STACK).params, None, target))


# --- Results, and members that failed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def population():
    """Three members; the third starts from where the first step overshoots to where the loss is infinite."""
    problem = bilevel.Problem(
        inner=lambda w, h, x: 0.5 * (w - x) ** 2 + 0.5 * jnp.exp(h) * w**2,
        outer=lambda w, h, x: 0.5 * (w - x) ** 2 + 0 * h + jnp.where(w < -1, jnp.inf, 0.0),
    )
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(1.5), optax.sgd(0.1))
    starts = jnp.array([0.1, 0.2, 30.0]), jnp.array([-3.0, -2.0, -9.0])
    return bilevel.optimize(
        problem, *starts, 2.0, 1.0, method, 30, population=bilevel.population(3), progress=False
    )


def test_members_that_diverged_are_left_out(population):
    assert population.status.tolist().count(Status.DIVERGED) == 1
    assert np.isfinite(population.params).all()  # the last good state: it takes the status to tell
    with pytest.warns(RuntimeWarning, match="members 2 of 3 diverged"):
        soup = soups.uniform(population)
    assert soup.members == (0, 1)
    np.testing.assert_allclose(soup.params, population.params[:2].mean(), rtol=1e-12)
    np.testing.assert_array_equal(soup.weights, [0.5, 0.5, 0.0])


def test_results_are_members_too(population, tmp_path):
    population.member(0).save(tmp_path / "run.npz")
    results = [bilevel.load(tmp_path / "run.npz"), population.member(1)]
    soup = soups.uniform(results)
    np.testing.assert_allclose(soup.params, population.params[:2].mean(), rtol=1e-12)


def test_a_population_is_no_member_of_a_list(population):
    with pytest.raises(TypeError, match=r"take result\.member\(i\)"):
        soups.uniform([population, population])


def test_members_that_are_not_finite_are_left_out_of_every_soup():
    members = np.array([1.0, np.nan, 3.0])
    with pytest.warns(RuntimeWarning, match="members 1 of 3"):
        assert float(soups.greedy(members, lambda x: abs(float(x) - 2)).params) == 2.0
    with pytest.warns(RuntimeWarning, match="members 1 of 3"):
        soup = soups.learned(members, lambda w, h, batch: (w - batch) ** 2, np.array(1.5), steps=150)
    np.testing.assert_allclose(soup.weights, [0.75, 0, 0.25], atol=1e-2)


@pytest.mark.parametrize(
    ("members", "error", "part"),
    [
        ([], ValueError, "at least one member"),
        ([{"w": np.ones(2)}, {"v": np.ones(2)}], ValueError, "member 1 is"),
        ([np.ones(2), np.ones(3)], ValueError, "trees alike"),
        ({"w": np.ones((2, 3)), "b": np.ones(3)}, ValueError, "leading axis"),
        (np.array(1.0), ValueError, "leading axis"),
        (np.full((2, 2), np.inf), ValueError, "all 2"),
        (np.array([1, 2]), TypeError, "floating"),
    ],
)
def test_bad_members(members, error, part):
    with pytest.raises(error, match=part):
        soups.uniform(members)


def test_bad_settings():
    with pytest.raises(TypeError, match="value must be a function"):
        soups.greedy(STACK, 3.0)
    with pytest.raises(TypeError, match="value must return a real scalar"):
        soups.greedy(STACK, lambda params: params["w"])
    with pytest.raises(ValueError, match="at least two members"):
        soups.learned(np.ones((1, 2)), quadratic, np.ones(2))
    with pytest.raises(TypeError, match="per_leaf"):
        soups.learned(STACK, quadratic, np.ones(2), per_leaf=1)
