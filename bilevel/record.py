"""What the host knows of a run: its history, its trajectory, and the time it took."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from bilevel import loop
from bilevel.problem import PyTree
from bilevel.result import Trajectory

_TRAJECTORY_ROWS = 2000
_BOOLEAN = ("accepted", "negative_curvature")
_INTEGER = ("nonfinite", "solver_steps")


class Record:
    """The rows of all chunks so far.

    Args:
      plan: of the run.
      hparams: shapes of one member's hyperparameters.
      dtype: of a row; so is ``trail_dtype`` of a row of the trajectory.
      members: how many, None for a single run.
    """

    def __init__(self, plan: loop.Plan, hparams: PyTree, dtype, trail_dtype, members: int | None):
        self.plan, self.hparams, self.members = plan, hparams, members
        self.done, self._stride = 0, 0
        front = () if members is None else (members,)
        self._rows = [np.zeros((0, *front, len(plan.columns)), dtype)]
        self._seconds = [np.zeros(0)]
        nothing = np.zeros((0, *front, loop.trail_width(hparams)), trail_dtype)
        self._trail = [(np.zeros(0, np.int64), loop.unpack_trail(nothing, hparams))]

    def add(
        self, rows: np.ndarray, trail: np.ndarray, seconds: np.ndarray, active: np.ndarray | None
    ) -> None:
        """The outer steps of a chunk; ``active``: the members that took part."""
        if active is not None and self.members is not None and len(active) < self.members:
            rows = _spread(rows, active, self.members, loop.ended_row(self.plan, rows.dtype))
            trail = _spread(trail, active, self.members, np.array(np.nan, trail.dtype))
        steps = np.arange(self.done, self.done + len(rows))
        self._rows.append(rows.copy())
        self._seconds.append(seconds)
        self.done += len(rows)
        self._thin()
        due = steps % self._stride == 0
        if due.any():
            self._trail.append((steps[due], loop.unpack_trail(trail[due], self.hparams)))

    def _thin(self) -> None:
        """Keep at most so many rows of the trajectory; which, depends on nothing but the steps done."""
        stride = self.plan.judge_every if any(loop.quantile_leaves(self.hparams)) else 1
        while self.done > _TRAJECTORY_ROWS * stride:
            stride *= 2
        if stride != self._stride:
            self._stride = stride
            kept = [(steps, leaves, steps % stride == 0) for steps, leaves in self._trail]
            self._trail = [(steps[on], [leaf[on] for leaf in leaves]) for steps, leaves, on in kept]

    def history(self, first: int = 0) -> dict[str, np.ndarray]:
        """The rows from an outer step on, as columns of shape (steps, [members])."""
        rows = self._since(self._rows, first)
        steps = np.arange(first, self.done)
        history: dict[str, np.ndarray] = {"step": steps}
        due = (steps % self.plan.judge_every == 0).reshape(-1, *[1] * (rows.ndim - 2))
        for i, name in enumerate(self.plan.columns):
            column = rows[..., i]
            if name in _BOOLEAN:
                column = column.astype(bool)
            elif name in _INTEGER:
                column = column.astype(np.int32)
            elif name in self.plan.judged_columns:
                column = np.where(due, column, np.nan).astype(rows.dtype)
            history[name] = np.ascontiguousarray(column)
        history["seconds"] = self._since(self._seconds, first)
        return history

    def _since(self, pieces: list[np.ndarray], first: int) -> np.ndarray:
        """The last pieces, from an outer step on."""
        wanted, taken = self.done - first, []
        for piece in reversed(pieces):
            if wanted <= 0:
                break
            taken.append(piece[max(len(piece) - wanted, 0) :])
            wanted -= len(piece)
        return np.concatenate(taken[::-1] or [pieces[0][:0]])

    def trajectory(self, hparams: PyTree) -> Trajectory:
        """With the hyperparameters of the end."""
        front = () if self.members is None else (self.members,)
        dtype = self._trail[0][1][0].dtype
        end = loop.unpack_trail(loop.last_trail(hparams, front).astype(dtype), self.hparams)
        pieces = [*self._trail, (np.array([self.done]), end)]
        steps = np.concatenate([steps for steps, _ in pieces])
        leaves = [np.concatenate(parts) for parts in zip(*(p for _, p in pieces), strict=True)]
        tree = jax.tree.unflatten(jax.tree.structure(hparams), leaves)
        return Trajectory(steps, tree, loop.quantile_leaves(self.hparams))

    def trees(self) -> dict[str, Any]:
        """Everything, for a checkpoint; the pieces become one, so that the next time takes no longer."""
        trail_steps, leaves = zip(*self._trail, strict=True)
        self._rows, self._seconds = [np.concatenate(self._rows)], [np.concatenate(self._seconds)]
        trail = [np.concatenate(parts) for parts in zip(*leaves, strict=True)]
        self._trail = [(np.concatenate(trail_steps), trail)]
        return {
            "rows": self._rows[0],
            "seconds": self._seconds[0],
            "trail_steps": self._trail[0][0],
            "trail": trail,
        }

    def lowest(self) -> np.ndarray:
        """The lowest outer value of each member so far, inf before one."""
        history = self.history()
        values = history["judged" if "judged" in history else "value"]
        seen = np.where(history["accepted"] & ~np.isnan(values), values, np.inf)
        return seen.min(axis=0, initial=np.inf)

    def restore(self, trees: dict[str, Any]) -> None:
        """The inverse of `trees`."""
        self._rows.append(trees["rows"])
        self._seconds.append(trees["seconds"])
        self._trail.append((trees["trail_steps"], list(trees["trail"])))
        self.done = len(trees["rows"])


def _spread(rows: np.ndarray, active: np.ndarray, members: int, empty: np.ndarray) -> np.ndarray:
    """Rows of some members, (steps, active, ...), among all."""
    out = np.empty((len(rows), members, *rows.shape[2:]), rows.dtype)
    out[:] = empty
    out[:, active] = rows
    return out
