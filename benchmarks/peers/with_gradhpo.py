"""gradhpo: its greedy sum over the steps of a rollout."""

from __future__ import annotations

import time

import gradhpo
import numpy as np
import optax

from benchmarks.peers import cold
from benchmarks.peers.contract import Peer
from benchmarks.peers.in_jax import INNER, OUTER, arguments

NO_SYSTEM = "has no linear solver"


def unrolled(kind: str, setting):
    steps, rate = setting
    inner, outer = INNER[kind], OUTER[kind]
    greedy = gradhpo.GreedyOptimizer(optax.sgd(rate), optax.adam(0.1), unroll_steps=steps, gamma=1.0)

    def call(w, h, train, valid):
        return greedy.compute_hypergradient(
            greedy.init(w, h), train, valid, inner, lambda w, h, batch: outer(w, batch)
        )

    return call


def cold_run(kind: str, steps: int):
    """Its own step with as many inner steps as the others take."""
    inner, outer = INNER[kind], OUTER[kind]
    greedy = gradhpo.GreedyOptimizer(
        optax.sgd(cold.INNER_RATE[kind]), optax.adam(cold.OUTER_RATE), unroll_steps=cold.INNER_STEPS
    )

    def valid_loss(w, h, batch):
        del h
        return outer(w, batch)

    def run(instance):
        w, h, train, valid = arguments(instance, "float32")
        state, times, hs, wanted = greedy.init(w, h), [], [], set(cold.looks(steps).tolist())
        for step in range(1, steps + 1):
            state = greedy.step(state, train, valid, inner, valid_loss)
            if step in wanted:
                hs.append(np.asarray(state.hyperparams))
                times.append(time.monotonic())
        return times, hs

    return run


PEERS = (
    Peer(
        name="gradhpo, greedy",
        packages=("gradhpo", "jax"),
        family="in_jax",
        tasks={"implicit": NO_SYSTEM, "unrolled": unrolled, "along": NO_SYSTEM, "cold": cold_run},
    ),
)
