"""Files of runs as they lie on disk, read without the code of their problem and without a device.

A checkpoint holds the state as bare leaves. What it says besides (`described`) is enough for the history, the
hyperparameters and the best pair; params stay where they are. Nothing here writes, locks, or starts a JAX
backend, which on an accelerator would take memory from the run that is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import loop
from bilevel.archive import MissingFileError
from bilevel.problem import PyTree, Status
from bilevel.record import Record
from bilevel.result import Best, Members, Result, Trajectory

_DIGEST, _BLOCK = 64, 1 << 20


class File:
    """A file of `bilevel.archive`, of which trees are read one by one.

    Args:
      path: of the file.

    Raises:
      MissingFileError: it is not there; ValueError: not such a file, or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise MissingFileError(f"there is no file {path}.") from None
        try:
            if not _intact(self._file):
                raise ValueError("its digest is not that of its content")
            self._zip = zipfile.ZipFile(self._file)
            manifest = json.loads(self._zip.read("manifest.json"))
            self.meta: dict[str, Any] = dict(manifest["meta"])
            self._layouts, self._dtypes = dict(manifest["trees"]), list(manifest["dtypes"])
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            self._file.close()
            raise ValueError(
                f"{path} is not a file that bilevel wrote, or it is damaged ({error})."
            ) from error

    def __enter__(self) -> File:
        return self

    def __exit__(self, *raised) -> None:
        self._zip.close()
        self._file.close()

    def tree(self, name: str, shapes: bool = False) -> PyTree:
        """A tree of numpy arrays, or of shapes; a container that only its maker knows is a list of leaves."""
        return self._decoded(self._layouts[name], shapes)

    def leaf(self, number: int) -> np.ndarray:
        """One array; keys as their numbers."""
        with self._zip.open(f"{number}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
        dtype = self._dtypes[number]
        return (
            array if dtype.startswith("key:") or array.dtype.name == dtype else array.view(jnp.dtype(dtype))
        )

    def _shape(self, number: int) -> jax.ShapeDtypeStruct:
        with self._zip.open(f"{number}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        name = self._dtypes[number]
        return jax.ShapeDtypeStruct(shape, dtype if name.startswith("key:") else jnp.dtype(name))

    def _decoded(self, layout: Any, shapes: bool) -> PyTree:
        if layout is None:
            return None
        if isinstance(layout, int):
            return self._shape(layout) if shapes else self.leaf(layout)
        if layout["is"] == "dict":
            return {name: self._decoded(child, shapes) for name, child in layout["of"].items()}
        children = layout["leaves"] if layout["is"] == "other" else layout["of"]
        out = [self._decoded(child, shapes) for child in children]
        return tuple(out) if layout["is"] == "tuple" else out


def _intact(file: BinaryIO) -> bool:
    """Whether a file ends in the digest of what stands before."""
    left, digest = file.seek(0, os.SEEK_END) - _DIGEST, hashlib.sha256()
    file.seek(0)
    while left > 0:
        block = file.read(min(left, _BLOCK))
        digest.update(block)
        left -= len(block)
    return left == 0 and file.read().decode(errors="replace") == digest.hexdigest()


# --- Checkpoints --------------------------------------------------------------------------------------------


def described(plan: loop.Plan, member: loop.Member, steps: int) -> dict[str, Any]:
    """What a checkpoint says of its own, for JSON: names, and where the hyperparameters lie among the leaves.

    Args:
      plan: of the run.
      member: the run, or all members of the program.
      steps: outer steps asked for.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(member.hparams)[0]]
    before = len(jax.tree.leaves((member.state, member.key)))
    best = None
    if member.best is not None:
        best = before + len(paths) + len(jax.tree.leaves(member.best.params))
    return {
        "columns": plan.columns,
        "judged": plan.judged_columns,
        "judge_every": plan.judge_every,
        "population": plan.population,
        "steps": steps,
        "hparams": [[_plain(key) for key in path] for path in paths],
        "hparams_at": before,
        "best_at": best,
    }


def _plain(key: Any) -> str | int:
    """One step of a path to a leaf."""
    for name in ("key", "idx", "name"):
        found = getattr(key, name, None)
        if isinstance(found, (str, int)):
            return found
    return str(key)


def of_checkpoint(file: File) -> Result:
    """A run as its checkpoint knows it: a `Result` without params.

    Raises:
      ValueError: of a version that wrote no names.
    """
    shown = file.meta.get("shown")
    if shown is None:
        raise ValueError(f"{file.path} is of a version of bilevel that kept no names in checkpoints.")
    parts, population = file.tree("members", shapes=True), shown["population"]
    layout = [part["of"] for part in file._layouts["members"]["of"]]
    order = np.argsort(np.concatenate(file.tree("places")), kind="stable") if population else None
    count = len(shown["hparams"])

    def read(at: int) -> np.ndarray:
        """A leaf of the run, or of all members in their order."""
        at %= len(parts[0])
        if order is None:
            return file.leaf(layout[0][at])
        return np.concatenate([file.leaf(part[at]) for part in layout])[order]

    def hparams(at: int) -> PyTree:
        return _tree(shown["hparams"], [read(at + i) for i in range(count)])

    last, all_done = hparams(shown["hparams_at"]), file.meta["step"] >= shown["steps"]
    record = _record(file, shown, last, len(order) if order is not None else None)
    status, attempted = read(-1), read(-2)
    at_best, value, step = last, record.lowest(), np.zeros(np.shape(status), int)
    if shown["best_at"] is not None:
        at_best, value, step = hparams(shown["best_at"]), read(-4), read(-3)
    value = np.where(np.isfinite(value), value, np.nan)
    common = {
        "params": None,
        "hparams": last,
        "history": record.history(),
        "trajectory": record.trajectory(last),
        "seconds": float(file.meta["seconds"]),
    }
    if order is None:
        code = Status(int(status))
        best = Best(None, at_best, float(value), int(step))
        return Result(**common, best=best, status=code, message=_ended(code, all_done))
    failed = (status == Status.DIVERGED) | np.isnan(value)
    chosen = int(np.argmin(np.where(failed, np.inf, value)))
    own = jax.tree.map(lambda x: x[chosen], at_best)
    messages = tuple(_ended(Status(int(code)), all_done) for code in status)
    return Result(
        **common,
        best=Best(None, own, float(value[chosen]), int(step[chosen]), None, chosen),
        status=np.asarray(status, np.int32),
        message=f"{int((status == Status.RUNNING).sum())} of {len(status)} members had not ended.",
        members=Members(None, at_best, None, value, step, attempted, messages),
    )


def _ended(status: Status, all_done: bool) -> str:
    if status != Status.RUNNING:
        return f"It has ended: {status.name}."
    return "All outer steps were done." if all_done else "It had not ended."


def _record(file: File, shown: dict, hparams: PyTree, members: int | None) -> Record:
    names = ("rows", "seconds", "trail_steps", "trail")
    trees = {name: file.tree(name) for name in names}
    plan: Any = types.SimpleNamespace(
        columns=tuple(shown["columns"]),
        judged_columns=tuple(shown["judged"]),
        judge_every=shown["judge_every"],
    )
    skip = int(members is not None)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype), hparams)
    record = Record(plan, one, trees["rows"].dtype, trees["trail"][0].dtype, members)
    record.restore(trees)
    return record


def _tree(paths: list[list[str | int]], leaves: list[np.ndarray]) -> PyTree:
    """Leaves under their names, in dicts."""
    if paths == [[]]:
        return leaves[0]
    tree: dict = {}
    for path, leaf in zip(paths, leaves, strict=True):
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = leaf
    return tree


# --- Results ------------------------------------------------------------------------------------------------


def of_result(file: File) -> Result:
    """A result that was saved, whatever containers its trees have; of params only the shapes."""
    meta, own, tree = file.meta, file.meta.get("members"), file.tree
    members = None
    if own:
        every = tree("members")
        members = Members(
            params=None,
            hparams=tree("member_hparams"),
            model_state=None,
            value=every["value"],
            step=every["step"],
            attempted=every["attempted"],
            messages=tuple(own["messages"]),
            test=own["test"] and {pair: _lists(row) for pair, row in own["test"].items()},
        )
    return Result(
        params=tree("params", shapes=True),
        hparams=tree("hparams"),
        best=Best(
            params=tree("best_params", shapes=True),
            hparams=tree("best_hparams"),
            value=meta["best_value"],
            step=meta["best_step"],
            member=own and own["best"],
        ),
        history=tree("history"),
        trajectory=Trajectory(tree("trajectory_steps"), tree("trajectory"), tuple(meta["quantiles"])),
        status=np.array(meta["status"], np.int32) if own else Status[meta["status"]],
        message=meta["message"],
        seconds=meta["seconds"],
        test=meta["test"] and {pair: _lists(row) for pair, row in meta["test"].items()},
        members=members,
    )


def _lists(row: dict) -> dict:
    return {name: np.array(value) if isinstance(value, list) else value for name, value in row.items()}
