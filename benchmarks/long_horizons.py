"""What derivatives through long training are worth, what they cost, and what takes their place.

Growth: unrolled Adam and SGD with momentum on a network of 64-50-50-10 tanh units on the digits, in
float64. The derivative of the validation loss by the learning rate, against central differences at relative
steps of 1e-4 and 1e-3: they agree where all three are within a percent of each other. Flagged is a growth
above log 300, where `bilevel.optimize` warns.

Cost: 1,000 steps of a network of 10^5 parameters; memory is what a compiled hypergradient takes beyond
arguments and results. By hand is the same with checkpoints every square root of the steps, and Adam, in
plain JAX; its minibatches are one draw with replacement each, which costs less than those of
`bilevel.minibatches`, or more: their ratio says that the library adds little, not that it is faster.

Sharing: `bilevel.forward` with n windows has a column of params and optimiser state for each. Its memory is
predicted in proportion to the columns::

    bytes = c n |params and optimiser state|                                                     (1)

with c measured at the fewest windows. At least 2 is to be expected, as a loop has what it reads beside what
it writes; the rest are gradients and activations on the way.

Persistent evolution strategies: the linear toy, influence balancing and the two-dimensional toy of Vicol,
Metz and Sohl-Dickstein (2021, arXiv:2112.13835), whose true derivatives are known or worthless.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import compiled, interleaved, ratio, table, temporary_megabytes, verdict

CHAOTIC = np.log(300)
HORIZONS = (100, 200, 400, 1000)
RATES = {"adam": (0.003, 0.01, 0.02, 0.03), "sgd, momentum": (0.05, 0.1, 0.15)}
OPTIMIZERS = {
    "adam": lambda h: optax.adam(h["lr"], eps_root=1e-8),
    "sgd, momentum": lambda h: optax.sgd(h["lr"], momentum=0.9),
}
DIFFERENCES, AGREE = (1e-4, 1e-3), 0.01
BATCH, SIZES, LARGE = 64, (64, 50, 50, 10), (64, 512, 128, 10)
STEPS, WINDOWS, REPEATS, FAR = 1000, 20, 3, 100
HALF, SHARED, COLUMNS = (64, 256, 128, 10), 100, (5, 10, 20)
ASKED_MEMORY, ASKED_TIME, ASKED_OVERHEAD, ASKED_PREDICTION, ASKED_EQUAL = 0.1, 1.5, 1.1, 0.2, 1e-10


# --- The network ------------------------------------------------------------------------------------------


def digits(dtype=np.float32):
    """Training and validation batches."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, dtype), jnp.asarray(y[order])
    return {"x": x[:1000], "y": y[:1000]}, {"x": x[1000:], "y": y[1000:]}


def network(sizes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        {"w": jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), dtype), "b": jnp.zeros(b, dtype)}
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]


def loss(params, hparams, batch):
    del hparams
    x = batch["x"]
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    made = x @ params[-1]["w"] + params[-1]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(made, batch["y"]).mean()


PROBLEM = bilevel.Problem(loss, loss, constraints={"lr": bilevel.positive()})


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


# --- Growth -----------------------------------------------------------------------------------------------


def growth_row(name: str, rate: float, steps: int):
    """Growth, the derivative, differences, and whether they agree."""
    (train, valid), params, fn = digits(np.float64), network(SIZES, np.float64), growth_program(name, steps)

    def at(rate):
        return fn(params, {"lr": jnp.asarray(rate)}, train, valid)

    made, differences = at(rate), []
    for relative in DIFFERENCES:
        up, down = (at(rate * (1 + sign * relative)).value for sign in (1, -1))
        differences.append(float(up - down) / (2 * relative * rate))
    grad = float(made.grad["lr"])
    return float(made.growth), grad, differences, agree(grad, *differences)


def agree(*numbers: float) -> bool:
    """Within a percent of the largest."""
    return np.ptp(numbers) <= AGREE * np.max(np.abs(numbers))


@functools.cache
def growth_program(name: str, steps: int):
    """The jitted estimate, on the same minibatches in each call."""
    fn = bilevel.hypergradient(PROBLEM, bilevel.unrolled(bilevel.tuned(OPTIMIZERS[name]), steps))

    def estimate(params, hparams, train, valid):
        return fn(params, hparams, bilevel.minibatches(train, BATCH), valid, jax.random.key(0))

    return jax.jit(estimate)


