"""Inner solvers: params moved until the inner gradient is as small as asked, or a cap is hit.

For a mu-strongly convex inner loss the norm of the gradient bounds the distance to the solution::

    |d_params inner(params)| <= atol   implies   |params - params*| <= atol / mu         (1)

so that an accuracy can be asked for beforehand and measured afterwards, whatever the solver. All of them stop
by Eq. (1) with an absolute ``atol``, warm start at the point they are given, and return in `SolveInfo` the
norm measured at the very point they return: a residual above ``atol`` says that a cap was hit, that rounding
allows no more, or (inf) that the loss is not finite there. ``products`` counts gradients.

======================  =====================  ===============================================================
solver                  batches                for
======================  =====================  ===============================================================
`lbfgs`                 the last               the first to try: smooth losses of any size
`accelerated`           the last               convex losses with known constants; low memory; large batches
`newton`                the last               small problems, to the last digit
`optax_loop`            one for each step      any optax optimiser, with or without a tolerance
`epoch_sgd`             one for each step      strongly convex losses seen through noisy batches
`picard`                the last               the map of a `bilevel.FixedPoint`
======================  =====================  ===============================================================

The default ``atol`` is the square root of the rounding unit of params (1.5e-8 in float64, 3.5e-4 in float32);
losses that are sums over many examples reach less, and losses divided by a large number need less. Optimiser
state of the point is handed through; model state is held constant, except by `optax_loop`, whose steps
advance it like any inner steps.

References:
  Nesterov, "Introductory lectures on convex optimization", 2004.
  O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", 2015, arXiv:1204.3982.
  Hazan and Kale, "Beyond the regret minimization barrier: optimal algorithms for stochastic strongly-convex
  optimization", 2014.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel import linear_solvers, validation
from bilevel.inner_solvers import inner_step
from bilevel.linear_solvers import axpy, norm, vdot, where
from bilevel.problem import Draw, FixedPoint, Point, PyTree, SolveInfo, inner_value, updated


class _Loop(NamedTuple):
    """``size`` is the norm measured at ``params``; ``memory`` is what the solver needs for the next move."""

    params: PyTree
    memory: Any
    size: jax.Array
    steps: jax.Array
    done: jax.Array


def _measured_moves(gradient, move, params, memory, max_steps: int, atol, retries: bool = False) -> _Loop:
    """Moves until the gradient is small: one gradient a pass, which is measured first and then moved by.

    Args:
      gradient: of params.
      move: ``(params, gradient, size, memory) -> (params, memory)``.
      params: where it begins.
      memory: before the first move.
      max_steps: moves at most.
      atol: norm of the gradient at which it ends.
      retries: whether ``move`` knows a way back from a gradient that is not finite.
    """

    def body(loop):
        grad = gradient(loop.params)
        size = _size(grad)
        lost = ~jnp.isfinite(size) & ((loop.steps == 0) if retries else True)
        done = (size <= atol) | lost | (loop.steps >= max_steps)
        params, memory = move(loop.params, grad, size, loop.memory)
        params, memory = where(done, (loop.params, loop.memory), (params, memory))
        return _Loop(params, memory, size, jnp.where(done, loop.steps, loop.steps + 1), done)

    start = _Loop(params, memory, jnp.full_like(norm(params), jnp.inf), jnp.int32(0), jnp.bool_(False))
    return jax.lax.while_loop(lambda loop: ~loop.done, body, start)


def _size(grad: PyTree) -> jax.Array:
    """Euclidean norm; inf where it is not a number, so that no comparison hides it."""
    size = norm(grad)
    return jnp.where(jnp.isnan(size), jnp.inf, size)


def _gradient(loss: Callable) -> Callable:
    """Gradient of a loss; not a number where the loss is not finite, as outside the domain of a logarithm."""

    def gradient(params):
        value, grad = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda g: jnp.where(jnp.isfinite(value), g, jnp.nan), grad)

    return gradient


def _info(loop: _Loop) -> SolveInfo:
    return SolveInfo(loop.size, loop.steps, loop.steps + 1, jnp.bool_(False))


def _loss_of(problem, point: Point, hparams, batch) -> Callable:
    return lambda params: inner_value(problem, params, hparams, batch, point.model_state)[0]


def _tolerance(setting: float | None, atol, params: PyTree):
    """The tolerance of one solve: that of the call, else the solver's, else the default of the dtype."""
    atol = setting if atol is None else atol
    if atol is None:
        atol = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)) ** 0.5
    return jnp.asarray(atol, norm(params).dtype)


