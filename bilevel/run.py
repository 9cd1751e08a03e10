"""The host's side of a run: chunks one after the other, callbacks, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from typing import Any

import jax
import numpy as np

from bilevel import diagnosis, hosts, loop, report
from bilevel.feed import FED
from bilevel.interruption import Interrupt, Watch
from bilevel.keeper import Keeper
from bilevel.memory import analysed, warn_where_too_large
from bilevel.placement import Placement
from bilevel.populations import Population, padded, survivors
from bilevel.preparation import Prepared
from bilevel.problem import Status
from bilevel.progress import reporter
from bilevel.record import Record
from bilevel.result import Result

_CHUNK_SECONDS = 1.0
# How long a chunk under way may take to be kept when a run is told to stop at once.
_GRACE_SECONDS = 1.0


class _Stop:
    def __repr__(self) -> str:
        return "bilevel.STOP"


STOP = _Stop()
STOPPED = "A callback returned STOP."


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is told; none of it is an input to its numbers but where it ends.

    ``began``: when the call began, by `time.perf_counter`.
    """

    steps: int
    tol: float
    callbacks: tuple
    began: float
    population: Population | None = None
    placement: Placement | None = None

    @property
    def spans_hosts(self) -> bool:
        """Whether other processes run the same."""
        return self.placement is not None and self.placement.spans_hosts