def growth(horizons=HORIZONS, rates=RATES) -> None:
    rows, wrong, flagged_sgd = [], 0, 0
    with jax.enable_x64(True):
        for name, own in rates.items():
            for rate in own:
                for steps in horizons:
                    found, grad, differences, same = growth_row(name, rate, steps)
                    flagged = found > CHAOTIC
                    wrong += flagged == same
                    flagged_sgd += flagged and name != "adam"
                    rows.append(
                        (
                            f"{name}, {rate:g}", steps, f"{found:.2f}", f"{grad:.4g}",
                            *(f"{x:.4g}" for x in differences), "agree" if same else "part",
                            "flagged" if flagged else "", "" if flagged != same else "MISSED",
                        )
                    )  # fmt: skip
    header = ("", "steps", "growth", "reverse mode", "diff. 1e-4", "diff. 1e-3", "", "", "")
    table(header, rows)
    print(f"  flagged where they agree, or not where they part: {wrong} of {len(rows)}", end=" ")
    print(f"(asked 0, {verdict(wrong, 0)});", end=" ")
    print(f"flagged of SGD: {flagged_sgd} (asked 0, {verdict(flagged_sgd, 0)})")


# --- Cost -------------------------------------------------------------------------------------------------


INNER = bilevel.tuned(lambda h: optax.sgd(h["lr"], momentum=0.9))
OUTER = optax.adam(0.01)


def outer_method(steps: int, windows: int, remat: bool = True):
    per_step = {"lr": bilevel.schedules.windows(windows, steps)}
    return bilevel.alternating(
        bilevel.unrolled(per_step=per_step, remat=remat), INNER, OUTER, inner_steps=steps, restart=True
    )


def by_hand(steps: int, windows: int):
    """The jitted outer step ``(free, state, params, key, train, valid) -> (free, state, value)``."""
    length = next(n for n in range(round(steps**0.5), 0, -1) if steps % n == 0)

    def final_loss(free, params, key, train, valid):
        rates = jnp.repeat(jnp.exp(free), steps // windows)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(carry, moment):
            params, velocity = carry
            j, rate = moment
            chosen = jax.random.randint(jax.random.fold_in(key, j), (BATCH,), 0, train["y"].shape[0])
            grad = jax.grad(loss)(params, None, jax.tree.map(lambda x: x[chosen], train))
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grad)
            return (jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity), None

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def segment(carry, moments):
            return jax.lax.scan(step, carry, moments)

        moments = jnp.arange(steps), rates
        segments = jax.tree.map(lambda x: x.reshape(-1, length), moments)
        carry = params, jax.tree.map(jnp.zeros_like, params)
        (params, _), _ = jax.lax.scan(segment, carry, segments)
        return loss(params, None, valid)

    def outer_step(free, state, params, key, train, valid):
        value, grad = jax.value_and_grad(final_loss)(free, params, key, train, valid)
        updates, state = OUTER.update(grad, state, free)
        return optax.apply_updates(free, updates), state, value

    return outer_step


