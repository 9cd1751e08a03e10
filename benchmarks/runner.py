"""One job of a study: a problem, a method and a seed become a row."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping

import jax
import numpy as np

from benchmarks import found, machine
from benchmarks.found import Found, Method
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS, Task
from benchmarks.rows import FAILED, REFUSED, CurvePoint, Job, Machine, Row, StudyError

POINTS = 200


def run(
    job: Job, budget: float, command: str, methods: Mapping[str, Method] = METHODS, fresh: bool = True
) -> Row:
    """Run a job.

    Args:
      job: what to run.
      budget: seconds of the timed run.
      command: the command line, for the row.
      methods: where the job's method is found.
      fresh: whether compilations start from nothing, whatever this process has compiled before; False saves
        them where their time is of no interest.

    Where the method cannot tune the problem, or raises, the row says so: a run that is missing from a table
    is mistaken for one that was never asked for.
    """
    where = this_machine()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    began = time.perf_counter()
    try:
        if fresh:
            jax.clear_caches()
        result = _result(job, methods[job.method], budget)
    except (StudyError, MemoryError):
        raise  # not the method's fault
    except Exception as error:
        message = f"{type(error).__name__}: {str(error) or 'no message'}"
        result = _nothing(FAILED, message, time.perf_counter() - began)
    asked = {"seconds": budget, "commit": machine.commit(), "command": command}
    return Row(*job, **asked, machine=where, started=started, **result)


def _result(job: Job, method: Method, budget: float) -> dict:
    task = PROBLEMS[job.problem].make(job.seed)
    method.check()
    if reason := method.refusal(task):
        return _nothing(REFUSED, reason, 0.0)
    compile_seconds = method.warm_up(task)
    ended = method.run(task, budget, job.seed)
    solved, test, metrics = judged(task, ended.candidates)
    return {
        "compile_seconds": compile_seconds,
        "run_seconds": ended.seconds,
        "status": ended.status,
        "message": ended.message,
        "curve": thinned_curve(task, ended),
        "value": float(ended.curve[-1, -1]) if len(ended.curve) else float("nan"),
        "solved": solved,
        "test": test,
        "metrics": metrics,
        "optimum": task.optimum,
    }


def _nothing(status: str, message: str, seconds: float) -> dict:
    nan = float("nan")
    return {
        "compile_seconds": nan, "run_seconds": seconds, "status": status, "message": message, "curve": (),
        "value": nan, "solved": nan, "test": nan, "metrics": {}, "optimum": None,
    }  # fmt: skip


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
    ended = []
    for hparams in candidates:
        (value, _), (test, metrics) = trained(task, hparams)
        ended.append((float(value), float(test), {name: float(x) for name, x in metrics.items()}))
    return min(ended, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))


def trained(task: Task, hparams):
    """Outer value and metrics of an accurately trained model, on the validation and on the test arrays."""
    return jax.device_get(found.trained(task, hparams, task.valid, task.test)[1])


def thinned_curve(task: Task, ended: Found) -> tuple[CurvePoint, ...]:
    """At most 200 points, some of them with the value of accurate training at their hyperparameters."""
    curve = ended.curve
    if ended.later is None:
        solved, kept = curve[:, 3], thinned(len(curve), POINTS)
    else:
        solved = np.full(len(curve), np.nan)
        chosen = np.union1d(thinned(len(curve), ended.affordable - 1), ended.marked)
        solved[chosen] = [trained(task, hparams)[0][0] for hparams in ended.later(chosen)]
        kept = np.union1d(chosen, thinned(len(curve), POINTS - ended.affordable))
    return tuple(CurvePoint(*point) for point in np.column_stack([curve, solved])[kept].tolist())


def thinned(length: int, most: int) -> np.ndarray:
    """At most so many numbers below a length, evenly spaced in their logarithm, first and last included."""
    if length <= most:
        return np.arange(length)
    return np.unique(np.geomspace(1, length, most).round().astype(int)) - 1
