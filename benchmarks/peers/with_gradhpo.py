"""gradhpo: its greedy sum over the steps of a rollout."""

from __future__ import annotations

import gradhpo
import optax

from benchmarks.peers import cold
from benchmarks.peers.contract import Peer
from benchmarks.peers.in_jax import INNER, OUTER, arguments, learning_rate
from benchmarks.peers.instances import OUTER_RATE

NO_SYSTEM = "has no linear solver"


def unrolled(kind: str, setting):
    steps, rate = setting
    inner, outer = INNER[kind], OUTER[kind]
    own_rate, loss = rate, inner
    if kind == "rate":  # its optimiser cannot depend on h: the loss is scaled instead
        own_rate = 1.0

        def loss(w, h, batch):
            return learning_rate(kind, h, rate) * inner(w, h, batch)

    greedy = gradhpo.GreedyOptimizer(
        optax.sgd(own_rate), optax.adam(OUTER_RATE), unroll_steps=steps, gamma=1.0
    )

    def call(w, h, train, valid):
        return greedy.compute_hypergradient(
            greedy.init(w, h), train, valid, loss, lambda w, h, batch: outer(w, batch)
        )

    return call


def cold_run(kind: str, steps: int):
    """Its own step with as many inner steps as the others take."""
    inner, outer = INNER[kind], OUTER[kind]
    greedy = gradhpo.GreedyOptimizer(
        optax.sgd(cold.INNER_RATE[kind]), optax.adam(OUTER_RATE), unroll_steps=cold.INNER_STEPS
    )

    def valid_loss(w, h, batch):
        del h
        return outer(w, batch)

    def run(instance):
        w, h, train, valid = arguments(instance, "float32")
        state = greedy.init(w, h)

        def advance():
            nonlocal state
            state = greedy.step(state, train, valid, inner, valid_loss)
            return state.hyperparams

        return cold.looked(steps, advance)

    return run


PEERS = (
    Peer(
        name="gradhpo, greedy",
        packages=("gradhpo", "jax"),
        family="in_jax",
        tasks={"implicit": NO_SYSTEM, "unrolled": unrolled, "along": NO_SYSTEM, "cold": cold_run},
    ),
)
