"""The structured best response: how params change with hyperparameters, on any pytree of params.

For a vector e of n perturbations the response of a leaf w of params is, with a row of V for each unit::

    kernels:            Delta w = (V e) * W        rows of one matrix W, rescaled                        (1)
    vectors, scalars:   Delta w = V e              entry by entry                                        (2)

where ``*`` scales everything that leads to one output unit by the same number: exact for the hyperparameters
of a two-layer linear network (the gates of the paper), and no larger than the kernel itself. A kernel of one
output unit responds to all hyperparameters along one direction. For (2) the paper has a second factor, which
adds nothing to the functions that it can be. Kernels may be told to respond by (2) too, at the cost of a copy
for each hyperparameter: a linear hypernetwork.

References:
  MacKay, Vicol, Lorraine, Duvenaud and Grosse, "Self-tuning networks: bilevel optimization of hyperparameters
  using structured best-response functions", 2019, arXiv:1903.03088.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.constraints import BoundConstraints, Fixed
from bilevel.problem import Params, PyTree, StaticTree
from bilevel.trees import spread

# A response that takes more memory than this, and than so many times params, is refused.
_MOST_BYTES, _MOST_TIMES = 2**30, 8


# The setting for a kernel that responds entry by entry.
FULL = "full"
_SETTINGS = (bool, int, np.integer, str)


class Response(NamedTuple):
    """Eq. (1) and (2): trees like params.

    ``gates``: V, of shape (n, ...) where the rest broadcasts against the leaf. ``kernels``: W, None for a
    leaf of Eq. (2). Both None for a leaf that does not respond.
    """

    gates: PyTree
    kernels: PyTree


def setting(setting: Any) -> StaticTree:
    """Which parts of params respond, and how; hashable.

    Raises:
      TypeError, ValueError: a setting that no part of params can have.
    """
    for leaf in jax.tree.leaves(setting):
        if not isinstance(leaf, _SETTINGS):
            raise TypeError(f"response holds True, False, the number of an axis or {FULL!r}, got {leaf!r}.")
        if isinstance(leaf, str) and leaf != FULL:
            raise ValueError(f"response holds True, False, the number of an axis or {FULL!r}, got {leaf!r}.")
    return StaticTree.of(setting)


def first_response(params: Params, n: int, structure: StaticTree, leading: int) -> Response:
    """A response of zero, from which it can be learned.

    V begins at zero, W at the kernel itself (the response is then a rescaling, as that to a weight decay is),
    or at random numbers where the kernel is zero and the product could not leave zero.

    Args:
      params: where the network stands.
      n: number of perturbations.
      structure: which parts respond, see `bilevel.best_response`.
      leading: axes in front of every leaf that belong to members of a lifted problem.

    Raises:
      ValueError: a response that is too large, a setting that params do not fit.
    """
    shapes = _gate_shapes(params, structure.tree(), leading)
    leaves, treedef = jax.tree.flatten(params)
    _check_memory(leaves, shapes, n)
    gates: list[Any] = []
    kernels: list[Any] = []
    for i, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True)):
        gates.append(None if shape is None else jnp.zeros((n, *shape), leaf.dtype))
        whole = shape is None or shape == leaf.shape
        kernels.append(None if whole else _first_kernel(leaf, shape, i))
    return Response(jax.tree.unflatten(treedef, gates), jax.tree.unflatten(treedef, kernels))


def no_response(params: Params) -> Response:
    """That of params whose model responds by layers of its own."""
    nothing = jax.tree.map(lambda leaf: None, params)
    return Response(nothing, nothing)


def _first_kernel(leaf, shape, i: int):
    fan_in = leaf.size / math.prod(shape)
    random = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), leaf.shape, leaf.dtype)
    return jnp.where(jnp.any(leaf != 0), leaf, random / np.asarray(math.sqrt(fan_in), leaf.dtype))


def change(params: Params, response: Response, e: jax.Array) -> Params:
    """Eq. (1) and (2) for one vector e of shape (n,); a tree like params."""

    def leaf(w, gates, kernel):
        if gates is None:
            return jnp.zeros_like(w)
        scale = jnp.tensordot(e.astype(gates.dtype), gates, axes=1)
        return scale if kernel is None else scale * kernel

    return jax.tree.map(leaf, params, response.gates, response.kernels)


def moved(params: Params, response: Response, e: jax.Array) -> Params:
    """Params and their response to e."""
    return jax.tree.map(jnp.add, params, change(params, response, e))


def sizes(params: Params, response: Response) -> jax.Array:
    """Euclidean norm of the response to each unit perturbation; shape (n,)."""

    def leaf(w, gates, kernel):
        if gates is None:
            return 0.0
        rows = jnp.ones((1,) * w.ndim, gates.dtype)
        if kernel is not None:
            inputs = tuple(i for i, k in enumerate(gates.shape[1:]) if k != w.shape[i])
            rows = jnp.sum(jnp.square(kernel), axis=inputs, keepdims=True)
        return jnp.sum(jnp.square(gates) * rows[None], axis=tuple(range(1, gates.ndim)))

    parts = jax.tree.leaves(jax.tree.map(leaf, params, response.gates, response.kernels))
    return jnp.sqrt(sum(parts[1:], start=parts[0]))


# --- Perturbations as vectors ------------------------------------------------------------------------------


def count(constraints: BoundConstraints, hparams) -> int:
    """Numbers in the hyperparameters that are tuned; ValueError where there is none."""
    n = sum(math.prod(jnp.shape(leaf)) for leaf in _tuned(constraints, hparams))
    if not n:
        raise ValueError("hparams: all are bilevel.fixed(), so that there is nothing to respond to.")
    return n


def vector(constraints: BoundConstraints, free) -> jax.Array:
    """The tuned hyperparameters as a vector of shape (n,), leaf after leaf."""
    leaves = [jnp.ravel(leaf) for leaf in _tuned(constraints, free)]
    return jnp.concatenate([leaf.astype(jnp.result_type(*leaves)) for leaf in leaves])


def tree(constraints: BoundConstraints, e: jax.Array, like) -> PyTree:
    """The inverse of `vector`; zero where a leaf is fixed."""
    out, at = [], 0
    for constraint, leaf in zip(constraints.leaves, jax.tree.leaves(like), strict=True):
        if isinstance(constraint, Fixed):
            out.append(jnp.zeros_like(leaf))
            continue
        out.append(e[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        at += leaf.size
    return jax.tree.unflatten(constraints.treedef, out)


def held(constraints: BoundConstraints, free) -> PyTree:
    """The same, without a derivative by what is fixed."""
    leaves = zip(constraints.leaves, constraints.treedef.flatten_up_to(free), strict=True)
    stopped = [jax.lax.stop_gradient(x) if isinstance(c, Fixed) else x for c, x in leaves]
    return jax.tree.unflatten(constraints.treedef, stopped)


def _tuned(constraints: BoundConstraints, tree) -> list:
    leaves = constraints.treedef.flatten_up_to(tree)
    return [x for x, c in zip(leaves, constraints.leaves, strict=True) if not isinstance(c, Fixed)]


# --- Which axis of a kernel counts its output units --------------------------------------------------------


def _gate_shapes(params: Params, setting: Any, leading: int) -> list[tuple[int, ...] | None]:
    """For each leaf the shape of its gates, None where it does not respond."""
    given = spread(setting, params, True, lambda x: isinstance(x, _SETTINGS), "response", "params")
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    vectors: dict[tuple, set[int]] = {}
    for path, leaf in paths:
        if _is_vector(leaf.shape[leading:]):
            vectors.setdefault(_parent(path), set()).update(leaf.shape[leading:])
    shapes: list[tuple[int, ...] | None] = []
    for (path, leaf), choice in zip(paths, given, strict=True):
        if choice is False:
            shapes.append(None)
        elif choice == FULL or _is_vector(leaf.shape[leading:]):
            shapes.append(leaf.shape)
        else:
            axis = _axis(path, leaf, choice, leading, vectors.get(_parent(path), set()))
            kept = (*range(leading), axis)
            shapes.append(tuple(size if i in kept else 1 for i, size in enumerate(leaf.shape)))
    if all(shape is None for shape in shapes):
        raise ValueError("response leaves out all of params: nothing could respond to hparams.")
    return shapes


def _is_vector(shape: tuple[int, ...]) -> bool:
    """No kernel; also a bias with axes to be broadcast, (outputs, 1, 1)."""
    return len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) < 2)


def _axis(path, leaf, choice, leading: int, beside: set[int]) -> int:
    """The axis of output units of a kernel: as asked, else that of the bias beside it, else by its name."""
    first, last = leading, leaf.ndim - 1
    if choice is not True:
        axis = int(choice) + (leaf.ndim if choice < 0 else 0)
        if not leading <= axis < leaf.ndim:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"response{where} is axis {choice}, but params{where} has shape {leaf.shape}.")
        return axis
    fits = [axis for axis in (first, last) if leaf.shape[axis] in beside]
    if len(fits) == 1:
        return fits[0]
    # equinox and torch write (outputs, inputs) and call it weight; flax and haiku (inputs, outputs).
    return first if _names(path)[-1:] == ["weight"] else last


def _names(path) -> list[str]:
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    # A variable of flax.nnx keeps its array under this name.
    return names[:-1] if names[-1:] == ["value"] else names


def _parent(path) -> tuple:
    return tuple(_names(path)[:-1])


def _check_memory(leaves, shapes, n: int) -> None:
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    needed = sum(
        (n * math.prod(shape) + (leaf.size if shape != leaf.shape else 0)) * leaf.dtype.itemsize
        for leaf, shape in zip(leaves, shapes, strict=True)
        if shape is not None
    )
    if needed > max(_MOST_BYTES, _MOST_TIMES * own):
        raise ValueError(
            f"hparams: the response of params to {n:,} hyperparameters would take {needed / 2**30:,.1f} GiB "
            f"({needed / own:,.0f} times params), and its optimiser as much again. Tune fewer (declare "
            "others bilevel.fixed()), leave parts of params out by response=, or take bilevel.implicit(), "
            "whose memory does not grow with them."
        )
