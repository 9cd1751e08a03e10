"""Where a measurement was taken: the commit, the software, the processor and what else it was doing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import jax


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


def processor() -> str:
    """The processor's name, or what kind it is where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float:
    """Processes that ran or waited to run, on average over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def summary() -> str:
    """One line for a person."""
    return (
        f"python {platform.python_version()}, jax {jax.__version__} on {jax.default_backend()}, "
        f"{cores()} cores, commit {commit()}"
    )
