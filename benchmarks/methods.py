"""The methods of the studies: `METHODS` maps a name to what is run.

Methods of one family differ in how they come by a hypergradient, or in how the three variables take turns,
and share the rest: gradient descent on the inner loss at a part of the task's rate, and Adam on the
hyperparameters. Each runs at one setting for all problems (`FAMILIES`). Where the search of
`benchmarks.tune_methods` found a better one, on other seeds than are reported, that runs under the name with
``_tuned``, for all problems too; ``tuned.json`` is the record of that search.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optax

import bilevel
from benchmarks import search
from benchmarks.found import Method
from benchmarks.gradients import Gradient
from benchmarks.problems import Task
from benchmarks.searches import Search

TUNED_PATH = Path(__file__).with_name("tuned.json")
CG = bilevel.implicit(bilevel.cg(max_steps=20, tol=0.0))


class Setting(NamedTuple):
    """What is tuned of a family: Adam's rate, the inner rate as a part of the task's, and inner steps."""

    outer: float
    inner: float
    steps: int

    def __str__(self) -> str:
        return f"Adam {self.outer:g}, inner rate times {self.inner:g}, {self.steps} inner steps"


@dataclasses.dataclass(frozen=True)
class Family:
    """Methods that differ in their setting.

    Args:
      about: what they are, in a few words.
      build: the method at an inner rate and a setting.
      setting: the one that is documented.
      grid: settings that the search tries beside it.
      kind: arguments of `Gradient`.
    """

    about: str
    build: Callable[[float, Setting], object]
    setting: Setting
    grid: tuple[Setting, ...]
    kind: tuple[tuple[str, object], ...] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All of them, the documented one first."""
        return tuple(dict.fromkeys((self.setting, *self.grid)))

    def at(self, setting: Setting) -> Gradient:
        """The method at a setting."""

        def make(task: Task):
            return _built(self.build, setting.inner * task.rate, setting)

        return Gradient(f"{self.about}; {setting}", make, **dict(self.kind))


@functools.cache
def _built(build, rate: float, setting: Setting):
    """Once for each rate and setting, as equal optax transformations are not equal."""
    return build(rate, setting)


def _alternating(estimator: Callable[[float], object]):
    """The family's method: inner steps, a hypergradient, a step of Adam."""

    def build(rate: float, setting: Setting):
        return bilevel.alternating(
            estimator(rate), optax.sgd(rate), optax.adam(setting.outer), inner_steps=setting.steps
        )

    return build


def _soba(rate: float, setting: Setting):
    return bilevel.soba(optax.sgd(rate), optax.adam(setting.outer), linear_step=rate)


def _saba(rate: float, setting: Setting):
    return bilevel.saba(optax.sgd(rate), optax.adam(setting.outer), linear_step=rate)


def _delta_stn(rate: float, setting: Setting):
    return bilevel.delta_stn(optax.sgd(rate), optax.adam(setting.outer), train_steps=setting.steps)


LOOPS = Setting(0.1, 1.0, 20)
LOOPS_GRID = tuple(Setting(outer, 1.0, steps) for outer in (0.03, 0.3) for steps in (5, 50))
# Their outer steps are a hundred times cheaper, and as much shorter.
SINGLE = Setting(0.01, 0.5, 1)
SINGLE_GRID = tuple(Setting(outer, inner, 1) for outer in (0.003, 0.03) for inner in (0.2, 1.0))
SINGLE_KIND = (("sampled", True), ("longer", 100), ("every", 100))

FAMILIES = {
    "implicit": Family("20 steps of conjugate gradients", _alternating(lambda rate: CG), LOOPS, LOOPS_GRID),
    "neumann": Family(
        "20 terms of Neumann's series",
        _alternating(lambda rate: bilevel.implicit(bilevel.neumann(20, rate))),
        LOOPS, LOOPS_GRID,
    ),
    "nystrom": Family(
        "Nystrom's approximation of rank 5, damping 0.01",
        _alternating(lambda rate: bilevel.implicit(bilevel.nystrom(5, 0.01))),
        LOOPS, LOOPS_GRID,
    ),
    "unrolled": Family(
        "derivative of the inner steps", _alternating(lambda rate: bilevel.unrolled()), LOOPS, LOOPS_GRID
    ),
    "one_step": Family(
        "derivative of the last inner step", _alternating(lambda rate: bilevel.one_step()), LOOPS, LOOPS_GRID
    ),
    "soba": Family("one step of all three at once, minibatches", _soba, SINGLE, SINGLE_GRID, SINGLE_KIND),
    "saba": Family("as soba, with tables of all batches", _saba, SINGLE, SINGLE_GRID, SINGLE_KIND),
    "delta_stn": Family(
        "a learned response of params to hyperparameters",
        _delta_stn,
        Setting(0.01, 1.0, 5),
        tuple(Setting(outer, 1.0, steps) for outer in (0.003, 0.03) for steps in (2, 10)),
        (("longer", 20), ("every", 25)),
    ),
}  # fmt: skip


@functools.cache
def _maid():
    return bilevel.maid()


def winners() -> dict[str, Setting]:
    """The settings that the recorded search found, by family."""
    if not TUNED_PATH.exists():
        return {}
    return {name: Setting(*found) for name, found in json.loads(TUNED_PATH.read_text())["winners"].items()}


def _table() -> dict[str, Method]:
    tuned = winners()
    table: dict[str, Method] = {
        "default": Gradient("what bilevel.optimize does where no method is given", lambda task: None)
    }
    for name, family in FAMILIES.items():
        table[name] = family.at(family.setting)
        if tuned.get(name, family.setting) != family.setting:
            table[f"{name}_tuned"] = family.at(tuned[name])
    table["maid"] = Gradient(
        "inexact line search with certified bounds, float64", lambda task: _maid(), double=True, every=1
    )
    return table | {
        "random": Search("random search, log-uniform in the box", search.random),
        "grid": Search("full factorials of 3, 5, 9, ... levels", search.grid),
        "optuna": Search("Optuna's tree-structured Parzen estimator", search.tpe, search.check_optuna),
    }


METHODS = _table()
