"""Estimators for scikit-learn whose penalties are tuned by hypergradient as they are fitted.

`LogisticRegressionHG` is multinomial logistic regression with an L2 strength for each feature, for each
group of features, or one for all. Part of the rows given to ``fit`` is held out, and the strengths minimise
its loss; the model is then fitted to all rows at the strengths found::

    w*(s)  = argmin_w  mean_i loss(x_i w + b, y_i) + 1/2 sum_j s_j |w_j|^2
    s      = argmin_s  mean over the rows held out of loss(x_i w*(s) + b*(s), y_i)

It takes the place of ``LogisticRegressionCV`` where one strength for all features is not enough, and a grid
over several out of the question. Needs scikit-learn (``pip install 'bilevel[bench]'``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
except ImportError as error:
    raise ImportError("bilevel.sklearn needs scikit-learn: pip install 'bilevel[bench]'.") from error

from bilevel import validation
from bilevel.argmin import argmin
from bilevel.constraints import positive
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.optimize import optimize
from bilevel.problem import Problem


def _logits(params, x):
    return x @ params["w"] + params["b"][None]


def _valid_loss(params, hparams, batch):
    """Cross-entropy; two classes have one column of logits."""
    del hparams
    made = _logits(params, batch["x"])
    if made.shape[1] == 1:
        return optax.sigmoid_binary_cross_entropy(made[:, 0], batch["y"].astype(made.dtype)).mean()
    return optax.softmax_cross_entropy_with_integer_labels(made, batch["y"]).mean()


def _train_loss(params, hparams, batch):
    strengths = hparams["strengths"][batch["groups"]]
    return _valid_loss(params, hparams, batch) + jnp.sum(strengths[:, None] * params["w"] ** 2) / 2


_PROBLEM = Problem(_train_loss, _valid_loss, constraints={"strengths": positive()})


@functools.cache
def _solve(max_steps: int):
    return jax.jit(argmin(_PROBLEM, lbfgs(max_steps)))


class LogisticRegressionHG(ClassifierMixin, BaseEstimator):
    """Logistic regression whose L2 strengths are tuned by hypergradient on rows held out.

    Features are standardised inside, so that strengths are comparable; coefficients are those of the
    features as given. Computes in float32, or in float64 where JAX has it enabled.

    Args:
      strengths: "one" for all features together, an array of whole numbers from 0 on that says to which
        group each feature belongs, or "feature" for a strength for each. Strengths are fitted to the rows
        held out, and overfit them where there are not many more of these than strengths.
      validation_fraction: of the rows of each class, held out to tune strengths; a row at least. Where a
        class has but one row there is no tuning.
      strength: where all strengths begin.
      steps: outer steps; fewer are taken where the gradient vanishes (``tol``).
      tol: norm of the gradient by the logarithms of the strengths at which tuning ends.
      max_iter: of L-BFGS, for the last fit to all rows.
      random_state: of the rows held out.

    Attributes:
      classes_: labels, sorted.
      coef_: shape (1, features) for two classes, else (classes, features).
      intercept_: shape (1,) or (classes,).
      strengths_: of each feature, of standardised coefficients; shape (features,).
      n_iter_: outer steps taken, shape (1,).
      result_: the `bilevel.Result` of the tuning; None where there was none.

    Example:
      >>> from sklearn.datasets import load_breast_cancer
      >>> from bilevel.sklearn import LogisticRegressionHG
      >>> x, y = load_breast_cancer(return_X_y=True)
      >>> model = LogisticRegressionHG(steps=50).fit(x[::2], y[::2])
      >>> print(model.score(x[1::2], y[1::2]) > 0.95)
      True
    """

    def __init__(
        self,
        strengths: Any = "one",
        *,
        validation_fraction: float = 0.25,
        strength: float = 1e-2,
        steps: int = 200,
        tol: float = 1e-4,
        max_iter: int = 500,
        random_state: Any = None,
    ):
        self.strengths = strengths
        self.validation_fraction = validation_fraction
        self.strength = strength
        self.steps = steps
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X, y):  # noqa: N803
        """Tune the strengths and fit the model.

        Args:
          X: shape (rows, features).
          y: labels, shape (rows,).

        Raises:
          ValueError: data or settings that cannot be used.
        """
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got one class: {self.classes_[0]!r}.")
        groups = self._groups(x.shape[1])
        strength = validation.number("strength", self.strength, positive=True)
        mean, scale = x.mean(0), x.std(0)
        # The deviation of a constant column is rounding.
        scale = np.where(np.ptp(x, axis=0) > 0, scale, 1)
        dtype = jnp.result_type(float)
        z, labels = ((x - mean) / scale).astype(dtype), labels.astype(np.int32)

        def batch(rows):
            return {"x": z[rows], "y": labels[rows], "groups": groups}

        columns = 1 if len(self.classes_) == 2 else len(self.classes_)
        params = {"w": np.zeros((x.shape[1], columns), dtype), "b": np.zeros(columns, dtype)}
        hparams = {"strengths": np.full(groups.max() + 1, strength, dtype)}
        held_out = self._held_out(labels)
        self.result_ = None
        if held_out is not None:
            train, valid = batch(np.flatnonzero(~held_out)), batch(np.flatnonzero(held_out))
            steps = validation.whole_number("steps", self.steps, 1)
            self.result_ = optimize(
                _PROBLEM, params, hparams, train, valid, steps=steps, tol=self.tol, progress=False
            )
            params, hparams = self.result_.best.params, self.result_.best.hparams
        solve = _solve(validation.whole_number("max_iter", self.max_iter, 1))
        params = solve(hparams, batch(slice(None)), init=params)
        weights = np.asarray(params["w"], np.float64) / scale[:, None]
        self.coef_ = weights.T
        self.intercept_ = np.asarray(params["b"], np.float64) - mean @ weights
        self.strengths_ = np.asarray(hparams["strengths"], np.float64)[groups]
        self.n_iter_ = np.array([0 if self.result_ is None else len(self.result_.history["step"])])
        return self

    def decision_function(self, X):  # noqa: N803
        """Logits: shape (rows,) for two classes, else (rows, classes)."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        made = x @ self.coef_.T + self.intercept_
        return made[:, 0] if made.shape[1] == 1 else made

    def predict(self, X):  # noqa: N803
        """The likeliest label of each row."""
        made = self.decision_function(X)
        chosen = (made > 0).astype(int) if made.ndim == 1 else made.argmax(1)
        return self.classes_[chosen]

    def predict_proba(self, X):  # noqa: N803
        """Probabilities, shape (rows, classes)."""
        made = self.decision_function(X)
        made = np.stack([np.zeros_like(made), made], 1) if made.ndim == 1 else made
        made = np.exp(made - made.max(1, keepdims=True))
        return made / made.sum(1, keepdims=True)

    def _groups(self, features: int) -> np.ndarray:
        if isinstance(self.strengths, str):
            if self.strengths not in ("feature", "one"):
                raise ValueError(
                    'strengths must be "feature", "one" or an array of group numbers, '
                    f"got {self.strengths!r}."
                )
            one = self.strengths == "one"
            return np.zeros(features, np.int32) if one else np.arange(features, dtype=np.int32)
        groups = np.asarray(self.strengths)
        if groups.shape != (features,) or groups.dtype.kind not in "iu" or groups.min() < 0:
            raise ValueError(
                f"strengths must hold a group number from 0 on for each of the {features} features, got "
                f"{groups.dtype} of shape {groups.shape}."
            )
        return groups.astype(np.int32)

    def _held_out(self, labels) -> np.ndarray | None:
        """Rows to tune on, some of each class; None where there are too few."""
        share = validation.number("validation_fraction", self.validation_fraction, positive=True, below=1)
        if np.bincount(labels).min() < 2:
            return None
        rng, mask = check_random_state(self.random_state), np.zeros(len(labels), bool)
        for k in range(len(self.classes_)):
            rows = rng.permutation(np.flatnonzero(labels == k))
            mask[rows[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
        return mask
