"""The map of a fixed point, repeated."""

from __future__ import annotations

import dataclasses

from bilevel import validation
from bilevel.inner_loops.measured import check_atol, info_of, measured_moves, tolerance
from bilevel.problem import Draw, FixedPoint, Point, updated
from bilevel.vectors import axpy


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

        atol = tolerance(self.atol, atol, point.params)
        loop = measured_moves(defect, move, point.params, (), self.max_steps, atol)
        return Point(loop.params, point.opt_state, point.model_state), state, info_of(loop)


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
    return Picard(validation.whole_number("max_steps", max_steps, 1), check_atol(atol))
