"""How much memory a run takes, read from its compiled program before it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import loop
from bilevel.preparation import Given, prepare
from bilevel.problem import FixedPoint, Method, Problem


@dataclasses.dataclass(frozen=True, repr=False)
class Memory:
    """Bytes that a run holds on each device while it steps.

    ``data``: training, validation and test arrays. ``state``: what goes from step to step (params, optimiser
    and estimator states, the best pair, buffers of history). ``temporaries``: what a step needs beside them.
    ``given``: params and hparams as they were given, which stay the caller's. ``device``: what there is, None
    where the device does not say; on CPU the memory of the machine, all virtual devices together.
    """

    data: int
    state: int
    temporaries: int
    given: int
    device: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.data + self.state + self.temporaries + self.given

    @property
    def fits(self) -> bool:
        """Whether the device has as much, as far as it says."""
        return self.device is None or self.total <= self.device

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name} {_readable(getattr(self, name))}" for name in ("data", "state", "temporaries", "given")
        )
        device = "" if self.device is None else f" of {_readable(self.device)}"
        return f"Memory({_readable(self.total)}{device} per device: {parts})"


def memory(
    problem: Problem | FixedPoint,
    method: Method | None,
    params,
    hparams,
    train,
    valid,
    *,
    mesh=None,
    test=None,
    constraints=None,
    model_state=None,
    population=None,
    judge_every: int = 10,
    keep_best: bool = True,
) -> Memory:
    """The memory that `bilevel.optimize` would take, from the compiled program's own analysis.

    Compiles, but computes nothing: arrays may be `jax.ShapeDtypeStruct`, those of a `bilevel.minibatches`
    too, so that what would not fit can be asked for.

    Args:
      problem: this and the following as for `bilevel.optimize`.
      method: None for the default.
      params: arrays or shapes; so are hparams, train, valid, test and model_state.
      hparams: see params.
      train: see params; no iterable.
      valid: see params; no iterable.
      mesh: devices to place data on.
      test: a third split.
      constraints: replaces the problem's.
      model_state: mutable model state.
      population: members to run in one program.
      judge_every: as for `bilevel.optimize`.
      keep_best: as for `bilevel.optimize`.

    Raises:
      TypeError, ValueError: an argument is wrong.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, x: jnp.mean((x @ w - 1) ** 2) + jnp.sum(h * w**2),
      ...     outer=lambda w, h, x: jnp.mean((x @ w - 1) ** 2),
      ... )
      >>> weights = jax.ShapeDtypeStruct((1_000_000,), jnp.float32)
      >>> rows = jax.ShapeDtypeStruct((100, 1_000_000), jnp.float32)
      >>> bilevel.memory(problem, None, weights, weights, rows, rows).data
      800000000
    """
    with contextlib.ExitStack() as stack:
        given = Given(
            problem, method, params, hparams, train, valid, None, mesh, test, constraints, model_state,
            population, judge_every, keep_best,
        )  # fmt: skip
        ready = prepare(stack, given)
        if ready.feeds:
            raise TypeError("train and valid must be arrays, shapes or minibatches here, not an iterable.")
        carry = ready.abstract_carry()
        if ready.plan.layout is not None:
            carry = jax.tree.map(_on, carry, ready.plan.layout.tree())
        return analysed(ready.plan, (carry, *_BOUNDS, *ready.sources, ready.test), ready.arguments[:2])


_BOUNDS = np.int32(0), np.float64(0)


def analysed(plan: loop.Plan, arguments: tuple, given: Any) -> Memory:
    """The memory of a plan's program on these arguments; compiles it, if need be.

    Args:
      plan: of the run.
      arguments: of `loop.compiled`: the carry, two bounds, sources.
      given: arrays that the caller holds beside them.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    known = _temporaries(plan, treedef, tuple(map(_described, leaves)))
    if not known:
        program = loop.compiled(plan).lower(*arguments).compile()
        numbers: Any = program.memory_analysis()
        outputs = numbers.output_size_in_bytes - numbers.alias_size_in_bytes
        known.append(numbers.temp_size_in_bytes + max(outputs, 0))
    return Memory(
        data=_bytes(arguments[3:]),
        state=_bytes(arguments[0]),
        temporaries=known[0],
        given=_bytes(given),
        device=_device_memory(),
    )


@functools.lru_cache(maxsize=64)
def _temporaries(plan: loop.Plan, treedef, leaves: tuple) -> list[int]:
    """Where those of a program are kept: an analysis takes as long as some small runs."""
    del plan, treedef, leaves
    return []


def _described(leaf) -> tuple:
    return np.shape(leaf), jnp.result_type(leaf), getattr(leaf, "sharding", None)


def warn_where_too_large(memory: Memory) -> None:
    """A warning where the device has less."""
    if not memory.fits:
        warnings.warn(
            f"The run needs more memory than the device has: {memory!r}. Shard params over more devices, "
            "take smaller batches, a shorter or truncated trajectory, or keep_best=False.",
            RuntimeWarning,
            stacklevel=2,
        )


def _bytes(tree) -> int:
    """Of all leaves, per device."""

    def size(leaf) -> int:
        shape = np.shape(leaf)
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and not isinstance(leaf, jax.core.Tracer):
            shape = sharding.shard_shape(shape)
        return math.prod(shape) * jnp.result_type(leaf).itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _on(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _device_memory() -> int | None:
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size = size / 1000
    return f"{size:.3g} GB"
