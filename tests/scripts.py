"""Scripts in processes of their own, run as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path


def as_a_reader(script: Path, cwd: Path, timeout: float, dropped: str = "device_count"):
    """A finished process, without settings of JAX and without the flags of XLA that ``dropped`` finds.

    What `conftest.py` says to make compilation cheap stays.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env["XLA_FLAGS"] = " ".join(flag for flag in env["XLA_FLAGS"].split() if not re.search(dropped, flag))
    return subprocess.run(
        [sys.executable, script],
        cwd=cwd,
        env={**env, "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
