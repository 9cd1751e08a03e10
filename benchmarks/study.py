"""A study: a folder that any number of processes fill with rows, and that survives being killed.

``study.json`` says what was asked, ``rows.jsonl`` holds a row for each finished job, and ``claims/`` a file
for each job that was ever begun. Who works on a job holds a lock on its claim, which the kernel takes back
when the process ends, however it ends. A row is appended under a lock on the rows, in one write; a process
killed in the middle of it leaves a line without its newline, which the next one to append cuts off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.rows import SCHEMA, Job, Row, StudyError, parse, to_line


@dataclasses.dataclass(frozen=True)
class Request:
    """What one command asks for: every combination."""

    problems: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def jobs(self) -> list[Job]:
        """The methods of a problem follow one another, so that they meet the machine in a like state."""
        return [Job(p, m, s) for s, p, m in itertools.product(self.seeds, self.problems, self.methods)]


@contextlib.contextmanager
def locked(path: Path, mode: str, kind: int = fcntl.LOCK_EX) -> Iterator:
    """The open file with a lock on it; None where ``kind`` says not to wait and another has it."""
    with path.open(mode, buffering=0) as file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            yield None
        else:
            yield file


@dataclasses.dataclass(frozen=True)
class Study:
    """The folder of a study; it remembers the rows it has read, as complete lines never change."""

    folder: Path
    _read: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def settings_path(self) -> Path:
        """What was asked."""
        return self.folder / "study.json"

    @property
    def rows_path(self) -> Path:
        """The rows."""
        return self.folder / "rows.jsonl"

    @property
    def claims(self) -> Path:
        """The folder of claims."""
        return self.folder / "claims"

    # --- What was asked ---

    def settings(self) -> tuple[float, list[Request]]:
        """The seconds of a run, and the requests so far.

        Raises:
          StudyError: no study is here, or its settings are damaged.
        """
        try:
            value = json.loads(self.settings_path.read_bytes())
            if value["schema"] != SCHEMA:
                raise ValueError(f"schema {value['schema']!r} is not known, only {SCHEMA}")
            asked = [Request(*(tuple(r[field.name]) for field in _FIELDS)) for r in value["asked"]]
            return float(value["seconds"]), asked
        except OSError as error:
            raise StudyError(f"{self.folder} holds no study ({self.settings_path}: {_why(error)}).") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{self.settings_path} is damaged: {error!r}.") from None

    def ask(self, request: Request, seconds: float) -> None:
        """Make the folder where it is missing, and add a request to what was asked.

        Raises:
          StudyError: the folder cannot be used, or its study has another budget.
        """
        try:
            self.claims.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / "study.lock", "ab"):
                self._add(request, seconds)
            self._repair()
        except OSError as error:
            raise StudyError(f"the folder {self.folder} cannot be made or written: {_why(error)}.") from None

    def _add(self, request: Request, seconds: float) -> None:
        asked: list[Request] = []
        if self.settings_path.exists():
            before, asked = self.settings()
            if before != seconds:
                raise StudyError(
                    f"{self.folder} holds a study of {before:g} seconds a run, not {seconds:g}; "
                    "take the same --seconds, or another folder."
                )
        elif self.rows_path.exists():
            raise StudyError(f"{self.rows_path} is there, but not {self.settings_path}; take another folder.")
        if request not in asked:
            asks = [dataclasses.asdict(r) for r in (*asked, request)]
            # Whoever is killed in between leaves the old settings as they were.
            new = self.settings_path.with_suffix(".new")
            with new.open("w") as file:
                json.dump({"schema": SCHEMA, "seconds": seconds, "asked": asks}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.settings_path)

    # --- Rows ---

    def rows(self) -> dict[Job, Row]:
        """The rows so far.

        Raises:
          StudyError: the file cannot be read, or a complete line is malformed.
        """
        try:
            with locked(self.rows_path, "rb", fcntl.LOCK_SH) as file:
                return self._rows(file)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StudyError(f"{self.rows_path} cannot be read: {_why(error)}.") from None

    def _rows(self, file) -> dict[Job, Row]:
        at, before = self._read.get("rows", (0, {}))
        if file.seek(0, os.SEEK_END) < at:
            at, before = 0, {}
        file.seek(at)
        data = file.read()
        found = parse(data, self.rows_path, before)
        self._read["rows"] = at + data.rfind(b"\n") + 1, found
        return dict(found)

    def half_written(self) -> int:
        """Bytes of a last row whose writer was killed; `rows` leaves it out, `append` cuts it off."""
        try:
            with locked(self.rows_path, "rb", fcntl.LOCK_SH) as file:
                data = file.read()
        except OSError:
            return 0  # which `rows` has words for
        return len(data) - data.rfind(b"\n") - 1

    def append(self, row: Row) -> None:
        """Add a row, and wait until it is on the disk."""
        line = to_line(row).encode()
        with locked(self.rows_path, "a+b") as file:
            self._cut(file)
            if file.write(line) != len(line):
                raise StudyError(f"{self.rows_path}: the row of {row.job} was not written whole.")
            os.fsync(file.fileno())

    def _repair(self) -> None:
        with locked(self.rows_path, "a+b") as file:
            self._cut(file)

    def _cut(self, file) -> None:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            lost = len(data) - whole
            print(f"{self.rows_path}: a half-written last row ({lost} bytes) is cut off.", file=sys.stderr)
            file.truncate(whole)

    # --- Work ---

    def claimed(self, job: Job, wait: bool):
        """A context in which nobody else works on the job; None where somebody does and we do not wait."""
        kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        return locked(self.claims / f"{job.problem}.{job.method}.{job.seed}", "ab", kind)

    def work(self, jobs: Sequence[Job], run: Callable[[Job], Row]) -> None:
        """Run what is not done; returns when all jobs are, also those that others had begun."""
        for wait in (False, True):
            for job in jobs:
                if job in self.rows():
                    continue
                with self.claimed(job, wait) as claim:
                    # It may have been finished between the look at the rows and the claim.
                    if claim is not None and job not in self.rows():
                        self.append(run(job))


_FIELDS = dataclasses.fields(Request)


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
