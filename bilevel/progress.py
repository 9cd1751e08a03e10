"""What is seen of a run while it goes on: lines of a terminal, an output of a notebook, or plain lines.

It is drawn between chunks of outer steps, never from a thread, so that a run takes no longer. Whatever goes
wrong with the display (a terminal that is closed, a full disk behind a pipe) does not end the run.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from bilevel.problem import Status

# A terminal is drawn at most so often.
_REDRAW_SECONDS = 0.1
# Without one: a line for each tenth of the steps, at most one a second, and one every 10 s; later in a long
# run one for each tenth of the time so far.
_TENTH, _LEAST_SECONDS, _LINE_SECONDS = 0.1, 1.0, 10.0
# Chunks over which the rate is taken; one lasts about a second.
_WINDOW = 30
_BAR = 24


class Display(Protocol):
    """Somewhere to show `Facts`."""

    def show(self, facts: Facts, last: bool) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def reporter(show: bool, steps: int) -> Iterator[Callable[..., None]]:
    """A function ``(steps done, rows, status=None)`` that shows how a run stands, or does nothing.

    ``rows``: the new rows of the history. ``status``: how the run has ended, a `Status`. Where an exception
    comes through, the display says so and is closed.
    """
    if not show or sys.stderr is None:
        yield lambda done, rows, status=None: None
        return
    facts, display = Facts(steps), _display()
    try:
        _drawn(display, facts, False)

        def tell(done: int, rows: Mapping[str, Any], status: Status | None = None) -> None:
            facts.add(done, rows, status)
            _drawn(display, facts, False)

        yield tell
    except BaseException as error:
        by_user = isinstance(error, KeyboardInterrupt)
        facts.ended = Status.INTERRUPTED.name if by_user else f"failed: {type(error).__name__}"
        raise
    finally:
        _drawn(display, facts, True)
        with contextlib.suppress(OSError, ValueError):
            display.close()


def _drawn(display: Display, facts: Facts, last: bool) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream that is closed
        display.show(facts, last)


def running(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which members of a population did a step, of each row: a row of one that has ended is empty."""
    return np.isfinite(rows["value"]) | (np.asarray(rows["nonfinite"]) > 0)


# --- What is known ------------------------------------------------------------------------------------------


