"""The estimator for scikit-learn: its checks, its strengths, and what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.sklearn import LogisticRegressionHG


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runs that its tiny data sets stall
@parametrize_with_checks([LogisticRegressionHG(steps=10, max_iter=50)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def data(rows, seed, classes=2, noise=20):
    """Three features that matter and many that do not."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3 + noise)) * np.geomspace(0.1, 10, 3 + noise)
    z = x[:, :3] / np.geomspace(0.1, 10, 3 + noise)[:3]
    y = np.argmax(z + 0.3 * rng.normal(size=z.shape), 1) if classes == 3 else (z.sum(1) > 0).astype(int)
    return x, np.array(["a", "b", "c"])[y]


@pytest.mark.parametrize("classes", [2, 3])
def test_features_that_do_not_matter_are_penalised(classes):
    x, y = data(240, 0, classes)
    model = LogisticRegressionHG("feature", steps=100, random_state=0).fit(x, y)
    assert np.median(model.strengths_[3:]) > 10 * model.strengths_[:3].max()
    one = LogisticRegressionHG(steps=100, random_state=0).fit(x, y)
    assert len(set(one.strengths_)) == 1
    test = data(2000, 1, classes)
    assert model.score(*test) > one.score(*test)
    proba = model.predict_proba(test[0])
    np.testing.assert_allclose(proba.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[proba.argmax(1)], model.predict(test[0]))


def test_the_last_fit_is_the_minimum_on_all_rows():
    x, y = data(120, 2)
    groups = np.array([0] * 3 + [1] * 20)
    model = LogisticRegressionHG(groups, steps=60, random_state=0).fit(x, y)
    assert len(set(model.strengths_)) == 2
    z, scale = (x - x.mean(0)) / x.std(0), x.std(0)
    w = model.coef_[0] * scale
    chance = model.predict_proba(x)[:, 1]
    slope = z.T @ (chance - (y == "b")) / len(y) + model.strengths_ * w
    assert np.abs(slope).max() < 1e-5
    assert abs(np.mean(chance - (y == "b"))) < 1e-5


def test_too_few_rows_are_fitted_at_the_first_strength():
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])
    model = LogisticRegressionHG(strength=0.5).fit(x, y)
    assert model.result_ is None
    np.testing.assert_array_equal(model.strengths_, 0.5)


def test_a_constant_column_has_no_weight():
    x, y = data(60, 4)
    x = np.concatenate([x, np.full((60, 1), 0.3)], 1)
    assert x[:, -1].std() > 0  # by rounding
    model = LogisticRegressionHG(steps=5, random_state=0).fit(x, y)
    assert abs(model.coef_[0, -1]) < 1e-6


def test_rows_of_each_class_are_on_both_sides():
    labels = np.repeat([0, 1, 2], [98, 2, 5])
    for seed in range(20):
        model = LogisticRegressionHG(validation_fraction=0.3, random_state=seed)
        model.classes_ = np.arange(3)
        held = model._held_out(labels)
        np.testing.assert_array_equal(np.bincount(labels[held]), [29, 1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": "all"}, 'strengths must be "feature", "one" or an array'),
        ({"strengths": [0, 1]}, "a group number from 0 on for each of the 3 features"),
        ({"validation_fraction": 1.5}, "validation_fraction must be a positive number and less than 1"),
        ({"strength": -1.0}, "strength must be a positive number"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegressionHG(**settings).fit(np.ones((8, 3)), [0, 1] * 4)


def test_it_computes_in_float64_where_that_is_enabled():
    assert jnp.result_type(float) == np.float64
    x, y = data(60, 3)
    model = LogisticRegressionHG(steps=5, random_state=0).fit(x, y)
    assert model.result_.params["w"].dtype == np.float64