def _needs_a_loss(name: str, problem) -> None:
    if isinstance(problem, FixedPoint):
        raise TypeError(
            f"{name}() minimises an inner loss, which a FixedPoint does not have; take bilevel.picard()."
        )


def _check_atol(atol) -> float | None:
    return None if atol is None else validation.number("atol", atol, minimum=0.0)


# --- Any optax optimiser ---------------------------------------------------------------------------------


class _Watch(NamedTuple):
    size: jax.Array
    steps: jax.Array
    done: jax.Array
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class OptaxLoop:
    """See `optax_loop`."""

    optimizer: Any
    max_steps: int
    atol: float

    def init(self, problem, point, hparams):
        """The optimiser's state, which goes on from solve to solve."""
        del hparams
        _needs_a_loss("optax_loop", problem)
        return self.optimizer.init(point.params)

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Steps of the optimiser; batch ``j`` of the draw for step ``j``."""
        del key
        watched = self._watched(_tolerance(self.atol, atol, point.params))
        opt_state = _Watch(jnp.full_like(norm(point.params), jnp.inf), jnp.int32(0), jnp.bool_(False), state)

        def body(at):
            new = inner_step(problem, watched, at, hparams, draw(at.opt_state.steps))
            model_state = where(new.opt_state.done, at.model_state, new.model_state)
            return Point(new.params, new.opt_state, model_state)

        start = Point(point.params, opt_state, point.model_state)
        end = jax.lax.while_loop(lambda at: ~at.opt_state.done, body, start)
        watch = end.opt_state
        info = SolveInfo(watch.size, watch.steps, watch.steps + 1, jnp.bool_(False))
        return Point(end.params, point.opt_state, end.model_state), watch.opt_state, info

    def _watched(self, atol) -> optax.GradientTransformationExtraArgs:
        """The optimiser; it measures the gradients it is given, and stands still once they are small."""
        optimizer = optax.with_extra_args_support(self.optimizer)

        def update(grads, state: _Watch, params=None, **extra):
            size = jnp.where(jnp.isfinite(extra["value"]), _size(grads), jnp.inf)
            done = (size <= atol) | ~jnp.isfinite(size) | (state.steps >= self.max_steps)
            updates, opt_state = optimizer.update(grads, state.opt_state, params, **extra)
            updates = where(done, jax.tree.map(jnp.zeros_like, updates), updates)
            opt_state = where(done, state.opt_state, opt_state)
            return updates, _Watch(size, jnp.where(done, state.steps, state.steps + 1), done, opt_state)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)


def optax_loop(optimizer, max_steps: int, atol: float = 0.0) -> OptaxLoop:
    """Steps of an optax optimiser until the gradient is small.

    Step ``j`` takes batch ``j`` of the draw: the step's own, then fresh ones where the source has them, else
    the last again. The gradient that is measured is the one that the next step would use, so that with
    minibatches it is that of a batch and a tolerance stops at random; there, leave it at 0. One gradient per
    step and one for the last point; those of an optimiser's own line search are not counted. Momentum and
    moments live on in the solver's state from one solve to the next.

    Args:
      optimizer: of optax.
      max_steps: steps at most.
      atol: Euclidean norm of the gradient, absolute; 0 for a fixed number of steps.

    Raises:
      TypeError, ValueError: an optimiser that is none, a setting out of range.
    """
    return OptaxLoop(
        validation.kind("optimizer", optimizer, "an optax optimiser"),
        validation.whole_number("max_steps", max_steps, 1),
        validation.number("atol", atol, minimum=0.0),
    )


# --- Accelerated gradient -----------------------------------------------------------------------------------


class _Momentum(NamedTuple):
    """Of the scheme without constants; ``before`` and ``grad`` are one evaluation back."""

    x: PyTree
    before: PyTree
    grad: PyTree
    lipschitz: jax.Array
    theta: jax.Array
    age: jax.Array


@dataclasses.dataclass(frozen=True)
class Accelerated:
    """See `accelerated`."""

    max_steps: int
    atol: float | None
    strong_convexity: float | Callable | None
    smoothness: float | Callable | None

    def init(self, problem, point, hparams):
        """No state: every solve finds its constants anew, so that none is ever that of other hparams."""
        del point, hparams
        _needs_a_loss("accelerated", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        loss = _loss_of(problem, point, hparams, draw.last)
        if self.smoothness is None:
            move, memory = _move_by_estimates, _first_momentum(point.params)
        else:
            move, memory = self._move_by_constants(hparams), point.params
        loop = _measured_moves(
            _gradient(loss),
            move,
            point.params,
            memory,
            self.max_steps,
            _tolerance(self.atol, atol, point.params),
            retries=self.smoothness is None,
        )
        return Point(loop.params, point.opt_state, point.model_state), state, _info(loop)

    def _move_by_constants(self, hparams) -> Callable:
        mu, lipschitz = (
            jnp.asarray(c(hparams) if callable(c) else c) for c in (self.strong_convexity, self.smoothness)
        )
        # Constants that contradict one another (mu > L) give no momentum rather than a negative one.
        ratio = jnp.sqrt(jnp.clip(mu / lipschitz, 0.0, 1.0))
        momentum = (1 - ratio) / (1 + ratio)  # (sqrt L - sqrt mu) / (sqrt L + sqrt mu)

        def move(y, grad, size, x):
            del size
            new = axpy(-1 / lipschitz, grad, y)
            return axpy(1 + momentum, new, _scaled(-momentum, x)), new

        return move


def _first_momentum(params: PyTree) -> _Momentum:
    one = jnp.ones_like(norm(params))
    return _Momentum(params, params, jax.tree.map(jnp.zeros_like, params), one, one, jnp.int32(0))


def _move_by_estimates(y, grad, size, memory: _Momentum) -> tuple[PyTree, _Momentum]:
    # |grad(y) - grad(before)| / |y - before| is at most L for an L-smooth loss. A step from ``before`` that
    # was made with less than that is taken back and repeated with more. No value of the loss enters: their
    # differences are rounding long before the gradients are.
    change, distance = norm(axpy(-1.0, memory.grad, grad)), norm(axpy(-1.0, memory.before, y))
    eps = jnp.finfo(size.dtype).eps
    significant = distance > 100 * eps * norm(y)
    secant = jnp.where(significant, change / jnp.where(significant, distance, 1), 0)
    secant = jnp.where(jnp.isnan(secant), jnp.inf, secant)
    first, second = memory.age == 0, memory.age == 1
    back = ~first & ~second & (secant > 1.01 * memory.lipschitz) | ~first & ~jnp.isfinite(size)

    # The first step only probes: so short that any loss is quadratic along it.
    probe = size / (jnp.cbrt(eps) * (1 + norm(y)))
    raised = jnp.maximum(2 * memory.lipschitz, jnp.where(jnp.isfinite(secant), secant, 0))
    lipschitz = jnp.where(back, raised, memory.lipschitz)
    lipschitz = jnp.where(second & ~back & (secant > 0), secant, lipschitz)
    lipschitz = jnp.where(first, probe, lipschitz)

    base, slope = where(back, (memory.before, memory.grad), (y, grad))
    x = axpy(-1 / lipschitz, slope, base)
    moved = axpy(-1.0, memory.x, x)
    restart = back | first | second | (vdot(slope, moved) > 0)
    theta = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * memory.theta**2)) / 2)
    momentum = jnp.where(restart, 0, (memory.theta - 1) / theta)
    new = _Momentum(x, base, slope, lipschitz, theta, jnp.minimum(memory.age + 1, 2))
    return axpy(momentum, moved, x), new


def _scaled(factor, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def accelerated(
    max_steps: int = 1000,
    atol: float | None = None,
    strong_convexity: float | Callable | None = None,
    smoothness: float | Callable | None = None,
) -> Accelerated:
    """Nesterov's accelerated gradient method for strongly convex losses.

    With both constants, steps ``1 / L`` and the momentum ``(sqrt L - sqrt mu) / (sqrt L + sqrt mu)``: the
    error falls by about ``1 - sqrt(mu / L)`` per step, where gradient descent has ``1 - mu / L``. They must
    hold: an L that is too small diverges (and the residual says so), a mu that is too large loses the rate.

    Without them, steps come from a running estimate of L that only grows within a solve and begins anew in
    the next, with a step taken back where it proved too long, and the momentum of convex losses restarts
    where it points uphill (the gradient scheme of O'Donoghue and Candes): the same rate up to a constant,
    often better where the curvature near the solution is.

    One gradient per step, and two (with constants) to five vectors of memory.

    Args:
      max_steps: steps at most, those taken back included.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      strong_convexity: mu, a float or a function of hparams, evaluated in every solve.
      smoothness: L, likewise; both or neither.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range, one constant without the other.
    """
    if (strong_convexity is None) != (smoothness is None):
        raise ValueError(
            "strong_convexity and smoothness come together; give both, or neither to have them estimated."
        )
    constants = [
        c if c is None or callable(c) else validation.number(name, c, positive=True)
        for name, c in (("strong_convexity", strong_convexity), ("smoothness", smoothness))
    ]
    return Accelerated(
        validation.whole_number("max_steps", max_steps, 1), _check_atol(atol), constants[0], constants[1]
    )


# --- L-BFGS -------------------------------------------------------------------------------------------------


class _Quasi(NamedTuple):
    params: PyTree
    opt_state: PyTree
    value: jax.Array
    grad: PyTree
    size: jax.Array
    steps: jax.Array
    gradients: jax.Array
    best: tuple[jax.Array, jax.Array]
    idle: jax.Array
    stuck: jax.Array


# So many steps without a smaller loss or gradient than ever before, and L-BFGS gives up.
_IDLE = 20


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """See `lbfgs`."""

    max_steps: int
    atol: float | None
    memory: int

    def init(self, problem, point, hparams):
        """No state: the curvature of other hparams is not carried over."""
        del point, hparams
        _needs_a_loss("lbfgs", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        loss = _loss_of(problem, point, hparams, draw.last)
        optimizer = optax.lbfgs(memory_size=self.memory)
        atol = _tolerance(self.atol, atol, point.params)

        def going(at):
            return (at.size > atol) & jnp.isfinite(at.size) & (at.steps < self.max_steps) & ~at.stuck

        def body(at):
            updates, opt_state = optimizer.update(
                at.grad, at.opt_state, at.params, value=at.value, grad=at.grad, value_fn=loss
            )
            # The line search has evaluated the point it chose.
            value, grad = (optax.tree.get(opt_state, name) for name in ("value", "grad"))
            searches = optax.tree.get(opt_state, "num_linesearch_steps")
            params = optax.apply_updates(at.params, updates)
            stuck = vdot(updates, updates) == 0
            size = _size(grad)
            # A step to where the loss is not finite is not taken: what was measured before it stands.
            lost = ~jnp.isfinite(size) | ~jnp.isfinite(value)
            params, grad, size = where(lost, (at.params, at.grad, at.size), (params, grad, size))
            idle = jnp.where((value < at.best[0]) | (size < at.best[1]), 0, at.idle + 1)
            return _Quasi(
                params=params,
                opt_state=opt_state,
                value=value,
                grad=grad,
                size=size,
                steps=at.steps + 1,
                gradients=at.gradients + searches.astype(jnp.int32),
                best=(jnp.minimum(value, at.best[0]), jnp.minimum(size, at.best[1])),
                idle=idle,
                stuck=stuck | lost | (idle >= _IDLE),
            )

        value, grad = jax.value_and_grad(loss)(point.params)
        opt_state = optimizer.init(point.params)
        size = jnp.where(jnp.isfinite(value), _size(grad), jnp.inf)
        zero = jnp.int32(0)
        start = _Quasi(
            point.params, opt_state, value, grad, size, zero, zero + 1, (value, size), zero, jnp.bool_(False)
        )
        end = jax.lax.while_loop(going, body, start)
        info = SolveInfo(end.size, end.steps, end.gradients, jnp.bool_(False))
        return Point(end.params, point.opt_state, point.model_state), state, info


def lbfgs(max_steps: int = 200, atol: float | None = None, memory: int = 10) -> LBFGS:
    """L-BFGS with a line search: `optax.lbfgs` until the gradient is small.

    Needs no constants and no step size, and takes losses that are not convex. One to two gradients per step,
    as the line search has it, and ``2 memory`` vectors. It stops early, with a residual above ``atol``, where
    nothing gets better any more.

    Args:
      max_steps: steps at most; each searches along its direction with at most 20 gradients.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      memory: pairs of differences that stand for the inverse Hessian.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    return LBFGS(
        validation.whole_number("max_steps", max_steps, 1),
        _check_atol(atol),
        validation.whole_number("memory", memory, 1),
    )


# --- Newton -------------------------------------------------------------------------------------------------

_HALVINGS = 30


class _Search(NamedTuple):
    """``params``, with ``value`` and ``size``, was accepted last; the trial goes along ``direction``."""

    params: jax.Array
    value: jax.Array
    size: jax.Array
    direction: jax.Array
    slope: jax.Array
    halvings: jax.Array
    steps: jax.Array
    gradients: jax.Array
    indefinite: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class Newton:
    """See `newton`."""

    max_steps: int
    atol: float | None
    damping: float

    def init(self, problem, point, hparams):
        """No state; refuses what does not fit."""
        del hparams
        _needs_a_loss("newton", problem)
        size = sum(x.size for x in jax.tree.leaves(point.params))
        if size > linear_solvers.DENSE_LIMIT:
            raise ValueError(
                f"bilevel.newton() would form a Hessian of {size} x {size}; it takes at most "
                f"{linear_solvers.DENSE_LIMIT} parameters. Take bilevel.lbfgs(), which needs gradients only."
            )
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw."""
        del key
        flat, unravel = ravel_pytree(point.params)
        tree_loss = _loss_of(problem, point, hparams, draw.last)
        atol = _tolerance(self.atol, atol, point.params)

        def loss(flat):
            return tree_loss(unravel(flat))

        def direction(flat, grad):
            hessian = jax.jacfwd(jax.grad(loss))(flat) + self.damping * jnp.eye(flat.size, dtype=flat.dtype)
            step = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(hessian), grad)
            convex = jnp.all(jnp.isfinite(step)) & (jnp.vdot(step, grad) < 0)
            return jax.lax.cond(convex, lambda: step, lambda: _downhill(hessian, grad)), convex

        def body(at):
            first = at.gradients == 0
            step_size = jnp.exp2(-at.halvings.astype(flat.dtype))
            trial = at.params + step_size * at.direction
            value, grad = jax.value_and_grad(loss)(trial)
            size = _size(grad)
            # Sufficient decrease of the loss or, where that drowns in its rounding, of the gradient.
            noise = 1e3 * jnp.finfo(value.dtype).eps * jnp.abs(at.value)
            shorter = (value <= at.value + noise) & (size <= (1 - 1e-4 * step_size) * at.size)
            lower = (value <= at.value + 1e-4 * step_size * at.slope) & (value < at.value)
            accept = (lower | shorter) & jnp.isfinite(size) & jnp.isfinite(value)
            size = jnp.where(jnp.isfinite(value), size, jnp.inf)
            accept = accept | first
            steps = jnp.where(accept & ~first, at.steps + 1, at.steps)
            small = accept & ((size <= atol) | (first & ~jnp.isfinite(size)))
            done = small | (accept & (steps >= self.max_steps)) | (~accept & (at.halvings >= _HALVINGS))
            again = accept & ~done
            new, convex = jax.lax.cond(
                again, direction, lambda flat, grad: (at.direction, jnp.bool_(True)), trial, grad
            )
            return _Search(
                params=jnp.where(accept, trial, at.params),
                value=jnp.where(accept, value, at.value),
                size=jnp.where(accept, size, at.size),
                direction=new,
                slope=jnp.where(again, jnp.vdot(new, grad), at.slope),
                halvings=jnp.where(accept, 0, at.halvings + 1),
                steps=steps,
                gradients=at.gradients + 1 + jnp.where(again, flat.size, 0),
                indefinite=at.indefinite | (again & ~convex),
                done=done,
            )

        zero, no = jnp.int32(0), jnp.bool_(False)
        inf = jnp.asarray(jnp.inf, flat.dtype)
        value = jnp.asarray(jnp.inf, jax.eval_shape(loss, flat).dtype)
        nothing = jnp.zeros_like(flat)
        start = _Search(flat, value, inf, nothing, jnp.zeros_like(inf), zero, zero, zero, no, no)
        end = jax.lax.while_loop(lambda at: ~at.done, body, start)
        info = SolveInfo(end.size, end.steps, end.gradients, end.indefinite)
        return Point(unravel(end.params), point.opt_state, point.model_state), state, info


def _downhill(hessian, grad):
    """The Newton step with the Hessian's eigenvalues replaced by their absolute values."""
    eigenvalues, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    curvature = jnp.abs(eigenvalues)
    floor = jnp.sqrt(jnp.finfo(grad.dtype).eps) * jnp.max(curvature)
    return -vectors @ ((vectors.T @ grad) / jnp.where(floor > 0, jnp.maximum(curvature, floor), 1))


def newton(max_steps: int = 50, atol: float | None = None, damping: float = 0.0) -> Newton:
    """Newton's method with the dense Hessian and backtracking, for small problems.

    Quadratic convergence: near the solution the number of right digits doubles with every step, down to
    rounding. Where the Hessian is not positive definite its negative eigenvalues change sign, so that the
    step goes downhill, and the info says so. One Hessian per step, counted as one gradient for each
    parameter, and two matrices of memory.

    Args:
      max_steps: steps at most; backtracking halves a step at most 30 times, then it ends there.
      atol: Euclidean norm of the gradient, absolute; default the square root of the dtype's rounding unit.
      damping: added to the diagonal of the Hessian. The solution stays the same; convergence becomes linear.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range; more parameters than a dense matrix
        is made for.
    """
    return Newton(
        validation.whole_number("max_steps", max_steps, 1),
        _check_atol(atol),
        validation.number("damping", damping, minimum=0.0),
    )


# --- Stochastic ---------------------------------------------------------------------------------------------


class _Epochs(NamedTuple):
    params: PyTree
    size: jax.Array
    epoch: jax.Array
    steps: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class EpochSGD:
    """See `epoch_sgd`."""

    step_size: float
    radius: float
    steps: int
    epochs: int
    atol: float

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        _needs_a_loss("epoch_sgd", problem)
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Batch ``j`` of the draw for step ``j``, counted through all epochs."""
        del key
        atol = _tolerance(self.atol, atol, point.params)

        def gradient(params, batch):
            return _gradient(_loss_of(problem, point, hparams, batch))(params)

        def run_epoch(at):
            halved = jnp.exp2(-at.epoch.astype(at.size.dtype))
            step_size, radius = self.step_size * halved, self.radius * jnp.sqrt(halved)

            def step(j, carry):
                w, mean = carry
                w = axpy(-step_size, gradient(w, draw(at.steps + j)), w)
                w = _into_ball(w, at.params, radius)
                return w, jax.tree.map(lambda m, x: (m + (x - m) / (j + 1)).astype(m.dtype), mean, w)

            length = jnp.left_shift(jnp.int32(self.steps), at.epoch)
            _, mean = jax.lax.fori_loop(0, length, step, (at.params, at.params))
            return mean, at.steps + length

        def body(at):
            size = _size(gradient(at.params, draw.last))
            done = (size <= atol) | ~jnp.isfinite(size) | (at.epoch >= self.epochs)
            params, steps = jax.lax.cond(done, lambda at: (at.params, at.steps), run_epoch, at)
            return _Epochs(params, size, jnp.where(done, at.epoch, at.epoch + 1), steps, done)

        size = jnp.full_like(norm(point.params), jnp.inf)
        start = _Epochs(point.params, size, jnp.int32(0), jnp.int32(0), jnp.bool_(False))
        end = jax.lax.while_loop(lambda at: ~at.done, body, start)
        info = SolveInfo(end.size, end.steps, end.steps + end.epoch + 1, jnp.bool_(False))
        return Point(end.params, point.opt_state, point.model_state), state, info


def _into_ball(params: PyTree, centre: PyTree, radius) -> PyTree:
    """Projection onto the ball around ``centre``, over the whole pytree."""
    away = axpy(-1.0, centre, params)
    distance = norm(away)
    shrink = jnp.minimum(1, radius / jnp.where(distance > 0, distance, 1))
    return axpy(shrink, away, centre)


def epoch_sgd(
    step_size: float, radius: float, steps: int = 16, epochs: int = 6, atol: float = 0.0
) -> EpochSGD:
    """Epoch-SGD: gradient steps on batches, for strongly convex losses seen through noise.

    Epoch ``s = 0, 1, ...`` begins at the mean of the epoch before, ``c``, and takes ``steps 2^s`` steps of
    size ``step_size / 2^s``, each projected onto the ball around ``c`` of radius ``radius / 2^(s/2)``; the
    mean of its iterates is where the next begins. The expected squared error falls like one over the number
    of all steps, ``steps (2^epochs - 1)``, the best rate that noisy gradients allow, and the balls keep a
    rare bad batch from throwing it far.

    Step ``j`` takes batch ``j`` of the draw, counted through all epochs: fresh batches beyond the outer
    step's own where the source is sampled, else the last again. The gradient is measured between epochs and
    at the end on the draw's last batch; with minibatches that is a noisy number, and not the residual of all
    data.

    Args:
      step_size: of the first epoch; at most about ``1 / L`` for an L-smooth loss on a batch, and a few times
        ``1 / (mu steps)`` where that is less.
      radius: of the first ball: a bound on the distance between the start and the solution.
      steps: of the first epoch.
      epochs: how many, each twice as long as the one before.
      atol: Euclidean norm of the gradient at which no further epoch begins; 0 runs all of them.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    epochs = validation.whole_number("epochs", epochs, 1)
    steps = validation.whole_number("steps", steps, 1)
    if steps * 2**epochs >= 2**31:
        raise ValueError(
            f"epochs = {epochs} doubles the {steps} steps of the first so often that "
            f"{steps * (2**epochs - 1)} are taken in all. Take fewer."
        )
    return EpochSGD(
        validation.number("step_size", step_size, positive=True),
        validation.number("radius", radius, positive=True),
        steps,
        epochs,
        validation.number("atol", atol, minimum=0.0),
    )


# --- Fixed points -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picard:
    """See `picard`."""

    max_steps: int
    atol: float | None

    def init(self, problem, point, hparams):
        """No state."""
        del point, hparams
        if not isinstance(problem, FixedPoint):
            raise TypeError(
                "picard() repeats the map of a FixedPoint; for an inner loss take bilevel.lbfgs()."
            )
        return ()

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """On the last batch of the draw; the residual is the norm of ``update(params) - params``."""
        del key
        batch = draw.last

        def defect(params):
            return axpy(-1.0, params, updated(problem, params, hparams, batch, point.model_state)[0])

        def move(params, defect, size, memory):
            del size
            return axpy(1.0, defect, params), memory

        atol = _tolerance(self.atol, atol, point.params)
        loop = _measured_moves(defect, move, point.params, (), self.max_steps, atol)
        return Point(loop.params, point.opt_state, point.model_state), state, _info(loop)


def picard(max_steps: int = 1000, atol: float | None = None) -> Picard:
    """The map of a fixed point, repeated until it moves params no more.

    For contractions: a factor rho < 1 per step, and params within ``atol / (1 - rho)`` of the fixed point.

    Args:
      max_steps: steps at most.
      atol: Euclidean norm of ``update(params) - params``; default the square root of the dtype's rounding
        unit.

    Raises:
      TypeError, ValueError: a setting that is no number or out of range.
    """
    return Picard(validation.whole_number("max_steps", max_steps, 1), _check_atol(atol))
