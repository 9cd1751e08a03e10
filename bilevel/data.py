"""Where batches come from: whole arrays, minibatches, stacked batches, Python iterables.

A source is a registered pytree without a position of its own: batch ``t`` is a pure function of
``(key, t)``, so that resuming, sharding and vmapping need nothing more than the two. `draw` turns a source
and a position into the function that methods hand to estimators.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from bilevel import validation
from bilevel.problem import Batch, Draw, PyTree, register, static

# Up to this many rows an epoch's shuffle is a sorted permutation, above a keyed bijection.
_SORTED_ROWS = 256
_ROUNDS = 8
# Keys that are folded from the same one as the epochs' shuffles are kept apart from them by these.
_FRESH, _RNG = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
# Fresh batches are drawn at random from as many positions as there are below this one, and from it on.
_FAR = np.int32(2**30)


@runtime_checkable
class Source(Protocol):
    """What train and valid become."""

    @property
    def sampled(self) -> bool:
        """Whether batches beyond the step's own are fresh ones."""
        ...

    @property
    def restarts(self) -> bool:
        """Whether positions count from zero in every outer step."""
        ...

    @property
    def renewed(self) -> bool:
        """Whether an outer step sees something else than the one before.

        If so, a step that failed may well succeed when it is repeated.
        """
        ...

    def batch(self, key, t) -> Batch:
        """Batch ``t``; both may be traced."""
        ...

    def index(self, key, t) -> jax.Array:
        """Row numbers of batch ``t``."""
        ...

    @property
    def num_batches(self) -> int:
        """Batches in one pass."""
        ...

    def whole(self, key) -> Batch:
        """All rows as one batch."""
        ...


@register
@dataclasses.dataclass(frozen=True)
class Whole:
    """The same arrays at every step; ``renewed`` where an iterable is behind them."""

    arrays: PyTree
    renewed: bool = static(default=False)
    sampled = False
    restarts = False
    num_batches = 1

    def batch(self, key, t):
        del key, t
        return self.arrays

    def numbered(self, key, i):
        del key, i
        return self.arrays

    def index(self, key, t):
        del key, t
        return jnp.arange(rows(self.arrays))

    def whole(self, key):
        del key
        return self.arrays


