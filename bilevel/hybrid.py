"""Hybrid search: Optuna proposes what has no gradient, a hypergradient run tunes the rest inside each trial.

A trial builds the arguments of `bilevel.optimize` from what it asks for (numbers of layers, kinds of
optimisers, conditional choices), the run tunes the continuous hyperparameters, and its best outer value is
the trial's. What the run's history says on the way feeds the study's pruner. Several processes may share a
study: its storage is a journal file, or a database by its URL.

Optuna is optional: ``pip install 'bilevel[optuna]'``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.optimize import optimize
from bilevel.problem import Status
from bilevel.result import Result
from bilevel.run import STOP, STOPPED

# Numbers of a leaf that a trial remembers.
_REMEMBERED = 100


def optuna_study(storage: str | os.PathLike | None, name: str = "bilevel", *, sampler=None, pruner=None):
    """An Optuna study that minimises, and that any number of processes may share.

    Args:
      storage: the path of a journal file, which is made, or gone on with where it is there; a database by its
        URL, such as "sqlite:///study.db"; None for a study in memory.
      name: of the study in its storage.
      sampler: of Optuna; its own default.
      pruner: of Optuna, or `bilevel.stopping.optuna_pruner`; its own default.

    Raises:
      ImportError: optuna is missing; ValueError: the folder of a journal file is not there.
    """
    optuna = _optuna("optuna_study")
    backend: Any = storage
    if storage is not None and "://" not in str(storage):
        path = Path(storage)
        if not path.parent.is_dir():
            raise ValueError(f"storage: the folder {str(path.parent)!r} of the journal file is not there.")
        from optuna.storages.journal import JournalFileBackend

        backend = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(
        storage=backend, study_name=name, sampler=sampler, pruner=pruner, load_if_exists=True
    )


@dataclasses.dataclass
class Objective:
    """See `optuna_objective`. ``best`` is the `bilevel.Result` of the best trial of this process."""

    build: Callable[[Any], Mapping[str, Any]]
    settings: dict[str, Any]
    best: Result | None = None
    best_trial: int | None = None

    def __call__(self, trial) -> float:
        """Run a trial; its value is the lowest outer value of the run.

        Raises:
          optuna.TrialPruned: the study's pruner says so, or the run diverged before anything was good.
          TypeError: ``build`` returned no dict.
          ValueError: values that are nan at the start; ``study.optimize(..., catch=ValueError)`` goes on. A
            population; a study that maximises, or has several objectives.
        """
        optuna = _optuna("optuna_objective")
        study = getattr(trial, "study", None)  # a fixed trial has none
        if study is not None and study.directions != [optuna.study.StudyDirection.MINIMIZE]:
            raise ValueError("the study must minimise: a trial's value is the lowest outer value of its run.")
        arguments = self.build(trial)
        if not isinstance(arguments, Mapping):
            raise TypeError(
                "build(trial) must return a dict of arguments for bilevel.optimize, such as {'problem': ..., "
                f"'params': ..., 'hparams': ..., 'train': ..., 'valid': ...}}, got {arguments!r:.200}."
            )
        told = _Told(trial)
        callbacks = (*_several(arguments.get("callbacks", ())), *_several(self.settings.get("callbacks", ())))
        given = {**self.settings, **arguments, "callbacks": (*callbacks, told)}
        if given.get("population") is not None:
            raise ValueError("a trial is one run: leave out population, or make a study of its own of it.")
        result = optimize(**given)
        value = float(result.best.value)
        trial.set_user_attr("hparams", json.dumps(_remembered(result.best.hparams)))
        trial.set_user_attr("status", result.status.name)
        if told.pruned:
            raise optuna.TrialPruned(f"pruned at outer step {len(result.history['step'])}")
        if not math.isfinite(value):
            raise optuna.TrialPruned(result.message)
        if result.status == Status.INTERRUPTED and result.message != STOPPED:
            # By a person: the trial counts, and is the last.
            with contextlib.suppress(RuntimeError):  # by ask and tell there is nothing to stop
                trial.study.stop()
        if self.best is None or value < float(self.best.best.value):
            self.best, self.best_trial = result, trial.number
        return value


def optuna_objective(build: Callable[[Any], Mapping[str, Any]], **settings) -> Objective:
    """An objective for ``study.optimize``: each trial is a hypergradient run.

    Build problem and method outside of ``build`` where the trial does not decide about them: equal programs
    are then compiled once for all trials.

    Args:
      build: ``(trial) -> dict``: arguments of `bilevel.optimize` by name, made of what the trial suggests.
      settings: arguments of `bilevel.optimize` that are the same for all trials; those of ``build`` win.
        ``progress`` is off where it is not given.

    Returns:
      A function of a trial. It reports the best value so far every ``judge_every`` outer steps, stops the run
      where the pruner says so, and stores the hyperparameters that were found (leaves of up to 100 numbers)
      as JSON in the trial's attribute "hparams". Its ``best`` is the result of the best trial of this
      process, its ``best_trial`` that trial's number.

    Raises:
      ImportError: optuna is missing; TypeError: ``build`` is no function.

    Example:
      >>> import bilevel, jax.numpy as jnp, optuna
      >>> x = jnp.array([0.5, 1.0, 2.0, 3.0])
      >>> def valid_loss(w, h, x):
      ...     return jnp.mean((w * x ** h["power"] - x**2) ** 2)
      >>> problem = bilevel.Problem(
      ...     lambda w, h, x: valid_loss(w, h, x) + h["l2"] * w**2,
      ...     valid_loss,
      ...     constraints={"l2": bilevel.positive(), "power": bilevel.fixed()},
      ... )
      >>> def build(trial):
      ...     return {"hparams": {"l2": 1.0, "power": float(trial.suggest_int("power", 1, 3))}}
      >>> objective = bilevel.optuna_objective(
      ...     build, problem=problem, params=jnp.array(0.0), train=x[1:], valid=x, steps=20
      ... )
      >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
      >>> study = bilevel.optuna_study(None, sampler=optuna.samplers.GridSampler({"power": [1, 2, 3]}))
      >>> study.optimize(objective, n_trials=3)
      >>> study.best_params
      {'power': 2}
    """
    _optuna("optuna_objective")
    if not callable(build):
        raise TypeError(f"build must be a function (trial) -> dict, got {build!r:.80}.")
    return Objective(build, {"progress": False, **settings})


class _Told:
    """A callback that reports to a trial."""

    def __init__(self, trial):
        self.trial, self.best, self.pruned = trial, math.inf, False

    def __call__(self, step: int, rows):
        values = rows["judged"] if "judged" in rows else np.where(rows["accepted"], rows["value"], np.nan)
        self.best = float(np.fmin(self.best, np.nanmin(np.append(values, self.best))))
        if not math.isfinite(self.best):
            return None
        self.trial.report(self.best, step)
        self.pruned = bool(self.trial.should_prune())
        return STOP if self.pruned else None


def _several(callbacks) -> tuple:
    return (callbacks,) if callable(callbacks) else tuple(callbacks)


def _remembered(hparams) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(hparams)[0]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tolist()
        for path, leaf in leaves
        if np.size(leaf) <= _REMEMBERED
    }


def _optuna(what: str):
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"{what} needs optuna: pip install 'bilevel[optuna]'.") from error
    return optuna
