"""What the processes of one run over several hosts have to agree on.

All processes run the same program over one mesh (`jax.distributed`). The host loop of each decides by the
clock, by signals and by its own share of the data, so that these decisions are made together; progress,
callbacks and files belong to the first process. All functions here but `first` and `shared` are
collective: each process has to call them, in the same order.

Every exchange begins with one message of a fixed length. A process that fails sends another one instead, so
that those that wait for it learn of it there, whatever they were about to exchange.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from bilevel.problem import PyTree
from bilevel.trees import readable

# Words of a message: how many values, or that this process has failed; then the values.
_WORDS, _FAILED = 8, -1
# Bytes that are exchanged at a time.
_BLOCK = 2**24


class PeerError(RuntimeError):
    """Another process of the run has failed or is gone."""


class _FailedElsewhereError(PeerError):
    """What `gather` raises where another process has failed; `agreed` says which failure it was."""


def first() -> bool:
    """Whether this is the process that reports and writes."""
    return jax.process_index() == 0


def gather(values: Sequence) -> np.ndarray:
    """Up to seven 32-bit integers of each process; shape (processes, len(values)).

    Raises:
      PeerError: another process has failed, or exchanges something else.
    """
    every = _exchanged([len(values), *values])
    if (every[:, 0] == _FAILED).any():
        raise _FailedElsewhereError("Another process of this run has failed; see its own error.")
    if (every[:, 0] != len(values)).any():
        raise PeerError("The processes of this run do not do the same: all have to run the same script.")
    return every[:, 1 : 1 + len(values)]


def _exchanged(words: Sequence) -> np.ndarray:
    mine = np.zeros(_WORDS, np.int32)
    mine[: len(words)] = words
    return np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)


@contextlib.contextmanager
def agreed(spans: bool, otherwise: str) -> Iterator[None]:
    """A block that fails in all processes or in none; not nested.

    Args:
      spans: whether the run spans several processes; if not, nothing happens here.
      otherwise: what a process says where another one has failed.

    Raises:
      PeerError: another process has failed.
    """
    try:
        yield
        if spans:
            gather([])
    except _FailedElsewhereError:
        raise PeerError(otherwise) from None
    except Exception as error:
        if spans and not isinstance(error, PeerError) and not _lost(error):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _exchanged([_FAILED])
        raise


def gather_bytes(content: bytes) -> list[bytes]:
    """The bytes of each process."""
    sizes = [_joined(halves) for halves in gather(_halves(len(content)))]
    every: list[list[bytes]] = [[] for _ in sizes]
    for block in _blocks(max(sizes)):
        mine = np.zeros(block.stop - block.start, np.uint8)
        part = np.frombuffer(content, np.uint8)[block]
        mine[: len(part)] = part
        rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(len(sizes), -1)
        for parts, row, size in zip(every, rows, sizes, strict=True):
            parts.append(row[: max(size - block.start, 0)].tobytes())
    return [b"".join(parts) for parts in every]


def share(content: bytes | None) -> bytes | None:
    """The bytes of the first process, or None where it has none; others' are ignored."""
    size = _joined(gather(_halves(-1 if content is None else len(content)))[0])
    if size < 0:
        return None
    parts = []
    for block in _blocks(size):
        mine = np.zeros(block.stop - block.start, np.uint8)
        if content is not None and first():
            mine = np.frombuffer(content, np.uint8)[block]
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes())
    return b"".join(parts)


def _halves(number: int) -> tuple[int, int]:
    """A number as two that have 32 bits."""
    return divmod(number, 2**31)


def _joined(halves: Sequence) -> int:
    high, low = map(int, halves)
    return high * 2**31 + low


def _blocks(size: int) -> Iterator[slice]:
    for begin in range(0, size, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, size))


def fetch(tree: PyTree, here: bool = True) -> PyTree:
    """The tree with numpy arrays, and keys, for what no single process holds.

    Collective only where there is such. One array after the other is on every device meanwhile.

    Args:
      tree: of arrays.
      here: whether this process wants them; if not, None comes for each such array, and nothing is copied.
    """

    def whole(leaf):
        if readable(leaf):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = whole(jax.random.key_data(leaf))
            return data if data is None else jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not isinstance(leaf.sharding, NamedSharding):
            array = multihost_utils.process_allgather(leaf, tiled=True)
            return array if here else None
        everywhere = jax.jit(_same, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        everywhere.block_until_ready()
        return np.asarray(everywhere.addressable_data(0)) if here else None

    return jax.tree.map(whole, tree) if shared(tree) else tree


def _same(x):
    return x


def shared(tree: PyTree) -> bool:
    """Whether arrays lie on devices of several processes; not collective."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def watched(spans: bool) -> Iterator[None]:
    """Of a run that spans several processes: the failure of one is soon known to all, and said in words."""
    try:
        yield
    except BaseException as error:
        if spans:
            _do_not_wait()
        if not spans or not _lost(error):
            raise
        raise PeerError(
            "Another process of this run has ended or cannot be reached, so that none can go on. Start all "
            "processes again; with checkpoint= they go on from the last checkpoint."
        ) from error


# Errors of this process rather than of a connection.
_OWN_FAILURES = ("RESOURCE_EXHAUSTED", "CpuCallback", "INVALID_ARGUMENT")


def _lost(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached."""
    lost = isinstance(error, jax.errors.JaxRuntimeError)
    return lost and not any(own in str(error) for own in _OWN_FAILURES)


def _do_not_wait() -> None:
    """At exit JAX would wait for processes that are gone, or that wait for this one: a minute or more."""
    with contextlib.suppress(ImportError):
        from jax._src.api import clean_up

        atexit.unregister(clean_up)
