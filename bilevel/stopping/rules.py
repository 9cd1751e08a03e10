"""Where a prediction ends a run: eq. (2) of `bilevel.stopping` in a search, a population, an Optuna study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bilevel import validation
from bilevel.stopping.predictor import Predictor, columns_of, predictor


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a search with early stopping would have found: see `replay`.

    ``best``: lowest final value of a run that was finished, and ``index``, that run. ``steps``: how many each
    run took, shape (runs,); ``fraction``: of all steps of all runs.
    """

    best: float
    index: int
    steps: np.ndarray
    fraction: float


@dataclasses.dataclass(frozen=True)
class _When:
    """At which observed lengths a run is judged, and after how many finished ones."""

    finish: int
    after: int
    every: int
    threshold: float

    def __post_init__(self):
        validation.whole_number("finish", self.finish, 5)
        validation.whole_number("after", self.after, 1)
        validation.whole_number("every", self.every, 1)
        validation.number("threshold", self.threshold, positive=True, below=1.0)

    def due(self, steps: int) -> bool:
        return steps >= self.after and (steps - self.after) % self.every == 0


def replay(
    curves,
    extra: Mapping | None = None,
    *,
    finish: int = 20,
    after: int = 5,
    every: int = 5,
    threshold: float = 0.95,
    regressor: Any = None,
) -> Replay:
    """A search over runs whose whole curves are known, one after the other, with early stopping.

    It tells what a threshold costs and saves before it is relied on.

    Args:
      curves: finite, shape (runs, T), in the order of the search; lower is better.
      extra: as in `predictor`.
      finish: so many runs are finished before the first one is stopped.
      after: steps of a run before it is judged; ``every``: steps until it is judged again.
      every: see ``after``.
      threshold: a run is stopped where its chance to beat the best is at most 1 - threshold.
      regressor: as in `predictor`. Random forests are slow here: whenever a run is finished there are several
        fits for each length at which runs are judged.

    Raises:
      TypeError, ValueError: as `predictor`, curves that are not finite, numbers out of range.

    Example:
      >>> import bilevel, numpy as np
      >>> speed = np.random.default_rng(0).uniform(0.2, 1, 100)
      >>> curves = np.arange(1.0, 51.0) ** -speed[:, None]
      >>> search = bilevel.stopping.replay(curves)
      >>> bool(search.best == curves[:, -1].min()), search.fraction < 0.4
      (True, True)
    """
    when = _When(finish, after, every, threshold)
    curves = np.asarray(curves, np.float64)
    if curves.ndim != 2 or len(curves) < finish:
        raise ValueError(
            f"curves must have shape (runs, T), at least finish = {finish} runs; {curves.shape}."
        )
    if not np.isfinite(curves).all():
        raise ValueError("curves must be finite; leave out runs that are not.")
    total, columns = curves.shape[1], columns_of(extra, len(curves))
    done, steps, fitted = list(range(finish)), np.full(len(curves), total), None
    for i in range(finish, len(curves)):
        if fitted is None:
            fitted = predictor(curves[done], {k: v[done] for k, v in columns.items()}, regressor=regressor)
        own, best = {k: v[i] for k, v in columns.items()}, curves[done, -1].min()
        for t in filter(when.due, range(1, total)):
            if fitted.predict(curves[i, :t], own).stop(best, threshold)[0]:
                steps[i] = t
                break
        else:
            done, fitted = [*done, i], None
    index = done[int(np.argmin(curves[done, -1]))]
    return Replay(float(curves[index, -1]), index, steps, float(steps.sum() / curves.size))


@dataclasses.dataclass(eq=False)
class StopMembers:
    """See `stop_members`."""

    predictor: Predictor
    threshold: float
    after: int
    best: float | None
    column: str
    extra: Mapping | Callable | None
    whole = True  # rows: the history from step 0, also of a run gone on with

    def __call__(self, step: int, rows: dict[str, np.ndarray]) -> np.ndarray | None:
        curves, horizon = rows[self.column], self.predictor.curves.shape[1]
        if curves.ndim != 2:
            raise ValueError("stop_members is for a population; this is a single run.")
        if not self.after <= step < horizon:
            return None
        extra = self.extra
        if callable(extra):
            extra = extra(rows)
        found, best = self.predictor.predict(curves.T, extra), self.best
        if best is None:
            best = np.fmin.reduce([self.predictor.final.min(), *found.value])
        return found.stop(best, self.threshold)


