"""User input checked, errors worded: the argument, what came, what was expected, and the fix."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import influence
from bilevel.constraints import Integer, bind
from bilevel.inner_solvers import Tuned, inner_step, optimizer_at, start_point
from bilevel.problem import (
    Estimator,
    FixedPoint,
    LinearSolver,
    Method,
    Problem,
    PyTree,
    inner_value,
    outer_value,
)
from bilevel.trees import abstract, has_shapes, readable


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
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
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
            raise ValueError(
                f"{where} is empty: shape {leaf.shape}; drop the leaf, or put None in its place."
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, np.ndarray):
            return jnp.asarray(leaf)
        return jax.lax.convert_element_type(leaf, leaf.dtype) if leaf.weak_type else leaf

    return jax.tree_util.tree_map_with_path(convert, tree)


def strong(tree: PyTree) -> PyTree:
    """The tree with Python numbers made arrays of the default dtypes."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(np.asarray(x)), tree)


def finite(tree: PyTree, name: str) -> None:
    """ValueError where a concrete leaf holds a number that is not finite."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not readable(leaf):
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


def flag(name: str, value) -> bool:
    """The value as a bool; TypeError where it is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def number(
    name: str, value, *, positive: bool = False, minimum: float | None = None, below: float | None = None
) -> float:
    """The value as a float; TypeError or ValueError where it is none or out of range."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    value = float(value)
    too_small = (positive and value <= 0) or (minimum is not None and value < minimum)
    if not np.isfinite(value) or too_small or (below is not None and value >= below):
        least = "" if minimum in (None, -np.inf) else f" of at least {minimum:g}"
        wanted = "a positive number" if positive else "a finite number" + least
        less = "" if below is None else f" and less than {below:g}"
        raise ValueError(f"{name} must be {wanted}{less}, got {value:g}.")
    return value


def one_of(name: str, value, allowed: tuple[str, ...]) -> str:
    """The value; ValueError where it is none of the names allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
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
    "an inner optimiser": (
        lambda x: isinstance(x, Tuned) or _KINDS["an optax optimiser"][0](x),
        "optax.adam(1e-2) or bilevel.tuned(...)",
    ),
    "an inner optimiser or solver": (
        lambda x: _KINDS["an optax optimiser"][0](x) or _KINDS["an inner solver"][0](x),
        "optax.adam(1e-2)",
    ),
    "a problem": (
        lambda x: isinstance(x, (Problem, FixedPoint)),
        "bilevel.Problem(inner=..., outer=...)",
    ),
}


def kind(name: str, value, expected: str):
    """The value, if it is of the expected kind; else TypeError that says what it is instead."""
    if inspect.isclass(value) or not _KINDS[expected][0](value):
        fix = ""
        if isinstance(value, optax.MultiSteps):
            fix = " Take its .gradient_transformation()."
        elif expected == "an inner solver" and _KINDS["an optax optimiser"][0](value):
            fix = " Wrap it: bilevel.optax_loop(optimizer, max_steps)."
        raise TypeError(f"{name} must be {expected} such as {_KINDS[expected][1]}, got {_what(value)}.{fix}")
    return value


