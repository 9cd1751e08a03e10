"""``python -m benchmarks.cold_default FILE STEPS``: the default on hyper-cleaning in a fresh process."""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

import sys  # noqa: E402

import bilevel  # noqa: E402
from benchmarks.by_hand import load, report  # noqa: E402
from benchmarks.problems.cleaning import PROBLEM  # noqa: E402

if __name__ == "__main__":
    _IMPORTED = time.perf_counter()
    _TREES, _STEPS = load(sys.argv[1]), int(sys.argv[2])
    report(
        _BEGAN,
        _IMPORTED,
        lambda: bilevel.optimize(PROBLEM, *_TREES, steps=_STEPS, progress=False).params,
    )
