"""What `bilevel.optimize` adds to learning the strengths of unrolled EM, against JAX by hand; and memory.

100 steps of training over 150 tasks of 10 steps of EM, on the digits: a scan over steps, mapped over tasks,
``value_and_grad`` and Adam, 21 numbers in logarithms. By hand it is one jitted loop that keeps nothing but
hyperparameters, with the same equations written in few lines: features are scaled once, the sum over the
support is taken once, and no argument is checked. "by hand, library step" has `bilevel.em.gaussian_step` in
its place, so that what is left to the next line is what the estimator, the method and the history cost.
Runs take turns in one process after a first one of each; the bar is for remat=False, as by hand every step is
kept. Seconds are CPU seconds, for a process that is pinned to one core beside others. Compilation is that of
the program by hand, and of `optimize` the whole of a first call with one step. Memory is what a compiled
hypergradient takes beyond arguments and results.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import few_shot
from benchmarks.measure import compiled, interleaved, ratio, seconds, table, temporary_megabytes, verdict
from benchmarks.problems.few_shot import digits
from bilevel import em

SHOTS, REPEATS = 1, 5
ASKED, ASKED_COMPILE = 1.1, 5.0
DEPTHS = (10, 20, 40, 80)
PROBLEM = few_shot.problem("gaussian", SHOTS)
cpu_seconds = functools.partial(seconds, clock=time.process_time)


def first(steps: int) -> dict:
    """Strengths at the start."""
    prior_weight, temperature, scale = few_shot.FIRST["gaussian"]
    hparams = {"prior_weight": jnp.full(steps, prior_weight), "temperature": jnp.full(steps, temperature)}
    return hparams | {"scale": jnp.asarray(scale)}


# --- By hand ----------------------------------------------------------------------------------------------


def short(hparams, batch, truth):
    """Loss of one task, in few lines."""
    support, query = hparams["scale"] * batch["support"], hparams["scale"] * batch["query"]
    known = jax.nn.one_hot(batch["labels"], 10)
    sums, counts = known.T @ support, known.sum(axis=0)

    def step(carry, strengths):
        centers, log_prior, _ = carry
        prior_weight, temperature = strengths
        d = query @ centers.T - 0.5 * jnp.sum(centers**2, axis=1)[None]
        log_u = jax.nn.log_softmax((d + prior_weight * log_prior[None]) / temperature, axis=1)
        u = jnp.exp(log_u)
        centers = (sums + u.T @ query) / (counts + u.sum(axis=0))[:, None]
        return (centers, jnp.log(u.mean(axis=0) + 1e-6), log_u), None

    begun = sums / counts[:, None], jnp.zeros(10), jnp.zeros((query.shape[0], 10))
    (_, _, log_u), _ = jax.lax.scan(step, begun, (hparams["prior_weight"], hparams["temperature"]))
    return -jnp.mean(jnp.take_along_axis(log_u, truth["labels"][:, None], axis=1))


def with_library_step(hparams, batch, truth):
    """The same with the step of the library."""

    def step(params, strengths):
        return em.gaussian_step(params, {**strengths, "scale": hparams["scale"]}, batch), None

    strengths = {name: hparams[name] for name in few_shot.PER_STEP}
    params, _ = jax.lax.scan(step, em.gaussian_init(batch, 10, hparams["scale"]), strengths)
    return em.query_loss(params, hparams, truth)[0]


def mean_loss(task, free, train, valid):
    hparams = jax.tree.map(jnp.exp, free)
    return jnp.mean(jax.vmap(functools.partial(task, hparams))(train, valid))


def by_hand(task):
    """The jitted ``(free, train, valid) -> (free, loss)`` after all steps."""

    def run(free, train, valid):
        def step(_, carry):
            free, state, _ = carry
            value, grad = jax.value_and_grad(functools.partial(mean_loss, task))(free, train, valid)
            updates, state = few_shot.OUTER.update(grad, state, free)
            return optax.apply_updates(free, updates), state, value

        start = free, few_shot.OUTER.init(free), jnp.float32(0)
        free, _, value = jax.lax.fori_loop(0, few_shot.STEPS, step, start)
        return free, value

    return jax.jit(run)


# --- Measured ---------------------------------------------------------------------------------------------


def optimize(remat: bool, tasks, steps: int = few_shot.STEPS):
    return bilevel.optimize(
        PROBLEM, None, first(few_shot.LAYERS), *tasks, method(remat), steps, progress=False
    )


@functools.cache
def method(remat: bool):
    return few_shot.method(bilevel.unrolled(per_step=few_shot.PER_STEP, remat=remat))


def memory(tasks, remat: bool, steps: int) -> float:
    """Of a hypergradient, megabytes."""
    estimator = bilevel.unrolled(steps=steps, per_step=few_shot.PER_STEP, remat=remat)
    fn = bilevel.hypergradient(PROBLEM, estimator)
    program, _ = compiled(lambda h, train, valid: fn(None, h, train, valid).grad, first(steps), *tasks)
    return temporary_megabytes(program)


def memory_by_hand(tasks, steps: int) -> float:
    fn = jax.grad(functools.partial(mean_loss, short))
    program, _ = compiled(fn, jax.tree.map(jnp.log, first(steps)), *tasks)
    return temporary_megabytes(program)


def main() -> None:
    tasks = jax.tree.map(jnp.asarray, digits(0, SHOTS).valid)
    free = jax.tree.map(jnp.log, first(few_shot.LAYERS))
    compile_seconds, calls = {}, {}
    for name, task in (("by hand", short), ("by hand, library step", with_library_step)):
        program = by_hand(task)
        compile_seconds[name] = cpu_seconds(lambda p=program: p.lower(free, *tasks).compile() and None)
        calls[name] = functools.partial(program, free, *tasks)
    for remat in (False, True):
        once = functools.partial(optimize, remat, tasks, 1)
        compile_seconds[f"remat={remat}"] = cpu_seconds(lambda once=once: once().hparams)
        calls[f"remat={remat}"] = lambda remat=remat: optimize(remat, tasks).hparams
    times = interleaved(calls, REPEATS, time.process_time)
    rows = []
    for name, spent in times.items():
        slower, to_compile = ratio(spent, times["by hand"]), compile_seconds[name]
        same = ratio(spent, times["by hand, library step"])
        said = verdict(slower, ASKED) if name == "remat=False" else ""
        rows.append(
            (
                name, f"{np.median(spent):.2f} s", f"{slower:.2f}", said, f"{same:.2f}",
                f"{to_compile:.1f} s", verdict(to_compile, ASKED_COMPILE),
            )
        )  # fmt: skip
    table(("100 steps", "median", "times by hand", "", "times library step", "to compile", ""), rows)
    rows = []
    for steps in DEPTHS:
        kept, again = (memory(tasks, remat, steps) for remat in (False, True))
        rows.append((steps, f"{memory_by_hand(tasks, steps):.0f}", f"{kept:.0f}", f"{again:.0f}"))
    print("  temporary megabytes of a hypergradient")
    table(("steps of EM", "by hand", "remat=False", "remat=True"), rows)


if __name__ == "__main__":
    main()