@register
@dataclasses.dataclass(frozen=True)
class Minibatches:
    """See `minibatches`."""

    arrays: PyTree
    batch_size: int = static()
    asked: int | None = static(default=None)
    fixed: bool = static(default=False)
    # Where each leaf lies, which a tracer does not show.
    shardings: tuple[NamedSharding | None, ...] = static(default=())
    sampled = True
    restarts = False
    renewed = True

    @property
    def strata(self) -> int:
        """Blocks of rows that have a share in each batch: as asked, else one for each shard of the rows."""
        return self.asked or self._shards

    @property
    def _shards(self) -> int:
        return max((_row_shards(sharding) for sharding in self.shardings), default=1)

    @property
    def num_batches(self) -> int:
        return (rows(self.arrays) // self.strata) // (self.batch_size // self.strata)

    def batch(self, key, t):
        batch = self._rows_of(self.index(key, t))
        if self._shards == 1 or self.batch_size % self._shards:
            return batch
        leaves, treedef = jax.tree.flatten(batch)
        return jax.tree.unflatten(treedef, map(_constrained, leaves, self.shardings))

    def _rows_of(self, index) -> Batch:
        if self.strata == 1:
            return jax.tree.map(lambda array: array[index], self.arrays)
        block = rows(self.arrays) // self.strata
        local = index.reshape(self.strata, -1) - block * jnp.arange(self.strata)[:, None]

        def take(array):
            # One gather inside each block of rows, which stays where the block lies.
            blocks = array[: block * self.strata].reshape(self.strata, block, *array.shape[1:])
            return jax.vmap(lambda rows, i: rows[i])(blocks, local).reshape(-1, *array.shape[1:])

        return jax.tree.map(take, self.arrays)

    def index(self, key, t):
        epoch, place = jnp.divmod(jnp.asarray(t), self.num_batches)
        shuffle = jax.random.fold_in(key, epoch)
        if self.fixed:
            place, shuffle = permute(shuffle, place[None], self.num_batches)[0], key
        return self._index_at(shuffle, place)

    def numbered(self, key, i) -> Batch:
        """Fixed batch ``i`` of ``num_batches``; may be traced."""
        return self._rows_of(self._index_at(key, jnp.asarray(i)))

    def _index_at(self, shuffle, place) -> jax.Array:
        """Row numbers of the batch at a place in a shuffled pass."""
        share, block = self.batch_size // self.strata, rows(self.arrays) // self.strata
        positions = place * share + jnp.arange(share, dtype=place.dtype)
        if self.strata == 1:
            return permute(shuffle, positions, block)
        keys = jax.vmap(lambda s: jax.random.fold_in(shuffle, s))(jnp.arange(self.strata))
        local = jax.vmap(lambda k: permute(k, positions, block))(keys)
        return (local + block * jnp.arange(self.strata, dtype=local.dtype)[:, None]).reshape(-1)

    def whole(self, key):
        del key
        return self.arrays

    def checked(self) -> Minibatches:
        """The same; ValueError where its batches cannot have a share of each block of rows."""
        if self.batch_size % self.strata == 0:
            return self
        if self.asked:
            raise ValueError(f"strata must divide batch_size = {self.batch_size}, got {self.strata}.")
        raise ValueError(
            f"batch_size must be a multiple of the {self.strata} shards that the rows lie in, got "
            f"{self.batch_size}. (strata=1 draws from all rows alike, which moves rows between devices.)"
        )

    def __repr__(self) -> str:
        strata = f", strata={self.strata}" if self.strata > 1 else ""
        fixed = ", fixed=True" if self.fixed else ""
        return f"minibatches({rows(self.arrays)} rows, batch_size={self.batch_size}{strata}{fixed})"


@register
@dataclasses.dataclass(frozen=True)
class Stacked:
    """See `stacked`. ``renewed``: another stack at every outer step (an iterable behind it)."""

    batches: PyTree
    renewed: bool = static(default=False)
    sampled = False
    restarts = True

    @property
    def num_batches(self) -> int:
        return rows(self.batches)

    def batch(self, key, t):
        del key
        t = jnp.minimum(t, self.num_batches - 1)
        return jax.tree.map(lambda array: array[t], self.batches)

    def index(self, key, t):
        del key
        return jnp.minimum(t, self.num_batches - 1)[None]

    def whole(self, key):
        raise TypeError("stacked batches have no whole.")


@register
@dataclasses.dataclass(frozen=True)
class WithRng:
    """See `with_rng`."""

    source: Any
    renewed = True

    @property
    def sampled(self) -> bool:
        return self.source.sampled

    @property
    def restarts(self) -> bool:
        return self.source.restarts

    @property
    def num_batches(self) -> int:
        return self.source.num_batches

    def batch(self, key, t):
        return self.source.batch(key, t), jax.random.fold_in(jax.random.fold_in(key, _RNG), t)

    def index(self, key, t):
        return self.source.index(key, t)

    def whole(self, key):
        return self.source.whole(key), key


def _row_shards(sharding: NamedSharding | None) -> int:
    """How many pieces the leading axis is in."""
    if sharding is None or not sharding.spec or sharding.spec[0] is None:
        return 1
    axes = sharding.spec[0]
    return math.prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def _constrained(array, sharding: NamedSharding | None):
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)


def shardings(arrays: PyTree) -> tuple[NamedSharding | None, ...]:
    """For each leaf where it lies, None for one that lies on one device or nowhere in particular."""

    def where(leaf):
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return None
        sharding: Any = leaf.sharding
        return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None

    return tuple(where(leaf) for leaf in jax.tree.leaves(arrays))


def minibatches(arrays, batch_size: int, strata: int | None = None, fixed: bool = False) -> Minibatches:
    """Sampled on device: one shuffled pass per epoch, the tail dropped.

    Args:
      arrays: a pytree of arrays with the same leading axis, one row per example.
      batch_size: rows in a batch, at most the number of rows.
      strata: draw an equal share of each batch from each of so many contiguous blocks of rows: sampling
        stays local to devices that hold whole blocks. Rows beyond a multiple of it are left out. Default:
        one block for each shard of the rows, so that what is drawn depends on how many there are; a number
        that fits several meshes draws the same on all of them.
      fixed: every epoch visits the same batches, in shuffled order (for tables kept per batch).

    Raises:
      TypeError, ValueError: arrays that are ragged, empty or not numeric; a batch size that does not fit.

    Example:
      >>> import bilevel, jax, numpy as np
      >>> source = bilevel.minibatches({"x": np.arange(6.0)}, batch_size=2)
      >>> key = jax.random.key(0)
      >>> epoch = [int(i) for t in range(3) for i in source.index(key, t)]
      >>> sorted(epoch)
      [0, 1, 2, 3, 4, 5]
    """
    arrays = as_arrays(arrays, "minibatches(arrays)")
    n = _leading_axis(arrays, "minibatches(arrays)")
    batch_size = validation.whole_number("batch_size", batch_size, 1)
    if batch_size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of the data, got {batch_size}.")
    asked = None if strata is None else validation.whole_number("strata", strata, 1)
    fixed = validation.flag("fixed", fixed)
    return Minibatches(arrays, batch_size, asked, fixed, shardings(arrays)).checked()


