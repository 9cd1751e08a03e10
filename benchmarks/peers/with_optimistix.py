"""lineax for the linear system, optimistix for gradient descent with checkpoints."""

from __future__ import annotations

import jax
import lineax
import optimistix

from benchmarks.peers import in_jax
from benchmarks.peers.contract import TOLERANCES, solver_peer
from benchmarks.peers.in_jax import INNER, OUTER, learning_rate


def implicit(kind: str, steps: int, tol: float = 0.0):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        # optimistix's adjoint raises an error where CG ends at its last step; lineax can be told not to.
        solver = lineax.CG(rtol=tol, atol=0.0, max_steps=steps)
        operator = lineax.JacobianLinearOperator(
            lambda w, _: jax.grad(inner)(w, h, train), w, tags=lineax.positive_semidefinite_tag
        )
        v = lineax.linear_solve(operator, jax.grad(outer)(w, valid), solver, throw=False).value
        return -jax.vjp(lambda h: jax.grad(inner)(w, h, train), h)[1](v)[0]

    return call


def unrolled(kind: str, setting):
    steps, rate = setting
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        def end(h):
            found = optimistix.minimise(
                lambda w, h: inner(w, h, train),
                optimistix.GradientDescent(learning_rate(kind, h, rate), rtol=0.0, atol=0.0),
                w,
                h,
                max_steps=steps + 1,  # its first only evaluates
                adjoint=optimistix.RecursiveCheckpointAdjoint(),
                throw=False,
            )
            return outer(found.value, valid)

        return jax.grad(end)(h)

    return call


PEERS = (
    solver_peer(
        "optimistix, lineax",
        ("optimistix", "lineax", "jax"),
        in_jax,
        implicit,
        unrolled,
        (10.0, 3.0, 1.0, *TOLERANCES),  # it tests every entry by itself
    ),
)
