"""Losses that are means over the devices of a mapped axis, with the right derivatives of every order.

Inside `jax.pmap`, or `jax.shard_map` with ``check_vma=False``, JAX takes the transpose of a sum over devices
to be that sum again. A `jax.lax.pmean` around a loss then has a gradient that is not averaged, and
derivatives of it are off by factors of the number of devices. What is needed is a pair of linear maps between
one value for all devices ("replicated") and one for each ("varying") that transpose into each other::

    vary:   replicated -> varying      the identity         transpose: total
    total:  varying -> replicated      the sum over devices    transpose: vary                  (1)

    mean(params, hparams, batch) = total(loss(vary(params), vary(hparams), batch)) / devices   (2)

With ``check_vma=True`` JAX keeps track of what varies itself, and `jax.lax.pmean` is that map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel import validation
from bilevel.problem import Composite, FixedPoint, Problem, PyTree


def _primitive(name: str, rule: Callable) -> Primitive:
    """A linear primitive of one operand and the static ``axis_name`` that computes ``rule``."""
    primitive = Primitive(f"bilevel_{name}")
    primitive.def_abstract_eval(lambda x, *, axis_name: x)
    primitive.def_impl(rule)
    mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=False))

    def batched(args, axes, *, axis_name):
        return primitive.bind(args[0], axis_name=axis_name), axes[0]

    batching.primitive_batchers[primitive] = batched
    return primitive


_vary = _primitive("vary", lambda x, *, axis_name: x)
_total = _primitive("total", lambda x, *, axis_name: jax.lax.psum(x, axis_name))
# Eq. (1)
ad.deflinear2(_vary, lambda ct, _, *, axis_name: [_total.bind(ct, axis_name=axis_name)])
ad.deflinear2(_total, lambda ct, _, *, axis_name: [_vary.bind(ct, axis_name=axis_name)])


def _floating(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _varies(x, axis_name: str) -> bool:
    return axis_name in jax.typeof(x).manual_axis_type.varying


@dataclasses.dataclass(frozen=True)
class _Mean:
    """Eq. (2) of a loss and whatever floating values it returns beside it."""

    loss: Callable
    axis_name: Any

    def __call__(self, params, hparams, batch, *state):
        if self._tracked:
            return jax.tree.map(self._tracked_mean, self.loss(params, hparams, batch, *state))
        size = jax.lax.axis_size(self.axis_name)
        params, hparams, state = jax.tree.map(self._varied, (params, hparams, state))

        def mean(x):
            return _total.bind(jnp.asarray(x), axis_name=self.axis_name) / size if _floating(x) else x

        return jax.tree.map(mean, self.loss(params, hparams, batch, *state))

    @property
    def _tracked(self) -> bool:
        """Whether JAX keeps track of what varies: the index of a device then does."""
        try:
            index = jax.lax.axis_index(self.axis_name)
        except NameError as error:
            raise ValueError(
                f'bilevel.pmean: no axis "{self.axis_name}" is mapped here; call this inside jax.pmap or '
                "jax.shard_map over an axis of that name."
            ) from error
        return _varies(index, self.axis_name)

    def _varied(self, x: PyTree) -> PyTree:
        return _vary.bind(jnp.asarray(x), axis_name=self.axis_name) if _floating(x) else x

    def _tracked_mean(self, x):
        # What does not vary is the mean already.
        mean = _floating(x) and _varies(x, self.axis_name)
        return jax.lax.pmean(x, self.axis_name) if mean else x


@dataclasses.dataclass(frozen=True)
class _Predictions(_Mean):
    """The ``predict`` of a composite loss: of one device, but with gradients of all."""

    def __call__(self, params, hparams, batch):
        if not self._tracked:
            params, hparams = jax.tree.map(self._varied, (params, hparams))
        return self.loss(params, hparams, batch)


@dataclasses.dataclass(frozen=True)
class _MeanOfPredictions(_Mean):
    """The ``loss`` of a composite loss, whose outputs are those of one device."""

    def __call__(self, outputs, hparams, batch):
        if self._tracked:
            return self._tracked_mean(self.loss(outputs, hparams, batch))
        value = self.loss(outputs, jax.tree.map(self._varied, hparams), batch)
        return _total.bind(jnp.asarray(value), axis_name=self.axis_name) / jax.lax.axis_size(self.axis_name)


def pmean(problem: Problem, axis_name: str) -> Problem:
    """The problem whose losses are means over the devices of a mapped axis.

    For code that is mapped by `jax.pmap` or `jax.shard_map`, with batches split along the axis and params and
    hyperparameters the same on all devices: estimates, hypergradients and steps inside are then those of all
    the data, and the same on all devices. A `jax.lax.pmean` around the loss gives wrong derivatives under
    `jax.pmap`. With arrays that carry a sharding, nothing of this is needed.

    Both losses must be means over their batches (terms without data included), with as many rows on each
    device. Floating metrics and model states are averaged as well; ``counts`` are those of one device.
    `bilevel.argmin` inside `jax.shard_map` needs ``check_vma=False``.

    Args:
      problem: with losses of what one device holds.
      axis_name: of `jax.pmap` or of the mesh.

    Raises:
      TypeError: a `FixedPoint`, the mean of whose maps is not the map of all data; a name that is no string.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, x: jnp.mean((w - x) ** 2) + h * w**2,
      ...     outer=lambda w, h, x: jnp.mean((w - x) ** 2),
      ... )
      >>> fn = bilevel.hypergradient(bilevel.pmean(problem, "devices"))
      >>> x = jnp.ones((jax.device_count(), 4))  # w* = 1 / (1 + h)
      >>> est = jax.pmap(fn, "devices", in_axes=(None, None, 0, 0))(0.5, 1.0, x, x)
      >>> print(f"{est.grad[0]:.3f}")
      0.250
    """
    validation.kind("problem", problem, "a problem")
    if isinstance(problem, FixedPoint):
        raise TypeError(
            "bilevel.pmean takes a Problem, got a FixedPoint: the mean over devices of a map is not the map "
            "of all data. Average inside the map what it computes from the data, and shard arrays over a "
            "mesh instead of mapping: everything then works as it is."
        )
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of a mapped axis, got {axis_name!r}.")
    inner: Callable = _Mean(problem.inner, axis_name)
    if isinstance(problem.inner, Composite):
        inner = Composite(
            _Predictions(problem.inner.predict, axis_name),
            _MeanOfPredictions(problem.inner.loss, axis_name),
            problem.inner.penalty,
        )
    return dataclasses.replace(problem, inner=inner, outer=_Mean(problem.outer, axis_name))
