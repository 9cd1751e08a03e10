"""The default method of `optimize`, measured: time to a target, other choices, untuned, from a cold start.

Time to target: a hand-written program of the usual fixed schedule (`benchmarks.by_hand`) takes 500 outer
steps; the default has to reach its last outer loss, plus 2 %. Timed are whole runs of both after compilation,
the default's with as many outer steps as it needs.

Untuned: the default starts from hyperparameters 1,000 times smaller and larger than the start of each
problem, and has to end within 5 % of the best of 12 fixed schedules, four outer rates by three inner ones,
from that start. Compared are outer losses after accurate training at the hyperparameters found (the lower of
those at the best pair and at the end), so that no unfinished training counts.

Other choices: one thing changed at a time, on the same starts; the ratio is to the best of all that finished.

From a cold start: a fresh process each, imports and compilation included, until the target is reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import by_hand
from benchmarks.measure import interleaved, ratio, table, verdict
from benchmarks.problems import LARGE, PROBLEMS, Task
from benchmarks.runner import judged
from bilevel.defaults import DEFAULT_METHOD
from bilevel.inner_loops import newton_cg

TIMED = ("cleaning", "logistic")
SEEDS = 3
FACTORS = (1e-3, 1.0, 1e3)
OUTER_STEPS = 400
RATES, INNER_RATES = (0.01, 0.03, 0.1, 0.3), (0.1, 0.3, 1.0)  # inner ones as parts of the task's


def optimize(task: Task, hparams, method=None, steps: int = OUTER_STEPS) -> bilevel.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table shows what they say
        return bilevel.optimize(
            task.problem, task.params, hparams, task.train, task.valid, method, steps, progress=False
        )


# --- Time to target ------------------------------------------------------------------------------------


def target(task: Task) -> tuple[float, int]:
    """The last outer loss of the fixed schedule plus 2 %, and the outer step at which it is there first."""
    values = np.asarray(by_hand.run(task.name, by_hand.STEPS, *arguments(task))[2])
    limit = 1.02 * float(values[-1])
    return limit, int(np.argmax(values <= limit)) + 1


def arguments(task: Task):
    return task.params, task.hparams, task.train, task.valid


def steps_to(task: Task, limit: float) -> int:
    """Outer steps of the default until its value is at most ``limit``."""
    below = optimize(task, task.hparams).history["value"] <= limit
    if not below.any():
        raise SystemExit(f"error: the default does not reach {limit:.4f} on {task.name}")
    return int(np.argmax(below)) + 1


def time_to_target() -> None:
    rows = []
    for name in TIMED:
        task = PROBLEMS[name].make(0)
        limit, by_hand_steps = target(task)
        steps = steps_to(task, limit)
        calls = {
            "hand": lambda task=task: by_hand.run(task.name, by_hand.STEPS, *arguments(task)),
            "default": lambda task=task, steps=steps: optimize(task, task.hparams, steps=steps).params,
        }
        times = interleaved(calls, 9)
        ours = ratio(times["default"], times["hand"])
        rows.append(
            (name, f"{limit:.4f}", f"{by_hand_steps} of {by_hand.STEPS}", steps,
             f"{np.median(times['hand']):.4f}", f"{np.median(times['default']):.4f}", f"{ours:.3f}", "0.25",
             verdict(ours, 0.25))
        )  # fmt: skip
    table(
        ("problem", "target", "hand: there at step", "default", "hand s", "default s", "ratio", "asked", ""),
        rows,
    )


# --- Untuned ----------------------------------------------------------------------------------------------


def starts(task: Task) -> dict[float, dict]:
    """Penalties times a factor; the quadratic's are logarithms, and weights of examples have no scale."""

    def leaf(name, x, factor):
        if name == "weight":
            return x
        return x + np.log(factor).astype(np.float32) if name.startswith("log") else x * np.float32(factor)

    return {factor: {name: leaf(name, x, factor) for name, x in task.hparams.items()} for factor in FACTORS}


