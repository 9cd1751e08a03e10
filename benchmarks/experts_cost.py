"""One hypergradient of a Field of Experts, against the same work written by hand in JAX.

20 pictures of 96 x 96 and the 2,449 hyperparameters of 48 filters of 7 x 7: the outer gradient, a fixed
number of conjugate gradient steps and the cross product, in float64. The hand-written program has the
formulas of `bilevel.imaging` and the same number of products with the Hessian. It has no error bound, nor
has the library's that is compared with it; what the bound costs, mostly 60 products for the norm of the cross
derivative, is measured once and shown beside them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.measure import compiled, interleaved, ratio, seconds, table, verdict
from benchmarks.problems import pictures
from bilevel import imaging

PICTURES, SIZE, CG_STEPS, REPEATS = 20, 96, 20, 5
ASKED = 1.1
CERTIFIED = imaging.experts_denoising(PICTURES)
PROBLEM = dataclasses.replace(CERTIFIED, smoothness=None)
# A tolerance of 0 takes all of its steps.
ESTIMATOR = bilevel.implicit(bilevel.cg(max_steps=CG_STEPS, tol=0.0))


def energy(x, hparams, noisy):
    """The inner loss of one picture."""
    size = hparams["filters"].shape[-1]
    h, w = x.shape[0] - size + 1, x.shape[1] - size + 1
    patches = jnp.stack([x[i : i + h, j : j + w] for i in range(size) for j in range(size)], axis=-1)
    responses = patches @ hparams["filters"].reshape(-1, size * size).T
    roots = jnp.sqrt(responses**2 + hparams["smoothing"] ** 2)
    regulariser = jnp.vdot(hparams["weight"], jnp.sum(roots, axis=(0, 1)))
    return 0.5 * jnp.sum((x - noisy) ** 2) + hparams["strength"] * regulariser


def by_hand(params, hparams, train, valid):
    """Value and hypergradient."""

    def inner(params, hparams):
        return jnp.sum(jax.vmap(energy, in_axes=(0, None, 0))(params, hparams, train["noisy"]))

    def product(v):
        return jax.jvp(lambda p: jax.grad(inner)(p, hparams), (params,), (v,))[1]

    b = (params - valid["clean"]) / len(params)
    value = 0.5 * jnp.mean(jnp.sum((params - valid["clean"]) ** 2, axis=(1, 2)))

    def step(_, carry):
        x, r, p, rr = carry
        hp = product(p)
        alpha = rr / jnp.vdot(p, hp)
        x, r = x + alpha * p, r - alpha * hp
        new = jnp.vdot(r, r)
        return x, r, r + new / rr * p, new

    q, *_ = jax.lax.fori_loop(0, CG_STEPS, step, (jnp.zeros_like(b), b, b, jnp.vdot(b, b)))
    slope = jax.grad(lambda h: jax.jvp(lambda p: inner(p, h), (params,), (q,))[1])
    return value, jax.tree.map(jnp.negative, slope(hparams))


def by_library(problem):
    fn = bilevel.hypergradient(problem, ESTIMATOR)

    def estimate(*args):
        found = fn(*args)
        return found.value, found.grad, found.error

    return estimate


def instance():
    """``(params, hparams, data, data)``; params are the noisy pictures, slightly denoised."""
    each = PICTURES // len(pictures.TRAINING)
    clean = pictures.crops(pictures.TRAINING, SIZE, each, seed=0, scale=0.6)  # the smallest is 172 high
    data = {"noisy": pictures.noisy(clean, 0.1, seed=1), "clean": clean}
    return jax.tree.map(
        jnp.asarray, (0.5 * (data["noisy"] + clean), imaging.first_experts(jax.random.key(0)), data, data)
    )


def main() -> None:
    with jax.enable_x64(True):
        args = instance()
        programs, building = {}, {}
        for name, fn in (
            ("bilevel.hypergradient", by_library(PROBLEM)),
            ("by hand", by_hand),
            ("bilevel.hypergradient with its error bound", by_library(CERTIFIED)),
        ):
            programs[name], building[name] = compiled(fn, *args)
        *compared, certified = programs
        times = interleaved({name: lambda name=name: programs[name](*args) for name in compared}, REPEATS)
        times[certified] = np.array([seconds(programs[certified], *args)])
        ours, theirs = (programs[name](*args) for name in compared)
        table(
            (f"{PICTURES} pictures of {SIZE} x {SIZE}, {CG_STEPS} CG steps", "seconds", "to compile"),
            [(name, f"{np.median(t):.2f}", f"{building[name]:.1f}") for name, t in times.items()],
        )
        found = ratio(times["bilevel.hypergradient"], times["by hand"])
        print(f"  ratio to the hand-written program: {found:.3f} (asked: {ASKED}, {verdict(found, ASKED)})")
        size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(theirs[1]))
        apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))) / size, ours[:2], theirs)
        print(f"  largest relative difference of the hypergradients: {max(jax.tree.leaves(apart[1])):.1e}")


if __name__ == "__main__":
    main()