def called(value) -> str:
    """The name of the factory that made one of the library's values, such as ``one_step``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(value).__name__).lower()


def linear_system(name: str, solver, problem) -> None:
    """Raise TypeError where a linear solver is for symmetric systems and that of the problem is not."""
    symmetric = not isinstance(problem, FixedPoint) or problem.proximal
    if not symmetric and getattr(solver, "symmetric_only", False):
        raise TypeError(
            f"{name}: the system of a FixedPoint is not symmetric, which bilevel.{called(solver)}() needs; "
            "take bilevel.gmres(), bilevel.neumann(terms, step_size=1.0) for a contraction, or "
            "bilevel.dense(). (That of a bilevel.proximal_gradient step is solved in a symmetric form.)"
        )


def _what(value) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return (
            f"the function {value.__name__} itself: call it, {value.__name__}(...)"
            if (value.__module__ or "").split(".")[0] in ("bilevel", "optax")
            else f"the function {value.__name__}"
        )
    for what, (is_kind, _) in _KINDS.items():
        if is_kind(value):
            return what if what == "an optax optimiser" else f"{what}, {value!r:.120}"
    return repr(value)


# --- Derivatives of optimisers ---------------------------------------------------------------------------


def zero_gradient_trap(problem, inner, params, hparams, batch: Callable, key, model_state) -> None:
    """Raise ValueError where an optimiser's derivative is nan at the first gradient.

    Adam divides by ``sqrt(v + eps_root)``, whose derivative is infinite at ``v = 0``: with the default
    ``eps_root=0`` one entry of the gradient that is exactly zero (a pixel that is always black) makes every
    derivative through the step nan.

    Args:
      problem: the problem.
      inner: the optimiser that derivatives are taken through, or None.
      params: where it starts.
      hparams: as the inner loss sees them.
      batch: makes the first training batch.
      key: for the problem's start.
      model_state: mutable model state, or None.
    """
    if inner is None or isinstance(problem, FixedPoint):
        return
    # A tuned optimiser is judged with the values that it starts with.
    found = _probed(_slope_at_zero, inner, hparams)
    if found is None or not np.isnan(found).any():
        return
    first = batch()
    if problem.start is not None:
        params = jax.jit(problem.start)(hparams, first, key)

    def loss(params, batch):
        return inner_value(problem, params, hparams, batch, model_state)[0]

    grad = jax.jit(jax.grad(loss))(params, first)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grad)[0]:
        zeros = int(np.sum(np.asarray(leaf) == 0))
        if zeros:
            raise ValueError(
                "inner: the derivative of this optimiser is nan where an entry of the gradient is exactly 0, "
                f"as {zeros} of {leaf.size} are in params{name_of(path)} at the start. With optax.adam and "
                "its kin write eps_root=1e-8; or take an estimator of the implicit family."
            )


def reverse_trap(inner, hparams) -> None:
    """Raise ValueError where reverse mode through steps of an optimiser is nan whatever the gradients.

    A branch that is not taken, as in the first steps of ``optax.radam``, may have an infinite derivative.

    Args:
      inner: the optimiser that derivatives are taken through, or None.
      hparams: as it sees them.
    """
    found = None if inner is None else _probed(_six_steps, inner, hparams)
    # Where the steps themselves overflow, as at far too large a rate, the optimiser is not at fault.
    if found is not None and np.isfinite(found[0]) and np.isnan(found[1]):
        raise ValueError(
            "inner: reverse mode through the first steps of this optimiser is nan (optax.radam's is). Take "
            "bilevel.forward() or bilevel.pes(), or another optimiser, as optax.adam(rate, eps_root=1e-8)."
        )


def _six_steps(optimizer):
    """Where six steps on a quadratic end, and the derivative of that by their start."""

    def end(scale):
        params = scale * jnp.array([1.0, 2.0])

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jnp.array([1.0, 3.0]) * params, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 6)
        return jnp.sum(params)

    return jnp.stack(jax.value_and_grad(end)(1.0))


def _slope_at_zero(optimizer):
    """The derivative of an update by its gradient, where that is zero."""
    params = jnp.ones(2)

    def update(grad):
        updates, _ = optimizer.update(grad, optimizer.init(params), params)
        return jnp.sum(updates)

    return jax.grad(update)(jnp.array([0.0, 1.0]))


def _probed(probe: Callable, inner, hparams):
    """What a probe finds of an optimiser; None of one that wants more than a gradient."""
    try:
        return np.asarray(_compiled_probe(probe, inner)(hparams if isinstance(inner, Tuned) else None))
    except Exception:
        return None


@functools.lru_cache(maxsize=64)
def _compiled_probe(probe: Callable, inner):
    return jax.jit(lambda hparams: probe(optimizer_at(inner, hparams)))


# --- The problem on the data -----------------------------------------------------------------------


def describe(tree: PyTree) -> str:
    """Structure, shapes and dtypes of a pytree in one line."""

    def leaf(x):
        dtype = getattr(x, "dtype", None)
        return f"{dtype}{list(x.shape)}" if dtype is not None else type(x).__name__

    text = str(jax.tree.map(leaf, tree)).replace("'", "")
    return text if len(text) < 400 else text[:400] + "..."


def losses(problem, params, hparams, train_batch, valid_batch, model_state=None) -> tuple[str, ...]:
    """Both levels fit the arguments given, by shapes alone; returns the names of the metrics.

    Raises:
      TypeError: wrong signature, or not a real floating scalar; ValueError: a function that fails on the
        shapes given, or returns another structure than it must.
    """
    state = (model_state,) if problem.has_state else ()
    args = (params, hparams, train_batch, *state)
    if isinstance(problem, FixedPoint):
        _same_tree("update", _shapes_of("update", problem.update, args), (params, *state))
    else:
        _scalar_loss("inner", problem.inner, args, state)
    return _scalar_loss("outer", problem.outer, (params, hparams, valid_batch, *state), None)


def _same_tree(name: str, out, expected: tuple, of: str = "what it was given") -> None:
    """What a function returns has the structure, shapes and dtypes expected of it."""
    expected = expected if len(expected) > 1 else expected[0]
    trees: list[Any] = [jax.tree.structure(out), jax.tree.structure(expected)]
    same = trees[0] == trees[1] and all(
        (a.shape, a.dtype) == (jnp.shape(b), jnp.result_type(b))
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
    )
    if not same:
        raise ValueError(
            f"{name} must return {of}, {describe(jax.tree.map(abstract, expected))}, got {describe(out)}."
        )


def first_params(problem, params, hparams, batch: Callable, key):
    """Where params begin: as given, or as the problem's start makes them from ``batch()``.

    Raises:
      TypeError, ValueError: params that are not floating or not finite; a start that fails, or that makes
        another tree than the params given.
    """
    if problem.start is None:
        params = floating(params, "params")
        finite(params, "params")
        return params
    args = hparams, batch(), key
    made = _shapes_of("start", problem.start, args, "(hparams, batch, key)")
    if params is None:
        begun = made if has_shapes(args) else jax.jit(problem.start)(*args)
        params = floating(begun, "start(hparams, batch, key)")
        finite(params, "start(hparams, batch, key)")
        return params
    params = floating(params, "params")
    finite(params, "params")
    _same_tree("start", made, (params,), "a tree like the params given")
    return params


def takes(name: str, fn, arguments: tuple[str, ...]) -> str:
    """How a user's function is called, by position; TypeError where it takes other arguments."""
    called = f"{name}({', '.join(arguments)})"
    try:
        inspect.signature(fn).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} is called as {called}, which it does not take: {error}.") from None
    except ValueError:
        pass  # a builtin without a signature
    return called


