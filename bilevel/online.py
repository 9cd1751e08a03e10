"""A whole tuner as one optax transformation, for a training loop that already exists.

The loop is the user's: it takes gradients of the training loss at params w and hyperparameters
``lam = hparams(u)``, u in free units, and applies updates. The transformation is the inner optimiser, with
state s; where its schedule says so it moves u as well. At the incoming (w_t, s_t, u_t)::

    g_t     = d_hparams F, by the estimator at (w_t, lam_t), pulled back to free units        (1)
    u_{t+1} = project(u_t + outer update of g_t)                                             (2)
    w_{t+1} = w_t + inner update of the gradients given, at s_t and lam_t                     (3)

(3) takes lam_t, not lam_{t+1}: at lam_t the gradients were taken, and a step of `bilevel.tuned` is then the
very step that the estimator looked at. With ``every=1`` these are the steps of `bilevel.alternating` with one
inner step: for the implicit family under ``simultaneous=True``, for `bilevel.one_step` as it is. The form in
two calls, n gradients and then `tune`, takes the steps of ``alternating(inner_steps=n)``.

**What is differentiated.** The implicit family looks at the loss alone: F is the outer loss at the inner
solution, and the error is of the first order in the distance of w_t from it. The trajectory family looks at
the updates to come, from (w_t, s_t), on the batches given; they are made, differentiated and forgotten::

    one_step()          outer(w_{t+1}(lam), lam)          the loss after the coming update     (4)
    unrolled(steps=K)   outer(w_{t+K}(lam), lam)          after the K coming updates           (5)
    look_back(K)        as (4), with the updates before it as copies of the coming one        (6)

It alone sees hyperparameters of the optimiser, those of `bilevel.tuned`. A loss that training ends with
depends on all updates; what is left out is bias:

- (4) is greedy. A learning rate is judged by the loss one update later, which asks for large ones where the
  loss is steep and for small ones where gradients are noisy. Momentum is judged by ``-rate (d_w outer .
  buffer)`` alone, though it acts over 1 / (1 - momentum) updates. Of a weight decay the gradient has the
  scale of the rate.
- (5) is exact for its horizon. Beyond it, for hyperparameters of a mu-strongly convex loss and gradient
  steps of size a, up to ``(1 - a mu)^K / (a mu) |d_w outer| max |B|`` is missing. One batch for all K
  updates makes training look less noisy than it is; `bilevel.stacked` gives one to each.
- (6) is the one-pass rule of Clarke et al.: K updates back, all with the Jacobians of the last one.

An exact look back would have to remember K points, or one point and K batches, and be the derivative of
updates that are past. (5) has the length, the cost and the bias of it, remembers nothing, and is about
updates that the new hyperparameters will make. (6) saves making K of them.

Cost: one estimate every ``every`` updates. Memory beside that of the inner optimiser: hparams twice, and the
states of the outer optimiser and of the estimator; while an estimate is made, what the estimator says.

References:
  Clarke, Oldewage and Hernandez-Lobato, "Scalable one-pass optimisation of high-dimensional weight-update
  hyperparameters by implicit differentiation", 2022, arXiv:2110.10461.
  Baydin, Cornish, Martinez Rubio, Schmidt and Wood, "Online learning rate adaptation with hypergradient
  descent", 2018, arXiv:1703.04782.
  Wu, Ren, Liao and Grosse, "Understanding short-horizon bias in stochastic meta-optimization", 2018,
  arXiv:1803.02021.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, validation
from bilevel.constraints import BoundConstraints, bind
from bilevel.hypergradient import default_estimator
from bilevel.inner_solvers import Tuned, optimizer_at
from bilevel.lift import refuse_sampled
from bilevel.linear_solvers import where
from bilevel.methods.alternating import error_in_free_units
from bilevel.placement import refuse_explicit
from bilevel.problem import Batch, Estimator, FixedPoint, HParams, Params, Point, PyTree, tree_is_finite
from bilevel.trees import copied


class OnlineInfo(NamedTuple):
    """What a person wants to know of the last hypergradient; scalars, nan before the first.

    ``value``: the outer loss there. ``grad_norm``: in free units. ``error``: the estimate's. ``tuned`` counts
    moves of the hyperparameters, ``rejected`` hypergradients that were not finite and moved nothing.
    """

    value: jax.Array
    grad_norm: jax.Array
    error: jax.Array
    tuned: jax.Array
    rejected: jax.Array


class OnlineState(NamedTuple):
    """State of `online`: plain arrays in named tuples, as all of optax, so that any checkpointer takes it.

    ``hparams`` in natural units, for the loss; ``free`` the same in free units, which are what moves.
    ``inner``, ``outer`` and ``estimator`` are the states of those three. ``wait``: inner updates to pass
    before hyperparameters move again.
    """

    hparams: HParams
    free: PyTree
    inner: PyTree
    outer: PyTree
    estimator: PyTree
    wait: jax.Array
    info: OnlineInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Online:
    """See `online`; its ``init`` and ``update`` are those of the transformation."""

    problem: Any
    hparams: HParams
    constraints: BoundConstraints
    inner: Any
    outer: Any
    estimator: Any
    every: int
    warmup: int

    def init(self, params: Params) -> OnlineState:
        """The first state: fresh optimisers, hyperparameters where they begin."""
        _refuse_masked(params)
        hparams = copied(self.hparams)
        free = copied(self.constraints.to_free(hparams))
        # Natural units as every later state has them: through the map, and inside of open ends.
        hparams = self._natural(free)
        inner = optimizer_at(self.inner, hparams).init(params)
        unknown = jnp.full((), jnp.nan, _scalar_dtype(hparams))
        return OnlineState(
            hparams=hparams,
            free=free,
            inner=inner,
            outer=self.outer.init(free),
            estimator=self.estimator.init(self.problem, Point(params, inner), hparams),
            wait=jnp.int32(self.warmup),
            info=OnlineInfo(copied(unknown), copied(unknown), copied(unknown), jnp.int32(0), jnp.int32(0)),
        )

    def update(
        self,
        updates,
        state: OnlineState,
        params: Params | None = None,
        *,
        train: Batch | None = None,
        valid: Batch | None = None,
        model_state: PyTree = None,
        key=None,
        **extra_args,
    ):
        """Eq. (3), and before it Eq. (1) and (2) where both batches are given and the schedule says so."""
        _check_state(state)
        hparams, moved = state.hparams, state
        if train is not None or valid is not None:
            _check_both(train, valid)
            moved = self.tuned(state, params, train, valid, model_state, key)
        optimizer = optax.with_extra_args_support(optimizer_at(self.inner, hparams))
        updates, inner = optimizer.update(updates, state.inner, params, **extra_args)
        return updates, moved._replace(inner=inner, wait=jnp.maximum(moved.wait - 1, 0))

    def tuned(self, state, params, train, valid, model_state, key, on_schedule: bool = True) -> OnlineState:
        """The state with hyperparameters moved, if it is time or ``on_schedule`` does not matter."""
        if params is None:
            raise ValueError("params must be given to update where train and valid are, got None.")
        train, valid = data.as_source(train, "train"), data.as_source(valid, "valid")
        key = None if key is None else validation.random_key("key", key)
        args = state, params, train, valid, model_state, key
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
            return self.moved_when_due(*args, on_schedule)
        # In a loop that is not compiled, while loops and conditions would be compiled at every call.
        return _compiled(self, on_schedule, *args)

    def moved_when_due(self, state, params, train, valid, model_state, key, on_schedule) -> OnlineState:
        """Eq. (1) and (2), if enough updates have passed."""
        if not on_schedule:
            return self.moved(state, params, train, valid, model_state, key)
        parts = "hparams", "free", "outer", "estimator", "wait", "info"

        def move():
            moved = self.moved(state, params, train, valid, model_state, key)
            return {part: getattr(moved, part) for part in parts}

        def stay():
            return {part: getattr(state, part) for part in parts}

        return state._replace(**jax.lax.cond(state.wait <= 0, move, stay))

    def moved(self, state, params, train, valid, model_state, key) -> OnlineState:
        """Eq. (1) and (2); a result that is not finite moves nothing and is counted."""
        estimate, estimator = self._estimated(state, params, train, valid, model_state, key)
        grad = self.constraints.free_gradient(state.free, estimate)
        free, outer = self._outer_update(state, estimate.value, grad)
        grad_norm = self.constraints.grad_norm(state.free, grad)
        # Some optimisers start from an infinite best value: only what was finite can become bad.
        finite = tree_is_finite((outer, estimator)) | ~tree_is_finite((state.outer, state.estimator))
        accepted = finite & tree_is_finite(free) & jnp.isfinite(estimate.value) & jnp.isfinite(grad_norm)
        kept = state.estimator
        if getattr(self.estimator, "forgets", False):
            kept = self.estimator.init(self.problem, Point(params, state.inner, model_state), state.hparams)
        free, outer, estimator = where(accepted, (free, outer, estimator), (state.free, state.outer, kept))
        dtype = state.info.value.dtype
        info = OnlineInfo(
            value=estimate.value.astype(dtype),
            grad_norm=grad_norm.astype(dtype),
            error=error_in_free_units(estimate, self.constraints, state.free).astype(dtype),
            tuned=state.info.tuned + accepted.astype(jnp.int32),
            rejected=state.info.rejected + (~accepted).astype(jnp.int32),
        )
        wait = jnp.full_like(state.wait, self.every)
        return OnlineState(self._natural(free), free, state.inner, outer, estimator, wait, info)

    def _estimated(self, state, params, train, valid, model_state, key):
        """The estimate at the incoming point, and the estimator's state after it."""
        refuse_explicit(params=params, train=train, valid=valid, model_state=model_state)
        steps = self.estimator.steps if self.estimator.trajectory else 1
        data.check_sources(train, valid, steps)
        refuse_sampled(self.problem, train=train, valid=valid)
        if key is None:
            key = jax.random.fold_in(jax.random.key(0), state.info.tuned + state.info.rejected)
        key_train, key_valid, key = (jax.random.fold_in(key, i) for i in range(3))
        draw = data.draw(train, key_train, 0, steps)
        valid_batch = valid.batch(key_valid, 0)
        validation.problem_on_data(
            self.problem, self.estimator, self.inner, params, state.hparams, draw(0), valid_batch, model_state
        )
        point = Point(params, state.inner, model_state)
        units = {"free": state.free} if getattr(self.estimator, "responds", False) else {}
        return self.estimator.estimate(
            self.problem, state.estimator, point, state.hparams, draw, valid_batch, key, **units
        )

    def _outer_update(self, state, value, grad):
        """Eq. (2): hyperparameters in free units and the outer optimiser's state."""
        outer = optax.with_extra_args_support(self.outer)
        try:
            updates, outer_state = outer.update(grad, state.outer, state.free, value=value, grad=grad)
        except TypeError as error:
            raise TypeError(
                "outer must be an optax optimiser that needs gradients only (no line search, which would "
                f"evaluate the loss): {error}."
            ) from error
        return self.constraints.project(optax.apply_updates(state.free, updates), state.free), outer_state

    def _natural(self, free) -> HParams:
        # A copy where the units are the same: a loop that donates its state may not give one buffer twice.
        return copied(self.constraints.to_natural(free))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(made: Online, on_schedule: bool, state, params, train, valid, model_state, key) -> OnlineState:
    return made.moved_when_due(state, params, train, valid, model_state, key, on_schedule)