def ended(task: Task, result: bilevel.Result) -> float:
    """Outer loss after accurate training; inf where there is none."""
    return float(np.nan_to_num(judged(task, (result.best.hparams, result.hparams))[0], nan=np.inf))


def sweep(seed_tasks: list[Task]) -> np.ndarray:
    """The lowest loss of 12 fixed schedules from the task's own start, of each seed."""
    found = np.full(len(seed_tasks), np.inf)
    for outer_rate in RATES:
        for part in INNER_RATES:
            method = bilevel.alternating(
                bilevel.implicit(bilevel.cg(max_steps=20, tol=0.0)),
                optax.sgd(part * seed_tasks[0].rate),
                optax.adam(outer_rate),
                inner_steps=20,
            )
            for i, task in enumerate(seed_tasks):
                found[i] = min(found[i], ended(task, optimize(task, task.hparams, method)))
    return found


def untuned() -> None:
    rows, worst, diverged = [], 0.0, 0
    for name in (name for name in PROBLEMS if name not in LARGE):
        tasks = [PROBLEMS[name].make(seed) for seed in range(SEEDS)]
        best = sweep(tasks)
        ratios = {}
        for seed, task in enumerate(tasks):
            for factor, hparams in starts(task).items():
                result = optimize(task, hparams)
                diverged += result.status == bilevel.Status.DIVERGED
                ratios[seed, factor] = ended(task, result) / best[seed]
        worst_here = max(ratios.values())
        cells = [
            f"{np.median(r):.3f} ({min(r):.3f} to {max(r):.3f})"
            for r in ([ratios[seed, factor] for seed in range(SEEDS)] for factor in FACTORS)
        ]
        rows.append((name, f"{np.median(best):.5f}", *cells, verdict(worst_here, 1.05)))
        worst = max(worst, worst_here)
        jax.clear_caches()
    print(
        f"  {OUTER_STEPS} outer steps; loss over the best of {len(RATES) * len(INNER_RATES)} fixed schedules,"
    )
    print(
        f"  median (lowest to highest) of {SEEDS} seeds, by what the starting penalties are multiplied with:"
    )
    table(("problem", "best of sweep", *(f"{factor:g}" for factor in FACTORS), "asked 1.05"), rows)
    print(f"  worst {worst:.3f}; runs that diverged: {diverged} (asked: 0)")
    task = PROBLEMS["ridge"].make(0)
    gaps = [
        ended(task, optimize(task, {"l2": jnp.float32(np.exp(log_l2))})) / task.optimum - 1
        for log_l2 in (-8.0, 1.0)
    ]
    print(f"  ridge from log-L2 -8 and 1: {gaps[0]:.1e} and {gaps[1]:.1e} above the optimum", end=" ")
    print(f"(asked: 1e-3, {verdict(max(gaps), 1e-3)})")


# --- Other choices -----------------------------------------------------------------------------------------


def adam(first: float, scale: float | None = 20, b1=0.8, b2=0.9) -> optax.GradientTransformation:
    """Of constant rate where ``scale`` is None."""
    return optax.adam(first if scale is None else lambda t: first / jnp.sqrt(1 + t / scale), b1, b2)


def choice(tol=0.03, cg_steps=50, inner=None, outer=None):
    inner = newton_cg(1, 0.0, cg_steps, 0.1) if inner is None else inner
    outer = adam(0.3) if outer is None else outer
    return bilevel.alternating(bilevel.implicit(bilevel.cg(max_steps=cg_steps, tol=tol)), inner, outer)


