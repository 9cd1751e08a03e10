"""Hypergradients through a fitted best response: how params follow hyperparameters, learned with them.

With params w at hyperparameters u (free units), a response R of `bilevel.responses` is fitted to what
training would do at hyperparameters nearby, and the outer loss differentiated through it::

    R minimises   E_e inner(w + R e, hparams(u + e), train),   e = s z, z standard normal, s the scales    (1)
    dF/du = d/du outer(w + R (u' - u), hparams(u'), valid) at u' = u + e, in the mean over e               (2)

Nothing is differentiated by hyperparameters on the training side: rates of Bernoulli masks, strengths of
augmentations and whole numbers are hyperparameters like others. For an inner loss of known structure,
`bilevel.composite`, predictions are linear in the response in (1), so that fitting it is a convex problem in
the perturbed weights: ``predict(w) + J R e``, one forward derivative. R is learned in units of the first
scale, in which it is as stiff as params are. Plain gradient steps then slow down as the scales shrink; those
of Adam do not, but let what predictions do not see of R walk at random: on networks take plain ones.

Cost: for each fitted batch two gradients of the inner loss (two forward derivatives and their reverse where
it is linearised), and two gradients of the outer loss, or one where ``entropy`` is 0. Memory: R, which is
params and a row of each layer's outputs for each hyperparameter, and its optimiser's state.

Exact in the limit of small scales where R can be the true response: for vectors always, for kernels where
each hyperparameter rescales what leads to an output unit. Else as good as the best such R. Not for
hyperparameters of the optimiser.

References:
  Bae and Grosse, "Delta-STN: efficient bilevel optimization for neural networks using structured response
  Jacobians", 2020, arXiv:2010.13514.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import influence, perturbations, responses, validation
from bilevel.constraints import bind
from bilevel.inner_solvers import along
from bilevel.lift import axes, examples
from bilevel.perturbations import Perturbations, Scales, shifted
from bilevel.perturbations import settings as _settings
from bilevel.problem import (
    Composite,
    Counts,
    Estimate,
    Point,
    PyTree,
    StaticTree,
    inner_value,
    outer_value,
    unsolved,
)
from bilevel.responses import Response


class BestResponseState(NamedTuple):
    """The response in units of `Perturbations.unit`, its optimiser's state, the scales."""

    response: Response
    optimizer: PyTree
    scales: Scales


@dataclasses.dataclass(frozen=True)
class BestResponse:
    """See `best_response`."""

    optimizer: Any
    steps: int | None
    noise: Perturbations
    structure: StaticTree
    trajectory = False
    responds = True

    def init(self, problem, point, hparams):
        """A response of zero."""
        perturbations.check("best_response", problem, self.noise.groups)
        constraints = bind(problem.constraints, hparams)
        n = responses.count(constraints, hparams)
        response = responses.first_response(point.params, n, self.structure, axes(problem))
        dtype = responses.vector(constraints, hparams).dtype
        optimizer = perturbations.begun(
            "the optimiser of the response",
            self.optimizer,
            response,
            "its gates and kernels, trees like params",
        )
        return BestResponseState(response, optimizer, self.noise.init(n, dtype))

    def estimate(self, problem, state, point, hparams, draw, valid, key, *, free=None):
        """Eq. (1) on the batches of the draw, then Eq. (2).

        ``free``: hyperparameters in free units, where they say more than hparams do.
        """
        constraints = bind(problem.constraints, hparams)
        free = constraints.to_free(hparams) if free is None else free
        key_fit, key_valid = jax.random.split(key)
        steps = self.steps or draw.steps

        def fit(j, at):
            batch = draw(j)
            noise = self.noise.noise(jax.random.fold_in(key_fit, j), state.scales.raw, batch)
            grad = jax.grad(self.fit_loss, argnums=1)(
                problem, at.params, point, constraints, free, state.scales, batch, noise
            )
            return along(self.optimizer, at, grad)

        fitted = jax.lax.fori_loop(0, steps, fit, Point(state.response, state.optimizer))
        response, scale = fitted.params, jax.nn.softplus(state.scales.raw)
        unit = self.noise.unit(scale.size)

        def outer(u, e, rows):
            moved = u if e is None else shifted(constraints, u, e)
            away = jax.tree.map(jnp.subtract, moved, free)
            params = responses.moved(point.params, response, responses.vector(constraints, away) / unit)
            return outer_value(problem, params, constraints.to_natural(moved), rows, point.model_state)

        judged = self.noise.judged(state.scales, outer, constraints, free, valid, key_valid)
        relative = perturbations.relative_sizes(point.params, response, scale / unit)
        reads = influence.outer_reads(problem, point.params, hparams, valid, point.model_state)
        scales = self.noise.after(state.scales, judged, relative, reads)
        _, to_natural = jax.vjp(constraints.to_free, hparams)
        fits = steps * 2 * examples(problem, draw.last)
        linear = isinstance(problem.inner, Composite)
        estimate = Estimate(
            value=judged.value,
            grad=to_natural(judged.free)[0],
            free_grad=judged.free,
            point=point,
            error=jnp.full_like(judged.value, jnp.inf),
            counts=Counts(
                inner_grad=jnp.float32(0 if linear else fits),
                outer_grad=jnp.float32((2 if self.noise.entropy else 1) * examples(problem, valid)),
                hvp=jnp.float32(fits if linear else 0),
                cross=jnp.float32(0),
            ),
            solve=unsolved(judged.value),
            metrics=judged.metrics,
        )
        return estimate, BestResponseState(response, fitted.opt_state, scales)

    def fit_loss(self, problem, response, point, constraints, free, scales, batch, noise):
        """Eq. (1) for given perturbations, of shape (groups, n)."""
        scale = jax.nn.softplus(scales.raw)

        def loss(rows, z):
            moved = shifted(constraints, free, scale * z)
            away = responses.vector(constraints, jax.tree.map(jnp.subtract, moved, free))
            change = responses.change(point.params, response, away / self.noise.unit(scale.size))
            return _linearised(problem, point, change, constraints.to_natural(moved), rows)

        return self.noise.mean(loss, batch, noise)


