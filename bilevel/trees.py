"""Settings laid out over a tree (a matching tree, a prefix, names of some parts), and questions to leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def spread(spec, tree, default, is_setting: Callable[[Any], bool], name: str, of: str) -> list:
    """The setting of each leaf of ``tree``, in the order of its leaves.

    Args:
      spec: a setting for everything below, or a container of specs; None and what is not named stand for
        the default.
      tree: what it is laid out over.
      default: setting of what is not named.
      is_setting: tells a setting from a container.
      name: of the argument, for messages.
      of: name of the tree, for messages.

    Raises:
      ValueError: a name or a structure that the tree does not have; a setting for nothing.
    """
    out: list = []
    _spread(out, spec, tree, default, is_setting, name, of, "")
    return out


def _spread(out, spec, tree, default, is_setting, name, of, path) -> None:
    if is_setting(spec) and not jax.tree.leaves(tree):
        raise ValueError(f"{name}{path} is set, but {of}{path} holds no array.")
    if spec is None or is_setting(spec):
        out.extend([default if spec is None else spec] * len(jax.tree.leaves(tree)))
        return
    parts, specs = children(tree), children(spec)
    if not specs:
        out.extend([default] * len(jax.tree.leaves(tree)))
        return
    unknown = [child for child in specs if child not in parts]
    if unknown or (not isinstance(spec, Mapping) and len(specs) != len(parts)):
        have = ", ".join(parts) if parts else "no parts: it is one array"
        raise ValueError(
            f"{name}{path} names {', '.join(unknown) or 'only some parts'}, but {of}{path} has {have}. "
            f"The settings have the structure of {of}, or a prefix of it."
        )
    for child, subtree in parts.items():
        _spread(out, specs.get(child), subtree, default, is_setting, name, of, path + child)


def children(tree) -> dict[str, Any]:
    """One level down, in the order of the leaves; empty for an array."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    return {jax.tree_util.keystr(path): child for path, child in pairs if path}


def abstract(leaf) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def readable(leaf) -> bool:
    """Whether the values of a leaf can be read here: no tracer, no shape, not spread over processes."""
    if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def has_shapes(tree) -> bool:
    """Whether a leaf is a shape without values, so that nothing can be computed."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def copied(tree):
    """Arrays of its own: a loop that donates them leaves the caller's alone."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def split_floating(tree):
    """Floating leaves, in a list; and the tree with None in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    moving = [x for x, f in zip(leaves, floating, strict=True) if f]
    rest = [None if f else x for x, f in zip(leaves, floating, strict=True)]
    return moving, _Rest(rest, treedef)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Rest:
    """The leaves that are not floating, and the structure of all."""

    leaves: list
    treedef: object

    def tree_flatten(self):
        return (self.leaves,), self.treedef

    @classmethod
    def tree_unflatten(cls, treedef, children):
        return cls(children[0], treedef)


def joined(moving, rest: _Rest):
    """The inverse of `split_floating`."""
    floats = iter(moving)
    leaves = [next(floats) if x is None else x for x in rest.leaves]
    return jax.tree.unflatten(rest.treedef, leaves)