def stacked(batches) -> Stacked:
    """One batch for each inner step, along the leading axis; the same stack at every outer step.

    Args:
      batches: a pytree of arrays of shape (inner_steps, ...).

    Raises:
      TypeError, ValueError: arrays that are ragged, empty or not numeric.
    """
    batches = as_arrays(batches, "stacked(batches)")
    _leading_axis(batches, "stacked(batches)")
    return Stacked(batches)


def with_rng(source) -> WithRng:
    """A source that yields ``(batch, key)``, for dropout and augmentation without global state.

    The key belongs to the batch: it changes from inner step to inner step and stays the same within
    one hypergradient, so that a linear solve sees one matrix.

    Args:
      source: arrays, `minibatches`, `stacked`, or an iterable for `optimize`.
    """
    return WithRng(source if is_iterable(source) else as_source(source, "with_rng(source)"))


@dataclasses.dataclass(frozen=True)
class Episodes:
    """See `episodes`."""

    pairs: Any


def episodes(iterable) -> Episodes:
    """One pair ``(train, valid)`` per outer step, each used whole at every inner step: meta-learning.

    It stands for both: pass it as ``train`` to `bilevel.optimize` and None as ``valid``.

    Args:
      iterable: of pairs of pytrees of arrays, all of the same shapes.

    Raises:
      TypeError: not an iterable.
    """
    if not is_iterable(iterable) and not isinstance(iterable, (list, tuple)):
        raise TypeError(f"episodes takes an iterable of pairs (train, valid), got {iterable!r:.80}.")
    return Episodes(iterable)


# --- For methods and the driver --------------------------------------------------------------------


def as_source(data, name: str) -> Source:
    """The source that stands for ``data``; arrays are used whole.

    Raises:
      TypeError, ValueError: not arrays, empty, or an iterable (which only `optimize` takes).
    """
    if is_iterable(data.source if isinstance(data, WithRng) else data):
        raise TypeError(
            f"{name} is a Python iterable ({type(data).__name__}); only bilevel.optimize draws from "
            "one. Here pass a batch, or bilevel.stacked(batches)."
        )
    if isinstance(data, Episodes):
        raise TypeError(
            f"{name} is episodes(...), which goes to bilevel.optimize as train and stands for both."
        )
    if isinstance(data, Source):
        return data
    return Whole(as_arrays(data, name))