def _shapes_of(name: str, fn, args, signature: str = ""):
    """What a user's function returns, as shapes; its failures in the user's words."""
    names = ("params", "hparams", "batch", "model_state")[: len(args)]
    names = tuple(signature.strip("()").split(", ")) if signature else names
    called = takes(name, fn, names)
    try:
        return jax.eval_shape(fn, *args)
    except Exception as error:
        shapes = "; ".join(f"{what} = {describe(tree)}" for what, tree in zip(names, args, strict=True))
        raise ValueError(
            f"{called} failed on what it was given ({type(error).__name__}: {error}). "
            f"Do params fit the loss? {shapes}.{_list_hint(args[-1])}"
        ) from error


def _scalar_loss(name: str, fn, args, state: tuple | None) -> tuple[str, ...]:
    """The names of a loss's metrics; ``state`` is what an inner loss returns beside its value."""
    out = _shapes_of(name, fn, args)
    names: tuple[str, ...] = ()
    if state:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"{name} must return (loss, model_state) under has_state=True, got {out!r:.200}.")
        _same_tree(f"{name}'s model_state", out[1], state)
        out = out[0]
    if isinstance(out, tuple):
        if state is not None:
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


def problem_on_data(
    problem, estimator, inner, params, hparams, train_batch, valid_batch, model_state=None, given=None
) -> tuple[str, ...]:
    """Both levels fit the arguments, and every tuned hyperparameter influences one of them.

    Read from shapes and jaxprs, once for the same problem and shapes. Returns the names of the outer loss's
    metrics. Raises as `losses`, and ValueError that names the leaves of hparams that influence nothing, or
    nothing that the estimator sees.

    Args:
      problem: the problem.
      estimator: settled, as the method or the user has it.
      inner: the inner optimiser, through which `bilevel.tuned` hyperparameters act; or None.
      params: floating arrays; so are hparams.
      hparams: natural units, as the losses see them.
      train_batch: a batch as the inner loss sees it.
      valid_batch: a batch as the outer loss sees it.
      model_state: mutable model state, or None.
      given: hyperparameters as the constraints see them, where a schedule makes others of them.
    """
    args = (params, hparams, train_batch, valid_batch, model_state)
    metrics = metric_names(problem, *args)
    smoothness(problem, params, hparams, valid_batch, model_state)
    steps = getattr(estimator, "steps", None) or 1
    if isinstance(inner, Tuned):
        _check_tuned(inner, params, hparams)
        _check_step(problem, inner, params, hparams, train_batch, model_state, steps)
    leaves, treedef = jax.tree.flatten(jax.tree.map(abstract, args))
    acting = inner if isinstance(inner, Tuned) else None
    through_state = problem.has_state and estimator.trajectory and steps > 1
    given = hparams if given is None else given
    tuned = influence.seen_leaves(problem, given, hparams)
    if getattr(estimator, "responds", False):
        influence.check_presence(problem, acting, through_state, tuned, treedef, tuple(leaves))
        return metrics
    _refuse_integer(problem, estimator, given)
    blind = None if _sees_start(estimator, steps) else called(estimator)
    influence.check_influence(problem, acting, through_state, blind, tuned, treedef, tuple(leaves))
    return metrics


