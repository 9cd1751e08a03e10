"""The losses in JAX, and compiled calls of functions of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from benchmarks.peers import cold
from benchmarks.peers.contract import Case
from benchmarks.peers.instances import CG_STEPS, L2, OUTER_RATE, Instance


def logistic_inner(w, h, batch):
    return logistic_outer(w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2)


def logistic_outer(w, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def cross_entropy(w, batch):
    x, y = batch
    logits = x @ w
    picked = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def cleaning_inner(w, h, batch):
    return jnp.mean(jax.nn.sigmoid(h) * cross_entropy(w, batch)) + 0.5 * L2 * jnp.sum(w**2)


def cleaning_outer(w, batch):
    return jnp.mean(cross_entropy(w, batch))


def rate_inner(w, h, batch):
    del h  # the update rule has it
    return logistic_outer(w, batch) + 0.5 * L2 * jnp.sum(w**2)


INNER = {"logistic": logistic_inner, "cleaning": cleaning_inner, "rate": rate_inner}
OUTER = {"logistic": logistic_outer, "cleaning": cleaning_outer, "rate": logistic_outer}


def learning_rate(kind: str, h, given: float):
    """That of gradient descent; where it is learned, the one given does not matter."""
    return jnp.exp(h) if kind == "rate" else given


def along(maker: Callable[[str, int], Callable]):
    """Of a maker for the task "implicit": one point after the other, as one program."""

    def made(kind: str, setting):
        fn = maker(kind, setting)
        return lambda ws, hs, train, valid: jax.lax.map(lambda wh: fn(*wh, train, valid), (ws, hs))

    return made


def outer_run(maker: Callable[[str, int], Callable]):
    """Of a maker for the task "implicit": the usual fixed schedule, one jitted outer step after the other."""

    def made(kind: str, steps: int):
        hypergradient, adam = maker(kind, CG_STEPS), optax.adam(OUTER_RATE)
        inner, rate = INNER[kind], cold.INNER_RATE[kind]

        @jax.jit
        def outer_step(w, h, state, train, valid):
            w = jax.lax.fori_loop(
                0, cold.INNER_STEPS, lambda _, w: w - rate * jax.grad(inner)(w, h, train), w
            )
            found = hypergradient(w, h, train, valid)
            updates, state = adam.update(found, state)
            return w, optax.apply_updates(h, updates), state

        def run(instance: Instance):
            w, h, train, valid = arguments(instance, "float32")
            state = adam.init(h)

            def advance():
                nonlocal w, h, state
                w, h, state = outer_step(w, h, state, train, valid)
                return h

            return cold.looked(steps, advance)

        return run

    return made


def arguments(instance: Instance, dtype: str):
    """``(w, h, train, valid)`` on the device."""

    def floating(x):
        return jnp.asarray(x, dtype)

    train = floating(instance.x), jnp.asarray(instance.y, jnp.int32)
    valid = floating(instance.valid_x), jnp.asarray(instance.valid_y, jnp.int32)
    return floating(instance.w), floating(instance.h), train, valid


def prepared(fn: Callable, instance: Instance, dtype: str) -> Case:
    """Compiled for these arguments. Of a tuple that ``fn`` returns the first is the answer."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    args = jax.block_until_ready(arguments(instance, dtype))
    # A new function: nothing that was compiled before serves.
    program, seconds = measure.compiled(functools.partial(fn), *args)

    def call():
        out = program(*args)
        return np.asarray(out[0] if isinstance(out, tuple) else out)

    return Case(call, seconds, measure.temporary_megabytes(program))
