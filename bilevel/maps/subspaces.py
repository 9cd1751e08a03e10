"""Random subspaces: few coordinates for a network of any size.

With D params, ``z`` of d <= D entries, base theta_0 and a random matrix P::

    params = theta_0 + lambda P z,    z = 0 at first                                                 (1)

lambda is 1, or a scale for each part of params, which may be hyperparameters. The inner problem in z has a
Hessian of d x d, which can be solved exactly: hypergradients of any network that are correct to rounding.
They are those of training in the subspace.

`dense_subspace` draws the D d entries of P from N(0, 1/D). `fastfood` stacks blocks of L rows, where L is the
smallest power of two that is at least d, each from the Walsh-Hadamard matrix H (entries 1 and -1), random
signs B, normal numbers G, and a random permutation Q, one for all blocks::

    P = H G Q H B / sqrt(D L),    time O(D log d), 2 D random numbers                                  (2)

Both keep norms in expectation, ``E |P z|^2 = |z|^2``. The relative variance of |P z|^2 is 2 / D for the
former and, where L divides D, at most 6 / D for the latter. Nothing is stored: the random numbers are made of
the seed again whenever P is applied.

References:
  Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes", 2018,
  arXiv:1804.08838.
  Aghajanyan, Zettlemoyer and Gupta, "Intrinsic dimensionality explains the effectiveness of language model
  fine-tuning", 2020, arXiv:2012.13255; there z is filled up to D entries for a single block.
  Le, Sarlos and Smola, "Fastfood: computing Hilbert space expansions in loglinear time", 2013,
  arXiv:1408.3060.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.maps.values import at, base_at, given_params, shown
from bilevel.penalties.strengths import laid_out
from bilevel.problem import Params
from bilevel.vectors import size_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """See `fastfood` and `dense_subspace`. Maps that were made by different calls are not equal."""

    base: Any
    dim: int
    seed: int
    scales: Any
    project: Callable
    name: str

    def init(self, dtype=jnp.float32) -> jax.Array:
        """The first coordinates, zeros: params are the base there."""
        return jnp.zeros(self.dim, dtype)

    def __call__(self, free: jax.Array, hparams) -> Params:
        """Eq. (1).

        Raises:
          ValueError: coordinates of another shape, or more of them than params; a scale of a name or shape
            that params do not have.
        """
        if jnp.shape(free) != (self.dim,):
            raise ValueError(f"free must have shape ({self.dim},), got {jnp.shape(free)}.")
        base = base_at(self.base, hparams)
        _check_dim(self.dim, base)
        moved = self.project(jax.random.key(self.seed), size_of(base), free)
        scaled = laid_out(base, at(self.scales, hparams), 1.0, "scales", "base")
        leaves, start = [], 0
        for leaf, scale in scaled:
            part = moved[start : start + leaf.size].reshape(leaf.shape)
            leaves.append((leaf + scale * part).astype(leaf.dtype))
            start += leaf.size
        return jax.tree.unflatten(jax.tree.structure(base), leaves)

    def __repr__(self) -> str:
        scales = "" if self.scales is None else f", scales={shown(self.scales)}"
        return f"{self.name}({shown(self.base)}, dim={self.dim}, seed={self.seed}{scales})"


def fastfood(base, dim: int, seed: int = 0, scales=None) -> Subspace:
    """A random subspace through ``base``, Eq. (1), by a product that is never written out, Eq. (2).

    Args:
      base: theta_0, a tree of floating arrays that the map holds, which become constants of the programs it
        is used in; or a function ``hparams -> params``, for large ones:
        ``lambda hparams: hparams["base"]``, with the constraint `bilevel.fixed`, or without it where the
        base is learned.
      dim: d, at most the number of params.
      seed: of the random numbers.
      scales: lambda, None for 1, or a tree that matches params or a prefix of it or names some of its parts,
        of numbers or arrays as the strengths of `bilevel.penalties.l2`; or a function of hparams that returns
        one, for instance ``lambda hparams: hparams["scales"]``.

    Returns:
      A map for `bilevel.reparametrize`; ``map.init()`` are the first coordinates, zeros.

    Raises:
      TypeError, ValueError: params that are not floating, a dimension that is no whole number or larger than
        their number.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import maps
      >>> base = {"kernel": jnp.ones((20, 10), jnp.float32), "bias": jnp.zeros(10, jnp.float32)}
      >>> subspace = maps.fastfood(base, dim=8)
      >>> subspace
      fastfood({bias: float32[10], kernel: float32[20, 10]}, dim=8, seed=0)
      >>> subspace(subspace.init(), None)["bias"].shape
      (10,)
    """
    return _subspace(base, dim, seed, scales, _fastfood, "fastfood")


def dense_subspace(base, dim: int, seed: int = 0, scales=None) -> Subspace:
    """The same with a matrix of independent normal numbers: D d of them. Arguments as of `fastfood`."""
    return _subspace(base, dim, seed, scales, _dense, "dense_subspace")


def _subspace(base, dim, seed, scales, project, name) -> Subspace:
    dim = validation.whole_number("dim", dim, 1)
    base = given_params("base", base)
    if not callable(base):
        _check_dim(dim, base)
        if scales is not None and not callable(scales):
            laid_out(base, scales, 1.0, "scales", "base")
    return Subspace(base, dim, validation.whole_number("seed", seed, 0), scales, project, name)


def _check_dim(dim: int, base) -> None:
    size = size_of(base)
    if dim > size:
        raise ValueError(f"dim must be at most the number of params, {size}, got {dim}.")


def _dense(key, size: int, z):
    return jax.random.normal(key, (size, z.size), z.dtype) @ z / jnp.sqrt(size).astype(z.dtype)


def _fastfood(key, size: int, z):
    """Eq. (2)."""
    length = 1 << (z.size - 1).bit_length()
    blocks = -(-size // length)
    key_signs, key_places, key_normal = jax.random.split(key, 3)
    shape = blocks, length
    signs = jax.random.rademacher(key_signs, shape, z.dtype)
    # One sort, where jax.random.permutation has several to compile.
    places = jnp.argsort(jax.random.bits(key_places, (length,)))
    normal = jax.random.normal(key_normal, shape, z.dtype)
    mixed = hadamard(signs * jnp.pad(z, (0, length - z.size))[None])
    out = hadamard(normal * mixed[:, places])
    return out.reshape(-1)[:size] / jnp.sqrt(size * length).astype(z.dtype)


def hadamard(x):
    """The product of the Walsh-Hadamard matrix with each row of x, whose length is a power of two."""
    rows, length = x.shape
    half = 1
    while half < length:
        pairs = x.reshape(rows, -1, 2, half)
        x = jnp.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return x.reshape(rows, length)