def online(
    problem,
    hparams: HParams,
    *,
    inner,
    outer,
    estimator: Estimator | None = None,
    every: int = 1,
    warmup: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that tunes hyperparameters while it trains, for an optax loop that already exists.

    Its state has the hyperparameters, ``state.hparams`` in natural units: take them for the training loss.
    ``update(grads, state, params, train=batch, valid=valid_batch)`` moves them when it is due, by the
    hypergradient at the params and hyperparameters that came in, and then does what ``inner`` does. It also
    takes ``model_state=`` for a problem that has one, and ``key=``, a fresh one for each call, where the
    estimator or a data source is random (default: made from the number of hypergradients so far). All else
    is handed to ``inner``. Without ``train`` and ``valid`` it is ``inner`` alone, and `tune` moves the
    hyperparameters.

    It comes last in a chain: what stands before it, such as clipping, is not part of the steps that the
    trajectory family differentiates, and what stands after it would change them. Not under `optax.masked`,
    which hands out pruned params: mask ``inner``. Under vmap hypergradients are taken at every update,
    because both branches of the schedule run.

    Args:
      problem: a `bilevel.Problem` without a start; its inner loss is the one that the loop descends.
      hparams: where hyperparameters begin, in natural units.
      inner: the optax optimiser of params; or `bilevel.tuned`, with an estimator of the trajectory family.
      outer: the optax optimiser of hyperparameters, in free units.
      estimator: default `bilevel.implicit`. Of the trajectory family `bilevel.one_step`, `bilevel.look_back`,
        or one with ``steps=``: how many coming updates it looks at, each on the train batch given, or on its
        own of ``bilevel.stacked(batches)``. They take the ``inner`` given here.
      every: inner updates from one move of the hyperparameters to the next, at least.
      warmup: inner updates before the first.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range; from ``update``, one of train
        and valid without the other, data that do not fit, hyperparameters that influence nothing.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, data: 0.5 * (w - data) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, data: 0.5 * (w - data) ** 2,
      ... )
      >>> tuner = bilevel.online(problem, 1.0, inner=optax.sgd(0.2), outer=optax.sgd(0.2))
      >>> train, valid, params = jnp.array(2.0), jnp.array(1.5), jnp.array(0.0)
      >>> state = tuner.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(problem.inner)(params, state.hparams, train)
      ...     updates, state = tuner.update(grads, state, params, train=train, valid=valid)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.3f} {state.hparams:.3f}")  # w* = 2 / (1 + lam) is 1.5
      1.500 0.333
    """
    validation.kind("problem", problem, "a problem")
    if isinstance(problem, FixedPoint):
        raise TypeError(
            "problem: bilevel.online takes a Problem, got a FixedPoint, whose map leaves no gradient for an "
            "optimiser to take; bilevel.alternating(..., inner=None) iterates it."
        )
    if problem.start is not None:
        raise ValueError(
            "problem has start=, where every outer step would begin, but bilevel.online tunes a loop that "
            "goes on; take bilevel.alternating."
        )
    hparams = validation.floating(hparams, "hparams")
    validation.finite(hparams, "hparams")
    constraints = bind(problem.constraints, hparams)
    constraints.check(hparams)
    validation.kind("inner", inner, "an inner optimiser")
    validation.kind("outer", outer, "an optax optimiser")
    chosen: Any = default_estimator(problem) if estimator is None else estimator
    settled = _settled(validation.kind("estimator", chosen, "an estimator"), inner)
    every = validation.whole_number("every", every, 1)
    warmup = validation.whole_number("warmup", warmup, 0)
    made = Online(problem, hparams, constraints, inner, outer, settled, every, warmup)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def tune(
    opt_state: PyTree,
    tuner: optax.GradientTransformationExtraArgs,
    params: Params,
    train: Batch,
    valid: Batch,
    *,
    model_state: PyTree = None,
    key=None,
    on_schedule: bool = False,
) -> PyTree:
    """Move the hyperparameters of a tuner, wherever its state sits; the two-call form of `online`.

    For loops that hand no keywords to the optimiser: flax's ``TrainState.apply_gradients``, a trainer. It
    moves them whenever it is called, unless ``on_schedule``.

    Args:
      opt_state: any pytree with the state of the tuner in it: of a chain, of `optax.MultiSteps`, that of an
        nnx.Optimizer, a whole TrainState.
      tuner: what `online` returned, not what it was wrapped in.
      params: where the inner optimiser stands; batches as in `online`.
      train: training batch.
      valid: validation batch.
      model_state: mutable model state, for a problem that has it.
      key: as in `online`.
      on_schedule: move only if ``every`` inner updates have passed since the last move, and ``warmup`` before
        the first; for a compiled loop that calls this at every step.

    Returns:
      The same pytree, its hyperparameters moved.

    Raises:
      TypeError, ValueError: a tuner that is none, or not that of the state; no state of a tuner, or several.
    """
    made = getattr(getattr(tuner, "update", None), "__self__", None)
    if not isinstance(made, Online):
        raise TypeError(
            "tuner must be what bilevel.online(...) returned (not a chain or MultiSteps around it), got "
            f"{type(tuner).__name__}."
        )
    _check_both(train, valid)
    on_schedule = validation.flag("on_schedule", on_schedule)
    leaves, treedef, at = _found(opt_state)
    state, params, model_state = (_unboxed(tree) for tree in (leaves[at], params, model_state))
    _check_owner(made, state, params)
    new = made.tuned(state, params, train, valid, model_state, key, on_schedule)
    # Boxes (nnx variables) hold one array each, so that leaves come in the same order with and without.
    leaves[at] = jax.tree.unflatten(jax.tree.structure(leaves[at]), jax.tree.leaves(new))
    return jax.tree.unflatten(treedef, leaves)


def get_hparams(opt_state: PyTree) -> HParams:
    """Hyperparameters in natural units, of the tuner whose state sits somewhere in ``opt_state``.

    Args:
      opt_state: as in `tune`.

    Raises:
      ValueError: no state of a tuner in it, or several.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(lambda w, h, b: h["l2"] * w**2, lambda w, h, b: w**2)
      >>> tuner = bilevel.online(problem, {"l2": 0.5}, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
      >>> opt_state = optax.chain(optax.clip(1.0), tuner).init(jnp.array(1.0))
      >>> print(bilevel.get_hparams(opt_state)["l2"])
      0.5
    """
    leaves, _, at = _found(opt_state)
    return _unboxed(leaves[at].hparams)


# --- Checks, and finding a state in a tree -----------------------------------------------------------


def _settled(estimator, inner):
    """The estimator with the tuner's optimiser, if it needs one."""
    name = validation.called(estimator)
    if not estimator.trajectory:
        if isinstance(inner, Tuned):
            raise TypeError(
                "inner: bilevel.tuned needs an estimator of the trajectory family, such as "
                "bilevel.one_step(), bilevel.look_back(5) or bilevel.unrolled(steps=5): the inner solution "
                f"does not depend on the optimiser that finds it, so that {name}() sees nothing of its "
                "hyperparameters."
            )
        return estimator
    if estimator.inner is not None:
        raise ValueError(
            f"inner is given twice, to bilevel.online and to its estimator ({name}); give it to "
            "bilevel.online alone."
        )
    if getattr(estimator, "per_step", None) is not None:
        raise ValueError(
            f"estimator: {name}(per_step=...) has an entry for each step of a loop that restarts, and a loop "
            "that goes on has none; take bilevel.alternating(..., restart=True)."
        )
    if hasattr(estimator, "horizon"):
        raise ValueError(
            f"estimator: {name} begins a training run anew at the end of its horizon, and a loop that goes "
            "on does not; take bilevel.alternating."
        )
    steps = estimator.steps
    if steps is None and getattr(estimator, "truncate", None) == 1:
        steps = 1
    if steps is None:
        raise ValueError(
            f"estimator: {name}() needs steps= in bilevel.online, got None: how many of the coming updates "
            f"it looks at, for instance bilevel.{name}(steps=5)."
        )
    return dataclasses.replace(estimator, inner=inner, steps=steps)


def _check_both(train, valid) -> None:
    if train is None or valid is None:
        missing, given = ("valid", "train") if valid is None else ("train", "valid")
        raise ValueError(
            f"{missing} must be given together with {given}, got None: a hypergradient takes a batch of "
            "each. (With neither, update is the inner optimiser alone.)"
        )


def _check_state(state) -> None:
    if not isinstance(state, OnlineState):
        raise TypeError(
            f"state must be what the tuner's init returned, got {type(state).__name__}. Where the tuner is "
            "part of a chain, or inside MultiSteps, call the update of the whole."
        )


def _refuse_masked(params) -> None:
    masked = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(x, optax.MaskedNode) for x in masked):
        raise ValueError(
            "params are pruned by optax.masked (or partition, multi_transform), and the losses need all of "
            "them. Mask the inner optimiser instead: bilevel.online(..., inner=optax.masked(...))."
        )


