"""All stochastic methods on one task, at equal numbers of examples: how far each is from the optimum.

The task is `benchmarks.problems.sampled`: logistic regression on 5,000 rows with one L2 penalty for each of
200 features, here between 1e-5 and 1, so that a step size of one is stable at all of them. The excess of a
method is the outer value of its hyperparameters, with params trained accurately, over the lowest that is
known: that of 400 steps of the default on whole arrays. Everyone gets

- the same start, data, batches of 64, plain gradient steps inside, and a linear step of one;
- counts, multipliers and terms as they are by default;
- the same two inner and six outer rates, lengths for those that normalise; the pair with the lowest value
  at the end of the budget on the first seed, whose data are not used again;
- the same budget: examples touched, an example of a Hessian or cross product counted as two of a gradient,
  and the passes before the first step as well.

Rates are constant but for "ttsa, falling", whose rates fall as in its paper: inner ones like t^-2/5, outer
ones like t^-3/5. The members of a population are the pairs of the grid first, and then some orders of the
batches of each of the other seeds, with the pair chosen: each method is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import found
from benchmarks.claims import Check
from benchmarks.measure import table
from benchmarks.problems import Task, sampled
from benchmarks.text import work
from bilevel.problem import Counts

TUNED_ON, SEEDS = 0, (1, 2, 3, 4, 5, 6)
BUDGET, SHARES = 1_000_000, (0.25, 0.5, 1.0)
INNER_RATES = (0.3, 1.0)
OUTER_RATES = {
    "rate": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "length": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
LINEAR_STEP = 1.0
FALLS_AFTER = 100  # steps
REFERENCE_STEPS = 400


# --- Methods ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method.

    Args:
      make: ``(inner rate, outer rate) -> method``.
      outer: which grid of outer rates it takes.
      second: whether it takes second derivatives.
      fixed: whether it needs the same batches in every epoch.
      first: ``(training rows, validation rows)`` -> counts of what ``init`` touches.
    """

    make: Callable
    outer: str = "rate"
    second: bool = True
    fixed: bool = False
    first: Callable = lambda n, m: Counts(0, 0, 0, 0)


def of_sgd(method: Callable, **settings) -> Callable:
    """With plain steps at both levels."""
    return lambda inner, outer: method(optax.sgd(inner), optax.sgd(outer), **settings)


def falling(rate, power: float) -> optax.GradientTransformation:
    return optax.sgd(lambda t: rate / (1 + t / FALLS_AFTER) ** power)


def slip(inner, outer):
    return bilevel.slip(optax.sgd(inner), bilevel.normalized_momentum(outer), LINEAR_STEP)


def bo_rep(inner, outer):
    """With a running vector for the linear system, as in the authors' code."""
    return bilevel.bo_rep(optax.sgd(inner), outer, estimator=bilevel.implicit(bilevel.sgd(LINEAR_STEP)))


LINEAR = {"linear_step": LINEAR_STEP}
ARMS = {
    "soba": Arm(of_sgd(bilevel.soba, **LINEAR)),
    "ma_soba": Arm(of_sgd(bilevel.ma_soba, **LINEAR)),
    "saba": Arm(of_sgd(bilevel.saba, **LINEAR), fixed=True, first=lambda n, m: Counts(n, m, n, n)),
    "srba": Arm(of_sgd(bilevel.srba, **LINEAR), first=lambda n, m: Counts(0, m, 0, 0)),
    "amigo": Arm(of_sgd(bilevel.amigo, **LINEAR)),
    "ttsa": Arm(of_sgd(bilevel.ttsa, **LINEAR)),
    "ttsa, falling": Arm(lambda i, o: bilevel.ttsa(falling(i, 0.4), falling(o, 0.6), **LINEAR)),
    "stocbio": Arm(of_sgd(bilevel.stocbio, **LINEAR)),
    "slip": Arm(slip, "length"),
    "bo_rep": Arm(bo_rep, "length"),
    "f2sa": Arm(of_sgd(bilevel.f2sa), second=False),
    "f2sa, 1 inner step": Arm(of_sgd(bilevel.f2sa, inner_steps=1), second=False),
    "bome": Arm(of_sgd(bilevel.bome), second=False),
}


# --- Runs -------------------------------------------------------------------------------------------------

PROBLEM = dataclasses.replace(sampled.make(TUNED_ON).problem, constraints=bilevel.interval(1e-5, 1.0))


class Race(NamedTuple):
    """At the end: hyperparameters at the shares of the budget, outer steps, those rejected."""

    hparams: dict
    steps: jax.Array
    rejected: jax.Array


def walk(step: Callable, state, spent, budget: float) -> Race:
    """As many steps as the budget has room for.

    Args:
      step: ``state -> (state, examples, accepted)``.
      state: the first one.
      spent: examples touched before it.
      budget: of examples.
    """
    shares = jnp.asarray(SHARES) * budget

    def body(carry):
        (state, spent), (kept, steps, rejected) = carry
        state, more, accepted = step(state)
        spent = spent + more
        inside = spent <= shares
        kept = jax.tree.map(
            lambda old, new: jnp.where(inside.reshape(-1, *[1] * new.ndim), new, old), kept, state.hparams
        )
        made = Race(kept, steps + inside[-1], rejected + (inside[-1] & ~accepted))
        return (state, spent), made

    first = jax.tree.map(lambda x: jnp.stack([x] * len(SHARES)), state.hparams)
    carry = (state, jnp.float32(spent)), Race(first, jnp.int32(0), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry[0][1] <= budget, body, carry)[1]


@functools.lru_cache
def task(seed: int) -> Task:
    return dataclasses.replace(sampled.make(seed), problem=PROBLEM)


