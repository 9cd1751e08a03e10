"""What scikit-learn's cross-validation picks, with the task's validation rows as its only fold.

With n training rows and one penalty ``l`` for all, the inner losses are those of scikit-learn over n at::

    ridge: alpha = n l2        lasso: alpha = l1        logistic: C = 1 / (n l2)                    (1)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.problems import Task

GRID = 50
MISSING = {"mlp": "fits no networks", "cleaning": "has no search over weights of rows"}


class Fit(NamedTuple):
    """An estimator of scikit-learn that cross-validates one penalty.

    ``make(task, cv)`` builds it; ``found(estimator, rows)`` is what it picked, after Eq. (1), for so many
    training rows.
    """

    make: Callable[[Task, Any], Any]
    found: Callable[[Any, int], dict[str, float]]


def _grid(task: Task) -> np.ndarray:
    (ends,) = task.box.values()
    return np.geomspace(*ends, GRID)


def _ridge(task: Task, cv):
    from sklearn.linear_model import RidgeCV

    alphas = len(task.train["y"]) * _grid(task)
    return RidgeCV(alphas, fit_intercept=False, scoring="neg_mean_squared_error", cv=cv)


def _lasso(task: Task, cv):
    """With the grid that it chooses itself, of 100."""
    from sklearn.linear_model import LassoCV

    del task
    return LassoCV(fit_intercept=False, cv=cv, max_iter=10_000)


def _logistic(task: Task, cv):
    from sklearn.linear_model import LogisticRegressionCV

    del task
    return LogisticRegressionCV(Cs=np.logspace(-4, 4, GRID), cv=cv, scoring="neg_log_loss", max_iter=1000)


FITS = {
    "ridge": Fit(_ridge, lambda model, rows: {"l2": model.alpha_ / rows}),
    "lasso": Fit(_lasso, lambda model, rows: {"l1": model.alpha_}),
    "logistic": Fit(_logistic, lambda model, rows: {"l2": 1 / (float(np.ravel(model.C_)[0]) * rows)}),
}


def prepared(task: Task):
    """The estimator before its search, and training and validation rows to fit it on."""
    from sklearn.model_selection import PredefinedSplit

    x, y = (np.concatenate([task.train[name], task.valid[name]]).astype(float) for name in "xy")
    held = np.where(np.arange(len(y)) < len(task.train["y"]), -1, 0)
    return FITS[task.name].make(task, PredefinedSplit(held)), x, y


def picked(task: Task) -> tuple[dict[str, np.ndarray], float]:
    """The hyperparameters of its best penalty, and seconds."""
    model, x, y = prepared(task)
    began = time.perf_counter()
    model.fit(x, y)
    seconds = time.perf_counter() - began
    found = FITS[task.name].found(model, len(task.train["y"]))
    return {name: np.full_like(task.hparams[name], value) for name, value in found.items()}, seconds
