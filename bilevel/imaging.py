"""Learning regularisers for pictures: total variation, Fields of Experts, and their constants.

With m pictures y_i that are noisy or blurred and c_i that are clean, and phi_nu(t) = sqrt(t^2 + nu^2)::

    inner(x)  = sum_i  1/2 |A x_i - y_i|^2 + ridge/2 |x_i|^2 + R(x_i)                        (1)
    outer(x)  = mean_i 1/2 |x_i - c_i|^2                                                     (2)
    R(x)      = sum_pixels strength (phi_nu(d_down x) + phi_nu(d_right x))                   (3)
    R(x)      = strength sum_k weight_k sum_pixels phi_nu_k(f_k * x)                         (4)

(3) is total variation, (4) a Field of Experts; in denoising A is the identity and ridge 0. Hyperparameters
are in natural units. The papers move their logarithms, as `bilevel.positive` does, and have a factor 1/2
before R that is part of strength here. No border is invented: differences, filters and blurs are taken where
they fit within the picture.

The constants come from ``|phi'| <= 1``, ``|phi''| <= 1 / nu``, ``|phi'''| <= .8587 / nu^2`` (at t = nu / 2),
from the derivative of phi'' by nu, at most ``1 / nu^2``, and for filters f_k with Fourier transforms F f_k
from the bound of their operators K_k on pictures, with any a_k >= 0::

    sum_k a_k |K_k v|^2 <= sup_w sum_k a_k |F f_k(w)|^2 |v|^2                                (5)

On the right stands a trigonometric polynomial of degree size - 1 in either frequency. Its largest value on a
grid of N x N is at least ``cos(pi (size - 1) / N)^2`` times its supremum, which for N = 16 size costs 4%.

For the inverse Hessian, ``|phi'''| <= 1.5 / nu phi''``: along a unit v the Hessian H, at least mu, changes by
at most ``kappa (H - mu)`` with ``kappa = 1.5 max_k |f_k| / nu_k``, whatever the strengths::

    |d H^-1| <= kappa |H^-1 (H - mu) H^-1| <= kappa / (4 mu)                                 (6)

References:
  Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization
  with application to hyperparameter learning", 2025, arXiv:2308.10098.
  Roth and Black, "Fields of Experts", 2009, International Journal of Computer Vision 82.
  Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992, Physica D 60.
  Ehlich and Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", 1964, Mathematische Zeitschrift 86.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.constraints import positive
from bilevel.lift import lift
from bilevel.problem import Problem, Smoothness

# Largest |phi'''| of nu = 1: 1.5 / 1.25^2.5 = .85865.
_THIRD = 0.8587
# Points of the frequency grid of Eq. (5) a filter tap.
_OVERSAMPLING = 16


# --- Regularisers ----------------------------------------------------------------------------------


def total_variation(x, smoothing, weight=1.0) -> jax.Array:
    """Smoothed anisotropic total variation, Eq. (3), of one picture.

    Args:
      x: picture, shape (H, W).
      smoothing: nu, positive, in units of x; total variation itself is the limit 0.
      weight: of the differences from a pixel to the next below and to the right: a number, or one for each
        pixel, shape (H, W). That of the last pixel has no difference to weigh.

    Raises:
      ValueError: x is no single picture, or weight has another shape than it.

    Example:
      >>> import bilevel.imaging, jax.numpy as jnp
      >>> picture = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
      >>> print(f"{bilevel.imaging.total_variation(picture, 1e-6):.4f}")  # an edge two pixels long
      2.0000

    References:
      Rudin, Osher and Fatemi, 1992.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    _single("x", x)
    if weight.shape not in ((), x.shape):
        raise ValueError(f"weight must be a number or of x's shape {x.shape}, got shape {weight.shape}.")
    down, right = _phi(x[1:] - x[:-1], smoothing), _phi(x[:, 1:] - x[:, :-1], smoothing)
    if weight.ndim:
        return jnp.sum(weight[:-1] * down) + jnp.sum(weight[:, :-1] * right)
    return weight * (jnp.sum(down) + jnp.sum(right))


