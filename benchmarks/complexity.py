"""Examples that single-loop methods touch to an accuracy, on a smooth strongly convex problem.

A jointly quadratic problem with finite sums at both levels, whose hypergradient is known exactly. The error
is the squared norm of it at the hyperparameters of each step. SOBA's steps are fixed, or fall like
``1 / sqrt(t)`` or ``1 / t``; those of SABA and SRBA are fixed. On log-log axes the first falls along straight
lines, of slope -1/2 and -1 in the long run; the others leave every line: they lose a constant factor with
each pass.

Examples are those of inner and outer gradients, Hessian-vector and cross products, added up. Medians of three
seeds.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.curves import save
from benchmarks.measure import table

ROWS, PARAMS, HPARAMS, BATCH, STEPS = 1024, 10, 5, 16, 60_000
RATE, SEEDS = 0.05, (0, 1, 2)
TARGETS = (1e-2, 1e-4, 1e-8, 1e-12)
# What the methods touch before their first step: three oracles of one level and one of the other, or one.
FIRST_PASS = {"Saba": 4 * ROWS, "Srba": ROWS}
FIGURE = Path(__file__).parent / "results" / "complexity.png"


def inner(w, u, batch):
    return 0.5 * jnp.mean((batch["a"] @ w - batch["b"] - batch["c"] @ u) ** 2)


def outer(w, u, batch):
    return 0.5 * jnp.mean((batch["a"] @ w - batch["b"]) ** 2) + 0.05 * u @ u


PROBLEM = bilevel.Problem(inner, outer)


def instance() -> tuple[dict, dict]:
    """Rows of both levels; eigenvalues of the inner Hessian are close to one."""
    rng = np.random.default_rng(0)

    def level(n):
        a = rng.standard_normal((n, PARAMS))
        c = 0.5 * rng.standard_normal((n, HPARAMS)) + 0.5 * a[:, :HPARAMS]
        return {"a": a, "b": a @ np.ones(PARAMS) + rng.standard_normal(n), "c": c}

    train, valid = level(ROWS), level(ROWS)
    valid.pop("c")
    return jax.tree.map(jnp.asarray, (train, valid))


def exact(train, valid):
    """``u -> squared norm of the hypergradient``."""
    a, b, c = (np.asarray(train[name]) for name in "abc")
    v, e = np.asarray(valid["a"]), np.asarray(valid["b"])
    back = np.linalg.solve(a.T @ a, a.T)

    def squared(u):
        w = back @ (b + c @ u)
        return np.sum((0.1 * u + (back @ c).T @ v.T @ (v @ w - e) / len(e)) ** 2)

    return squared


def falling(power: float):
    return lambda t: 2 * RATE / (1 + t / 200) ** power


def arms() -> dict:
    """Methods by name."""
    root, inverse = falling(0.5), falling(1.0)
    single = optax.sgd(RATE), optax.sgd(RATE), RATE
    return {
        "soba, fixed steps": bilevel.soba(*single),
        "soba, 1/sqrt(t)": bilevel.soba(optax.sgd(root), optax.sgd(root), root),
        "soba, 1/t": bilevel.soba(optax.sgd(inverse), optax.sgd(inverse), inverse),
        "saba, fixed steps": bilevel.saba(*single),
        "srba, fixed steps": bilevel.srba(*single),
    }


def run(method, train, valid, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples touched before some steps, and the error at them."""
    sources = (bilevel.minibatches(part, BATCH, fixed=True) for part in (train, valid))
    train, valid = sources
    key = jax.random.key(seed)
    state = method.init(PROBLEM, jnp.zeros(PARAMS), jnp.ones(HPARAMS), train, valid, key=key)

    def body(state, _):
        after, info = method.step(PROBLEM, state, train, valid)
        return after, (info.hparams, sum(info.counts))

    _, (path, touched) = jax.jit(lambda s: jax.lax.scan(body, s, None, length=STEPS))(state)
    places = np.unique(np.geomspace(1, STEPS - 1, 400).astype(int))
    examples = FIRST_PASS.get(type(method).__name__, 0) + np.cumsum(np.asarray(touched, np.float64))
    return examples[places - 1], np.asarray(path)[places]


def slope(examples, errors) -> float:
    """Of the logarithms, over the last factor of ten of the examples; as far as rounding."""
    last = examples[np.flatnonzero(errors > 1e-24)[-1]]
    late = (examples > last / 10) & (examples <= last)
    return float(np.polyfit(np.log(examples[late]), np.log(errors[late]), 1)[0])


def main() -> None:
    with jax.enable_x64(True):
        study()


def study() -> None:
    train, valid = instance()
    squared, curves, rows = exact(train, valid), {}, []
    for name, method in arms().items():
        errors = []
        for seed in SEEDS:
            examples, path = run(method, train, valid, seed)
            errors.append([squared(u) for u in path])
        error = np.maximum(np.median(errors, axis=0), 1e-30)
        curves[name] = examples, error
        reached = [examples[np.argmax(error <= t)] if (error <= t).any() else None for t in TARGETS]
        rows.append(
            (name, f"{slope(examples, error):.2f}", *("-" if n is None else f"{n:.1e}" for n in reached),
             f"{error[-1]:.0e}")
        )  # fmt: skip
    header = ("method", "slope", *(f"examples to {t:.0e}" for t in TARGETS), "last error")
    table(header, rows)
    draw(curves, FIGURE)
    print(f"  figure: {FIGURE}")


def draw(curves: dict, path: Path) -> None:
    """Error against examples."""

    def plot(ax):
        for name, (examples, error) in curves.items():
            ax.loglog(examples, error, label=name)
        ax.set_ylim(1e-20, None)

    title = "single-loop methods on a strongly convex problem"
    save(path, title, "examples touched", "squared norm of the exact hypergradient", plot)


if __name__ == "__main__":
    main()