def is_iterable(data) -> bool:
    """Whether data is a Python iterable of batches rather than a pytree of arrays."""
    leaf = jax.tree_util.all_leaves([data]) and not isinstance(data, Source)
    return (
        leaf
        and not hasattr(data, "shape")
        and not isinstance(data, (str, bytes))
        and (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
    )


def as_arrays(data, name: str) -> PyTree:
    """The leaves of data as arrays; checks that there are any and that none is empty."""
    if is_iterable(data):
        raise TypeError(f"{name} must be arrays, got a Python iterable ({type(data).__name__}).")
    if not jax.tree.leaves(data):
        raise ValueError(f"{name} holds no arrays, got {data!r}.")

    def convert(path, leaf):
        where = name + jax.tree_util.keystr(path)
        array: Any = leaf
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            try:
                array = np.asarray(leaf)
            except ValueError as error:
                raise ValueError(f"{where} is ragged or not an array: {error}.") from None
            if array.dtype.kind not in "biufcV" or array.dtype.names:
                raise TypeError(f"{where} must be numeric, got {_kind(leaf)}.")
            array = jnp.asarray(array)
        if array.size == 0:
            raise ValueError(f"{where} is empty: shape {array.shape}.")
        return array

    return jax.tree_util.tree_map_with_path(convert, data)


def abstract_batch(source: Source, whole: bool = False) -> Batch:
    """The shapes of a batch (or of the whole), without computing one."""
    if isinstance(source, Whole):
        return source.arrays

    def batch(source):
        key = jax.random.key(0)
        return source.whole(key) if whole else source.batch(key, 0)

    return jax.eval_shape(batch, source)


def _leading_axis(arrays, name: str) -> int:
    shapes = [np.shape(x) for x in jax.tree.leaves(arrays)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            f"{name} need one leading axis of the same length in every array, got shapes "
            f"{', '.join(map(str, shapes))}."
        )
    return shapes[0][0]


def _kind(leaf) -> str:
    return f"text {leaf!r}" if isinstance(leaf, str) else f"{type(leaf).__name__} {leaf!r:.60}"


def rows(arrays, axes: int = 1) -> int:
    """Examples in a batch: its longest leading axis, or product of so many axes; 1 where no leaf has one."""
    return max((math.prod(jnp.shape(x)[:axes]) for x in jax.tree.leaves(arrays)), default=1)


def draw(source: Source, key, position, steps: int, count=0, own: Any = True) -> Draw:
    """The training batches of one outer step that begins at batch ``position`` of the source.

    Own batches are ``position, ..., position + steps - 1`` of the run's key. Fresh ones are each of a pass of
    its own, far from those that a run comes to and picked by the number of outer steps so far, ``count``:
    they disturb neither this epoch nor the next, and are independent of each other, as the factors of a
    product have to be. In a step that takes no batches (``own`` is False) all of a sampled source are fresh.
    """
    if source.restarts:
        aside = jax.random.fold_in(jax.random.fold_in(key, _FRESH), count)
        return Draw(lambda j: source.batch(aside, _own(j, steps)), steps, source.sampled)
    if not source.sampled:
        return Draw(lambda j: source.batch(key, position + _own(j, steps)), steps, False)

    # Where a fresh batch lies is a hash of key, count and j: random bits are dear in a loop, and the rows
    # that are found there are shuffled by them anyway.
    salt = _mix(jnp.asarray(count).astype(jnp.uint32))
    for word in jax.random.key_data(key):
        salt = _mix(salt ^ word)

    def batch(j):
        j = jnp.asarray(j, jnp.int32)
        mine = (j < steps) & own
        far = _FAR + (_mix(salt ^ _mix(j.astype(jnp.uint32))) >> 2).astype(jnp.int32)
        return source.batch(key, jnp.where(mine, position + j, far))

    return Draw(batch, steps, True)


def _own(j, steps: int):
    return jnp.minimum(jnp.asarray(j, jnp.int32), steps - 1)


def check_sources(train: Source, valid: Source, steps: int) -> None:
    """Raise ValueError or TypeError where a stack does not fit what an outer step takes."""
    if train.restarts and train.num_batches != steps:
        raise ValueError(
            f"train is stacked for {train.num_batches} inner steps, but {steps} "
            f"{'is' if steps == 1 else 'are'} taken."
        )
    whole_source(valid, "valid")


def whole_source(source: Source, name: str) -> Source:
    """The source, if it is no stack; else TypeError."""
    if source.restarts:
        raise TypeError(
            f"{name} is stacked, but only train takes one batch for each inner step; pass arrays, "
            "minibatches or an iterable."
        )
    return source


@functools.partial(jax.jit, static_argnames="n")
def permute(key, positions: jax.Array, n: int) -> jax.Array:
    """Where ``positions`` of ``range(n)`` go in a shuffle that only ``key`` determines.

    For large n a keyed bijection: an alternating Feistel network on the bits of the position, and
    cycle walking back into the range. Nothing of size n is made, so that a batch of a million-row data
    set costs what its own rows cost.
    """
    if n <= _SORTED_ROWS:
        return jax.random.permutation(key, n)[positions]
    bits = max(2, math.ceil(math.log2(n)))
    low_bits = bits // 2
    high_mask, low_mask = (1 << (bits - low_bits)) - 1, (1 << low_bits) - 1
    round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def shuffle(x):
        high, low = x >> low_bits, x & low_mask
        for i in range(_ROUNDS):
            if i % 2:
                low = low ^ (_mix(high ^ round_keys[i]) & low_mask)
            else:
                high = high ^ (_mix(low ^ round_keys[i]) & high_mask)
        return (high << low_bits) | low

    def walk(x):
        return jnp.where(x >= n, shuffle(x), x)

    start = shuffle(positions.astype(jnp.uint32))
    if n == 1 << bits:
        return start.astype(jnp.int32)
    return jax.lax.while_loop(lambda x: jnp.any(x >= n), walk, start).astype(jnp.int32)


def _mix(x):
    """A full-avalanche mix of 32 bits (multiply and xor-shift, constants of Mueller's `hash32`)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
    x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
    return x ^ (x >> 16)
