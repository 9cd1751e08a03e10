"""Self-tuning networks against searches, and against what they found, on the tasks of `problems.regularised`.

The claims are those of MacKay et al. (2019, arXiv:1903.03088) and of Bae and Grosse (2020, arXiv:2010.13514):

- STN beats grid search, random search and Optuna at equal time;
- the schedule it finds, followed by a fresh training run, beats its own final value held fixed;
- schedules from other starting values come to the same one;
- Delta-STN is at least as accurate, faster and more stable.

Everyone gets the same data, network, first params and inner optimiser, Adam at one of three learning rates:
STN, Delta-STN and plain training each take the one with the lowest validation loss on the first seed, in a
quarter of the time; Delta-STN then takes the rate of the plain steps that fit its response in the same way.
Searches train for as many steps as plain training does in the time, divided by ``TRIALS``, one proposal
after the other, and look in the lower half of each range, where a person would; the grid has one share for
all dropouts and one for all other strengths. "start", "final" and "replay" are single plain runs with as
many training steps as STN took: at the first hyperparameters, at the last ones of STN, along its schedule.
Every run is judged where its validation loss was lowest. Seconds are CPU seconds of training, without
compilation and judging: pinned to one core, they are those of an idle machine, whatever else it does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import self_tuning_report
from benchmarks.problems import regularised
from benchmarks.rows import save_lines
from benchmarks.search import check_optuna
from bilevel.constraints import Integer, Interval, bind

OUT = Path(__file__).parent / "results" / "self_tuning"
SEEDS = (0, 1, 2)
TRIALS = 5  # of a search in its time
CHUNK = 40  # training steps between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms are given on a task.

    Args:
      learning_rates: of Adam on params, to choose from.
      seconds: of each arm.
      rates: names of the dropouts; other hyperparameters are strengths.
      fits: learning rates of the plain steps that Delta-STN fits its response by, to choose from.
    """

    learning_rates: tuple[float, ...]
    seconds: float
    rates: tuple[str, ...]
    fits: tuple[float, ...]


SETTINGS = {
    "language": Setting((3e-3, 1e-2, 3e-2), 50.0, regularised.RATES, (0.3, 1.0, 3.0)),
    "gated": Setting((1e-3, 3e-3, 1e-2), 5.0, (), (0.005, 0.02)),
    "digits": Setting((1e-3, 3e-3, 1e-2), 30.0, ("input", "first", "second", "hidden"), (0.02, 0.05, 0.15)),
}
PLAIN = "plain"
OUTER = optax.adam(2e-2)
TRAIN_STEPS, WARMUP, ENTROPY = 2, 50, 1e-3
COMMON: dict[str, Any] = {"train_steps": TRAIN_STEPS, "warmup": WARMUP, "entropy": ENTROPY}
METHODS: dict[str, Callable] = {
    "stn": lambda inner, fit: bilevel.stn(inner, OUTER, **COMMON),
    "delta_stn": lambda inner, fit: bilevel.delta_stn(inner, OUTER, fit=optax.sgd(fit), **COMMON),
}


@functools.cache
def adam(learning_rate: float):
    """One and the same for each rate, so that programs are compiled once."""
    return optax.adam(learning_rate)


