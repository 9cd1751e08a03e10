"""Self-Tuning Networks: params that are a function of hyperparameters, trained under perturbations of them.

With hyperparameters u in free units, a response R of `bilevel.responses` and perturbations e = s z::

    params(u) = w + R u                                                                          (1)
    w, R <- inner update by the gradient of E_z inner(params(u + e), hparams(u + e), train)     (2)
    u, s <- outer update by that of E_z outer(params(u + e), hparams(u + e), valid) - entropy sum ln s   (3)

``train_steps`` of (2), then ``valid_steps`` of (3), in turn; an outer step here is one of (3), and those of
(2) come before the first of each round. With ``centred`` the response is to e alone, params(u) = w: it
stays put where u moves, and its conditioning does not depend on where u is.

References:
  MacKay, Vicol, Lorraine, Duvenaud and Grosse, "Self-tuning networks: bilevel optimization of hyperparameters
  using structured best-response functions", 2019, arXiv:1903.03088.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data, influence, perturbations, responses, validation
from bilevel.constraints import BoundConstraints
from bilevel.inner_solvers import along
from bilevel.lift import axes, examples
from bilevel.methods.alternating import Alternating, AlternatingState, alternating
from bilevel.nn.layers import response as nn_response
from bilevel.perturbations import Perturbations, Scales, relative_sizes, scaled, settings, shifted
from bilevel.placement import refuse_explicit
from bilevel.problem import (
    Counts,
    Estimate,
    Info,
    Params,
    Point,
    PyTree,
    StaticTree,
    Status,
    inner_value,
    outer_value,
    register,
    static,
    unsolved,
)
from bilevel.responses import Response

COLUMNS = ("response", "largest_scale")
_TOGETHER = "params and response, a pair of trees like params"


class Learned(NamedTuple):
    """The response and the scales."""

    response: Response
    scales: Scales


@register
@dataclasses.dataclass(frozen=True)
class StnState(AlternatingState):
    """As in `AlternatingState`, but for ``point.params``: w of Eq. (1)."""

    centred: bool = static(default=False)

    @property
    def params(self) -> Params:
        """Eq. (1); of each member where the state is that of a population."""
        if self.centred:
            return self.point.params

        def at(w, response, free):
            return responses.moved(w, response, responses.vector(self.constraints, free))

        for _ in range(self.estimator.scales.raw.ndim - 1):
            at = jax.vmap(at)
        return at(self.point.params, self.estimator.response, self.free)


@dataclasses.dataclass(frozen=True)
class Responding:
    """Stands for the estimator where the loop begins: it only says what the method is able to do."""

    trajectory = False
    responds = True

    def init(self, problem, point, hparams):
        """Nothing."""
        del problem, point, hparams
        return ()

    def estimate(self, problem, state, point, hparams, draw, valid, key):
        """Never called."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Stn:
    """See `stn`."""

    method: Alternating
    noise: Perturbations
    structure: StaticTree
    centred: bool
    columns = COLUMNS
    differentiated = None

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """Training and validation batches that one outer step takes."""
        return self.method.batches_per_step

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        return self.method.seen(hparams, j)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state: a response of zero, so that params are those given."""
        validation.kind("problem", problem, "a problem")
        perturbations.check("stn", problem, self.noise.groups)
        begun = self.method.init(problem, params, hparams, train, valid, key=key, model_state=model_state)
        constraints, w = begun.constraints, begun.point.params
        n = responses.count(constraints, begun.free)
        if self.noise.groups is None:
            batch = data.abstract_batch(data.as_source(train, "train"))
            check_layers(problem, w, begun.hparams, batch, n, model_state)
            response = responses.no_response(w)
        else:
            response = responses.first_response(w, n, self.structure, axes(problem))
        dtype = responses.vector(constraints, begun.free).dtype
        opt_state = perturbations.begun("inner", self.method.inner, (w, response), _TOGETHER)
        fields = {field.name: getattr(begun, field.name) for field in dataclasses.fields(begun)}
        fields["point"] = Point(w, opt_state, begun.point.model_state)
        fields["estimator"] = Learned(response, self.noise.init(n, dtype))
        return StnState(**fields, centred=self.centred)

    def step(self, problem, state, train, valid):
        """Eq. (2) and (3); rejected as a whole where a result is not finite."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        steps = self.method.inner_steps
        data.check_sources(train, valid, steps)
        moves = state.count % self.method.period == 0
        key_train, key_valid, key = state.streams
        key_fit, key_judge = jax.random.split(key)
        draw = data.draw(train, key_train, state.position, steps, state.count, own=moves)
        batch = valid.batch(key_valid, state.count)
        constraints, free, scales = state.constraints, state.free, state.estimator.scales
        scale = jax.nn.softplus(scales.raw)
        at = Perturbed(problem, self, constraints, free, scale)
        start = dataclasses.replace(state.point, params=(state.point.params, state.estimator.response))
        training = Training(at)

        def trained():
            return jax.lax.fori_loop(0, steps, lambda j, point: training(j, point, draw, key_fit), start)

        end = trained() if self.method.period == 1 else jax.lax.cond(moves, trained, lambda: start)
        w, response = end.params
        judged = self.noise.judged(
            scales,
            lambda u, e, rows: outer_value(problem, *at(end.params, u, e), rows, end.model_state),
            constraints,
            free,
            batch,
            key_judge,
        )
        relative = self._relative(w, response, scale)
        reads = influence.outer_reads(problem, w, state.hparams, batch, end.model_state)
        after = self.noise.after(scales, judged, relative, reads)
        taken = jnp.where(moves, steps, 0)
        estimate = Estimate(
            value=judged.value,
            grad=jax.vjp(constraints.to_free, state.hparams)[1](judged.free)[0],
            free_grad=judged.free,
            point=Point(at(end.params, free, None)[0], (), end.model_state),
            error=jnp.full_like(judged.value, jnp.inf),
            counts=Counts(
                inner_grad=(self._signs * taken * examples(problem, draw.last)).astype(jnp.float32),
                outer_grad=jnp.float32((self._signs if self.noise.entropy else 1) * examples(problem, batch)),
                hvp=jnp.float32(0),
                cross=jnp.float32(0),
            ),
            solve=unsolved(judged.value),
            metrics=judged.metrics,
        )
        new_state, info = self.method.concluded(
            state,
            estimate,
            Point(w, end.opt_state, end.model_state),
            Learned(response, after),
            taken=taken,
            renewed=train.renewed or valid.renewed,
        )
        return new_state, reported(info, self.noise, new_state.estimator.scales)

    @property
    def _signs(self) -> int:
        return 1 if self.noise.groups is None else 2

    def _relative(self, w, response, scale):
        """Size of the response to each scale, as a share of params; where the model has its own, one."""
        if self.noise.groups is None:
            return jnp.ones_like(scale)
        return relative_sizes(w, response, scale / self.noise.unit(scale.size) if self.centred else scale)

    def coordinates(self, constraints: BoundConstraints, free, scale):
        """Where the response is zero, and its units."""
        vector = responses.vector(constraints, free)
        if self.centred:
            return vector, self.noise.unit(scale.size)
        return jnp.zeros_like(vector), 1.0

    def why_stalled(self, row: dict) -> str:
        """The reason, and the argument to change."""
        return why_stalled(self.noise, row)


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """What the losses get where hyperparameters, at ``free`` with ``scale``, are moved and perturbed."""

    problem: Any
    method: Stn
    constraints: BoundConstraints
    free: PyTree
    scale: jax.Array

    def __call__(self, variables, u: PyTree, e: jax.Array | None) -> tuple[Params, Any]:
        """Params and hparams at free units u and perturbations e.

        One for all rows, of shape (n,), moves params by the response; one for each row, (rows, n), is left to
        the layers of the model.
        """
        w, response = variables
        origin, unit = self.method.coordinates(self.constraints, self.free, self.scale)
        if self.method.noise.groups is None:
            return w, self._of_rows(u, e, origin, unit)
        moved = u if e is None else shifted(self.constraints, u, e)
        away = (responses.vector(self.constraints, moved) - origin) / unit
        return responses.moved(w, response, away), self.constraints.to_natural(moved)

    def _of_rows(self, u, e, origin, unit):
        def away(moved):
            return (responses.vector(self.constraints, moved) - origin) / unit

        if e is None:  # zero, with a derivative
            return nn_response(self.constraints.to_natural(u), away(u))
        moved = jax.vmap(lambda e: shifted(self.constraints, u, e))(e)
        return nn_response(jax.vmap(self.constraints.to_natural)(moved), jax.vmap(away)(moved))


