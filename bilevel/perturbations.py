"""Perturbed hyperparameters: what a best response is fitted under and judged by.

With hyperparameters u in free units and one scale s_k > 0 for each entry, perturbations are e = s z with z
standard normal, each taken with both signs on the same examples: what a loss does at e = 0 cancels from the
difference, and with it most of the noise. The hyperparameters and the scales follow the gradient of::

    E_z outer(response at u + s z, u + s z) - entropy sum_k ln s_k                                  (1)

whose second term keeps the scales from shrinking to nothing; near a minimum of curvature k in u_k they come
to rest at sqrt(entropy / k).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import data, responses, validation
from bilevel.constraints import BoundConstraints
from bilevel.lift import axes
from bilevel.problem import Batch, FixedPoint, PyTree
from bilevel.responses import Response

# A response to one scale below this share of params (of a large scale) changes a loss by less than the
# rounding of float32.
_VANISHED = 1e-5
# So many times the first scale, in free units, is out of every range where a response is linear.
_RUNAWAY = 20.0
# Estimates in a row after which a response that has vanished will not come back.
_PATIENCE = 100


@dataclasses.dataclass(frozen=True)
class Perturbations:
    """Settings, see `bilevel.best_response`; ``optimizer`` moves the scales.

    ``groups``: of rows with a perturbation each; None: a perturbation for every row, of one sign.
    """

    scale: float
    entropy: float
    groups: int | None
    optimizer: Any
    warmup: int

    def init(self, n: int, dtype) -> Scales:
        """The first scales of n hyperparameters."""
        raw = jnp.full(n, _inverse_softplus(self.scale), dtype)
        optimizer = ()
        if self.entropy:
            optimizer = begun("the optimiser of the scales", self.optimizer, raw, "a vector")
        return Scales(raw, optimizer, jnp.int32(0), jnp.int32(0), jnp.zeros((), dtype))

    def unit(self, n: int) -> float:
        """What perturbations are divided by where they multiply a response; it stays as it is.

        At the first scale a fit by gradients is then as stiff as params are by themselves: of a mean over g
        vectors z the matrices z z^T have, in the mean over their squares, a norm of (n + 1 + g) / g. (Units
        that follow the scales would keep it so, and drown a response of small scales in the steps of Adam,
        which are of one size.) Layers of a model respond to perturbations as they are.
        """
        if self.groups is None:
            return 1.0
        return self.scale * math.sqrt((n + 1 + self.groups) / self.groups)

    def noise(self, key, like: jax.Array, batch: Batch) -> jax.Array:
        """Standard normal vectors of size and dtype of ``like``; shape (groups or rows, n)."""
        count = data.rows(batch) if self.groups is None else self.groups
        return jax.random.normal(key, (count, like.size), like.dtype)

    def mean(self, loss: Callable, batch: Batch, noise: jax.Array) -> PyTree:
        """The mean of ``loss(rows, z)`` over the groups of rows and both signs of their z, of shape (n,).

        Batches are dealt out row by row, so that each group has rows of every shard. Where every row has a
        perturbation the loss takes all of them at once, of shape (rows, n).
        """
        if self.groups is None:
            return loss(batch, noise)

        def pair(rows, z):
            both = jax.lax.map(lambda sign: loss(rows, sign * z), jnp.array([1, -1], z.dtype))
            return jax.tree.map(_mean, both)

        if self.groups == 1:
            return pair(batch, noise[0])
        dealt = _dealt(batch, self.groups)
        return jax.tree.map(_mean, jax.lax.map(lambda at: pair(*at), (dealt, noise)))

    def judged(
        self, state: Scales, outer: Callable, constraints: BoundConstraints, free, valid, key
    ) -> Judged:
        """Eq. (1) and its gradient.

        Args:
          state: of the scales.
          outer: ``(free, e, rows) -> (value, metrics)``, with params that respond where ``free`` moves, and
            hyperparameters perturbed by e, or not where e is None.
          constraints: of the problem; what is fixed has a gradient of zero.
          free: hyperparameters.
          valid: the batch of the outer loss.
          key: of the perturbations.
        """
        if not self.entropy:
            at = _aux_too(lambda u: outer(responses.held(constraints, u), None, valid))
            grads, (value, metrics) = jax.grad(at, has_aux=True)(free)
            return Judged(value, metrics, grads, jnp.zeros_like(state.raw))
        value, metrics = outer(free, None, valid)
        noise = self.noise(key, state.raw, valid)

        def objective(u, raw):
            u, scale = responses.held(constraints, u), jax.nn.softplus(raw)
            mean = self.mean(lambda rows, z: outer(u, scaled(scale, z), rows)[0], valid, noise)
            return mean - self.entropy * jnp.sum(jnp.log(scale))

        return Judged(value, metrics, *jax.grad(objective, argnums=(0, 1))(free, state.raw))

    def after(self, state: Scales, judged: Judged, relative: jax.Array, reads: bool) -> Scales:
        """The scales after a step.

        Args:
          state: before it.
          judged: with the gradient by raw scales.
          relative: sizes of the responses to one scale, as shares of params.
          reads: whether the outer loss reads hyperparameters itself, which then act without a response.
        """
        warm = state.estimates >= self.warmup
        raw, optimizer = state.raw, state.optimizer
        if self.entropy:
            updates, optimizer = optax.with_extra_args_support(self.optimizer).update(
                judged.raw, state.optimizer, raw, value=judged.value, grad=judged.raw
            )
            raw, optimizer = jax.tree.map(
                lambda new, old: jnp.where(warm, new, old),
                (optax.apply_updates(raw, updates), optimizer),
                (raw, state.optimizer),
            )
        largest = jnp.max(relative).astype(raw.dtype)
        gone = warm & (not reads) & (largest < _VANISHED * min(1.0, self.scale))
        estimates = jnp.minimum(state.estimates + 1, self.warmup)
        vanished = jnp.where(gone, jnp.minimum(state.vanished + 1, _PATIENCE), 0)
        return Scales(raw, optimizer, estimates, vanished, largest)

    def stalled(self, state: Scales) -> jax.Array:
        """Whether the response has vanished, or a scale has run away."""
        largest = jnp.max(jax.nn.softplus(state.raw))
        return (state.vanished >= _PATIENCE) | (largest > self.runaway)

    @property
    def runaway(self) -> float:
        """A scale that says that nothing holds it."""
        return _RUNAWAY * max(self.scale, 1.0)


class Scales(NamedTuple):
    """``softplus(raw)`` are the scales, shape (n,), ``optimizer`` the state of what moves them.

    ``estimates`` counts up to the end of the warm-up, ``vanished`` those in a row, as far as they matter,
    at which the response was as good as zero; ``response`` is the largest to one scale, as a share of params.
    """

    raw: jax.Array
    optimizer: PyTree
    estimates: jax.Array
    vanished: jax.Array
    response: jax.Array


class Judged(NamedTuple):
    """Outer loss and metrics without perturbation, gradients of Eq. (1) by free units and raw scales."""

    value: jax.Array
    metrics: dict
    free: PyTree
    raw: jax.Array


def scaled(scale: jax.Array, z: jax.Array) -> jax.Array:
    """Perturbations: of one group, shape (n,), or of every row, (rows, n)."""
    return scale.reshape((1,) * (z.ndim - 1) + scale.shape) * z


def shifted(constraints: BoundConstraints, free, e: jax.Array) -> PyTree:
    """Hyperparameters in free units moved by a vector, and kept where their constraints allow them."""
    moved = jax.tree.map(jnp.add, free, responses.tree(constraints, e, free))
    return constraints.project(moved, free)


def relative_sizes(params, response: Response, factor: jax.Array) -> jax.Array:
    """Norms of the response to each perturbation of size ``factor``, over that of params; shape (n,)."""
    total = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)))
    return responses.sizes(params, response) * factor / jnp.where(total > 0, total, 1)


def check(name: str, problem, groups: int | None) -> None:
    """Raise where a problem has no inner loss to respond to, or no rows that could be dealt out."""
    if isinstance(problem, FixedPoint):
        raise TypeError(
            f"{name} fits a response to an inner loss, which a FixedPoint does not have; take "
            "bilevel.implicit(bilevel.gmres())."
        )
    if problem.start is not None:
        raise ValueError(
            f"{name} fits a response while params train; a problem with start= begins them anew at every "
            "step. Take bilevel.unrolled()."
        )
    if groups is None and axes(problem):
        raise ValueError('perturbations="examples" is for rows of one problem, not for a lifted one.')
    if groups is not None and groups > 1 and axes(problem):
        raise ValueError(
            f"perturbations={groups} deals out the rows of a batch, and the leading axis of a lifted problem "
            "belongs to its members; take perturbations=1."
        )


def begun(name: str, optimizer, tree: PyTree, what: str) -> PyTree:
    """The first state of an optax optimiser; ValueError where it expects another tree."""
    try:
        return optimizer.init(tree)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{name} is applied to {what}, and failed to begin ({type(error).__name__}: {why:.200}). "
            "One that treats parts of a tree by name (optax.masked, optax.multi_transform) does not fit "
            "here; for the scales another one may be given, scales=optax.adam(1e-2)."
        ) from error


def settings(scale, entropy, perturbations, optimizer, warmup, examples: bool = False) -> Perturbations:
    """Checked; ``examples``: whether a perturbation for every row may be asked for.

    Raises:
      TypeError, ValueError: a number out of range, or no optimiser.
    """
    entropy = validation.number("entropy", entropy, minimum=0.0)
    if entropy and optimizer is None:
        raise TypeError("scales must be an optax optimiser such as optax.adam(1e-2) where entropy is not 0.")
    if optimizer is not None:
        validation.kind("scales", optimizer, "an optax optimiser")
    groups = None
    if isinstance(perturbations, str) and examples:
        if perturbations != "examples":
            raise ValueError(f'perturbations must be a whole number or "examples", got {perturbations!r}.')
    else:
        groups = validation.whole_number("perturbations", perturbations, 1)
    return Perturbations(
        validation.number("scale", scale, positive=True),
        entropy,
        groups,
        optimizer,
        validation.whole_number("warmup", warmup, 0),
    )


def _aux_too(fn: Callable) -> Callable:
    """The same, its outputs returned beside the first of them too."""

    def both(*args):
        out = fn(*args)
        return out[0], out

    return both


def _mean(x):
    """Over the leading axis; of what is no number, the first."""
    return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]


def _dealt(batch: Batch, groups: int) -> Batch:
    """Each group's rows, behind a leading axis; keys are split."""
    rows = data.rows(batch)

    def leaf(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.ndim == 0:
            return jax.random.split(x, groups)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (groups,))
        if x.shape[0] != rows or rows % groups:
            raise ValueError(
                f"perturbations={groups} deals out the rows of a batch, but "
                f"batch{jax.tree_util.keystr(path)} has {x.shape[0]} rows"
                f"{'' if x.shape[0] == rows else f', others {rows}'}: take a number that divides the rows of "
                "train and of valid, or 1."
            )
        return jnp.swapaxes(x.reshape(rows // groups, groups, *x.shape[1:]), 0, 1)

    return jax.tree_util.tree_map_with_path(leaf, batch)


def _inverse_softplus(value: float) -> float:
    # ln(e^x - 1), without the overflow.
    return value + math.log(-math.expm1(-value))
