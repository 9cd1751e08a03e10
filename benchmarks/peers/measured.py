"""One case of a task, asked of every peer: right answers first, then times in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.handles import MODULES, Handle

RIGHT, WRONG, CANNOT, FAILED = "right", "wrong", "cannot", "failed"


@dataclasses.dataclass(frozen=True)
class Row:
    """What a peer did with a case.

    Args:
      peer: its name.
      status: "right", "wrong", "cannot" or "failed".
      reason: of "cannot" and "failed"; else empty.
      error: relative, of the gradient.
      setting: what it was asked for: CG steps, steps and rate, or a tolerance.
      compile_seconds: of one program; None where nothing is compiled.
      megabytes: temporary memory of a call.
      seconds: of a call, one for each round; entry i of all peers was measured in the same round.
      value: the lowest outer loss of a run, or the mean of several.
    """

    peer: str
    status: str
    reason: str = ""
    error: float | None = None
    setting: Any = None
    compile_seconds: float | None = None
    megabytes: float | None = None
    seconds: tuple[float, ...] = ()
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """A case for all: the file with the instance, its task, and what is accurate enough."""

    task: str
    setting: Any
    file: Path
    dtype: str
    accurate: float


def reason(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Status and reason, where one of these answers is "cannot" or "failed"."""
    found = ((status, run[status]) for status in (CANNOT, FAILED) for run in runs if status in run)
    return next(found, None)


def reached(run: Mapping[str, Any], target: float) -> float:
    """Seconds after which a run's value is this low; inf where it never is."""
    pairs = zip(run["seconds"], run["values"], strict=True)
    return next((t for t, value in pairs if value <= target), float("inf"))


def answered(handle: Handle, peer: str, question: Question, settings: Sequence[Any]) -> Row:
    """The row of the first of these settings that is accurate enough, or that of the last."""
    row = Row(peer, FAILED, "no setting")
    for setting in settings:
        found = handle.ask(
            {"do": "prepare", "task": question.task, "setting": setting, "file": str(question.file),
             "dtype": question.dtype}
        )  # fmt: skip
        if missing := reason([found]):
            return Row(peer, *missing)
        error = found["error"]
        right = error is not None and error <= question.accurate
        row = Row(
            peer, RIGHT if right else WRONG, "", error, setting, found["compile_seconds"], found["megabytes"]
        )
        if right:
            break
    return row


def loosest(handle: Handle, peer: str, question: Question, settings: Sequence[Any]) -> Row:
    """The row of the first setting that is accurate enough, by bisection: they stand in order of accuracy."""
    low, high, best = 0, len(settings) - 1, answered(handle, peer, question, settings[-1:])
    if best.status != RIGHT:
        return best
    while low < high:
        middle = (low + high) // 2
        row = answered(handle, peer, question, [settings[middle]])
        if row.status == RIGHT:
            best, high = row, middle
        else:
            low = middle + 1
    return best if best.setting == settings[high] else answered(handle, peer, question, [settings[high]])


def all_answered(handles: Mapping[str, Handle], question: Question) -> list[Row]:
    """A row for each peer, without times."""
    rows = []
    for peer, handle in handles.items():
        own = handle.ask({"do": "settings"}).get("settings") if question.task == "along" else None
        if own:
            rows.append(loosest(handle, peer, question, own))
        elif question.task == "along":
            n = question.setting  # rounding may ask for a step more than numpy needs, a poor solver for many
            rows.append(answered(handle, peer, question, [n, n + 1, n + 2, n + 4, 2 * n, 4 * n]))
        else:
            rows.append(answered(handle, peer, question, [question.setting]))
    return rows


def timed(
    handles: Mapping[str, Handle],
    rows: Sequence[Row],
    rounds: int,
    budget: float,
    clock: str = "perf_counter",
) -> list[Row]:
    """Rows with times: rounds in an order that alternates, fewer where the budget ends (seconds)."""
    able = [row.peer for row in rows if row.status in (RIGHT, WRONG)]
    found: dict[str, list[float]] = {peer: [] for peer in able}
    lost: dict[str, str] = {}
    calls = dict.fromkeys(able, 1)
    spent, done = 0.0, 0
    while done < rounds and (done < 3 or spent * (done + 1) / done < budget):
        for peer in able[:: 1 if done % 2 == 0 else -1]:
            if peer in lost:
                continue
            answer = handles[peer].ask({"do": "time", "calls": calls[peer], "clock": clock})
            if "failed" in answer:
                lost[peer] = answer["failed"]
                continue
            found[peer].append(answer["seconds"])
            spent += answer["seconds"] * (calls[peer] + 1)
            calls[peer] = int(np.clip(0.05 / answer["seconds"], 1, 20))
        done += 1
    return [
        dataclasses.replace(row, status=FAILED, reason=lost[row.peer])
        if row.peer in lost
        else dataclasses.replace(row, seconds=tuple(found.get(row.peer, ())))
        for row in rows
    ]


def ratio(row: Row, base: Row) -> float:
    """Median of the ratios of measurements in the same round."""
    return float(np.median(np.asarray(row.seconds) / np.asarray(base.seconds)))


def fastest(rows: Sequence[Row]) -> Row | None:
    """Of the others with the right answer, the one with the lowest ratio to the first of them."""
    right = [row for row in rows if row.status == RIGHT and row.seconds and row.peer not in MODULES["ours"]]
    return min(right, key=lambda row: ratio(row, right[0]), default=None)
