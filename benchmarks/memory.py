"""Memory of `optimize` at 10^7 parameters, against the same algorithm by hand.

A diagonal model, so that a step costs little: ``inner = mean(curvature (w - target)^2) / 2 + l2 |w|^2 / 2``;
one hyperparameter; Adam inside, conjugate gradients with a warm start, Adam outside. By hand: one jitted
program for the same outer steps, its state donated, nothing kept but the last pair.

Asked: with ``keep_best`` at most two copies of params and one optimiser state (two copies) beyond the program
by hand; without it one copy less. Two measures: arguments, results and temporaries of the compiled program;
and the peak of resident memory of a process of its own, less that of the same process with few parameters
(Linux only). In the latter one copy is that of the caller's params, which `optimize` leaves alone and the
program by hand takes over.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table, verdict

SIZE, SMALL = 10_000_000, 10
INNER_STEPS, OUTER_STEPS, CG_STEPS = 3, 4, 3
INNER, OUTER = optax.adam(0.1), optax.adam(0.1)
SOLVER = bilevel.cg(max_steps=CG_STEPS, tol=0.0)
METHOD = bilevel.alternating(bilevel.implicit(SOLVER), INNER, OUTER, inner_steps=INNER_STEPS)
VARIANTS = ("by hand", "keep_best=False", "keep_best=True")
ASKED = {"keep_best=False": 3, "keep_best=True": 4}  # copies of params; Adam's state is two


def valid_loss(w, hparams, batch):
    return 0.5 * jnp.mean((w - batch["b"]) ** 2)


def train_loss(w, hparams, batch):
    return 0.5 * jnp.mean(batch["c"] * (w - batch["a"]) ** 2) + 0.5 * hparams["l2"] * jnp.mean(w**2)


PROBLEM = bilevel.Problem(train_loss, valid_loss, constraints={"l2": bilevel.positive()})


def arguments(size: int):
    """params, hparams, train and valid, without a copy on the side."""

    @jax.jit
    def make():
        ramp = jnp.linspace(0.5, 1.5, size)
        return jnp.zeros(size), {"a": ramp, "c": 2.0 - ramp}, {"b": jnp.full(size, 0.8)}

    params, train, valid = make()
    return params, {"l2": jnp.float32(1.0)}, train, valid


# --- By hand -------------------------------------------------------------------------------------------


def first_state(params, hparams):
    log_l2 = jnp.log(hparams["l2"])
    return params, INNER.init(params), jnp.zeros_like(params), log_l2, OUTER.init(log_l2)


def conjugate_gradients(product, b, x):
    def step(_, carry):
        x, r, p, rr = carry
        ap = product(p)
        alpha = rr / jnp.vdot(p, ap)
        x, r = x + alpha * p, r - alpha * ap
        new = jnp.vdot(r, r)
        return x, r, r + new / rr * p, new

    r = b - product(x)
    return jax.lax.fori_loop(0, CG_STEPS, step, (x, r, r, jnp.vdot(r, r)))[0]


def outer_step(state, train, valid):
    params, inner_state, v, log_l2, outer_state = state
    hparams = {"l2": jnp.exp(log_l2)}

    def inner_step(_, carry):
        params, inner_state = carry
        grad = jax.grad(train_loss)(params, hparams, train)
        updates, inner_state = INNER.update(grad, inner_state, params)
        return optax.apply_updates(params, updates), inner_state

    params, inner_state = jax.lax.fori_loop(0, INNER_STEPS, inner_step, (params, inner_state))
    value, b = jax.value_and_grad(valid_loss)(params, hparams, valid)
    slope = jax.grad(train_loss)
    v = conjugate_gradients(lambda u: jax.jvp(lambda w: slope(w, hparams, train), (params,), (u,))[1], b, v)

    def along(log_l2):
        return jax.jvp(lambda w: train_loss(w, {"l2": jnp.exp(log_l2)}, train), (params,), (v,))[1]

    updates, outer_state = OUTER.update(-jax.grad(along)(log_l2), outer_state, log_l2)
    return (params, inner_state, v, optax.apply_updates(log_l2, updates), outer_state), value


def by_hand(state, train, valid, steps):
    return jax.lax.fori_loop(0, steps, lambda _, s: outer_step(s, train, valid)[0], state)


def run(variant: str, size: int) -> float:
    """A run of the variant; the hyperparameter that it ends with."""
    params, hparams, train, valid = arguments(size)
    if variant == "by hand":
        state = jax.jit(first_state, donate_argnums=0)(params, hparams)
        del params
        return float(np.exp(jax.jit(by_hand, donate_argnums=0)(state, train, valid, OUTER_STEPS)[3]))
    keep_best = variant == "keep_best=True"
    result = bilevel.optimize(
        PROBLEM, params, hparams, train, valid, METHOD, OUTER_STEPS, keep_best=keep_best, progress=False
    )
    return float(result.hparams["l2"])


# --- The compiled programs ----------------------------------------------------------------------------


def programs(variant: str, size: int):
    """The compiled step of a variant, at shapes alone."""
    from bilevel import data, loop

    shapes = jax.eval_shape(functools.partial(arguments, size))
    params, hparams, train, valid = shapes
    if variant == "by hand":
        state = jax.eval_shape(first_state, params, hparams)
        return jax.jit(by_hand, donate_argnums=0).lower(state, train, valid, OUTER_STEPS).compile()
    plan = loop.Plan(
        problem=PROBLEM,
        method=METHOD,
        capacity=512,
        judge_every=10,
        keep_best=variant == "keep_best=True",
        judges=False,
        tests=False,
        metrics=(),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    sources = data.Whole(train), data.Whole(valid)
    carry = loop.abstract_start(plan, params, hparams, key, *sources, None)
    stop, tol = np.int32(OUTER_STEPS), np.float64(-1.0)
    return loop.compiled(plan).lower(carry, stop, tol, *sources, None).compile()


def copies(program, size: int) -> tuple[float, ...]:
    """Arguments, results that are not arguments, and temporaries; in copies of params."""
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    parts = found.argument_size_in_bytes, results, found.temp_size_in_bytes
    return tuple(part / (4 * size) for part in parts)


# --- Resident memory ----------------------------------------------------------------------------------


def resident(module: str, variant: str, size: int) -> tuple[float, float]:
    """What ``run`` of a module finds in a fresh process, and its peak of resident memory in bytes."""
    # Not ru_maxrss: a new process inherits that of the one that started it.
    code = f"""
