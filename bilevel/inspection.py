"""What a folder of checkpoints or a saved result says of its run, for a person; see ``bilevel inspect``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np

from bilevel import archive, checkpoint, panels, stored
from bilevel.progress import duration
from bilevel.result import Result
from bilevel.result_report import statuses, told

# Leaves that are listed.
_MOST_LEAVES = 24
# A file of a run that goes on may be removed between two looks.
_LOOKS = 3


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found: a heading, facts by name, the run as a `Result`, and how to go on from it.

    ``result``: None of a checkpoint that keeps no names.
    """

    heading: str
    facts: list[tuple[str, str]]
    result: Result | None
    next: str

    def known(self) -> Result:
        """The run as a result.

        Raises:
          ValueError: the checkpoint keeps no names.
        """
        if self.result is None:
            raise ValueError(
                "this checkpoint is of a version of bilevel that kept no names: it cannot be drawn."
            )
        return self.result

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        return "\n".join([self.heading, *(f"  {name:{width}}  {text}" for name, text in self.facts)])


def look(path: str | os.PathLike) -> Seen:
    """What is in a folder of checkpoints, whether its run goes on or not, or in one file.

    Nothing is written or locked.

    Args:
      path: the folder that was given as ``checkpoint=``, one of its files, or a file of `Result.save`.

    Raises:
      ValueError: nothing is there, nothing whole, or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    with archive.File(path) as file:
        kind = file.meta.get("kind", "result")
        if kind == "checkpoint":
            return _checkpoint(file, path.parent, [])
        if kind != "result":
            raise ValueError(f"{path} holds a {kind}, neither a result nor a checkpoint.")
        return _result(file)


# --- A folder -----------------------------------------------------------------------------------------------


def _folder(path: Path) -> Seen:
    for _ in range(_LOOKS):
        files = checkpoint.files(path)
        damaged: list[str] = []
        for name in reversed(files):
            try:
                file = archive.File(path / name)
            except archive.MissingFileError:  # an older one, removed meanwhile
                continue
            except ValueError:
                damaged.append(name)
                continue
            with file, contextlib.suppress(FileNotFoundError):
                return _checkpoint(file, path, [*_about_files(files, damaged), *_process(path)])
        if damaged:
            raise ValueError(f"{path}: every checkpoint is damaged ({', '.join(damaged)}).")
        if not files:
            break
    raise ValueError(_nothing(path))


def _nothing(path: Path) -> str:
    """Why there is no checkpoint."""
    holder = _holder(path)
    if holder is not None and _alive(holder) is False:
        return (
            f"{path} holds no checkpoint: process {holder} began a run there and was killed before the first."
        )
    if holder is not None:
        return (
            f"{path} holds no checkpoint yet: process {holder} has begun a run there; the first comes after "
            "as many outer steps as every= of bilevel.checkpoints says."
        )
    if any(name.endswith(".tmp") for name in os.listdir(path)):
        return f"{path} holds no checkpoint, only half of one, whose writer was killed."
    saved = sorted(file.name for file in path.glob("*.npz"))
    if saved:
        return f"{path} holds no checkpoint; if {saved[0]} is a saved result, name that file."
    return (
        f"{path} holds no checkpoint: it is not a folder that was given as checkpoint= to bilevel.optimize."
    )


def _about_files(files: list[str], damaged: list[str]) -> list[tuple[str, str]]:
    facts = [("files", ", ".join(files))]
    return [*facts, ("damaged", f"{', '.join(damaged)}; an older one is shown")] if damaged else facts


def _holder(path: Path) -> int | None:
    """The process that says it uses the folder; one that was killed still does, one that ended does not."""
    try:
        text = (path / checkpoint.LOCK).read_text().strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None


def _process(path: Path) -> list[tuple[str, str]]:
    holder = _holder(path)
    if holder is None:
        return [("process", "none: the run has ended or was interrupted")]
    alive = _alive(holder)
    if alive is None:
        return [("process", f"{holder} used it last")]
    lives = (
        "is alive"
        if alive
        else "is not there: it was killed, or it runs on another machine or in a container"
    )
    return [("process", f"{holder} used it last, and {lives}")]


def _alive(process: int) -> bool | None:
    """Whether there is a process of that number here; None where asking would hurt it."""
    if sys.platform == "win32":
        return None
    try:
        os.kill(process, 0)  # no signal: only whether one could be sent
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


# --- One file -----------------------------------------------------------------------------------------------


def _checkpoint(file: archive.File, folder: Path, facts: list[tuple[str, str]]) -> Seen:
    meta = file.meta
    step, shown = meta["step"], meta.get("shown")
    of = f" of {shown['steps']:,}" if shown else ""
    written = file.path.stat().st_mtime
    age = max(time.time() - written, 0.0)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    facts = [
        ("written", f"{when}, {duration(age)} ago"),
        *facts,
        ("time", f"{duration(meta['seconds'])} until then"),
        ("versions", ", ".join(f"{name} {version}" for name, version in meta["versions"].items())),
    ]
    result = None
    if shown:
        result = stored.of_checkpoint(file)
        facts += _values(result)
    else:
        facts += [("names", "not kept by the version of bilevel that wrote it: no values can be shown")]
    way = f"bilevel.optimize(..., checkpoint={str(folder)!r})"
    facts.append(("go on", f"{way} with the same arguments goes on from outer step {step}"))
    return Seen(f"{file.path}: a checkpoint after {step:,}{of} outer steps", facts, result, way)


def _result(file: archive.File) -> Seen:
    try:
        result = stored.of_result(file)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file.path} is not a result that bilevel wrote (no {error}).") from error
    way = f"import bilevel\n\nresult = bilevel.load({str(file.path)!r})"
    facts = [
        ("time", duration(result.seconds)),
        *_values(result),
        ("load", way.splitlines()[-1]),
    ]
    steps = len(result.history["step"])
    return Seen(f"{file.path}: a result after {steps:,} outer steps", facts, result, way)


def _values(result: Result) -> list[tuple[str, str]]:
    """Statuses, values, the test value and the hyperparameters."""
    history, best = result.history, result.best
    codes = statuses(result)
    ended = ", ".join(f"{codes.count(code)} {code.name}" for code in sorted(set(codes)))
    of = "" if best.member is None else f" of member {best.member}"
    facts = [("status", codes[0].name if best.member is None else f"members: {ended}")]
    facts.append(("message", result.message))
    if len(history["step"]):
        last = [history[name][-1] for name in ("value", "grad_norm")]
        if best.member is not None:
            last = [column[best.member] for column in last]
        facts += [
            ("value", f"best {best.value:.6g} at step {best.step}{of}, last {last[0]:.6g}"),
            ("grad norm", f"{last[1]:.3g}"),
        ]
    if "test" in history:
        column = history["test"] if best.member is None else history["test"][:, best.member]
        seen = np.flatnonzero(np.isfinite(column))
        facts += [("test", f"{column[seen[-1]]:.6g} at step {seen[-1]}")] if len(seen) else []
    leaves = panels.leaves(result)
    for leaf in leaves[:_MOST_LEAVES]:
        sizes = f" {'x'.join(map(str, leaf.shape))}" if leaf.shape else ""
        first, at_best, at_end = told(leaf)
        facts.append((f"hparams{leaf.name}{sizes}", f"{first} first, {at_best} best, {at_end} last"))
    if len(leaves) > _MOST_LEAVES:
        facts.append(("hparams", f"{len(leaves) - _MOST_LEAVES} more"))
    return facts
