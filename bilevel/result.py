"""What a run returns: the last good state, the best pair, the history, and how it ended."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bilevel.populations import member_of
from bilevel.problem import HParams, Params, PyTree, Status
from bilevel.schedules import Schedule, schedule_of


@dataclasses.dataclass(frozen=True)
class Best:
    """The pair with the lowest outer value, both as they were when it was measured.

    Where no pair is kept (``keep_best=False``, validation batches of an iterable) it is the last one, and
    ``value`` the one that was measured last, before the last outer update. A ``step`` equal to the number of
    steps done is the end of the run. Of a population it is that of the best ``member`` among those that have
    not failed.
    """

    params: Params
    hparams: HParams
    value: float
    step: int
    model_state: PyTree = None
    member: int | None = None


@dataclasses.dataclass(frozen=True)
class Members:
    """What a population's result knows of each of its n members.

    ``params``, ``hparams`` and ``model_state``: their best pairs, every array with an axis of members in
    front; ``value`` and ``step``: where these were taken, shape (n,). ``attempted``: outer steps until each
    ended, ``messages``: why. ``test``: as in `Result`, each number an array of shape (n,).
    """

    params: Params
    hparams: HParams
    model_state: PyTree
    value: np.ndarray
    step: np.ndarray
    attempted: np.ndarray
    messages: tuple[str, ...]
    test: dict[str, dict[str, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Hyperparameters over time, natural units.

    ``steps``: outer steps, shape (rows,); the last row is the end of the run. ``hparams``: a tree like
    hparams; a leaf has shape (rows, *leaf shape) where it is small, else (rows, 5): the quantiles
    0, 1/4, 1/2, 3/4 and 1 of its entries (of an evenly spaced sample where they are very many). In a
    population the axis of members follows that of rows. ``quantiles``: for each leaf, whether that is so.
    """

    steps: np.ndarray
    hparams: PyTree
    quantiles: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The outcome of `bilevel.optimize`.

    Of a population of n members params, hparams, model_state and state have an axis of members in front, the
    columns of ``history`` shape (steps, n), ``status`` is an array of `Status` codes of shape (n,), and
    `member` gives each one's own result.

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
    status: Any
    message: str
    seconds: float
    test: dict[str, dict[str, Any]] | None = None
    model_state: PyTree = None
    state: Any = None
    members: Members | None = None

    def member(self, i: int) -> Result:
        """The result of one member of a population, as if it had run alone.

        Raises:
          ValueError: no population; IndexError: no such member.
        """
        if self.members is None:
            raise ValueError("member(i) needs a population; this result is of a single run.")
        n = len(self.members.messages)
        if not -n <= i < n:
            raise IndexError(f"member must be from 0 to {n - 1}, got {i}.")
        i, rows = i % n, int(self.members.attempted[i])
        own = functools.partial(member_of, i=i)
        steps = self.trajectory.steps
        until = np.append(np.flatnonzero(steps < rows), -1)  # the last row is the end of all members
        every = self.members
        value, step = float(every.value[i]), int(every.step[i])
        return Result(
            params=own(self.params),
            hparams=own(self.hparams),
            best=Best(own(every.params), own(every.hparams), value, step, own(every.model_state)),
            history={
                name: column[:rows, i] if column.ndim > 1 else column[:rows]
                for name, column in self.history.items()
            },
            trajectory=Trajectory(
                np.append(steps[until[:-1]], rows),
                jax.tree.map(lambda x: x[until, i], self.trajectory.hparams),
                self.trajectory.quantiles,
            ),
            status=Status(int(np.asarray(self.status)[i])),
            message=self.members.messages[i],
            seconds=self.seconds,
            test=_member_test(self.members.test, i),
            model_state=own(self.model_state),
            state=own(self.state),
        )

    @property
    def counts(self) -> dict[str, float]:
        """Examples touched over the whole run, per kind of oracle."""
        return {name: float(self.history[name].sum()) for name in COUNT_COLUMNS}

    def __repr__(self) -> str:
        if self.members is not None:
            return self._repr_population(len(self.members.messages))
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

    def _repr_population(self, n: int) -> str:
        lines = [
            f"Result(population of {n} after {len(self.history['step'])} outer steps in {self.seconds:.1f} s",
            f"  value: best {self.best.value:.6g} at step {self.best.step} of member {self.best.member}",
            f"  hparams: {_summary(self.best.hparams)}",
            f"  {self.message}",
        ]
        return "\n".join(lines) + ")"

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but ``state`` into one file; read it with `bilevel.load`.

        Where arrays are spread over several processes, each of them calls it and the first one writes.
        """
        from bilevel import result_file

        result_file.save(self, path)

    def schedule(self, name: Any = None, inner_steps: float = 1) -> Schedule:
        """The path of one hyperparameter over the run, to be followed by another training run.

        Args:
          name: of the leaf, ``"dropout"``, or ``("decoder", "dropout")`` for one further down; may be left
            out where there is only one.
          inner_steps: training steps that went with an outer step: those of `bilevel.alternating`, or
            ``train_steps / valid_steps`` of `bilevel.stn`. The schedule counts training steps.

        Returns:
          A `Schedule`: a traceable function of the training step, with its arrays. A `Result` that was saved
          and loaded has it too.

        Raises:
          KeyError: no such hyperparameter; ValueError: of a population (take ``result.member(i)``), or of a
            leaf with so many entries that only quantiles were kept.
        """
        if self.members is not None:
            raise ValueError("schedule is that of a single run; take result.member(i).schedule(...).")
        return schedule_of(self.trajectory, name, inner_steps)

    def plot(self):
        """Outer value, gradient norm and hyperparameters; a matplotlib Figure of at most twelve panels.

        Numbers and short vectors are lines over the outer steps, long vectors bands of quantiles with a
        histogram, matrices and filters pictures. Of a population the best member is drawn thick.

        Raises:
          ImportError: matplotlib is missing (``pip install 'bilevel[plots]'``).
        """
        from bilevel.plots import plot_result

        return plot_result(self)

    def report(
        self,
        path: str | os.PathLike,
        title: str = "bilevel run",
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one HTML page that holds everything it shows: how the run ended, numbers, pictures, tables.

        Args:
          path: of the file; its folder must exist.
          title: of the page.
          notes: rows added to the summary, such as ``{"method": method}``: a result does not know what
            the run was told.

        Raises:
          ImportError: matplotlib is missing (``pip install 'bilevel[plots]'``); ValueError: no such folder,
            or the path is one.
        """
        from bilevel import result_report

        result_report.write(self, path, title, notes)


COUNT_COLUMNS = ("inner_grad", "outer_grad", "hvp", "cross")


def _member_test(test, i: int) -> dict[str, dict[str, float]] | None:
    if test is None:
        return None
    return {pair: {name: float(v[i]) for name, v in values.items()} for pair, values in test.items()}


def _summary(hparams) -> str:
    parts = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(hparams)[0]:
        name = jax.tree_util.keystr(path) or "value"
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            parts.append(f"{name}{list(leaf.shape)} over several processes")
            continue
        array = np.asarray(leaf)
        if array.ndim == 0:
            parts.append(f"{name} = {array:.4g}")
        else:
            parts.append(f"{name}{list(array.shape)} from {array.min():.4g} to {array.max():.4g}")
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")
