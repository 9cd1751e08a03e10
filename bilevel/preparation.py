"""From what a user gives to what a run takes: arguments checked, placed, and a plan made of them."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import data, loop, placement, validation
from bilevel.constraints import bind
from bilevel.defaults import default_method
from bilevel.feed import FED, EpisodeHalf, Feed, halves
from bilevel.loop import Plan
from bilevel.placement import Placement
from bilevel.populations import Population, member_of
from bilevel.problem import FixedPoint, Method, Problem, PyTree
from bilevel.trees import has_shapes, readable

# Rows of a chunk's buffers: no chunk has more outer steps.
_CAPACITY = 512


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has not begun.

    ``arguments``: those of `loop.compiled_start`. ``sources``: train and valid, as the run draws from them.
    ``model_state``: as given, for one member.
    """

    plan: Plan
    arguments: tuple
    sources: list
    test: data.Source | None
    feeds: list[Feed]
    placement: Placement | None
    model_state: PyTree

    def first_carry(self) -> loop.Carry:
        """Where the run begins; computed.

        Raises:
          ValueError: a loss that is not finite there, or an optimiser whose derivatives are not.
        """
        carry, *losses = loop.compiled_start(self.plan)(*self.arguments)
        params, hparams, key, train, _, _ = self.arguments
        if self.plan.population:
            params, hparams, key = member_of((params, hparams, key), 0)
        method, problem = self.plan.method, self.plan.problem
        validation.zero_gradient_trap(
            problem,
            method.differentiated,
            params,
            method.seen(hparams, 0),
            lambda: train.batch(key, 0),
            key,
            self.model_state,
        )
        if getattr(method, "reverses", False):
            validation.reverse_trap(method.differentiated, method.seen(hparams, 0))
        # Of a population it is enough that one member can begin.
        validation.finite_losses(*(_finite_first(np.asarray(value)) for value in losses))
        return carry

    def abstract_carry(self) -> loop.Carry:
        """The shapes of the first carry."""
        return loop.abstract_start(self.plan, *self.arguments)


@dataclasses.dataclass(frozen=True)
class Given:
    """The arguments of `bilevel.optimize` that make its program; arrays may be `jax.ShapeDtypeStruct`."""

    problem: Problem | FixedPoint
    method: Method | None
    params: PyTree
    hparams: PyTree
    train: Any
    valid: Any
    key: Any = None
    mesh: Any = None
    test: Any = None
    constraints: Any = None
    model_state: PyTree = None
    population: Population | None = None
    judge_every: int = 10
    keep_best: bool = True


def prepare(stack: contextlib.ExitStack, given: Given) -> Prepared:
    """Check the arguments, place them and plan the run; nothing of it is computed.

    Args:
      stack: closes iterables, and leaves the context of the mesh, when the run has ended.
      given: by the user.

    Raises:
      TypeError, ValueError: an argument is wrong.
    """
    problem, method, population = _checked(given)
    key = _default_key() if given.key is None else validation.random_key("key", given.key)
    params, hparams, model_state = _variables(problem, given, key)
    feeds: list[Feed] = []
    stack.callback(_close, feeds)
    sources = _sources(feeds, given.train, given.valid, method.batches_per_step[0])
    test = None if given.test is None else _test_source(given.test)
    place = placement.find(
        given.mesh,
        population is not None,
        {
            "params": params,
            "hparams": hparams,
            "model_state": model_state,
            "train": _arrays_of(sources[0]),
            "valid": _arrays_of(sources[1]),
            "test": test,
            "key": key,
        },
    )
    if place is not None:
        stack.enter_context(jax.set_mesh(place.mesh))
        _check_members(place, population)
        stacked = population is not None
        params = place.variables(params, "params", stacked)
        hparams = place.variables(hparams, "hparams", stacked)
        model_state, key = place.variables(model_state, "model_state"), place.variables(key, "key")
        test = test and place.source(test, "test")
        for feed in feeds:
            feed.place = place.fed
            feed.check(place.check_fed)
        sources = [
            source if isinstance(source, FED) else place.source(source, name)
            for source, name in zip(sources, ("train", "valid"), strict=True)
        ]
    examples = [source.example() if isinstance(source, FED) else source for source in sources]
    data.check_sources(examples[0], examples[1], method.batches_per_step[0])
    keys = key if population is None else population.keys(key)
    params = _first_params(problem, method, params, hparams, examples[0], keys, population)
    fed_valid = isinstance(sources[1], FED)
    plan = Plan(
        problem=problem,
        method=method,
        capacity=min([_CAPACITY, *(feed.capacity for feed in feeds)]),
        judge_every=given.judge_every,
        keep_best=bool(given.keep_best) and not fed_valid,
        judges=examples[1].renewed and not fed_valid or getattr(method, "judges", False),
        tests=test is not None,
        metrics=_metrics(problem, method, params, hparams, examples, test, model_state, population),
        population=population is not None,
        axis=None if place is None else place.population_axis,
    )
    _check_columns(plan)
    states = model_state
    if population is not None:
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (population.n, *jnp.shape(x))), model_state)
    arguments = params, hparams, keys, *examples, states
    if place is not None:
        carry = loop.abstract_start(plan, *arguments)
        members = None if population is None else population.n
        plan = dataclasses.replace(plan, layout=placement.layout(carry, members, place, params, hparams))
    return Prepared(plan, arguments, sources, test, feeds, place, model_state)


