"""User input checked, errors worded: the argument, what came, what was expected, and the fix."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.constraints import Fixed, bind
from bilevel.problem import (
    Estimator,
    LinearSolver,
    Method,
    Problem,
    PyTree,
    inner_value,
    outer_value,
)

_SIGNATURE = "(params, hparams, batch)"


def name_of(path) -> str:
    """A leaf's place as a user would write it, e.g. ``['l2']``."""
    return jax.tree_util.keystr(path)


def floating(tree: PyTree, name: str, *, allow_python: bool = True) -> PyTree:
    """The tree with every leaf a strongly typed floating array.

    Raises:
      TypeError: a leaf is integer, complex, text or no number; ValueError: there are no leaves, or a
        leaf is empty or ragged.
    """
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} must hold at least one floating array, got {tree!r}.")

    def convert(path, leaf):
        where = name + name_of(path)
        if not isinstance(leaf, jax.Array):
            if isinstance(leaf, str) or not (allow_python or hasattr(leaf, "dtype")):
                raise TypeError(f"{where} must be a floating number or array, got {leaf!r}.")
            try:
                array = np.asarray(leaf)
            except ValueError as error:
                raise ValueError(f"{where} is not an array: {error}.") from None
            if array.dtype == object:
                raise TypeError(f"{where} must be a floating number or array, got {leaf!r:.80}.")
            if isinstance(leaf, float):
                array = array.astype(jnp.result_type(float))
            leaf = array
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            fix = "; write 1.0 instead of 1, or cast it" if leaf.dtype.kind in "iub" else ""
            raise TypeError(f"{where} must be floating, got dtype {leaf.dtype}{fix}.")
        if leaf.size == 0:
            raise ValueError(f"{where} is empty: shape {leaf.shape}.")
        if isinstance(leaf, np.ndarray):
            return jnp.asarray(leaf)
        return jax.lax.convert_element_type(leaf, leaf.dtype) if leaf.weak_type else leaf

    return jax.tree_util.tree_map_with_path(convert, tree)


def finite(tree: PyTree, name: str) -> None:
    """ValueError where a concrete leaf holds a number that is not finite."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.core.Tracer) or not leaf.is_fully_addressable:
            continue
        array = np.asarray(leaf)
        if not np.isfinite(array).all():
            which = array[~np.isfinite(array)].ravel()[0]
            raise ValueError(f"{name}{name_of(path)} must be finite, got {which}.")


def whole_number(name: str, value, minimum: int) -> int:
    """The value as an int; TypeError or ValueError where it is none or too small."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return int(value)