def field_of_experts(x, experts: Mapping[str, Any]) -> jax.Array:
    """The regulariser ``sum_k weight_k sum_pixels sqrt((f_k * x)^2 + smoothing_k^2)`` of one picture.

    Args:
      x: picture, shape (H, W).
      experts: "weight" and "smoothing", positive, shape (K,); "filters", shape (K, size, size), correlated
        with x where they fit. Other entries are ignored.

    Raises:
      TypeError, ValueError: an entry is missing or of another shape; x is smaller than the filters.

    References:
      Roth and Black, 2009.
    """
    x = jnp.asarray(x)
    _single("x", x)
    weight, smoothing, filters = _experts_of(experts, "experts")
    _fits(x, filters, "experts['filters']")
    return jnp.vdot(weight, jnp.sum(_phi(_responses(x, filters), smoothing[None, None]), axis=(0, 1)))


def first_experts(key, filters: int = 48, size: int = 7, dtype=None) -> dict[str, jax.Array]:
    """Hyperparameters of `experts_denoising` to start from; 2,449 numbers by default.

    Filters are Xavier-normal less their mean, weights exp(-3), smoothings exp(-3.5) and the strength 1.

    Args:
      key: of the filters.
      filters: their number K.
      size: their side.
      dtype: default that of JAX's floats.

    Raises:
      TypeError, ValueError: a number that is none, or too small.
    """
    count = validation.whole_number("filters", filters, 1)
    size = validation.whole_number("size", size, 2)
    key = validation.random_key("key", key)
    scale = math.sqrt(2 / (size**2 * (1 + count)))  # of a layer with one channel in and K out
    taps = scale * jax.random.normal(key, (count, size, size), dtype or jnp.result_type(float))
    taps = taps - jnp.mean(taps, axis=(1, 2), keepdims=True)
    return {
        "strength": jnp.ones((), taps.dtype),
        "weight": jnp.full((count,), math.exp(-3), taps.dtype),
        "smoothing": jnp.full((count,), math.exp(-3.5), taps.dtype),
        "filters": taps,
    }


def psnr(x, clean) -> jax.Array:
    """Peak signal-to-noise ratio in decibels of pictures with values in [0, 1].

    Args:
      x: pictures, shape (..., H, W).
      clean: what they should be, same shape.

    Returns:
      ``-10 log10 mean (x - clean)^2`` of each picture, shape (...); infinite where they are equal.

    Raises:
      ValueError: shapes that differ, or are those of no picture.
    """
    x, clean = jnp.asarray(x), jnp.asarray(clean)
    if x.shape != clean.shape or x.ndim < 2:
        raise ValueError(f"x and clean must be pictures of one shape, got {x.shape} and {clean.shape}.")
    return -10 * jnp.log10(jnp.mean((x - clean) ** 2, axis=(-2, -1)))


def blur(x, kernel) -> jax.Array:
    """A picture seen through a kernel, correlated where it fits: shape (H - size + 1, W - size + 1).

    Args:
      x: picture, shape (H, W).
      kernel: shape (size, size).

    Raises:
      ValueError: shapes that are not those, or a kernel larger than the picture.
    """
    x = jnp.asarray(x)
    _single("x", x)
    taps = jnp.asarray(kernel, x.dtype)
    _fits(x, taps[None], "kernel")
    return _responses(x, taps[None])[..., 0]


def _phi(t, smoothing):
    return jnp.sqrt(t**2 + smoothing**2)


def _responses(x, filters):
    """Correlations with K filters, shape (H - size + 1, W - size + 1, K).

    One matrix product of all patches, pixels by taps. On a CPU in float64 its gradients and Hessian-vector
    products take a quarter to a half of the time of those of `jax.lax.conv`.
    """
    count, size, _ = filters.shape
    h, w = x.shape[0] - size + 1, x.shape[1] - size + 1
    patches = jnp.stack([x[i : i + h, j : j + w] for i in range(size) for j in range(size)], axis=-1)
    return jnp.tensordot(patches, filters.reshape(count, -1), ((2,), (1,)))


# --- Problems --------------------------------------------------------------------------------------


