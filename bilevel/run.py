"""The host's side of a run: chunks one after the other, callbacks, interruption, and the result."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from typing import Any

import jax
import numpy as np

from bilevel import diagnosis, loop
from bilevel.constraints import Box, Fixed, bind
from bilevel.feed import EpisodeHalf, Feed
from bilevel.problem import Status
from bilevel.progress import reporter
from bilevel.result import Best, Result, Trajectory

_CHUNK_SECONDS = 1.0
_TRAJECTORY_ROWS = 2000
_BOOLEAN = ("accepted", "negative_curvature")
_INTEGER = ("nonfinite", "solver_steps")


class _Stop:
    def __repr__(self) -> str:
        return "bilevel.STOP"


STOP = _Stop()


class Run:
    """One run: chunks until something ends it."""

    def __init__(self, plan, carry, sources, test, steps, tol, callbacks, began):
        self.plan, self.carry, self.sources, self.test = plan, carry, sources, test
        self.steps, self.tol, self.callbacks, self.began = steps, tol, callbacks, began
        self.rows: list[np.ndarray] = []
        self.trail: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self.seconds: list[np.ndarray] = []
        self.pending: tuple[Any, float] | None = None
        leaves = bind(plan.problem.constraints, carry.hparams).leaves
        self.may_rest = any(isinstance(c, Box) for c in leaves) or all(isinstance(c, Fixed) for c in leaves)
        self.done = 0
        self.told = (0, 0)  # chunks and steps that callbacks have seen
        self.ended: tuple[Status, str] | None = None
        self.chunk_length = 1

    def go(self, progress: bool) -> Result:
        """Run to the end, whatever it is."""
        try:
            with Interrupt() as interrupt, reporter(progress, self.steps) as report:
                while self.ended is None:
                    self._advance()
                    report(self.done, self._row())
                    if interrupt.seen and self.ended is None:
                        self.ended = Status.INTERRUPTED, "Interrupted by the user."
        except KeyboardInterrupt:
            self._collect()  # a chunk that was under way
            self.ended = self.ended or (Status.INTERRUPTED, "Interrupted by the user.")
        except Exception as error:
            # From a callback or a data iterable: the user's own, passed on with what was computed.
            self.ended = Status.INTERRUPTED, f"{type(error).__name__} in a callback or an iterable."
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.carry)):
                # Otherwise the device failed in the middle of a chunk that it had been given.
                _attach(error, self.result()[0])
            raise
        result, warned = self.result()
        if warned:
            try:
                warnings.warn(warned, RuntimeWarning, stacklevel=3)
            except RuntimeWarning as error:
                _attach(error, result)
                raise
        return result

    # --- one chunk ---

    def _advance(self) -> None:
        length = self._next_length()
        sources, length = self._feed(length)
        if length == 0:
            return
        before = time.perf_counter()
        bounds = np.int32(self.done + length), np.float64(self.tol)
        carry = loop.compiled(self.plan)(self.carry, *bounds, *sources, self.test)
        self.pending = carry, before
        self._collect()
        if self.callbacks and self._callback_due():
            self._call_back()
        if self.ended is None and self.done >= self.steps:
            self.ended = Status.BUDGET, f"All {self.steps} outer steps are done."

    def _collect(self) -> None:
        """Wait for the chunk under way, if any, and take what it brought; all of it or nothing."""
        if self.pending is None:
            return
        carry, before = self.pending
        taken = int(carry.step) - self.done  # waits
        after = time.perf_counter()
        rows = np.asarray(carry.rows)[:taken].copy()
        trail = self._thin(np.asarray(carry.trail)[:taken], carry.hparams)
        seconds = before - self.began + (after - before) * np.arange(1, taken + 1) / max(taken, 1)
        first, self.pending, self.carry = self.done, None, carry
        self.rows.append(rows)
        self.trail.extend(trail)
        self.seconds.append(seconds)
        self.done += taken
        self._adapt(taken, after - before, first)
        status = Status(int(carry.status))
        if status == Status.CONVERGED:
            self.ended = status, f"The gradient norm is at most tol = {self.tol:g}."
        elif status != Status.RUNNING:
            self.ended = status, diagnosis.why_ended(status, self.history())

    def _thin(self, trail: np.ndarray, hparams) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """The rows of the trajectory that are kept, with their outer steps."""
        steps = np.arange(self.done, self.done + len(trail))
        if any(loop.quantile_leaves(hparams)):
            due = steps % self.plan.judge_every == 0
            steps, trail = steps[due], trail[due]
        return [(steps, loop.unpack_trail(trail.copy(), hparams))] if len(steps) else []

    def _next_length(self) -> int:
        length = min(self.chunk_length, self.plan.capacity, self.steps - self.done)
        if self.callbacks:  # called at multiples of judge_every, whatever the machine's speed
            every = self.plan.judge_every
            length = min(length, every - self.done % every)
        return length

    def _adapt(self, taken: int, seconds: float, first: int) -> None:
        if first > 0 and taken:  # the first chunk compiles
            wanted = int(_CHUNK_SECONDS * taken / max(seconds, 1e-9))
            self.chunk_length = max(1, min(wanted, 16 * self.chunk_length, self.plan.capacity))

    def _feed(self, length: int):
        """Sources for the next steps, and how many steps they last; ends the run where they do not."""
        fed: list[Any] = []
        for source in self.sources:
            if isinstance(source, (Feed, EpisodeHalf)):
                chunk, length = source.chunk(length, self.plan.capacity)
                if length == 0:
                    self.ended = Status.DATA_EXHAUSTED, f"{source.why_ended}."
                    return (), 0
                fed.append(chunk)
            else:
                fed.append(source)
        return fed, length

    def _callback_due(self) -> bool:
        return self.ended is not None or self.done % self.plan.judge_every == 0 or self.done >= self.steps

    def _call_back(self) -> None:
        chunk, step = self.told
        if step == self.done:
            return
        rows = self.history(chunk, step)
        self.told = (len(self.rows), self.done)
        replies = [callback(self.done, rows) for callback in self.callbacks]
        if any(reply is STOP for reply in replies):
            self.ended = self.ended or (Status.INTERRUPTED, "A callback returned STOP.")

    # --- what is reported ---

    def _row(self) -> dict[str, float]:
        if not self.rows:
            return {}
        return dict(zip(self.plan.columns, self.rows[-1][-1].tolist(), strict=True))

    def history(self, chunk: int = 0, step: int = 0) -> dict[str, np.ndarray]:
        """The rows from a chunk on, whose first outer step is given, as columns."""
        nothing = np.zeros((0, len(self.plan.columns)))
        rows = np.concatenate(self.rows[chunk:] or [nothing])
        steps = step + np.arange(len(rows))
        history: dict[str, np.ndarray] = {"step": steps}
        for name, column in zip(self.plan.columns, rows.T, strict=True):
            if name in _BOOLEAN:
                column = column.astype(bool)
            elif name in _INTEGER:
                column = column.astype(np.int32)
            elif name in self.plan.judged_columns:
                column = np.where(steps % self.plan.judge_every == 0, column, np.nan).astype(rows.dtype)
            history[name] = np.ascontiguousarray(column)
        history["seconds"] = np.concatenate(self.seconds[chunk:] or [np.zeros(0)])
        return history

    def result(self) -> tuple[Result, str]:
        """The result of the run as it stands, and what deserves a warning."""
        state, history = self.carry.state, self.history()
        params, hparams = state.params, self.carry.hparams
        best = self._best(params, hparams, history)
        status, message = self.ended or (Status.INTERRUPTED, "Interrupted by the user.")
        status, advice, warned = diagnosis.final(status, history, self.may_rest)
        result = Result(
            params=params,
            hparams=hparams,
            best=best,
            history=history,
            trajectory=self._trajectory(hparams),
            status=status,
            message=" ".join([message, *advice]),
            seconds=time.perf_counter() - self.began,
            test=self._test(params, hparams, best),
            model_state=state.model_state,
            state=state,
        )
        return result, " ".join(warned)

    def _best(self, params, hparams, history) -> Best:
        model_state = self.carry.state.model_state
        good = np.flatnonzero(history["accepted"])
        if self.carry.best is None:
            step = int(good[-1]) if len(good) else 0
            value = float(history["value"][step]) if len(good) else float("nan")
            return Best(params, hparams, value, step, model_state)
        kept = self.carry.best
        best = Best(kept[0], kept[1], float(kept[3]), int(kept[4]), kept[2])
        if self.plan.judges and len(good):
            # A sampled source was judged every so many steps: the pair at the end has its chance too.
            value = float(self._measure(params, hparams, model_state, self.sources[1])[0])
            if value < best.value:
                return Best(params, hparams, value, self.done, model_state)
        if np.isfinite(best.value):
            return best
        return Best(params, hparams, float("nan"), 0, model_state)

    def _measure(self, params, hparams, model_state, source):
        return loop.compiled_test(self.plan)(params, hparams, model_state, self.carry.key, source)

    def _test(self, params, hparams, best) -> dict[str, dict[str, float]] | None:
        if self.test is None:
            return None
        pairs = {
            "last": (params, hparams, self.carry.state.model_state),
            "best": (best.params, best.hparams, best.model_state),
        }
        measured = {}
        for name, pair in pairs.items():
            value, metrics = self._measure(*pair, self.test)
            measured[name] = {"value": float(value), **{k: float(v) for k, v in metrics.items()}}
        return measured

    def _trajectory(self, hparams) -> Trajectory:
        last = loop.unpack_trail(loop.last_trail(hparams, self.carry.trail.dtype), hparams)
        pieces = [*self.trail, (np.array([self.done]), last)]
        steps = np.concatenate([steps for steps, _ in pieces])
        keep = np.arange(len(steps)) % (-(-len(steps) // _TRAJECTORY_ROWS)) == 0
        keep[-1] = True
        leaves = [np.concatenate(parts)[keep] for parts in zip(*(p for _, p in pieces), strict=True)]
        tree = jax.tree.unflatten(jax.tree.structure(hparams), leaves)
        return Trajectory(steps[keep], tree, loop.quantile_leaves(hparams))


def _attach(error: BaseException, result: Result) -> None:
    error.partial_result = result  # type: ignore[attr-defined]
    error.add_note("bilevel: what was computed is in this exception's partial_result.")


class Interrupt:
    """Turns the first Ctrl-C into a wish to stop after the chunk; the second one raises at once."""

    seen = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *exc):
        if self._main:
            signal.signal(signal.SIGINT, self._previous)
