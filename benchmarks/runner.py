"""One job of a study: a problem, an arm and a seed become a row."""

from __future__ import annotations

import datetime
import platform

import jax
import numpy as np

from benchmarks import machine
from benchmarks.arms import ARMS, Found, solve
from benchmarks.problems import PROBLEMS, Task
from benchmarks.rows import CurvePoint, Job, Machine, Row

POINTS = 200


def run(job: Job, budget: float, command: str) -> Row:
    """Run a job; its compilations start from nothing, whatever this process has compiled before."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    where = this_machine()
    jax.clear_caches()
    task, arm = PROBLEMS[job.problem](job.seed), ARMS[job.arm]
    arm.check()
    compile_seconds = arm.warm_up(task)
    found = arm.run(task, budget, job.seed)
    solved, test, metrics = judged(task, found.candidates)
    return Row(
        *job,
        seconds=budget,
        commit=machine.commit(),
        command=command,
        machine=where,
        started=started,
        compile_seconds=compile_seconds,
        run_seconds=found.seconds,
        status=found.status,
        message=found.message,
        curve=thinned_curve(task, found),
        value=float(found.curve[-1, -1]) if len(found.curve) else float("nan"),
        solved=solved,
        test=test,
        metrics=metrics,
        optimum=task.optimum,
    )


def this_machine() -> Machine:
    """What the row says of the machine, now."""
    return Machine(
        python=platform.python_version(),
        jax=jax.__version__,
        backend=jax.default_backend(),
        cores=machine.cores(),
        processor=machine.processor(),
        load=machine.load(),
    )


def judged(task: Task, candidates) -> tuple[float, float, dict[str, float]]:
    """The lowest outer value after accurate training at each; test loss and metrics of that model."""
    found = []
    for hparams in candidates:
        (value, _), (test, metrics) = trained(task, hparams)
        found.append((float(value), float(test), {name: float(x) for name, x in metrics.items()}))
    return min(found, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))


def trained(task: Task, hparams):
    """Outer value and metrics of an accurately trained model, on the validation and on the test arrays."""
    arrays = task.train, task.valid, task.test
    return jax.device_get(solve(task.problem, task.solver, task.params, hparams, *arrays)[1])


def thinned_curve(task: Task, found: Found) -> tuple[CurvePoint, ...]:
    """At most 200 points, some of them with the value of accurate training at their hyperparameters."""
    curve = found.curve
    if found.later is None:
        solved, kept = curve[:, 3], thinned(len(curve), POINTS)
    else:
        solved = np.full(len(curve), np.nan)
        chosen = np.union1d(thinned(len(curve), found.affordable - 1), found.marked)
        solved[chosen] = [trained(task, hparams)[0][0] for hparams in found.later(chosen)]
        kept = np.union1d(chosen, thinned(len(curve), POINTS - found.affordable))
    return tuple(CurvePoint(*point) for point in np.column_stack([curve, solved])[kept].tolist())


def thinned(length: int, most: int) -> np.ndarray:
    """At most so many numbers below a length, evenly spaced in their logarithm, first and last included."""
    if length <= most:
        return np.arange(length)
    return np.unique(np.geomspace(1, length, most).round().astype(int)) - 1
