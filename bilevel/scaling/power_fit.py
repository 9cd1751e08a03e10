"""How a loss falls with scale: least squares of eq. (1) of `bilevel.scaling`, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np

from bilevel import validation

_LOSSES = "log", "huber", "squared"
_NAMES = "floor", "amplitude", "exponent"
_EXPONENTS = 0.01, 10.0
_GRID, _GOLDEN = 40, 36
# Gauss-Newton steps in logarithms: residuals are small, and weights of Huber's loss settle more slowly.
_STEPS = {"log": 4, "huber": 8}
# Residuals beyond so many robust standard deviations have less weight.
_HUBER = 1.345


@dataclasses.dataclass(frozen=True, repr=False)
class PowerFit:
    """Eq. (1) as `fit` found it.

    ``floor``: E; ``amplitude``: A; ``exponent``: alpha. ``residual``: standard deviation of what it does not
    explain, relative where the fit is in logarithms. ``draws``: the same three of each bootstrap sample,
    shape (draws, 3); empty where there are as many points as parameters: nothing is known of the noise.
    """

    floor: float
    amplitude: float
    exponent: float
    residual: float
    draws: np.ndarray

    def predict(self, x) -> np.ndarray:
        """The curve at scales of any shape."""
        x = np.asarray(x, np.float64)
        return self.floor + self.amplitude * x**-self.exponent

    def interval(self, x, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of y(x), the curve and not a new noisy point of it; nan without draws."""
        x = np.asarray(x, np.float64)
        floor, amplitude, exponent = self.draws.T.reshape(3, -1, *[1] * x.ndim)
        return _ends(floor + amplitude * x[None] ** -exponent, level)

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Ends of the interval of each parameter, by name; nan without draws."""
        low, high = _ends(self.draws, level)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(_NAMES)}

    def flattens(
        self, *, fraction: float | None = None, amount: float | None = None, level: float = 0.9
    ) -> tuple[float, float, float]:
        """The scale beyond which little is left to gain, and the ends of its interval.

        Args:
          fraction: what ``A / x^alpha`` may be of y(x) at most, between 0 and 1; or
          amount: what it may be itself.
          level: of the interval.

        Returns:
          ``(x, low, high)``; inf where a floor of zero leaves all of y reducible.

        Raises:
          TypeError, ValueError: both or none given, out of range.
        """
        if (fraction is None) == (amount is None):
            raise ValueError("flattens needs fraction= or amount=, and not both.")
        if fraction is None:
            left = validation.number("amount", amount, positive=True)
            share = None
        else:
            share = validation.number("fraction", fraction, positive=True, below=1.0)

        def where(floor, amplitude, exponent):
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                target = left if share is None else np.maximum(floor, 0) * share / (1 - share)
                return np.where(amplitude > 0, np.exp(np.log(amplitude / target) / exponent), 0.0)

        low, high = _ends(where(*self.draws.T), level)
        return float(where(self.floor, self.amplitude, self.exponent)), float(low), float(high)

    def __repr__(self) -> str:
        return f"PowerFit({self.floor:.4g} + {self.amplitude:.4g} / x^{self.exponent:.4g})"


def fit(x, y, *, loss: str = "log", lowest: float = 0.0, bootstrap: int = 200, seed: int = 0) -> PowerFit:
    """Fit eq. (1) to measured points.

    Intervals are percentiles of a bootstrap of the residuals, which are enlarged by ``sqrt(n / (n - 3))`` for
    what three parameters take away; each sample has a size of noise of its own, ``sqrt((n - 3) / chi^2)`` of
    the estimated one, as in Student's t. With fewer than 8 points they are still too narrow. They know of
    noise that is alike at all points, and of nothing else: not of a curve that is no power law beyond the
    points. Exponents are sought from 0.01 to 10, with a RuntimeWarning where the best is at an end.

    Args:
      x: scales, positive, shape (n,); at least three different ones.
      y: losses there, shape (n,); positive but for ``loss="squared"``.
      loss: "log": least squares of ``log y``; "huber": the same, less sensitive to single points that are
        far off; "squared": least squares of y.
      lowest: the floor E is at least this; not negative but for ``loss="squared"``, where ``-inf`` allows
        any.
      bootstrap: samples for the intervals.
      seed: of the bootstrap.

    Raises:
      TypeError, ValueError: fewer points than parameters, numbers out of range, losses that do not fall.

    Example:
      >>> import bilevel, numpy as np
      >>> x = np.array([1.0, 2, 4, 8, 16, 32])
      >>> fit = bilevel.scaling.fit(x, 3.0 + 2.0 / x**0.5)
      >>> print(fit, f"{fit.predict(100):.2f}", f"{fit.flattens(amount=0.1)[0]:.0f}")
      PowerFit(3 + 2 / x^0.5) 3.20 400
    """
    loss = validation.one_of("loss", loss, _LOSSES)
    bootstrap = validation.whole_number("bootstrap", bootstrap, 1)
    x, y, unit, lowest = _points(x, y, loss, lowest)
    floor, amplitude, exponent = (p[0] for p in _fitted(x, y[None], loss, lowest))
    if amplitude <= 1e-9 * np.ptp(y):
        raise ValueError("y does not fall with x: no power law with a positive amplitude fits.")
    if not 1.00001 * _EXPONENTS[0] < exponent < 0.99999 * _EXPONENTS[1]:
        warnings.warn(
            f"the exponent is at an end of the range searched, {_EXPONENTS[0]:g} to {_EXPONENTS[1]:g}: "
            "the points are no power law with a floor, or do not tell which.",
            RuntimeWarning,
            stacklevel=2,
        )
    model = floor + amplitude * x**-exponent
    residuals = y - model if loss == "squared" else np.log(y / model)
    draws, sd = np.zeros((0, 3)), float("nan")
    if len(x) > 3:
        residuals = residuals * np.sqrt(len(x) / (len(x) - 3))
        sd = float(np.sqrt(np.mean(residuals**2)))
        rng = np.random.default_rng(seed)
        drawn = rng.choice(residuals - residuals.mean(), (bootstrap, len(x)))
        drawn *= np.sqrt((len(x) - 3) / rng.chisquare(len(x) - 3, (bootstrap, 1)))
        again = model + drawn if loss == "squared" else model * np.exp(drawn)
        draws = _natural(np.stack(_fitted(x, again, loss, lowest), axis=1), unit)
    floor, amplitude, exponent = _natural(np.array([[floor, amplitude, exponent]]), unit)[0]
    return PowerFit(float(floor), float(amplitude), float(exponent), sd, draws)


def _natural(parameters: np.ndarray, unit: float) -> np.ndarray:
    """Amplitudes for x in its own unit."""
    floor, amplitude, exponent = parameters.T
    return np.stack([floor, amplitude * unit**exponent, exponent], axis=1)


def _points(x, y, loss: str, lowest) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Points in float64, x in units of its geometric mean, that unit, and the lower end of the floor."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be vectors of one length, got shapes {x.shape} and {y.shape}.")
    for name, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}.")
    if len(np.unique(x)) < 3:
        raise ValueError(
            f"x must have at least 3 different scales for the 3 parameters of E + A / x^alpha, got "
            f"{len(np.unique(x))}."
        )
    if (x <= 0).any():
        raise ValueError(f"x must be positive, got {x.min():g}.")
    if loss != "squared" and (y <= 0).any():
        raise ValueError(f'y must be positive, got {y.min():g}; loss="squared" takes any.')
    if loss == "squared" and lowest == -math.inf:
        bound = -math.inf
    else:
        bound = validation.number("lowest", lowest, minimum=None if loss == "squared" else 0.0)
    unit = float(np.exp(np.log(x).mean()))
    return x / unit, y, unit, bound


def _fitted(x, y, loss: str, lowest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floor, amplitude and exponent of each row of y, shape (rows, n); x is in units of its mean."""

    def misfit(log_alpha):
        return _rest(x, y, np.exp(log_alpha), loss, lowest)[2]

    grid = np.linspace(math.log(_EXPONENTS[0]), math.log(_EXPONENTS[1]), _GRID)
    found = np.stack([misfit(np.full(len(y), point)) for point in grid])
    at = np.argmin(found, axis=0)
    low, high = grid[np.maximum(at - 1, 0)], grid[np.minimum(at + 1, _GRID - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = misfit(a), misfit(b)
    for _ in range(_GOLDEN):
        left = at_a <= at_b
        low, high = np.where(left, low, a), np.where(left, b, high)
        new = np.where(left, high - ratio * (high - low), low + ratio * (high - low))
        at_new = misfit(new)
        a, b = np.where(left, new, b), np.where(left, a, new)
        at_a, at_b = np.where(left, at_new, at_b), np.where(left, at_a, at_new)
    exponent = np.exp((low + high) / 2)
    floor, amplitude, _ = _rest(x, y, exponent, loss, lowest)
    return floor, amplitude, exponent


def _rest(x, y, alpha: np.ndarray, loss: str, lowest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For an alpha of each row the best floor and amplitude, and the loss there.

    In logarithms by Gauss-Newton: ``log m`` is linearised where it stands, so that every step is weighted
    linear least squares.
    """
    basis = x ** -alpha[:, None]
    floor, amplitude = _linear(basis, y, np.ones_like(y), lowest)
    if loss == "squared":
        return floor, amplitude, np.sum((y - floor[:, None] - amplitude[:, None] * basis) ** 2, axis=1)
    tiny = 1e-12 * y.min(axis=1, keepdims=True)
    for _ in range(_STEPS[loss]):
        model = np.maximum(floor[:, None] + amplitude[:, None] * basis, tiny)
        residual = np.log(y / model)
        weight = _huber_weight(residual) if loss == "huber" else 1.0
        floor, amplitude = _linear(basis, model * (1 + residual), weight / model**2, lowest)
    model = np.maximum(floor[:, None] + amplitude[:, None] * basis, tiny)
    residual = np.log(y / model)
    return floor, amplitude, np.sum(_huber(residual) if loss == "huber" else residual**2, axis=1)


def _linear(basis, target, weight, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of ``floor + amplitude basis`` by rows; floor >= lowest, amplitude >= 0."""
    total = weight.sum(axis=1)
    mean_b, mean_t = (weight * basis).sum(axis=1) / total, (weight * target).sum(axis=1) / total
    away = basis - mean_b[:, None]
    amplitude = (weight * away * target).sum(axis=1) / (weight * away**2).sum(axis=1)
    amplitude = np.maximum(amplitude, 0)
    floor = mean_t - amplitude * mean_b
    if lowest > -math.inf:
        bound = (weight * basis * (target - lowest)).sum(axis=1) / (weight * basis**2).sum(axis=1)
        amplitude = np.where(floor < lowest, np.maximum(bound, 0), amplitude)
        floor = np.maximum(floor, lowest)
    return floor, amplitude


def _cut(residual) -> np.ndarray:
    spread = np.median(np.abs(residual), axis=1, keepdims=True) / 0.6745
    return np.maximum(_HUBER * spread, 1e-12)


def _huber_weight(residual) -> np.ndarray:
    return np.minimum(1, _cut(residual) / np.maximum(np.abs(residual), 1e-300))


def _huber(residual) -> np.ndarray:
    cut, size = _cut(residual), np.abs(residual)
    return np.where(size <= cut, residual**2, cut * (2 * size - cut))


def _ends(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles along the first axis."""
    level = validation.number("level", level, positive=True, below=1.0)
    if not len(draws):
        nothing = np.full(draws.shape[1:], np.nan)
        return nothing, nothing
    # No interpolation: some may be infinite.
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    return ends[0], ends[1]
