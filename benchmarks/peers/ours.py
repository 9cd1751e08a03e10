"""`bilevel`: its estimators, and what they return beside the gradient."""

from __future__ import annotations

import functools
import time

import jax
import numpy as np
import optax

import bilevel
from benchmarks.peers import cold
from benchmarks.peers.contract import MOST_STEPS, TOLERANCES, Peer
from benchmarks.peers.in_jax import INNER, OUTER, arguments, learning_rate
from bilevel.defaults import default_method
from bilevel.problem import Draw, Estimate, Point


def everything(found: Estimate):
    """What an estimate has of use beside the gradient: the outer loss and the residual that was measured."""
    return found.grad, found.value, found.error


def gradient_alone(found: Estimate):
    """What most peers return; the compiler leaves out what only the rest needs."""
    return found.grad


@functools.cache
def problem(kind: str) -> bilevel.Problem:
    return bilevel.Problem(INNER[kind], lambda w, h, batch: OUTER[kind](w, batch))


def estimated(kind: str, estimator, returned=everything):
    fn = bilevel.hypergradient(problem(kind), estimator)
    return lambda w, h, train, valid: returned(fn(w, h, train, valid))


def implicit(returned):
    def made(kind: str, steps: int):
        return estimated(kind, bilevel.implicit(bilevel.cg(max_steps=steps, tol=0.0)), returned)

    return made


def unroller(remat):
    def unrolled(kind: str, setting):
        steps, rate = setting
        inner = bilevel.tuned(lambda h: optax.sgd(learning_rate(kind, h, rate)))
        return estimated(kind, bilevel.unrolled(inner, steps, remat=remat))

    return unrolled


def along(returned):
    """Each system from where the last solutions point to until its residual is small."""

    def made(kind: str, tol: float):
        linear = bilevel.cg(max_steps=MOST_STEPS, tol=tol, follow=True)
        estimator, own = bilevel.implicit(linear), problem(kind)

        def call(ws, hs, train, valid):
            draw, key = Draw(lambda j: train, 1, False), jax.random.key(0)

            def step(state, point):
                w, h = point
                found, state = estimator.estimate(own, state, Point(w), h, draw, valid, key)
                return state, returned(found)

            first = estimator.init(own, Point(ws[0]), hs[0])
            return jax.lax.scan(step, first, (ws, hs))[1]

        return call

    return made


def cold_run(kind: str, steps: int):
    """The default, whose outer steps are three times as bold as those of the others: a third as many.

    Hyperparameters on the way are those of a repetition, which goes the same way.
    """
    own, steps = problem(kind), steps // 3

    def run(instance):
        w, h, train, valid = arguments(instance, "float32")
        began = time.monotonic()
        seconds = bilevel.optimize(own, w, h, train, valid, steps=steps, progress=False).history["seconds"]
        method = default_method(own, train)
        state = method.init(own, w, h, train, valid, key=jax.random.key(0))
        advance = jax.jit(lambda state: method.step(own, state, train, valid)[0])
        looks, hs = cold.looks(len(seconds)), []
        for step in range(1, looks[-1] + 1):
            state = advance(state)
            if step in looks:
                hs.append(np.asarray(state.hparams))
        return began + seconds[looks - 1], hs

    return run


def unrolling(name: str, remat) -> Peer:
    """What differs with another ``remat``."""
    same = "the same with any remat"
    tasks = {"implicit": same, "unrolled": unroller(remat), "along": same, "cold": same}
    return Peer(name=name, packages=("jax",), family="in_jax", tasks=tasks)


PEERS = (
    Peer(
        name="bilevel",
        packages=("jax",),
        family="in_jax",
        tasks={
            "implicit": implicit(everything),
            "unrolled": unroller(True),
            "along": along(everything),
            "cold": cold_run,
        },
        settings=TOLERANCES,
    ),
    unrolling("bilevel, remat='steps'", "steps"),
    unrolling("bilevel, remat=False", False),
    Peer(
        name="bilevel, gradient alone",
        packages=("jax",),
        family="in_jax",
        tasks={
            "implicit": implicit(gradient_alone),
            "unrolled": "the same: there the outer loss costs nothing, and no system is solved",
            "along": along(gradient_alone),
            "cold": "the same as with the rest",
        },
        settings=TOLERANCES,
    ),
)