class Run:
    """One run, or the runs of a population: chunks until something ends them."""

    def __init__(self, ready: Prepared, carry: loop.Carry, settings: Settings, keeper: Keeper | None):
        plan = ready.plan
        self.plan, self.carry, self.sources, self.test = plan, carry, ready.sources, ready.test
        self.settings, self.keeper = settings, keeper
        self.given = ready.arguments[:2]
        self.measured = False
        self.began = settings.began
        members = None if settings.population is None else settings.population.n
        hparams = loop.one(carry.member.hparams, plan.population)
        self.record = Record(plan, hparams, carry.rows.dtype, carry.trail.dtype, members)
        self.active = np.arange(members) if members else None
        self.dropped: list[tuple[np.ndarray, Any]] = []
        self.pending: tuple[Any, float] | None = None
        self.ended: tuple[Status, str] | None = None
        self.notes: list[str] = []
        self.warned = False
        self.watch, self.interrupt = Watch(), Interrupt()
        self.chunk_length = 1
        self.told = 0
        self.halved = 0

    @property
    def done(self) -> int:
        """Outer steps attempted."""
        return self.record.done

    def go(self, progress: bool) -> Result:
        """Run to the end, whatever it is."""
        show = progress and (hosts.first() or not self.settings.spans_hosts)
        with self.interrupt, self.watch:
            try:
                with reporter(show, self.settings.steps) as tell:
                    self._judge()
                    shown = 0
                    while self.ended is None:
                        self._advance()
                        if show:
                            tell(self.done, self.record.history(shown))
                            shown = self.done
                        self._between()
                    tell(self.done, {}, self.ended[0])
            except KeyboardInterrupt:
                self._stop_at_once()
            except Exception as error:
                if not self.interrupt.at_once:
                    self._fail(error)
                    raise
                self._stop_at_once()  # raised in a host callback of the program
            self._keep()
            return self._finish()

    # --- one chunk ---

    def _advance(self) -> None:
        with self.interrupt.waiting():
            sources, length = self._feed(self._next_length())
        if length == 0:
            return
        self._halve()
        self._judge()  # all that are left may have ended before
        if self.ended is not None:
            return
        before = time.perf_counter()
        bounds = np.int32(self.done + length), np.float64(self.settings.tol)
        arguments = self.carry, *bounds, *sources, self.test
        if not self.measured:
            self.measured = True
            with self.interrupt.waiting():
                memory = analysed(self.plan, arguments, self.given)
            warn_where_too_large(memory)
        carry = loop.compiled(self.plan)(*arguments)
        self.pending = carry, before
        if self.keeper is not None and (length > 1 or self.settings.callbacks):
            self.keeper.name_run()  # while a chunk is computed, and before a callback can change the data
        with self.interrupt.waiting():
            self.watch.wait(carry.step)
        self._collect()

    def _collect(self) -> None:
        """Take what the chunk under way brought; all of it or nothing."""
        if self.pending is None:
            return
        carry, before = self.pending
        taken = int(carry.step) - self.done
        after = time.perf_counter()
        rows, trail = np.asarray(carry.rows)[:taken], np.asarray(carry.trail)[:taken]
        seconds = before - self.began + (after - before) * np.arange(1, taken + 1) / max(taken, 1)
        first, self.pending, self.carry = self.done, None, carry
        self.record.add(rows, trail, seconds, self.active)
        self._adapt(taken, after - before, first)
        self._judge()

    def _judge(self) -> None:
        """Whether the run has ended by itself."""
        status = np.asarray(self.carry.member.status)
        if self.done and not (status == Status.RUNNING).any():
            self.ended = self._by_itself(status)
        elif self.done >= self.settings.steps:
            asked = self.settings.steps
            more = f"; steps={asked} asked for fewer" if self.done > asked else ""
            self.ended = Status.BUDGET, f"All {self.done} outer steps are done{more}."

    def _by_itself(self, status: np.ndarray) -> tuple[Status, str]:
        if status.ndim:
            return Status.CONVERGED, "All members have ended."
        if status == Status.CONVERGED:
            return Status.CONVERGED, f"The gradient norm is at most tol = {self.settings.tol:g}."
        return Status(int(status)), diagnosis.why_ended(
            Status(int(status)), self.record.history(), self.plan.method
        )

    def _next_length(self) -> int:
        length = min(self.chunk_length, self.plan.capacity, self.settings.steps - self.done)
        for every in self._halts():
            length = min(length, every - self.done % every)
        return length

    def _halts(self) -> list[int]:
        """A chunk ends at each multiple of these, whatever the machine's speed."""
        halts = [self.plan.judge_every] if self.settings.callbacks else []
        if self.keeper is not None:
            halts.append(self.keeper.every)
        population = self.settings.population
        return halts + ([population.halve_every] if population and population.halve_every else [])

    def _adapt(self, taken: int, seconds: float, first: int) -> None:
        if first > 0 and taken:  # the first chunk compiles
            wanted = int(_CHUNK_SECONDS * taken / max(seconds, 1e-9))
            self.chunk_length = max(1, min(wanted, 16 * self.chunk_length, self.plan.capacity))

    def _feed(self, length: int):
        """Sources for the next steps, and how many steps they last; ends the run where they do not."""
        feeding = any(isinstance(source, FED) for source in self.sources)
        spans = feeding and self.settings.spans_hosts
        with hosts.agreed(spans, "The data of another process failed; see its own error."):
            fed, length, ended = self._drawn(length)
        if spans:
            length = int(hosts.gather([length]).min())
        if length == 0:
            self.ended = Status.DATA_EXHAUSTED, ended or "The data of another process ended."
        return fed, length

    def _drawn(self, length: int) -> tuple[list, int, str]:
        """Sources for the next steps of this process, how many steps they last, and why there are none."""
        fed: list[Any] = []
        for source in self.sources:
            if isinstance(source, FED):
                chunk, length = source.chunk(self.done, length, self.plan.capacity)
                if length == 0:
                    return fed, 0, f"{source.why_ended}."
                fed.append(chunk)
            else:
                fed.append(source)
        return fed, length, ""

    # --- between chunks ---

    def _between(self) -> None:
        """Callbacks, checkpoints and interruption; all processes come to the same."""
        stop, stopped, spans = False, None, self.settings.spans_hosts
        mine = hosts.first() or not spans
        with hosts.agreed(spans, "A callback of the first process failed; see its own error."):
            if mine and self.settings.callbacks and self._callback_due():
                with self.interrupt.waiting():
                    stop, stopped = self._call_back()
        why = self.interrupt.why
        if spans:
            stop, stopped, why = self._agree(stop, stopped, why)
        if self.ended is None and stop:
            self.ended = Status.INTERRUPTED, STOPPED
        if self.ended is None and why is not None:
            self.ended = Status.INTERRUPTED, why
        if self.ended is None and stopped is not None:
            self._end_all_but(~stopped[self.active], Status.INTERRUPTED)
            self._judge()
        if self.ended is None and self.keeper is not None and self.done % self.keeper.every == 0:
            self._keep()

    def _agree(self, stop: bool, stopped: np.ndarray | None, why: str | None):
        said = hosts.gather([stop, why is not None, self.chunk_length, stopped is not None])
        self.chunk_length = int(said[0, 2])
        if said[0, 3]:
            shared = hosts.share(None if stopped is None else stopped.tobytes())
            stopped = np.frombuffer(shared or b"", bool)
        if why is None and said[:, 1].any():
            why = "Another process was told to stop."
        return bool(said[:, 0].any()), stopped, why

    def _callback_due(self) -> bool:
        return self.done > self.told and (
            self.done % self.plan.judge_every == 0
            or self.ended is not None
            or self.done >= self.settings.steps
        )

    def _call_back(self) -> tuple[bool, np.ndarray | None]:
        """Whether all stop, and which members do, if any."""
        rows = self.record.history(self.told)
        replies = [
            callback(self.done, self.record.history() if getattr(callback, "whole", False) else rows)
            for callback in self.settings.callbacks
        ]
        self.told = self.done
        masks = [self._mask(np.asarray(reply)) for reply in replies if np.ndim(reply)]
        stopped = np.any(masks, axis=0) if masks else np.zeros(0, bool)
        return any(reply is STOP for reply in replies), stopped if stopped.any() else None

    def _mask(self, reply: np.ndarray) -> np.ndarray:
        members = self.record.members
        if members is None or reply.shape != (members,) or reply.dtype != bool:
            wanted = (
                "STOP or None: this is no population"
                if members is None
                else f"booleans, one for each of {members} members"
            )
            raise ValueError(
                f"a callback returned {reply.dtype} values of shape {reply.shape}, expected {wanted}."
            )
        return reply

    def _halve(self) -> None:
        """Successive halving: the worse half of the members is set aside, and a smaller program goes on."""
        population, active = self.settings.population, self.active
        every = population and population.halve_every
        if not every or not self.done or self.done % every or self.halved == self.done or active is None:
            return
        self.halved = self.done
        status = np.asarray(self.carry.member.status)
        values = self.record.lowest()[active]
        keep = survivors(values, status == Status.DIVERGED, status == Status.DROPPED)
        # Where the mesh asks for more, some of those dropped stay in the program, and do nothing.
        places = padded(keep, len(active), self._member_shards())
        self._end_all_but(np.isin(np.arange(len(active)), keep), Status.DROPPED)
        if len(places) < len(active):
            choose = loop.compiled_choice(self.plan)
            aside = np.setdiff1d(np.arange(len(active)), places)
            left, kept = choose(self.carry, aside).member, choose(self.carry, places)
            self.dropped.append((active[aside], left))
            self.carry, self.active = kept, active[places]

    def _end_all_but(self, kept: np.ndarray, status: Status) -> None:
        """Members of the program that run, and are not kept, end with a status; their state stays."""
        self.carry = loop.compiled_dropping(self.plan)(self.carry, kept, np.int32(status))

    def _member_shards(self) -> int:
        placement = self.settings.placement
        axis = placement and placement.population_axis
        return placement.mesh.shape[axis] if placement and axis else 1

    def member(self) -> loop.Member:
        """The run, or all members of the population, dropped ones included."""
        if not self.dropped:
            return self.carry.member
        places = np.argsort(np.concatenate([*(places for places, _ in self.dropped), self.active]))
        parts = [*(part for _, part in self.dropped), self.carry.member]
        return loop.compiled_gathering(self.plan)(parts, places)

    # --- ends ---

    def _stop_at_once(self) -> None:
        """A second Ctrl-C: keep the chunk under way only if it is done within moments."""
        if self.settings.spans_hosts:
            raise KeyboardInterrupt("stopped at once; the other processes cannot go on without this one")
        if self.pending is not None and self.watch.wait(self.pending[0].step, _GRACE_SECONDS):
            self._collect()
        if self.pending is not None or _deleted(self.carry):
            raise KeyboardInterrupt(
                f"stopped at once: outer steps {self.done} and later are lost"
                + (f"; checkpoints are in {self.keeper.path}" if self.keeper else "")
            )
        self.ended = self.ended or (Status.INTERRUPTED, "Interrupted by the user.")

    def _fail(self, error: Exception) -> None:
        """What was computed goes along with an error: of a callback or an iterable, or of the devices."""
        self.ended = Status.INTERRUPTED, f"Ended by an error: {type(error).__name__}."
        if _deleted(self.carry) or isinstance(error, jax.errors.JaxRuntimeError):
            return  # a device failed in the middle of a chunk that it had been given, or a process is gone
        self._keep()
        _attach(error, self.result()[0])

    def _keep(self) -> None:
        """Write a checkpoint, in the background."""
        if self.keeper is not None and self.done and self.keeper.kept != self.done:
            self._note(self.keeper.save(self))

    def _note(self, problem: str | None) -> None:
        """A checkpoint that could not be written: the first is warned of, the last is in the message."""
        if problem is None:
            self.notes = []
            return
        if not self.warned:
            self.warned = True
            with contextlib.suppress(RuntimeWarning):  # the run goes on even where warnings are errors
                warnings.warn(problem, RuntimeWarning, stacklevel=5)
        self.notes = [problem]

    def _finish(self) -> Result:
        result, warned = self.result()
        if warned and (hosts.first() or not self.settings.spans_hosts):
            try:
                warnings.warn(warned, RuntimeWarning, stacklevel=4)
            except RuntimeWarning as error:
                _attach(error, result)
                raise
        return result

    def result(self) -> tuple[Result, str]:
        """The result of the run as it stands, and what deserves a warning."""
        status, message = self.ended or (Status.INTERRUPTED, "Interrupted by the user.")
        result, warned = report.result(
            self.plan, self.member(), self.record, self.sources[1], self.test, status, message
        )
        if self.keeper is not None:
            self._note(self.keeper.written())
        placement = self.settings.placement
        result = dataclasses.replace(
            result,
            message=" ".join([result.message, *self.notes]),
            seconds=time.perf_counter() - self.began,
        )
        return (result if placement is None else placement.returned_result(result)), warned


def _deleted(carry) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


def _attach(error: BaseException, result: Result) -> None:
    error.partial_result = result  # type: ignore[attr-defined]
    error.add_note("bilevel: what was computed is in this exception's partial_result.")