def stop_members(
    finished: Predictor,
    *,
    threshold: float = 0.95,
    after: int = 10,
    best: float | None = None,
    column: str = "value",
    extra: Mapping | Callable | None = None,
) -> StopMembers:
    """A callback of `bilevel.optimize` that stops members of a population which will not beat the best.

    It decides every ``judge_every`` outer steps. Members that it stops keep their state and their best pair;
    the program goes on unchanged, and ends early where all have ended. (Frozen members still cost their share
    of a step: ``halve_every`` of `bilevel.population` makes the program smaller.)

    Args:
      finished: a `predictor` from runs of the same problem, with one value for each outer step, and of as
        many steps as the members are to take: ``history["value"].T`` of an earlier population.
      threshold: of eq. (2).
      after: outer steps before the first decision.
      best: the value to beat; default: the lowest final value of the finished runs, or the lowest that is
        predicted of any member, if that is lower.
      column: of the history, one value a step.
      extra: what ``finished`` was given, of the members, each of shape (members,); or a function of the
        history so far (columns of shape (steps, members)) that returns it.

    Raises:
      TypeError, ValueError: no predictor, numbers out of range.
    """
    if not isinstance(finished, Predictor):
        raise TypeError(f"finished must be a bilevel.stopping.predictor(...), got {finished!r:.80}.")
    threshold = validation.number("threshold", threshold, positive=True, below=1.0)
    after = validation.whole_number("after", after, 1)
    best = None if best is None else validation.number("best", best, minimum=-np.inf)
    return StopMembers(finished, threshold, after, best, column, extra)


def optuna_pruner(
    *, finish: int = 20, after: int = 5, every: int = 1, threshold: float = 0.95, regressor: Any = None
):
    """A pruner for ``optuna.create_study(pruner=...)`` by eq. (2).

    Finished trials are those that reported at all steps that this one has, finite values only; their final
    values are what they returned. Numeric parameters that all of them have are features, in logarithms where
    they are searched so.

    Args:
      finish: trials before the first one is pruned.
      after: reports of a trial before it is judged.
      every: reports until it is judged again.
      threshold: of eq. (2).
      regressor: as in `predictor`.

    Raises:
      ImportError: optuna is missing (``pip install 'bilevel[optuna]'``); TypeError, ValueError: numbers out
        of range.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("optuna_pruner needs optuna: pip install 'bilevel[optuna]'.") from error
    when = _When(finish, after, every, threshold)

    class PredictionPruner(optuna.pruners.BasePruner):
        """See `bilevel.stopping.optuna_pruner`."""

        def prune(self, study, trial) -> bool:
            """Whether the trial will hardly beat the best one."""
            states = (optuna.trial.TrialState.COMPLETE,)
            steps = sorted(trial.intermediate_values)
            if not when.due(len(steps)):
                return False
            done = [
                t
                for t in study.get_trials(deepcopy=False, states=states)
                if t.intermediate_values.keys() >= {*steps}
                and np.isfinite([t.value, *(t.intermediate_values[s] for s in steps)]).all()
            ]
            if len(done) < when.finish:
                return False
            sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
            every_one = [*done, trial]
            curves = sign * np.array([[t.intermediate_values[s] for s in steps] for t in every_one])
            extra, final = _numbers(every_one), sign * np.array([t.value for t in done])
            known = {name: column[:-1] for name, column in extra.items()}
            fitted = predictor(curves[:-1], known, final=final, regressor=regressor)
            own = {name: column[-1] for name, column in extra.items()}
            return bool(fitted.predict(curves[-1], own).stop(final.min(), when.threshold)[0])

    return PredictionPruner()


def _numbers(trials) -> dict[str, np.ndarray]:
    """Numeric parameters that all trials have."""
    columns = {}
    for name in sorted(set.intersection(*(set(t.params) for t in trials))):
        values = [t.params[name] for t in trials]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            logarithmic = getattr(trials[-1].distributions[name], "log", False)
            columns[name] = np.log(values) if logarithmic else np.asarray(values, np.float64)
    return columns
