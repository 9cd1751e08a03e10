"""The compiled part of a run: a chunk of outer steps as one program.

The chunk is a while loop with traced bounds that writes one row per outer step into a buffer, so that a
shorter chunk, another number of steps or another tolerance compile nothing. The host sees the carry
between chunks only, and no result depends on where chunks end.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.feed import Fed
from bilevel.problem import (
    CERTIFIED,
    FixedPoint,
    Method,
    Problem,
    PyTree,
    Status,
    inner_value,
    outer_value,
    register,
    updated,
)

# Leaves of hparams up to this size are reported entry by entry, larger ones by quantiles ...
_ENTRIES = 32
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# ... of at most this many of their entries, evenly spaced.
_SAMPLE = 1024

COLUMNS = (
    "value", "grad_norm", "error", "accepted", "nonfinite", "solver_steps", "solver_residual",
    "negative_curvature", "inner_grad", "outer_grad", "hvp", "cross",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chunk is compiled for."""

    problem: Problem | FixedPoint
    method: Method
    capacity: int
    judge_every: int
    keep_best: bool
    judges: bool
    tests: bool
    metrics: tuple[str, ...]

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Columns that are measured every ``judge_every`` steps only."""
        names = ("judged",) if self.judges else ()
        return names + (("test", *(f"test_{m}" for m in self.metrics)) if self.tests else ())

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the history's columns, in the order of a row."""
        return COLUMNS + self.metrics + self.judged_columns


