"""The constants of `bilevel.Smoothness` in closed form, for linear models with L2 penalties.

With n training rows x_i, parameters w and a strength s_j for each of them, a function of hparams, the inner
loss is::

    inner = 1/n sum_i loss(x_i . w, y_i) + 1/2 sum_j s_j(hparams) w_j^2                            (1)

and outer the mean loss over the validation rows v_i. With the extreme eigenvalues l and L of ``X^T X / n``,
``L_v`` the largest of ``V^T V / n_v``, and the Jacobian S of s, the constants are::

    mu    = b_0 l + min s          b_0 = 1 for squares, 0 for the logistic losses                  (2)
    inner = b_2 L + max s          b_2 = 1 squares, 1/4 sigmoid, 1/2 softmax                       (3)
    outer = b_2 L_v                                                                                (4)
    cross = max_j |S_j|            J = diag(w) S, so that |J(w) - J(w')| <= max_j |S_j| |w - w'|   (5)
    inverse_hessian = b_3 min(mean |x|^3, L max |x|) / mu^2                                        (6)

The second derivatives of the losses, as functions of the outputs z, are at most b_2. The third derivative of
logsumexp along a is a third central moment, that of a variable with the values a_k and the softmax for their
probabilities. It is at most ``range^3 / (6 sqrt 3)``, met by two values at the ends of the range, one with
probability (1 - 1 / sqrt 3) / 2. The range of a unit vector is at most ``sqrt 2``, and 1 for a sigmoid, which
is the softmax of (0, z): ``b_3 = sqrt 6 / 9`` and ``1 / (6 sqrt 3)``. A symmetric form of three arguments is
largest where they are equal, so that b_3 bounds the change of the Hessian in any direction.

(5) is the smallest constant that there is, as are (2) and (3) for ridge where all strengths are equal. None
depends on the targets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.problem import HParams, Smoothness
from bilevel.row_norms import row_norms

# Largest second and third derivative of the losses as functions of the model's outputs.
_SECOND = {"squares": 1.0, "sigmoid": 0.25, "softmax": 0.5}
_THIRD = {"sigmoid": 1 / (6 * math.sqrt(3)), "softmax": math.sqrt(6) / 9}


def ridge_smoothness(
    train_features, valid_features, strength: Callable, *, outer: str = "squares"
) -> Smoothness:
    """Constants of ridge regression: Eq. (2) to (5) for ``loss = 1/2 (x . w - y)^2``.

    They hold for several targets too, with a column of params for each and the squares summed over them.

    Args:
      train_features: X, shape (rows, features), floating; a column of ones where there is an intercept.
      valid_features: V, likewise.
      strength: ``hparams -> s``, in natural units; broadcasts to params: a scalar, one for each feature
        (shape (features, 1) for several targets), or one for each entry. Must be hashable, as functions are;
        `jnp.exp` for log-strengths. No other part of inner may read hparams.
      outer: loss of the validation rows, "squares" (halved), "sigmoid" or "softmax" as in
        `logistic_smoothness`; a mean over them, without hparams.

    Returns:
      the constants. ``cross`` costs as many derivatives of strength as there are hyperparameters or
      strengths, the fewer of the two, and one where each strength is made from one hyperparameter entry by
      entry; it needs no more memory than these.

    Raises:
      TypeError, ValueError: features that are no finite floating matrices with the same columns; a strength
        that is no hashable function; an unknown loss.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> smooth = bilevel.ridge_smoothness([[1.0], [2.0]], [[1.0]], jnp.exp)
      >>> print(f"{smooth.strong_convexity(0.0):.2f} {smooth.cross(0.0):.2f} {smooth.outer:.2f}")
      3.50 1.00 1.00
    """
    train, valid = _both(train_features, valid_features)
    _require_strength(strength)
    least, most = _spectrum(train)
    return Smoothness(
        strong_convexity=_Least(strength, least),
        inner=_Most(strength, most),
        outer=_outer(outer, valid),
        cross=_RowNorm(strength),
    )


def logistic_smoothness(
    train_features,
    valid_features,
    strength: Callable,
    classes: int | None = None,
    *,
    outer: str | None = None,
) -> Smoothness:
    """Constants of logistic regression with an L2 penalty: Eq. (2) to (6).

    Without ``classes`` the loss is that of a sigmoid, ``log(1 + exp(-y x . w))`` with params of shape
    (features,) and y in {-1, 1}. With ``classes`` it is the cross entropy of a softmax,
    ``logsumexp(z) - z_y`` with ``z = x . W`` and params of shape (features, classes), two classes included:
    their constants are twice those of a sigmoid and more.

    Args:
      train_features: as in `ridge_smoothness`.
      valid_features: likewise.
      strength: likewise; positive, since strong convexity is its minimum.
      classes: of a softmax; None for a sigmoid.
      outer: loss of the validation rows, "squares", "sigmoid" or "softmax"; the inner one if None.

    Returns:
      the constants; ``cross`` as in `ridge_smoothness`.

    Raises:
      TypeError, ValueError: as `ridge_smoothness`; fewer than two classes.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> smooth = bilevel.logistic_smoothness([[1.0], [2.0]], [[1.0]], jnp.exp)
      >>> print(f"{smooth.inner(0.0):.3f} {smooth.inverse_hessian(0.0):.3f} {smooth.outer:.2f}")
      1.625 0.433 0.25
    """
    train, valid = _both(train_features, valid_features)
    _require_strength(strength)
    link = "sigmoid"
    if classes is not None:
        validation.whole_number("classes", classes, 2)
        link = "softmax"
    _, most = _spectrum(train)
    length = np.linalg.norm(train, axis=1)
    third = _THIRD[link] * min(float(np.mean(length**3)), most * float(length.max()))
    least = _Least(strength, 0.0)
    return Smoothness(
        strong_convexity=least,
        inner=_Most(strength, _SECOND[link] * most),
        outer=_outer(link if outer is None else outer, valid),
        cross=_RowNorm(strength),
        inverse_hessian=_InverseHessian(least, third),
    )


# --- Functions of hparams --------------------------------------------------------------------------------
# Values rather than closures: equal calls make equal constants, so that equal problems share a program.


@dataclasses.dataclass(frozen=True)
class _Least:
    """Eq. (2)."""

    strength: Callable
    base: float

    def __call__(self, hparams: HParams) -> jax.Array:
        return self.base + jnp.min(jnp.asarray(self.strength(hparams)))


@dataclasses.dataclass(frozen=True)
class _Most:
    """Eq. (3)."""

    strength: Callable
    base: float

    def __call__(self, hparams: HParams) -> jax.Array:
        return self.base + jnp.max(jnp.asarray(self.strength(hparams)))


@dataclasses.dataclass(frozen=True)
class _InverseHessian:
    """Eq. (6)."""

    least: _Least
    third: float

    def __call__(self, hparams: HParams) -> jax.Array:
        return self.third / jnp.square(self.least(hparams))


@dataclasses.dataclass(frozen=True)
class _RowNorm:
    """Eq. (5)."""

    strength: Callable

    def __call__(self, hparams: HParams) -> jax.Array:
        return jnp.max(row_norms(self.strength, hparams))


# --- Input -----------------------------------------------------------------------------------------------


def _features(name: str, value) -> np.ndarray:
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, got dtype {array.dtype}; cast it as the loss does.")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must have the shape (rows, features), got {array.shape}.")
    validation.finite(array, name)
    return array.astype(np.float64)


def _both(train_features, valid_features) -> tuple[np.ndarray, np.ndarray]:
    train = _features("train_features", train_features)
    valid = _features("valid_features", valid_features)
    if train.shape[1] != valid.shape[1]:
        raise ValueError(
            f"valid_features must have the columns of train_features, {train.shape[1]}, got {valid.shape[1]}."
        )
    return train, valid


def _require_strength(strength) -> None:
    if not callable(strength):
        raise TypeError(f"strength must be a function of hparams, such as jnp.exp, got {strength!r}.")
    try:
        hash(strength)
    except TypeError:
        raise TypeError(f"strength must be hashable, as functions are, got {strength!r}.") from None


def _spectrum(features: np.ndarray) -> tuple[float, float]:
    """Extreme eigenvalues of ``X^T X / rows``, moved apart by what rounding can have done to them."""
    rows, columns = features.shape
    wide = columns > rows
    gram = (features @ features.T if wide else features.T @ features) / rows
    eigenvalues = np.linalg.eigvalsh(gram)
    slack = max(rows, columns) * np.finfo(np.float64).eps * eigenvalues[-1]
    least = 0.0 if wide else max(0.0, float(eigenvalues[0] - slack))
    return least, float(eigenvalues[-1] + slack)


def _outer(loss: str, valid: np.ndarray) -> float:
    """Eq. (4)."""
    if loss not in _SECOND:
        raise ValueError(f"outer must be one of {', '.join(map(repr, _SECOND))}, got {loss!r}.")
    return _SECOND[loss] * _spectrum(valid)[1]
