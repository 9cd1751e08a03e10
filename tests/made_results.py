"""Results with given paths of the hyperparameters, made without a run."""

import jax
import numpy as np

from bilevel.problem import Status
from bilevel.result import Best, Members, Result, Trajectory

STEPS = 40
_QUANTILES = (0, 0.25, 0.5, 0.75, 1)


def history(value, **columns):
    """All columns of a history, shape (steps, [members])."""
    value = np.asarray(value, float)
    full = {
        "step": np.arange(len(value)),
        "value": value,
        "grad_norm": np.abs(value) / 10,
        "error": np.full(value.shape, 1e-3),
        "accepted": np.isfinite(value),
        "nonfinite": np.zeros(value.shape, np.int32),
        "solver_steps": np.full(value.shape, 5, np.int32),
        "solver_residual": np.full(value.shape, 1e-3),
        "negative_curvature": np.zeros(value.shape, bool),
        **{name: np.full(value.shape, 100.0) for name in ("inner_grad", "outer_grad", "hvp", "cross")},
    }
    return {**full, **columns, "seconds": np.linspace(0.1, 2.0, len(value))}


def result(path, members=None, **changed):
    """A result whose hyperparameters are ``path(t)`` at t in [0, 1], of each member ``path(t, member)``."""
    t = np.linspace(0, 1, STEPS + 1)
    if members is None:
        rows = [path(now) for now in t]
    else:
        every = [[path(now, m) for m in range(members)] for now in t]
        rows = [jax.tree.map(lambda *xs: np.stack(xs), *row) for row in every]
    front = int(members is not None)
    last, many = (
        rows[-1],
        tuple(x[0].size > 32 if front else np.size(x) > 32 for x in jax.tree.leaves(rows[-1])),
    )

    def trail(*xs):
        xs = np.stack(xs)
        if np.size(xs[0][0] if front else xs[0]) <= 32:
            return xs
        flat = xs.reshape(*xs.shape[: 1 + front], -1)
        return np.moveaxis(np.quantile(flat, _QUANTILES, axis=-1), 0, -1)

    value = 0.2 + np.exp(-4 * t[:-1])
    if front:
        value = value[:, None] * (1 + np.arange(members))
    own = history(value, **changed.pop("columns", {}))
    chosen = STEPS - 1
    at_best = jax.tree.map(lambda x: x[0], rows[chosen]) if front else rows[chosen]
    given = {
        "params": {"w": np.zeros((members, 4) if front else 4)},
        "hparams": last,
        "best": Best(
            {"w": np.zeros(4)}, at_best, float(value[chosen].min()), chosen, None, 0 if front else None
        ),
        "history": own,
        "trajectory": Trajectory(np.arange(STEPS + 1), jax.tree.map(trail, *rows), many),
        "status": np.full(members, 2, np.int32) if front else Status.BUDGET,
        "message": f"All {STEPS} outer steps are done.",
        "seconds": 2.0,
    }
    if front:
        given["members"] = Members(
            params=given["params"], hparams=rows[chosen], model_state=None, value=value[chosen],
            step=np.full(members, chosen), attempted=np.full(members, STEPS),
            messages=("All done.",) * members, test=None,
        )  # fmt: skip
    return Result(**{**given, **changed})