def tv_denoising(pictures: int) -> Problem:
    """Learn the two parameters of smoothed total variation, or one strength for each pixel.

    params are m pictures, shape (m, H, W); train and valid both {"noisy": (m, H, W), "clean": (m, H, W)}, of
    which inner reads the noisy and outer the clean. Clean pictures may lack a margin, the same on all sides:
    then the middle of x is judged, away from borders where few filters fit. hparams are {"strength": a number
    or a map (H, W) shared by all pictures, "smoothing": a number}, positive, natural units. The problem has
    the constants of `tv_smoothness`.

    Args:
      pictures: m, which the constants depend on.

    Raises:
      TypeError, ValueError: no whole number; from the losses, pictures of unlike shapes and hparams that
        are not those.
    """
    count = validation.whole_number("pictures", pictures, 1)
    return _stacked(_tv_inner, count, tv_smoothness(count), ("strength", "smoothing"))


def tv_deblurring(pictures: int, kernel, ridge: float = 1e-3) -> Problem:
    """The same for pictures seen through a known blur, "noisy" of shape (m, H - size + 1, W - size + 1).

    The camera saw more than it recorded: params and "clean" are larger than "noisy" by the kernel's reach.

    Args:
      pictures: m.
      kernel: shape (size, size), size odd; see `blur`.
      ridge: of Eq. (1), which makes the inner problem strongly convex where the blur loses everything.

    Raises:
      TypeError, ValueError: as in `tv_denoising`; a kernel that is not square and odd, or not finite.
    """
    count = validation.whole_number("pictures", pictures, 1)
    ridge = validation.number("ridge", ridge, positive=True)
    taps = np.asarray(kernel, float)
    if taps.ndim != 2 or taps.shape[0] != taps.shape[1] or taps.shape[0] % 2 == 0:
        raise ValueError(f"kernel must be square with an odd side, got shape {taps.shape}.")
    if not np.isfinite(taps).all() or not taps.any():
        raise ValueError("kernel must be finite and not zero everywhere.")
    settings = tuple(map(tuple, taps.tolist())), ridge
    largest = float(np.max(_power(taps[None])))  # of A'A, by Eq. (5)
    smoothness = tv_smoothness(count, ridge, largest + ridge)
    return _stacked(_Bound(_deblurring_inner, settings), count, smoothness, ("strength", "smoothing"))


