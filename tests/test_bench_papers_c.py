"""Problems of papers at tiny sizes: continual learning, designs, experts, masks, pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import central_difference

import bilevel
from benchmarks.problems import continual, experts, mask_tuning, offline_design, pruning


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def doubled(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


# --- Continual learning -----------------------------------------------------------------------------------


def task(t: int, rows: int = 4):
    labels = 2 * t + np.arange(rows) % 2
    counts = np.arange(10)
    return {
        "x": normal(t, rows, 64), "y": jnp.eye(10)[labels], "seen": (counts < 2 * t + 2) * 1.0,
        "old": (counts < 2 * t) * 1.0, "later": jnp.float64(t > 0),
    }  # fmt: skip


def test_nothing_is_held_in_the_first_task(monkeypatch):
    """Whatever the strengths; classes that are not seen have no information."""
    monkeypatch.setattr(continual, "HIDDEN", 2)
    monkeypatch.setattr(continual, "STEPS", 3)
    params = continual.start(None, None, jax.random.key(0))
    before = jax.tree.map(jnp.ones_like, params)
    fn = jax.jit(continual.learned)
    zero, much = (fn(params, strengths(s), task(0), before) for s in (0.0, 1e3))
    jax.tree.map(np.testing.assert_array_equal, zero, much)
    assert (zero[1]["read"]["b"][:2] > 0).all()
    np.testing.assert_array_equal(zero[1]["read"]["b"][2:], 0)
    later, held = (fn(params, strengths(s), task(1), before)[0] for s in (0.0, 1e3))
    assert distance(held, params) < 0.2 * distance(later, params)


def strengths(value: float):
    return {name: jnp.float64(value) for name in continual.USUAL}


def distance(one, other):
    return sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_what_is_held_does_not_pull_where_it_is():
    """At the old params penalties and their slopes are nothing."""
    old = continual.start(None, None, jax.random.key(1))
    fisher = jax.tree.map(jnp.ones_like, old)
    slope = jax.jit(jax.value_and_grad(continual.inner))
    free, held = (slope(old, strengths(s), task(1), old, fisher) for s in (0.0, 1e3))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), free, held)


# --- Designs ----------------------------------------------------------------------------------------------


def test_functions_have_their_known_optima():
    at = {
        "branin": jnp.array([(jnp.pi + 5) / 15, 2.275 / 15]),
        "hartmann": jnp.array([0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]),
    }
    for name, (truth, optimum) in offline_design.TRUTH.items():
        value, slope = jax.value_and_grad(truth)(at[name])
        np.testing.assert_allclose(value, optimum, atol=1e-5)
        np.testing.assert_allclose(slope, 0, atol=2e-4)


def test_the_worse_half_is_seen_and_its_best_quarter_held_out():
    train, valid, begin = offline_design.split(0)
    for name, dim in offline_design.DIMS.items():
        assert train[name]["x"].shape == (150, dim)
        assert train[name]["y"].max() < valid[name]["y"].min()
        np.testing.assert_allclose(offline_design.TRUTH[name][0](begin[name]["x"][-1]), begin[name]["best"])


@pytest.fixture
def _small(monkeypatch):
    for name, value in {"HIDDEN": 2, "STEPS": 1, "DIMS": {"branin": 2}}.items():
        monkeypatch.setattr(offline_design, name, value)


@pytest.mark.usefixtures("_small")
def test_the_sensitivity_has_the_gradient_of_differences():
    rows = {"branin": {"x": normal(0, 5, 2), "y": normal(1, 5)}}
    params = doubled(offline_design.start(None, None, jax.random.key(0)))
    problem = bilevel.Problem(offline_design.inner, offline_design.outer)
    estimator = bilevel.unrolled(offline_design.OPTIMIZER, 1, remat=False)
    fn = jax.jit(lambda s: bilevel.hypergradient(problem, estimator)(params, of(s), rows, rows))
    difference = central_difference(lambda s: fn(s).value, jnp.float64(0.3), 1.0, 1e-4)
    np.testing.assert_allclose(fn(jnp.float64(0.3)).grad["strength"]["branin"], difference, rtol=1e-6)


def of(strength):
    return {"strength": {"branin": strength}}


# --- Experts ----------------------------------------------------------------------------------------------


def routed_rows():
    return doubled(jax.tree.map(lambda x: x[:12], experts.split(0)[0]))


def test_routers_have_the_gradient_of_differences(monkeypatch):
    rows = routed_rows()
    params = doubled(experts.start(None, None, jax.random.key(0)))
    problem = bilevel.Problem(experts.inner, experts.outer)
    estimator = bilevel.unrolled(experts.OPTIMIZER, 3, remat=False)
    fn = jax.jit(lambda s, w: estimate(problem, estimator, params, {"strength": s, "width": w}, rows))
    found = fn(0.5, 0.8).grad
    for name, at in {"strength": lambda t: (0.5 + t, 0.8), "width": lambda t: (0.5, 0.8 + t)}.items():
        difference = central_difference(lambda t, at=at: fn(*at(t)).value, 0.0, 1.0, 1e-4)
        np.testing.assert_allclose(found[name], difference, rtol=1e-5)


def estimate(problem, estimator, params, hparams, rows):
    return bilevel.hypergradient(problem, estimator)(params, hparams, rows, rows)


def test_an_even_router_is_smooth_and_has_the_largest_entropy():
    even = {"w": jnp.zeros((experts.FEATURES, 4)), "b": jnp.zeros(4)}
    hparams = {"strength": 2.0, "width": 1.0}
    found = [experts.held(even, hparams, routed_rows(), kind) for kind in experts.RIVALS]
    np.testing.assert_allclose(found, [0, 2 * np.log(4), 0.5], atol=1e-7)


# --- Masks ------------------------------------------------------------------------------------------------


def test_a_step_of_masks_is_straight_through(monkeypatch):
    """From all on, without dropout: by the slope of the plain network, times its weights."""
    monkeypatch.setattr(mask_tuning, "HIDDEN", 3)
    weights = doubled(mask_tuning.start(jax.random.key(0)))
    rows = {"x": normal(0, 6, 64), "y": jnp.arange(6) % 3}
    hparams = {"level": jnp.float64(0.0), "strength": jnp.float64(2.0)}
    at = mask_tuning.all_on(weights)
    moved = jax.jit(mask_tuning.tuned)(at, hparams, ((rows, weights), jax.random.key(1)))
    slope = jax.jit(jax.grad(mask_tuning.cross_entropy))(weights, rows)
    for name in ("hidden", "read"):
        expected = 0.01 - mask_tuning.RATE * (weights[name]["w"] * slope[name]["w"] + 2 * 0.01)
        np.testing.assert_allclose(moved["numbers"][name]["w"], expected, rtol=1e-9)


# --- Pruning ----------------------------------------------------------------------------------------------


def test_the_largest_activations_up_to_a_share_are_wanted():
    """Shares before each: 0.4, 0, 0.9 and 0.7."""
    made = pruning.target(jnp.array([3.0, 4.0, 1.0, 2.0]), 0.6)
    before = np.array([0.4, 0.0, 0.9, 0.7])
    np.testing.assert_allclose(made, 1 / (1 + np.exp((before - 0.6) / pruning.SOFT)), rtol=1e-5)


def test_open_gates_change_nothing_and_closed_ones_cost_their_predictors():
    params, x = pruning.start(None, None, jax.random.key(0)), normal(0, 5, 64)
    made, gates, _ = pruning.passed(params, x)
    np.testing.assert_allclose(made, pruning.ungated(params, x), rtol=1e-6)
    whole = 64 * 64 + 64 * 64 + 64 * 10
    np.testing.assert_allclose(pruning.operations(gates), 1 + 4 * 4 * 64 / whole)
    np.testing.assert_allclose(
        pruning.operations(jax.tree.map(jnp.zeros_like, gates)), 4 * 3 * 64 / whole, rtol=1e-6
    )


def test_the_small_network_is_within_the_budget():
    n = pruning.as_cheap()
    assert 64 * n + n * n + 10 * n <= 4416 < 64 * (n + 1) + (n + 1) ** 2 + 10 * (n + 1)
