"""Rows of a study: one JSON object a line, for each finished job (problem, method, seed).

The JSON is strict: numbers that are not finite are the strings "nan", "inf" and "-inf", and null stands for
what is not known. What is read is checked field by field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 2
# Statuses of rows without a result: the method cannot tune the problem, or raised.
REFUSED, FAILED = "REFUSED", "FAILED"
_NOT_FINITE = ("nan", "inf", "-inf")


class StudyError(Exception):
    """What a person did or a file holds cannot be worked with; the message says what."""


class Job(NamedTuple):
    """What one row is about."""

    problem: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}, {self.method}, seed {self.seed}"


class CurvePoint(NamedTuple):
    """A method's state at a time.

    ``seconds``: since its timed run began. ``examples``: touched until then. ``value``: what the method
    measured, and ``best`` of it so far. ``solved``: the outer value after accurate training at the
    hyperparameters it has then, of a search the best so far; nan where it was not measured.
    """

    seconds: float
    examples: float
    value: float
    best: float
    solved: float


# --- Readers of fields: they return the value, or raise TypeError -----------------------------------------


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def _whole(value) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a whole number")
    return value


def _number(value) -> float:
    if value in _NOT_FINITE:
        return float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError('a number, "nan", "inf" or "-inf"')
    return float(value)


def _number_or_null(value) -> float | None:
    return None if value is None else _number(value)


def _numbers(value) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError("an object of numbers")
    return {name: _number(number) for name, number in value.items()}


def _curve(value) -> tuple[CurvePoint, ...]:
    wanted = f"a list of [{', '.join(CurvePoint._fields)}]"
    if not isinstance(value, list):
        raise TypeError(wanted)
    if not all(isinstance(point, list) and len(point) == len(CurvePoint._fields) for point in value):
        raise TypeError(wanted)
    return tuple(CurvePoint(*map(_number, point)) for point in value)


def _machine(value) -> Machine:
    return _read(Machine, value)


def _field(read: Callable[[Any], Any]):
    return dataclasses.field(metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Machine:
    """Software, cores this process might use, and the load average when the job started."""

    python: str = _field(_text)
    jax: str = _field(_text)
    backend: str = _field(_text)
    cores: int = _field(_whole)
    processor: str = _field(_text)
    load: float = _field(_number)


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished job.

    Args:
      problem: its name; ``method`` and ``seed`` likewise.
      seconds: the budget of the timed run.
      commit: of the working tree.
      command: the command line of the study.
      machine: where it ran.
      started: ISO 8601, UTC.
      compile_seconds: the first call, less a repeat of the same work.
      run_seconds: of the timed run; ends of steps and of configurations overrun the budget a little.
      status: a name of `bilevel.Status`, "TIME" where the time ended the run, or `REFUSED` or `FAILED`.
      message: why it ended, in a sentence.
      curve: at most 200 points, closest at the start.
      value: the best value of the curve.
      solved: the outer value after accurate training at the hyperparameters found, from the task's start.
      test: the outer loss of that model on the test arrays; ``metrics`` are outer's, there.
      optimum: the lowest outer value, where it is known.
    """

    problem: str = _field(_text)
    method: str = _field(_text)
    seed: int = _field(_whole)
    seconds: float = _field(_number)
    commit: str = _field(_text)
    command: str = _field(_text)
    machine: Machine = _field(_machine)
    started: str = _field(_text)
    compile_seconds: float = _field(_number)
    run_seconds: float = _field(_number)
    status: str = _field(_text)
    message: str = _field(_text)
    curve: tuple[CurvePoint, ...] = _field(_curve)
    value: float = _field(_number)
    solved: float = _field(_number)
    test: float = _field(_number)
    metrics: dict[str, float] = _field(_numbers)
    optimum: float | None = _field(_number_or_null)

    @property
    def job(self) -> Job:
        """What the row is about."""
        return Job(self.problem, self.method, self.seed)


def _read(kind: type, value) -> Any:
    """An instance of a dataclass whose fields say how they are read."""
    if not isinstance(value, dict):
        raise TypeError("an object")
    fields = {field.name: field.metadata["read"] for field in dataclasses.fields(kind)}
    for problem, names in (("no field", fields.keys() - value), ("unknown field", value.keys() - fields)):
        if names:
            raise ValueError(f"{problem} {', '.join(map(repr, sorted(names)))}")
    found = {}
    for name, read in fields.items():
        try:
            found[name] = read(value[name])
        except TypeError as error:
            raise ValueError(f"field {name!r} must be {error}, got {value[name]!r:.40}") from None
        except ValueError as error:
            raise ValueError(f"field {name!r}: {error}") from None
    return kind(**found)


def to_line(row: Row) -> str:
    """One line of JSON, with its newline."""
    return _line({"schema": SCHEMA} | dataclasses.asdict(row))


def save_lines(rows: Iterable[Any], path: Path) -> None:
    """A line for each of some dataclasses, as strict as rows of a study; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_line(dataclasses.asdict(row)) for row in rows))


def _line(fields: dict) -> str:
    return json.dumps(_plain(fields), allow_nan=False) + "\n"


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_line(line: str) -> Row:
    """The row of a line; ValueError says what is wrong with it."""
    try:
        value = json.loads(line, parse_constant=_refused)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    schema = value.pop("schema", None)
    if schema != SCHEMA:
        raise ValueError(f"schema {schema!r} is not known, only {SCHEMA}")
    return _read(Row, value)


def _refused(constant: str):
    raise ValueError(f"not JSON ({constant} is no number)")


def parse(data: bytes, path: Path, before: Mapping[Job, Row] | None = None) -> dict[Job, Row]:
    """The rows of a file's complete lines; a last line without its newline is left out.

    Args:
      data: the file, or what follows the rows read before.
      path: of the file.
      before: the rows read before, one for each line.

    Raises:
      StudyError: a line is malformed, or repeats a job; it names file and line.
    """
    found = dict(before or {})
    for number, line in enumerate(data.split(b"\n")[:-1], start=len(found) + 1):
        try:
            row = from_line(line.decode())
            if row.job in found:
                raise ValueError(f"a second row of {row.job}")
        except ValueError as error:
            raise StudyError(f"{path}, line {number}: {error}.") from None
        found[row.job] = row
    return found
