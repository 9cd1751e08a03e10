"""jaxopt: implicit differentiation as its users write it, and its unrolled gradient descent."""

from __future__ import annotations

import functools

import jax
from jaxopt import GradientDescent, implicit_diff, linear_solve

from benchmarks.peers import in_jax
from benchmarks.peers.contract import TOLERANCES, solver_peer
from benchmarks.peers.in_jax import INNER, OUTER, learning_rate


def implicit_by(solve):
    def implicit(kind: str, steps: int, tol: float = 0.0):
        inner, outer = INNER[kind], OUTER[kind]

        def call(w, h, train, valid):
            def optimality(w, h):
                return jax.grad(inner)(w, h, train)

            @implicit_diff.custom_root(optimality, solve=functools.partial(solve, maxiter=steps, tol=tol))
            def solver(init, h):
                del h
                return init

            return jax.grad(lambda h: outer(solver(w, h), valid))(h)

        return call

    return implicit


def unrolled(kind: str, setting):
    steps, rate = setting
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        def end(h):
            solver = GradientDescent(
                inner,
                # Only a function of the step may be traced.
                stepsize=rate if kind != "rate" else lambda _: learning_rate(kind, h, rate),
                maxiter=steps,
                tol=0.0,
                acceleration=False,
                implicit_diff=False,
                unroll=True,
            )
            return outer(solver.run(w, h, train).params, valid)

        return jax.grad(end)(h)

    return call


def peer(name: str, solve, unrolled, tolerances):
    return solver_peer(name, ("jaxopt", "jax"), in_jax, implicit_by(solve), unrolled, tolerances)


PEERS = (
    peer("jaxopt", linear_solve.solve_cg, unrolled, TOLERANCES),
    peer(
        "jaxopt, default solver",
        linear_solve.solve_normal_cg,
        "the same as with any linear solver",
        (*TOLERANCES, 2e-5, 1e-5, 5e-6),  # its residual is that of the normal equations
    ),
)
