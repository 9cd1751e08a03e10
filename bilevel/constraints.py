"""Natural units outside, free units inside.

A user writes and reads hyperparameters in natural units: a weight decay is a positive number, a dropout
rate lies between 0 and 0.9. The outer update moves *free* units ``u``, in which every value is allowed,
and its gradient is pulled back by the derivative of the map ``hparams = to_natural(u)``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.trees import readable, spread


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Where one hyperparameter leaf lives. This one: anywhere; free units are the natural ones."""

    def to_free(self, value):
        """Free units of a value in natural units, same shape and dtype."""
        return value

    def to_natural(self, free):
        """Natural units, never on a bound that the constraint excludes."""
        return free

    def project(self, free, previous):
        """What the outer update may store, given what it proposes and what stood before."""
        del previous
        return free

    def reduced_gradient(self, free, grad):
        """The part of a gradient in free units that a small step can follow."""
        del free
        return grad

    def stretch(self, free):
        """An upper bound on the norm of the derivative of ``to_natural``; a scalar."""
        _, slope = jax.jvp(self.to_natural, (free,), (jnp.ones_like(free),))  # entry by entry
        return jnp.max(jnp.abs(slope))

    def why_not(self, value: np.ndarray) -> str | None:
        """Why a start value is not allowed, or None."""
        del value
        return None

    def __repr__(self) -> str:
        fields = ", ".join(f"{getattr(self, f.name):g}" for f in dataclasses.fields(self))
        return f"{type(self).__name__.lower()}({fields})"


@dataclasses.dataclass(frozen=True, repr=False)
class Real(Constraint):
    """See `real`."""


@dataclasses.dataclass(frozen=True, repr=False)
class Positive(Constraint):
    """See `positive`."""

    def to_free(self, value):
        return jnp.log(value)

    def to_natural(self, free):
        limits = jnp.finfo(free.dtype)
        ends = np.log([float(limits.tiny), float(limits.max)]).astype(free.dtype)
        lo, hi = np.nextafter(ends, np.zeros(2, free.dtype))
        return jnp.exp(jnp.clip(free, lo, hi))

    def why_not(self, value):
        return None if np.all(value > 0) else "must be greater than 0"


