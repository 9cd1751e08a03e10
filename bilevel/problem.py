"""The contract: what a problem is, and what its parts hand to one another.

A bilevel problem chooses hyperparameters by the loss of the parameters they lead to::

    min over hparams   F(hparams) = outer(params*(hparams), hparams, valid)          (1)
    subject to         params*(hparams) in argmin over params of inner(params, hparams, train)

and the object of interest is the hypergradient, direct term plus indirect term::

    dF/dhparams = d_hparams outer + (d params*/d hparams)^T d_params outer            (2)

Everything in the library is one of five kinds of frozen, hashable values without arrays, each with an
``init`` that makes a state and one pure function that takes the state and returns it, as in optax:

=================  =====================================================================
`Problem`          what is solved; two losses and their structure
`Estimator`        hypergradient at a point: Eq. (2) and how far off it is
`LinearSolver`     solves ``H v = d_params outer`` for the estimators that need it
`InnerSolver`      moves params to a stated accuracy
`Method`           one outer step: advance params, estimate, move hparams
=================  =====================================================================

Vocabulary: params, hparams and batches are pytrees of arrays, always passed in this order. What
a user writes or reads is in natural units; free (unconstrained) units live inside the methods, see
`bilevel.constraints`. A *point* is where an inner problem stands. A *draw* hands out training batches.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel.constraints import Constraint

PyTree = Any
Params = PyTree
HParams = PyTree
Batch = PyTree


def register(cls):
    """Make a dataclass a pytree; fields with ``metadata={"static": True}`` are not leaves."""
    return jax.tree_util.register_dataclass(cls)


def static(**kwargs):
    """A dataclass field that belongs to the structure of a pytree, not to its leaves."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


# --- Problems ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A pytree of hashable settings kept as leaves and structure, so that it hashes itself."""

    leaves: tuple
    treedef: Any

    @classmethod
    def of(cls, tree: PyTree) -> StaticTree:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Constraint))
        return cls(tuple(leaves), treedef)

    def tree(self) -> PyTree:
        return jax.tree.unflatten(self.treedef, self.leaves)

    def __repr__(self) -> str:
        return repr(self.tree())


