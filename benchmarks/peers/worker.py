"""``python -m benchmarks.peers.worker MODULE NAME``: a peer in a process of its own.

It reads one JSON object a line and answers with one. "do" names a method of `Worker`, the rest are its
arguments. What goes wrong is an answer too, ``{"failed": ...}``; what a peer has no means for is
``{"cannot": ...}``. What packages print goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.peers import cold, instances
from benchmarks.peers.contract import Case, Peer


def peer_of(module: str, name: str) -> Peer:
    peers = importlib.import_module(f"benchmarks.peers.{module}").PEERS
    return next(peer for peer in peers if peer.name == name)


class Worker:
    """Answers requests about one peer."""

    def __init__(self, peer: Peer):
        self.peer = peer
        self.case: Case | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip() or "no message"
            return {"failed": f"{type(error).__name__}: {text.splitlines()[0][:200]}"}

    def versions(self) -> dict[str, Any]:
        return {name: importlib.metadata.version(name) for name in self.peer.packages}

    def settings(self) -> dict[str, Any]:
        """Of the task "along"."""
        return {"settings": list(self.peer.settings)}

    def prepare(self, task: str, setting, file: str, dtype: str) -> dict[str, Any]:
        """The error is that of the worst point, where there are several."""
        self.case = None
        maker = self.peer.tasks[task]
        if isinstance(maker, str):
            return {"cannot": maker}
        instance, more = instances.load(Path(file))
        family = importlib.import_module(f"benchmarks.peers.{self.peer.family}")
        self.case = family.prepared(maker(instance.kind, setting), instance, dtype)
        found, megabytes = watched(self.case.call)
        expected = more["expected"]
        many = expected.ndim > instance.h.ndim or task == "along"
        pairs = zip(found, expected, strict=True) if many else [(found, expected)]
        error = max(instances.relative(*pair) for pair in pairs)
        return {
            "error": error if math.isfinite(error) else None,
            "compile_seconds": self.case.compile_seconds,
            "megabytes": megabytes if self.case.megabytes is None else self.case.megabytes,
        }

    def run(self, steps: int, file: str, began: float) -> dict[str, Any]:
        """An outer run in this process, which began then; judged after it."""
        maker = self.peer.tasks["cold"]
        if isinstance(maker, str):
            return {"cannot": maker}
        instance, _ = instances.load(Path(file))
        times, hs = maker(instance.kind, steps)(instance)
        return {"seconds": [t - began for t in times], "values": cold.judged(instance, hs)}

    def time(self, calls: int, clock: str = "perf_counter") -> dict[str, Any]:
        """Median of so many calls, after one that is not measured; "process_time" is CPU time."""
        if self.case is None:
            raise RuntimeError("nothing is prepared")
        self.case.call()
        now, found = getattr(time, clock), []
        for _ in range(calls):
            began = now()
            self.case.call()
            found.append(now() - began)
        return {"seconds": statistics.median(found)}


def watched(call):
    """What it returns, and by how many MB the resident memory of the process exceeded that of before.

    Taken at the second call, with the memory that the first one left behind given back to the system.
    """
    call()
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except OSError:
        return call(), None
    before = _memory("VmRSS")
    found = call()
    return found, max(_memory("VmHWM") - before, 0.0)


def _memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"the system does not tell {field}")


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(module: str, name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        worker: Worker | None = Worker(peer_of(module, name))
        failed = ""
    except Exception as error:
        traceback.print_exc()
        worker, failed = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for line in sys.stdin:
        answer = (
            {"failed": f"cannot be imported: {failed}"} if worker is None else worker.answer(json.loads(line))
        )
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
