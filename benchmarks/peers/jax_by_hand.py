"""Hand-written JAX: conjugate gradients and reverse mode through a scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.peers import in_jax
from benchmarks.peers.contract import Peer, solver_peer
from benchmarks.peers.in_jax import INNER, OUTER, learning_rate


def implicit(kind: str, steps: int):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        gradient = jax.grad(inner)
        b = jax.grad(outer)(w, valid)

        def step(_, carry):
            x, r, p, rr = carry
            ap = jax.jvp(lambda w: gradient(w, h, train), (w,), (p,))[1]
            alpha = rr / jnp.maximum(jnp.vdot(p, ap), 1e-30)
            x, r = x + alpha * p, r - alpha * ap
            new = jnp.vdot(r, r)
            return x, r, r + new / jnp.maximum(rr, 1e-30) * p, new

        v = jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, jnp.vdot(b, b)))[0]
        return -jax.grad(lambda h: jax.jvp(lambda w: inner(w, h, train), (w,), (v,))[1])(h)

    return call


def unroller(remat: bool):
    def unrolled(kind: str, setting):
        steps, rate = setting
        inner, outer = INNER[kind], OUTER[kind]

        def call(w, h, train, valid):
            def end(h):
                size = learning_rate(kind, h, rate)

                def step(w, _):
                    return w - size * jax.grad(inner)(w, h, train), None

                body = jax.checkpoint(step, prevent_cse=False) if remat else step
                return outer(jax.lax.scan(body, w, length=steps)[0], valid)

            return jax.grad(end)(h)

        return call

    return unrolled


PEERS = (
    solver_peer("JAX by hand", ("jax",), in_jax, implicit, unroller(False)),
    Peer(
        name="JAX by hand, remat",
        packages=("jax",),
        family="in_jax",
        tasks={
            "implicit": "the same as without remat",
            "unrolled": unroller(True),
            "along": "the same as without remat",
            "cold": "the same as without remat",
        },
    ),
)
