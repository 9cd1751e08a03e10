"""What `bilevel.online` adds to a training loop: at most the hypergradient's share of a step.

One step of a loop of minibatches, compiled, with and without a tuner, on the digits: a two-layer network with
Adam and a weight decay for each layer. The loop without the tuner has the same losses with the decays as
constants. By itself the hypergradient is `bilevel.hypergradient` at the same point and batches. With
``every`` updates from one to the next, the ratio of the loops should be at most
``1 + hypergradient / (every * step)``; 5 % are left for noise. The loops run on the host, outside of vmap,
where both branches of the schedule would run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import interleaved, ratio, table, verdict

HIDDEN, BATCH, UPDATES, REPEATS, EVERY = 1024, 256, 40, 7, (1, 10)
NOISE = 1.05
INNER = optax.adam(1e-3, eps_root=1e-8)
ESTIMATORS = {
    "implicit(neumann(5, 1e-2))": bilevel.implicit(bilevel.neumann(5, 1e-2)),
    "implicit(cg(10))": bilevel.implicit(bilevel.cg(10, tol=0.0)),
    "one_step()": bilevel.one_step(),
    "look_back(5)": bilevel.look_back(5),
    "unrolled(steps=5)": bilevel.unrolled(steps=5),
}


def outer(params, hparams, batch):
    del hparams
    x, y = batch
    logits = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def inner(params, hparams, batch):
    decay = sum(hparams[name] * jnp.sum(params[name] ** 2) for name in ("in", "out"))
    return outer(params, hparams, batch) + 0.5 * decay


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())
HPARAMS = {"in": 1e-3, "out": 1e-3}


def batches():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, 6 * BATCH, BATCH)]


def first_params():
    rng = np.random.default_rng(0)
    shapes = {"in": (64, HIDDEN), "out": (HIDDEN, 10)}
    return {
        name: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def loop(step, first_state, data):
    """Run ``UPDATES`` steps from the same start."""
    params, state = first_params(), first_state
    for t in range(UPDATES):
        params, state = step(params, state, data[t % 5], data[5])
    return params


@jax.jit
def plain(params, state, train, valid):
    del valid
    updates, state = INNER.update(jax.grad(inner)(params, HPARAMS, train), state, params)
    return optax.apply_updates(params, updates), state


def tuned(tuner):
    @jax.jit
    def step(params, state, train, valid):
        grads = jax.grad(inner)(params, state.hparams, train)
        updates, state = tuner.update(grads, state, params, train=train, valid=valid)
        return optax.apply_updates(params, updates), state

    return step


def main() -> None:
    data, params = batches(), first_params()
    rows = []
    for name, estimator in ESTIMATORS.items():
        alone = estimator
        if estimator.trajectory:
            alone = type(estimator)(**{**vars(estimator), "inner": INNER, "steps": estimator.steps or 1})
        fn = jax.jit(bilevel.hypergradient(PROBLEM, alone))
        at = params, jax.tree.map(jnp.float32, HPARAMS), data[0], data[5]

        def hypergradients(fn=fn, at=at):
            return [fn(*at).grad for _ in range(UPDATES)]

        calls = {"plain": lambda: loop(plain, INNER.init(params), data), "alone": hypergradients}
        for every in EVERY:
            tuner = bilevel.online(
                PROBLEM, HPARAMS, inner=INNER, outer=optax.adam(1e-2), estimator=estimator, every=every
            )
            calls[every] = functools.partial(loop, tuned(tuner), tuner.init(params), data)
        times = interleaved(calls, REPEATS)
        cost = ratio(times["alone"], times["plain"])
        for every in EVERY:
            got, asked = ratio(times[every], times["plain"]), 1 + cost / every
            step = float(np.median(times["plain"])) / UPDATES
            rows.append(
                (name, every, f"{1e6 * step:.0f}", f"{cost:.2f}", f"{got:.2f}",
                 f"{asked:.2f}, {verdict(got, NOISE * asked)}")
            )  # fmt: skip
    table(("", "every", "us a step", "hypergradient / step", "ratio", "asked"), rows)


if __name__ == "__main__":
    main()
