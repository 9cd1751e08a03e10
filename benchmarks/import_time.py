"""`import bilevel` beyond `import jax, optax`, in fresh processes that take turns."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from benchmarks.measure import table, verdict

ASKED = 0.3
REPEATS = 9
CLOCK = "import time; a = time.perf_counter(); {}; b = time.perf_counter(); {}; c = time.perf_counter(); "
PROGRAM = CLOCK + "print(b - a, c - b)"


def import_seconds(first: str, then: str) -> list[float]:
    """Seconds of two import statements, one after the other in a process of their own."""
    command = [sys.executable, "-c", PROGRAM.format(first, then)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return [float(s) for s in out.split()]


def main():
    import_seconds("import jax, optax", "import bilevel")  # fills the caches of files and bytecode
    base, after, alone = [], [], []
    for _ in range(REPEATS):
        seconds, extra = import_seconds("import jax, optax", "import bilevel")
        base.append(seconds)
        after.append(extra)
        alone.append(import_seconds("import bilevel", "pass")[0])
    base, after, alone = np.median([base, after, alone], axis=1)
    rows = [
        ("import jax, optax", f"{base:.2f}", "", ""),
        ("import bilevel", f"{alone:.2f}", "", ""),
        ("difference", f"{alone - base:.3f}", f"{ASKED}", verdict(alone - base, ASKED)),
        ("import bilevel after jax and optax", f"{after:.3f}", f"{ASKED}", verdict(after, ASKED)),
    ]
    table(("seconds, medians in fresh processes", "measured", "asked, at most", ""), rows)


if __name__ == "__main__":
    main()