def experts_denoising(pictures: int, peak: float = 2.0) -> Problem:
    """Learn a Field of Experts: its filters, their weights and smoothings, and a strength of all.

    params and data are as in `tv_denoising`. hparams are {"strength": a number, "weight": (K,), "smoothing":
    (K,), "filters": (K, size, size)}, all but the filters positive; `first_experts` makes them. It has the
    constants of `experts_smoothness`.

    Args:
      pictures: m.
      peak: see `experts_smoothness`.

    Raises:
      TypeError, ValueError: as in `tv_denoising`.
    """
    count = validation.whole_number("pictures", pictures, 1)
    smoothness = experts_smoothness(count, peak)
    return _stacked(_experts_inner, count, smoothness, ("strength", "weight", "smoothing"))


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with its last arguments, equal to another one with the same."""

    fn: Callable
    settings: tuple

    def __call__(self, *args):
        return self.fn(*args, *self.settings)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """The inner loss of a stack of as many pictures as the constants are for."""

    fn: Callable
    pictures: int

    def __call__(self, params, hparams, batch):
        for name, stack in (("params", params), ("'noisy'", _noisy(batch))):
            shape: tuple = getattr(stack, "shape", ())
            if len(shape) != 3 or shape[0] != self.pictures:
                raise ValueError(
                    f"{name} must be one array of pictures, shape ({self.pictures}, H, W) with the problem's "
                    f"pictures={self.pictures}, got {shape or type(stack).__name__}."
                )
        return self.fn(params, hparams, batch)


def _stacked(inner: Callable, pictures: int, smoothness: Smoothness, positives: Sequence[str]) -> Problem:
    problem: Any = lift(Problem(inner, _outer, constraints={name: positive() for name in positives}))
    # Outer keeps the form by which the library knows a lifted problem.
    return dataclasses.replace(problem, inner=_Checked(problem.inner, pictures), smoothness=smoothness)


def _noisy(batch):
    if not isinstance(batch, Mapping) or "noisy" not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"train must be a dict with 'noisy' (and 'clean') pictures, got {got}.")
    return batch["noisy"]


def _outer(x, hparams, batch):
    """Eq. (2) of one picture, on the middle of x where "clean" is smaller."""
    del hparams
    clean = batch["clean"]
    margin = max((x.shape[0] - clean.shape[0]) // 2, 0)
    middle = x[margin : x.shape[0] - margin, margin : x.shape[1] - margin]
    if middle.shape != clean.shape:
        raise ValueError(
            f"'clean' pictures must have shape {x.shape}, as params have, or lack the same margin on all "
            f"sides, got {clean.shape}."
        )
    return 0.5 * jnp.sum((middle - clean) ** 2)


def _data_term(x, batch, seen):
    noisy = batch["noisy"]
    if noisy.shape != seen.shape:
        raise ValueError(
            f"'noisy' pictures must have shape {seen.shape} for these params, got {noisy.shape}."
        )
    return 0.5 * jnp.sum((seen - noisy) ** 2)


def _tv_inner(x, hparams, batch):
    return _data_term(x, batch, x) + _variation(x, hparams)


def _deblurring_inner(x, hparams, batch, kernel, ridge):
    seen = blur(x, np.asarray(kernel))
    return _data_term(x, batch, seen) + 0.5 * ridge * jnp.sum(x**2) + _variation(x, hparams)


def _experts_inner(x, hparams, batch):
    strength = _entry(hparams, "hparams", "strength", ((),))
    return _data_term(x, batch, x) + strength * field_of_experts(x, hparams)


def _variation(x, hparams):
    strength = _entry(hparams, "hparams", "strength", ((), x.shape))
    return total_variation(x, _entry(hparams, "hparams", "smoothing", ((),)), strength)


# --- Constants -------------------------------------------------------------------------------------


def tv_smoothness(pictures: int = 1, strong_convexity: float = 1.0, data: float = 1.0) -> Smoothness:
    """Constants of a data term plus total variation, Eq. (1) to (3), as functions of natural hparams.

    With ``|D|^2 <= 8`` of the differences D and c the largest strength, L = data + 8 c / nu. The cross
    derivative has ``8 / nu`` from a strength that is a number, ``4 sqrt 2 / nu`` from a map, and
    ``8 c / nu^2`` from the smoothing. The inverse Hessian has Eq. (6), a difference being of norm sqrt 2.

    Args:
      pictures: m, in Eq. (2).
      strong_convexity: mu of the data term (ridge included).
      data: largest curvature of the data term (ridge included).

    Raises:
      TypeError, ValueError: a number that is none or not positive.
    """
    count = validation.whole_number("pictures", pictures, 1)
    mu = validation.number("strong_convexity", strong_convexity, positive=True)
    data = validation.number("data", data, positive=True)
    return Smoothness(
        mu, _Bound(_tv_curvature, (data,)), 1 / count, _tv_cross, _Bound(_tv_inverse_hessian, (mu,))
    )


def _tv_curvature(hparams, data):
    return data + 8 * jnp.max(hparams["strength"]) / hparams["smoothing"]


def _tv_cross(hparams):
    strength, nu = hparams["strength"], hparams["smoothing"]
    # A map enters as D' diag(phi'(D x)) P with |P| = sqrt 2, and one difference is at most sqrt 2 |v|.
    of_strength = (4 * math.sqrt(2) if jnp.ndim(strength) else 8.0) / nu
    return jnp.hypot(of_strength, 8 * jnp.max(strength) / nu**2)


def _tv_inverse_hessian(hparams, mu):
    return 1.5 * math.sqrt(2) / (4 * mu) / hparams["smoothing"]


def experts_smoothness(pictures: int = 1, peak: float = 2.0) -> Smoothness:
    """Constants of denoising by a Field of Experts, Eq. (1), (2) and (4), as functions of natural hparams.

    All are bounds by Eq. (5) and (6). For the cross derivative by the filters a bound on the pixels of one of
    the two pictures compared is needed too. In a certificate one is the inner solution x*, for which
    ``x* - y = -d R`` gives ``|x*| <= peak + strength sum_k weight_k |f_k|_1`` in every pixel: that constant
    holds for pairs of which one is bounded so.

    Args:
      pictures: m, in Eq. (2).
      peak: bound on the absolute value of the pixels of the noisy pictures.

    Raises:
      TypeError, ValueError: a number that is none or not positive.
    """
    count = validation.whole_number("pictures", pictures, 1)
    peak = validation.number("peak", peak, positive=True)
    return Smoothness(
        1.0, _experts_curvature, 1 / count, _Bound(_experts_cross, (peak,)), _experts_inverse_hessian
    )


def _experts_curvature(hparams):
    power = _power(hparams["filters"])
    return 1 + hparams["strength"] * _supremum(hparams["weight"] / hparams["smoothing"], power)


def _experts_inverse_hessian(hparams):
    norms = jnp.sqrt(jnp.sum(hparams["filters"] ** 2, axis=(1, 2)))
    return 1.5 / 4 * jnp.max(norms / hparams["smoothing"])


def _experts_cross(hparams, peak):
    strength, weight, nu = hparams["strength"], hparams["weight"], hparams["smoothing"]
    filters = hparams["filters"]
    size, power = filters.shape[-1], _power(filters)
    norms = jnp.max(power, axis=(1, 2))  # |K_k|^2
    pixels = peak + strength * jnp.sum(weight * jnp.sum(jnp.abs(filters), axis=(1, 2)))
    of_strength = _supremum(weight / nu, power)
    of_weight = strength * jnp.sqrt(_supremum(norms / nu**2, power))
    of_smoothing = strength * jnp.sqrt(_supremum(weight**2 * norms / nu**4, power))
    # A filter moved by g acts by G' phi'(K x) + K' diag(phi''(K x)) G x with |G| <= size |g|, and G x is at
    # most size |g| pixels. The terms: phi' and phi'' change with K x; G x changes with x.
    changed = weight * (1 / nu + _THIRD * jnp.sqrt(norms) * pixels / nu**2)
    moved = jnp.linalg.norm(weight * jnp.sqrt(norms) / nu)
    of_filters = strength * size * (jnp.sqrt(_supremum(changed**2, power)) + moved)
    return jnp.linalg.norm(jnp.stack([of_strength, of_weight, of_smoothing, of_filters]))


def _power(filters):
    """``|F f_k|^2`` on half the grid, (K, N, N / 2 + 1), raised so that its maximum bounds the supremum."""
    size = filters.shape[-1]
    grid = _OVERSAMPLING * size
    spectrum = jnp.fft.rfft2(jnp.asarray(filters), s=(grid, grid))
    return (spectrum.real**2 + spectrum.imag**2) / math.cos(math.pi * (size - 1) / grid) ** 2


def _supremum(weights, power):
    """The right-hand side of Eq. (5) with non-negative weights."""
    return jnp.max(jnp.tensordot(weights, power, 1))


# --- What is no picture ----------------------------------------------------------------------------


def _single(name: str, x) -> None:
    if x.ndim != 2:
        raise ValueError(f"{name} must be one picture of shape (H, W), got shape {x.shape}; map over stacks.")


def _fits(x, filters, name: str) -> None:
    if min(x.shape) < filters.shape[-1]:
        raise ValueError(f"{name} of side {filters.shape[-1]} do not fit into a picture of shape {x.shape}.")


def _entry(tree, owner: str, name: str, shapes: Sequence[tuple]):
    if not isinstance(tree, Mapping) or name not in tree:
        got = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        raise TypeError(f"{owner} must be a dict with {name!r}, got {got}.")
    value = jnp.asarray(tree[name])
    if value.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{owner}[{name!r}] must have shape {wanted}, got {value.shape}.")
    return value


def _experts_of(tree, owner: str):
    """Weights, smoothings and filters, checked."""
    filters = tree["filters"] if isinstance(tree, Mapping) and "filters" in tree else None
    if filters is None:
        raise TypeError(f"{owner} must be a dict with 'weight', 'smoothing' and 'filters', got {tree!r:.60}.")
    filters = jnp.asarray(filters)
    if filters.ndim != 3 or filters.shape[1] != filters.shape[2]:
        raise ValueError(f"{owner}['filters'] must have shape (K, size, size), got {filters.shape}.")
    counts = (filters.shape[:1],)
    return _entry(tree, owner, "weight", counts), _entry(tree, owner, "smoothing", counts), filters
