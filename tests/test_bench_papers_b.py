"""Problems of papers at tiny sizes: stopped curves, mixtures, hidden classes, greedy text, hard examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import agrees

import bilevel
from benchmarks import curves_stopping, fidelities
from benchmarks.problems import curriculum, data_mixture, hyperfitting, novel_classes

# --- Stopped curves ---------------------------------------------------------------------------------------


def test_a_mask_is_a_narrow_network():
    params, width = curves_stopping.start(jax.random.key(0), 5.0), 5
    x = jax.random.normal(jax.random.key(1), (3, 64))
    narrow = jnp.maximum(x @ params["w"][:, :width] + params["b"][None, :width], 0) @ params["v"][:width]
    np.testing.assert_allclose(
        curves_stopping.logits(params, x, width), narrow + params["c"][None], rtol=1e-6
    )
    grad = jax.grad(lambda p: jnp.sum(curves_stopping.logits(p, x, width) ** 2))(params)
    assert not grad["v"][width:].any()
    assert grad["v"][:width].any()


def test_the_median_pruner_stops_all_that_are_worse():
    """Curves that never cross, the best ones first: those after the start-up go on for the warm-up only."""
    optuna = pytest.importorskip("optuna")
    values = np.arange(1.0, 31)[:, None] * np.ones(10)[None]
    found = curves_stopping.pruned(values, optuna.pruners.MedianPruner(6, 3))
    assert (found.best, found.index) == (1.0, 0)
    np.testing.assert_array_equal(found.steps, [10] * 6 + [3] * 24)
    assert found.fraction == pytest.approx((60 + 72) / 300)


def test_regret_and_crossings_are_counted():
    values = np.array([[1.0] * 6 + [3.0], [2.0] * 6 + [1.0], [3.0] * 6 + [2.0]])
    assert curves_stopping.crossings(values) == pytest.approx(2 / 3)

    def first_only(values, extra):
        return bilevel.stopping.Replay(values[0, -1], 0, np.array([7, 0, 0]), 1 / 3)

    (found,) = curves_stopping.compared(values, {}, {"a": first_only}, 1, 0)["a"]
    first = np.random.default_rng([0, 0]).permutation(3)[0]
    assert found.regret == values[first, -1] - 1
    exact = [curves_stopping.Found(0.3, 0.0, 0.0)] * 3
    missed = [*exact, curves_stopping.Found(0.3, 0.1, 0.0)]
    rival = {curves_stopping.SAME_BEGINNING: missed}
    assert curves_stopping.verdict({"ridge": exact, **rival}).startswith("HOLDS")
    assert curves_stopping.verdict({"ridge": missed, **rival}).startswith("DOES NOT")


# --- Mixtures ---------------------------------------------------------------------------------------------


def test_a_process_of_two_fidelities_is_conditioned_by_gauss():
    """Against the conditional of a normal vector, written out."""
    rng = np.random.default_rng(0)
    points, fidelity = rng.dirichlet(np.ones(3), 12), np.array([0, 1] * 6)
    own = fidelities.fitted(points, fidelity, np.sin(4 * points[:, 0]) + 0.1 * fidelity)
    noise = 1 / np.diag(own.inverse @ fidelities.covariance(
        points, fidelity, points, fidelity, own.length, own.rho) @ own.inverse.T)  # fmt: skip
    assert (noise > 1).all()
    new = rng.dirichlet(np.ones(3), 4)
    matrix = np.linalg.inv(own.inverse.T @ own.inverse)
    rows = [fidelities.covariance(new, np.full(4, a), points, fidelity, own.length, own.rho) for a in (0, 1)]
    solve = np.linalg.solve(matrix, np.concatenate(rows).T)
    joint = np.block([[np.eye(4), own.rho * np.eye(4)], [own.rho * np.eye(4), np.eye(4)]])
    joint = joint - np.concatenate(rows) @ solve
    mean, deviation, correlation = fidelities.posterior(own, new)
    low, high = np.diag(joint)[:4], np.diag(joint)[4:]
    np.testing.assert_allclose(mean, rows[1] @ own.solved)
    np.testing.assert_allclose(deviation, np.sqrt(own.scale * high))
    np.testing.assert_allclose(correlation, np.abs(np.diag(joint[:4, 4:])) / np.sqrt(low * high), rtol=1e-6)


def test_expected_improvement_is_the_integral():
    mean, deviation, best = np.array([0.3, -1.0]), np.array([0.5, 2.0]), 0.1
    draws = np.linspace(-10, 10, 200001)
    density = np.exp(-0.5 * draws**2) / np.sqrt(2 * np.pi)
    below = np.maximum(best - (mean[:, None] + deviation[:, None] * draws[None]), 0)
    expected = np.sum(below * density[None], axis=1) * (draws[1] - draws[0])
    np.testing.assert_allclose(fidelities.improvement(mean, deviation, best), expected, rtol=1e-6)


def test_cheap_looks_save_exact_ones():
    """A bowl whose cheap version is shifted upwards: the same lowest point, for less."""
    lowest = np.array([0.6, 0.3, 0.1])

    def evaluate(point, fidelity):
        return float(np.sum((point - lowest) ** 2)) + (fidelity == fidelities.CHEAP)

    both = fidelities.search(evaluate, 3, 0.1, lambda looks: looks[-1].cost < 8, 0)
    assert both[-1].cost == pytest.approx(
        sum(0.1 if x.fidelity == fidelities.CHEAP else 1 for x in both), rel=1e-9
    )
    assert fidelities.best(both).fidelity == fidelities.EXACT
    assert fidelities.best(both).value < 0.01


def test_the_mixture_has_the_gradient_of_differences(monkeypatch):
    monkeypatch.setattr(data_mixture, "HIDDEN", 4)
    rng = np.random.default_rng(0)
    rows = {"x": jnp.asarray(rng.random((8, 64))), "y": jnp.arange(8), "domain": jnp.arange(8) % 4}
    params = data_mixture.start(None, None, jax.random.key(0))
    estimator = bilevel.unrolled(data_mixture.OPTIMIZER, steps=4)

    @jax.jit
    def estimate(hparams):
        return bilevel.hypergradient(data_mixture.PROBLEM, estimator)(params, hparams, rows, rows)

    agrees(estimate, data_mixture.mixture([0.1, 0.2, 0.3, 0.4]))


def test_domains_are_turned_digits_that_do_not_overlap():
    train, valid, test = data_mixture.split(0)
    assert jnp.bincount(train["domain"]).tolist() == [data_mixture.ROWS] * 4
    assert len(train["y"]) + len(valid["y"]) + len(test["y"]) == 1797
    x = np.arange(64.0)[None] / 4
    np.testing.assert_allclose(
        data_mixture.turned(x, 90).reshape(8, 8), np.rot90(x.reshape(8, 8) / 16), atol=1e-6
    )


# --- Hidden classes ---------------------------------------------------------------------------------------


def test_clusters_are_matched_as_by_the_hungarian_method():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    found = np.where(rng.random(60) < 0.6, (labels + 1) % 4, rng.integers(0, 4, 60))
    counts = np.array([[np.sum((found == i) & (labels == j)) for j in range(4)] for i in range(4)])
    expected = counts[optimize.linear_sum_assignment(-counts)].sum() / 60
    np.testing.assert_allclose(novel_classes.right(found, jnp.asarray(labels), 4), expected)


def test_a_fold_hides_its_own_classes():
    labels = jnp.arange(10)
    shown = [novel_classes.seen(labels, fold).tolist() for fold in range(novel_classes.FOLDS + 1)]
    three, none = [True] * 3, [False] * 3
    assert shown == [none + three + [False] * 4, three + none + [False] * 4, three + three + [False] * 4]


def test_share_and_decay_have_the_gradient_of_differences(monkeypatch):
    for name, value in {"WIDTH": 4, "LATENT": 3, "HELD_OUT": 3, "TEMPERATURE": 0.5, "EM_STEPS": 2}.items():
        monkeypatch.setattr(novel_classes, name, value)
    rng = np.random.default_rng(0)
    rows = {"x": jnp.asarray(rng.random((10, 64))), "y": jnp.arange(10)}
    held_out = jnp.asarray(rng.random((10, 3, 64)))
    params = novel_classes.start(None, None, jax.random.key(0))
    estimator = bilevel.forward(novel_classes.OPTIMIZER, steps=3)

    @jax.jit
    def estimate(hparams):
        return bilevel.hypergradient(novel_classes.PROBLEM, estimator)(params, hparams, rows, held_out)

    agrees(estimate, novel_classes.numbers(0.4, 0.2))


# --- Greedy text ------------------------------------------------------------------------------------------


def test_different_four_grams_are_counted():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 3, (4, 30))
    text[0] = np.arange(30) % 5
    expected = [len({tuple(row[i : i + 4]) for i in range(27)}) / 27 for row in text]
    assert expected[0] == 5 / 27
    np.testing.assert_allclose(hyperfitting.different(jnp.asarray(text)), expected)


def test_greedy_text_is_the_likeliest_character_each_time(monkeypatch):
    for name, value in {"HIDDEN": 6, "LONG": 5}.items():
        monkeypatch.setattr(hyperfitting, name, value)
    params = hyperfitting.start(jax.random.key(0))
    context = jax.random.randint(jax.random.key(1), (2, hyperfitting.CONTEXT), 0, hyperfitting.SYMBOLS)
    text = np.asarray(jnp.concatenate([context, hyperfitting.written(params, context)], axis=1))
    rows = hyperfitting.rows_of(text)
    likeliest = np.argmax(hyperfitting.logits(params, rows[:, :-1]), axis=1)
    np.testing.assert_array_equal(rows[:, -1], likeliest)
    assert hyperfitting.copied(text, np.asarray(rows)) == 1.0
    assert hyperfitting.copied(text[:1] * 0, np.asarray(rows)) == 0.0


# --- Hard examples ----------------------------------------------------------------------------------------


def test_the_harder_half_is_weighted():
    losses = jnp.array([4.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(curriculum.mined(losses, 0.0), 2.5)
    np.testing.assert_allclose(curriculum.mined(losses, 1.0), 3.5)
    np.testing.assert_allclose(curriculum.mined(losses, 0.25), 2.75)


def test_the_share_at_the_end_has_the_gradient_of_differences(monkeypatch):
    monkeypatch.setattr(curriculum, "STEPS", 4)
    rng = np.random.default_rng(0)
    labels = jnp.stack([jnp.arange(8), jnp.arange(8)[::-1]], axis=1)
    rows = {"x": jnp.asarray(rng.random((8, 64))), "y": labels}
    valid = {"x": rows["x"][::-1], "y": labels[:, 0]}
    params = curriculum.starts(None, None, jax.random.key(0))
    estimator = bilevel.forward(curriculum.OPTIMIZER, steps=4, per_step={"share": curriculum.rising})

    @jax.jit
    def estimate(hparams):
        return bilevel.hypergradient(curriculum.PROBLEM, estimator)(params, hparams, rows, valid)

    agrees(estimate, curriculum.ends(0.4, 0.7))


def test_gains_are_those_of_the_best_on_validation():
    losses = np.zeros((3, 4, 2))
    losses[:, :, 0] = np.array([3.0, 1.0, 2.0])[:, None]
    losses[0, :, 1], losses[1, :, 1] = 1.0, [0.5, 0.7, 0.6, 0.6]
    best, gain, error = curriculum.gains(losses)
    assert best == 1
    np.testing.assert_allclose((gain, error), (0.4, np.std([0.5, 0.3, 0.4, 0.4], ddof=1) / 2))