def number(name: str, value, *, positive: bool = False, minimum: float | None = None) -> float:
    """The value as a float; TypeError or ValueError where it is none or out of range."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    value = float(value)
    if not np.isfinite(value) or (positive and value <= 0) or (minimum is not None and value < minimum):
        wanted = "a positive number" if positive else f"a finite number of at least {minimum:g}"
        raise ValueError(f"{name} must be {wanted}, got {value:g}.")
    return value


def random_key(name: str, key) -> jax.Array:
    """A single typed PRNG key; the older raw uint32 form is wrapped."""
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(key)
    got = f"an array of {key.dtype}{key.shape}" if hasattr(key, "dtype") else f"{key!r}"
    raise TypeError(f"{name} must be one PRNG key such as jax.random.key(0), got {got}.")


# --- The right kind of thing in the right place ----------------------------------------------------


def _is_estimator(value) -> bool:
    if not isinstance(value, Estimator):
        return False
    return not value.trajectory or (hasattr(value, "inner") and hasattr(value, "steps"))


def _solves_problems(solver) -> bool:
    # Linear and inner solvers have the same two functions; an inner solver's takes a problem first.
    return next(iter(inspect.signature(solver.solve).parameters)) == "problem"


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "an estimator": (_is_estimator, "bilevel.implicit()"),
    "a linear solver": (
        lambda x: isinstance(x, LinearSolver) and not _solves_problems(x),
        "bilevel.cg()",
    ),
    "an inner solver": (
        lambda x: isinstance(x, LinearSolver) and _solves_problems(x),
        "one that has solve(problem, ...)",
    ),
    "a method": (lambda x: isinstance(x, Method), "bilevel.alternating(...)"),
    "an optax optimiser": (
        lambda x: isinstance(x, tuple) and hasattr(x, "init") and hasattr(x, "update"),
        "optax.adam(1e-2)",
    ),
    "a problem": (lambda x: isinstance(x, Problem), "bilevel.Problem(inner=..., outer=...)"),
}


def kind(name: str, value, expected: str):
    """The value, if it is of the expected kind; else TypeError that says what it is instead."""
    if inspect.isclass(value) or not _KINDS[expected][0](value):
        raise TypeError(f"{name} must be {expected} such as {_KINDS[expected][1]}, got {_what(value)}.")
    return value


def _what(value) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return (
            f"the function {value.__name__} itself: call it, {value.__name__}(...)"
            if (value.__module__ or "").split(".")[0] in ("bilevel", "optax")
            else f"the function {value.__name__}"
        )
    for what, (is_kind, _) in _KINDS.items():
        if is_kind(value):
            return what if what == "an optax optimiser" else f"{what}, {value!r}"
    return repr(value)


# --- The problem on the data -----------------------------------------------------------------------


def describe(tree: PyTree) -> str:
    """Structure, shapes and dtypes of a pytree in one line."""

    def leaf(x):
        dtype = getattr(x, "dtype", None)
        return f"{dtype}{list(x.shape)}" if dtype is not None else type(x).__name__

    text = str(jax.tree.map(leaf, tree)).replace("'", "")
    return text if len(text) < 400 else text[:400] + "..."


def losses(problem: Problem, params, hparams, train_batch, valid_batch) -> tuple[str, ...]:
    """Both losses are floating scalars of the arguments given, by shapes alone; names of the metrics.

    Raises:
      TypeError: wrong signature, or not a real floating scalar; ValueError: a loss that fails on the
        shapes given, or params that the inner loss does not depend on.
    """
    _scalar_loss("inner", problem.inner, (params, hparams, train_batch), metrics=False)
    return _scalar_loss("outer", problem.outer, (params, hparams, valid_batch), metrics=True)


def _scalar_loss(name: str, fn, args, metrics: bool) -> tuple[str, ...]:
    try:
        inspect.signature(fn).bind(*args)
    except TypeError as error:
        raise TypeError(f"{name} is called as {name}{_SIGNATURE}, which it does not take: {error}.") from None
    except ValueError:
        pass  # a builtin without a signature
    try:
        out = jax.eval_shape(fn, *args)
    except Exception as error:
        shapes = "; ".join(
            f"{what} = {describe(tree)}"
            for what, tree in zip(("params", "hparams", "batch"), args, strict=True)
        )
        raise ValueError(
            f"{name}{_SIGNATURE} failed on what it was given ({type(error).__name__}: {error}). "
            f"Do params fit the loss? {shapes}.{_list_hint(args[2])}"
        ) from error
    names: tuple[str, ...] = ()
    if isinstance(out, tuple):
        if not metrics:
            raise TypeError(
                f"{name} must return one scalar, got a tuple of {len(out)}; metrics belong to outer, "
                "model state to has_state=True."
            )
        out, names = _check_metrics(name, out)
    if not hasattr(out, "shape"):
        raise TypeError(f"{name} must return a scalar, got {out!r}.")
    if out.shape != ():
        raise ValueError(f"{name} must return a scalar, got shape {out.shape}; take the mean or the sum.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"{name} must return a real floating scalar, got dtype {out.dtype}.")
    return names


def _list_hint(batch) -> str:
    if not isinstance(batch, (list, tuple)):
        return ""
    return " (A list or a tuple of arrays is one batch; for several batches pass iter(batches).)"


def _check_metrics(name: str, out: tuple):
    if len(out) != 2 or not isinstance(out[1], dict):
        raise TypeError(f"{name} must return a scalar or (scalar, dict of scalar metrics), got {out!r}.")
    for key, metric in out[1].items():
        if not isinstance(key, str) or getattr(metric, "shape", None) != ():
            raise ValueError(f"{name}: metric {key!r} must be a scalar under a name, got {metric!r}.")
        if not (jnp.issubdtype(metric.dtype, jnp.floating) or metric.dtype.kind in "iub"):
            raise TypeError(f"{name}: metric {key!r} must be real, got dtype {metric.dtype}.")
    return out[0], tuple(sorted(out[1]))


def finite_losses(inner, outer) -> None:
    """Both losses at the start, if concrete, are finite."""
    for name, value in (("inner", inner), ("outer", outer)):
        if not np.isfinite(value):
            raise ValueError(
                f"{name} is {value} at the start values. Look for a log of zero, a nan in the data, or "
                "start values of params or hparams that are far too large."
            )


def tuned_leaves(problem: Problem, hparams) -> tuple[bool, ...]:
    """For each leaf of hparams, whether the problem's constraints let it move."""
    bound = bind(problem.constraints, hparams)
    return tuple(not isinstance(constraint, Fixed) for constraint in bound.leaves)


