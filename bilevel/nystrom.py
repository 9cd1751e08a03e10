"""Low-rank approximations of a symmetric matrix from its products with a few vectors (Nystrom).

With a few test vectors as the columns of T, the products ``C = A T`` and the small matrix ``W = T^T C``::

    A ~ C W^-1 C^T = U diag(values) U^T,   U orthonormal                                     (1)

exact where T spans the space or A has no higher rank. Two uses: an approximate inverse with damping,
and a preconditioner that moves the largest eigenvalues to where the others are::

    x    = (U diag(values) U^T + damping I)^-1 b                                             (2)
    P^-1 = (smallest + damping) U diag(1 / (values + damping)) U^T + I - U U^T               (3)

Eq. (2) is what the identity of Woodbury computes from C and W; with U there is no difference of large
numbers at a small damping. Directions in which W is singular to rounding are left out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.problem import PyTree, SolveInfo
from bilevel.vectors import axpy, cast, combine, gram, norm, orthonormal, products, size_of, widened, zeros


class NystromState(NamedTuple):
    """Eq. (1), kept between solves."""

    basis: PyTree  # U, one vector a row of every leaf's leading axis; zero where directions were left out
    values: jax.Array
    negative_curvature: jax.Array  # of W
    age: jax.Array  # updates so far
    products: jax.Array  # that the last update took


@dataclasses.dataclass(frozen=True)
class Nystrom:
    """See `nystrom`; a `bilevel.problem.LinearSolver` and a `bilevel.problem.Preconditioner`."""

    rank: int
    damping: float
    refresh: int
    symmetric_only = True

    def init(self, params):
        """No approximation yet; refuses a rank above the number of parameters."""
        size = size_of(params)
        if self.rank > size:
            raise ValueError(
                f"rank of bilevel.nystrom must be at most the number of parameters, {size}, got {self.rank}."
            )
        params = widened(params)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return NystromState(
            zeros(self.rank, params),
            jnp.zeros(self.rank, dtype),
            jnp.bool_(False),
            jnp.int32(0),
            jnp.int32(0),
        )

    def solve(self, matvec, b, state, key, *, rtol=None, atol=None):
        """Eq. (2) with columns of the matrix; nothing is iterated, so that tolerances do not apply."""
        del rtol, atol
        narrow, b = b, widened(b)

        def product(v):
            return matvec(cast(v, narrow))

        state = self._kept_or(lambda: _columns_of(product, b, self.rank, key), state)
        inside = products(state.basis, b)
        outside = axpy(-1.0, combine(inside, state.basis), b)
        # Once more: what rounding left of the basis in it would be divided by the damping.
        again = products(state.basis, outside)
        outside = axpy(-1.0, combine(again, state.basis), outside)
        x = combine((inside + again) / (state.values + self.damping), state.basis)
        x = axpy(1 / self.damping, outside, x)
        residual = norm(axpy(-1.0, product(x), b))
        x = cast(x, narrow)
        return x, state, SolveInfo(residual, jnp.int32(1), state.products + 1, state.negative_curvature)

    def update(self, matvec, state, key):
        """New products after every ``refresh`` updates."""
        return self._kept_or(lambda: _sketch_of(matvec, state.basis, self.rank, key), state)

    def apply(self, state, v):
        """Eq. (3)."""
        used = state.values > 0
        smallest = jnp.min(jnp.where(used, state.values, jnp.inf))
        shrunk = (smallest + self.damping) / (state.values + self.damping)
        # Below rounding the product could lose its sign.
        shrunk = jnp.maximum(shrunk, 10 * jnp.finfo(shrunk.dtype).eps)
        return axpy(1.0, combine(jnp.where(used, shrunk - 1, 0) * products(state.basis, v), state.basis), v)

    def _kept_or(self, renew, state):
        """The state, or a new one every ``refresh`` calls."""

        def fresh():
            basis, values, negative = renew()
            return NystromState(basis, values, negative, state.age + 1, jnp.int32(self.rank))

        def kept():
            return state._replace(age=state.age + 1, products=jnp.int32(0))

        return jax.lax.cond(state.age % self.refresh == 0, fresh, kept)


def _columns_of(matvec, like, rank, key):
    """``(U, values, negative)`` of Eq. (1) with unit vectors for T: C is columns of the matrix, W signed."""
    indices = jax.random.choice(key, size_of(like), (rank,), replace=False)
    images, squares, vectors, rounding = _products_with(matvec, _unit_vectors(indices, like))
    kept = jnp.abs(squares) > rounding
    basis, values = _factors(images, jnp.where(kept, squares, 0), vectors)
    return basis, values, squares[0] < -rounding


def _sketch_of(matvec, like, rank, key):
    """The same with random directions for T, and positive: as a preconditioner has to be."""
    keys = jax.random.split(key, len(jax.tree.leaves(like)))
    keys = jax.tree.unflatten(jax.tree.structure(like), list(keys))
    tests, _ = orthonormal(jax.tree.map(lambda x, k: jax.random.normal(k, x.shape, x.dtype), like, keys))
    images, squares, vectors, rounding = _products_with(matvec, tests)
    # In an indefinite matrix a small curvature is a difference of larger ones of both signs, and what
    # Eq. (1) divides by it means nothing.
    kept = squares > jnp.maximum(rounding, -squares[0])
    basis, values = _factors(images, jnp.where(kept, squares, 0), vectors)
    noise = values.size * jnp.finfo(values.dtype).eps * values[-1]
    return basis, jnp.where(values > noise, values, 0), squares[0] < -rounding


def _products_with(matvec, tests):
    """C; eigenvalues, which ascend, and eigenvectors of W; and what rounding makes of a zero eigenvalue."""
    images = widened(jax.vmap(lambda v: matvec(v))(tests))
    small = gram(tests, images)
    squares, vectors = jnp.linalg.eigh((small + small.T) / 2)
    rounding = squares.size * jnp.finfo(squares.dtype).eps * jnp.max(jnp.abs(squares))
    return images, squares, vectors, rounding


def _factors(images, squares, vectors):
    """Eq. (1) from eigenvalues of W, zero where they are left out; values ascend.

    The factor ``B = C V |S|^-1/2`` of ``C W^-1 C^T = B sign(S) B^T`` has the square root of the condition
    number of the matrix, so that its Gram matrix is no worse than the matrix.
    """
    used = squares != 0
    scale = jnp.where(used, 1 / jnp.sqrt(jnp.where(used, jnp.abs(squares), 1)), 0)
    basis, factor = orthonormal(combine(vectors * scale[None, :], images))
    core = (factor * jnp.sign(squares)[None, :]) @ factor.T
    values, rotation = jnp.linalg.eigh((core + core.T) / 2)
    return combine(rotation, basis), values


def _unit_vectors(indices, like):
    """A stack of unit vectors, from indices that count through all leaves."""
    leaves, treedef = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        at = jnp.arange(start, start + leaf.size)[None, :] == indices[:, None]
        out.append(at.astype(leaf.dtype).reshape(indices.size, *leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(treedef, out)


def nystrom(rank: int, damping: float, refresh: int = 1) -> Nystrom:
    """Low-rank approximation from some columns of the matrix, for symmetric systems.

    With ``C = A[:, I]`` for ``rank`` random indices I, uniform over all parameters, and ``W = A[I, I]``::

        x = (C W^-1 C^T + damping I)^-1 b

    Nothing is iterated, so that nothing diverges. The bias is that of the damping, and that of the rank: what
    of b lies outside of C is divided by the damping alone. At full rank it is a direct solve of
    ``A + damping I``. Products with a vector of its own for each column, ``rank`` in one batch, whenever the
    columns are taken anew, and one for the residual; memory of ``rank`` vectors.

    The same value is a preconditioner, ``bilevel.cg(preconditioner=bilevel.nystrom(30, 1e-3, refresh=10))``:
    then a bad approximation costs steps and no accuracy. It pays where a few eigenvalues are large. It takes
    products with ``rank`` random directions, not unit vectors, which misses no large eigenvalue (on logistic
    regression and small networks: up to a quarter fewer steps, sometimes a tenth more), and leaves negative
    curvature out, so that it is positive definite whatever the matrix.

    Args:
      rank: columns, at most the number of parameters.
      damping: of the unit of A's eigenvalues, positive. As a preconditioner: about the smallest eigenvalue.
      refresh: solves for which columns are kept; inside a method, outer steps.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range; from `init`, a rank above the
        number of parameters.

    References:
      Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation", 2023,
      arXiv:2302.09726.
      Frangella, Tropp and Udell, "Randomized Nystrom preconditioning", 2021, arXiv:2110.02820.
    """
    return Nystrom(
        validation.whole_number("rank", rank, 1),
        validation.number("damping", damping, positive=True),
        validation.whole_number("refresh", refresh, 1),
    )
