"""What data-parallel hypergradients move between devices, counted in the compiled programs.

Eight virtual CPU devices; examples are sharded over a mesh axis, params and hparams are on every device. The
model is a network of tanh layers with P parameters, E of them weights beyond the first layer; its H
hyperparameters are a log penalty for each layer and a scale for each input, the S scales being those that act
on the data. Counted are the bytes of each all-reduce of the optimised program, times the iterations of its
loop, against

* a formula in these numbers, which has to hold but for REMAINDER bytes;
* a program by hand: `jax.shard_map` with one explicit sum over devices of a flat vector for each gradient,
  each Hessian-vector product and each cross derivative;
* the library in `jax.shard_map`, its losses averaged by `bilevel.pmean`.

In a Hessian-vector product the part of a weight matrix beyond the first layer is the sum of two products over
examples. With sharded arrays XLA reduces each before it adds them, E numbers more, however the product is
formed: by forward over reverse mode, reverse over forward or reverse over reverse. The compiler for CPUs
leaves it at that; the one for GPUs has a pass that adds first, AllReduceReassociate, not measured here. In
`jax.shard_map` the sum over devices is after the addition from the beginning.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel
from benchmarks.collectives import Collective, collectives, moved
from benchmarks.measure import table, verdict

DEVICES = 8
LAYERS, WIDTH, ROWS = 4, 32, 1024
STEPS = 10  # of conjugate gradients, of the series, of the inner loop
RANK = 5
RATE = 0.1
REMAINDER = 64  # bytes
ONE, DATA = PartitionSpec(), PartitionSpec("data")


# --- The problem ---------------------------------------------------------------------------------------


def layers(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return (x @ params[-1]["w"] + params[-1]["b"][None])[:, 0]


def network(params, hparams, batch):
    return layers(params, batch["x"] * hparams["scale"][None])


def misfit(outputs, hparams, batch):
    del hparams
    return 0.5 * jnp.mean((outputs - batch["y"]) ** 2)


def penalty(params, hparams):
    parts = [jnp.exp(hparams["l2"][i]) * squared_norm(layer) for i, layer in enumerate(params)]
    return 0.5 * sum(parts)


def squared_norm(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def outer(params, hparams, batch):
    return misfit(network(params, hparams, batch), hparams, batch)


PROBLEM = bilevel.Problem(bilevel.composite(network, misfit, penalty), outer)


def arrays(depth: int = LAYERS, width: int = WIDTH, rows: int = ROWS, dtype=np.float32):
    """``(params, hparams, train, valid)`` on the host."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    sizes = [width] * depth + [1]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    params = [{"w": normal(a, b) / np.sqrt(a).astype(dtype), "b": 0.1 * normal(b)} for a, b in pairs]
    # Penalties with which the Hessian is positive definite here.
    hparams = {"l2": np.zeros(depth, dtype), "scale": 1 + 0.1 * normal(width)}
    train, valid = ({"x": normal(rows, width), "y": normal(rows)} for _ in range(2))
    return jax.tree.map(lambda x: x.astype(dtype), (params, hparams, train, valid))


def mesh_of(*shape: int, names=("data",)):
    devices = np.prod(shape)
    auto = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=auto, devices=jax.devices()[:devices])


def placed(mesh, params, hparams, *data):
    """Params and hparams on every device, examples sharded."""
    both = jax.device_put((params, hparams), NamedSharding(mesh, ONE))
    return *both, *jax.device_put(data, NamedSharding(mesh, DATA))


# --- The library -----------------------------------------------------------------------------------------