def _checked(given: Given) -> tuple[Any, Method, Population | None]:
    """The problem, the method and the population."""
    validation.kind("problem", given.problem, "a problem")
    problem = given.problem
    if given.constraints is not None:
        problem = dataclasses.replace(problem, constraints=given.constraints)
    method = default_method(problem, given.train) if given.method is None else given.method
    validation.kind("method", method, "a method")
    if given.population is not None and not isinstance(given.population, Population):
        raise TypeError(f"population must be bilevel.population(n, ...), got {given.population!r:.80}.")
    validation.whole_number("judge_every", given.judge_every, 1)
    return problem, method, given.population


def _variables(problem, given: Given, key) -> tuple[PyTree, PyTree, PyTree]:
    """Params (None where a problem's start makes them), hparams and model state."""
    params, hparams, population = given.params, given.hparams, given.population
    if population is not None:
        params, hparams = population.start(key, params, hparams)
    hparams = validation.floating(hparams, "hparams")
    validation.finite(hparams, "hparams")
    for i in range(population.n if population else 1):
        own = _member(hparams, i) if population else hparams
        bind(problem.constraints, own).check(own)
    if problem.start is None or params is not None:
        params = validation.floating(params, "params")
    return params, hparams, validation.strong(given.model_state)


def _metrics(problem, method, params, hparams, examples, test, model_state, population) -> tuple[str, ...]:
    """Names of outer's metrics; both losses fit the arguments."""
    if population is not None:
        params, hparams = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (params, hparams)
        )
    seen = jax.eval_shape(lambda hparams: method.seen(hparams, 0), hparams)
    train, valid = (data.abstract_batch(source) for source in examples)
    metrics = validation.metric_names(problem, params, seen, train, valid, model_state)
    if test is not None:
        whole = data.abstract_batch(test, whole=True)
        validation.metric_names(problem, params, seen, train, whole, model_state)
    return metrics


def _close(feeds: list[Feed]) -> None:
    for feed in feeds:
        feed.close()


def _default_key() -> jax.Array:
    """``jax.random.key(0)``, which would compile two small programs at the first call."""
    zeros: Any = np.zeros(2, np.uint32)
    return jax.random.wrap_key_data(zeros, impl="threefry2x32")


def _member(hparams, i: int):
    """A member's hyperparameters for a look at their values."""

    def own(x):
        if readable(x):
            return np.asarray(x)[i]
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    return jax.tree.map(own, hparams)


def _first_params(problem, method, params, hparams, train: data.Source, keys, population: Population | None):
    shapes = has_shapes((hparams, train))
    if population is None:
        seen = jax.eval_shape(lambda h: method.seen(h, 0), hparams) if shapes else method.seen(hparams, 0)

        def batch():
            return data.abstract_batch(train) if shapes else train.batch(keys, 0)

        return validation.first_params(problem, params, seen, batch, keys)
    if problem.start is not None and params is None:

        def begin(hparams, key):
            return problem.start(method.seen(hparams, 0), train.batch(key, 0), key)

        if shapes:
            # A shape is no argument of a program.
            made = jax.eval_shape(jax.vmap(begin), hparams, keys)
        else:
            made = jax.jit(jax.vmap(begin))(hparams, keys)
        return validation.floating(made, "start(hparams, batch, key)")
    return validation.floating(params, "params")


def _finite_first(values: np.ndarray) -> float:
    values = values.ravel()
    finite = values[np.isfinite(values)]
    return float(finite[0] if finite.size else values[0])


def _arrays_of(source) -> PyTree:
    return source.first if isinstance(source, Feed) else None if isinstance(source, EpisodeHalf) else source


def _check_members(place: Placement, population: Population | None) -> None:
    if population is None or not place.members:
        return
    devices = place.mesh.shape[placement.POPULATION]
    if population.n % devices:
        raise ValueError(
            f"population: {population.n} members do not divide over the {devices} devices of mesh axis "
            f'"{placement.POPULATION}"; take a multiple.'
        )


def _test_source(test) -> data.Source:
    if data.is_iterable(test):
        raise TypeError(f"test must be arrays, got a Python iterable ({type(test).__name__}).")
    return data.whole_source(data.as_source(test, "test"), "test")


def _sources(feeds: list[Feed], train, valid, per_step: int) -> list:
    if isinstance(train, data.Episodes):
        if valid is not None:
            raise ValueError("valid must be None where train is episodes(...), which holds both.")
        feed, *both = halves(train)
        feeds.append(feed)
        return both
    if train is valid and data.is_iterable(train):
        raise ValueError("train and valid are the same iterable; each batch would go to one of the two.")
    return [
        _source(feeds, train, "train", per_step, single=False),
        _source(feeds, valid, "valid", 1, single=True),
    ]


def _source(feeds: list[Feed], value, name: str, per_step: int, single: bool):
    if data.is_iterable(value.source if isinstance(value, data.WithRng) else value):
        feeds.append(Feed(value, name, per_step, single))
        return feeds[-1]
    return data.as_source(value, name)


def _check_columns(plan: Plan) -> None:
    names = ["step", "seconds", "judged", "test", *plan.columns]
    clash = sorted(name for name in plan.metrics if names.count(name) > 1)
    if clash:
        raise ValueError(f"outer: metrics named {', '.join(clash)} clash with columns of the history.")