def _refuse_integer(problem, estimator, hparams) -> None:
    """Raise ValueError where a hyperparameter is rounded before the losses are differentiated by it."""
    bound = bind(problem.constraints, hparams)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]
    for path, constraint in zip(paths, bound.leaves, strict=True):
        if isinstance(constraint, Integer):
            raise ValueError(
                f"hparams{name_of(path)} is bilevel.{constraint!r}, and {called(estimator)} differentiates "
                "the losses by it, which say nothing between two whole numbers. Take bilevel.stn(...) or "
                "bilevel.delta_stn(...), which learn how params respond to it."
            )


def _sees_start(estimator, steps: int) -> bool:
    """Whether derivatives may reach the problem's start; through the last step of several they never do."""
    return estimator.trajectory and (getattr(estimator, "truncate", None) != 1 or steps == 1)


def metric_names(problem, params, hparams, train_batch, valid_batch, model_state) -> tuple[str, ...]:
    """The first half of `problem_on_data`: both levels fit the arguments."""
    if problem.has_state and model_state is None:
        raise ValueError("model_state must be given for a problem with has_state=True, got None.")
    if not problem.has_state and model_state is not None:
        raise ValueError("model_state is given, but the problem was made without has_state=True.")
    args = (params, hparams, train_batch, valid_batch, model_state)
    leaves, treedef = jax.tree.flatten(jax.tree.map(abstract, args))
    return _losses(problem, treedef, tuple(leaves))


@functools.lru_cache(maxsize=64)
def _losses(problem, treedef, leaves) -> tuple[str, ...]:
    return losses(problem, *jax.tree.unflatten(treedef, leaves))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Opaque:
    """Anything, passed through a trace unseen."""

    value: Any


def _check_tuned(inner: Tuned, params, hparams) -> None:
    """A tuned optimiser can be made, and its state does not hold the hyperparameters themselves."""

    def first_state(hparams, params):
        return inner.make(hparams).init(params)

    try:
        optimizer = jax.eval_shape(lambda h: _Opaque(inner.make(h)), hparams).value
    except Exception as error:
        raise ValueError(
            f"tuned: its function failed on hparams = {describe(hparams)} "
            f"({type(error).__name__}: {error}). "
            "They are traced: they may enter arithmetic, but no Python condition (several optax schedules "
            "have one: take a schedule of unit height and multiply)."
        ) from error
    if not _KINDS["an optax optimiser"][0](optimizer):
        raise TypeError(
            f"tuned must make an optax optimiser of hparams, its function returned {_what(optimizer)}."
        )

    def tangents(hparams, params):
        ones = jax.tree.map(jnp.ones_like, hparams)
        out, moved = jax.jvp(lambda h: jax.tree.leaves(first_state(h, params)), (hparams,), (ones,))
        return [
            t for x, t in zip(out, moved, strict=True) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ]

    jaxpr = jax.make_jaxpr(tangents)(hparams, params).jaxpr
    if not all(influence.is_zero(jaxpr, out) for out in jaxpr.outvars):
        raise ValueError(
            "tuned: the first state of this optimiser holds hyperparameters (optax.inject_hyperparams?), so "
            "that later values would not reach it and their derivative would be lost. Pass them to the "
            "optimiser directly."
        )


