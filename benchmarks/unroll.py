"""Reverse mode through an inner loop: time against its length, memory with and without remat.

A network of 64, 32 and 10 units on 512 digits, trained by gradient steps with momentum; three log-L2
strengths, one of them for the output layer's biases. Memory is what the compiled program takes beyond its
arguments and results. The plain scan is written by hand; `remat=False` is the library's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import compiled, interleaved, ratio, table, temporary_megabytes, verdict

LENGTHS = (25, 50, 100, 200, 400, 800)
AT = 400
ASKED_MEMORY, ASKED_TIME = 0.05, 1.35
INNER = optax.sgd(0.05, momentum=0.9)
ADAM = optax.adam(1e-3, eps_root=1e-8)
FEW = 32
REPEATS, PAIRS = 3, 9


def cross_entropy(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"]["w"] + params["in"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def inner(params, log_l2, batch):
    squares = jnp.stack(
        [jnp.sum(params[k]["w"] ** 2) for k in ("in", "out")] + [jnp.sum(params["out"]["b"] ** 2)]
    )
    return cross_entropy(params, batch) + 0.5 * jnp.vdot(jnp.exp(log_l2), squares)


PROBLEM = bilevel.Problem(inner, lambda params, log_l2, batch: cross_entropy(params, batch))


@functools.cache
def arguments():
    """params, hparams, train and valid."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(digits.target.size)
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    weights = {"in": rng.standard_normal((64, 32)) / 8, "out": rng.standard_normal((32, 10)) / 6}
    params = {
        k: {"w": w.astype(np.float32), "b": np.zeros(w.shape[1], np.float32)} for k, w in weights.items()
    }
    train, valid = {"x": x[:512], "y": y[:512]}, {"x": x[512:1024], "y": y[512:1024]}
    return jax.tree.map(jnp.asarray, (params, np.full(3, -6.0, np.float32), train, valid))


def by_hand(params, log_l2, train, valid):
    """Value and gradient by a plain scan over the same steps."""

    def loss(log_l2):
        def step(carry, _):
            params, state = carry
            updates, state = INNER.update(jax.grad(inner)(params, log_l2, train), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, INNER.init(params)), length=AT)
        return cross_entropy(end, valid)

    return jax.value_and_grad(loss)(log_l2)


def program(estimator, args):
    """The compiled estimate."""
    return compiled(bilevel.hypergradient(PROBLEM, estimator), *args)[0]


def lengths():
    """Time of each length beside the line through all of them."""
    args = arguments()
    programs = {steps: program(bilevel.unrolled(INNER, steps), args) for steps in LENGTHS}
    times = interleaved({steps: functools.partial(p, *args) for steps, p in programs.items()}, REPEATS)
    median = np.array([np.median(times[steps]) for steps in LENGTHS])
    slope, fixed = np.polyfit(LENGTHS, median, 1, w=1 / median)
    rows = [
        (n, f"{t:.3f}", f"{1e3 * t / n:.2f}", f"{t / (fixed + slope * n):.2f}",
         f"{temporary_megabytes(programs[n]):.2f}")
        for n, t in zip(LENGTHS, median, strict=True)
    ]  # fmt: skip
    table(("steps, remat=True", "seconds", "ms per step", "of the line", "temporary MB"), rows)
    exponent = np.polyfit(np.log(LENGTHS), np.log(median), 1)[0]
    print(f"  the line: {1e3 * fixed:.1f} ms + {1e3 * slope:.2f} ms per step; asked: linear,", end=" ")
    print(f"found: steps to the power {exponent:.2f}")


def at_one_length():
    """Kinds of differentiation at the same length, timed in turn with the plain scan."""
    args = arguments()
    estimators = {
        "remat=True": bilevel.unrolled(INNER, AT),
        "remat=False": bilevel.unrolled(INNER, AT, remat=False),
        "truncate=40": bilevel.unrolled(INNER, AT, truncate=40),
        "truncate=40, remat=False": bilevel.unrolled(INNER, AT, truncate=40, remat=False),
        "forward, 3 hyperparameters": bilevel.forward(INNER, AT),
    }
    plain = "plain scan by hand"
    programs = {plain: compiled(by_hand, *args)[0]}
    programs |= {name: program(estimator, args) for name, estimator in estimators.items()}
    expected = programs[plain](*args)[1]
    for name in ("remat=True", "remat=False", "forward, 3 hyperparameters"):
        np.testing.assert_allclose(programs[name](*args).grad, expected, rtol=1e-3)
    times = interleaved({name: functools.partial(p, *args) for name, p in programs.items()}, PAIRS)
    megabytes = {name: temporary_megabytes(p) for name, p in programs.items()}
    slower = {name: ratio(times[name], times[plain]) for name in programs}
    rows = [
        (name, f"{megabytes[name]:.2f}", f"{megabytes[name] / megabytes[plain]:.1%}",
         f"{np.median(times[name]):.3f}", f"{slower[name]:.2f}")
        for name in programs
    ]  # fmt: skip
    table((f"{AT} steps", "temporary MB", "of plain", "seconds", "of plain"), rows)
    memory, time = megabytes["remat=True"] / megabytes[plain], slower["remat=True"]
    print(
        f"  remat=True: memory {memory:.1%} of the plain scan's (asked: at most {ASKED_MEMORY:.0%},", end=" "
    )
    print(f"{verdict(memory, ASKED_MEMORY)}), time {time:.2f} x", end=" ")
    print(f"(asked: at most {ASKED_TIME}, {verdict(time, ASKED_TIME)})")


def memory_with_few_examples():
    """Params and optimiser state weigh more beside the activations of fewer examples."""
    params, log_l2, train, valid = arguments()
    args = (params, log_l2, jax.tree.map(lambda x: x[:FEW], train), valid)
    rows = []
    for name, optimizer in (("sgd, momentum", INNER), ("adam", ADAM)):
        plain, remat = (
            temporary_megabytes(program(bilevel.unrolled(optimizer, AT, remat=remat), args))
            for remat in (False, True)
        )
        share = remat / plain
        rows.append(
            (name, f"{plain:.2f}", f"{remat:.2f}", f"{share:.1%}", f"{ASKED_MEMORY:.0%}",
             verdict(share, ASKED_MEMORY))
        )  # fmt: skip
    header = (
        f"{AT} steps, {FEW} examples",
        "remat=False, MB",
        "remat=True, MB",
        "share",
        "asked, at most",
        "",
    )
    table(header, rows)


def main():
    lengths()
    print()
    at_one_length()
    print()
    memory_with_few_examples()


if __name__ == "__main__":
    main()
