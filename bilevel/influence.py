"""Which hyperparameters act, and on what: read from programs, before any of them is run.

Two questions are asked of a loss. Does its derivative by a hyperparameter vanish whatever the values? JAX
propagates zero tangents symbolically, so that the jaxpr of a `jax.jvp` tells. And is it computed from the
hyperparameter at all, differentiably or not? That is for methods which learn how params respond.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from bilevel.constraints import Fixed, bind
from bilevel.inner_solvers import inner_step, start_point
from bilevel.problem import FixedPoint, Problem, inner_value, outer_value, updated
from bilevel.trees import abstract


def tuned_leaves(problem: Problem, hparams) -> tuple[bool, ...]:
    """For each leaf of hparams, whether the problem's constraints let it move."""
    bound = bind(problem.constraints, hparams)
    return tuple(not isinstance(constraint, Fixed) for constraint in bound.leaves)


def seen_leaves(problem: Problem, hparams, seen) -> tuple[bool, ...]:
    """For each leaf that the losses see, whether one moves that it is made of: a schedule has several."""
    given = [path for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]
    moves = tuned_leaves(problem, hparams)
    return tuple(
        any(moved for own, moved in zip(given, moves, strict=True) if own[: len(path)] == path)
        for path, _ in jax.tree_util.tree_flatten_with_path(seen)[0]
    )


def _effects(problem, inner, through_state, params, hparams, train, valid, model_state) -> tuple[list, list]:
    """Everything through which hyperparameters can act: losses and steps, model state, and the start."""
    acts = [outer_value(problem, params, hparams, valid, model_state)[0]]
    if isinstance(problem, FixedPoint) or inner is not None:
        point = start_point(inner, params, model_state, hparams)
        end = inner_step(problem, inner, point, hparams, train)
        after = end.model_state
        acts += jax.tree.leaves(end.params)
    else:
        value, after = inner_value(problem, params, hparams, train, model_state)
        acts.append(value)
    if through_state:
        acts.append(outer_value(problem, params, hparams, valid, after)[0])
        if isinstance(problem, FixedPoint):
            acts += jax.tree.leaves(updated(problem, params, hparams, train, after)[0])
        else:
            acts.append(inner_value(problem, params, hparams, train, after)[0])
    if problem.start is None:
        return acts, []
    return acts, jax.tree.leaves(problem.start(hparams, train, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def check_influence(problem, inner, through_state: bool, blind: str | None, tuned, tree, shapes) -> None:
    """Raise ValueError where no loss moves with a tuned hyperparameter, or none that the estimator sees.

    ``through_state``: it differentiates through model state. ``blind``: its name, where it sees nothing of
    the problem's start. ``tuned``: of each leaf of hparams, whether it moves.
    """
    params, hparams, train_batch, valid_batch, model_state = jax.tree.unflatten(tree, shapes)
    leaves, treedef = jax.tree.flatten(hparams)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]

    def tangents(i, tangent, leaves, params, train, valid, model_state):
        def values(leaf):
            tree = jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]])
            return _effects(problem, inner, through_state, params, tree, train, valid, model_state)

        return jax.jvp(values, (leaves[i],), (tangent,))[1]

    idle, starts = [], []
    for i, leaf in enumerate(leaves):
        if tuned[i]:
            made, (acts, _) = jax.make_jaxpr(functools.partial(tangents, i), return_shape=True)(
                leaf, leaves, params, train_batch, valid_batch, model_state
            )
            # Zero tangents come out as literals: JAX propagates them symbolically, through jit,
            # stop_gradient and control flow.
            zero = [is_zero(made.jaxpr, out) for out in made.jaxpr.outvars]
            if all(zero):
                idle.append("hparams" + jax.tree_util.keystr(paths[i]))
            elif all(zero[: len(acts)]):
                starts.append("hparams" + jax.tree_util.keystr(paths[i]))
    if idle:
        verb = "influences" if len(idle) == 1 else "influence"
        raise ValueError(
            f"{', '.join(idle)} {verb} neither inner nor outer, so the hypergradient is zero. A likely "
            "cause: the loss reads a variable of the surrounding scope (a closure) instead of its "
            "argument hparams; or it passes through stop_gradient, round or an integer; or it is a setting "
            "of the inner optimiser, for bilevel.tuned(...) and a trajectory estimator. Drop it from "
            "hparams, or declare it bilevel.fixed()."
        )
    if starts and blind:
        raise ValueError(
            f"{', '.join(starts)} {'acts' if len(starts) == 1 else 'act'} through start only, of which "
            f"{blind}() sees nothing, so that the hypergradient is zero. Take bilevel.unrolled() or "
            "bilevel.forward() without truncate=, which differentiate every step from the start, or declare "
            "it bilevel.fixed()."
        )