def cost(steps: int = STEPS, windows: int = WINDOWS, repeats: int = REPEATS) -> None:
    (train, valid), params = digits(), network(LARGE)
    hparams, key = {"lr": jnp.full(windows, 0.05)}, jax.random.key(0)
    batches = bilevel.minibatches(train, BATCH)
    calls, memory, to_compile = {}, {}, {}
    for remat in (True, False):
        name, method = f"remat={remat}", outer_method(steps, windows, remat)
        state = method.init(PROBLEM, params, hparams, batches, valid, key=key)
        program, to_compile[name] = compiled(
            lambda s, b, v, method=method: method.step(PROBLEM, s, b, v), state, batches, valid
        )
        memory[name] = temporary_megabytes(program)
        calls[name] = functools.partial(program, state, batches, valid)
    free = jnp.log(hparams["lr"])
    args = free, OUTER.init(free), params, key, train, valid
    program, to_compile["by hand"] = compiled(by_hand(steps, windows), *args)
    memory["by hand"], calls["by hand"] = temporary_megabytes(program), functools.partial(program, *args)
    times = interleaved(calls, repeats, time.process_time)
    remat, kept, hand = (times[name] for name in ("remat=True", "remat=False", "by hand"))
    rows = [
        (name, f"{memory[name]:.1f}", f"{np.median(own):.2f}", f"{to_compile[name]:.1f}")
        for name, own in times.items()
    ]
    size = f"{count(params):,} parameters, {BATCH} examples, {windows} rates"
    print(f"  an outer step: {steps} steps of {size}")
    table(("", "temporary MB", "CPU seconds", "to compile"), rows)
    share, slower = memory["remat=True"] / memory["remat=False"], ratio(remat, kept)
    overhead = ratio(remat, hand)
    for what, value, asked in (
        ("memory of remat=True, of all kept", share, ASKED_MEMORY),
        ("its time", slower, ASKED_TIME),
        ("remat=True of by hand, time", overhead, ASKED_OVERHEAD),
    ):
        print(f"  {what}: {value:.3f} (asked {asked}, {verdict(value, asked)})")


# --- Sharing ----------------------------------------------------------------------------------------------


def column_megabytes(params) -> float:
    """Floating numbers of params and optimiser state."""
    state = INNER.make({"lr": 0.1}).init(params)
    numbers = [x for x in jax.tree.leaves((params, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(x.nbytes for x in numbers) / 1e6


def windowed(kind, sizes, steps: int, n: int):
    """The compiled estimate of n windows and its arguments."""
    (train, valid), params = digits(), network(sizes)
    estimator = kind(INNER, steps, per_step={"lr": bilevel.schedules.windows(n, steps)})
    args = params, {"lr": jnp.full(n, 0.05)}, bilevel.minibatches(train, BATCH), valid, jax.random.key(0)
    return compiled(bilevel.hypergradient(PROBLEM, estimator), *args)[0], args


def sharing(steps: int = SHARED, columns=COLUMNS, repeats: int = 2) -> None:
    rows, copies = [], 0.0
    for sizes, n in (*((LARGE, n) for n in columns), (HALF, columns[1])):
        programs, calls = {}, {}
        for kind in (bilevel.forward, bilevel.unrolled):
            programs[kind], args = windowed(kind, sizes, steps, n)
            calls[kind] = functools.partial(programs[kind], *args)
        times = interleaved(calls, repeats, time.process_time)
        column = column_megabytes(network(sizes))
        forward, unrolled = (temporary_megabytes(program) for program in programs.values())
        measured_here = not copies
        copies = copies or forward / (n * column)  # Eq. (1)
        told = copies * n * column
        said = "gives c" if measured_here else verdict(abs(forward / told - 1), ASKED_PREDICTION)
        rows.append(
            (
                f"{count(network(sizes)):,}", n, f"{forward / (n * column):.2f}", f"{told:.1f}",
                f"{forward:.1f}", f"{forward / told:.2f}", said,
                f"{unrolled:.1f}", *(f"{np.median(times[kind]):.2f}" for kind in programs),
            )
        )  # fmt: skip
    print(f"  {steps} steps; copies: of params and optimiser state for each window")
    header = (
        "parameters", "windows", "copies", "predicted MB", "forward MB", "ratio", "", "unrolled MB", "CPU s",
        "unrolled, CPU s",
    )  # fmt: skip
    table(header, rows)
    error = shared_error()
    print(f"  gradient by windows less the sum of those by steps, float64: {error:.1e}", end=" ")
    print(f"(asked {ASKED_EQUAL:g}, {verdict(error, ASKED_EQUAL)})")


def shared_error(steps: int = 100, windows: int = 5) -> float:
    """Largest relative difference of the gradients of windows to the summed ones of their steps."""
    with jax.enable_x64(True):
        (train, valid), params = digits(np.float64), network(SIZES, np.float64)
        rates = jnp.linspace(0.05, 0.1, windows)

        def grad(estimator, lr):
            fn = jax.jit(bilevel.hypergradient(PROBLEM, estimator))
            batches = bilevel.minibatches(train, BATCH)
            return np.asarray(fn(params, {"lr": lr}, batches, valid, jax.random.key(0)).grad["lr"])

        per_step = {"lr": bilevel.schedules.windows(windows, steps)}
        shared = grad(bilevel.forward(INNER, steps, per_step=per_step), rates)
        stepwise = grad(
            bilevel.unrolled(INNER, steps, per_step={"lr": True}), jnp.repeat(rates, steps // windows)
        )
        summed = stepwise.reshape(windows, -1).sum(axis=1)
        return float(np.max(np.abs(shared - summed)) / np.max(np.abs(summed)))


# --- Persistent evolution strategies ----------------------------------------------------------------------

HORIZON = 500
NOTHING = np.zeros(1, np.float32)  # the toys have no data
LINEAR = bilevel.FixedPoint(lambda s, theta, _: 0.9 * s + theta, lambda s, theta, _: 0.5 * s**2)
TRUE, TRUNCATED = 288.71, 118.74
KINDS: dict[str, dict[str, Any]] = {
    "pes": {},
    "es (persistent=False)": {"persistent": False},
    "pes, analytic": {"analytic": True},
}
REPORTS_GRADIENT = optax.GradientTransformation(
    jnp.zeros_like, lambda grad, state, params=None: (jnp.zeros_like(grad), grad)
)


def linear_toy(settings: dict, particles: int, runs: int) -> tuple[float, float]:
    """Mean over runs, and its standard error, of the summed gradient of four truncations of five steps."""
    method = bilevel.alternating(
        bilevel.pes(20, particles, evaluations=5, **settings), None, REPORTS_GRADIENT, inner_steps=5
    )

    def one(key):
        state = method.init(LINEAR, jnp.float32(1), jnp.float32(0.3), NOTHING, NOTHING, key=key)
        state = dataclasses.replace(state, outer=jnp.float32(0))

        def step(state, _):
            state, _ = method.step(LINEAR, state, NOTHING, NOTHING)
            return state, state.outer

        return 20 * jnp.mean(jax.lax.scan(step, state, None, 4)[1])

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), runs)))
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(runs))


