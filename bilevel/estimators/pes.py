"""Hypergradients by evolution strategies through truncated inner loops that keep what they perturbed.

Of N particles in antithetic pairs each trains a copy of params. A horizon of T inner steps is cut into
truncations of K. In each of them particle i draws a perturbation eps_i of the hyperparameters, with standard
deviation sigma in free units, goes on from where it stands, and adds it to xi_i, the sum of its perturbations
since the horizon began::

    F = mean over the horizon of outer:      g = (1 / (N sigma^2)) sum_i xi_i L_i                      (1)
    F = outer at its end:                    g = (T / K) (1 / (N sigma^2)) sum_i (xi_i L_i - xi_i' L_i')   (2)

with L_i the outer loss in this truncation, L_i' and xi_i' those before it. Averaged over the truncations of a
horizon, g is an unbiased estimate of the gradient of F, smoothed by the perturbations, however short K is.
It needs no derivative of anything, so that a trajectory whose derivative explodes, a discrete
hyperparameter or a model with while loops is no obstacle. Plain evolution strategies (``persistent=False``)
take eps_i for xi_i and start every particle where the unperturbed one stands: a lower variance, and the bias
of truncation.

With an analytic gradient a_i of the loss of one truncation, at particle i and unperturbed hyperparameters,
the part of (1) within the truncation is exact up to sigma^2, and the rest has less variance::

    g = (1 / N) sum_i (a_i + (1 / sigma^2) xi_i' (L_i - eps_i . a_i))                                  (3)

Cost: (N + 1) K inner steps; the unperturbed trajectory is what `Estimate.point` has. Memory: N copies of
params, optimiser state and hyperparameters. The variance grows with the number of hyperparameters and of
truncations, and falls with N.

References:
  Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
  evolution strategies", 2021, arXiv:2112.13835.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import validation
from bilevel.constraints import bind
from bilevel.estimators.rollout import TrajectoryEstimator, settings
from bilevel.inner_solvers import inner_step, started
from bilevel.lift import examples
from bilevel.problem import Counts, Estimate, HParams, Point, outer_value, register, unsolved
from bilevel.trees import copied
from bilevel.vectors import axpy, scaled, where, zeros

_OBJECTIVES = "mean", "final"


@register
@dataclasses.dataclass(frozen=True)
class PesState:
    """What the next truncation needs.

    ``particles``: N points, stacked, or None. ``drift``: the sums xi of the first of each pair, (N / 2, ...);
    those of the others are their negatives. ``losses``: L_i of the last truncation, (N,). ``origin``: where a
    horizon begins. ``truncations``: how many are done.
    """

    particles: Point | None
    drift: HParams
    losses: jax.Array
    origin: Point
    truncations: jax.Array


@dataclasses.dataclass(frozen=True)
class Pes(TrajectoryEstimator):
    """See `pes`."""

    horizon: int
    particles: int
    sigma: float
    objective: str
    evaluations: int
    persistent: bool
    analytic: bool
    responds = True
    continues = "it begins anew by itself, where its horizon does; leave restart out"

    @property
    def first_order(self) -> bool:
        """Whether no derivative is taken through the optimiser."""
        return not self.analytic

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of a truncation, all of them kept."""
        assert self.steps is not None  # checked by init
        return self.steps, self.steps

    def seen(self, hparams, j):
        """What the losses and optimisers see at step ``j`` of the horizon."""
        whole = dataclasses.replace(self, steps=self.horizon)
        return TrajectoryEstimator.seen(whole, hparams, j)

    def init(self, problem, point, hparams):
        """Particles at the point, none of them perturbed yet."""
        super().init(problem, point, hparams)
        steps, _ = self.lengths
        if self.horizon % steps:
            raise ValueError(
                f"horizon must be a multiple of the steps of a truncation, {steps}, got {self.horizon}."
            )
        if steps % self.evaluations:
            raise ValueError(
                f"evaluations must divide the {steps} steps of a truncation, got {self.evaluations}."
            )
        pairs = self.particles // 2
        free = bind(problem.constraints, hparams).to_free(hparams)
        return PesState(
            particles=_repeated(point, self.particles) if self.persistent else None,
            drift=zeros(pairs, free),
            losses=jnp.zeros(self.particles, jnp.float32),
            origin=copied(point),
            truncations=jnp.int32(0),
        )

    def estimate(self, problem, state, point, hparams, draw, valid, key, *, free=None):
        """Eq. (1) to (3) for one truncation; the point of the estimate is the end of the unperturbed one.

        ``free``: hyperparameters in free units, where they say more than hparams do.
        """
        steps, (pairs, n) = self.lengths[0], (self.particles // 2, self.particles)
        constraints = bind(problem.constraints, hparams)
        free = constraints.to_free(hparams) if free is None else free
        part = state.truncations % (self.horizon // steps)
        fresh = part == 0
        key_start, key_noise = jax.random.split(key)

        def run(point, free):
            """The end of a truncation and its loss."""
            return self._run(problem, point, constraints.to_natural(free), draw, valid, part * steps)

        def begun(point, free):
            if problem.start is None:
                return where(fresh, state.origin, point)
            anew = started(
                problem, self.inner, point, self.seen(constraints.to_natural(free), 0), draw(0), key_start
            )
            anew = dataclasses.replace(anew, model_state=state.origin.model_state)
            return where(fresh, anew, point)

        drawn = jax.vmap(lambda k: optax.tree.random_like(k, free))(jax.random.split(key_noise, pairs))
        noise = scaled(drawn, self.sigma)
        both = jax.tree.map(lambda e: jnp.concatenate([e, -e]), noise)
        moved = jax.vmap(lambda e: constraints.project(jax.tree.map(jnp.add, free, e), free))(both)
        mean = begun(point, free)
        starts = jax.vmap(begun)(state.particles, moved) if self.persistent else _repeated(mean, n)
        every = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), (mean, free), (starts, moved))
        ends, losses, values, metrics = jax.vmap(run)(*every)
        end, particles = jax.tree.map(lambda x: x[0], ends), jax.tree.map(lambda x: x[1:], ends)
        losses = losses[1:]
        before = jax.tree.map(lambda x: jnp.where(fresh, 0, x), state.drift)
        drift = jax.tree.map(jnp.add, before, noise) if self.persistent else noise

        def pulled(drift, losses):
            """(1 / (N sigma^2)) sum_i drift_i L_i, the drifts of a pair being opposite."""
            across = (losses[:pairs] - losses[pairs:]) / (n * self.sigma**2)
            return jax.tree.map(lambda x: jnp.tensordot(across.astype(x.dtype), x, 1), drift)

        if self.objective == "final":
            scale = self.horizon // steps
            old = jax.tree.map(lambda x: -x, pulled(before, state.losses))
            free_grad = jax.tree.map(lambda a, b: scale * (a + b), pulled(drift, losses), old)
        elif self.analytic:

            def loss(free, start):
                return run(start, free)[1]

            own = jax.vmap(jax.grad(loss), in_axes=(None, 0))(free, starts)
            along = sum(
                jnp.sum(jnp.reshape(e * g, (n, -1)), axis=1)
                for e, g in zip(jax.tree.leaves(both), jax.tree.leaves(own), strict=True)
            )
            inside = jax.tree.map(lambda g: jnp.mean(g, axis=0), own)
            free_grad = axpy(1.0, inside, pulled(before, losses - along)) if self.persistent else inside
        else:
            free_grad = pulled(drift, losses)
        free_grad = constraints.only_tuned(free_grad)
        _, to_natural = jax.vjp(constraints.to_free, hparams)
        rows, outer_rows = examples(problem, draw.last), examples(problem, valid)
        estimate = Estimate(
            value=values[0],
            grad=to_natural(free_grad)[0],
            free_grad=free_grad,
            point=end,
            error=jnp.full_like(values[0], jnp.inf),
            counts=Counts(
                inner_grad=jnp.float32((n + 1) * steps * rows),
                outer_grad=jnp.float32((n + 1) * self.evaluations * outer_rows),
                hvp=jnp.float32(n * steps * rows if self.analytic else 0),
                cross=jnp.float32(n * steps * rows if self.analytic else 0),
            ),
            solve=unsolved(values[0]),
            metrics=jax.tree.map(lambda x: x[0], metrics),
        )
        state = PesState(
            particles=particles if self.persistent else None,
            drift=drift if self.persistent else state.drift,
            losses=losses.astype(state.losses.dtype),
            origin=state.origin,
            truncations=state.truncations + 1,
        )
        return estimate, state

    def _run(self, problem, point: Point, hparams, draw, valid, offset):
        """The end of a truncation, its loss, and outer there: value and metrics."""
        length = self.lengths[0] // self.evaluations

        def step(point, j):
            return inner_step(problem, self.inner, point, self.seen(hparams, offset + j), draw(j)), None

        def stretch(point, j):
            point, _ = jax.lax.scan(step, point, j)
            seen = self.seen(hparams, offset + j[-1])
            return point, outer_value(problem, point.params, seen, valid, point.model_state)

        steps = jnp.arange(self.lengths[0], dtype=jnp.int32).reshape(self.evaluations, length)
        end, (values, metrics) = jax.lax.scan(stretch, point, steps)
        loss = values[-1] if self.objective == "final" else jnp.mean(values)
        return end, loss, values[-1], jax.tree.map(lambda x: x[-1], metrics)