CG = bilevel.cg(STEPS, tol=0.0)
SGD = optax.sgd(RATE)
ESTIMATORS = {
    "cg": bilevel.implicit(CG),
    "gauss_newton": bilevel.implicit(CG, curvature="gauss_newton"),
    "neumann": bilevel.implicit(bilevel.neumann(STEPS, RATE)),
    "nystrom": bilevel.implicit(bilevel.nystrom(RANK, 0.1)),
    "unrolled": bilevel.unrolled(SGD, STEPS),
    "unrolled, no remat": bilevel.unrolled(SGD, STEPS, remat=False),
    "forward": bilevel.forward(SGD, STEPS),
    "one_step": bilevel.one_step(SGD),
}
METHOD = bilevel.alternating(ESTIMATORS["cg"], SGD, optax.adam(0.01), inner_steps=STEPS)
LOOP = STEPS + 1  # products of CG at most: one for the start


def estimate(estimator, problem=PROBLEM):
    """``(value, gradient)`` of the hypergradient; the measured error is part of the program."""
    fn = bilevel.hypergradient(problem, estimator)

    def found(*args):
        result = fn(*args)
        return result.value, result.grad, result.error

    return found


def mapped(fn, mesh):
    """``fn(params, hparams, train, valid)`` by `jax.shard_map`."""
    return jax.shard_map(fn, mesh=mesh, in_specs=(ONE, ONE, DATA, DATA), out_specs=ONE)


def averaged(estimator, mesh):
    return mapped(estimate(estimator, bilevel.pmean(PROBLEM, "data")), mesh)


class Sizes(NamedTuple):
    """Numbers: of params, of weights beyond the first layer and in it, of hparams and of scales."""

    params: int
    beyond: int
    first: int
    hparams: int
    scales: int


def sizes_of(params, hparams) -> Sizes:
    weights = [layer["w"].size for layer in params]
    counts = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, hparams)]
    return Sizes(counts[0], sum(weights[1:]), weights[0], counts[1], hparams["scale"].size)


def numbers(name: str, sizes: Sizes, steps: int = STEPS) -> int:
    """What an estimate moves, in numbers, by the formula."""
    p, e, first, h, s = sizes
    gradient, product = 1 + p + s, p + e  # of the outer loss with its value; with the Hessian
    last = product + s  # H v for the error, and the cross product
    return {
        "cg": gradient + (steps + 1) * product + last,
        "gauss_newton": gradient + (steps + 1) * p + p + s,
        "neumann": gradient + (steps - 1) * product + last,
        "nystrom": gradient + RANK * product + product + last,
        "unrolled": gradient + 2 * steps * p + steps * last,
        "unrolled, no remat": gradient + steps * p + steps * last,
        "forward": steps * (p + h * (product + first)) + 1 + h,
        "one_step": gradient + p + s,
        "step": steps * p + gradient + (steps + 1) * product + last,
    }[name]


# --- By hand -------------------------------------------------------------------------------------------


class Local:
    """Flat vectors and losses of one device of the axis "data"; sums over it are explicit."""

    def __init__(self, params, hparams, train, valid):
        self.w, self.to_params = ravel_pytree(params)
        self.h, self.to_hparams = ravel_pytree(hparams)
        self.train, self.valid = train, valid

    def inner(self, w, h):
        return PROBLEM.inner(self.to_params(w), self.to_hparams(h), self.train) / jax.lax.axis_size("data")

    def outer(self, w, h):
        return PROBLEM.outer(self.to_params(w), self.to_hparams(h), self.valid) / jax.lax.axis_size("data")

    def slope(self, w, h, v):
        """Of this device's inner loss along ``v``."""
        return jax.jvp(lambda w: self.inner(w, h), (w,), (v,))[1]

    @staticmethod
    def total(*parts):
        """Sums over devices, of all parts in one."""
        vector, back = ravel_pytree(parts)
        return back(jax.lax.psum(vector, "data"))

    def step(self, w):
        """An inner step."""
        return w - RATE * self.total(jax.grad(self.inner)(w, self.h))[0]

    def outer_at(self, w):
        """Value and both gradients."""
        value, grads = jax.value_and_grad(self.outer, argnums=(0, 1))(w, self.h)
        return self.total(value, *grads)

    def product(self, w, v):
        return self.total(jax.jvp(lambda w: jax.grad(self.inner)(w, self.h), (w,), (v,))[1])[0]


