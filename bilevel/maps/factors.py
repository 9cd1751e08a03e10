"""Matrices as products of two thin ones.

    W = left right,    left of shape (m, r), right of shape (r, n)                                     (1)

Any invertible r x r matrix M gives the same W from (left M, M^-1 right). `refactorise` takes the balanced
pair of the singular values S, ``left = U sqrt(S)`` and ``right = sqrt(S) V^T``. The Hessian of a loss of W
alone is singular along these directions at every minimiser; hypergradients do not depend on them, and
`bilevel.cg` finds them where `bilevel.dense` cannot.

References:
  Glentis et al., "Parameter and memory efficient pre-training", 2025 (refactorising from time to time while
  training); read in its program and a summary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.problem import Params
from bilevel.vectors import cast, widened


class Factors(NamedTuple):
    """Eq. (1)."""

    left: jax.Array
    right: jax.Array

    def product(self) -> jax.Array:
        """W."""
        return self.left @ self.right


@dataclasses.dataclass(frozen=True)
class LowRank:
    """See `low_rank`."""

    rank: int

    def init(self, params: Params) -> Params:
        """`Factors` of the best approximation of each matrix, balanced; other leaves as they are."""

        def leaf(x):
            if x.ndim != 2 or min(x.shape) <= self.rank:
                return x
            u, s, v = jnp.linalg.svd(widened(x), full_matrices=False)
            return cast(_balanced(u[:, : self.rank], s[: self.rank], v[: self.rank]), Factors(x, x))

        return jax.tree.map(leaf, validation.floating(params, "params"))

    def __call__(self, free: Params, hparams) -> Params:
        """Eq. (1) for each pair of factors."""
        del hparams
        return jax.tree.map(lambda x: x.product() if isinstance(x, Factors) else x, free, is_leaf=_is_pair)

    def __repr__(self) -> str:
        return f"low_rank({self.rank})"


def low_rank(rank: int) -> LowRank:
    """Matrices of a rank, Eq. (1) of the module; what is no matrix, or has no larger rank, stays as it is.

    Args:
      rank: r.

    Returns:
      A map for `bilevel.reparametrize`; ``map.init(params)`` are the first factors.

    Raises:
      TypeError, ValueError: no whole number, or none that is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import maps
      >>> thin = maps.low_rank(1)
      >>> free = thin.init({"kernel": jnp.diag(jnp.array([4.0, 1.0])), "bias": jnp.ones(2)})
      >>> print(free["kernel"].left.shape, thin(free, None)["kernel"].diagonal().round(3))
      (2, 1) [4. 0.]
    """
    return LowRank(validation.whole_number("rank", rank, 1))


def refactorise(free: Params) -> Params:
    """The balanced factors of the same matrices, for every pair of `Factors` in a tree.

    Their optimiser's momentum is that of other coordinates, see `bilevel.momentum_reset`. Cost:
    O((m + n) r^2) for each pair. Where r is larger than m or n it becomes min(m, n).

    Raises:
      ValueError: there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import maps
      >>> pair = maps.Factors(jnp.array([[8.0], [0.0]]), jnp.array([[0.5, 0.0]]))
      >>> print(abs(maps.refactorise(pair).left).ravel().round(3))
      [2. 0.]
    """
    pairs = [x for x in jax.tree.leaves(free, is_leaf=_is_pair) if _is_pair(x)]
    if not pairs:
        raise ValueError(
            f"free must hold bilevel.maps.Factors, as low_rank(rank).init makes them, got {free!r:.80}."
        )

    def leaf(x):
        if not _is_pair(x):
            return x
        left, right = widened(x)
        q_left, r_left = jnp.linalg.qr(left)
        q_right, r_right = jnp.linalg.qr(right.T)
        u, s, v = jnp.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return cast(_balanced(q_left @ u, s, v @ q_right.T), x)

    return jax.tree.map(leaf, free, is_leaf=_is_pair)


def _balanced(u, s, v) -> Factors:
    root = jnp.sqrt(s)
    return Factors(u * root[None, :], root[:, None] * v)


def _is_pair(x) -> bool:
    return isinstance(x, Factors)
