"""Scalars for TensorBoard, by tensorboardX."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.callbacks import rows as tables
from bilevel.checkpoint import reason_of


@dataclasses.dataclass(eq=False)
class TensorBoard:
    """See `tensorboard`."""

    folder: Path
    columns: tuple[str, ...] | None
    writer: Callable[..., Any] = dataclasses.field(repr=False)
    _next: int = dataclasses.field(default=-1, init=False, repr=False)
    _first: int = dataclasses.field(default=0, init=False, repr=False)
    _writers: dict[int, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __call__(self, step: int, rows: Mapping[str, np.ndarray]) -> None:
        steps, seconds = rows["step"], rows["seconds"]
        if int(steps[0]) != self._next:
            self._begin(int(steps[0]))
        self._next = step
        named = {name: column for name, column in rows.items() if name != "seconds"}
        table = tables.table(named, self.columns)
        members = table.pop("member", np.full(len(table["step"]), -1))
        now = table.pop("step")
        times = time.time() - seconds[-1] + seconds[now - steps[0]]
        for name, column in table.items():
            known = np.isfinite(column)
            told = (members[known], now[known], column[known].astype(float), times[known])
            for member, at, value, second in zip(*(part.tolist() for part in told), strict=True):
                self._of(member).add_scalar(name, value, at, second)
        for writer in self._writers.values():
            writer.flush()

    def _begin(self, first: int) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers, self._first = {}, first

    def _of(self, member: int):
        if member not in self._writers:
            folder = self.folder if member < 0 else self.folder / f"member-{member}"
            self._writers[member] = self.writer(str(folder), purge_step=self._first)
        return self._writers[member]


def tensorboard(folder: str | os.PathLike, columns: Sequence[str] | None = None) -> TensorBoard:
    """A callback that writes scalars for TensorBoard: one tag for each column, finite numbers only.

    In a population each member has a folder of its own, ``member-3``, which TensorBoard shows as a run.
    Where a run goes on, TensorBoard leaves out what an earlier process wrote of the same steps.

    Args:
      folder: is made where it is missing.
      columns: of the history, besides "step"; default all, which takes time where outer steps are fast.
        "seconds" is the time of each entry, and no column.

    Raises:
      ImportError: tensorboardX is missing (``pip install 'bilevel[tensorboard]'``).
      TypeError, ValueError: not a path; a folder that cannot be made or written to. At the first call:
        unknown columns.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "callbacks.tensorboard needs tensorboardX: pip install 'bilevel[tensorboard]'."
        ) from error
    path = tables.path_of("folder", folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"folder: {path} cannot be written to: {reason_of(error)}.") from error
    return TensorBoard(path, tables.names(columns), SummaryWriter)
