"""What checkpoints cost: the demo's run with one every 50 outer steps, against the same without any.

The two take turns, each with a folder of its own, after one run of each that compiles. The ratio is the
median over pairs of neighbouring runs.
"""

from __future__ import annotations

import shutil
import tempfile
import time

import numpy as np

import bilevel
from benchmarks.measure import table, verdict
from bilevel import demo

EVERY, PAIRS = 50, 25
ASKED = 0.02


def main() -> None:
    data = demo.load_digits(seed=0)

    def seconds(checkpoint) -> float:
        began = time.perf_counter()
        bilevel.optimize(
            demo.PROBLEM, demo.first_params(), demo.first_hparams(), data.train, data.valid, demo.METHOD,
            demo.STEPS, test=data.test, checkpoint=checkpoint, progress=False,
        )  # fmt: skip
        return time.perf_counter() - began

    def with_checkpoints() -> float:
        folder = tempfile.mkdtemp(prefix="checkpoint-cost-")
        try:
            return seconds(bilevel.checkpoints(folder, every=EVERY))
        finally:
            shutil.rmtree(folder)

    calls = {"none": lambda: seconds(None), "checkpoints": with_checkpoints}
    found: dict = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(PAIRS):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(calls[name]())
    none, some = (np.asarray(found[name]) for name in calls)
    cost = float(np.median(some / none)) - 1
    rows = [
        (f"{demo.STEPS} outer steps, no checkpoints", f"{np.median(none):.3f}"),
        (f"one every {EVERY}", f"{np.median(some):.3f}"),
        ("cost", f"{100 * cost:.1f}% (asked: {100 * ASKED:.0f}%, {verdict(cost, ASKED)})"),
    ]
    table(("", "seconds"), rows)


if __name__ == "__main__":
    main()