def _check_step(problem, inner: Tuned, params, hparams, batch, model_state, steps: int) -> None:
    """A step of a tuned optimiser takes the shapes of hparams; an undeclared schedule is recognised."""

    def step(params, hparams, batch, model_state):
        point = start_point(inner, params, model_state, hparams)
        return inner_step(problem, inner, point, hparams, batch).params

    try:
        made = jax.eval_shape(step, *jax.tree.map(abstract, (params, hparams, batch, model_state)))
        _same_tree("the step", made, (params,), "params as it was given them")
    except (TypeError, ValueError) as error:
        schedules = [
            "hparams" + name_of(path)
            for path, leaf in jax.tree_util.tree_flatten_with_path(hparams)[0]
            if jnp.shape(leaf)[:1] == (steps,)
        ]
        hint = ""
        if schedules and steps > 1:
            hint = (
                f" {', '.join(schedules)} has as many entries as there are inner steps, {steps}: if there is "
                f"one for each step, declare it to the estimator, {_per_step(hparams, steps)}."
            )
        raise ValueError(
            f"inner: a step of the tuned optimiser failed on hparams = {describe(hparams)} and params = "
            f"{describe(params)} ({type(error).__name__}: {error}).{hint}"
        ) from error


def _per_step(hparams, steps: int) -> str:
    """The setting that declares leaves with an entry for each step, as a user would write it."""
    flags = jax.tree.map(lambda x: jnp.shape(x)[:1] == (steps,), hparams)
    if isinstance(flags, dict):
        flags = {name: flag for name, flag in flags.items() if any(jax.tree.leaves(flag))}
    return f"per_step={flags}"


def smoothness(problem, params, hparams, valid_batch, model_state=None) -> None:
    """The constants are usable at hparams (where concrete), and complete.

    Raises:
      ValueError: a constant that is negative or not finite there, or no ``direct`` where outer reads hparams.
    """
    constants = getattr(problem, "smoothness", None)
    if constants is None:
        return
    if all(map(readable, jax.tree.leaves(hparams))):
        for name in ("strong_convexity", "inner", "outer", "cross", "inverse_hessian", "direct"):
            setting = getattr(constants, name)
            if not callable(setting):
                continue
            value = np.asarray(setting(hparams))
            least = "positive" if name == "strong_convexity" else "not negative"
            if (
                value.shape != ()
                or not np.isfinite(value)
                or value < 0
                or (least == "positive" and value == 0)
            ):
                raise ValueError(
                    f"smoothness: {name} must be a finite number, {least}, at the hparams given; it is "
                    f"{value}."
                )
    if constants.direct is None:

        def tangent(hparams, tangents, params, batch, state):
            return jax.jvp(
                lambda h: outer_value(problem, params, h, batch, state)[0], (hparams,), (tangents,)
            )[1]

        shapes = jax.tree.map(abstract, (hparams, hparams, params, valid_batch, model_state))
        made = jax.make_jaxpr(tangent)(*shapes)
        if not influence.is_zero(made.jaxpr, made.jaxpr.outvars[0]):
            raise ValueError(
                "smoothness: outer depends on hparams itself, so that the bound needs direct=, the Lipschitz "
                "constant in params of its gradient by hparams."
            )


def response_layers(problem, params, given, batch, model_state) -> None:
    """Raise where the inner loss does not fit a `bilevel.nn.Response`, or no layer of it reads perturbations.

    Args:
      problem: the problem.
      params: of the network.
      given: hyperparameters and perturbations for each row; shapes.
      batch: of the inner loss; shapes.
      model_state: mutable model state, or None.
    """
    state = (model_state,) if problem.has_state else ()
    _scalar_loss("inner", problem.inner, (params, given, batch, *state), state)

    def value(eps, given, params, batch, *state):
        out = problem.inner(params, dataclasses.replace(given, eps=eps), batch, *state)
        return out[0] if state else out

    shapes = jax.tree.map(abstract, (given.eps, given, params, batch, *state))
    if not influence.entering(jax.make_jaxpr(value)(*shapes).jaxpr, 1)[0]:
        raise ValueError(
            'perturbations="examples" needs a model of response layers, and nothing in inner reads the '
            "perturbations: call layers of bilevel.nn with the hparams that the loss is given, as in "
            "nn.dense(params, x, hparams)."
        )