@dataclasses.dataclass(frozen=True, repr=False)
class Interval(Constraint):
    """See `interval`."""

    lo: float
    hi: float

    def to_free(self, value):
        return jnp.log(value - self.lo) - jnp.log(self.hi - value)

    def to_natural(self, free):
        return _logistic(free, self.lo, self.hi)

    def why_not(self, value):
        lo, hi = (np.asarray(end, value.dtype) for end in (self.lo, self.hi))
        inside = np.all((value > lo) & (value < hi))
        return (
            None
            if inside
            else (
                f"must lie strictly between {self.lo:g} and {self.hi:g}, whose ends an interval cannot "
                "reach (bilevel.box can)"
            )
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Box(Constraint):
    """See `box`."""

    lo: float
    hi: float

    def project(self, free, previous):
        del previous
        return jnp.clip(free, self.lo, self.hi)

    def reduced_gradient(self, free, grad):
        return free - jnp.clip(free - grad, self.lo, self.hi)

    def why_not(self, value):
        inside = np.all((value >= self.lo) & (value <= self.hi))
        return None if inside else f"must lie between {self.lo:g} and {self.hi:g}"


@dataclasses.dataclass(frozen=True, repr=False)
class Fixed(Constraint):
    """See `fixed`."""

    def project(self, free, previous):
        del free
        return previous

    def reduced_gradient(self, free, grad):
        del free
        return jnp.zeros_like(grad)


@dataclasses.dataclass(frozen=True, repr=False)
class Simplex(Constraint):
    """See `simplex`."""

    def to_free(self, value):
        logits = jnp.log(value)
        return logits - jnp.mean(logits)

    def to_natural(self, free):
        tiny = jnp.finfo(free.dtype).tiny
        weights = jnp.exp(jax.nn.log_softmax(free.reshape(-1))).reshape(free.shape)
        return jnp.maximum(weights, tiny)

    def project(self, free, previous):
        del previous
        return free - jnp.mean(free)

    def reduced_gradient(self, free, grad):
        del free
        return grad - jnp.mean(grad)

    def stretch(self, free):
        # diag(p) - p p^T has no eigenvalue above that of p = (1/2, 1/2).
        return jnp.full((), 0.5, free.dtype)

    def why_not(self, value):
        value = value.astype(np.float64)
        if not np.all(value > 0):
            return "must have entries greater than 0"
        close = abs(value.sum() - 1) <= 1e-5
        return None if close else f"must sum to 1, sums to {value.sum():g}"


@dataclasses.dataclass(frozen=True, repr=False)
class Integer(Constraint):
    """See `integer`."""

    lo: int
    hi: int

    def to_free(self, value):
        lo, hi = self._ends
        return jnp.log(value - lo) - jnp.log(hi - value)

    def to_natural(self, free):
        between = _logistic(free, *self._ends)
        whole = jnp.clip(jnp.round(between), self.lo, self.hi)
        # The derivative is that of the number before rounding: what acts through a response needs one.
        return between + jax.lax.stop_gradient(whole - between)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.lo - 0.5, self.hi + 0.5

    def why_not(self, value):
        fits = np.all((value >= self.lo) & (value <= self.hi) & (value == np.round(value)))
        return None if fits else f"must be a whole number from {self.lo} to {self.hi}"


def real() -> Constraint:
    """Any real number: free units are the natural ones. What is not named is `real`."""
    return Real()


def positive() -> Constraint:
    """Greater than zero: natural = exp(free).

    Example:
      >>> import bilevel
      >>> bilevel.positive()
      positive()
    """
    return Positive()


def interval(lo: float, hi: float) -> Constraint:
    """Strictly between two finite ends: natural = lo + (hi - lo) sigmoid(free).

    Args:
      lo: lower end, below ``hi``; natural units.
      hi: upper end.

    Raises:
      ValueError: the ends are reversed, equal or not finite.
    """
    return Interval(*_ends("interval", lo, hi))


def box(lo: float, hi: float) -> Constraint:
    """Between two ends that can be reached: the outer update is projected onto ``[lo, hi]``.

    Args:
      lo: lower end, may be ``-inf``; natural units.
      hi: upper end, may be ``inf``.

    Raises:
      ValueError: the ends are reversed, equal or nan.
    """
    return Box(*_ends("box", lo, hi, infinite=True))


def fixed() -> Constraint:
    """Not tuned, but traced: a value that may change between runs without recompiling."""
    return Fixed()


def simplex() -> Constraint:
    """Positive entries that sum to one, over all entries of the leaf: natural = softmax(free).

    The free units are n logits whose mean is projected out, so that they stay bounded.
    """
    return Simplex()


def integer(lo: int, hi: int) -> Constraint:
    """Whole numbers from ``lo`` to ``hi``, both included, as floats that the losses see rounded.

    Natural = round(lo - 1/2 + (hi - lo + 1) sigmoid(free)): free units move on between two numbers. No method
    that differentiates the losses by hyperparameters takes it; `bilevel.stn` and `bilevel.delta_stn`, which
    learn how params respond, do.

    Args:
      lo: smallest value, a whole number.
      hi: largest value.

    Raises:
      TypeError: an end is no whole number; ValueError: the ends are reversed or equal.

    Example:
      >>> import bilevel
      >>> bilevel.integer(0, 3)  # holes that are cut out of an image
      integer(0, 3)
    """
    for name, end in (("lo", lo), ("hi", hi)):
        if isinstance(end, bool) or not isinstance(end, (int, np.integer)):
            raise TypeError(f"{name} of integer must be a whole number, got {end!r}.")
    _ends("integer", lo, hi)
    return Integer(int(lo), int(hi))


def _ends(name: str, lo, hi, infinite: bool = False) -> tuple[float, float]:
    try:
        if isinstance(lo, str) or isinstance(hi, str):
            raise TypeError
        ends = float(lo), float(hi)
    except (TypeError, ValueError):
        raise TypeError(f"{name} takes two numbers, got {lo!r} and {hi!r}.") from None
    if not ends[0] < ends[1]:
        raise ValueError(f"{name} needs lo < hi, got lo={ends[0]:g} and hi={ends[1]:g}.")
    if not infinite and not all(map(math.isfinite, ends)):
        raise ValueError(f"{name} needs finite ends, got {ends[0]:g} and {ends[1]:g}.")
    return ends


@jax.custom_jvp
def _unit_logistic(free):
    return jax.nn.sigmoid(free)


@_unit_logistic.defjvp
def _unit_logistic_jvp(primals, tangents):
    (free,), (tangent,) = primals, tangents
    # sigmoid (1 - sigmoid) rounds to 0 long before sigmoid(u) sigmoid(-u) does.
    return _unit_logistic(free), tangent * _unit_logistic(free) * _unit_logistic(-free)


def _logistic(free, lo: float, hi: float):
    dtype = free.dtype
    tiny = np.asarray(jnp.finfo(dtype).tiny, dtype)
    inner_lo = np.nextafter(np.asarray(lo, dtype), np.asarray(hi, dtype))
    inner_hi = np.nextafter(np.asarray(hi, dtype), np.asarray(lo, dtype))
    inner_lo, inner_hi = (tiny if lo == 0 else inner_lo), (-tiny if hi == 0 else inner_hi)
    natural = lo + (hi - lo) * _unit_logistic(free)
    # Clipped one ulp inside (float32 sigmoid(17.5) is 1) without cutting the derivative, so that a
    # saturated hyperparameter can still come back.
    return natural + jax.lax.stop_gradient(jnp.clip(natural, inner_lo, inner_hi) - natural)


@dataclasses.dataclass(frozen=True)
class BoundConstraints:
    """The constraints of one problem, laid out over the leaves of its hparams; hashable."""

    leaves: tuple[Constraint, ...]
    treedef: Any

    def _map(self, method: str, *trees):
        flat = [self.treedef.flatten_up_to(tree) for tree in trees]
        mapped = [getattr(c, method)(*xs) for c, *xs in zip(self.leaves, *flat, strict=True)]
        return jax.tree.unflatten(self.treedef, mapped)

    def to_free(self, hparams):
        return self._map("to_free", hparams)

    def to_natural(self, free):
        return self._map("to_natural", free)

    def project(self, free, previous):
        return self._map("project", free, previous)

    def pull_back(self, free, grad):
        """Gradient in free units of a gradient in natural units; zero for what is not tuned."""
        _, vjp = jax.vjp(self.to_natural, free)
        return self.only_tuned(vjp(grad)[0])

    def only_tuned(self, grad):
        """A gradient with zeros for what is not tuned."""
        mask = [
            jnp.zeros_like(g) if isinstance(c, Fixed) else g
            for c, g in zip(self.leaves, self.treedef.flatten_up_to(grad), strict=True)
        ]
        return jax.tree.unflatten(self.treedef, mask)

    def free_gradient(self, free, estimate):
        """That of an estimate, in free units."""
        given = estimate.free_grad
        return self.pull_back(free, estimate.grad) if given is None else given

    def grad_norm(self, free, free_grad):
        """Euclidean norm over all leaves of what a small step can follow; a scalar."""
        reduced = self._map("reduced_gradient", free, free_grad)
        return jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(reduced)))

    def stretch(self, free):
        """How much longer than in natural units a gradient in free units is at most; a scalar."""
        moving = [
            c.stretch(x)
            for c, x in zip(self.leaves, self.treedef.flatten_up_to(free), strict=True)
            if not isinstance(c, Fixed)
        ]
        return functools.reduce(jnp.maximum, moving, jnp.zeros(()))

    def check(self, hparams) -> None:
        """Raise ValueError where a concrete start value is outside its constraint."""
        paths = jax.tree_util.tree_flatten_with_path(hparams)[0]
        for (path, value), constraint in zip(paths, self.leaves, strict=True):
            if not readable(value):
                continue
            why = constraint.why_not(np.asarray(value))
            if why:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"hparams{name} {why}, got {_short(value)}.")


def bind(spec, hparams) -> BoundConstraints:
    """Lay a specification (see `bilevel.Problem`) out over the leaves of hparams.

    Raises:
      ValueError: a name or a structure that hparams do not have.
    """
    leaves = spread(
        spec.tree() if hasattr(spec, "tree") else spec,
        hparams,
        Real(),
        lambda x: isinstance(x, Constraint),
        "constraints",
        "hparams",
    )
    return BoundConstraints(tuple(leaves), jax.tree.structure(hparams))


def _short(value) -> str:
    array = np.asarray(value)
    return f"{array:g}" if array.ndim == 0 else f"values from {array.min():g} to {array.max():g}"