def balancing(n: int = 23, positive: int = 10):
    """Influence balancing: a chain whose first unit sees ``positive`` helpers at once and the rest later."""
    matrix = 0.5 * (jnp.eye(n) + jnp.eye(n, k=1))
    signs = jnp.where(jnp.arange(n) < positive, 1.0, -1.0)
    return bilevel.FixedPoint(
        lambda s, theta, _: matrix @ s + theta * signs, lambda s, theta, _: 0.5 * (s[0] - 1) ** 2
    )


def balanced(estimator, rate: float, steps: int) -> float:
    """The parameter after so many outer steps from 0.5; params go on where they were."""
    method = bilevel.alternating(estimator, None, optax.sgd(rate), inner_steps=estimator.steps)
    result = bilevel.optimize(
        balancing(), jnp.zeros(23), 0.5, NOTHING, NOTHING, method, steps, progress=False, keep_best=False
    )
    return float(result.hparams)


def best_balance(every: int, horizon: int | None) -> float:
    """What minimises the mean loss of all truncations of a horizon; None: the loss at the fixed point.

    There s_1 = 2 (10 - 13) theta; before it is a number of the step times theta.
    """
    if horizon is None:
        return -1 / 6
    problem, s, first = balancing(), jnp.zeros(23), []
    for t in range(1, horizon + 1):
        s = problem.update(s, 1.0, None)
        first += [float(s[0])] if t % every == 0 else []
    return float(np.sum(first) / np.sum(np.square(first)))


def height(x):
    """The slope to |x_1 - 100| with ripples near x_0 = 0."""
    ripples = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
    return jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5.0) + ripples + 0.25 * jnp.abs(x[1] - 100)


def surface(state, theta, _):
    """A step of descent; the logarithm of its rate goes from theta[0] to theta[1] in 100 steps."""
    share = state["t"] / (FAR - 1)
    rate = jnp.exp((1 - share) * theta[0] + share * theta[1])
    x = state["x"] - rate * jax.grad(height)(state["x"])
    return {"x": x, "t": state["t"] + 1, "sum": state["sum"] + height(x)}