@dataclasses.dataclass(frozen=True)
class Training:
    """Eq. (2)."""

    at: Perturbed

    def __call__(self, j, point: Point, draw, key) -> Point:
        """One step."""
        method, batch = self.at.method, draw(j)
        noise = method.noise.noise(jax.random.fold_in(key, j), self.at.scale, batch)
        grad, model_state = jax.grad(self.loss, has_aux=True)(point.params, batch, noise, point.model_state)
        return along(method.method.inner, dataclasses.replace(point, model_state=model_state), grad)

    def loss(self, variables, batch, noise, model_state):
        """Eq. (2) for given perturbations, (groups or rows, n), and the model state after it."""
        at = self.at

        def one(rows, z):
            params, hparams = at(variables, at.free, scaled(at.scale, z))
            return inner_value(at.problem, params, hparams, rows, model_state)

        return at.method.noise.mean(one, batch, noise)


def check_layers(problem, params, hparams, batch, n: int, model_state) -> None:
    """Raise where the inner loss does not take hyperparameters of every row."""
    if jax.tree_util.all_leaves([hparams]):
        raise ValueError(
            'perturbations="examples" hands the losses hyperparameters by name, and hparams are a bare '
            'array; put it into a dict, {"name": array}.'
        )
    rows = data.rows(batch)
    every = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *jnp.shape(x)), jnp.result_type(x)), hparams)
    dtype = jnp.result_type(*jax.tree.leaves(hparams))
    eps: Any = jax.ShapeDtypeStruct((rows, n), dtype)
    given = nn_response(every, eps)
    validation.response_layers(problem, params, given, batch, model_state)


