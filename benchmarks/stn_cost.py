"""A training step of STN and of Delta-STN against an ordinary one of the same network, and their memory.

The networks are those of `benchmarks.problems.regularised`; the bars are for the convolutional one. All take
``STEPS`` training steps as one program; a step of Delta-STN is one of params and one of the response. The one
validation step at the end of each program is counted in.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

import bilevel
from benchmarks.measure import interleaved, ratio, table, verdict
from benchmarks.problems import regularised

STEPS, REPEATS = 20, 9
ASKED = {"stn": 2.2, "delta_stn": 4.0}
ASKED_MEMORY = 2.5
INNER, OUTER = optax.sgd(0.05, 0.9), optax.adam(1e-2)
METHODS = {
    "stn": bilevel.stn(INNER, OUTER, STEPS),
    "delta_stn": bilevel.delta_stn(INNER, OUTER, STEPS),
}


def ordinary(task):
    """As many plain steps."""

    def step(t, at):
        params, state = at
        batch = task.train.batch(jax.random.key(0), t)
        grads = jax.grad(task.problem.inner)(params, task.hparams, batch)
        updates, state = INNER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda at: jax.lax.fori_loop(0, STEPS, step, at))


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
    for name in ("digits", "language"):
        task = regularised.TASKS[name](0)
        begun = task.params, INNER.init(task.params)
        calls = {"ordinary": functools.partial(ordinary(task), begun)}
        memory = {}
        for arm, method in METHODS.items():
            args = task.params, jax.tree.map(jnp.float32, task.hparams), task.train, task.valid
            state = method.init(task.problem, *args, key=jax.random.key(0))
            step = jax.jit(functools.partial(method.step, task.problem))
            calls[arm] = functools.partial(step, state, task.train, task.valid)
            response = state.estimator.response
            memory[arm] = (size(task.params) + size(response)) / size(task.params)
        times = interleaved(calls, REPEATS)
        print(f"\n  {name}: {size(task.params):,} params, {len(task.hparams)} hyperparameters")
        rows = []
        for arm in METHODS:
            slower = ratio(times[arm], times["ordinary"])
            rows.append(
                (
                    arm,
                    f"{1e3 * times[arm].min() / STEPS:.2f} ms",
                    f"{slower:.2f}",
                    verdict(slower, ASKED[arm]) if name == "digits" else "",
                    f"{memory[arm]:.2f}",
                    verdict(memory[arm], ASKED_MEMORY),
                )
            )
        table(("a training step", "time", "times an ordinary one", "", "params with response", ""), rows)
        print(f"  an ordinary step: {1e3 * times['ordinary'].min() / STEPS:.2f} ms")