@dataclasses.dataclass(frozen=True)
class Smoothness:
    """Constants that turn error estimates into certificates (Theorem 2.1 of Salehi et al., 2025).

    Each is a float or a function of hparams (natural units); ``w, w'`` are any two params, norms are
    Euclidean. With them `bilevel.implicit` bounds its error by what it measured, see `bilevel.certificates`;
    a constant that is too small makes a bound that does not hold.

    Args:
      strong_convexity: mu with ``(grad inner(w) - grad inner(w')) . (w - w') >= mu |w - w'|^2``.
      inner: L with ``|grad inner(w) - grad inner(w')| <= L |w - w'|``, gradients in params.
      outer: L with ``|grad outer(w) - grad outer(w')| <= L |w - w'|``, gradients in params.
      cross: L with ``|J(w) - J(w')| <= L |w - w'|`` for ``J = d_hparams d_params inner``.
      inverse_hessian: L with ``|H(w)^-1 - H(w')^-1| <= L |w - w'|`` for ``H = d^2_params inner``.
      direct: L with ``|d_hparams outer(w) - d_hparams outer(w')| <= L |w - w'|``; None only where
        outer structurally ignores hparams.
      estimated: the constants are not known to hold, as those of `bilevel.estimate_smoothness`: bounds made
        of them are "estimated", never "certified".

    Raises:
      TypeError, ValueError: a constant that is neither a number nor a function, or out of range.

    Example:
      >>> import bilevel, jax.numpy as jnp
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, lam, x: 0.5 * (w - x) ** 2 + 0.5 * lam * w**2,
      ...     outer=lambda w, lam, x: 0.5 * (w - x) ** 2,
      ...     smoothness=bilevel.Smoothness(
      ...         strong_convexity=lambda lam: 1 + lam, inner=lambda lam: 1 + lam, outer=1.0, cross=1.0
      ...     ),
      ... )
      >>> fn = bilevel.hypergradient(problem)
      >>> est = fn(jnp.array(1.1), jnp.array(1.0), jnp.array(2.0), jnp.array(3.0))  # at w* = 1 it is 1
      >>> print(est.error_kind, f"{est.error:.3f} >= {abs(est.grad - 1):.3f}")
      certified 0.155 >= 0.045
    """

    strong_convexity: float | Callable
    inner: float | Callable
    outer: float | Callable
    cross: float | Callable = 0.0
    inverse_hessian: float | Callable = 0.0
    direct: float | Callable | None = None
    estimated: bool = False

    def __post_init__(self):
        if not isinstance(self.estimated, bool):
            raise TypeError(f"estimated must be True or False, got {self.estimated!r}.")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "estimated" or callable(value) or (name == "direct" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number or a function of hparams, got {value!r}.")
            if not math.isfinite(value) or value < 0 or (name == "strong_convexity" and value == 0):
                wanted = "positive" if name == "strong_convexity" else "finite and not negative"
                raise ValueError(f"{name} must be {wanted}, got {value:g}.")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem whose inner solution minimises a loss, Eq. (1) of the module.

    Args:
      inner: ``(params, hparams, batch) -> scalar``, the training loss.
      outer: ``(params, hparams, batch) -> scalar`` or ``(scalar, dict of scalar metrics)``, the
        validation loss; metrics become columns of the history.
      constraints: where hparams live: one constraint for all, a tree that matches hparams or a prefix
        of it, or a dict of names of subtrees. What is not named is unconstrained.
      start: ``(hparams, batch, key) -> params``, where every outer step begins, with a fresh optimiser
        state; trajectory estimators differentiate through it.
      has_state: the losses take a fourth argument, mutable model state (BatchNorm statistics), and inner
        returns ``(loss, state)``. Inner steps advance it; trajectory estimators differentiate through it,
        implicit ones hold it constant, which is a bias.
      smoothness: constants that turn error estimates into certificates.

    Raises:
      TypeError: an argument is of the wrong kind.

    Example:
      >>> import bilevel
      >>> def train_loss(params, hparams, batch):
      ...     return 0.5 * (params - batch) ** 2 + 0.5 * hparams["l2"] * params**2
      >>> def valid_loss(params, hparams, batch):
      ...     return 0.5 * (params - batch) ** 2
      >>> bilevel.Problem(train_loss, valid_loss, constraints={"l2": bilevel.positive()})
      Problem(inner=train_loss, outer=valid_loss, constraints={'l2': positive()})
    """

    inner: Callable
    outer: Callable
    constraints: Any = None
    start: Callable | None = None
    has_state: bool = False
    smoothness: Smoothness | None = None

    def __post_init__(self):
        callable_of("inner", self.inner, "(params, hparams, batch) -> scalar")
        _finish_problem(self)

    def __repr__(self) -> str:
        return _repr_problem(self, "inner")


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """A bilevel problem whose inner solution is a fixed point: ``params == update(params, ...)``.

    The map is its own inner step, so that methods take ``inner=None``. Its implicit system
    ``(I - A)^T v = b`` with ``A = d_params update`` is not symmetric: take `bilevel.gmres`, `bilevel.neumann`
    or `bilevel.dense` (`bilevel.cg` too for a `bilevel.proximal_gradient`). The implicit derivative is that
    of what the map converges to, so that it has to contract: the history's column "contraction" has the
    measured factor by which it shrinks its own step, and a run whose map does not contract says so.

    Args:
      update: ``(params, hparams, batch) -> params``, for instance one step of EM.
      outer: as in `Problem`; so are the further arguments. With ``has_state`` the map takes the model state
        as fourth argument and returns ``(params, state)``.

    Example:
      >>> import bilevel
      >>> def relax(params, hparams, batch):
      ...     return 0.5 * (params + hparams / params)
      >>> def miss(params, hparams, batch):
      ...     return 0.5 * (params - batch) ** 2
      >>> bilevel.FixedPoint(relax, miss)
      FixedPoint(update=relax, outer=miss)
    """

    update: Callable
    outer: Callable
    constraints: Any = None
    start: Callable | None = None
    has_state: bool = False
    smoothness: Smoothness | None = None

    def __post_init__(self):
        callable_of("update", self.update, "(params, hparams, batch) -> params")
        _finish_problem(self)
        if self.has_state and self.proximal:
            raise TypeError("has_state=True: a bilevel.proximal_gradient step has no model state to return.")

    @property
    def proximal(self) -> bool:
        """Whether the map is a `bilevel.proximal_gradient`, whose system has a symmetric form."""
        return isinstance(self.update, Proximal)

    def __repr__(self) -> str:
        return _repr_problem(self, "update")


@dataclasses.dataclass(frozen=True)
class Composite:
    """See `composite`."""

    predict: Callable
    loss: Callable
    penalty: Callable | None = None

    def __call__(self, params, hparams, batch):
        value = self.loss(self.predict(params, hparams, batch), hparams, batch)
        return value if self.penalty is None else value + self.penalty(params, hparams)


def composite(predict: Callable, loss: Callable, penalty: Callable | None = None) -> Composite:
    """An inner loss of known structure: ``loss(predict(params)) + penalty(params)``.

    It is called like any inner loss, and lets `bilevel.implicit` take the Gauss-Newton matrix for the
    Hessian, which is positive semi-definite wherever params are.

    Args:
      predict: ``(params, hparams, batch) -> outputs``.
      loss: ``(outputs, hparams, batch) -> scalar``, convex in outputs.
      penalty: ``(params, hparams) -> scalar``, convex in params, or None.

    Raises:
      TypeError: one of them is no function.
    """
    callable_of("predict", predict, "(params, hparams, batch) -> outputs")
    callable_of("loss", loss, "(outputs, hparams, batch) -> scalar")
    if penalty is not None:
        callable_of("penalty", penalty, "(params, hparams) -> scalar")
    return Composite(predict, loss, penalty)


@dataclasses.dataclass(frozen=True)
class Proximal:
    """See `bilevel.proximal_gradient`."""

    loss: Callable
    prox: Callable
    step_size: float

    def __call__(self, params, hparams, batch):
        return self.prox(self.forward(params, hparams, batch), hparams, self.step_size)

    def forward(self, params, hparams, batch):
        """The gradient step, before the proximal map."""
        gradient = jax.grad(self._value)(params, hparams, batch)
        return jax.tree.map(lambda w, g: (w - self.step_size * g).astype(w.dtype), params, gradient)

    def _value(self, params, hparams, batch):
        value = self.loss(params, hparams, batch)
        if isinstance(value, tuple):
            raise TypeError(
                f"loss must return one scalar, got a tuple of {len(value)}; metrics belong to outer, and a "
                "proximal gradient step has no model state"
            )
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss must return a scalar, got shape {jnp.shape(value)}; take the mean or the sum"
            )
        return value


def inner_value(problem: Any, params, hparams, batch, model_state) -> tuple[jax.Array, PyTree]:
    """Inner loss and the model state after it."""
    if problem.has_state:
        value, model_state = problem.inner(params, hparams, batch, model_state)
    else:
        value = problem.inner(params, hparams, batch)
    return jnp.asarray(value), model_state


def outer_value(problem: Problem | FixedPoint, params, hparams, batch, model_state) -> tuple[jax.Array, dict]:
    """Outer loss and its dict of metrics, empty where the loss returns a bare scalar."""
    extra = (model_state,) if problem.has_state else ()
    out = problem.outer(params, hparams, batch, *extra)
    value, metrics = out if isinstance(out, tuple) else (out, {})
    return jnp.asarray(value), metrics


def updated(problem: Any, params, hparams, batch, model_state) -> tuple[Params, PyTree]:
    """The map of a fixed point: new params and the model state after it."""
    if problem.has_state:
        return problem.update(params, hparams, batch, model_state)
    return problem.update(params, hparams, batch), model_state


def callable_of(name: str, fn, signature: str) -> None:
    """Raise TypeError for what is no function, or cannot be hashed."""
    if not callable(fn):
        raise TypeError(f"{name} must be a function {signature}, got {fn!r}.")
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"{name} must be hashable, as functions and frozen dataclasses are, got {fn!r}."
        ) from None


def _finish_problem(problem: Problem | FixedPoint) -> None:
    callable_of("outer", problem.outer, "(params, hparams, batch) -> scalar")
    if problem.constraints is not None and not isinstance(problem.constraints, StaticTree):
        spec = StaticTree.of(problem.constraints)
        for leaf in spec.leaves:
            if not isinstance(leaf, Constraint):
                raise TypeError(
                    "constraints must hold constraints such as bilevel.positive() or "
                    f"bilevel.interval(0, 1), got {leaf!r}."
                )
        object.__setattr__(problem, "constraints", spec)
    if problem.smoothness is not None and not isinstance(problem.smoothness, Smoothness):
        raise TypeError(f"smoothness must be bilevel.Smoothness(...), got {problem.smoothness!r}.")
    if problem.smoothness is not None and isinstance(problem, FixedPoint):
        raise TypeError("smoothness is that of an inner loss; a FixedPoint has none to certify anything by.")
    if not isinstance(problem.has_state, bool):
        raise TypeError(f"has_state must be True or False, got {problem.has_state!r}.")
    if problem.start is not None:
        callable_of("start", problem.start, "(hparams, batch, key) -> params")


def _repr_problem(problem: Problem | FixedPoint, level: str) -> str:
    parts = []
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if field.name in (level, "outer"):
            parts.append(f"{field.name}={getattr(value, '__name__', repr(value))}")
        elif value != field.default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(problem).__name__}({', '.join(parts)})"


# --- What parts hand to one another ----------------------------------------------------------------


@register
@dataclasses.dataclass(frozen=True)
class Point:
    """Where an inner problem stands."""

    params: Params
    opt_state: PyTree = None
    model_state: PyTree = None


class Draw(NamedTuple):
    """Hands out the training batches of one outer step.

    ``draw(j)`` with ``j < steps`` are the step's own batches; later ``j`` are fresh ones where the
    source has them (``sampled``), else the last again. ``j`` may be traced.
    """

    batch: Callable[[Any], Batch]
    steps: int
    sampled: bool

    def __call__(self, j) -> Batch:
        return self.batch(j)

    @property
    def last(self) -> Batch:
        """The last of the step's own batches."""
        return self.batch(self.steps - 1)


class Counts(NamedTuple):
    """Examples touched, per kind of oracle; floats, so that long runs do not overflow."""

    inner_grad: Any = 0.0
    outer_grad: Any = 0.0
    hvp: Any = 0.0
    cross: Any = 0.0


class SolveInfo(NamedTuple):
    """What a linear or inner solver says of its solve; all scalars, zero where nothing is solved.

    ``residual``: norm of what is left, absolute. ``steps``: iterations; ``products``: with the matrix,
    or gradients. ``negative_curvature``: a direction with negative curvature was met, so that a symmetric
    matrix is not positive definite.
    """

    residual: Any = 0.0
    steps: Any = 0
    products: Any = 0
    negative_curvature: Any = False


def unsolved(value: jax.Array) -> SolveInfo:
    """Of an estimate that solves no system; ``value`` is its outer loss."""
    return SolveInfo(jnp.zeros_like(value), jnp.int32(0), jnp.int32(0), jnp.bool_(False))


CERTIFIED, ESTIMATED, RESIDUAL, NONE = "certified", "estimated", "residual", "none"
# Relative residual from which on a running solution of the linear system is taken for one.
SETTLED = 0.5


@register
@dataclasses.dataclass(frozen=True)
class Estimate:
    """A hypergradient and what is known of it.

    ``value``: outer loss at ``params``, a scalar. ``grad``: like hparams, natural units. ``point``:
    where the inner problem stands afterwards, see `params`. ``error``: a scalar whose meaning is
    ``error_kind``: "certified" (upper bound on ``|grad - exact|``), "estimated" (bound with estimated
    constants), "residual" (relative residual of the linear solve, measured), "none" (``inf``).
    ``value_error``: upper bound on the distance of ``value`` from F, where there is one. ``counts``: examples
    touched. ``solve``: the linear solve. ``metrics``: of the outer loss. ``settled``: whether a small
    ``grad`` says that the run has converged; not while a running solution is still far off. ``free_grad``:
    the gradient in free units, of an estimator that works in them; None: that of ``grad`` pulled back.
    ``contraction``: of a fixed point taken for reached, by what factor its map shrinks its own step there;
    None elsewhere. ``growth``: of a trajectory estimator, the natural logarithm of how many times longer a
    small change of params at some inner step is at the end, at most, as the outer loss sees it; divided by
    the steps an estimate of the Lyapunov exponent. Beyond ``log(300)`` the gradient holds for tiny steps
    only. None where it is not measured.
    """

    value: jax.Array
    grad: HParams
    point: Point
    error: Any = math.inf
    counts: Counts = Counts()
    solve: SolveInfo = SolveInfo()
    metrics: dict = dataclasses.field(default_factory=dict)
    value_error: Any = math.inf
    settled: Any = True
    free_grad: HParams = None
    contraction: Any = None
    growth: Any = None
    error_kind: str = static(default=NONE)

    @property
    def params(self) -> Params:
        """Parameters at which ``value`` and ``grad`` were taken."""
        return self.point.params


class Status(enum.IntEnum):
    """How a run stands or ended."""

    RUNNING = 0
    CONVERGED = 1
    BUDGET = 2
    DIVERGED = 3
    STALLED = 4
    DATA_EXHAUSTED = 5
    INTERRUPTED = 6
    DROPPED = 7

    def __str__(self) -> str:
        return self.name


class NonFinite(enum.IntFlag):
    """Where an outer step met a number that is not finite; the step is then rejected."""

    VALUE = 1
    GRAD = 2
    PARAMS = 4
    STATE = 8


@register
@dataclasses.dataclass(frozen=True)
class Info:
    """What a person wants to know of one outer step; the state is what the next step needs.

    ``value`` is outer at the pair (``params``, ``hparams``) with ``model_state``, neither always the
    pair before the step nor the one after it. ``grad_norm`` is in free units, and so is ``error`` where it is
    a bound. ``status`` is a `Status` code, ``nonfinite`` a `NonFinite` mask; the step was rejected where it
    is not zero. ``extra``: scalars under the names that the method calls its ``columns``. ``settled``: as in
    `Estimate`.
    """

    value: jax.Array
    grad_norm: jax.Array
    error: jax.Array
    accepted: jax.Array
    status: jax.Array
    nonfinite: jax.Array
    counts: Counts
    solve: SolveInfo
    metrics: dict
    params: Params
    hparams: HParams
    model_state: PyTree = None
    extra: dict = dataclasses.field(default_factory=dict)
    settled: Any = True
    error_kind: str = static(default=NONE)


AnyProblem = Problem | FixedPoint

# --- Protocols ---------------------------------------------------------------------------------------


@runtime_checkable
class LinearSolver(Protocol):
    """Solves ``A x = b`` for a symmetric (unless it says otherwise) matrix given by its products."""

    def init(self, params: Params) -> PyTree:
        """State before the first solve: warm starts, columns kept between solves."""
        ...

    def solve(
        self, matvec: Callable, b: Params, state: PyTree, key, *, rtol=None, atol=None
    ) -> tuple[Params, PyTree, SolveInfo]:
        """``matvec(v)`` is the product; ``matvec(v, j)`` with the curvature of fresh batch ``j``."""
        ...


@runtime_checkable
class Preconditioner(Protocol):
    """An approximate inverse for `bilevel.cg`, symmetric positive definite.

    If its state has a field ``products``, these are counted.
    """

    def init(self, params: Params) -> PyTree:
        """State before the first solve."""
        ...

    def update(self, matvec: Callable, state: PyTree, key) -> PyTree:
        """Refreshed before each solve."""
        ...

    def apply(self, state: PyTree, v: Params) -> Params:
        """The product of the approximate inverse with ``v``."""
        ...


@runtime_checkable
class InnerSolver(Protocol):
    """Moves a point until the inner gradient norm is at most ``atol``, or a cap is hit."""

    def init(self, problem: AnyProblem, point: Point, hparams: HParams) -> PyTree:
        """State before the first solve."""
        ...

    def solve(
        self, problem: AnyProblem, state, point: Point, hparams, draw: Draw, key, *, atol=None
    ) -> tuple[Point, PyTree, SolveInfo]:
        """The point it reached, and what it measured there."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """Estimates the hypergradient, Eq. (2).

    ``trajectory`` says whether it moves the point itself (unrolled, forward) or takes it as the inner
    solution (implicit). One that does is a dataclass with the fields ``inner``, an optax optimiser, and
    ``steps``, both None where they are left to the method it is used in, and with the function
    ``seen(hparams, j)``: what the losses and optimisers see at inner step ``j``. One whose state is nothing
    but a warm start may say so by ``forgets = True``: a rejected step then begins it anew.
    """

    @property
    def trajectory(self) -> bool:
        """Whether ``estimate`` advances the point."""
        ...

    def init(self, problem: AnyProblem, point: Point, hparams: HParams) -> PyTree:
        """State before the first estimate: the linear solver's, response parameters."""
        ...

    def estimate(
        self, problem: AnyProblem, state, point: Point, hparams, draw: Draw, valid: Batch, key
    ) -> tuple[Estimate, PyTree]:
        """The estimate at hparams (natural units), and the state for the next one."""
        ...


@runtime_checkable
class Method(Protocol):
    """One outer step as a pure, traceable function.

    It may have ``columns``, names of further scalars that its steps report in ``info.extra``, or a function
    from the problem to them, and ``why_stalled(row)``, a sentence for a run that ends STALLED: the reason,
    and the argument to change.
    """

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """Training and validation batches that one outer step takes."""
        ...

    def init(self, problem: AnyProblem, params, hparams, train, valid, *, key, model_state=None) -> PyTree:
        """The first state; it has the properties ``params`` and ``hparams`` (natural units)."""
        ...

    @property
    def differentiated(self) -> Any:
        """The inner optimiser through whose steps derivatives are taken, or None."""
        ...

    def seen(self, hparams: HParams, j) -> HParams:
        """What the losses see at inner step ``j`` (outer: -1) of hparams, which may hold a schedule."""
        ...

    def step(self, problem: AnyProblem, state, train, valid) -> tuple[PyTree, Info]:
        """One outer step. It rejects itself, and keeps the state, where a result is not finite."""
        ...


def tree_is_finite(tree: PyTree) -> jax.Array:
    """Whether all floating leaves are finite; a scalar bool.

    Judged by the sum of each leaf, in at least float32: one pass and one kernel, and a sum of finite
    numbers that overflows is as good as lost.
    """

    def finite(x):
        return jnp.isfinite(jnp.sum(x, dtype=jnp.float32 if x.dtype.itemsize < 4 else x.dtype))

    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return functools.reduce(jnp.logical_and, map(finite, leaves), jnp.bool_(True))