def _repeated(tree, n: int):
    """So many of it, stacked."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), tree)


def pes(
    horizon: int,
    particles: int,
    sigma: float = 0.1,
    inner: Any = None,
    steps: int | None = None,
    objective: str = "mean",
    evaluations: int = 1,
    persistent: bool = True,
    analytic: bool = False,
    per_step=None,
) -> Pes:
    """Persistent evolution strategies: short truncations, many perturbed runs, no bias of truncation.

    For the hyperparameters of one long training run, above all where its derivative explodes. Each outer step
    of a method is one truncation, of its ``inner_steps``; a horizon is several, and then training begins anew
    where it began. The hyperparameters move in between, as in training they would. Its gradient is that of F
    smoothed by perturbations of size sigma, and noisy: the stated error is infinite.

    Args:
      horizon: T, inner steps of a whole training run; a multiple of the steps of a truncation.
      particles: N, even.
      sigma: standard deviation of the perturbations, in free units (a tenth of the logarithm for what is
        `bilevel.positive`).
      inner: an optax optimiser or `bilevel.tuned`; default that of the method it is used in.
      steps: K, of a truncation; default the method's inner steps.
      objective: "mean": outer, averaged over the horizon, Eq. (1); "final": outer at its end, Eq. (2), with a
        higher variance.
      evaluations: how many times in a truncation outer is evaluated, in equal distances, where the mean is
        meant; they divide ``steps``.
      persistent: False for plain evolution strategies, which are biased by truncation.
      analytic: add the derivative of each truncation as a control variate, Eq. (3); with "mean" only.
      per_step: as in `bilevel.unrolled`, over the steps of the horizon.

    Raises:
      TypeError, ValueError: an optimiser that is none; particles that are odd or too few, numbers out of
      range
        or that do not divide.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> estimator = bilevel.pes(50, 2000, inner=optax.sgd(0.2), steps=50)
      >>> fn = jax.jit(bilevel.hypergradient(problem, estimator))
      >>> est = fn(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0))
      >>> print(f"{est.params:.3f} {est.grad:.1f}")
      1.000 1.0

    References:
      Vicol, Metz and Sohl-Dickstein, 2021, arXiv:2112.13835.
    """
    inner, steps, _, per_step, _ = settings(inner, steps, None, per_step)
    horizon = validation.whole_number("horizon", horizon, 1)
    particles = validation.whole_number("particles", particles, 2)
    if particles % 2:
        raise ValueError(
            f"particles come in pairs of opposite perturbations: an even number, got {particles}."
        )
    validation.one_of("objective", objective, _OBJECTIVES)
    evaluations = validation.whole_number("evaluations", evaluations, 1)
    if objective == "final" and evaluations != 1:
        raise ValueError(f'evaluations must be 1 where objective="final", got {evaluations}.')
    analytic, persistent = validation.flag("analytic", analytic), validation.flag("persistent", persistent)
    if analytic and objective == "final":
        raise ValueError('analytic needs objective="mean".')
    return Pes(
        inner, steps, None, False, per_step, None,
        horizon=horizon, particles=particles, sigma=validation.number("sigma", sigma, positive=True),
        objective=objective, evaluations=evaluations, persistent=persistent, analytic=analytic,
    )  # fmt: skip