class Point(NamedTuple):
    """A look at a run: seconds of training, training steps, losses, accuracy (nan where there is none)."""

    seconds: float
    steps: int
    valid: float
    test: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of an arm.

    Args:
      task: its name; ``arm`` and ``seed`` likewise.
      start: the hyperparameter that begins elsewhere and its value there, or None.
      points: over time.
      hparams: those of the point with the lowest validation loss.
      path: hyperparameters at each point, of methods and replays.
    """

    task: str
    arm: str
    seed: int
    start: tuple[str, float] | None
    points: list[Point]
    hparams: dict[str, float]
    path: dict[str, list[float]]

    @property
    def best(self) -> Point:
        """Where the validation loss was lowest."""
        return min(self.points, key=lambda point: (not np.isfinite(point.valid), point.valid))


# --- Judging ----------------------------------------------------------------------------------------------


@functools.cache
def _judge(problem):
    """Validation loss, test loss and test accuracy."""

    def value(out):
        return out if isinstance(out, tuple) else (out, {"accuracy": jnp.float32(jnp.nan)})

    @jax.jit
    def judge(params, hparams, valid, test):
        seen = value(problem.outer(params, hparams, valid))
        unseen = value(problem.outer(params, hparams, test))
        return seen[0], unseen[0], unseen[1]["accuracy"]

    return judge


def look(task, params, hparams, seconds: float, steps: int) -> Point:
    """A point of a curve."""
    out = _judge(task.problem)(params, hparams, task.valid.arrays, task.test)
    return Point(seconds, steps, *map(float, out))


# --- Methods ----------------------------------------------------------------------------------------------


@functools.cache
def made(arm: str, learning_rate: float, fit: float):
    """A method; one and the same for each rate."""
    return METHODS[arm](adam(learning_rate), fit)


@functools.cache
def _chunk(problem, method, steps: int):
    def chunk(state, train, valid):
        return jax.lax.fori_loop(0, steps, lambda _, s: method.step(problem, s, train, valid)[0], state)

    return jax.jit(chunk)


def tuned(task, method, seconds: float, seed: int):
    """Points, and hyperparameters at each; until the time is over."""
    args = task.params, jax.tree.map(jnp.float32, task.hparams), task.train, task.valid
    state = method.init(task.problem, *args, key=jax.random.key(seed))
    advance = _chunk(task.problem, method, CHUNK // TRAIN_STEPS)
    advance(state, task.train, task.valid)  # compilation
    spent, steps = 0.0, 0
    points, path = [look(task, state.params, state.hparams, 0.0, 0)], [state.hparams]
    while spent < seconds:
        began = time.process_time()
        state = jax.block_until_ready(advance(state, task.train, task.valid))
        spent, steps = spent + time.process_time() - began, steps + CHUNK
        points.append(look(task, state.params, state.hparams, spent, steps))
        path.append(state.hparams)
    return points, jax.tree.map(lambda *xs: [float(x) for x in xs], *path)


# --- Plain training ---------------------------------------------------------------------------------------


@functools.cache
def _trained(problem, inner):
    """Some steps along a path of hyperparameters, an entry for each of them."""

    def chunk(params, state, key, position, train, path):
        def step(j, at):
            params, state = at
            hparams = jax.tree.map(lambda x: x[j], path)
            batch = train.batch(key, position + j)
            grads = jax.grad(problem.inner)(params, hparams, batch)
            updates, state = inner.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, CHUNK, step, (params, state))

    return jax.jit(chunk)


def plain(task, inner, path: Callable[[np.ndarray], dict], steps: int, seed: int) -> Iterator[Point]:
    """Points of a run along hyperparameters, a function of training steps; seconds since its start."""
    advance = _trained(task.problem, inner)
    params, state, key = task.params, inner.init(task.params), jax.random.key(1000 + seed)
    spent = 0.0
    for done in range(0, steps, CHUNK):
        hparams = jax.tree.map(jnp.float32, path(np.arange(done, done + CHUNK)))
        args = params, state, key, jnp.int32(done), task.train, hparams
        if not done:
            advance(*args)  # compilation
        began = time.process_time()
        params, state = jax.block_until_ready(advance(*args))
        spent += time.process_time() - began
        last = jax.tree.map(lambda x: x[-1], hparams)
        yield look(task, params, last, spent, done + CHUNK)


def held(hparams: dict) -> Callable:
    """A path that stays where it is."""
    return lambda steps: {name: np.full(len(steps), value) for name, value in hparams.items()}


def along(points: Sequence[Point], path: dict[str, list[float]]) -> Callable:
    """The path of a run that was tuned."""
    at = [point.steps for point in points]
    return lambda steps: {name: np.interp(steps, at, values) for name, values in path.items()}


# --- Searches ---------------------------------------------------------------------------------------------


def ends(task) -> dict[str, tuple[float, float, str]]:
    """The box that searches look in: lower and upper end, and "linear", "log" or "whole"."""

    def half(lo: float, hi: float) -> float:
        return lo + (hi - lo) / 2

    bound = bind(task.problem.constraints, task.hparams)
    box = {}
    for name, constraint in zip(sorted(task.hparams), bound.leaves, strict=True):
        if isinstance(constraint, Integer):
            box[name] = float(constraint.lo), np.ceil(half(constraint.lo, constraint.hi)), "whole"
        elif isinstance(constraint, Interval):
            box[name] = constraint.lo, half(constraint.lo, constraint.hi), "linear"
        else:
            box[name] = 1e-3, 1.0, "log"
    return box


def placed(box, share: dict[str, float]) -> dict[str, float]:
    """Hyperparameters at shares between 0 and 1 of the box."""
    out = {}
    for name, (lo, hi, kind) in box.items():
        value = lo * (hi / lo) ** share[name] if kind == "log" else lo + (hi - lo) * share[name]
        out[name] = float(np.round(value)) if kind == "whole" else float(np.clip(value, lo + 1e-3, hi - 1e-3))
    return out


def random_search(box, rates, seed: int):
    """Uniform in the box."""
    rng = np.random.default_rng(seed)
    while True:
        yield placed(box, {name: rng.random() for name in box}), None


def grid_search(box, rates, seed: int):
    """One share for all dropouts and one for all others, from a grid of 4 by 4 in random order."""
    cells = np.random.default_rng(seed).permutation(16)
    for number in itertools.cycle(cells):
        rate, other = 0.25 * (number % 4), 0.25 * (number // 4)
        yield placed(box, {name: rate if name in rates else other for name in box}), None


def optuna_search(box, rates, seed: int):
    """Tree-structured Parzen estimator with median pruning."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.MedianPruner(n_startup_trials=2)
    )
    while True:
        trial = study.ask()
        best = yield placed(box, {name: trial.suggest_float(name, 0, 1) for name in box}), trial
        study.tell(trial, best)


