"""SABA: single-loop steps whose noise vanishes, by a table of the directions of every batch.

The batches of both levels are fixed, n and m of them. Each of the parts ``d_i`` of the directions of
`bilevel.methods.directions`, taken on batch i, has an entry in a table, which a step corrects::

    D = d_i(now) - table_i + mean(table),   and then table_i becomes d_i(now)                (1)

with one i for all parts of the inner loss, one j for those of the outer one, drawn uniformly and
independently. Its error falls with the distance from the solution, so that steps of a fixed size converge,
linearly where F is strongly convex, at the cost per step of `bilevel.soba`.

References:
  Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and
  global variance reduction algorithms", 2022, arXiv:2201.13409, with the tables of Defazio, Bach and
  Lacoste-Julien, "SAGA", 2014, arXiv:1407.0202.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import data
from bilevel.linear_solvers import SGDState
from bilevel.methods.alternating import Alternating
from bilevel.methods.directions import (
    Parts,
    begun,
    counted,
    first_running,
    inner_part,
    moved,
    outer_part,
    refuse_iterable,
    single_loop,
    sources_of,
)
from bilevel.placement import refuse_explicit
from bilevel.problem import PyTree, tree_is_finite
from bilevel.vectors import put, row


class SabaState(NamedTuple):
    """The running vector, and for the parts of both levels their mean and their table, (batches, ...)."""

    running: SGDState
    mean: Parts
    table: Parts | None


@dataclasses.dataclass(frozen=True)
class Saba:
    """See `saba`."""

    method: Alternating
    batches_per_step = 1, 1
    differentiated = None

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        return self.method.seen(hparams, j)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state; a pass over both sources fills the table."""
        train, valid = sources_of(_refuse_changing, train, valid)
        args = params, hparams, train, valid
        state = begun("saba", self.method, problem, args, key=key, model_state=model_state)
        params, hparams = state.params, state.hparams
        key_train, key_valid, _ = state.streams

        def of_inner(i):
            return inner_part(problem, params, running.v, hparams, train.numbered(key_train, i))

        def of_outer(j):
            return outer_part(problem, params, hparams, valid.numbered(key_valid, j))[2]

        outer = jax.lax.map(lambda j: _finite(of_outer(j)), jnp.arange(valid.num_batches))
        slope = jax.tree.map(lambda x: jnp.mean(x, 0), outer.slope)
        running = first_running(self.method, state.estimator, slope)
        inner = jax.lax.map(lambda i: _finite(of_inner(i)), jnp.arange(train.num_batches))
        table = Parts(inner, outer)
        mean = jax.tree.map(lambda x: jnp.mean(x, 0), table)
        return dataclasses.replace(state, estimator=SabaState(running, mean, table))

    def step(self, problem, state, train, valid):
        """Eq. (1); rejected as a whole where a result is not finite."""
        refuse_explicit(state=state, train=train, valid=valid)
        train, valid = sources_of(_refuse_changing, train, valid)
        running, mean, table = state.estimator
        key_train, key_valid, picked = state.streams
        of, to = jax.random.split(picked)
        i = jax.random.randint(of, (), 0, train.num_batches, jnp.int32)
        j = jax.random.randint(to, (), 0, valid.num_batches, jnp.int32)
        rows, valid_rows = train.numbered(key_train, i), valid.numbered(key_valid, j)
        params, hparams = state.params, state.hparams
        value, metrics, outer = outer_part(problem, params, hparams, valid_rows)
        new = Parts(inner_part(problem, params, running.v, hparams, rows), outer)
        old = Parts(row(table.inner, i), row(table.outer, j))
        change = jax.tree.map(jnp.subtract, new, old)
        parts = jax.tree.map(jnp.add, change, mean)
        counts = counted(problem, rows, valid_rows)
        made = moved(self.method, state, running, parts, value, metrics, counts)
        mean = Parts(
            _plus(mean.inner, 1 / train.num_batches, change.inner),
            _plus(mean.outer, 1 / valid.num_batches, change.outer),
        )
        # Without the table, of which a step that may be rejected would need a copy.
        lean = dataclasses.replace(state, estimator=state.estimator._replace(table=None))
        after, info = self.method.concluded(
            lean, made.estimate, made.point, SabaState(made.running, mean, None),
            taken=1, renewed=train.renewed or valid.renewed,
        )  # fmt: skip
        kept = jax.tree.map(lambda a, b: jnp.where(info.accepted, a, b), new, old)
        table = Parts(put(table.inner, i, kept.inner), put(table.outer, j, kept.outer))
        return dataclasses.replace(after, estimator=after.estimator._replace(table=table)), info


def _finite(part):
    """The entry of a batch; zero where it is not finite, until a visit finds that it is."""
    usable = tree_is_finite(part)
    return jax.tree.map(lambda x: jnp.where(usable, x, 0), part)


def _plus(mean: PyTree, share: float, change: PyTree) -> PyTree:
    return jax.tree.map(lambda m, c: (m + share * c).astype(m.dtype), mean, change)


def _refuse_changing(**sources) -> None:
    why = "keeps a table of the derivatives on every batch, which have to be the same at each visit"
    fix = "Take bilevel.minibatches(arrays, batch_size, fixed=True), or arrays."
    refuse_iterable("saba", why, fix, **sources)
    for which, source in sources.items():
        if not (isinstance(source, data.Whole) or (isinstance(source, data.Minibatches) and source.fixed)):
            raise ValueError(f"{which}: saba {why}, got {source!r:.80}. {fix}")


def saba(inner, outer, linear_step) -> Saba:
    """Single-loop steps with variance reduced by tables, Eq. (1) of the module.

    One outer step moves params by ``inner``, the solution of the linear system by ``linear_step`` and hparams
    by ``outer``, from one point. It costs an inner gradient, a Hessian-vector and a cross product on one
    batch, and an outer gradient on another; one pass over both at the start. Memory: for each batch of train
    two vectors of the size of params and one of hparams, for each of valid one of each. The first pass is not
    among the examples that the history counts. In a population every step copies the tables.

    With arrays used whole it is gradient descent with exact derivatives. The minibatches that ``fixed=True``
    leaves out, at the tail, are never seen. Batches are drawn with replacement, as in the paper.

    Args:
      inner: the optax optimiser of params; of the paper ``optax.sgd``.
      outer: the optax optimiser of hyperparameters, in free units.
      linear_step: step size of the linear system, about the inverse of the largest curvature of the inner
        loss; or an optax schedule of it.

    Raises:
      TypeError, ValueError: a setting of the wrong kind or out of range; from ``init``, batches that are not
        the same at each visit.

    Example:
      >>> import bilevel, optax
      >>> bilevel.saba(optax.sgd(0.05), optax.sgd(0.5), linear_step=0.05).batches_per_step
      (1, 1)

    References:
      Dagreou, Ablin, Vaiter and Moreau, 2022, arXiv:2201.13409.
    """
    return Saba(single_loop(inner, outer, linear_step))