CHOICES = {
    "default": DEFAULT_METHOD,
    "at most 5 CG steps": choice(cg_steps=5),
    "at most 20 CG steps": choice(cg_steps=20),
    "at most 200 CG steps": choice(cg_steps=200),
    "tol 0.3 of the adjoint": choice(tol=0.3),
    "tol 0.1 of the adjoint": choice(tol=0.1),
    "tol 0.003 of the adjoint": choice(tol=0.003),
    "Newton's rtol 0.5": choice(inner=newton_cg(1, 0.0, 50, 0.5)),
    "Newton's rtol 0.01": choice(inner=newton_cg(1, 0.0, 50, 0.01)),
    "three Newton steps": choice(inner=newton_cg(3, 0.0, 50, 0.1)),
    "5 L-BFGS steps": choice(inner=bilevel.lbfgs(5, atol=0.0)),
    "20 accelerated steps": choice(inner=bilevel.accelerated(20, atol=0.0)),
    "Adam 0.1, falling": choice(outer=adam(0.1)),
    "Adam 1, falling": choice(outer=adam(1.0)),
    "Adam 0.3, constant": choice(outer=adam(0.3, None)),
    "Adam 0.1, constant": choice(outer=adam(0.1, None)),
    "Adam 0.3, b1 0.5": choice(outer=adam(0.3, b1=0.5)),
    "Adam 0.3, b1 0.9": choice(outer=adam(0.3, b1=0.9)),
    "Adam 0.3, b1 0.9, b2 0.99": choice(outer=adam(0.3, b1=0.9, b2=0.99)),
    "Adam 0.3, b1 0.9, b2 0.999": choice(outer=adam(0.3, b1=0.9, b2=0.999)),
}


def other_choices() -> None:
    names = ("ridge", "kfold", "logistic", "quadratic", "mlp")
    losses, taken = {}, {}
    for name in names:
        task = PROBLEMS[name].make(0)
        for label, method in CHOICES.items():
            optimize(task, task.hparams, method, 1)  # compiles
            for factor, hparams in starts(task).items():
                began = time.perf_counter()
                result = optimize(task, hparams, method)
                taken[label, name, factor] = time.perf_counter() - began
                losses[label, name, factor] = ended(task, result)
        jax.clear_caches()
    rows = []
    for label in CHOICES:
        cells = []
        for name in names:
            best = min(loss for (_, n, _), loss in losses.items() if n == name)
            cells.append(f"{max(losses[label, name, f] for f in FACTORS) / best:.3f}")
        base = [taken["default", name, f] for name in names for f in FACTORS]
        times = np.asarray([taken[label, name, f] for name in names for f in FACTORS]) / base
        rows.append((label, *cells, f"{np.exp(np.mean(np.log(times))):.2f}"))
    print(f"  worst of the starts times {', '.join(f'{f:g}' for f in FACTORS)}: loss over the best of all")
    table(("choice", *names, "time"), rows)


# --- From a cold start --------------------------------------------------------------------------------------


def cold_start() -> None:
    task = PROBLEMS["cleaning"].make(0)
    limit, hand_steps = target(task)
    steps = steps_to(task, limit)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "arrays.npz"))
        by_hand.save(path, *arguments(task))
        commands = {
            "hand": ["benchmarks.by_hand", task.name, path, str(hand_steps)],
            "default": ["benchmarks.cold_default", path, str(steps)],
        }
        found: dict = {name: [] for name in commands}
        for _ in range(7):
            for name, command in commands.items():
                out = subprocess.run(
                    [sys.executable, "-m", *command], check=True, capture_output=True, text=True
                )
                found[name].append(json.loads(out.stdout))
    rows, totals = [], {}
    for name, times in found.items():
        parts = {part: np.asarray([t[part] for t in times]) for part in times[0]}
        totals[name] = sum(parts.values())
        rows.append(
            (name, *(f"{np.median(x):.2f}" for x in parts.values()), f"{np.median(totals[name]):.2f}")
        )
    table(("seconds", *found["hand"][0], "in all"), rows)
    share = float(np.median(totals["default"] / totals["hand"]))
    print(f"  default / hand {share:.2f} (asked: at most 1.0, {verdict(share, 1.0)})")


def main():
    for part in (time_to_target, cold_start, untuned, other_choices):
        print(f"  -- {part.__name__.replace('_', ' ')}", flush=True)
        part()


if __name__ == "__main__":
    main()