class Facts:
    """How a run stands, and in words.

    Args:
      steps: outer steps asked for.
      clock: seconds; `time.monotonic`.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic):
        self.steps, self._clock = steps, clock
        self.done = 0
        self.value = self.best = self.grad_norm = float("nan")
        self.members: int | None = None
        self.alive: int | None = None
        self.best_member: int | None = None
        self.ended: str | None = None
        self._began = clock()
        self._points: collections.deque = collections.deque(maxlen=_WINDOW)

    def add(self, done: int, rows: Mapping[str, Any], status: Status | None = None) -> None:
        """The outer steps done, what they brought, and how the run has ended."""
        self.done = done
        if status is not None:
            self.ended = Status(status).name
        if not rows or not np.size(rows["value"]):
            return
        columns = {name: np.asarray(column) for name, column in rows.items()}
        self._points.append((self._clock(), done))
        self.value, self.grad_norm = _lowest(columns["value"][-1]), _lowest(columns["grad_norm"][-1])
        if columns["value"].ndim > 1:
            alive = running(columns)[-1]
            self.alive, self.members = int(alive.sum()), self.members or len(alive)
        self._better(columns)

    def _better(self, columns: dict[str, np.ndarray]) -> None:
        decides = columns["judged" if "judged" in columns else "value"]
        good = np.where(columns["accepted"] & np.isfinite(decides), decides, np.inf)
        lowest = good.min()
        if lowest < np.inf and not lowest >= self.best:
            self.best = float(lowest)
            if good.ndim > 1:
                self.best_member = int(np.argmin(good.min(axis=0)))

    @property
    def seconds(self) -> float:
        """Since the display was opened."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Outer steps a second over the last chunks, nan before the second one: the first one compiles."""
        if len(self._points) < 2:
            return float("nan")
        (then, before), (now, done) = self._points[0], self._points[-1]
        return (done - before) / max(now - then, 1e-9)

    def place(self) -> str:
        """How far it is."""
        return f"{self.done}/{self.steps}"

    def pace(self) -> list[str]:
        """How fast, and how long still; how long it took where it has ended."""
        if self.ended is not None or self.done >= self.steps:
            return [f"{duration(self.seconds)}"]
        if not self._points:
            return ["compiling"]
        rate = self.rate
        if not rate > 0:
            return []
        left = f"{duration((self.steps - self.done) / rate)} left"
        return [f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step", left]

    def numbers(self) -> list[str]:
        """Value, best value, gradient norm; of a population the lowest, and how many members run."""
        if not self._points:
            return []
        of = "" if self.best_member is None else f" (member {self.best_member})"
        best = [] if np.isnan(self.best) else [f"best {self.best:.5g}{of}"]
        left = [] if self.members is None else [f"{self.alive} of {self.members} running"]
        return [f"value {self.value:.5g}", *best, f"grad norm {self.grad_norm:.2g}", *left]

    def end(self) -> list[str]:
        """How the run has ended, if that is known."""
        return [] if self.ended is None else [self.ended]


def _lowest(column) -> float:
    """Of the members of a population."""
    finite = np.ravel(column)[np.isfinite(np.ravel(column))]
    return float(finite.min()) if finite.size else float("nan")


def duration(seconds: float) -> str:
    """Seconds for a person: ``8.1 s``, ``2:05 min``, ``3:20:00 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


# --- Where it is shown --------------------------------------------------------------------------------------


def _display() -> Display:
    stream = sys.stderr
    if "IPython" in sys.modules:
        from rich.console import Console

        if Console(stderr=True).is_jupyter:
            return Notebook()
    terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Terminal() if terminal and not os.environ.get("CI") else Lines(stream)


class _Redrawn:
    """A display that is drawn anew, unless that was done a moment ago."""

    _drawn = -np.inf

    def show(self, facts: Facts, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._draw(facts)

    def _draw(self, facts: Facts) -> None:
        raise NotImplementedError


class Terminal(_Redrawn):
    """Two lines that are drawn anew, below whatever else is printed."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        # What callbacks print goes above the two lines, but never from a file to the terminal.
        prints = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=prints)
        self._started = False

    def _draw(self, facts: Facts) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(_two_lines(facts), refresh=True)

    def close(self) -> None:
        """The lines stay, the cursor is shown again."""
        if self._started:
            self._live.stop()


def _two_lines(facts: Facts):
    from rich.console import Group
    from rich.text import Text

    filled = round(_BAR * min(facts.done / max(facts.steps, 1), 1.0))
    first = Text("outer steps ", no_wrap=True, overflow="crop")
    first.append("━" * filled, "green").append("━" * (_BAR - filled), "bright_black")
    first.append("  ".join([f" {facts.place()}", *facts.pace()]))
    for word in facts.end():
        first.append(f"  {word}", "bold green" if word in ("CONVERGED", "BUDGET") else "bold yellow")
    second = Text("  ".join(["", *facts.numbers()]), no_wrap=True, overflow="ellipsis")
    return Group(first, second)


class Notebook(_Redrawn):
    """One output of a cell that is replaced by the next."""

    def __init__(self):
        from IPython.display import display

        self._display, self._handle = display, None

    def _draw(self, facts: Facts) -> None:
        content = {"text/plain": _line(facts)}
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """A line now and then, without control characters.

    Args:
      stream: where they go.
    """

    def __init__(self, stream):
        self._stream = stream
        self._told, self._second = 0, -np.inf

    def show(self, facts: Facts, last: bool) -> None:
        """A line where one is due."""
        second, more = facts.seconds, facts.done - self._told
        waited = second - self._second
        tenth = more >= _TENTH * facts.steps and waited >= _LEAST_SECONDS
        if not (last or tenth or waited >= max(_LINE_SECONDS, _TENTH * second)):
            return
        self._told, self._second = facts.done, second
        self._stream.write(_line(facts) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is open."""


def _line(facts: Facts) -> str:
    part = f"({100 * facts.done / max(facts.steps, 1):.0f} %)"
    return "  ".join([
        f"outer steps {facts.place()} {part}", *facts.numbers(), *facts.pace(), *facts.end()
    ])  # fmt: skip
