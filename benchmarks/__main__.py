"""``python -m benchmarks [name ...]``: run all benchmarks, or those named."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax

NAMES = (
    "exactness",
    "hparam_count",
    "unroll",
    "import_time",
    "cleaning",
    "cg_steps",
    "tuned_rates",
    "memory",
)


def commit() -> str:
    """The commit of the working tree, or "unknown" where git or the repository is missing."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/bilevel")
        return git("rev-parse", "--short", "HEAD") + (" (library changed since)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"error: no benchmark {', '.join(unknown)}; choose from: {', '.join(NAMES)}")
    print(
        f"python {platform.python_version()}, jax {jax.__version__} on {jax.default_backend()}, "
        f"{cores()} cores, commit {commit()}"
    )
    for name in names or NAMES:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main()
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
