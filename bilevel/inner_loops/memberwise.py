"""The inner problems of `bilevel.lift`, each solved by itself and to its own end."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.lift import axes, member, member_batches, members
from bilevel.problem import Draw, InnerSolver, SolveInfo


@dataclasses.dataclass(frozen=True)
class Memberwise:
    """See `memberwise`."""

    solver: InnerSolver
    at_once: int

    def init(self, problem, point, hparams):
        """The solver's state for each member."""
        if not axes(problem):
            raise TypeError(
                "memberwise() solves the members of bilevel.lift(problem), and this problem has none."
            )
        single = member(problem)
        return jax.vmap(lambda p: self.solver.init(single, p, hparams))(point)

    def solve(self, problem, state, point, hparams, draw: Draw, key, *, atol=None):
        """Each member until its share of the tolerance is met."""
        single, count = member(problem), members(point.params)
        # Then the norm over all members is at most atol.
        share = None if atol is None else atol / math.sqrt(count)
        batch = member_batches(point.params, draw.last)

        def one(arguments):
            state, point, batch, key = arguments
            own = Draw(lambda j: batch, 1, False)
            return self.solver.solve(single, state, point, hparams, own, key, atol=share)

        stacked = state, point, batch, jax.random.split(key, count)
        point, state, info = jax.lax.map(one, stacked, batch_size=self.at_once if self.at_once > 1 else None)
        return point, state, _summary(info)


def _summary(info: SolveInfo) -> SolveInfo:
    """Of all members; ``products`` is their mean, because one product of all touches each member once."""
    return SolveInfo(
        residual=jnp.linalg.norm(info.residual),
        steps=jnp.max(info.steps),
        products=jnp.mean(info.products, dtype=info.residual.dtype),
        negative_curvature=jnp.any(info.negative_curvature),
    )


def memberwise(solver: InnerSolver, at_once: int = 1) -> Memberwise:
    """Solves the inner problems of `bilevel.lift` one by one, each with as many steps as it needs itself.

    The members of a lifted problem have nothing to do with one another but their hyperparameters. Solved
    together, all take the steps of the slowest; this way, easy ones stop early. ``atol`` is that of the norm
    over all members, of which each gets the share ``atol / sqrt(members)``.

    Args:
      solver: of one member's problem, an inner solver.
      at_once: members solved together, those that are done waiting for the others: as many as a device needs
        to be busy. 1 is right on a CPU unless members are tiny; with members spread over devices take all.

    Raises:
      TypeError, ValueError: no inner solver; not a whole number of at least 1.

    Example:
      >>> import bilevel
      >>> bilevel.memberwise(bilevel.accelerated(max_steps=500)).at_once
      1
    """
    solver = validation.kind("solver", solver, "an inner solver")
    return Memberwise(solver, validation.whole_number("at_once", at_once, 1))
