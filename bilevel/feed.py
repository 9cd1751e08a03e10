"""Batches from a Python iterable, stacked for a chunk of outer steps and fetched ahead.

Any iterable of pytrees of arrays will do (numpy, grain, tf.data, torch loaders). A thread of its own
fetches a few batches ahead, so that loading overlaps with computing.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import validation
from bilevel.data import Episodes, Source, Stacked, Whole, WithRng, as_arrays
from bilevel.problem import PyTree, register, static

# Batches of a chunk, and those fetched ahead, take at most so many bytes and so many steps.
_BYTES, _STEPS = 2**27, 16
_END = object()
# Batches taken, and the iterator's state behind them as JSON.
Position = tuple[int, str | None]


@register
@dataclasses.dataclass(frozen=True)
class Fed:
    """Batches for a chunk of outer steps, along the leading axis; ``at`` is one step's source.

    ``single``: one batch a step (validation), without an axis of inner steps. ``rng``: with keys.
    """

    batches: PyTree
    single: bool = static()
    rng: bool = static()

    def at(self, i) -> Source:
        """The source of the chunk's ``i``-th outer step."""
        batches = jax.tree.map(lambda array: array[i], self.batches)
        source = Whole(batches, renewed=True) if self.single else Stacked(batches, renewed=True)
        return WithRng(source) if self.rng else source


