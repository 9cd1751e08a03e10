"""Norms of the rows of a Jacobian that is never formed.

With S the Jacobian of a function of hparams, row i has the norm ``|S_i| = sqrt(sum_k S_ik^2)``. One product
with S for each hyperparameter, or one with its transpose for each row, whichever are fewer, are enough; and
one altogether where entry i of the function depends on entry i of a leaf only, as in ``jnp.exp(hparams)``.
Whether that is so is seen from the program of the derivative, not from its values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel.problem import HParams


def row_norms(fn: Callable, hparams: HParams) -> jax.Array:
    """Norms of the rows of the Jacobian of ``fn: hparams -> array``, raveled; exact to rounding."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, hparams))

    def squares(i, leaf):  # the parts of a row in different leaves add up
        def at(x):
            return jnp.ravel(jnp.asarray(fn(jax.tree.unflatten(treedef, [*leaves[:i], x, *leaves[i + 1 :]]))))

        return _row_squares(at, leaf)

    parts = [squares(i, leaf) for i, leaf in enumerate(leaves)]
    return jnp.sqrt(sum(parts[1:], start=parts[0]))


def _row_squares(fn: Callable, x: jax.Array) -> jax.Array:
    """Squared norms of the rows of the Jacobian of ``fn: array -> vector``, which is never formed."""
    if x.size == 1 or _entrywise(fn, x):  # a row has one entry at most, which the product with ones reads off
        return jnp.square(jax.jvp(fn, (x,), (jnp.ones_like(x),))[1])
    out, push = jax.linearize(fn, x)

    def unit(i, like):
        return jnp.zeros(like.size, like.dtype).at[i].set(1).reshape(like.shape)

    if x.size <= out.size:
        return jax.lax.fori_loop(
            0, x.size, lambda i, total: total + jnp.square(push(unit(i, x))), jnp.zeros_like(out)
        )
    pull = jax.linear_transpose(push, x)
    return jax.lax.map(lambda i: jnp.sum(jnp.square(pull(unit(i, out))[0])), jnp.arange(out.size))


# Linear primitives that keep the order of entries as raveled, if they keep their number: most broadcast, and
# what depends on one entry on its way may then meet what depends on another.
_ENTRY_BY_ENTRY = {
    "add", "add_any", "broadcast_in_dim", "convert_element_type", "copy", "div", "expand_dims", "mul", "neg",
    "reshape", "select_n", "squeeze", "sub",
}  # fmt: skip


def _entrywise(fn: Callable, x: jax.Array) -> bool:
    """Whether entry i of ``fn(x)`` is known to depend on entry i of ``x`` only, by the program of its JVP."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    made = jax.make_jaxpr(lambda x, t: jax.jvp(fn, (x,), (t,))[1])(shape, shape)
    return _moved(made.jaxpr, (False, True)) is not None


def _moved(jaxpr, inputs: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """Which results depend on the inputs flagged, entry by entry; None where one does in another way."""
    live = {var for var, flag in zip(jaxpr.invars, inputs, strict=True) if flag}

    def touches(var) -> bool:
        return not hasattr(var, "val") and var in live

    for eqn in jaxpr.eqns:
        touched = tuple(map(touches, eqn.invars))
        if not any(touched):
            continue
        results: tuple[bool, ...] | None = None
        if eqn.primitive.name in ("jit", "pjit"):
            results = _moved(eqn.params["jaxpr"].jaxpr, touched)
        elif eqn.primitive.name in _ENTRY_BY_ENTRY:
            sizes = {var.aval.size for var, flag in zip(eqn.invars, touched, strict=True) if flag}
            if sizes == {var.aval.size for var in eqn.outvars}:
                results = (True,) * len(eqn.outvars)
        if results is None:
            return None
        live |= {var for var, flag in zip(eqn.outvars, results, strict=True) if flag}
    return tuple(map(touches, jaxpr.outvars))
