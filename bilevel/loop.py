"""The compiled part of a run: a chunk of outer steps as one program.

The chunk is a while loop with traced bounds that writes one row per outer step into a buffer, so that a
shorter chunk, another number of steps or another tolerance compile nothing. The host sees the carry
between chunks only, and no result depends on where chunks end.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.feed import Fed
from bilevel.problem import (
    CERTIFIED,
    ESTIMATED,
    FixedPoint,
    Method,
    Problem,
    PyTree,
    StaticTree,
    Status,
    inner_value,
    outer_value,
    register,
    updated,
)
from bilevel.trees import copied

# Leaves of hparams up to this size are reported entry by entry, larger ones by quantiles ...
_ENTRIES = 32
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# ... of at most this many of their entries, evenly spaced.
_SAMPLE = 1024

COLUMNS = (
    "value", "grad_norm", "error", "accepted", "nonfinite", "solver_steps", "solver_residual",
    "negative_curvature", "inner_grad", "outer_grad", "hvp", "cross",
)  # fmt: skip


# Of these a member that has ended has zeros in its row, not nan.
ZERO_WHERE_ENDED = (
    "accepted", "nonfinite", "solver_steps", "negative_curvature", "inner_grad", "outer_grad", "hvp", "cross",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chunk is compiled for.

    ``population``: there is an axis of members. ``layout``: where the leaves of the carry lie on a mesh, and
    ``axis`` the mesh axis of the members; both None without one.
    """

    problem: Problem | FixedPoint
    method: Method
    capacity: int
    judge_every: int
    keep_best: bool
    judges: bool
    tests: bool
    metrics: tuple[str, ...]
    population: bool = False
    layout: StaticTree | None = None
    axis: str | None = None

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Columns that are measured every ``judge_every`` steps only."""
        names = ("judged",) if self.judges else ()
        return names + (("test", *(f"test_{m}" for m in self.metrics)) if self.tests else ())

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the history's columns, in the order of a row."""
        return COLUMNS + self.own_columns + self.metrics + self.judged_columns

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Those of the method."""
        columns = getattr(self.method, "columns", ())
        return columns(self.problem) if callable(columns) else columns


@register
@dataclasses.dataclass(frozen=True)
class Pair:
    """The pair with the lowest outer value so far, taken at outer step ``step``."""

    params: PyTree
    hparams: PyTree
    model_state: PyTree
    value: Any
    step: Any


@register
@dataclasses.dataclass(frozen=True)
class Member:
    """One run so far; in a population every leaf has an axis of members in front.

    ``hparams`` are the state's in natural units, so that the host need not compute them. ``attempted``: outer
    steps until it ended.
    """

    state: Any
    key: jax.Array
    hparams: PyTree
    best: Pair | None
    attempted: jax.Array
    status: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a chunk takes and returns: the runs so far, and this chunk's rows, (steps, [members,] columns)."""

    member: Member
    rows: jax.Array
    trail: jax.Array
    step: jax.Array


@functools.lru_cache(maxsize=64)
def compiled(plan: Plan):
    """The jitted ``chunk`` of a plan; the carry is donated."""
    placed = plan.layout and plan.layout.tree()
    return jax.jit(functools.partial(_chunk, plan), donate_argnums=0, out_shardings=placed)


@functools.lru_cache(maxsize=64)
def compiled_start(plan: Plan):
    """The jitted ``start`` of a plan."""
    # It runs once: not worth optimising.
    options = {"xla_backend_optimization_level": 0}
    placed: Any = None
    if plan.layout is not None:
        carry = plan.layout.tree()
        placed = carry, carry.step, carry.step
    return jax.jit(functools.partial(_start, plan), compiler_options=options, out_shardings=placed)


def abstract_start(plan: Plan, *args) -> Carry:
    """The shapes of the first carry; arguments as of `compiled_start`."""
    return jax.eval_shape(functools.partial(_start, plan), *args)[0]


@functools.lru_cache(maxsize=64)
def compiled_test(plan: Plan):
    """The jitted outer loss and metrics of a plan on all rows of a source."""

    def measure(params, hparams, model_state, key, source):
        hparams = plan.method.seen(hparams, -1)
        return outer_value(plan.problem, params, hparams, source.whole(key), model_state)

    if plan.population:
        measure = jax.vmap(measure, in_axes=(0, 0, 0, 0, None), spmd_axis_name=plan.axis)
    return jax.jit(measure, out_shardings=plan.layout and plan.layout.tree().step)


