"""Files of runs as they lie on disk, read without the code of their problem and without a device.

A checkpoint holds the state as bare leaves. What it says besides (`described`) is enough for the history, the
hyperparameters and the best pair; params stay where they are. Nothing here writes, locks, or starts a JAX
backend, which on an accelerator would take memory from the run that is looked at.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bilevel import loop, result_file
from bilevel.archive import File, decoded
from bilevel.problem import PyTree, Status
from bilevel.record import Record
from bilevel.result import Best, Members, Result


def _tree_of(file: File, name: str, shapes: bool = False) -> PyTree:
    """One tree, or its shapes; a container that only its maker knows is a list of its leaves."""
    return decoded(_bare(file.layouts[name]), file.shape if shapes else file.leaf, None, name)


def _bare(layout: Any) -> Any:
    if not isinstance(layout, dict):
        return layout
    if layout["is"] == "other":
        return {"is": "list", "of": layout["leaves"]}
    of = layout["of"]
    if isinstance(of, dict):
        return {**layout, "of": {name: _bare(child) for name, child in of.items()}}
    return {**layout, "of": [_bare(child) for child in of]}


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
    parts, population = _tree_of(file, "members", shapes=True), shown["population"]
    layout = [part["of"] for part in file.layouts["members"]["of"]]
    order = np.argsort(np.concatenate(_tree_of(file, "places")), kind="stable") if population else None
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
    trees = {name: _tree_of(file, name) for name in names}
    # Dicts have their leaves sorted by name, which those of the run need not be.
    places = jax.tree.leaves(_tree(shown["hparams"], list(range(len(shown["hparams"])))))
    trees["trail"] = [trees["trail"][i] for i in places]
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


def _tree(paths: list[list[str | int]], leaves: Sequence[Any]) -> PyTree:
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
    """A result that was saved, whatever containers its trees have; of params and model state the shapes.

    Raises:
      KeyError: the file lacks something.
    """
    large = [name for name in file.layouts if "params" in name.split("_") or "model_state" in name]
    trees = {name: _tree_of(file, name, name in large) for name in file.layouts}
    return result_file.assembled(trees, file.meta)
