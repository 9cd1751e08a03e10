"""Files of lines: a table of comma-separated values, or one JSON object a line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel.callbacks import rows as tables
from bilevel.checkpoint import reason_of


class Format(NamedTuple):
    """How lines are written and read; the name of the callback, and how a file of it begins."""

    name: str
    begins: bytes
    header: bool
    lines: Callable[[Mapping[str, np.ndarray]], list[str]]
    step: Callable[[bytes], int]


@dataclasses.dataclass(eq=False)
class Log:
    """See `csv` and `json_lines`."""

    path: Path
    columns: tuple[str, ...] | None
    format: Format = dataclasses.field(repr=False)
    _next: int = dataclasses.field(default=-1, init=False, repr=False)  # the step the file waits for
    _end: int = dataclasses.field(default=0, init=False, repr=False)  # bytes that are good
    _waiting: bytes = dataclasses.field(default=b"", init=False, repr=False)

    def __call__(self, step: int, rows: Mapping[str, np.ndarray]) -> None:
        table = tables.table(rows, self.columns)
        first = int(rows["step"][0])
        if first != self._next or self._lost():
            self._seek(first, ",".join(table))
        if self.format.header and not self._end and not self._waiting:
            self._waiting = (",".join(table) + "\n").encode()
        self._waiting += "".join(line + "\n" for line in self.format.lines(table)).encode()
        self._next = step
        try:
            self._write()
        except OSError as error:
            warnings.warn(
                f"{self.path} could not be written: {reason_of(error)}; the rows wait for the next call.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _lost(self) -> bool:
        """Whether the file was taken away, or cut."""
        return self._end > 0 and (not self.path.exists() or self.path.stat().st_size < self._end)

    def _seek(self, first: int, header: str) -> None:
        """What the file holds from a step on, and half a line at its end, are not good."""
        self._end, self._waiting = 0, b""
        if not first or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for i, line in enumerate(file):
                title = self.format.header and i == 0
                if not line.endswith(b"\n") or not title and self.format.step(line) >= first:
                    break
                if title and line != (header + "\n").encode():
                    raise ValueError(
                        f"path: {self.path} holds the columns {line.decode().strip()}, and this run has "
                        f"{header}; give another file."
                    )
                self._end += len(line)

    def _write(self) -> None:
        """All that waits, in one piece, behind what is good."""
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self._end)
            if (file.write(self._waiting) or 0) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end, self._waiting = self._end + len(self._waiting), b""


def csv(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Log:
    """A callback that writes a table: one line for each outer step, names of the columns in the first one.

    A number that is nan, such as a test value at a step where none was measured, is an empty field; truth
    values are 1 and 0. Numbers are those of the history to the last bit. In a population the second column,
    "member", says whose line it is. Where a line cannot be written, it warns and the run goes on; the next
    call writes that line too.

    Args:
      path: of the file; its folder must exist. A file that such a callback wrote is gone on with.
      columns: of the history, besides "step"; default all.

    Raises:
      TypeError, ValueError: not a path; a file that cannot be written, or that holds something else. At the
        first call: unknown columns, or others than those in a file that is gone on with.

    Example:
      >>> import bilevel, pathlib, tempfile, numpy as np
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
      >>> log = bilevel.callbacks.csv(path, columns=["value"])  # callbacks=[log] of bilevel.optimize
      >>> log(2, {"step": np.array([0, 1]), "value": np.array([0.5, 0.25])})
      >>> print(path.read_text(), end="")
      step,value
      0,0.5
      1,0.25
    """
    return Log(_file(path, _CSV), tables.names(columns), _CSV)


def json_lines(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Log:
    """A callback that writes one JSON object a line, for each outer step; else as `csv`.

    A number that is not finite is null.

    Args:
      path: of the file; its folder must exist. A file that such a callback wrote is gone on with.
      columns: of the history, besides "step"; default all.

    Raises:
      TypeError, ValueError: as `csv`.

    Example:
      >>> import bilevel, pathlib, tempfile, numpy as np
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
      >>> log = bilevel.callbacks.json_lines(path)
      >>> log(1, {"step": np.array([0]), "value": np.array([0.5]), "test": np.array([np.nan])})
      >>> print(path.read_text(), end="")
      {"step": 0, "value": 0.5, "test": null}
    """
    return Log(_file(path, _JSON), tables.names(columns), _JSON)


def _csv_lines(table: Mapping[str, np.ndarray]) -> list[str]:
    texts = [_texts(column, "1", "0", "") for column in table.values()]
    return [",".join(line) for line in zip(*texts, strict=True)]


def _json_lines(table: Mapping[str, np.ndarray]) -> list[str]:
    texts = []
    for name, column in table.items():
        known = np.where(np.isfinite(column), column, np.nan) if column.dtype.kind == "f" else column
        texts.append([f"{json.dumps(name)}: {text}" for text in _texts(known, "true", "false", "null")])
    return ["{" + ", ".join(line) + "}" for line in zip(*texts, strict=True)]


def _texts(column: np.ndarray, true: str, false: str, nothing: str) -> list[str]:
    """Each number by the fewest digits that give it back in its own precision."""
    if column.dtype.kind == "b":
        return [true if value else false for value in column.tolist()]
    values = column.tolist() if column.dtype != np.float32 else column
    return [nothing if value != value else str(value) for value in values]


_CSV = Format("csv", b"step", True, _csv_lines, lambda line: int(line.split(b",", 1)[0]))
_JSON = Format("json_lines", b'{"step": ', False, _json_lines, lambda line: int(json.loads(line)["step"]))


def _file(value: str | os.PathLike, kind: Format) -> Path:
    """A path that can be written to, and that holds nothing or what such a callback wrote."""
    path = tables.path_of("path", value)
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder {path.parent} does not exist; create it first.")
    try:
        if not path.exists():
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return path
        with open(path, "r+b") as file:
            start = file.read(len(kind.begins))
    except OSError as error:
        raise ValueError(f"path: {path} cannot be written to: {reason_of(error)}.") from error
    if not kind.begins.startswith(start):
        raise ValueError(
            f"path: {path} holds something that callbacks.{kind.name} did not write; give another file."
        )
    return path