def hand_implicit(inner_steps: int = 0):
    """Inner steps, then the hypergradient by conjugate gradients from a warm start."""

    def found(*args):
        here = Local(*args)
        w = jax.lax.fori_loop(0, inner_steps, lambda _, w: here.step(w), here.w)
        value, b, direct = here.outer_at(w)

        def cg_step(_, carry):
            x, r, p, rr = carry
            ap = here.product(w, p)
            alpha = rr / jnp.vdot(p, ap)
            x, r = x + alpha * p, r - alpha * ap
            new = jnp.vdot(r, r)
            return x, r, r + new / rr * p, new

        x = jnp.zeros_like(b)  # in a method the last solution
        r = b - here.product(w, x)
        x = jax.lax.fori_loop(0, STEPS, cg_step, (x, r, r, jnp.vdot(r, r)))[0]
        (cross,) = here.total(jax.grad(here.slope, argnums=1)(w, here.h, x))
        return value, here.to_hparams(direct - cross)

    return found


def hand_unrolled(*args):
    """Inner steps, then back through all of them; every point is kept."""
    here = Local(*args)
    end, points = jax.lax.scan(lambda w, _: (here.step(w), w), here.w, length=STEPS)
    value, alpha, grad = here.outer_at(end)

    def back(carry, w):
        alpha, grad = carry
        product, cross = here.total(*jax.grad(here.slope, argnums=(0, 1))(w, here.h, alpha))
        return (alpha - RATE * product, grad - RATE * cross), None

    (_, grad), _ = jax.lax.scan(back, (alpha, grad), points, reverse=True)
    return value, here.to_hparams(grad)


# No derivative is taken of a sum over devices here, so that nothing has to be tracked.
BY_HAND = {
    "cg": hand_implicit(),
    "unrolled, no remat": hand_unrolled,
    "step": hand_implicit(inner_steps=STEPS),
}


def hand_mapped(name: str, mesh):
    specs = (ONE, ONE, DATA, DATA)
    return jax.shard_map(BY_HAND[name], mesh=mesh, in_specs=specs, out_specs=ONE, check_vma=False)


def hand_numbers(name: str, sizes: Sizes) -> int:
    """What the program by hand moves, in numbers: flat vectors, with all hparams."""
    p, _, _, h, _ = sizes
    implicit = (1 + p + h) + (STEPS + 1) * p + h
    return {
        "cg": implicit,
        "unrolled, no remat": STEPS * p + (1 + p + h) + STEPS * (p + h),
        "step": STEPS * p + implicit,
    }[name]


# --- Examples with hyperparameters of their own -------------------------------------------------------


def squares(params, batch):
    """Of each example; no scales."""
    return 0.5 * (layers(params, batch["x"]) - batch["y"]) ** 2


def validation_loss(params, hparams, batch):
    del hparams
    return jnp.mean(squares(params, batch))


def weighted(params, hparams, batch):
    """The weights as a whole: each is where its example is."""
    return jnp.mean(hparams["weight"] * squares(params, batch)) + 0.5 * squared_norm(params)


def looked_up(params, hparams, batch):
    """The weights by number of the example."""
    return jnp.mean(hparams["weight"][batch["i"]] * squares(params, batch)) + 0.5 * squared_norm(params)


WEIGHTED = bilevel.Problem(weighted, validation_loss)
LOOKED_UP = bilevel.Problem(looked_up, validation_loss)


def with_weights(mesh, depth: int = LAYERS, width: int = WIDTH, rows: int = ROWS, dtype=np.float32):
    """``(params, hparams, train, valid)``: one weight for each example, sharded like the examples."""
    params, _, train, valid = arrays(depth, width, rows, dtype)
    data = {"weight": np.ones(rows, dtype)}, {**train, "i": np.arange(rows, dtype=np.int32)}, valid
    return jax.device_put(params, NamedSharding(mesh, ONE)), *jax.device_put(data, NamedSharding(mesh, DATA))


