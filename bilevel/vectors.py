"""Linear algebra on pytrees: vectors, and stacks of vectors along a leading axis of every leaf.

Nothing is flattened; only the small matrices of inner products between stacks are dense.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from bilevel.problem import PyTree


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product over all leaves; a scalar."""
    parts = [jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return sum(parts[1:], start=parts[0])


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm over all leaves; a scalar."""
    return jnp.sqrt(vdot(a, a))


def axpy(alpha, x: PyTree, y: PyTree) -> PyTree:
    """``alpha x + y`` leaf by leaf, in the dtype of ``y``."""
    return jax.tree.map(lambda a, b: (alpha * a + b).astype(b.dtype), x, y)


def where(condition, x: PyTree, y: PyTree) -> PyTree:
    """Leaf by leaf ``x`` where a scalar condition holds, else ``y``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def unit_of(b: PyTree) -> jax.Array:
    """The power of two at the largest entry of ``b``, 1 for zero.

    Multiples by it are exact, and in this unit squares neither underflow nor overflow.
    """
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(b)])
    largest = largest.astype(_wide(largest.dtype))
    usable = jnp.isfinite(largest) & (largest > 0)
    info = jnp.finfo(largest.dtype)
    exponent = jnp.frexp(jnp.where(usable, largest, 1))[1] - 1
    one = jnp.ones_like(largest)
    return jnp.ldexp(one, jnp.clip(exponent, info.minexp + 1, info.maxexp - 2))


def scaled(v: PyTree, alpha) -> PyTree:
    """``alpha v``, in the dtypes of ``v``."""
    return jax.tree.map(lambda x: (alpha * x).astype(x.dtype), v)


def widened(tree: PyTree) -> PyTree:
    """The tree with its floats of less than 32 bits in float32, which dense linear algebra needs."""
    return jax.tree.map(lambda x: x.astype(_wide(x.dtype)), tree)


def cast(tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the dtypes of another of the same structure."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _wide(dtype):
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def threshold(bb: jax.Array, rtol, atol) -> jax.Array:
    """Square of the residual at which to stop: ``max(rtol |b|, atol)^2``, where ``bb`` is ``|b|^2``.

    ``rtol`` None stands for the square root of the dtype's rounding unit.
    """
    if rtol is None:
        rtol = jnp.sqrt(jnp.finfo(bb.dtype).eps)
    return jnp.maximum(jnp.square(rtol) * bb, jnp.square(atol)).astype(bb.dtype)


def into_ball(params: PyTree, centre: PyTree, radius) -> PyTree:
    """Projection onto the ball around ``centre``, over the whole pytree."""
    away = axpy(-1.0, centre, params)
    distance = norm(away)
    shrink = jnp.minimum(1, radius / jnp.where(distance > 0, distance, 1))
    return axpy(shrink, away, centre)


# --- Stacks ----------------------------------------------------------------------------------------------

# Orthogonality has to hold to the last digit, also where the default of the device is a short product.
_EXACT = jax.lax.Precision.HIGHEST


def size_of(tree: PyTree) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def zeros(count: int, like: PyTree) -> PyTree:
    """``count`` zero vectors."""
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), like)


def row(stack: PyTree, j) -> PyTree:
    """Vector ``j``, which may be traced."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), stack)


def put(stack: PyTree, j, v: PyTree) -> PyTree:
    """The stack with vector ``j`` replaced."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, j, 0), stack, v)


def products(stack: PyTree, v: PyTree) -> jax.Array:
    """Inner products of each vector with ``v``; shape (count,)."""

    def leaf(x, y):
        return jnp.tensordot(x, y, axes=y.ndim, precision=_EXACT)

    parts = [leaf(x, y) for x, y in zip(jax.tree.leaves(stack), jax.tree.leaves(v), strict=True)]
    return sum(parts[1:], start=parts[0])


def gram(a: PyTree, b: PyTree) -> jax.Array:
    """Entry (i, j) is the inner product of vector i of ``a`` and vector j of ``b``."""
    return jax.vmap(lambda v: products(a, v), out_axes=1)(b)


def combine(weights: jax.Array, stack: PyTree) -> PyTree:
    """``sum_i weights[i] stack[i]``: a vector, or a stack where weights has a column for each."""

    def leaf(x):
        return jnp.tensordot(weights.T, x, axes=1, precision=_EXACT).astype(x.dtype)

    return jax.tree.map(leaf, stack)


def orthonormal(stack: PyTree) -> tuple[PyTree, jax.Array]:
    """``(basis, factor)`` with ``stack = basis factor``, vectors as columns; two passes of Gram matrices.

    The second pass makes the basis orthonormal to rounding where the first, which squares the condition
    number, is not. Directions lost to rounding become zero vectors of the basis.
    """

    def once(stack):
        squares, vectors = jnp.linalg.eigh(gram(stack, stack))
        kept = squares > squares.size * jnp.finfo(squares.dtype).eps * squares[-1]
        lengths = jnp.sqrt(jnp.where(kept, squares, 1))
        inverse = jnp.where(kept, 1 / lengths, 0)[None, :]
        return combine(vectors * inverse, stack), jnp.where(kept, lengths, 0)[:, None] * vectors.T

    basis, first = once(stack)
    basis, second = once(basis)
    return basis, second @ first