@functools.lru_cache(maxsize=64)
def compiled_choice(plan: Plan):
    """The jitted carry of some members of a population, by their places."""

    def chosen(carry: Carry, places) -> Carry:
        return Carry(
            member=jax.tree.map(lambda x: x[places], carry.member),
            rows=carry.rows[:, places],
            trail=carry.trail[:, places],
            step=carry.step,
        )

    return jax.jit(chosen, out_shardings=plan.layout and plan.layout.tree())


@functools.lru_cache(maxsize=64)
def compiled_dropping(plan: Plan):
    """The jitted carry in which members that run, and are not among those kept, have ended with a status."""

    def dropped(carry: Carry, kept, code) -> Carry:
        running = carry.member.status == Status.RUNNING
        status = jnp.where(running & ~kept, code, carry.member.status)
        return dataclasses.replace(carry, member=dataclasses.replace(carry.member, status=status))

    return jax.jit(dropped, donate_argnums=0, out_shardings=plan.layout and plan.layout.tree())


@functools.lru_cache(maxsize=64)
def compiled_gathering(plan: Plan):
    """The jitted join of parts of a population, by their places in the joined order."""

    def gathered(parts: list[Member], places) -> Member:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[places], *parts)

    return jax.jit(gathered, out_shardings=plan.layout and plan.layout.tree().member)


def _start(plan: Plan, params, hparams, key, train, valid, model_state):
    """The first carry, and both losses at the start (of a fixed point the sum of the map)."""
    begin = functools.partial(_start_one, plan)
    if plan.population:
        begin = jax.vmap(begin, in_axes=(0, 0, 0, None, None, 0), spmd_axis_name=plan.axis)
    member, inner, outer = begin(params, hparams, key, train, valid, model_state)
    front = (plan.capacity, *member.status.shape)
    dtype = jnp.promote_types(outer.dtype, jnp.float32)
    width = trail_width(one(hparams, plan.population))
    carry = Carry(
        member=member,
        rows=jnp.zeros((*front, len(plan.columns)), dtype),
        trail=jnp.zeros((*front, width), _trail_dtype(hparams)),
        step=jnp.int32(0),
    )
    return carry, inner, outer


def _start_one(plan: Plan, params, hparams, key, train, valid, model_state):
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
        pair = params, hparams, model_state, jnp.full_like(outer, jnp.inf), jnp.int32(0)
        best = Pair(*copied(pair))
    member = Member(
        state=state,
        key=copied(key),
        hparams=copied(hparams),
        best=best,
        attempted=jnp.int32(0),
        status=jnp.int32(Status.RUNNING),
    )
    return member, inner, outer


def _chunk(plan: Plan, carry: Carry, stop, tol, train, valid, test) -> Carry:
    first = carry.step
    # Natural units are made once, at the end of the chunk.
    carry = _with_hparams(carry, None)

    def going(carry):
        return (carry.step < stop) & jnp.any(carry.member.status == Status.RUNNING)

    def body(carry):
        t, row = carry.step, carry.step - first
        sources = [s.at(row) if isinstance(s, Fed) else s for s in (train, valid)]
        advance = functools.partial(_advance, plan, t, tol, sources, valid, test)
        if plan.population:
            member, values, trail = jax.vmap(advance, spmd_axis_name=plan.axis)(carry.member)
            running = carry.member.status == Status.RUNNING
            member = _select(running, member, carry.member)
            values = jnp.where(running[:, None], values, ended_row(plan, values.dtype))
        else:
            member, values, trail = advance(carry.member)
        if plan.layout is not None:
            # Else the whole buffer is spread over the devices, and gathered at the end of each chunk.
            trail = jax.lax.with_sharding_constraint(trail, plan.layout.tree().step)
        return Carry(
            member=member,
            rows=jax.lax.dynamic_update_index_in_dim(carry.rows, values.astype(carry.rows.dtype), row, 0),
            trail=jax.lax.dynamic_update_index_in_dim(carry.trail, trail.astype(carry.trail.dtype), row, 0),
            step=t + 1,
        )

    end = jax.lax.while_loop(going, body, carry)
    state = end.member.state
    view = operator.attrgetter("hparams")
    return _with_hparams(end, jax.vmap(view)(state) if plan.population else view(state))


