"""A learned learning-rate schedule against constant, cosine, WSD and power-law schedules, at equal compute.

The run of `problems.training_run`, 1,000 steps of it. The learned schedule has 20 windows of 50 steps; 200
outer steps of Adam move the log-odds of their rates by `bilevel.unrolled`, each of them trains from a
fresh start in a fresh order of minibatches, and the outer rate falls to zero in the second half, so that
the last iterate is taken::

    constant     64 rates
    cosine       8 peaks, 2 warm-ups, 4 last values
    wsd          8 peaks, 4 decays, 2 shapes
    power law    8 caps, 2 exponents, 2 knees (where the cap ends), with and without a decay at the end

A family trains all its 64 schedules, side by side in one program, in rounds, each with another start and
order, until the CPU seconds that learning took are spent, compilation apart; the lowest mean validation
loss wins. All of them see the same validation split, and are judged in runs with other starts and orders,
by validation and test loss. Differences to the learned schedule are of the same runs, and standard errors
of the means of seeds (a split of the digits each).

Transfer: every schedule stretched to 4,000 steps; and those of a seed on the split of the next, whose rows
are the same digits dealt otherwise. Starts: the same from four constant rates, over three orders of
magnitude.

Rates stay below 0.2, and the derivative is cut at three times the outer gradient (``clip``), for all of them:
training that begins at the highest rate is chaotic at first. Where training is calm nothing is cut (growth,
the largest of a run, is then below log 3). Without the former a window climbs to 0.4 now and then, and other
starts and orders than those it was learned from do not survive it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table
from benchmarks.problems import training_run
from benchmarks.problems.training_run import BATCH, INNER, Losses, Split

OUT = Path(__file__).parent / "results" / "schedules"
SEEDS = (0, 1, 2)
STEPS, WINDOWS, OUTER_STEPS, FIRST, CLIP = 1000, 20, 200, 0.01, 3.0
OUTER_RATE = 0.1
STARTS = (0.0001, 0.001, 0.01, 0.1)
LONGER, JUDGES, JUDGES_LONG = 4, 16, 8
LEARNED = "learned"
# No rate beyond those at which training lives: 0.3 from the first step on kills it (all units saturate,
# and no derivative leads out).
PROBLEM = dataclasses.replace(training_run.PROBLEM, constraints={"lr": bilevel.interval(0, 0.2)})

Rates = np.ndarray
"""Of a schedule: an entry for each step."""


# --- Families ---------------------------------------------------------------------------------------------


def rates(schedule: Callable, steps: int) -> Rates:
    return bilevel.schedules.sampled(schedule, steps).values


def constants(steps: int) -> dict[str, Rates]:
    return {f"{rate:.3g}": np.full(steps, rate, np.float32) for rate in np.geomspace(0.001, 1, 64)}


def cosines(steps: int) -> dict[str, Rates]:
    peaks, warmups, ends = np.geomspace(0.005, 0.6, 8), (0, 0.1), (0, 0.03, 0.1, 0.3)
    return {
        f"peak {peak:.3g}, warm-up {warmup:.0%}, end {end:g}": rates(
            bilevel.schedules.cosine(peak, steps, warmup=round(warmup * steps), end=end * peak), steps
        )
        for peak, warmup, end in itertools.product(peaks, warmups, ends)
    }


def wsds(steps: int) -> dict[str, Rates]:
    peaks, decays, shapes = np.geomspace(0.005, 0.6, 8), (0.1, 0.2, 0.4, 0.8), ("linear", "sqrt")
    return {
        f"peak {peak:.3g}, decay {decay:.0%}, {shape}": rates(
            bilevel.schedules.wsd(peak, steps, decay=round(decay * steps), shape=shape), steps
        )
        for peak, decay, shape in itertools.product(peaks, decays, shapes)
    }


def power_laws(steps: int) -> dict[str, Rates]:
    caps, exponents, knees, decays = np.geomspace(0.005, 0.6, 8), (-0.51, -1.0), (0.03, 0.2), (0, 0.1)
    return {
        f"cap {cap:.3g}, exponent {exponent:g}, knee {knee:.0%}, decay {decay:.0%}": rates(
            bilevel.schedules.power_law(
                cap,
                cap * (BATCH * knee * steps) ** -exponent,
                exponent,
                batch=BATCH,
                decay=round(decay * steps),
                steps=steps,
            ),
            steps,
        )
        for cap, exponent, knee, decay in itertools.product(caps, exponents, knees, decays)
    }


FAMILIES = {"constant": constants, "cosine": cosines, "wsd": wsds, "power law": power_laws}


def stretched(values: Rates, factor: int) -> Rates:
    """The same rates over so many times the steps."""
    return rates(bilevel.Schedule(np.arange(len(values)), values).stretched(factor), factor * len(values))


# --- Searching and learning -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """A schedule, and what it took.

    Args:
      rates: of each step.
      name: its numbers.
      tried: training runs.
      seconds: CPU seconds without compilation.
      growth: largest logarithm of the growth of a change of params, of what is learned.
    """

    rates: Rates
    name: str
    tried: int
    seconds: float
    growth: float = float("nan")


def searched(points: dict[str, Rates], split: Split, seconds: float, key) -> Found:
    """The point with the lowest mean validation loss, of as many runs of each as there is time for."""
    tables = jnp.asarray(np.stack(list(points.values())))

    def round_of(i):
        key_round = jax.random.fold_in(key, i)
        return np.asarray(training_run.judged(tables, key_round[None], split).valid[:, 0])

    round_of(0)  # compilation
    losses, spent = [], 0.0
    while spent < seconds:
        began = time.process_time()
        losses.append(round_of(len(losses)))
        spent += time.process_time() - began
    mean = np.mean(losses, axis=0)
    best = int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))
    return Found(list(points.values())[best], list(points)[best], len(losses) * len(points), spent)


@functools.cache
def method(steps: int, windows: int, outer_steps: int):
    fall = bilevel.schedules.wsd(OUTER_RATE, outer_steps, decay=outer_steps // 2)
    per_step = {"lr": bilevel.schedules.windows(windows, steps)}
    return bilevel.alternating(
        bilevel.unrolled(per_step=per_step, clip=CLIP), INNER, optax.adam(fall), inner_steps=steps
    )


def learned(split: Split, first: float, key, steps: int, windows: int, outer_steps: int) -> Found:
    """The last iterate from a constant rate."""

    def run(outer_steps_now):
        return bilevel.optimize(
            PROBLEM,
            None,
            {"lr": jnp.full(windows, first)},
            bilevel.minibatches(split.train, BATCH),
            split.valid,
            method(steps, windows, outer_steps),
            outer_steps_now,
            key=key,
            progress=False,
            keep_best=False,
        )

    run(1)  # compilation
    began = time.process_time()
    result = run(outer_steps)
    spent = time.process_time() - began
    values = np.asarray(result.hparams["lr"])
    name = f"from {first:g}: " + " ".join(f"{rate:.2g}" for rate in values)
    growth = float(np.max(result.history["growth"]))
    return Found(np.repeat(values, steps // windows), name, outer_steps, spent, growth)


# --- The study --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seed:
    """What was found on a split, and how it was judged.

    Args:
      seed: of the split.
      found: of each family, and what was learned.
      judged: losses of each, an entry for each run; ``longer`` the same, stretched; ``moved``
        on the next split.
      starts: what was learned from each constant rate; ``from_starts`` its losses.
    """

    seed: int
    found: dict[str, Found]
    judged: dict[str, Losses]
    longer: dict[str, Losses]
    moved: dict[str, Losses]
    starts: dict[float, Found]
    from_starts: dict[str, Losses]


def judge(tables: dict[str, Rates], split: Split, key, runs: int) -> dict[str, Losses]:
    """Losses in runs that no schedule was chosen on, the same for all of them."""
    found = training_run.judged(
        jnp.asarray(np.stack(list(tables.values()))), jax.random.split(key, runs), split
    )
    return {name: Losses(*(np.asarray(x[i]) for x in found)) for i, name in enumerate(tables)}


def of_seed(
    seed: int,
    steps: int = STEPS,
    windows: int = WINDOWS,
    outer_steps: int = OUTER_STEPS,
    starts: Sequence[float] = STARTS,
    say: Callable[[str], object] = lambda line: None,
) -> Seed:
    """Everything on one split."""
    split, other = training_run.digits(seed), training_run.digits(seed + 1)
    keys = {
        name: jax.random.fold_in(jax.random.key(seed), i)
        for i, name in enumerate((LEARNED, "judge", "longer", "moved", *FAMILIES))
    }
    begun = {
        first: learned(split, first, keys[LEARNED], steps, windows, outer_steps)
        for first in sorted({FIRST, *starts})
    }
    found = {LEARNED: begun[FIRST]}
    for family, make in FAMILIES.items():
        found[family] = searched(make(steps), split, found[LEARNED].seconds, keys[family])
    for arm, own in found.items():
        say(f"seed {seed}, {arm}: {own.tried} runs, {own.seconds:.0f} s; {own.name}")
    tables = {arm: own.rates for arm, own in found.items()}
    return Seed(
        seed=seed,
        found=found,
        judged=judge(tables, split, keys["judge"], JUDGES),
        longer=judge(
            {a: stretched(x, LONGER) for a, x in tables.items()}, split, keys["longer"], JUDGES_LONG
        ),
        moved=judge(tables, other, keys["moved"], JUDGES),
        starts={first: begun[first] for first in starts},
        from_starts=judge({f"{f:g}": begun[f].rates for f in starts}, split, keys["judge"], JUDGES),
    )


# --- The report -------------------------------------------------------------------------------------------


def with_error(values: Sequence[float], digits: int = 4) -> str:
    """Mean and its standard error."""
    values = np.asarray(values)
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} +- {error:.{digits}f}"


def compared(runs: Sequence[dict[str, Losses]]) -> list[tuple]:
    """A row for each arm: losses, accuracy, and how much worse it is than what was learned."""
    rows = []
    for arm in runs[0]:
        valid, test, accuracy = (
            [float(np.mean(getattr(run[arm], which))) for run in runs] for which in Losses._fields
        )
        worse = [
            [float(np.mean(getattr(run[arm], w)) - np.mean(getattr(run[LEARNED], w))) for run in runs]
            for w in ("valid", "test")
        ]
        percent = with_error(100 * np.asarray(accuracy), 2)
        differences = ("", "", "") if arm == LEARNED else (
            with_error(worse[0]), with_error(worse[1]), f"{sum(x > 0 for x in worse[0])} of {len(runs)}",
        )  # fmt: skip
        rows.append((arm, with_error(valid), with_error(test), percent, *differences))
    return rows


COMPARED = (
    "validation loss", "test loss", "test accuracy, %", "validation - learned", "test - learned",
    "learned better",
)  # fmt: skip


def show(seeds: Sequence[Seed]) -> None:
    print(f"  {len(seeds)} seeds, {JUDGES} runs each; +- standard error over seeds")
    table((f"{STEPS} steps", *COMPARED), compared([own.judged for own in seeds]))
    print()
    table((f"stretched to {LONGER * STEPS}", *COMPARED), compared([own.longer for own in seeds]))
    print()
    table(("on the next split", *COMPARED), compared([own.moved for own in seeds]))
    print()
    rows = []
    for own in seeds:
        for arm, found in own.found.items():
            error = np.std(own.judged[arm].valid, ddof=1) / np.sqrt(JUDGES)
            loss = f"{np.mean(own.judged[arm].valid):.4f} +- {error:.4f}"
            rows.append((f"{own.seed}, {arm}", loss, found.tried, f"{found.seconds:.0f}", found.name[:70]))
    table(("seed, +- over runs", "validation loss", "runs tried", "CPU s", ""), rows)
    print()
    rows = []
    for first in seeds[0].starts:
        losses = [float(np.mean(own.from_starts[f"{first:g}"].valid)) for own in seeds]
        each = " ".join(f"{x:.4f}" for x in losses)
        growth = max(own.starts[first].growth for own in seeds)
        rows.append((f"{first:g}", with_error(losses), each, f"{growth:.1f}", f"{np.log(CLIP):.1f}"))
    table(("learned from", "validation loss", "each seed", "largest growth", "cut above"), rows)
    spread = np.ptp([[np.mean(x.valid) for x in own.from_starts.values()] for own in seeds], axis=1)
    print(f"  largest distance between starts, of each seed: {' '.join(f'{x:.4f}' for x in spread)}")


def draw(seeds: Sequence[Seed], folder: Path) -> None:
    """Learned schedules over the winners of the families, a panel for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(seeds), 3.8), layout="constrained")
    for ax, own in zip(np.atleast_1d(figure.subplots(1, len(seeds), sharey=True)), seeds, strict=True):
        for i, (arm, found) in enumerate(own.found.items()):
            style = {"linewidth": 2, "color": "k", "zorder": 3} if arm == LEARNED else {"color": f"C{i}"}
            loss = np.mean(own.judged[arm].valid)
            ax.plot(np.maximum(found.rates, 1e-4), label=f"{arm}: {loss:.3f}", **style)
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_title(f"seed {own.seed}, validation losses")
        ax.grid(color="0.9")
        ax.legend(fontsize="small")
    figure.supylabel("learning rate")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "schedules.png", dpi=120)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figure")
    args = parser.parse_args(argv)
    seeds = [of_seed(seed, say=lambda line: print(f"  {line}", flush=True)) for seed in args.seeds]
    show(seeds)
    draw(seeds, args.out)
    print(f"  figure: {args.out}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
