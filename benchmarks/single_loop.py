"""One outer step of two stochastic presets against the same written by hand in JAX.

Logistic regression with one penalty for each of 100 features, 2,000 rows at each level, batches of 64. The
programs by hand draw the same number of batches from the same sources. All run ``STEPS`` steps as one
program, without the host; they take turns. Beside them the same through `bilevel.optimize`, whose cost for a
call is spread over the steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import interleaved, ratio, table, verdict

ROWS, FEATURES, BATCH, STEPS, REPEATS = 2000, 100, 64, 10_000, 7
RATE, TERMS, INNER_STEPS = 0.1, 10, 10
ASKED = 1.1


def cross_entropy(w, batch):
    return optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]).mean()


def inner(w, h, batch):
    return cross_entropy(w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2)


def outer(w, h, batch):
    del h
    return cross_entropy(w, batch)


PROBLEM = bilevel.Problem(inner, outer)


def sources():
    """Minibatches of both levels."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(FEATURES)

    def level():
        x = rng.standard_normal((ROWS, FEATURES))
        y = rng.random(ROWS) < 1 / (1 + np.exp(-x @ w))
        return bilevel.minibatches((jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), BATCH)

    return level(), level()


def hvp(w, h, v, batch):
    return jax.jvp(lambda w: jax.grad(inner)(w, h, batch), (w,), (v,))[1]


def cross(w, h, v, batch):
    return jax.grad(lambda h: jax.jvp(lambda w: inner(w, h, batch), (w,), (v,))[1])(h)


def by_hand(body):
    """A program of ``STEPS`` times ``body(t, draw, valid, carry)``."""

    def program(w, h, key, train, valid):
        key_train, key_valid = jax.random.split(key)

        def step(t, carry):
            def draw(j):
                return train.batch(key_train, t * 32 + j)

            return body(draw, valid.batch(key_valid, t), carry)

        return jax.lax.fori_loop(0, STEPS, step, (w, h, jnp.zeros_like(w)))

    return jax.jit(program)


def soba_by_hand(draw, valid, carry):
    w, h, v = carry
    b, direct = jax.grad(outer, argnums=(0, 1))(w, h, valid)
    return (
        w - RATE * jax.grad(inner)(w, h, draw(0)),
        h - RATE * (direct - cross(w, h, v, draw(2))),
        v - RATE * (hvp(w, h, v, draw(1)) - b),
    )


def stocbio_by_hand(draw, valid, carry):
    w, h, unused = carry
    w = jax.lax.fori_loop(0, INNER_STEPS, lambda j, w: w - RATE * jax.grad(inner)(w, h, draw(j)), w)
    b, direct = jax.grad(outer, argnums=(0, 1))(w, h, valid)

    def factor(k, carry):
        power, total = carry
        power = power - RATE * hvp(w, h, power, draw(INNER_STEPS + k))
        return power, total + power

    _, total = jax.lax.fori_loop(1, TERMS, factor, (b, b))
    return w, h - RATE * (direct - cross(w, h, RATE * total, draw(INNER_STEPS))), unused


def by_us(method):
    def program(w, h, key, train, valid):
        state = method.init(PROBLEM, w, h, train, valid, key=key)

        def step(_, state):
            return method.step(PROBLEM, state, train, valid)[0]

        return jax.lax.fori_loop(0, STEPS, step, state).hparams

    return jax.jit(program)


def main() -> None:
    args = jnp.zeros(FEATURES), jnp.full(FEATURES, -4.0), jax.random.key(0), *sources()
    w, h, _, train, valid = args
    sgd = optax.sgd(RATE)
    methods = {
        "soba": (bilevel.soba(sgd, sgd, RATE), soba_by_hand),
        "stocbio": (bilevel.stocbio(sgd, sgd, RATE, TERMS, INNER_STEPS), stocbio_by_hand),
    }
    rows = []
    for name, (method, body) in methods.items():
        hand, ours = by_hand(body), by_us(method)

        def driver(method=method):
            return bilevel.optimize(
                PROBLEM, w, h, train, valid, method, STEPS, progress=False, keep_best=False,
                judge_every=STEPS,
            ).hparams  # fmt: skip

        calls = {
            "hand": lambda hand=hand: hand(*args),
            "step": lambda ours=ours: ours(*args),
            "optimize": driver,
        }
        times = interleaved(calls, REPEATS)
        got, whole = (ratio(times[one], times["hand"]) for one in ("step", "optimize"))
        each = [f"{1e6 * np.median(times[one]) / STEPS:.1f}" for one in calls]
        rows.append((name, *each, f"{got:.2f} (asked: {ASKED}, {verdict(got, ASKED)})", f"{whole:.2f}"))
    table(("us a step", "by hand", "method.step", "optimize", "step / by hand", "optimize / by hand"), rows)


if __name__ == "__main__":
    main()