@register
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a chunk takes and returns: the run so far, and this chunk's rows.

    ``hparams`` are the state's in natural units, so that the host need not compute them.
    """

    state: Any
    key: jax.Array
    hparams: PyTree
    best: PyTree  # (params, hparams, model_state, value, step), or None
    rows: jax.Array
    trail: jax.Array
    step: jax.Array
    status: jax.Array


@functools.lru_cache(maxsize=64)
def compiled(plan: Plan):
    """The jitted ``chunk`` of a plan; the carry is donated."""
    return jax.jit(functools.partial(_chunk, plan), donate_argnums=0)


@functools.lru_cache(maxsize=64)
def compiled_start(plan: Plan):
    """The jitted ``start`` of a plan."""
    # It runs once: not worth optimising.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(_start, plan), compiler_options=options)


@functools.lru_cache(maxsize=64)
def compiled_test(plan: Plan):
    """The jitted outer loss and metrics of a plan on all rows of a source."""

    def measure(params, hparams, model_state, key, source):
        hparams = plan.method.seen(hparams, -1)
        return outer_value(plan.problem, params, hparams, source.whole(key), model_state)

    return jax.jit(measure)


def _start(plan: Plan, params, hparams, key, train, valid, model_state):
    """The first carry, and both losses at the start (of a fixed point the sum of the map)."""
    problem, batch = plan.problem, train.batch(key, 0)
    state = plan.method.init(problem, params, hparams, train, valid, key=key, model_state=model_state)
    first, last = plan.method.seen(hparams, 0), plan.method.seen(hparams, -1)
    if isinstance(problem, FixedPoint):
        after, _ = updated(problem, params, first, batch, model_state)
        inner = functools.reduce(jnp.add, map(jnp.sum, jax.tree.leaves(after)))
    else:
        inner, _ = inner_value(problem, params, first, batch, model_state)
    outer, _ = outer_value(problem, params, last, valid.batch(key, 0), model_state)
    best = None
    if plan.keep_best:
        pair = _copy((params, hparams, model_state))
        best = (*pair, jnp.full_like(outer, jnp.inf), jnp.int32(0))
    carry = Carry(
        state=state,
        key=_copy(key),
        hparams=_copy(hparams),
        best=best,
        rows=jnp.zeros((plan.capacity, len(plan.columns)), jnp.promote_types(outer.dtype, jnp.float32)),
        trail=jnp.zeros((plan.capacity, trail_width(hparams)), _trail_dtype(hparams)),
        step=jnp.int32(0),
        status=jnp.int32(Status.RUNNING),
    )
    return carry, inner, outer


def _copy(tree):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _chunk(plan: Plan, carry: Carry, stop, tol, train, valid, test) -> Carry:
    first = carry.step

    def going(carry):
        return (carry.step < stop) & (carry.status == Status.RUNNING)

    def body(carry):
        t, row = carry.step, carry.step - first
        sources = [s.at(row) if isinstance(s, Fed) else s for s in (train, valid)]
        state, info = plan.method.step(plan.problem, carry.state, *sources)
        due = t % plan.judge_every == 0
        values, value = _row(plan, info, due, carry.key, valid, test)
        best = carry.best
        if best is not None:
            better = info.accepted & (value < best[3])
            new = (info.params, info.hparams, info.model_state, value, t)
            best = jax.lax.cond(better, lambda: new, lambda: best)
        gap = info.grad_norm + (info.error if info.error_kind == CERTIFIED else 0)
        done = info.accepted & due & (gap <= tol) & (info.status == Status.RUNNING)
        trail = _trail(info.hparams, carry.trail.dtype)
        return Carry(
            state=state,
            key=carry.key,
            hparams=carry.hparams,
            best=best,
            rows=jax.lax.dynamic_update_index_in_dim(carry.rows, values.astype(carry.rows.dtype), row, 0),
            trail=jax.lax.dynamic_update_index_in_dim(carry.trail, trail, row, 0),
            step=t + 1,
            status=jnp.where(done, Status.CONVERGED, info.status).astype(jnp.int32),
        )

    end = jax.lax.while_loop(going, body, carry)
    return dataclasses.replace(end, hparams=end.state.hparams)


def _row(plan: Plan, info, due, key, valid, test):
    """A row of the history, and the value that decides which pair is best."""
    value = info.value
    columns = [
        value, info.grad_norm, info.error, info.accepted, info.nonfinite, info.solve.steps,
        info.solve.residual, info.solve.negative_curvature, *info.counts,
        *(info.metrics[name] for name in plan.metrics),
    ]  # fmt: skip
    nothing = jnp.full_like(value, jnp.inf)
    dtype = jnp.promote_types(value.dtype, jnp.float32)

    def outer_on(batch):
        def measure():
            hparams = plan.method.seen(info.hparams, -1)
            out, metrics = outer_value(plan.problem, info.params, hparams, batch, info.model_state)
            return jnp.stack([out, *(jnp.asarray(metrics[name], out.dtype) for name in plan.metrics)])

        width = 1 + len(plan.metrics)
        return jax.lax.cond(due, measure, lambda: jnp.broadcast_to(nothing, (width,)))

    if plan.judges:
        value = outer_on(valid.whole(key))[0]
        columns.append(value)
    if plan.tests:
        columns.extend(outer_on(test.whole(key)))
    return _pack(columns, dtype), value


def _pack(columns, dtype) -> jax.Array:
    """A vector of scalars; as one elementwise kernel, which compiles much faster than a concatenation."""
    row = jnp.zeros(len(columns), dtype)
    for i, column in enumerate(columns):
        row = jnp.where(np.arange(len(columns)) == i, jnp.asarray(column).astype(dtype), row)
    return row


# --- The trajectory: recorded here as samples of every leaf, reduced to quantiles by the host ------


def _trail_dtype(hparams):
    return functools.reduce(jnp.promote_types, (x.dtype for x in jax.tree.leaves(hparams)), jnp.float32)


def _recorded(size: int) -> int:
    return len(range(0, size, -(-size // _SAMPLE)))


def trail_width(hparams) -> int:
    """Numbers recorded per outer step."""
    return sum(_recorded(x.size) for x in jax.tree.leaves(hparams))


def _trail(hparams, dtype) -> jax.Array:
    return jnp.concatenate([_sample(leaf).astype(dtype) for leaf in jax.tree.leaves(hparams)])


def _sample(leaf):
    return leaf.reshape(-1)[:: -(-leaf.size // _SAMPLE)]


def last_trail(hparams, dtype) -> np.ndarray:
    """What would be recorded of given hparams, by numpy."""
    leaves = [_sample(np.asarray(leaf)).astype(dtype) for leaf in jax.tree.leaves(hparams)]
    return np.concatenate(leaves)[None]


def quantile_leaves(hparams) -> tuple[bool, ...]:
    """For each leaf, whether it is reported by quantiles."""
    return tuple(x.size > _ENTRIES for x in jax.tree.leaves(hparams))


def unpack_trail(trail: np.ndarray, hparams) -> list[np.ndarray]:
    """For each leaf of hparams, recorded rows as entries or quantiles, shape (rows, ...)."""
    out, at = [], 0
    for leaf, by_quantiles in zip(jax.tree.leaves(hparams), quantile_leaves(hparams), strict=True):
        rows = trail[:, at : at + _recorded(leaf.size)]
        at += rows.shape[1]
        if by_quantiles:
            out.append(np.quantile(rows, _QUANTILES, axis=1).T.astype(trail.dtype))
        else:
            out.append(rows.reshape(len(rows), *leaf.shape))
    return out