def _with_hparams(carry: Carry, hparams) -> Carry:
    return dataclasses.replace(carry, member=dataclasses.replace(carry.member, hparams=hparams))


def _advance(plan: Plan, t, tol, sources, valid, test, member: Member):
    """One outer step of one member: the member, its row and its trail."""
    state, info = plan.method.step(plan.problem, member.state, *sources)
    due = t % plan.judge_every == 0
    values, value = _row(plan, info, due, member.key, valid, test)
    best = member.best
    if best is not None:
        better = info.accepted & (value < best.value)
        new = Pair(info.params, info.hparams, info.model_state, value, t)
        best = jax.lax.cond(better, lambda: new, lambda: best)
    gap = info.grad_norm + (info.error if info.error_kind in (CERTIFIED, ESTIMATED) else 0)
    # A method that can go no further has converged where it is close enough.
    ends = due & (info.status == Status.RUNNING) | (info.status == Status.STALLED)
    # Exactly zero at the very first step is no solution: params that begin at zero feel no penalty yet.
    begun = (t > 0) | (info.grad_norm > 0) | (info.status == Status.STALLED)
    done = info.accepted & (gap <= tol) & ends & begun & info.settled
    member = dataclasses.replace(
        member,
        state=state,
        best=best,
        attempted=t + 1,
        status=jnp.where(done, Status.CONVERGED, info.status).astype(jnp.int32),
    )
    return member, values, _trail(info.hparams)


def _select(running, new, old):
    """The new leaf for members that run, the old one for those that have ended."""

    def pick(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                pick(jax.random.key_data(a), jax.random.key_data(b)), impl=jax.random.key_impl(a)
            )
        return jnp.where(running.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def ended_row(plan: Plan, dtype) -> np.ndarray:
    """The row of a member that has ended: nan, or nothing done."""
    return np.array([0 if name in ZERO_WHERE_ENDED else np.nan for name in plan.columns], dtype)


def _row(plan: Plan, info, due, key, valid, test):
    """A row of the history, and the value that decides which pair is best."""
    value = info.value
    columns = [
        value, info.grad_norm, info.error, info.accepted, info.nonfinite, info.solve.steps,
        info.solve.residual, info.solve.negative_curvature, *info.counts,
        *(info.extra[name] for name in plan.own_columns),
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


def one(hparams, population: bool):
    """The shapes of one member's."""
    skip = int(population)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype), hparams)


def _recorded(size: int) -> int:
    return len(range(0, size, -(-size // _SAMPLE)))


def trail_width(hparams) -> int:
    """Numbers recorded per outer step."""
    return sum(_recorded(x.size) for x in jax.tree.leaves(hparams))


def _trail(hparams) -> jax.Array:
    dtype = _trail_dtype(hparams)
    return jnp.concatenate([_sample(leaf.reshape(-1)).astype(dtype) for leaf in jax.tree.leaves(hparams)])


def _sample(entries):
    return entries[..., :: -(-entries.shape[-1] // _SAMPLE)]


def last_trail(hparams, front: tuple[int, ...]) -> np.ndarray:
    """What would be recorded of given hparams, by numpy; ``front``: the axis of members, if any."""
    leaves = [_sample(np.asarray(leaf).reshape(*front, -1)) for leaf in jax.tree.leaves(hparams)]
    return np.concatenate(leaves, axis=-1)[None]


def quantile_leaves(hparams) -> tuple[bool, ...]:
    """For each leaf, whether it is reported by quantiles."""
    return tuple(x.size > _ENTRIES for x in jax.tree.leaves(hparams))


def unpack_trail(trail: np.ndarray, hparams) -> list[np.ndarray]:
    """Recorded rows as entries or quantiles.

    Args:
      trail: shape (rows, [members,] width).
      hparams: of one member; shapes will do.

    Returns:
      For each leaf an array of shape (rows, [members,] ...).
    """
    out, at = [], 0
    for leaf, by_quantiles in zip(jax.tree.leaves(hparams), quantile_leaves(hparams), strict=True):
        rows = trail[..., at : at + _recorded(leaf.size)]
        at += rows.shape[-1]
        if by_quantiles:
            quantiles = np.quantile(rows, _QUANTILES, axis=-1)
            out.append(np.moveaxis(quantiles, 0, -1).astype(trail.dtype))
        else:
            out.append(rows.reshape(*trail.shape[:-1], *leaf.shape))
    return out
