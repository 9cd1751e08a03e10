"""Rows of a history as a table, and the arguments that all callbacks take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bilevel.progress import running


def table(rows: Mapping[str, np.ndarray], columns: tuple[str, ...] | None) -> dict[str, np.ndarray]:
    """Columns of equal length: the outer step, in a population the member, and those wanted.

    Args:
      rows: as a callback gets them, each of shape (steps, [members]).
      columns: which, None for all.

    Raises:
      ValueError: the history has no such column.
    """
    unknown = [name for name in columns or () if name not in rows]
    if unknown:
        raise ValueError(f"columns: the history has no {', '.join(unknown)}; it has {', '.join(rows)}.")
    wanted = ("step", *(name for name in (columns or rows) if name != "step"))
    if all(np.ndim(column) < 2 for column in rows.values()):
        return {name: np.asarray(rows[name]) for name in wanted}
    at, member = np.nonzero(running(rows))
    own = {name: rows[name][at, member] if np.ndim(rows[name]) > 1 else rows[name][at] for name in wanted}
    return {"step": own.pop("step"), "member": member, **own}


def names(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    """The argument ``columns`` of a callback.

    Raises:
      TypeError: not names.
    """
    if columns is None:
        return None
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns must be names of columns of the history, got {columns!r}.")
    return tuple(dict.fromkeys(columns))


def path_of(name: str, value: str | os.PathLike) -> Path:
    """An argument that is a path.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{name} must be a path, got {value!r}.")
    return Path(os.fsdecode(value))
