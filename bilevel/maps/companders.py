"""Weights as bounded functions of what is trained.

With a curve s, odd and increasing with slope 1 at zero, and numbers a, b > 0::

    w = a s(v / b)                                                                                   (1)

keeps ``|w| < a bound(s)``. A gradient step on v moves w by (dw/dv)^2 times its own gradient: (a / b)^2 near
zero, less at the ends, so that small weights move more easily than large ones. As a = b grow, (1) becomes the
identity. A penalty on v is not one on w. Derivatives, with u = v / b::

    dw/dv = (a / b) s'(u),    dw/da = s(u),    dw/db = -(a u / b) s'(u)                              (2)

References:
  Cakaj, Mehnert and Yang, "Weight compander: a simple weight reparameterization for regularization", 2023,
  arXiv:2306.16993. Only its abstract was read: that its function is the arctangent is recalled and not
  verified.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.maps.values import at, positive, shown
from bilevel.penalties.strengths import laid_out
from bilevel.problem import Params, callable_of
from bilevel.trees import readable


@dataclasses.dataclass(frozen=True, repr=False)
class Curve:
    """The function s of Eq. (1), its inverse, and the bound on ``|s|``; inf where there is none."""

    name: str
    fn: Callable
    inverse: Callable
    bound: float

    def __post_init__(self):
        callable_of("fn", self.fn, "array -> array")
        callable_of("inverse", self.inverse, "array -> array")

    def __repr__(self) -> str:
        return self.name


def arctan() -> Curve:
    """``arctan(u)``, bound pi / 2. Not verified to be that of the paper."""
    return Curve("arctan()", jnp.arctan, jnp.tan, math.pi / 2)


def tanh() -> Curve:
    """``tanh(u)``, bound 1."""
    return Curve("tanh()", jnp.tanh, jnp.arctanh, 1.0)


def softsign() -> Curve:
    """``u / (1 + |u|)``, bound 1."""
    return Curve("softsign()", _softsign, _softsign_inverse, 1.0)


def mu_law(mu: float = 255.0) -> Curve:
    """``sign(u) log(1 + mu |u|) / mu``: it grows without bound, but slowly.

    The mu-law of telephony, scaled to a slope of 1 at zero: for ``|v| <= b`` the weights stay within
    ``a log(1 + mu) / mu``.

    Args:
      mu: positive; that of telephony by default.

    Raises:
      TypeError, ValueError: no positive number.
    """
    mu = validation.number("mu", mu, positive=True)
    return Curve(f"mu_law({mu:g})", _MuLaw(mu, False), _MuLaw(mu, True), math.inf)


@dataclasses.dataclass(frozen=True)
class _MuLaw:
    mu: float
    back: bool

    def __call__(self, u):
        # Not jnp.sign and jnp.abs, whose derivatives at zero are 0: that of an odd function is not.
        sign = jnp.where(u < 0, -1, 1)
        return sign * (jnp.expm1 if self.back else jnp.log1p)(self.mu * sign * u) / self.mu


def _softsign(u):
    return u / (1 + jnp.abs(u))


def _softsign_inverse(s):
    return s / (1 - jnp.abs(s))


class Companded(NamedTuple):
    """What is trained where a and b are learned too: v, and the logarithms of a and b, one for each leaf."""

    weights: Params
    log_a: Params
    log_b: Params


@dataclasses.dataclass(frozen=True, repr=False)
class Compander:
    """See `compander`."""

    curve: Curve
    a: Any
    b: Any
    learned: bool

    def __call__(self, free, hparams) -> Params:
        """Eq. (1)."""
        v, pairs = self._laid_out(free, hparams)
        leaves = [(a * self._inside(self.curve.fn(x / b), x.dtype)).astype(x.dtype) for x, a, b in pairs]
        return jax.tree.unflatten(jax.tree.structure(v), leaves)

    def _inside(self, s, dtype):
        """Values of the curve, within its bound after rounding too, with derivatives as they are.

        In float32 tanh(10) is 1. Two units in the last place cover a product with a and a quotient by it.
        """
        if not math.isfinite(self.curve.bound):
            return s
        limit = self.curve.bound * (1 - 2 * float(jnp.finfo(dtype).eps))
        return s + jax.lax.stop_gradient(jnp.clip(s, -limit, limit) - s)

    def inverse(self, params: Params, hparams):
        """What stands for given weights, such as those of a trained network.

        Raises:
          TypeError: a weight that is not floating; ValueError: one that can be read and is not within the
            bound; nan where it cannot be read.
        """
        params = validation.floating(params, "params")
        free = params
        if self.learned:
            one = [jax.tree.map(lambda x, s=s: jnp.full((), math.log(s), x.dtype), params) for s in self.ends]
            free = Companded(params, *one)
        _, pairs = self._laid_out(free, hparams)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        leaves = []
        for path, (w, a, b) in zip(paths, pairs, strict=True):
            self._check_bound("params" + validation.name_of(path), w, a)
            share = w / a
            share = jnp.where(jnp.abs(share) < self.curve.bound, share, jnp.nan)
            leaves.append((b * self.curve.inverse(share)).astype(w.dtype))
        v = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return free._replace(weights=v) if self.learned else v

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers a and b that learned ones begin at."""
        return float(self.a), float(self.b)

    def _laid_out(self, free, hparams):
        """The weights given, and for each leaf ``(leaf, a, b)``."""
        if self.learned:
            if not isinstance(free, Companded):
                raise TypeError(
                    f"free must be Companded(weights, log_a, log_b), as inverse makes it, got {free!r:.80}."
                )
            v, a, b = free.weights, jax.tree.map(jnp.exp, free.log_a), jax.tree.map(jnp.exp, free.log_b)
        else:
            v, a, b = free, at(self.a, hparams), at(self.b, hparams)
        first, second = laid_out(v, a, 1.0, "a"), laid_out(v, b, 1.0, "b")
        return v, [(x, one, two) for (x, one), (_, two) in zip(first, second, strict=True)]

    def _check_bound(self, name: str, w, a) -> None:
        if readable(w) and readable(a):
            largest = float(np.max(np.abs(np.asarray(w) / np.asarray(a))))
            if not largest < self.curve.bound:
                raise ValueError(
                    f"{name} must lie within a times {self.curve.bound:g}, the bound of {self.curve!r}; its "
                    f"largest entry is {largest:g} a. Take a larger a."
                )

    def __repr__(self) -> str:
        learned = ", learned=True" if self.learned else ""
        return f"compander({self.curve!r}, a={shown(self.a)}, b={shown(self.b)}{learned})"