from pathlib import Path
from {module} import run
found = run({variant!r}, {size})
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(found, 1024 * int(peak[0].split()[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    value, peak = map(float, done.stdout.split())
    return value, peak


def main():
    parts = {variant: copies(programs(variant, SIZE), SIZE) for variant in VARIANTS}
    found = {variant: resident(__name__, variant, SIZE) for variant in VARIANTS}
    base = {variant: resident(__name__, variant, SMALL)[1] for variant in VARIANTS}
    peaks = {variant: (found[variant][1] - base[variant]) / (4 * SIZE) for variant in VARIANTS}
    rows = []
    for variant in VARIANTS:
        total, extra = sum(parts[variant]), sum(parts[variant]) - sum(parts["by hand"])
        above = peaks[variant] - peaks["by hand"]
        asked = ASKED.get(variant, 0)
        rows.append(
            (variant, *(f"{part:.1f}" for part in parts[variant]), f"{total:.1f}", f"{extra:+.1f}",
             verdict(extra, asked + 0.1), f"{peaks[variant]:.1f}", f"{above:+.1f}",
             verdict(above, asked + 0.1), asked, f"{found[variant][0]:.4f}")
        )  # fmt: skip
    print(f"  in copies of params ({4 * SIZE / 1e6:.0f} MB); the data are 3 of them")
    header = ("", "arguments", "results", "temporary", "program", "beyond", "", "resident", "beyond", "",
              "asked", "l2 at the end")  # fmt: skip
    table(header, rows)


if __name__ == "__main__":
    main()