class Feed:
    """Fetches batches from an iterable; what was taken to look at shapes is not lost."""

    def __init__(self, data: Iterable | WithRng, name: str, per_step: int, single: bool):
        self.name, self.per_step, self.single = name, per_step, single
        self.rng = isinstance(data, WithRng)
        self._iterator: Any = iter(data.source if isinstance(data, WithRng) else data)
        self.taken = 0
        self.why_ended: str | None = None
        # How batches get onto the devices of a mesh: (batches, name, leading axes) -> batches.
        self.place: Callable = lambda batches, name, leading: jax.tree.map(jnp.asarray, batches)
        # Names of the two parts of each batch, if it is a pair.
        self.halves: tuple[str, ...] = ()
        self._state: str | None = None
        self._start(1)
        try:
            first = self._next()
            if first is _END:
                raise ValueError(f"{name} is an iterable without any batch.")
            self.first = as_arrays(first, f"{name}[0]")
        except BaseException:
            self.close()
            raise
        self.last_chunk: tuple[Fed | None, int] = (None, 0)
        # Batches drawn for the outer steps from `_begun` on, and where the iterable stood after each step.
        self._rows: list[PyTree] = []
        self._begun = 0
        self._marks: dict[int, Position] = {0: (0, self._state)}
        self._shapes = _shapes(self.first)
        size = sum(x.nbytes for x in jax.tree.leaves(self.first) if isinstance(x, jax.Array)) * per_step
        self.capacity = max(1, min(_STEPS, _BYTES // max(size, 1)))
        self._queue.maxsize = self.capacity * per_step
        self._pushed_back = [self.first]

    def example(self) -> Source:
        """A source with the shapes of one outer step, for checks and for the first state."""
        one = self.first if self.single else _stack([self.first] * self.per_step)
        return self._fed([one]).at(0)

    def _fed(self, rows: list[PyTree]) -> Fed:
        return Fed(self.placed(_stack(rows), 1 if self.single else 2), self.single, self.rng)

    def placed(self, batches: PyTree, leading: int) -> PyTree:
        """Batches behind ``leading`` axes on the devices of the run."""
        if not self.halves:
            return self.place(batches, self.name, leading)
        return tuple(self.place(*half, leading) for half in zip(batches, self.halves, strict=True))

    def check(self, check: Callable[[PyTree, str], None]) -> None:
        """Have the first batch checked, given with its name."""
        halves = zip(self.first, self.halves, strict=True) if self.halves else [(self.first, self.name)]
        for half in halves:
            check(*half)

    def chunk(self, done: int, steps: int, capacity: int) -> tuple[Fed | None, int]:
        """Batches for some outer steps, and how many steps they last.

        What was drawn before for steps from ``done`` on, and not used because other data lasted fewer steps,
        comes again.

        Args:
          done: outer steps so far.
          steps: wanted at most.
          capacity: what they are padded to.
        """
        self._rows, self._begun = self._rows[done - self._begun :], done
        self._marks = {step: mark for step, mark in self._marks.items() if step >= done}
        while len(self._rows) < steps:
            try:
                batches = list(itertools.islice(self._checked(), self.per_step))
            except Exception:
                if not self._rows:
                    raise
                break  # first run what is there; the same error waits in the queue
            if len(batches) < self.per_step:
                self.why_ended = self.why_ended or f"{self.name} ended after {self.taken} batches"
                break
            self._rows.append(batches[0] if self.single else _stack(batches))
            self._marks[done + len(self._rows)] = self.taken, self._state
        rows = self._rows[:steps]
        if not rows:
            return None, 0
        return self._fed(rows + rows[-1:] * (capacity - len(rows))), len(rows)

    def close(self) -> None:
        """Stop fetching; what was fetched ahead is dropped."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    # --- where it stands, for checkpoints ---

    def resumable(self, reread: bool) -> None:
        """Whether a run may go on behind the batches that it has taken.

        Raises:
          TypeError: the iterable has no state of its own that can be written, and may not be read again.
        """
        if self._state is None and not reread:
            raise TypeError(
                f"{self.name} is an iterable without get_state and set_state (or with a state that JSON "
                "cannot hold): a run cannot go on where it stopped. If it gives the same batches each time, "
                "pass checkpoint=bilevel.checkpoints(path, reread=True): those that were taken are then read "
                "again and skipped."
            )

    def position(self, steps: int) -> Position:
        """Where it stood after so many outer steps: batches taken, and its own state where it has one.

        Known of the steps from the last chunk's first on.
        """
        return self._marks[steps]

    def seek(self, steps: int, position: Position) -> None:
        """Go on behind the batches that were taken in so many outer steps."""
        taken, state = position
        if state is not None:
            self.close()
            self._thread.join()  # for as long as it takes: it must not draw from what is set now
            self._iterator.set_state(_decoded(state))
            self._pushed_back = []
            self._start(self.capacity * self.per_step)
        else:
            for _ in range(taken):
                if (self._pushed_back.pop() if self._pushed_back else self._next()) is _END:
                    raise ValueError(
                        f"{self.name} ended while the {taken} batches that the run had taken were read "
                        "again: it does not give the same batches as before."
                    )
        self.taken, self._state = taken, state
        self._rows, self._begun, self._marks = [], steps, {steps: (taken, state)}

    # --- the thread that fetches ---

    def _start(self, ahead: int) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def _checked(self) -> Iterator[PyTree]:
        while self.why_ended is None:
            batch = self._pushed_back.pop() if self._pushed_back else self._next()
            if batch is _END:
                return
            if _shapes(batch) != self._shapes:
                self.why_ended = (
                    f"{self.name} gave a batch of other shapes after {self.taken} batches, "
                    f"{validation.describe(batch)} instead of {validation.describe(self.first)} (a shorter "
                    "last batch? drop it in the loader)"
                )
                return
            self.taken += 1
            yield batch

    def _fetch(self) -> None:
        try:
            for batch in self._iterator:
                if not self._put((jax.tree.map(_to_array, batch), _encoded_state(self._iterator))):
                    return
            self._put(_END)
        except BaseException as error:  # handed to the thread that asks for the batch
            self._put(error)

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _next(self) -> Any:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        if item is _END:
            self._queue.put(_END)
            return item
        batch, self._state = item
        return batch


class EpisodeHalf:
    """The training or the validation half of a feed of pairs; the training half fetches for both."""

    single = True

    def __init__(self, feed: Feed, half: int):
        self.feed, self.half = feed, half

    @property
    def why_ended(self) -> str | None:
        """Why there are no more."""
        return self.feed.why_ended

    def example(self) -> Source:
        """A source with the shapes of one outer step."""
        return Whole(self.feed.placed(self.feed.first, 0)[self.half], renewed=True)

    def chunk(self, done: int, steps: int, capacity: int) -> tuple[Fed | None, int]:
        """As `Feed.chunk`."""
        if self.half == 0:
            self.feed.last_chunk = self.feed.chunk(done, steps, capacity)
        fed, lasts = self.feed.last_chunk
        return fed and Fed(fed.batches[self.half], single=True, rng=False), lasts


# What stands for an iterable among the sources of a run.
FED = (Feed, EpisodeHalf)


def halves(pairs: Episodes) -> tuple[Feed, EpisodeHalf, EpisodeHalf]:
    """The feed of a source of episodes, and its two halves."""
    feed = Feed(pairs.pairs, "episodes", 1, single=True)
    if not isinstance(feed.first, (tuple, list)) or len(feed.first) != 2:
        feed.close()
        raise ValueError(f"episodes must yield pairs (train, valid), got {validation.describe(feed.first)}.")
    feed.halves = ("train", "valid")
    return feed, EpisodeHalf(feed, 0), EpisodeHalf(feed, 1)


def _encoded_state(iterator) -> str | None:
    """The state of an iterator that has one (grain's have), if JSON can hold it."""
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        return None
    state = iterator.get_state()
    if isinstance(state, bytes):
        return json.dumps({"bytes": base64.b64encode(state).decode()})
    try:
        text = json.dumps({"json": state})
    except (TypeError, ValueError):
        return None
    # A tuple would come back as a list, a number that is a key as text.
    return text if json.loads(text)["json"] == state else None


def _decoded(state: str):
    content = json.loads(state)
    return base64.b64decode(content["bytes"]) if "bytes" in content else content["json"]


def _to_array(leaf):
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _shapes(batch) -> tuple:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)


def _stack(batches: list[PyTree]) -> PyTree:
    """On the host, but for leaves that are already on devices of theirs and for keys."""

    def stack(*leaves):
        first = leaves[0]
        there = isinstance(first, jax.Array) and (
            jnp.issubdtype(first.dtype, jax.dtypes.prng_key) or len(first.sharding.device_set) > 1
        )
        return jnp.stack(leaves) if there else np.stack([np.asarray(x) for x in leaves])

    return jax.tree.map(stack, *batches)