@functools.lru_cache(maxsize=64)
def check_presence(problem, inner, through_state: bool, tuned, tree, shapes) -> None:
    """Raise ValueError where a tuned hyperparameter enters neither loss, differentiably or not.

    Arguments as of `check_influence`.
    """
    params, hparams, train_batch, valid_batch, model_state = jax.tree.unflatten(tree, shapes)
    leaves, treedef = jax.tree.flatten(hparams)

    def acts(leaves, params, train, valid, model_state):
        tree = jax.tree.unflatten(treedef, leaves)
        return _effects(problem, inner, through_state, params, tree, train, valid, model_state)

    made = jax.make_jaxpr(acts)(leaves, params, train_batch, valid_batch, model_state).jaxpr
    enters = entering(made, len(leaves))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]
    every = zip(paths, enters, tuned, strict=True)
    idle = ["hparams" + jax.tree_util.keystr(path) for path, enters, moves in every if moves and not enters]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} {'enters' if len(idle) == 1 else 'enter'} neither inner nor outer. A likely "
            "cause: the loss reads a variable of the surrounding scope (a closure) instead of its argument "
            "hparams. Drop it from hparams, or declare it bilevel.fixed()."
        )


def outer_reads(problem, params, hparams, valid_batch, model_state) -> bool:
    """Whether the outer loss depends on tuned hyperparameters otherwise than through params; from shapes."""
    args = (params, hparams, valid_batch, model_state)
    leaves, treedef = jax.tree.flatten(jax.tree.map(abstract, args))
    return _outer_reads(problem, treedef, tuple(leaves))


@functools.lru_cache(maxsize=64)
def _outer_reads(problem, tree, shapes) -> bool:
    params, hparams, valid_batch, model_state = jax.tree.unflatten(tree, shapes)
    leaves, treedef = jax.tree.flatten(hparams)

    def value(leaves, params, batch, state):
        return outer_value(problem, params, jax.tree.unflatten(treedef, leaves), batch, state)[0]

    made = jax.make_jaxpr(value)(leaves, params, valid_batch, model_state).jaxpr
    tuned = tuned_leaves(problem, hparams)
    return any(enters and moves for enters, moves in zip(entering(made, len(leaves)), tuned, strict=True))


def entering(jaxpr, inputs: int) -> list[bool]:
    """For each of the first inputs of a program, whether an output is computed from it."""
    needed = {id(out) for out in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if any(id(out) in needed for out in eqn.outvars):
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
            used = eqn.invars
            if inner is not None:
                taken = entering(inner.jaxpr, len(eqn.invars))
                used = [var for var, enters in zip(eqn.invars, taken, strict=True) if enters]
            needed |= {id(var) for var in used}
    return [id(var) in needed for var in jaxpr.invars[:inputs]]


def is_zero(jaxpr, out) -> bool:
    """Whether an output of a program is zero whatever its inputs."""
    if hasattr(out, "val"):
        return bool(np.all(np.asarray(out.val) == 0))
    # Zeros of an array shape are broadcast from a literal.
    made = [eqn for eqn in jaxpr.eqns if out in eqn.outvars and eqn.primitive.name == "broadcast_in_dim"]
    return bool(made) and is_zero(jaxpr, made[0].invars[0])
