"""Short names for long things: a digest of a program, and of the contents of a pytree.

Two runs have the same digests exactly where they compute the same numbers from the same numbers: in
another process, on other devices, from arrays placed otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import re
import types
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, Sharding

from bilevel.problem import PyTree
from bilevel.validation import name_of

# --- Programs ----------------------------------------------------------------------------------------------

# What names, places or schedules an operation, and says nothing of the numbers that come out.
_SILENT = {
    "name", "weak_type",
    "mesh", "ctx_mesh", "context_mesh", "sharding", "out_sharding", "in_shardings", "out_shardings",
    "in_layouts", "out_layouts", "devices", "srcs", "copy_semantics",
    "donated_invars", "keep_unused", "inline", "compiler_options_kvs",
    # Derivative rules that are still there have not been used: a derivative that is taken replaces them.
    "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees",
}  # fmt: skip
_PLACEMENTS = (Sharding, Mesh, AbstractMesh)
# Values that a host callback may enclose, and which say what they are.
_ENCLOSED = (bool, int, float, complex, str, bytes, np.ndarray, np.generic)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def program(closed_jaxpr: Any) -> str:
    """Digest of a traced program: its operations, their settings, shapes, dtypes, literals and constants.

    Source locations, names of functions and placement do not enter it. It is the same in every process with
    the same versions of JAX and of the libraries whose functions were traced.

    Args:
      closed_jaxpr: what `jax.make_jaxpr` returns.
    """
    # The bits of a random draw depend on this setting, which the program does not show.
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return _sha(f"{_closed(closed_jaxpr, {})} {partitionable}")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _closed(jaxpr, seen: dict[int, tuple[Any, str]]) -> str:
    """Digest of a Jaxpr or ClosedJaxpr; one that occurs many times is walked once."""
    if id(jaxpr) not in seen:
        constants = ",".join(_value(x, seen) for x in getattr(jaxpr, "consts", ()))
        # The object is kept beside its digest, so that no other one can take its id.
        seen[id(jaxpr)] = jaxpr, _sha(f"[{constants}]{_operations(getattr(jaxpr, 'jaxpr', jaxpr), seen)}")
    return seen[id(jaxpr)][1]


def _operations(jaxpr, seen) -> str:
    numbers: dict[Any, int] = {}

    def define(var: Any) -> str:
        numbers[var] = len(numbers)
        return _aval(var.aval)

    def use(atom) -> str:
        if isinstance(atom, jex.Literal):
            aval: Any = atom.aval
            value = np.asarray(atom.val, aval.dtype)
            return f"{value.dtype}{list(value.shape)}:{value.tobytes().hex()}"
        return str(numbers[atom])

    lines = [" ".join(define(var) for var in [*jaxpr.constvars, *jaxpr.invars])]
    for eqn in jaxpr.eqns:
        inputs = " ".join(use(atom) for atom in eqn.invars)
        settings = ",".join(
            f"{name}={_value(eqn.params[name], seen)}" for name in sorted(eqn.params) if name not in _SILENT
        )
        outputs = " ".join(define(var) for var in eqn.outvars)
        lines.append(f"{outputs} = {eqn.primitive.name}[{settings}] {inputs}")
    lines.append(" ".join(use(atom) for atom in jaxpr.outvars))
    return "\n".join(lines)


def _aval(aval: Any) -> str:
    if not hasattr(aval, "shape"):
        return _plain(aval)  # a token
    return f"{aval.dtype}{list(aval.shape)}"


def _value(value, seen) -> str:
    """Text of a setting that says what it is, in every process alike."""
    match value:
        case jex.ClosedJaxpr() | jex.Jaxpr():
            return f"{{{_closed(value, seen)}}}"
        case enum.Enum():
            return str(value)
        case None | bool() | str() | bytes():
            return repr(value)
        case np.ndarray() | np.generic() | jax.Array():
            return _array(value)
        case int() | float() | complex():
            return f"{type(value).__name__}:{value!r}"
        case np.dtype():
            return f"dtype:{value}"
        case _ if isinstance(value, _PLACEMENTS):
            return "placement"
        case type():
            return f"{value.__module__}.{value.__qualname__}"
        case tuple() | list():
            return f"{type(value).__name__}({','.join(_value(x, seen) for x in value)})"
        case set() | frozenset():
            return f"set({','.join(sorted(_value(x, seen) for x in value))})"
        case dict():
            items = sorted(f"{_value(k, seen)}:{_value(v, seen)}" for k, v in value.items())
            return f"dict({','.join(items)})"
        case functools.partial():
            parts = value.func, value.args, value.keywords
            return f"partial({','.join(_value(x, seen) for x in parts)})"
        case types.FunctionType():
            return f"{value.__module__}.{value.__qualname__}{_body(value, seen)}"
        case _ if callable(value) and hasattr(value, "__qualname__"):
            return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
        case _ if dataclasses.is_dataclass(value):
            fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return f"{type(value).__name__}({','.join(f'{k}={_value(v, seen)}' for k, v in fields)})"
        case _ if hasattr(value, "shape") and hasattr(value, "dtype"):
            return _aval(value)
    return _plain(value)


def _body(fn: types.FunctionType, seen) -> str:
    """What a function that the host calls computes: its code, and the plain values that it encloses."""
    cells = inspect.getclosurevars(fn).nonlocals
    enclosed = [x for x in (*cells.values(), *(fn.__defaults__ or ())) if isinstance(x, _ENCLOSED)]
    constants = [x for x in fn.__code__.co_consts if isinstance(x, _ENCLOSED)]
    return _sha(f"{fn.__code__.co_code.hex()} {_value((*enclosed, *constants), seen)}")


def _plain(value) -> str:
    return _ADDRESS.sub("", repr(value))


def _array(array) -> str:
    # A tangent of an integer has shape and no content.
    return _aval(array) if array.dtype == jax.dtypes.float0 else f"array:{arrays(array)}"


# --- Arrays ------------------------------------------------------------------------------------------------

# The checksum of a leaf is the sum, modulo 2^64, over its elements of mix(bits + index * _STEP), with the
# finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014). Terms
# may be added in any order and on any machine, so that placement does not matter.
_STEP = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_BLOCK = 1 << 14  # elements: what the passes over a block touch stays in the cache
_RAMP = np.arange(_BLOCK, dtype=np.uint64) * np.uint64(_STEP)


def arrays(tree: PyTree) -> str:
    """Digest of the paths, shapes, dtypes and contents of a pytree of arrays, however they are placed.

    Where a leaf is spread over several processes, all of them must call this with the same tree; they get the
    same digest.

    Args:
      tree: arrays, typed PRNG keys, numbers, None.

    Raises:
      TypeError: a leaf is none of these.
    """
    heads, sums, spread = [], [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]:
        if leaf is None:
            head, leaf = "None", np.zeros(0)
        elif isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            head = f"key:{jax.random.key_impl(leaf)}{list(leaf.shape)}"
            leaf = jax.random.key_data(leaf)
        else:
            leaf = leaf if isinstance(leaf, jax.Array) else _numbers(leaf, path)
            head = f"{leaf.dtype.name}{list(leaf.shape)}"
        heads.append(f"{name_of(path)!r}:{head}")
        sums.append(_checksum(leaf))
        spread.append(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
    if any(spread):
        sums = _over_processes(sums, spread)
    return _sha("\n".join(f"{head} {total}" for head, total in zip(heads, sums, strict=True)))


def _numbers(leaf, path) -> np.ndarray:
    array = np.asarray(leaf)
    dtype = array.dtype
    # The extended floats (bfloat16, float8) are of kind V as records and raw bytes are.
    known = dtype.kind in "biuf" and dtype.itemsize <= 8 or dtype.kind == "c" and dtype.itemsize <= 16
    if not (known or dtype.kind == "V" and dtype.type is not np.void):
        raise TypeError(
            f"only arrays of numbers have a digest, got {leaf!r:.80} at {name_of(path) or 'root'}."
        )
    return array.astype(dtype.newbyteorder("="), copy=False)


def _checksum(leaf) -> int:
    """The sum over the elements that this process holds, each counted by one process."""
    if not isinstance(leaf, jax.Array):
        return _piece(leaf, (slice(None),) * leaf.ndim, leaf.shape)
    pieces = (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
    return sum(_piece(np.asarray(x.data), x.index, leaf.shape) for x in pieces) & _MASK


def _piece(piece: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The sum over a piece of an array of the given shape, which is there at the given index."""
    if not piece.size:
        return 0
    starts = [s.indices(n)[0] for s, n in zip(index, shape, strict=True)]
    # Axes from `whole` on are there in full: with the one before they form runs without a gap.
    whole = len(shape)
    while whole and piece.shape[whole - 1] == shape[whole - 1]:
        whole -= 1
    axes = max(whole - 1, 0)
    run = math.prod(piece.shape[axes:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    total, position = 0, 0
    for elements, words in _blocks(piece):
        if run == piece.size:
            keys = _RAMP[:elements] + np.array((first + position) * _STEP & _MASK, np.uint64)
        else:
            keys = _keys(position, elements, run, first, piece.shape[:axes], strides[:axes])
        for number, bits in enumerate(words):
            total += _mixed_sum(bits, keys, number)
        position += elements
    return total & _MASK


def _blocks(piece: np.ndarray):
    """The elements in their order, a block at a time, as the 64-bit numbers that hold their bits.

    Yields how many elements there are and a tuple of arrays: one, or two where an element has 16 bytes.
    """
    size = piece.dtype.itemsize
    plain = piece.view(f"u{size}") if size <= 8 else piece
    settings: Any = {"flags": ["external_loop", "buffered"], "op_flags": [["readonly", "contig"]]}
    blocks: Any = np.nditer(plain, order="C", buffersize=_BLOCK, **settings)
    for block in blocks:
        if size <= 8:
            yield block.size, (block,)
        else:
            words = block.view(np.uint64).reshape(-1, size // 8)
            yield block.size, tuple(words.T)


def _keys(position, elements, run, first, outer, strides) -> np.ndarray:
    """What each of so many elements adds to its bits, in a piece that consists of many runs."""
    start, stop = position // run, (position + elements - 1) // run + 1
    places = np.unravel_index(np.arange(start, stop), outer)
    offsets = sum((p * s for p, s in zip(places, strides, strict=True)), first)
    local = np.arange(position - start * run, position - start * run + elements)
    row = local // run
    return (np.asarray(offsets)[row] + (local - row * run)).astype(np.uint64) * np.uint64(_STEP)


def _mixed_sum(bits: np.ndarray, keys: np.ndarray, number: int) -> int:
    x = keys + bits.astype(np.uint64)
    if number:
        x += np.uint64(number * 0xD1342543DE82EF95)
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(x, np.uint64(shift), out=shifted)
        x ^= shifted
        x *= np.uint64(factor)
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return int(x.sum(dtype=np.uint64))


def _over_processes(sums: list[int], spread: list[bool]) -> list[int]:
    """The sums of leaves that several processes hold, added up."""
    # Halves of 32 bits: JAX makes 64-bit numbers shorter unless it is told not to.
    halves = np.array([[x >> 32, x & 0xFFFFFFFF] for x in sums], np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, len(sums), 2)
    gathered = [
        sum((int(high) << 32) + int(low) for high, low in column) & _MASK
        for column in everywhere.transpose(1, 0, 2)
    ]
    return [a if many else x for x, a, many in zip(sums, gathered, spread, strict=True)]
