"""Penalties on the size of params, and on their distance from where they began.

References:
  Li, Grandvalet and Davoine, "Explicit inductive bias for transfer learning with convolutional networks",
  2018, arXiv:1802.01483 (L2-SP).
  Hui et al., "HFT: half fine-tuning for large language models", 2024, arXiv:2404.18466.
  von Oswald, Henning, Grewe and Sacramento, "Continual learning with hypernetworks", 2020, arXiv:1906.00695.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.penalties.strengths import laid_out, same_tree, total


def l2(params, strengths) -> jax.Array:
    """``sum_i s_i w_i^2 / 2`` over all entries of params.

    On the output of a hypernetwork, ``l2(network(params, inputs), strength)``, it is the penalty on what it
    puts out.

    Args:
      params: any pytree of floating arrays.
      strengths: one for all, or a tree of them that matches params or a prefix of it, or that names some of
        its parts: what is not named has no penalty. Each is a scalar, or has the shape of its leaf (one for
        each entry) or of the leaf's leading axes (one for each row).

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: params that are not floating; a strength that is no number, or of a name,
        structure or shape that params do not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> print(penalties.l2(params, 1.0), penalties.l2(params, {"kernel": jnp.array([1.0, 2.0, 0.0])}))
      4.0 3.0
    """
    return total(jnp.sum(s * jnp.square(w)) / 2 for w, s in laid_out(params, strengths))


def l1(params, strengths) -> jax.Array:
    """``sum_i s_i |w_i|``, arguments as of `l2`.

    Its gradient at zero is taken for zero, and no gradient method ends there: for params that are exactly
    zero take `bilevel.proximal_gradient` with `bilevel.prox.l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> print(penalties.l1(jnp.array([1.0, -2.0]), 0.5))
      1.5
    """
    return total(jnp.sum(s * jnp.abs(w)) for w, s in laid_out(params, strengths))


def elastic_net(params, l1_strengths, l2_strengths) -> jax.Array:
    """``sum_i l1_i |w_i| + l2_i w_i^2 / 2``, both strengths as those of `l2`."""
    return l1(params, l1_strengths) + l2(params, l2_strengths)


def l2_to(params, strengths, start) -> jax.Array:
    """``sum_i s_i (w_i - start_i)^2 / 2``: the penalty for leaving where training began (L2-SP).

    Half fine-tuning trains some groups of params and freezes the others. That is a strength of zero for the
    former and of infinity for the latter; with a strength for each group, ``{"layer1": s1, "layer2": s2}``,
    how much each may move is learned instead.

    Args:
      params: any pytree of floating arrays.
      strengths: as of `l2`.
      start: like params. A constant of many entries is better handed in with the batch than closed over.

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: as `l2`; a start of another structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> print(penalties.l2_to(jnp.array([1.0, 3.0]), 2.0, start=jnp.array([1.0, 1.0])))
      4.0
    """
    return l2(_away(params, start, "start"), strengths)


def forgetting(outputs, strengths, old) -> jax.Array:
    """How far a hypernetwork has moved what it puts out for the tasks before.

    ``1 / T sum_(t < T) sum_i s_ti (new_ti - old_ti)^2``, without the half that `l2_to` has. The strengths may
    carry weights, such as `fisher_diagonal` of each task. `bilevel.nn.forgetting` is the same for a
    `bilevel.nn.recurrent_hypernetwork`, with a number of tasks that is traced.

    Args:
      outputs: what is put out now, any pytree; the leading axis of every leaf is one of tasks, as of
        ``jax.vmap(lambda task: network(params, task))(tasks)``.
      strengths: as of `l2`.
      old: like outputs, what was put out before the present task.

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: as `l2_to`; leaves with different numbers of tasks, or none.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevel import penalties
      >>> print(penalties.forgetting(jnp.ones((2, 3)), 1.0, old=jnp.zeros((2, 3))))
      3.0
    """
    tasks = {jnp.shape(x)[:1] for x in jax.tree.leaves(outputs)}
    if len(tasks) != 1 or tasks == {()}:
        raise ValueError(
            "outputs must have one leading axis of tasks on every leaf, got "
            f"{validation.describe(outputs)}; outputs of a single task need x[None]."
        )
    return 2 * l2(_away(outputs, old, "old", "outputs"), strengths) / tasks.pop()[0]


def _away(params, start, name: str, of: str = "params"):
    params = validation.floating(params, of)
    start = same_tree(name, start, params, of)
    leaves, treedef = jax.tree.flatten(params)
    away = [w - jnp.asarray(w0, w.dtype) for w, w0 in zip(leaves, start, strict=True)]
    return jax.tree.unflatten(treedef, away)
