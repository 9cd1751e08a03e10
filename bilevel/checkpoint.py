"""Checkpoints of a run: a folder that one run owns, its newest files, and whose run they are."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import platform
import re
import secrets
import sys
import warnings
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
import optax

from bilevel import archive
from bilevel.validation import flag, whole_number

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_STEP = re.compile(r"step-(\d{8,})\.npz")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.npz\.[0-9a-f]{8}\.tmp")
LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """See `checkpoints`."""

    path: str
    every: int = 50
    keep: int = 3
    reread: bool = False


def checkpoints(path: str | os.PathLike, every: int = 50, keep: int = 3, reread: bool = False) -> Checkpoints:
    """Where and how often a run writes down everything that it needs to go on.

    Args:
      path: of a folder, which is created where it is missing. One run at a time may use it.
      every: outer steps between checkpoints.
      keep: how many of the newest files stay; older ones are removed.
      reread: iterables that have no ``get_state`` and ``set_state`` of their own are read again from their
        beginning when a run goes on, and the batches that were taken are skipped; otherwise such an iterable
        is refused.

    Raises:
      TypeError, ValueError: not a path, not a whole number of at least 1, not True or False.

    Example:
      >>> import bilevel
      >>> bilevel.checkpoints("runs/l2", every=100)
      Checkpoints(path='runs/l2', every=100, keep=3, reread=False)
    """
    return Checkpoints(
        _path("path", path),
        whole_number("every", every, 1),
        whole_number("keep", keep, 1),
        flag("reread", reread),
    )


def as_checkpoints(value: str | os.PathLike | Checkpoints) -> Checkpoints:
    """What a user passes as ``checkpoint=``: a path, or `checkpoints` with settings.

    Raises:
      TypeError: neither of the two.
    """
    if isinstance(value, Checkpoints):
        return value
    return checkpoints(_path("checkpoint", value, " or bilevel.checkpoints(path, ...)"))


def _path(name: str, value, other: str = "") -> str:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be the path of a folder{other}, got {value!r}.")
    if not text:
        raise ValueError(f"{name} must be the path of a folder{other}, got an empty one.")
    return text


# --- The folder --------------------------------------------------------------------------------------------


class Folder:
    """The folder of checkpoints while a run owns it: a context manager.

    Files are ``step-00000050.npz``. Another run, in this process or another, cannot open the folder before
    this one has closed it or its process has ended, in whatever way. What else lies in the folder is left
    alone.

    Args:
      settings: from `checkpoints`.

    Raises:
      ValueError, when it is entered: the path is a file, cannot be created, cannot be written to, or is in
        use by another run.
    """

    def __init__(self, settings: Checkpoints):
        self.path = Path(settings.path)
        self.keep = settings.keep
        self._lock: int | None = None

    def __enter__(self) -> Folder:
        self._create()
        self._lock = self._locked()
        try:
            for name in filter(_TEMPORARY.fullmatch, os.listdir(self.path)):
                (self.path / name).unlink(missing_ok=True)  # of a run that was killed while it wrote
            self._try_to_write()
        except OSError as error:
            if (
                error.errno in _FULL
            ):  # there may be room later, and the checkpoints that are there can be read
                warnings.warn(self._unwritable(error) + " The run goes on.", RuntimeWarning, stacklevel=3)
                return self
            self.__exit__()
            raise ValueError(self._unwritable(error)) from error
        return self

    def __exit__(self, *raised) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
                _unlock(self._lock)
            os.close(self._lock)
            self._lock = None

    def newest(self) -> tuple[bytes, Path] | None:
        """The content and path of the newest file that is whole, None where there are no files.

        A newer file that is damaged is renamed to ``damaged-step-....npz``, with a RuntimeWarning.

        Raises:
          ValueError: there are files, and all are damaged.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self._steps().values()):
            try:
                content = path.read_bytes()
            except OSError as error:
                damaged[path] = f"cannot be read ({reason_of(error)})"
                continue
            if archive.intact(content):
                for other, what in damaged.items():
                    self._put_aside(other, what, path)
                return content, path
            damaged[path] = "is damaged"
        if damaged:
            count = "the only checkpoint is" if len(damaged) == 1 else f"all {len(damaged)} checkpoints are"
            each = ", ".join(f"{path.name} {what}" for path, what in damaged.items())
            raise ValueError(
                f"checkpoint: {count} damaged in {self.path} ({each}). Move the folder away to begin anew."
            )
        return None

    def write(self, step: int, trees: dict, meta: dict) -> str | None:
        """Write the file of a step and remove the oldest ones; where it fails, a sentence that says why.

        A failure leaves the files that are there as they are, and a folder that is gone is not made again.
        Files of later steps are renamed to ``stale-step-....npz``: this run has gone back behind them, and
        the next one would take them for the newest.
        """
        path = self.path / f"step-{step:08}.npz"
        try:
            archive.write(path, trees, meta)
        except OSError as error:
            gone = isinstance(error, archive.MissingFileError)
            reason = "the folder is no longer there" if gone else reason_of(error)
            return f"The checkpoint of step {step} could not be written to {path}: {reason}."
        with contextlib.suppress(OSError):
            steps = self._steps()
            for later in [s for s in steps if s > step]:
                os.rename(steps[later], _free(self.path, f"stale-step-{later:08}"))
                del steps[later]
            for old in list(steps)[: -self.keep]:
                steps[old].unlink(missing_ok=True)
        return None

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            if os.path.isfile(self.path):
                raise ValueError(
                    f"checkpoint: {self.path} is a file, and checkpoints go into a folder; give a folder."
                ) from None
            reason = reason_of(error) if isinstance(error, OSError) else error
            raise ValueError(f"checkpoint: the folder {self.path} cannot be created: {reason}.") from error

    def _locked(self) -> int:
        """The open lock file of the folder."""
        path = self.path / LOCK
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(self._unwritable(error)) from error
        try:
            holder = os.read(file, 32).decode(errors="replace").strip()
            if holder and not holder.isdecimal():
                raise ValueError(
                    f"checkpoint: {path} was not written by a run, and a run needs a file of that name; give "
                    "another folder."
                )
            try:
                _lock(file)
            except BlockingIOError:
                who = "this process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
                raise ValueError(
                    f"checkpoint: {self.path} is in use by another run, of {who}. Give another folder, or "
                    "wait until that run has ended."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                warnings.warn(
                    f"checkpoint: the file system of {self.path} has no locks; nothing keeps another run out "
                    "of that folder.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            with contextlib.suppress(OSError):  # who it is, for the message; a full disk has no room for it
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)
                os.write(file, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(file)
            raise ValueError(self._unwritable(error)) from error
        except BaseException:
            os.close(file)
            raise
        return file

    def _try_to_write(self) -> None:
        trial = self.path / f".step-{0:08}.npz.{secrets.token_hex(4)}.tmp"
        try:
            trial.write_bytes(b"0")
        finally:
            trial.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> str:
        return f"checkpoint: the folder {self.path} cannot be written to: {reason_of(error)}."

    def _steps(self) -> dict[int, Path]:
        """The files by step, oldest first."""
        return {int(name[len("step-") : -len(".npz")]): self.path / name for name in files(self.path)}

    def _put_aside(self, path: Path, what: str, taken: Path) -> None:
        kept = ""
        with contextlib.suppress(OSError):
            aside = _free(self.path, f"damaged-{path.stem}")
            os.rename(path, aside)
            kept = f" (it is kept as {aside.name})"
        step = int(taken.stem.removeprefix("step-"))
        warnings.warn(
            f"checkpoint: {path} {what}{kept}; going on from step {step}, {taken.name}.",
            RuntimeWarning,
            stacklevel=3,
        )


def _free(folder: Path, stem: str) -> Path:
    """A path in the folder that names no file yet."""
    path, number = folder / f"{stem}.npz", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.npz"
    return path


def files(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, oldest first."""
    return sorted(filter(_STEP.fullmatch, os.listdir(folder)), key=lambda name: (len(name), name))


def reason_of(error: OSError) -> str:
    """Why the system refused."""
    return error.strerror or str(error)


def _lock(file: int) -> None:
    """Lock an open file for as long as it is open; BlockingIOError where another one has locked it."""
    if sys.platform == "win32":
        os.lseek(file, 1 << 30, os.SEEK_SET)  # the locked byte cannot be read, the number before it can
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: int) -> None:
    # Explicitly: processes forked meanwhile have the file open too.
    if sys.platform == "win32":
        os.lseek(file, 1 << 30, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)


# --- The same run ------------------------------------------------------------------------------------------


def check_same_run(stored: dict, mine: dict, where: str | os.PathLike) -> None:
    """Raise unless the checkpoint at ``where`` is of this run.

    Args:
      stored: fingerprints in the checkpoint: digests by name ("program", "key", "params", ...), and
        "versions", as `versions` gives them.
      mine: those of this run.
      where: path of the checkpoint, for messages.

    Raises:
      ValueError: what the run begins with or learns from differs, or its program does although all versions
        are the same. Where versions differ as well the program may be the same to the user: RuntimeWarning.
    """
    names = list(dict.fromkeys([*mine, *stored]))
    differ = [name for name in names if name != "versions" and stored.get(name) != mine.get(name)]
    if not differ:
        return
    fix = "Give another folder, or remove this one."
    inputs = [name for name in differ if name != "program"]
    if inputs:
        listed = " and ".join([", ".join(inputs[:-1]), inputs[-1]] if inputs[1:] else inputs)
        verb = "differ" if inputs[1:] or inputs[0].endswith("params") else "differs"
        strata = _other_strata(stored, mine)
        raise ValueError(f"checkpoint: {where} holds another run: {listed} {verb}. {strata}{fix}")
    there, here = stored.get("versions") or {}, mine.get("versions") or {}
    if there == here:
        raise ValueError(
            f"checkpoint: {where} holds another run: the method, the problem's losses or a setting inside "
            f"them differ. {fix}"
        )
    warnings.warn(
        f"checkpoint: {where} was written with {_listed(there)}, and this is {_listed(here)}. The program of "
        "the outer step differs, as it may between versions; going on as the same run.",
        RuntimeWarning,
        stacklevel=2,
    )


_STRATA = re.compile(r", strata=(\d+)")


def _other_strata(stored: dict, mine: dict) -> str:
    """Advice where batches are drawn from other strata and nothing else of the sampling differs."""
    for name, text in mine.items():
        there = stored.get(name, "")
        same = _STRATA.sub("", text) == _STRATA.sub("", there) if name.startswith("sampling of") else False
        if same and text != there:
            then, now = (found.group(1) if (found := _STRATA.search(t)) else "1" for t in (there, text))
            return (
                f"Batches were drawn with strata={then}, and now with strata={now}: by default there are as "
                f"many as shards of the rows. bilevel.minibatches(..., strata={then}) goes on from there. "
            )
    return ""


def _listed(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"


def versions() -> dict[str, str]:
    """Versions of everything that decides which program a run is."""
    from bilevel import __version__

    return {
        "bilevel": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "numpy": np.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
    }