SEARCHES = {"random": random_search, "grid": grid_search, "optuna": optuna_search}


def searched(task, setting: Setting, inner, search, steps: int, seconds: float, seed: int):
    """Points over all trials, and the hyperparameters of the best one."""
    proposals = search(ends(task), setting.rates, seed)
    points, spent, best = [], 0.0, (np.inf, {})
    hparams, trial = next(proposals)
    while spent < seconds:
        reached, last = np.inf, 0.0
        for number, point in enumerate(plain(task, inner, held(hparams), steps, seed)):
            points.append(point._replace(seconds=spent + point.seconds))
            reached, last = min(reached, point.valid), point.seconds
            if spent + last >= seconds:
                break
            if trial is not None:
                trial.report(point.valid, number)
                if trial.should_prune():
                    break
        spent += last
        best = min(best, (reached, hparams), key=lambda pair: pair[0])
        hparams, trial = proposals.send(reached)
    return points, best[1]


# --- The study --------------------------------------------------------------------------------------------


def study(
    tasks: Sequence[str],
    seeds: Sequence[int],
    scale: float = 1.0,
    arms: Sequence[str] = (*SEARCHES, *METHODS),
    say: Callable[[Row], Any] = lambda row: None,
) -> list[Row]:
    """All runs; methods first, as what follows them takes their schedule."""
    rows = []

    def add(*fields) -> Row:
        rows.append(Row(*fields))
        say(rows[-1])
        return rows[-1]

    for name in tasks:
        setting = SETTINGS[name]
        seconds = setting.seconds * scale
        rates = chosen(name, seeds[0], seconds / 4)
        for seed in seeds:
            task = regularised.TASKS[name](seed)
            for arm in METHODS:
                points, path = tuned(task, made(arm, *rates[arm]), seconds, seed)
                row = add(name, arm, seed, None, points, _at_best(points, path), path)
                last = {key: values[-1] for key, values in path.items()}
                _plain_arms(add, name, task, adam(rates[PLAIN][0]), seed, row, last)
            trial_steps = max(CHUNK, int(_plain_steps(rows, name, seed) / TRIALS) // CHUNK * CHUNK)
            for arm in (arm for arm in arms if arm in SEARCHES):
                points, best = searched(
                    task, setting, adam(rates[PLAIN][0]), SEARCHES[arm], trial_steps, seconds, seed
                )
                add(name, arm, seed, None, points, best, {})
    return rows


@functools.cache
def chosen(name: str, seed: int, seconds: float) -> dict[str, tuple[float, float]]:
    """The learning rate of each method and of plain training on a task, and the one of the response."""
    task, setting = regularised.TASKS[name](seed), SETTINGS[name]

    def reached(arm: str, rate: float, fit: float) -> float:
        if arm != PLAIN:
            return min(point.valid for point in tuned(task, made(arm, rate, fit), seconds, seed)[0])
        lowest = np.inf
        for point in plain(task, adam(rate), held(task.hparams), 10**9, seed):
            lowest = min(lowest, point.valid)
            if point.seconds > seconds:
                return lowest
        return lowest

    middle = setting.fits[len(setting.fits) // 2]
    best = {}
    for arm in (PLAIN, *METHODS):
        rate = min(setting.learning_rates, key=lambda rate, arm=arm: reached(arm, rate, middle))
        best[arm] = rate, middle
    rate = best["delta_stn"][0]
    best["delta_stn"] = rate, min(setting.fits, key=lambda fit: reached("delta_stn", rate, fit))
    print(f"  {name}: learning rates, and those of the response: {best}", flush=True)
    return best


def _plain_steps(rows: Sequence[Row], task: str, seed: int) -> float:
    """Plain training steps that fit into the time of a method."""
    own = [row for row in rows if (row.task, row.seed) == (task, seed)]
    start = next(row for row in own if row.arm == "start").points[-1]
    stn = next(row for row in own if row.arm == "stn").points[-1]
    return stn.seconds / start.seconds * start.steps


def _plain_arms(add, name, task, inner, seed, row: Row, last: dict) -> None:
    steps = row.points[-1].steps
    runs = {f"final of {row.arm}": held(last), f"replay of {row.arm}": along(row.points, row.path)}
    if row.arm == "stn":
        runs["start"] = held(task.hparams)
    for arm, path in runs.items():
        points = list(plain(task, inner, path, steps, seed))
        at = path(np.array([min(points, key=lambda point: point.valid).steps]))
        add(name, arm, seed, None, points, {key: float(x[0]) for key, x in at.items()}, {})


def starts(
    name: str, values: Sequence[float], task: str, seed: int, scale: float, say: Callable[[Row], Any]
) -> list[Row]:
    """STN and Delta-STN from several first values of one hyperparameter."""
    rows, setting = [], SETTINGS[task]
    seconds = setting.seconds * scale
    rates = chosen(task, seed, seconds / 4)
    for value, arm in itertools.product(values, METHODS):
        points, path = tuned(
            regularised.TASKS[task](seed, {name: value}), made(arm, *rates[arm]), seconds, seed
        )
        rows.append(Row(task, arm, seed, (name, value), points, _at_best(points, path), path))
        say(rows[-1])
    return rows


def _at_best(points: Sequence[Point], path: dict[str, list[float]]) -> dict[str, float]:
    at = min(range(len(points)), key=lambda i: points[i].valid)
    return {name: values[at] for name, values in path.items()}


def load(path: Path) -> list[Row]:
    """The rows of a file."""

    def row(fields) -> Row:
        points = [Point(at, steps, *map(float, rest)) for at, steps, *rest in fields.pop("points")]
        start = fields.pop("start")
        return Row(**fields, points=points, start=start and (start[0], start[1]))

    return [row(json.loads(line)) for line in path.read_text().splitlines()]


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.self_tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--scale", type=float, default=1.0, help="of all times")
    parser.add_argument("--starts", nargs="*", type=float, default=[0.05, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of runs.jsonl and the figures")
    parser.add_argument("--report", action="store_true", help="of the runs that are there")
    args = parser.parse_args(argv)
    file = args.out / "runs.jsonl"
    rows: list[Row] = load(file) if args.report else []

    def say(row: Row) -> None:
        rows.append(row)
        save_lines(rows, file)
        best, end = row.best, row.points[-1]
        print(
            f"  {row.task}, {row.arm}, seed {row.seed}{'' if row.start is None else f', from {row.start}'}: "
            f"test {best.test:.4f} {best.accuracy:.3f} where valid is lowest, {best.valid:.4f}, at "
            f"{best.seconds:.0f} of {end.seconds:.0f} s and {best.steps} of {end.steps} steps",
            flush=True,
        )

    if not args.report:
        check_optuna()
        study(args.tasks, args.seeds, args.scale, say=say)
        if args.starts:
            starts("output", [min(value, 0.9) for value in args.starts], "language", 0, args.scale, say)
    self_tuning_report.show(rows)
    self_tuning_report.draw(rows, args.out)
    print(f"  runs and figures: {args.out}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