def race(arm: Arm, rates, seeds: Sequence[int], budget: float = BUDGET) -> Race:
    """A member for each row of ``rates`` and its seed; all draw batches in an order of their own."""
    tasks = [task(seed) for seed in seeds]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(tasks)))

    def sources(part: str):
        each = [bilevel.minibatches(getattr(own, part), own.batch, fixed=arm.fixed) for own in tasks]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    given = jnp.asarray(rates, jnp.float32), keys, sources("train"), sources("valid")
    return _race(arm, tasks[0].problem, budget, (tasks[0].params, tasks[0].hparams), given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _race(arm, problem, budget, start, given):
    def run(rates, key, train, valid):
        method = arm.make(*rates)

        def step(state):
            state, info = method.step(problem, state, train, valid)
            return state, work(info.counts), info.accepted

        state = method.init(problem, *start, train, valid, key=key)
        touched = arm.first(*(source.num_batches * source.batch_size for source in (train, valid)))
        return walk(step, state, work(touched), budget)

    return jax.vmap(run)(*given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(problem, solver, params, hparams, train, valid):
    return jax.lax.map(lambda h: found.solve(problem, solver, params, h, train, valid)[2][0][0], hparams)


def excesses(seed: int, hparams) -> np.ndarray:
    """Outer values of hparams, (n, 200), after accurate training, over `lowest`; inf where there is none."""
    own = task(seed)
    made = _values(own.problem, own.solver, own.params, hparams, own.train, own.valid)
    return np.nan_to_num(np.asarray(made, np.float64), nan=np.inf) - lowest(seed)


@functools.lru_cache
def lowest(seed: int) -> float:
    """The lowest outer value that is known."""
    own = task(seed)
    result = bilevel.optimize(
        own.problem, own.params, own.hparams, own.train, own.valid, steps=REFERENCE_STEPS, progress=False
    )
    return float(found.trained(own, result.best.hparams, own.valid)[1][0][0])


# --- The study --------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The pair of rates chosen; excesses, (seeds, orders, shares); outer steps, the mean; those rejected."""

    rates: tuple[float, float]
    excess: np.ndarray
    steps: int
    rejected: int

    @property
    def mean(self) -> np.ndarray:
        """At each share of the budget."""
        return self.excess.mean(axis=(0, 1))


def study(name: str, seeds: Sequence[int] = SEEDS, budget: float = BUDGET) -> Found:
    """The grid on the first seed, and the pair chosen on the others, by one program."""
    arm = ARMS[name]
    rates = list(itertools.product(INNER_RATES, OUTER_RATES[arm.outer]))
    orders, rest = divmod(len(rates), len(seeds))
    if rest:
        raise ValueError(f"{len(rates)} pairs of rates are no multiple of {len(seeds)} seeds.")
    grid = race(arm, rates, [TUNED_ON] * len(rates), budget)
    chosen = rates[int(np.argmin(excesses(TUNED_ON, jax.tree.map(lambda x: x[:, -1], grid.hparams))))]
    runs = race(arm, [chosen] * len(rates), np.repeat(seeds, orders).tolist(), budget)
    flat = jax.tree.map(lambda x: x.reshape(len(seeds), orders * len(SHARES), -1), runs.hparams)
    excess = [excesses(seed, jax.tree.map(lambda x, i=i: x[i], flat)) for i, seed in enumerate(seeds)]
    return Found(
        chosen,
        np.reshape(excess, (len(seeds), orders, len(SHARES))),
        round(float(runs.steps.mean())),
        int(runs.rejected.sum()),
    )


def checks(all_found: Mapping[str, Found]) -> list[Check]:
    """What the papers claim, as ratios of excesses."""
    mean = {name: found.mean for name, found in all_found.items()}
    ttsa = np.minimum(mean["ttsa"], mean["ttsa, falling"])
    values = [
        Check(f"{one} over {other}", ratio(mean[one][-1], mean[other][-1]), "<= 2")
        for one, other in itertools.product(("f2sa", "bome"), ("soba", "stocbio"))
    ]
    pairs = {
        "stocbio over ttsa": (mean["stocbio"], ttsa),
        "slip over stocbio": (mean["slip"], mean["stocbio"]),
    }
    speed = [
        Check(f"{what}, {words} the budget", ratio(one[i], other[i]), "< 1")
        for what, (one, other) in pairs.items()
        for i, words in ((1, "half"), (2, "all"))
    ]
    return values + speed


def ratio(one: float, other: float) -> float:
    return float(f"{one / other:.2g}")


def show(asked: Sequence[Check]) -> None:
    """A table."""
    rows = [(check.what, check.got, check.asked, "met" if check.met else "not met") for check in asked]
    table(("", "measured", "asked", ""), rows)


def main() -> None:
    starting = [excesses(s, jax.tree.map(lambda x: x[None], task(s).hparams))[0] for s in SEEDS]
    print(f"  {BUDGET:g} examples, {len(SEEDS)} seeds; excess of the start: {np.mean(starting):.4f}")
    all_found = {name: study(name) for name in ARMS}
    rows = []
    for name, found_ in all_found.items():
        each = found_.excess[:, :, -1].mean(axis=1)
        rows.append(
            (
                name, "yes" if ARMS[name].second else "no", *(f"{rate:g}" for rate in found_.rates),
                found_.steps, *(f"{x:.5f}" for x in found_.mean), f"{each.min():.5f} to {each.max():.5f}",
                found_.rejected,
            )
        )  # fmt: skip
    shares = (f"after {share:g}" for share in SHARES)
    table(("method", "second", "inner", "outer", "steps", *shares, "means of seeds", "rejected"), rows)
    show(checks(all_found))


if __name__ == "__main__":
    main()