def reported(info: Info, noise: Perturbations, scales: Scales) -> Info:
    """With the columns of the history, and the status of a run that gets nowhere."""
    stalled = noise.stalled(scales) & (info.status == Status.RUNNING)
    largest = jnp.max(jax.nn.softplus(scales.raw))
    # What layers of a model respond is in its params, and not known apart from them.
    response = jnp.full_like(largest, jnp.inf) if noise.groups is None else scales.response
    return dataclasses.replace(
        info,
        status=jnp.where(stalled, Status.STALLED, info.status).astype(jnp.int32),
        extra={"response": response, "largest_scale": largest},
    )


def why_stalled(noise: Perturbations, row: dict) -> str:
    """Of a row of the history: the reason, and the argument to change."""
    if row["largest_scale"] > noise.runaway:
        return (
            f"A scale of the perturbations has run away to {row['largest_scale']:.3g} (free units, from "
            f"{noise.scale:g}): the validation loss hardly depends on that hyperparameter, and the entropy "
            "widens it without end. Lower entropy=, declare the hyperparameter bilevel.fixed(), or start "
            "it elsewhere."
        )
    return (
        f"The response has vanished: a perturbation of one scale changes params by {row['response']:.1e} of "
        "their norm, so that their validation loss says nothing about hparams. They are on a plateau (a "
        "penalty that is as good as zero): start them elsewhere, take a lower outer learning rate, or a "
        "larger scale=."
    )


