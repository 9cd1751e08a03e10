"""Processes of peers, as seen from the one that asks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
# The peers of each module of this folder. The modules themselves import packages that may be missing here.
MODULES = {
    "ours": ("bilevel", "bilevel, remat='steps'", "bilevel, remat=False", "bilevel, gradient alone"),
    "jax_by_hand": ("JAX by hand", "JAX by hand, remat"),
    "with_jaxopt": ("jaxopt", "jaxopt, default solver"),
    "with_optimistix": ("optimistix, lineax",),
    "with_gradhpo": ("gradhpo, greedy",),
    "torch_by_hand": ("torch by hand", "torch, hypertorch's form"),
    "with_higher": ("higher",),
    "with_torchopt": ("torchopt",),
    "with_betty": ("betty",),
    "with_hypergrad": ("hypergrad",),
}
NAMES = tuple(name for names in MODULES.values() for name in names)
OURS, *OTHERS_OF_OURS = MODULES["ours"]
# Packages that pip has installed are bytecode already; so is the library after its first process.
_NOT_PASSED_ON = (
    *("OPENBLAS_", "XLA_FLAGS", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"),
    "PYTHONDONTWRITEBYTECODE",
)


def module_of(name: str) -> str:
    return next(module for module, names in MODULES.items() if name in names)


def environment() -> dict[str, str]:
    """Of a worker: this project importable, one thread, no choice made for others, no programs kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def cores() -> list[int]:
    """Numbers of those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


class Handle:
    """A worker process; every request has an answer, whatever happens to the process."""

    def __init__(self, command: Sequence[str], core: int | None = None, log: Path | None = None):
        self.lost = ""
        with open(log or os.devnull, "a") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        if core is not None and hasattr(os, "sched_setaffinity"):  # not everywhere
            os.sched_setaffinity(self.process.pid, {core})

    def ask(self, request: dict[str, Any], seconds: float = 600.0) -> dict[str, Any]:
        """The answer, or ``{"failed": why there is none}``."""
        if self.lost:
            return {"failed": self.lost}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return self._end()
        line = self._line(seconds)
        if line is None:
            self.process.kill()
            self.process.wait()
            self.lost = f"took more than {seconds:.0f} s"
            return {"failed": self.lost}
        return json.loads(line) if line else self._end()

    def _end(self) -> dict[str, Any]:
        self.lost = f"its process ended with status {self.process.wait()}"
        return {"failed": self.lost}

    def _line(self, seconds: float) -> bytes | None:
        """Of the output; empty at its end, None where time was up."""
        assert self.process.stdout is not None
        read, until = b"", time.monotonic() + seconds
        while not read.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                return b""
            read += part
        return read

    def close(self) -> None:
        """A worker ends when its input does, or is ended."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=2)
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(names: Sequence[str], core: int | None, log: Path | None = None) -> Iterator[dict[str, Handle]]:
    """A worker for each peer."""
    found: dict[str, Handle] = {}
    try:
        for name in names:
            command = [str(PYTHON), "-m", "benchmarks.peers.worker", module_of(name), name]
            found[name] = Handle(command, core, log)
        yield found
    finally:
        for handle in found.values():
            handle.close()
