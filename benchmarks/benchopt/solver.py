"""Methods of `bilevel` as a solver of the public benchmark of bilevel methods; README.md says how to run it.

The benchmark hands over both losses as functions of a first row and a number of rows. A batch is here such a
block of consecutive rows, named by its first row: the data of the problem are these numbers, and the rows
stay where the benchmark has them. The blocks are the same at every visit, as `bilevel.saba` wants them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion

import bilevel


class Solver(BaseSolver):
    """Single-loop methods of `bilevel` on batches, and an exact implicit method on all rows."""

    name = "bilevel"
    parameters = {
        "method, step_size": [("srba", 0.4), ("saba", 0.2)],
        "outer_ratio": [1.0],
        "batch_size": [64],
        "period_frac": [0.3],
        "eval_freq": [16],
        "random_state": [1],
    }
    requirements = ["pip::bilevel"]
    sampling_strategy = "callback"
    stopping_criterion = SufficientProgressCriterion(patience=1000, strategy="callback")

    @staticmethod
    def get_next(stop_val):
        """One call of the callback after the other."""
        return stop_val + 1

    def set_objective(self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0):
        """Build the problem, its data and two programs: the first state, and ``eval_freq`` steps."""
        self.inner_var, self.outer_var = inner_var0, outer_var0
        method = self._method((n_inner_samples + n_outer_samples) / self.batch_size)
        inner, train = self._data(f_inner, n_inner_samples)
        outer, valid = self._data(f_outer, n_outer_samples)
        problem, start = bilevel.Problem(inner, outer), (inner_var0, outer_var0)
        key = jax.random.key(self.random_state)
        self._start = jax.jit(lambda: method.init(problem, *start, train, valid, key=key))

        def step(_, state):
            return method.step(problem, state, train, valid)[0]

        self._advance = jax.jit(lambda state: jax.lax.fori_loop(0, self.eval_freq, step, state))

    def warm_up(self):
        """Compile both programs."""
        self._advance(self._start())

    def run(self, callback):
        """Advance until the benchmark has seen enough; it gets finished arrays only."""
        state = self._start()
        while callback():
            state = jax.block_until_ready(self._advance(state))
            self.inner_var, self.outer_var = state.params, state.hparams

    def get_result(self):
        """Both variables where they stand."""
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}

    def _method(self, batches: float):
        """That of the name, for so many batches of both levels together."""
        step, outer_step = self.step_size, self.step_size / self.outer_ratio
        common = {"inner": optax.sgd(step), "outer": optax.sgd(outer_step), "linear_step": step}
        methods = {
            "implicit": lambda: bilevel.alternating(bilevel.implicit(), bilevel.newton_cg(), common["outer"]),
            "saba": lambda: bilevel.saba(**common),
            "srba": lambda: bilevel.srba(**common, period=max(1, int(self.period_frac * batches))),
        }
        if self.method not in methods:
            raise ValueError(f"method must be one of {', '.join(methods)}; got {self.method!r}.")
        return methods[self.method]()

    def _data(self, loss, rows: int):
        """A loss of our form, and where its batches come from."""
        if self.method == "implicit":
            return blocks(loss, rows, rows)
        loss, starts = blocks(loss, rows, min(self.batch_size, rows))
        return loss, bilevel.minibatches(starts, 1, fixed=True)


def blocks(loss, rows: int, size: int):
    """A loss of blocks of rows, whose mean over all blocks is that over all rows, and the first row of each.

    Args:
      loss: ``(inner_var, outer_var, start=, batch_size=)``, a mean over these rows; ``batch_size`` static.
      rows: how many there are.
      size: rows of a block, at most ``rows``; the last block has those that are left, and weighs less.
    """
    count, rest = -(-rows // size), rows % size
    starts = size * jnp.arange(count, dtype=jnp.int32)

    def of_block(inner_var, outer_var, start):
        def weighed(length):
            return length * count / rows * loss(inner_var, outer_var, start=start, batch_size=length)

        if rest == 0:
            return weighed(size)
        return jax.lax.cond(start + size <= rows, lambda: weighed(size), lambda: weighed(rest))

    def of_batch(inner_var, outer_var, batch):
        """Of one block, or of all."""
        if batch.shape == (1,):
            return of_block(inner_var, outer_var, batch[0])
        return loss(inner_var, outer_var, start=0, batch_size=rows)

    return of_batch, starts