ON_SURFACE = {"x": jnp.ones(2), "t": jnp.float32(0), "sum": jnp.float32(0)}
HIGH = bilevel.FixedPoint(surface, lambda state, theta, _: height(state["x"]))
MEAN = bilevel.FixedPoint(surface, lambda state, theta, _: state["sum"] / FAR)


@jax.jit
def mean_height(theta):
    """Over the whole horizon."""
    end = jax.lax.fori_loop(0, FAR, lambda _, state: surface(state, theta, None), ON_SURFACE)
    return end["sum"] / FAR


def descended(kind: str, first: tuple, steps: int):
    """Mean height before and after, the median growth, and theta."""
    outer, short = optax.adam(0.02), FAR // 10
    pes = functools.partial(bilevel.pes, FAR, 100, sigma=0.3, evaluations=short)
    problem, inner_steps, restart, estimator = {
        "unrolled": (MEAN, FAR, True, bilevel.unrolled()),
        "pes, truncations of 10": (HIGH, short, False, pes()),
        "es, truncations of 10": (HIGH, short, False, pes(persistent=False)),
    }[kind]
    method = bilevel.alternating(estimator, None, outer, inner_steps=inner_steps, restart=restart)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the growth, which is in the table
        result = bilevel.optimize(
            problem, ON_SURFACE, jnp.asarray(first), NOTHING, NOTHING, method, steps, progress=False,
            keep_best=False,
        )  # fmt: skip
    growth = np.median(result.history["growth"]) if kind == "unrolled" else np.nan
    theta = np.asarray(result.hparams)
    return float(mean_height(jnp.asarray(first))), float(mean_height(theta)), growth, theta, result.status


def strategies(particles: int = 1000, runs: int = 200, steps: int = 3000, on_surface: int = 3000) -> None:
    rows = []
    for name, settings in KINDS.items():
        mean, error = linear_toy(settings, particles, runs)
        expected = TRUNCATED if "persistent" in settings else TRUE
        off = abs(mean - expected) / error
        rows.append(
            (name, expected, f"{mean:.2f}", f"{error:.2f}", f"{off:.1f}", verdict(off, 3.0))
        )  # fmt: skip
    print(f"  linear toy, {runs} runs of {particles} particles: summed gradient")
    table(("", "expected", "mean", "standard error", "errors off", ""), rows)
    rows = []
    for name, estimator, converges in (
        ("unrolled, 1", bilevel.unrolled(steps=1), False),
        ("unrolled, 10", bilevel.unrolled(steps=10), False),
        ("unrolled, 100", bilevel.unrolled(steps=100), True),
        ("es, 10", bilevel.pes(HORIZON, 100, steps=10, persistent=False), False),
        ("pes, 1", bilevel.pes(HORIZON, 100, steps=1), True),
        ("pes, 10", bilevel.pes(HORIZON, 100, steps=10), True),
    ):
        best = best_balance(estimator.steps, getattr(estimator, "horizon", None))
        theta = balanced(estimator, 1e-4, steps)
        found = "converges" if abs(theta - best) < 0.1 else "wrong way" if theta > 0.5 else "elsewhere"
        said = "ok" if found == ("converges" if converges else "wrong way") else "MISSED"
        rows.append((name, f"{best:.3f}", f"{theta:.3f}", found, said))
    print(f"  influence balancing, {steps} steps of SGD from 0.5")
    table(("steps of a truncation", "best", "theta", "", "as expected"), rows)
    rows = []
    for first in ((-4.0, -4.0), (1.0, 0.0)):
        for kind in ("pes, truncations of 10", "es, truncations of 10", "unrolled"):
            before, after, growth, theta, status = descended(kind, first, on_surface)
            rows.append(
                (f"{first}, {kind}", f"{before:.2f}", f"{after:.2f}", f"{growth:.1f}", np.round(theta, 2),
                 status)
            )  # fmt: skip
    print(f"  the surface: mean height over {FAR} steps, {on_surface} outer steps")
    table(("from", "before", "after", "median growth", "theta", ""), rows)


STUDIES = {"growth": growth, "cost": cost, "sharing": sharing, "strategies": strategies}


def main(argv: Sequence[str] = ()) -> None:
    for name in argv or STUDIES:
        print(f"  -- {name}")
        STUDIES[name]()
        print(flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