def compander(curve: Curve, a=1.0, b=1.0, *, learned: bool = False) -> Compander:
    """Weights that a curve bounds, Eq. (1) of the module.

    Args:
      curve: `arctan`, `tanh`, `softsign`, `mu_law`, or a `Curve` of your own.
      a: a positive number; or a function of hparams that returns a positive number, or a tree of them that
        matches params or a prefix of it or names some of its parts (1 elsewhere), each a number or an array
        as the strengths of `bilevel.penalties.l2`. For instance ``lambda hparams: hparams["a"]``.
      b: like ``a``.
      learned: a and b, numbers to begin at, are trained with the weights, a pair for each leaf.

    Returns:
      A map for `bilevel.reparametrize`; ``map.inverse(params, hparams)`` imports weights.

    Raises:
      TypeError, ValueError: no curve, numbers that are not positive, functions of hparams that are to be
        learned with the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import maps
      >>> bounded = maps.compander(maps.tanh(), a=2.0, b=2.0)
      >>> free = bounded.inverse(jnp.array([0.1, 1.9]), None)
      >>> print(f"{free[1]:.2f} {bounded(free, None)[1]:.2f} {bounded(100 * free, None)[1]:.2f}")
      3.66 1.90 2.00
    """
    if not isinstance(curve, Curve):
        raise TypeError(
            "curve must be bilevel.maps.arctan(), tanh(), softsign(), mu_law() or a Curve, got "
            f"{curve!r:.80}."
        )
    if validation.flag("learned", learned) and (callable(a) or callable(b)):
        raise TypeError("a and b are learned with the weights or made of hyperparameters, not both.")
    return Compander(curve, positive("a", a), positive("b", b), learned)
