"""Strengths laid out over the leaves of params: for all, for a subtree, a leaf, its rows or its entries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.trees import readable, spread


def laid_out(params, strengths, default=0.0, name: str = "strengths", of: str = "params") -> list[tuple]:
    """``(leaf, strength)`` for each leaf of params, the strength of a shape that multiplies it.

    Args:
      params: any pytree of floating arrays.
      strengths: one for all, or a tree of them that matches params or a prefix of it, or that names some of
        its parts. Each is a scalar, or has the shape of the leaf or of its leading axes.
      default: strength of what is not named.
      name: of the strengths, for messages.
      of: name of params, for messages.

    Raises:
      TypeError: a strength that is no real number, or params that are not floating; ValueError: a name,
        structure or shape that params do not have.
    """
    params = validation.floating(params, of)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    given = spread(strengths, params, default, _is_leaf, name, of)
    return [
        (leaf, strength_of(f"{name}{validation.name_of(path)}", s, leaf, of + validation.name_of(path)))
        for (path, leaf), s in zip(leaves, given, strict=True)
    ]


def strength_of(name: str, strength, array, of: str) -> jax.Array:
    """A strength with axes of length one where it has none of the array's.

    Raises:
      TypeError, ValueError: see `laid_out`.
    """
    strength = real(name, strength)
    if strength.shape != array.shape[: strength.ndim]:
        axes = " or ".join(str(array.shape[:i]) for i in range(array.ndim, -1, -1))
        raise ValueError(
            f"{name} must be a scalar or have the shape of {of} or of its leading axes, {axes}, got shape "
            f"{strength.shape}."
        )
    return strength.reshape(strength.shape + (1,) * (array.ndim - strength.ndim))


def real(name: str, value) -> jax.Array:
    """The value as an array of real numbers; TypeError where it is none."""
    if isinstance(value, (bool, str)) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise TypeError(f"{name} must be a number or an array, got {value!r:.80}.")
    array = jnp.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real, got dtype {array.dtype}.")
    return array


def scalar(name: str, value, *, positive: bool = False) -> jax.Array:
    """The value as a scalar array; TypeError or ValueError where it is none.

    ``positive``: ValueError too where it can be read and is not.
    """
    array = real(name, value)
    if array.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    if positive and readable(array) and not float(array) > 0:
        raise ValueError(f"{name} must be positive, got {float(array):g}.")
    return array


def same_tree(name: str, tree, params, of: str = "params") -> list[jax.Array]:
    """The leaves of a tree that has to have the structure and shapes of params.

    Raises:
      ValueError: it has others.
    """
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(params)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must have the structure of {of}, {validation.describe(params)}, got "
            f"{validation.describe(tree)}."
        )
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = jax.tree.leaves(tree)
    for (path, leaf), other in zip(paths, leaves, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            where = validation.name_of(path)
            raise ValueError(
                f"{name}{where} must have the shape {jnp.shape(leaf)} of {of}{where}, got {jnp.shape(other)}."
            )
    return leaves


def total(terms) -> jax.Array:
    """The sum of at least one scalar."""
    first, *others = terms
    return sum(others, start=first)


def _is_leaf(spec: Any) -> bool:
    return spec is not None and jax.tree_util.all_leaves([spec])