def batch_of(source):
    """``(fn, key, t)``: the batch of a source as a compiled function has it."""
    return (lambda source, key, t: source.batch(key, t)), source, jax.random.key(0), jnp.int32(3)


# --- Layouts of params ----------------------------------------------------------------------------------


def layouts(params, devices: int = DEVICES):
    """Of each layout ``(mesh, sharding of params)``."""
    data, both = mesh_of(devices), mesh_of(devices // 2, 2, names=("data", "model"))

    def rows_split(x):
        return NamedSharding(data, DATA if x.shape[0] % devices == 0 else ONE)

    def halves(i, layer):
        """Columns of even layers and rows of odd ones, so that outputs meet once in two layers."""
        columns = i % 2 == 0 and layer["w"].shape[1] > 1
        w, b = (PartitionSpec(None, "model"), PartitionSpec("model")) if columns else (("model",), ())
        return {"w": NamedSharding(both, PartitionSpec(*w)), "b": NamedSharding(both, PartitionSpec(*b))}

    return {
        "replicated": (data, NamedSharding(data, ONE)),
        "sharded like examples": (data, jax.tree.map(rows_split, params)),
        "data x model": (both, [halves(i, layer) for i, layer in enumerate(params)]),
    }


def in_layout(mesh, sharding, params, hparams, *data):
    return jax.device_put(params, sharding), *placed(mesh, (), hparams, *data)[1:]


def largest_difference(got, expected) -> float:
    """Relative to the largest entry expected, over all leaves."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    return max(float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in pairs)


# --- Tables ----------------------------------------------------------------------------------------------


def reduces(found: list[Collective]) -> str:
    """All-reduces outside of loops + inside."""
    inside = [bool(c.loops) for c in found if c.op == "all-reduce"]
    return f"{inside.count(False)} + {inside.count(True)}"


def cells(found: list[Collective]) -> tuple:
    """All-reduces outside of loops and inside, others, bytes and the largest."""
    others = sum(c.op != "all-reduce" for c in found)
    largest = max((c.bytes for c in found), default=0)
    return reduces(found), others, f"{moved(found, LOOP):,}", f"{largest:,}"


def program_of_step(mesh, *args):
    """A whole outer step and its arguments."""
    state = METHOD.init(PROBLEM, *args, key=jax.random.key(0))
    state = jax.device_put(state, NamedSharding(mesh, ONE))
    return lambda state, train, valid: METHOD.step(PROBLEM, state, train, valid), state, *args[2:]


def estimators_table() -> None:
    mesh = mesh_of(DEVICES)
    args = placed(mesh, *arrays())
    sizes = sizes_of(*args[:2])
    p, e, _, h, s = sizes
    print(f"  P = {p}, E = {e}, H = {h}, S = {s}; {STEPS} steps of solvers and inner loops")
    programs = {name: (estimate(estimator), *args) for name, estimator in ESTIMATORS.items()}
    programs["step"] = program_of_step(mesh, *args)
    rows = []
    for name, program in programs.items():
        found = collectives(*program)
        asked = 4 * numbers(name, sizes)
        left = moved(found, LOOP) - asked
        assert abs(left) <= REMAINDER, (name, left, found)
        assert all(c.op == "all-reduce" for c in found), (name, found)
        hand = explicit = "-"
        if name in BY_HAND:
            by_hand = collectives(hand_mapped(name, mesh), *args)
            assert moved(by_hand) == 4 * hand_numbers(name, sizes), (name, by_hand)
            hand = f"{moved(by_hand):,} ({reduces(by_hand)})"
        if name in ESTIMATORS and name != "gauss_newton":  # pmean keeps no structure of a loss
            explicit = f"{moved(collectives(averaged(ESTIMATORS[name], mesh), *args), LOOP):,}"
        rows.append((name, *cells(found), f"{asked:,}", f"{left:+d}", hand, explicit))
    table(("", "all-reduces", "others", "bytes", "largest", "formula", "", "by hand", "pmean"), rows)


def examples_table() -> None:
    mesh = mesh_of(DEVICES)
    cg = ESTIMATORS["cg"]
    params, hparams, train, valid = placed(mesh, *arrays())
    weights = with_weights(mesh)
    odd = jax.device_put(arrays(rows=1000 * DEVICES)[2], NamedSharding(mesh, DATA))

    def sampled(arrays, strata):
        return bilevel.minibatches(arrays, 8 * DEVICES, strata=strata)

    programs = {
        "weights as a whole": (estimate(cg, WEIGHTED), *weights),
        "weights looked up": (estimate(cg, LOOKED_UP), *weights),
        "a batch, strata=1": batch_of(sampled(train, 1)),
        f"a batch, strata={DEVICES}": batch_of(sampled(train, DEVICES)),
        f"a batch of {1000 * DEVICES} rows, strata={DEVICES}": batch_of(sampled(odd, DEVICES)),
        "hypergradient, strata=1": (estimate(cg), params, hparams, sampled(train, 1), valid),
        f"hypergradient, strata={DEVICES}": (estimate(cg), params, hparams, sampled(train, DEVICES), valid),
        f"weights looked up, strata={DEVICES}": (
            *(estimate(cg, LOOKED_UP), *weights[:2]),
            *(sampled(weights[2], DEVICES), weights[3]),
        ),
    }
    print(f"  cg, {ROWS} examples, weights of their own {4 * ROWS:,} bytes; batches of {8 * DEVICES}")
    rows = [(name, *cells(collectives(*program))) for name, program in programs.items()]
    table(("", "all-reduces", "others", "bytes", "largest"), rows)


def layouts_table() -> None:
    host = arrays(dtype=np.float64)
    rows = []
    for name in ("cg", "unrolled"):
        fn = estimate(ESTIMATORS[name])
        expected = jax.tree.map(np.asarray, jax.jit(fn)(*host)[:2])
        for layout, (mesh, sharding) in layouts(host[0]).items():
            args = in_layout(mesh, sharding, *host)
            error = largest_difference(jax.jit(fn)(*args)[:2], expected)
            against = f"{error:.0e}", verdict(error, 1e-10)
            rows.append((f"{name}, {layout}", *cells(collectives(fn, *args)), *against))
    table(("float64", "all-reduces", "others", "bytes", "largest", "against one device", ""), rows)


def extrapolated(params: float = 1e9, devices: int = 256, bandwidth: float = 50e9) -> None:
    """A ring all-reduce sends 2 (n - 1) / n times the bytes from each device."""
    ring = 2 * (devices - 1) / devices * 4 * params
    print(f"  {params:.0e} parameters on {devices} devices, float32, a ring at {bandwidth / 1e9:.0f} GB/s:")
    rows = []
    for name, vectors, more in (
        ("an inner step", 1, 0),
        (f"hypergradient, K = {STEPS}", STEPS + 3, STEPS + 2),
        (f"outer step, {STEPS} inner", 2 * STEPS + 3, STEPS + 2),
        (f"unrolled, T = {STEPS}", 3 * STEPS + 1, STEPS),
    ):
        cells = [f"{x:.{digits}f}" for n in (vectors, vectors + more)
                 for x, digits in ((n * ring / 1e9, 0), (n * ring / bandwidth, 1))]  # fmt: skip
        rows.append((name, vectors, *cells))
    table(("", "vectors of P", "GB a device", "s", "GB, E = P", "s"), rows)


def report() -> None:
    estimators_table()
    examples_table()
    with jax.enable_x64(True):
        layouts_table()
    extrapolated()


def main() -> None:
    """In a process of its own: the number of devices is settled when JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    code = "from benchmarks.communication import report; report()"
    sys.stdout.flush()
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


if __name__ == "__main__":
    main()
