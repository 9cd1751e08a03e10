"""The task "cold": an outer run in a fresh process, until its hyperparameters are as good as asked.

All but the library's default take the usual fixed schedule: 20 gradient steps, 20 steps of conjugate
gradients, an Adam step. The clock starts with the process; imports and compilation count. A run returns the
hyperparameters that it had at several times; how good they are, by training in numpy to the end, is found out
afterwards. Asked for is the best that the schedule written in JAX by hand reaches, plus 2 %: penalties that
have grown far can make its gradient steps diverge later.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import instances
from benchmarks.peers.handles import started
from benchmarks.peers.measured import RIGHT, WRONG, Row, reached, reason

KINDS = ("logistic", "cleaning")
OUTER_STEPS, INNER_STEPS = 300, 20
INNER_RATE = {"logistic": 0.1, "cleaning": 0.5}
LOOKS, SLACK = 40, 1.02
LONGEST = 1800.0  # seconds, most of which judges
BASE = "JAX by hand"


def looks(steps: int) -> np.ndarray:
    """Numbers of outer steps after which hyperparameters are looked at."""
    return np.unique(np.geomspace(1, steps, LOOKS).round().astype(int))


def looked(steps: int, advance: Callable[[], Any]) -> tuple[list[float], list[np.ndarray]]:
    """Times and hyperparameters at `looks`; ``advance`` takes an outer step and returns hyperparameters."""
    times, hs, wanted = [], [], set(looks(steps).tolist())
    for step in range(1, steps + 1):
        h = advance()
        if step in wanted:
            hs.append(np.array(h))  # a copy: some change theirs in place
            times.append(time.monotonic())
    return times, hs


def judged(instance: instances.Instance, hs: Sequence[np.ndarray]) -> list[float]:
    """Outer losses of fully trained params; nan where training fails."""
    outer, found = instances.reference(instance).outer, []
    for h in hs:
        try:
            instance = instance._replace(h=h.astype(float))
            instance = instance._replace(w=instances.solution(instance, 1e-7))
            found.append(float(outer(instance.w)))
        except ArithmeticError:
            found.append(float("nan"))
    return found


def rows(
    instance: instances.Instance, peers: Sequence[str], repeats: int, steps: int, core: int, log: Path
) -> list[Row]:
    """Peers take turns; ``seconds`` are to the target, ``value`` is the lowest loss.

    The one that sets the target is among them, asked for or not.
    """
    peers = list(dict.fromkeys([*peers, BASE]))
    runs: dict[str, list[dict]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "instance.npz")
        instances.save(file, instance)
        for turn in range(repeats):
            for peer in peers[:: 1 if turn % 2 == 0 else -1]:
                began = time.monotonic()
                with started([peer], core, log) as handles:
                    request = {"do": "run", "steps": steps, "file": str(file), "began": began}
                    runs[peer].append(handles[peer].ask(request, LONGEST))
    good = [value for run in runs[BASE] for value in run.get("values", ())]
    target = SLACK * float(np.nanmin(good)) if good else float("nan")
    return [row(peer, found, target) for peer, found in runs.items()]


def row(peer: str, runs: Sequence[dict], target: float) -> Row:
    """Of all its runs."""
    if missing := reason(runs):
        return Row(peer, *missing)
    value = float(np.nanmin(runs[0]["values"]))
    times = tuple(reached(run, target) for run in runs)
    if not np.all(np.isfinite(times)):
        return Row(peer, WRONG, f"does not reach {target:.4g}", value=value)
    return Row(peer, RIGHT, value=value, setting=target, seconds=times)