@functools.lru_cache(maxsize=64)
def _check_shapes(problem: Problem, tuned: tuple[bool, ...], treedef, leaves) -> tuple[str, ...]:
    args = jax.tree.unflatten(treedef, leaves)
    metrics = losses(problem, *args)
    _influence(problem, tuned, *args)
    return metrics


def problem_on_data(problem: Problem, tuned, params, hparams, train_batch, valid_batch) -> tuple[str, ...]:
    """Both losses fit the arguments, and every tuned hyperparameter influences one of them.

    Read from shapes and jaxprs, once for the same problem and shapes. Returns the names of the outer loss's
    metrics. Raises as `losses`, and
    ValueError that names the leaves of hparams that influence neither loss.

    Args:
      problem: the problem.
      tuned: a bool for each leaf of hparams; False where it need not influence anything.
      params: floating arrays; so are hparams.
      hparams: natural units.
      train_batch: a batch as the inner loss sees it.
      valid_batch: a batch as the outer loss sees it.
    """
    args = (params, hparams, train_batch, valid_batch)
    leaves, treedef = jax.tree.flatten(jax.tree.map(_abstract, args))
    return _check_shapes(problem, tuple(tuned), treedef, tuple(leaves))


def _abstract(x):
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _influence(problem: Problem, tuned, params, hparams, train_batch, valid_batch) -> None:
    leaves, treedef = jax.tree.flatten(hparams)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]

    def tangents(i, tangent, leaves, params, train, valid):
        def values(leaf):
            tree = jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]])
            inner, _ = inner_value(problem, params, tree, train, None)
            return inner, outer_value(problem, params, tree, valid, None)[0]

        return jax.jvp(values, (leaves[i],), (tangent,))[1]

    idle = []
    for i, leaf in enumerate(leaves):
        if tuned[i]:
            jaxpr = jax.make_jaxpr(functools.partial(tangents, i))(
                leaf, leaves, params, train_batch, valid_batch
            ).jaxpr
            # Zero tangents come out as literals: JAX propagates them symbolically, through jit,
            # stop_gradient and control flow.
            if all(hasattr(out, "val") and np.all(np.asarray(out.val) == 0) for out in jaxpr.outvars):
                idle.append("hparams" + name_of(paths[i]))
    if idle:
        verb = "influences" if len(idle) == 1 else "influence"
        raise ValueError(
            f"{', '.join(idle)} {verb} neither inner nor outer, so the hypergradient is zero. A likely "
            "cause: the loss reads a variable of the surrounding scope (a closure) instead of its "
            "argument hparams; or it passes through stop_gradient, round or an integer. Drop it from "
            "hparams, or declare it bilevel.fixed()."
        )
