"""The study of the lasso: its folds are those of scikit-learn, its derivatives those of the closed form."""

import jax
import numpy as np
import pytest

from benchmarks import lasso


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(lasso, "FEATURES", 30)
    monkeypatch.setattr(lasso, "ROWS", 25)
    monkeypatch.setattr(lasso, "USED", 5)


def test_folds_have_the_losses_of_lasso_cv():
    from sklearn.linear_model import Lasso, LassoCV

    x, y = lasso.diabetes()
    train, valid = lasso.folds(x, y)
    fit = LassoCV(cv=lasso.FOLDS, alphas=[0.05], tol=1e-10, max_iter=100_000).fit(x, y)
    assert sum(valid["n"]) == len(y)
    losses = []
    for j in range(lasso.FOLDS):
        part, held = (jax.tree.map(lambda leaf, j=j: leaf[j], batch) for batch in (train, valid))
        rows = int(part["n"])
        w = Lasso(0.05, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(
            part["x"][:rows], part["y"][:rows]
        )
        losses.append(lasso.squares(w.coef_, None, held))
    np.testing.assert_allclose(np.mean(losses), fit.mse_path_.mean() / 2, rtol=1e-6)


def test_derivatives_by_hand_and_by_the_library_are_the_closed_form():
    problem, *args = lasso.at_a_solution(0.05)
    w, _, train, valid = args
    expected = lasso.closed_form(w, train, valid)
    assert 0 < np.sum(expected != 0) < 30
    fn = lasso.bilevel.hypergradient(problem, lasso.bilevel.implicit(lasso.bilevel.cg(1000, tol=lasso.TOL)))
    np.testing.assert_allclose(fn(*args).grad["l1"], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(lasso.by_hand(*args)[1], expected, rtol=1e-8, atol=1e-10)


def test_one_penalty_comes_to_that_of_the_grid(monkeypatch):
    monkeypatch.setattr(lasso, "GRID", 20)
    found, *rows = lasso.compare("diabetes", *lasso.diabetes())
    assert found[1] == "LassoCV, 20 penalties"
    assert [row[-1].endswith("ok") for row in rows] == [True]


def test_penalties_of_features_are_tuned(monkeypatch):
    monkeypatch.setattr(lasso, "STEPS", 20)
    shared, each = lasso.tuned_row(True, 0.1), lasso.tuned_row(False, 0.1)
    assert (shared[0], each[0]) == (1, 30)
    assert float(each[2]) < float(shared[2])
