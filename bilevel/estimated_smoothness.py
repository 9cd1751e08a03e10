"""The constants of `bilevel.Smoothness` for any problem, estimated at random points.

At points w within a ball around the params given, with T the third derivative of inner by params and M that
of inner by params, params and hparams::

    mu, inner       = extreme eigenvalues of d^2_params inner                 (1)
    outer           = max of d^2_params outer [a, b]            (2)
    direct          = max of d_params d_hparams outer [a, v]                  (3)
    cross           = max of M [a, b, v]                                      (4)
    inverse_hessian = (max of T [a, b, c]) / mu^2                             (5)

over unit vectors a, b, c, v. (4) is the limit of ``|(J(w') - J(w))^T b| / (|b| |w' - w|)``: on a ball the
Lipschitz constant of a derivative is the largest norm of the next one. Each maximum is climbed in its vectors
by turns, as in power iteration, which comes from below and may end at a local one, and the points are a
sample: the constants are multiplied by a safety factor, and remain estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import data, validation
from bilevel.constraints import bind
from bilevel.problem import Problem, Smoothness, inner_value, outer_value

# Up to this many params the Hessian is formed; beyond, so many steps of Lanczos' method.
_DENSE, _LANCZOS = 128, 64
# Rounds over the vectors of Eq. (2) to (5), and random starts at each point.
_ROUNDS, _STARTS = 30, 3


class _Found(NamedTuple):
    """At each point; ``unresolved`` is how far below ``lowest`` the smallest eigenvalue may be."""

    lowest: jax.Array
    unresolved: jax.Array
    highest: jax.Array
    outer: jax.Array
    direct: jax.Array
    cross: jax.Array
    third: jax.Array


def estimate_smoothness(
    problem: Problem,
    params,
    hparams,
    train,
    valid,
    *,
    key,
    samples: int = 16,
    radius: float = 1.0,
    spread: float = 0.0,
    safety: float = 1.5,
) -> Smoothness:
    """Constants of a problem's losses near given params and hparams, estimated by Eq. (1) to (5).

    They are numbers, for the hyperparameters sampled: those given, or with ``spread`` those around them, the
    worst of which counts. `bilevel.maid` moves hyperparameters: let ``spread`` cover where they will go (its
    accuracy is judged by the smallest mu met), or estimate anew where they have left it. With the constants
    of its start alone it stalls, or trusts bounds that do not hold. To estimate at every step would cost
    hundreds of Hessian products a step.

    A bound made of them is an estimate: ``error_kind`` is "estimated". Where constants are known,
    `bilevel.ridge_smoothness`, `bilevel.logistic_smoothness` or a derivation by hand are better; a single one
    that is known goes in by ``dataclasses.replace``.

    Each point costs at most 128 products with the inner Hessian, 360 second derivatives of outer and 540
    third derivatives of inner, of all rows, and the memory of 64 copies of params.

    Args:
      problem: a `bilevel.Problem` without model state; inner is three times differentiable where sampled.
      params: centre of the ball, best (near) the inner solution.
      hparams: natural units.
      train: as in `bilevel.hypergradient`; used whole.
      valid: likewise.
      key: of points and starts.
      samples: number of points; the first is the centre.
      radius: of the ball, in the units of params; the inner solution and all iterates should be in it.
      spread: how far each entry of hparams is moved at most, in free units: of a positive one by a factor
        of ``exp(spread)``.
      safety: factor on every constant, and on 1 / mu; at least 1.

    Raises:
      TypeError, ValueError: a `bilevel.FixedPoint`, model state, losses that do not fit or are not finite,
        settings out of range; an inner loss that is not strongly convex at a point sampled, or so
        ill-conditioned that its smallest eigenvalue is not found.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, x: 0.5 * (w - x) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, x: 0.5 * (w - x) ** 2,
      ... )
      >>> at = jnp.array(1.0), jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)
      >>> found = bilevel.estimate_smoothness(problem, *at, key=jax.random.key(0), safety=1.0)
      >>> print(f"{found.strong_convexity:.2f} {found.inner:.2f} {found.outer:.2f} {found.cross:.2f}")
      2.00 2.00 1.00 1.00
    """
    validation.kind("problem", problem, "a problem")
    if not isinstance(problem, Problem):
        raise TypeError("problem must be a bilevel.Problem: a FixedPoint has no inner loss.")
    if problem.has_state:
        raise ValueError("problem has has_state=True: estimate the constants of one without model state.")
    key = validation.random_key("key", key)
    samples = validation.whole_number("samples", samples, 1)
    radius = validation.number("radius", radius, minimum=0.0)
    spread = validation.number("spread", spread, minimum=0.0)
    safety = validation.number("safety", safety, minimum=1.0)
    params, hparams = validation.floating(params, "params"), validation.floating(hparams, "hparams")
    validation.finite(params, "params")
    validation.finite(hparams, "hparams")
    bound = bind(problem.constraints, hparams)
    bound.check(hparams)
    train, valid = (
        data.whole_source(data.as_source(source, name), name).whole(key)
        for source, name in ((train, "train"), (valid, "valid"))
    )
    validation.losses(problem, params, hparams, train, valid)

    free, unravel_free = ravel_pytree(bound.to_free(hparams))

    @jax.jit
    def at_points(params, free, train, valid):
        centre, unravel = ravel_pytree(params)

        def one(i):
            key_w, key_h, key_start = jax.random.split(jax.random.fold_in(key, i), 3)
            off_centre = jnp.where(i == 0, 0, 1)
            w = centre + off_centre * _in_ball(key_w, centre, radius)
            shift = jax.random.uniform(key_h, free.shape, free.dtype, -spread, spread)
            moved = bound.project(unravel_free(free + off_centre * shift), unravel_free(free))
            h, unravel_h = ravel_pytree(bound.to_natural(moved))

            def inner(w, h):
                return inner_value(problem, unravel(w), unravel_h(h), train, None)[0]

            def outer(w, h):
                return outer_value(problem, unravel(w), unravel_h(h), valid, None)[0]

            return _at(inner, outer, w, h, key_start)

        return jax.lax.map(one, jnp.arange(samples))

    return _judged(at_points(params, free, train, valid), safety)


def _judged(found: _Found, safety: float) -> Smoothness:
    """The worst of all points, times the safety factor."""
    worst = {name: float(jnp.max(values)) for name, values in found._asdict().items()}
    lowest, resolved = float(jnp.min(found.lowest)), float(jnp.min(found.lowest - found.unresolved))
    for name, value in (*worst.items(), ("lowest", lowest)):
        if not jnp.isfinite(value):
            at = "outer" if name in ("outer", "direct") else "inner"
            raise ValueError(
                f"{at} has derivatives that are not finite at a point sampled; reduce radius or spread."
            )
    if lowest <= 0:
        raise ValueError(
            f"problem: inner is not strongly convex: its Hessian has the eigenvalue {lowest:.3g} at a point "
            "sampled. Add an L2 penalty, or take a smaller radius if the inner solution is in it."
        )
    if resolved <= 0:
        raise ValueError(
            "problem: inner is so ill-conditioned that the smallest eigenvalue of its Hessian is not found: "
            f"it is at most {lowest:.3g}, the largest {worst['highest']:.3g}. Write bilevel.Smoothness by "
            "hand; a penalty's strength is a lower bound."
        )
    mu = resolved / safety
    return Smoothness(
        strong_convexity=mu,
        inner=safety * worst["highest"],
        outer=safety * worst["outer"],
        cross=safety * worst["cross"],
        inverse_hessian=safety * worst["third"] / mu**2,
        direct=safety * worst["direct"],
        estimated=True,
    )


def _at(inner: Callable, outer: Callable, w, h, key) -> _Found:
    """Eq. (1) to (5) at one point; losses of flat params and hparams."""

    def matvec(v):
        return jax.jvp(lambda w: jax.grad(inner)(w, h), (w,), (v,))[1]

    def largest(loss, *by: int):
        """Of the derivative of a loss, ``by`` 0 in params and 1 in hparams."""

        def form(*vectors):
            derived = loss
            for i, vector in zip(by, vectors, strict=True):
                derived = _along(derived, i, vector)
            return derived(w, h)

        def climbed(key):
            keys = jax.random.split(key, len(by))
            starts = [_unit(k, (w, h)[i]) for k, i in zip(keys, by, strict=True)]
            return _climb(form, starts)

        return jnp.max(jax.lax.map(climbed, jax.random.split(key, _STARTS)))

    lowest, unresolved, highest = _extremes(matvec, w, key)
    return _Found(
        lowest=lowest,
        unresolved=unresolved,
        highest=highest,
        outer=largest(outer, 0, 0),
        direct=largest(outer, 0, 1),
        cross=largest(inner, 0, 0, 1),
        third=largest(inner, 0, 0, 0),
    )


def _along(fn: Callable, i: int, direction) -> Callable:
    """The derivative of ``fn(w, h)`` by argument ``i`` along a direction."""

    def derived(*args):
        return jax.jvp(lambda x: fn(*args[:i], x, *args[i + 1 :]), (args[i],), (direction,))[1]

    return derived


def _climb(form: Callable, vectors: Sequence) -> jax.Array:
    """A local maximum of a multilinear form: each unit vector in turn is made the best for the others."""

    def round_(_, carry):
        vectors, size = carry
        vectors = list(vectors)
        for i in range(len(vectors)):
            best = jax.grad(form, argnums=i)(*vectors)
            size = jnp.linalg.norm(best)
            vectors[i] = jnp.where(size > 0, best / jnp.where(size > 0, size, 1), vectors[i])
        return tuple(vectors), size

    start = tuple(vectors), jnp.zeros((), vectors[0].dtype)
    return jax.lax.fori_loop(0, _ROUNDS, round_, start)[1]


def _extremes(matvec: Callable, like, key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Smallest eigenvalue of a symmetric matrix, how much smaller it may be, and the largest."""
    if like.size <= _DENSE:
        matrix = jax.lax.map(matvec, jnp.eye(like.size, dtype=like.dtype))
        eigenvalues = jnp.linalg.eigvalsh(0.5 * (matrix + matrix.T))
        return eigenvalues[0], jnp.zeros_like(eigenvalues[0]), eigenvalues[-1]

    def orthogonal(u, basis):  # twice is enough
        for _ in range(2):
            u = u - (basis @ u) @ basis
        return u

    def step(j, carry):
        basis, diagonal, beside, v, scale = carry
        basis = basis.at[j].set(v)
        u = matvec(v)
        scale = jnp.maximum(scale, jnp.linalg.norm(u))
        diagonal = diagonal.at[j].set(jnp.vdot(v, u))
        u = orthogonal(u, basis)
        size = jnp.linalg.norm(u)
        # The basis holds all of the matrix that it can reach: go on from elsewhere.
        ended = size <= 100 * jnp.finfo(u.dtype).eps * scale
        fresh = orthogonal(_unit(jax.random.fold_in(key, j), like), basis)
        v = jnp.where(ended, fresh / jnp.linalg.norm(fresh), u / jnp.where(ended, 1, size))
        return basis, diagonal, beside.at[j].set(jnp.where(ended, 0, size)), v, scale

    zeros = jnp.zeros(_LANCZOS, like.dtype)
    start = jnp.zeros((_LANCZOS, like.size), like.dtype), zeros, zeros, _unit(key, like), zeros[0]
    _, diagonal, beside, _, _ = jax.lax.fori_loop(0, _LANCZOS, step, start)
    off = jnp.diag(beside[:-1], 1)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + off + off.T)
    return eigenvalues[0], beside[-1] * jnp.abs(vectors[-1, 0]), eigenvalues[-1]


def _unit(key, like) -> jax.Array:
    v = jax.random.normal(key, like.shape, like.dtype)
    return v / jnp.linalg.norm(v)


def _in_ball(key, like, radius: float) -> jax.Array:
    """A random vector whose length, not place, is uniform: all distances up to the radius are met."""
    key_length, key_direction = jax.random.split(key)
    return radius * jax.random.uniform(key_length, (), like.dtype) * _unit(key_direction, like)
