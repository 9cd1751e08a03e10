"""What the processes of one run over several hosts have to agree on.

All processes run the same program over one mesh (`jax.distributed`). The host loop of each decides by the
clock, by signals and by its own share of the data, so that these decisions are made together; progress,
callbacks and files belong to the first process. All functions here but `first` and `shared` are collective:
each process has to call them, in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel.problem import PyTree
from bilevel.trees import readable


class PeerError(RuntimeError):
    """Another process of the run has failed or is gone."""


def first() -> bool:
    """Whether this is the process that reports and writes."""
    return jax.process_index() == 0


def gather(values) -> np.ndarray:
    """The 32-bit integers of each process; shape (processes, len(values))."""
    mine = np.asarray(values, np.int32)
    return np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)


def gather_bytes(content: bytes) -> list[bytes]:
    """The bytes of each process."""
    sizes = gather([len(content)])[:, 0]
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(jax.process_count(), -1)
    return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]


def share(content: bytes | None) -> bytes | None:
    """The bytes of the first process, or None where it has none; others' are ignored."""
    size = int(gather([-1 if content is None else len(content)])[0, 0])
    if size < 0:
        return None
    mine = np.frombuffer(content, np.uint8) if content and first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


def fetch(tree: PyTree) -> PyTree:
    """The tree with numpy arrays for what no single process holds; collective only where there is such."""

    def whole(leaf):
        if readable(leaf):
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree) if shared(tree) else tree


def shared(tree: PyTree) -> bool:
    """Whether arrays lie on devices of several processes; not collective."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def watched(spans: bool) -> Iterator[None]:
    """Of a run that spans several processes: the failure of one is soon known to all, and said in words."""
    try:
        yield
    except Exception as error:
        if spans:
            _do_not_wait()
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        if not spans or not lost or any(own in str(error) for own in _OWN_FAILURES):
            raise
        raise PeerError(
            "Another process of this run has ended or cannot be reached, so that none can go on. Start all "
            "processes again; with checkpoint= they go on from the last checkpoint."
        ) from error


# Errors of this process rather than of a connection.
_OWN_FAILURES = ("RESOURCE_EXHAUSTED", "CpuCallback", "INVALID_ARGUMENT")


def _do_not_wait() -> None:
    """At exit JAX would wait for processes that are gone, or that wait for this one: a minute or more."""
    with contextlib.suppress(ImportError):
        from jax._src.api import clean_up

        atexit.unregister(clean_up)