def _linearised(problem, point, change, hparams, batch):
    """The inner loss at params and their change, of predictions linear in the change where there are any."""
    moved = jax.tree.map(jnp.add, point.params, change)
    inner = problem.inner
    if not isinstance(inner, Composite):
        return inner_value(problem, moved, hparams, batch, point.model_state)[0]
    outputs, tangent = jax.jvp(lambda w: inner.predict(w, hparams, batch), (point.params,), (change,))
    value = inner.loss(jax.tree.map(jnp.add, outputs, tangent), hparams, batch)
    return value if inner.penalty is None else value + inner.penalty(moved, hparams)


def best_response(
    optimizer,
    steps: int | None = None,
    scale: float = 0.5,
    entropy: float = 0.0,
    scales=None,
    perturbations: int = 1,
    response: Any = True,
    warmup: int = 0,
) -> BestResponse:
    """A fitted response of params to hyperparameters, and the gradient through it: Eq. (1) and (2).

    The state holds the response: `bilevel.delta_stn` keeps it in step with params that train. At a point by
    itself (`bilevel.hypergradient`) it begins at zero, and ``steps`` have to be enough to fit it. Its error
    is unknown, and stated as infinite. The gradient of `bilevel.fixed` hyperparameters is zero.

    Args:
      optimizer: the optax optimiser of the response.
      steps: fitting steps of an estimate; default one for each inner step of the method, on its batch.
      scale: of the perturbations at first, in free units; the same for all. Small ones see the response at a
        point, large ones a mean over the neighbourhood.
      entropy: weight of the entropy that keeps scales apart from zero, with which they are tuned; 0: they
        stay as they are, and the outer loss is not perturbed.
      scales: the optax optimiser of the scales, where they are tuned.
      perturbations: of a batch, whose rows are dealt out to them; each is taken with both signs. The inner
        and the outer loss have to be means over rows (and terms without any) where it is more than 1.
      response: which parts of params respond, and how: a tree that matches params, a prefix of it, or a dict
        of names of parts. False: not at all; True: kernels are rescaled along their axis of output units,
        which is that of the bias beside them, or else the last one (the first, where the name is "weight");
        the number of an axis: along that one; "full": entry by entry, with a copy for each hyperparameter.
      warmup: leave the scales as they are for so many first estimates.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> fn = bilevel.hypergradient(problem, bilevel.best_response(optax.sgd(0.1), steps=500, scale=0.01))
      >>> est = fn(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0))
      >>> print(f"{est.grad:.2f}")
      1.00

    References:
      Bae and Grosse, 2020, arXiv:2010.13514.
    """
    return BestResponse(
        validation.kind("optimizer", optimizer, "an optax optimiser"),
        None if steps is None else validation.whole_number("steps", steps, 1),
        _settings(scale, entropy, perturbations, scales, warmup),
        responses.setting(response),
    )