def stn(
    inner,
    outer,
    train_steps: int = 2,
    valid_steps: int = 1,
    warmup: int = 0,
    scale: float = 0.5,
    entropy: float = 1e-3,
    perturbations: int | str = 1,
    centred: bool = False,
    response: Any = True,
    scales=None,
) -> Stn:
    """Self-Tuning Networks on any model: Eq. (1) to (3) of the module.

    One run trains params and tunes hyperparameters, of whatever kind: nothing is differentiated by them on
    the training side, so that rates of Bernoulli masks, strengths of augmentations and `bilevel.integer` are
    hyperparameters like others; those that the outer loss reads itself count there too. ``state.params`` and
    ``result.params`` are the weights at the hyperparameters of the moment, Eq. (1).

    An outer step costs ``2 train_steps / valid_steps`` gradients of the inner loss and two of the outer one
    (one where ``entropy`` is 0). Memory: the response, about that of params, and its share of the optimiser's
    state. Not for hyperparameters of the optimiser, nor for a `bilevel.FixedPoint` or a problem with a
    ``start``. Its error is unknown and stated as infinite; the noise of its gradients is that of
    perturbations, so that ``tol`` means little.

    Args:
      inner: the optax optimiser of params and response, together.
      outer: the optax optimiser of hyperparameters in free units; another like it moves the scales.
      train_steps: updates of params in a round.
      valid_steps: updates of hyperparameters in a round; each is an outer step.
      warmup: leave hyperparameters and scales as they are for so many first outer steps.
      scale: of the perturbations at first, in free units; the same for all.
      entropy: weight of the entropy that keeps scales apart from zero, with which they are tuned; 0: they
        stay as they are, and the outer loss is not perturbed.
      perturbations: of a batch, whose rows are dealt out to them; each is taken with both signs. The inner
        and the outer loss have to be means over rows (and terms without any) where it is more than 1.
      centred: the response is to perturbations in units of the first scale, as in `bilevel.delta_stn`, and
        not to hyperparameters themselves, whose size makes Eq. (2) ill-conditioned.
      response: which parts of params respond, see `bilevel.best_response`.
      scales: the optax optimiser of the scales, which are one vector; default one like ``outer``, which then
        may not treat hyperparameters by name.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range; from ``init``, a response
        that takes too much memory, an optimiser that does not fit.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, data: 0.5 * (w - data) ** 2 + 0.5 * h["l2"] * w**2,
      ...     outer=lambda w, h, data: 0.5 * (w - data) ** 2,
      ...     constraints={"l2": bilevel.positive()},
      ... )
      >>> method = bilevel.stn(optax.adam(0.01), optax.adam(0.01))
      >>> start, data = (jnp.float32(0.0), {"l2": 0.1}), (jnp.float32(2.0), jnp.float32(1.0))
      >>> result = bilevel.optimize(problem, *start, *data, method, steps=3000, progress=False)
      >>> print(f"{result.hparams['l2']:.1f}")  # w* = 2 / (1 + l2) is 1
      1.0

    References:
      MacKay, Vicol, Lorraine, Duvenaud and Grosse, 2019, arXiv:1903.03088.
    """
    validation.kind("inner", inner, "an optax optimiser")
    validation.kind("outer", outer, "an optax optimiser")
    train_steps = validation.whole_number("train_steps", train_steps, 1)
    valid_steps = validation.whole_number("valid_steps", valid_steps, 1)
    centred = validation.flag("centred", centred)
    noise = settings(scale, entropy, perturbations, scales or outer, warmup, examples=True)
    if noise.groups is None and (not centred or response is not True):
        raise ValueError(
            'perturbations="examples" is for models that respond by layers of their own, and to '
            "perturbations alone: it needs centred=True, and no response=."
        )
    method = alternating(Responding(), inner, outer, train_steps, valid_steps, noise.warmup)
    return Stn(method, noise, responses.setting(response), centred)
