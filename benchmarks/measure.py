"""What the benchmarks share: interleaved timing, compilation apart, and tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

Clock = Callable[[], float]


def seconds(fn: Callable, *args, clock: Clock = time.perf_counter) -> float:
    """Wall time of one call, until its results are there; of ``time.process_time`` CPU time."""
    began = clock()
    jax.block_until_ready(fn(*args))
    return clock() - began


def interleaved(calls: Mapping[object, Callable], repeats: int, clock: Clock = time.perf_counter) -> dict:
    """Times of each call, shape (repeats,); they take turns, in an order that alternates.

    Whatever else the machine does meets all of them alike, and entry i of each was measured close to entry i
    of every other. Each is called once before, unmeasured.
    """
    found: dict = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for i in range(repeats):
        names = list(calls)[:: 1 if i % 2 == 0 else -1]
        for name in names:
            found[name].append(seconds(calls[name], clock=clock))
    return {name: np.asarray(times) for name, times in found.items()}


def ratio(times: np.ndarray, base: np.ndarray) -> float:
    """Median of the ratios of neighbouring measurements."""
    return float(np.median(times / base))


def compiled(fn: Callable, *args):
    """The compiled program of ``fn`` at these arguments, and the seconds that took."""
    began = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    return program, time.perf_counter() - began


def temporary_megabytes(program) -> float:
    """Memory that a compiled program takes beyond its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes / 1e6


def verdict(value: float, asked: float) -> str:
    return "ok" if value <= asked else "MISSED"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, the first to the left."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())
