"""Ctrl-C and termination: a run ends after the chunk under way, with everything it has computed."""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the chunk; a second SIGINT raises at once.

    Only the main thread can listen to signals; elsewhere nothing is changed. A signal that is ignored (as
    Ctrl-C is in a job that a script has sent to the background) stays so.
    """

    why: str | None = None

    def __enter__(self) -> Interrupt:
        self._previous: dict = {}
        if threading.current_thread() is threading.main_thread():
            # None: a handler that is not Python's, which could not be put back.
            heard = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def _handle(self, number, frame) -> None:
        del frame
        if number == signal.SIGINT and self.why is not None:
            raise KeyboardInterrupt
        self.why = "Interrupted by the user." if number == signal.SIGINT else "Ended by SIGTERM."

    def __exit__(self, *exc) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
