"""Results on disk; see `bilevel.archive` for the format."""

from __future__ import annotations

import os

import numpy as np

from bilevel import archive, hosts
from bilevel.problem import HParams, Params, Status
from bilevel.result import Best, Members, Result, Trajectory

_TREES = {
    "params", "hparams", "best_params", "best_hparams", "history", "trajectory_steps", "trajectory",
    "model_state", "best_model_state",
}  # fmt: skip
_META = {"status", "message", "seconds", "best_value", "best_step", "quantiles", "test"}


def save(result: Result, path: str | os.PathLike) -> None:
    """Write a result; of several processes that hold parts of its arrays, the first one writes."""
    trees = {
        "params": result.params,
        "hparams": result.hparams,
        "best_params": result.best.params,
        "best_hparams": result.best.hparams,
        "history": result.history,
        "trajectory_steps": result.trajectory.steps,
        "trajectory": result.trajectory.hparams,
        "model_state": result.model_state,
        "best_model_state": result.best.model_state,
    }
    members = result.members
    meta = {
        "kind": "result",
        "status": result.status.name if members is None else np.asarray(result.status).tolist(),
        "message": result.message,
        "seconds": result.seconds,
        "best_value": result.best.value,
        "best_step": result.best.step,
        "quantiles": list(result.trajectory.quantiles),
        "test": _listed(result.test),
    }
    if members is not None:
        trees["member_params"] = members.params
        trees["member_hparams"] = members.hparams
        trees["member_model_state"] = members.model_state
        trees["members"] = {
            "value": members.value,
            "step": members.step,
            "attempted": members.attempted,
        }
        meta["members"] = {
            "best": result.best.member,
            "messages": members.messages,
            "test": _listed(members.test),
        }
    shared = hosts.shared(trees)
    trees = hosts.fetch(trees)
    if hosts.first() or not shared:
        archive.write(path, trees, meta)


def load(path: str | os.PathLike, like=None) -> Result:
    """Read a result that `Result.save` wrote; its arrays are numpy arrays.

    Args:
      path: of the file.
      like: a `Result`, or a pair ``(params, hparams)``, of the same structure, where params or hparams
        hold containers other than dicts, lists, tuples and None.

    Raises:
      ValueError: no such file, not a result, damaged, or of another structure.
    """
    if like is not None:
        params, hparams = _pair(like)
        like = {
            **dict.fromkeys(("params", "best_params", "member_params"), params),
            **dict.fromkeys(("hparams", "best_hparams", "trajectory", "member_hparams"), hparams),
        }
    trees, meta = archive.read(path, like)
    if meta.get("kind", "result") != "result":
        raise ValueError(f"path: {path} holds a {meta['kind']}, not a result.")
    missing = (_TREES - set(trees)) | (_META - set(meta))
    if missing:
        lost = ", ".join(sorted(missing))
        raise ValueError(f"path: {path} is not a file that bilevel wrote, or it is damaged (no {lost}).")
    return assembled(trees, meta)


def assembled(trees: dict, meta: dict) -> Result:
    """The result of the trees and the metadata of a file."""
    own = meta.get("members")
    return Result(
        params=trees["params"],
        hparams=trees["hparams"],
        best=Best(
            params=trees["best_params"],
            hparams=trees["best_hparams"],
            value=meta["best_value"],
            step=meta["best_step"],
            model_state=trees["best_model_state"],
            member=own and own["best"],
        ),
        history=trees["history"],
        trajectory=Trajectory(trees["trajectory_steps"], trees["trajectory"], tuple(meta["quantiles"])),
        status=np.array(meta["status"], np.int32) if own else Status[meta["status"]],
        message=meta["message"],
        seconds=meta["seconds"],
        test=_arrays(meta["test"]),
        model_state=trees["model_state"],
        members=own and _members(trees, own),
    )


def _members(trees: dict, own: dict) -> Members:
    every = trees["members"]
    return Members(
        params=trees["member_params"],
        hparams=trees["member_hparams"],
        model_state=trees["member_model_state"],
        value=every["value"],
        step=every["step"],
        attempted=every["attempted"],
        messages=tuple(own["messages"]),
        test=_arrays(own["test"]),
    )


def _listed(test):
    """A table of test values for JSON."""
    return test and {pair: {k: np.asarray(v).tolist() for k, v in row.items()} for pair, row in test.items()}


def _arrays(test):
    def number(value):
        return np.array(value) if isinstance(value, list) else value

    return test and {pair: {k: number(v) for k, v in row.items()} for pair, row in test.items()}


def _pair(like) -> tuple[Params, HParams]:
    if isinstance(like, Result):
        return like.params, like.hparams
    if isinstance(like, (tuple, list)) and len(like) == 2:
        return like[0], like[1]
    raise TypeError(f"like must be a Result or a pair (params, hparams), got {like!r:.80}.")
