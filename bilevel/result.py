"""What a run returns: the last good state, the best pair, the history, and how it ended."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from bilevel import checkpoint
from bilevel.problem import HParams, Params, PyTree, Status


@dataclasses.dataclass(frozen=True)
class Best:
    """The pair with the lowest outer value, both as they were when it was measured.

    Where no pair is kept (``keep_best=False``, validation batches of an iterable) it is the last one, and
    ``value`` the one that was measured last, before the last outer update. A ``step`` equal to the number of
    steps done is the end of the run.
    """

    params: Params
    hparams: HParams
    value: float
    step: int
    model_state: PyTree = None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Hyperparameters over time, natural units.

    ``steps``: outer steps, shape (rows,); the last row is the end of the run. ``hparams``: a tree like
    hparams; a leaf has shape (rows, *leaf shape) where it is small, else (rows, 5): the quantiles
    0, 1/4, 1/2, 3/4 and 1 of its entries (of an evenly spaced sample where they are very many).
    ``quantiles``: for each leaf, whether that is so.
    """

    steps: np.ndarray
    hparams: PyTree
    quantiles: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The outcome of `bilevel.optimize`.

    Args:
      params: at the last good step; so are ``hparams`` (natural units) and ``model_state``.
      hparams: hyperparameters.
      best: the pair with the lowest outer value.
      history: numpy arrays by column name, one row per attempted outer step.
      trajectory: hyperparameters over time.
      status: how the run ended.
      message: why, in a sentence, with advice where it is needed.
      seconds: of the whole call, compilation included.
      test: outer and its metrics on the test split, for the "last" and the "best" pair; None without one.
      model_state: mutable model state.
      state: the method's state, to go on from with its ``step``; not saved. It shares its arrays with
        ``params``: donate a copy, not this one.
    """

    params: Params
    hparams: HParams
    best: Best
    history: dict[str, np.ndarray]
    trajectory: Trajectory
    status: Status
    message: str
    seconds: float
    test: dict[str, dict[str, float]] | None = None
    model_state: PyTree = None
    state: Any = None

    @property
    def counts(self) -> dict[str, float]:
        """Examples touched over the whole run, per kind of oracle."""
        return {name: float(self.history[name].sum()) for name in COUNT_COLUMNS}

    def __repr__(self) -> str:
        value = self.history["value"]
        last = f"{value[-1]:.6g}" if len(value) else "none"
        lines = [
            f"Result({self.status.name} after {len(value)} outer steps in {self.seconds:.1f} s",
            f"  value: last {last}, best {self.best.value:.6g} at step {self.best.step}",
            *(
                [f"  test: last {self.test['last']['value']:.6g}, best {self.test['best']['value']:.6g}"]
                if self.test
                else []
            ),
            f"  hparams: {_summary(self.hparams)}",
            f"  {self.message}",
        ]
        return "\n".join(lines) + ")"

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but ``state`` into one file; read it with `bilevel.load`."""
        trees = {
            "params": self.params,
            "hparams": self.hparams,
            "best_params": self.best.params,
            "best_hparams": self.best.hparams,
            "history": self.history,
            "trajectory_steps": self.trajectory.steps,
            "trajectory": self.trajectory.hparams,
            "model_state": self.model_state,
            "best_model_state": self.best.model_state,
        }
        meta = {
            "kind": "result",
            "status": self.status.name,
            "message": self.message,
            "seconds": self.seconds,
            "best_value": self.best.value,
            "best_step": self.best.step,
            "quantiles": list(self.trajectory.quantiles),
            "test": self.test,
        }
        checkpoint.write(path, trees, meta)

    def plot(self):
        """Outer value, gradient norm and hyperparameters over the outer steps; a matplotlib Figure.

        Raises:
          ImportError: matplotlib is missing (``pip install 'bilevel[plots]'``).
        """
        from bilevel.plots import plot_result

        return plot_result(self)


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
            "params": params,
            "best_params": params,
            "hparams": hparams,
            "best_hparams": hparams,
            "trajectory": hparams,
        }
    trees, meta = checkpoint.read(path, like)
    if meta.get("kind", "result") != "result":
        raise ValueError(f"path: {path} holds a {meta['kind']}, not a result.")
    missing = (_TREES - set(trees)) | (_META - set(meta))
    if missing:
        lost = ", ".join(sorted(missing))
        raise ValueError(f"path: {path} is not a file that bilevel wrote, or it is damaged (no {lost}).")
    return Result(
        params=trees["params"],
        hparams=trees["hparams"],
        best=Best(
            params=trees["best_params"],
            hparams=trees["best_hparams"],
            value=meta["best_value"],
            step=meta["best_step"],
            model_state=trees["best_model_state"],
        ),
        history=trees["history"],
        trajectory=Trajectory(trees["trajectory_steps"], trees["trajectory"], tuple(meta["quantiles"])),
        status=Status[meta["status"]],
        message=meta["message"],
        seconds=meta["seconds"],
        test=meta["test"],
        model_state=trees["model_state"],
    )


_TREES = {
    "params", "hparams", "best_params", "best_hparams", "history", "trajectory_steps", "trajectory",
    "model_state", "best_model_state",
}  # fmt: skip
_META = {"status", "message", "seconds", "best_value", "best_step", "quantiles", "test"}


def _pair(like) -> tuple[Params, HParams]:
    if isinstance(like, Result):
        return like.params, like.hparams
    if isinstance(like, (tuple, list)) and len(like) == 2:
        return like[0], like[1]
    raise TypeError(f"like must be a Result or a pair (params, hparams), got {like!r:.80}.")


COUNT_COLUMNS = ("inner_grad", "outer_grad", "hvp", "cross")


def _summary(hparams) -> str:
    parts = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(hparams)[0]:
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path) or "value"
        if array.ndim == 0:
            parts.append(f"{name} = {array:.4g}")
        else:
            parts.append(f"{name}{list(array.shape)} from {array.min():.4g} to {array.max():.4g}")
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")