def _check_owner(made: Online, state: OnlineState, params) -> None:
    """ValueError where a tuner would have made another state for these params."""
    own = jax.eval_shape(made.init, params)

    def facts(tree):
        return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]

    if facts(own) == facts(state):
        return
    names = [name for name, a, b in zip(own._fields, own, state, strict=True) if facts(a) != facts(b)]
    wanted, got = (
        ", ".join(validation.describe(getattr(tree, name)) for name in names) for tree in (own, state)
    )
    raise ValueError(
        "tuner is not the one that made the state in opt_state, or params are not those it was made for: "
        f"{', '.join(names)} would be {wanted}, got {got}."
    )


def _found(opt_state) -> tuple[list, Any, int]:
    """The tree with states of tuners as leaves: leaves, structure, and where the only state is."""
    leaves, treedef = jax.tree.flatten(opt_state, is_leaf=lambda x: isinstance(x, OnlineState))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, OnlineState)]
    if len(places) != 1:
        raise ValueError(
            f"opt_state must hold the state of one bilevel.online(...), got {len(places)} of them in "
            f"{type(opt_state).__name__}."
        )
    return leaves, treedef, places[0]


def _is_box(x) -> bool:
    # A variable of flax nnx, which nnx.Optimizer wraps around every array.
    return hasattr(x, "get_raw_value")


def _unboxed(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.get_raw_value() if _is_box(x) else x, tree, is_leaf=_is_box)


def _scalar_dtype(hparams):
    return max((np.dtype(np.float32), *(x.dtype for x in jax.tree.leaves(hparams))), key=lambda d: d.itemsize)
