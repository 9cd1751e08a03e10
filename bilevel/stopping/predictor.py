"""The final value of a run from the beginning of its curve: eq. (1) of `bilevel.stopping`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bilevel import validation

# Ridge penalties that are tried, relative to the largest squared singular value of the features.
_PENALTIES = np.geomspace(1e-8, 10, 19)
_FOLDS = 5
# Fewer finished runs than this say nothing of an error.
_FEWEST = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Final values as predicted, and the standard deviation of their error; shapes (runs,) and ()."""

    value: np.ndarray
    sigma: float

    def chance(self, best: float) -> np.ndarray:
        """P(y_T < best) of each run; 0 of one whose curve was not finite."""
        with np.errstate(invalid="ignore", divide="ignore"):
            far = (best - self.value) / self.sigma
        far = np.where(np.isfinite(self.value), np.nan_to_num(far, posinf=np.inf, neginf=-np.inf), -np.inf)
        return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in far.ravel()]).reshape(far.shape)

    def stop(self, best: float, threshold: float = 0.95) -> np.ndarray:
        """Eq. (2): which runs have a chance of ``1 - threshold`` at most to end below ``best``."""
        threshold = validation.number("threshold", threshold, positive=True, below=1.0)
        return self.chance(best) <= 1 - threshold


@dataclasses.dataclass(frozen=True)
class Signal:
    """What a feature says of the final value, learned from finished runs.

    ``correlation``: with the final value, and ``interval``, its ends at 95 % (by Fisher's transform); a sign
    means something where both ends have it. ``coefficient``: of the regression with all features, final value
    per standard deviation of this one; None where the regressor has none.
    """

    correlation: float
    interval: tuple[float, float]
    coefficient: float | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """Finished runs, and a regression on them for each observed length; see `predictor`."""

    curves: np.ndarray
    final: np.ndarray
    extra: dict[str, np.ndarray]
    regressor: Any = None
    _fitted: dict[int, Any] = dataclasses.field(default_factory=dict)

    def predict(self, partial, extra: Mapping | None = None) -> Prediction:
        """Final values of runs observed for so many steps as ``partial`` has columns.

        Args:
          partial: their values so far, shape (runs, t) or, of one run, (t,), with t at most that of the
            finished runs.
          extra: as given to `predictor`, of these runs.

        Raises:
          ValueError: longer than the finished runs, other names.
        """
        partial = np.atleast_2d(np.asarray(partial, np.float64))
        if partial.ndim != 2 or not 1 <= partial.shape[1] <= self.curves.shape[1]:
            raise ValueError(
                f"partial must be curves of 1 to {self.curves.shape[1]} steps, (runs, steps), got shape "
                f"{partial.shape}."
            )
        given = columns_of(extra, len(partial))
        if list(given) != list(self.extra):
            raise ValueError(
                f"extra must have what the finished runs have, {', '.join(self.extra) or 'nothing'}; got "
                f"{', '.join(given) or 'nothing'}."
            )
        model = self._at(partial.shape[1])
        x = (features(partial, given)[1] - model.mean) / model.scale
        finite = np.isfinite(x).all(axis=1)
        value = np.full(len(x), np.nan)
        if finite.any():
            value[finite] = model.regression.predict(x[finite])
        return Prediction(value, model.sigma)

    def signals(self, steps: int) -> dict[str, Signal]:
        """What the first ``steps`` values, and everything extra, say of the end.

        Raises:
          ValueError: more steps than the finished runs have.
        """
        steps = validation.whole_number("steps", steps, 1)
        if steps > self.curves.shape[1]:
            raise ValueError(f"steps must be at most the {self.curves.shape[1]} of the curves, got {steps}.")
        names, x = features(self.curves[:, :steps], self.extra)
        coefficients = getattr(self._at(steps).regression, "coef_", None)
        if coefficients is not None and np.size(coefficients) != len(names):
            coefficients = None  # of a kernel machine those of its rows
        out = {}
        for i, name in enumerate(names):
            r = _correlation(x[:, i], self.final)
            reach = 1.96 / math.sqrt(len(x) - 3)
            z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
            own = None if coefficients is None else float(np.ravel(coefficients)[i])
            out[name] = Signal(r, (math.tanh(z - reach), math.tanh(z + reach)), own)
        return out

    def _at(self, steps: int) -> _Fitted:
        if steps not in self._fitted:
            x = features(self.curves[:, :steps], self.extra)[1]
            mean, scale = x.mean(axis=0), x.std(axis=0)
            scale = np.where(scale > 1e-12 * (1 + abs(mean)), scale, 1)
            x = (x - mean) / scale
            if self.regressor is None:
                regression, errors = _ridge(x, self.final)
            else:
                regression, errors = _cross_validated(self.regressor, x, self.final)
            self._fitted[steps] = _Fitted(mean, scale, regression, float(np.sqrt(np.mean(errors**2))))
        return self._fitted[steps]

    def __repr__(self) -> str:
        runs, steps = self.curves.shape
        return f"Predictor({runs} finished runs of {steps} steps, {self.regressor or 'ridge'})"


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A regression on standardised features, and its error on runs that it has not seen."""

    mean: np.ndarray
    scale: np.ndarray
    regression: Any
    sigma: float


def predictor(curves, extra: Mapping | None = None, *, final=None, regressor: Any = None) -> Predictor:
    """What predicts the end of a run, from finished runs.

    Args:
      curves: values of finished runs at the same steps, shape (runs, T), lower is better; at least 5. Runs
        that are not finite are left out.
      extra: what else is known of each run when it is judged, by name, each of shape (runs,): hyperparameters
        (in logarithms where they are searched so), gradient norms. Their signs are learned.
      final: the score of each run, shape (runs,), where it is not the last value of its curve.
      regressor: default ridge regression, whose penalty and error are those of leave-one-out in closed form.
        Or any with ``fit(x, y)`` and ``predict(x)``, such as scikit-learn's ``NuSVR()``, copied for each of 5
        folds; features come to it standardised.

    Raises:
      TypeError, ValueError: too few runs, shapes that do not fit, no regressor.

    Example:
      >>> import bilevel, numpy as np
      >>> speed = np.linspace(0.2, 1.0, 30)
      >>> curves = np.arange(1.0, 51.0) ** -speed[:, None]
      >>> fitted = bilevel.stopping.predictor(curves)
      >>> soon = fitted.predict(np.arange(1.0, 11.0) ** -0.5)
      >>> print(f"{soon.value[0]:.2f}, in truth {50**-0.5:.2f}", soon.stop(best=0.03))
      0.14, in truth 0.14 [ True]
    """
    curves = np.asarray(curves, np.float64)
    if curves.ndim != 2 or not curves.shape[1]:
        raise ValueError(f"curves must have shape (runs, steps), got {curves.shape}.")
    columns = columns_of(extra, len(curves))
    score = curves[:, -1] if final is None else np.asarray(final, np.float64)
    if score.shape != curves.shape[:1]:
        raise ValueError(f"final must have one score for each of {len(curves)} runs, got {score.shape}.")
    if regressor is not None and not (hasattr(regressor, "fit") and hasattr(regressor, "predict")):
        raise TypeError(f"regressor must have fit(x, y) and predict(x), got {regressor!r:.80}.")
    good = np.isfinite(np.column_stack([curves, score, *columns.values()])).all(axis=1)
    if good.sum() < _FEWEST:
        raise ValueError(f"curves must hold at least {_FEWEST} finite runs, got {good.sum()}.")
    return Predictor(curves[good], score[good], {k: v[good] for k, v in columns.items()}, regressor)


def features(curves, extra: Mapping | None = None) -> tuple[list[str], np.ndarray]:
    """Eq. (1): names and values of the features of curves observed so far.

    Args:
      curves: shape (runs, t).
      extra: by name, each of shape (runs,).

    Returns:
      Names, and an array of shape (runs, features).

    Raises:
      ValueError: shapes that do not fit.
    """
    curves = np.asarray(curves, np.float64)
    columns = columns_of(extra, len(curves))
    with np.errstate(invalid="ignore"):  # inf - inf
        parts = {"value": curves, "first": np.diff(curves, axis=1), "second": np.diff(curves, 2, axis=1)}
        whole = [*parts.values(), curves.mean(axis=1), curves.std(axis=1), *columns.values()]
    names = [f"{name}_{i}" for name, part in parts.items() for i in range(part.shape[1])]
    return [*names, "mean", "std", *columns], np.column_stack(whole)


def columns_of(extra: Mapping | None, runs: int) -> dict[str, np.ndarray]:
    """What else is known of runs, sorted by name; ValueError where there is not one number for each."""
    columns = {name: np.asarray(value, np.float64) for name, value in sorted((extra or {}).items())}
    columns = {name: c[None] if runs == 1 and not c.ndim else c for name, c in columns.items()}
    for name, column in columns.items():
        if column.shape != (runs,):
            raise ValueError(
                f"extra[{name!r}] must have one number for each of {runs} runs, got {column.shape}."
            )
    return columns


# --- Regressions -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear function of standardised features; ``coef_`` as scikit-learn names it."""

    coef_: np.ndarray
    intercept_: float

    def predict(self, x) -> np.ndarray:
        """Values of rows."""
        return x @ self.coef_ + self.intercept_


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[Ridge, np.ndarray]:
    """Ridge regression and its leave-one-out errors, at the penalty where they are smallest.

    With the intercept not penalised the error of row i is ``(y_i - fitted_i) / (1 - h_i)``, h the diagonal of
    the hat matrix.
    """
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    centre, best = y.mean(), None
    for penalty in _PENALTIES * max(s[0] ** 2, 1e-300):
        shrink = s**2 / (s**2 + penalty)
        fitted = centre + u @ (shrink * (u.T @ (y - centre)))
        hat = 1 / len(y) + (u**2) @ shrink
        errors = (y - fitted) / np.maximum(1 - hat, 1e-12)
        if best is None or np.sum(errors**2) < np.sum(best[1] ** 2):
            best = penalty, errors
    assert best is not None
    coefficients = vt.T @ (s / (s**2 + best[0]) * (u.T @ (y - centre)))
    return Ridge(coefficients, float(centre - x.mean(axis=0) @ coefficients)), best[1]


def _cross_validated(regressor, x: np.ndarray, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """A regressor fitted to all rows, and its errors on rows left out, a fold at a time."""
    errors, folds = np.empty(len(y)), np.arange(len(y)) % min(_FOLDS, len(y))
    for fold in np.unique(folds):
        out = folds == fold
        errors[out] = y[out] - _fitted_copy(regressor, x[~out], y[~out]).predict(x[out])
    return _fitted_copy(regressor, x, y), errors


def _fitted_copy(regressor, x: np.ndarray, y: np.ndarray):
    own = copy.deepcopy(regressor)
    own.fit(x, y)
    return own


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else 0.0
