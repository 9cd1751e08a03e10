"""Ctrl-C and termination: a run ends after the chunk under way, with everything it has computed."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the chunk; a second SIGINT raises.

    It raises where the run only waits (`waiting`): at once there, else as soon as it comes to such a place,
    so that what is being put on record is never torn apart. A third one raises wherever it strikes.

    Only the main thread can listen to signals; elsewhere nothing is changed. A signal that is ignored (as
    Ctrl-C is in a job that a script has sent to the background) stays so.
    """

    why: str | None = None
    at_once = False
    _struck = 0
    _waits = False

    def __enter__(self) -> Interrupt:
        self._previous: dict = {}
        if threading.current_thread() is threading.main_thread():
            # None: a handler that is not Python's, which could not be put back.
            heard = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def _handle(self, number, frame) -> None:
        del frame
        if number == signal.SIGINT:
            self._struck += 1
            self.at_once = self._struck > 1
            if self._struck > 2 or self.at_once and self._waits:
                raise KeyboardInterrupt
        if self.why is None:
            self.why = "Interrupted by the user." if number == signal.SIGINT else "Ended by SIGTERM."

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Where a second Ctrl-C may strike."""
        self._waits = True
        try:
            if self.at_once:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    def __exit__(self, *exc) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


class Watch:
    """Waits for arrays while signals are heard: a thread blocks on them, since the main thread would be deaf.

    A thread that wakes another one is faster than any pause between looks at an array is fine.
    """

    def __init__(self):
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._watched: Any = None

    def __enter__(self) -> Watch:
        # No daemon: one that is inside XLA when Python ends would take the process down with it.
        threading.Thread(target=self._watch, name="bilevel-watch").start()
        return self

    def __exit__(self, *exc) -> None:
        self._asked.put(None)

    def wait(self, array, seconds: float | None = None) -> bool:
        """Whether the array is there, now or within so many seconds."""
        if array is not self._watched:
            self._watched = array
            self._asked.put(array)
        with contextlib.suppress(queue.Empty):
            while self._done.get(timeout=seconds) is not array:
                pass  # one that was given up
        return array.is_ready()

    def _watch(self) -> None:
        while (array := self._asked.get()) is not None:
            with contextlib.suppress(Exception):  # whoever reads the array gets to know
                array.block_until_ready()
            self._done.put(array)
