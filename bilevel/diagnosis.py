"""What a run has to tell a person: why it ended, and what to change."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bilevel.problem import NonFinite, Status

_DAMP = "damp it (a bilevel.proximal_gradient: lower its step_size)"
# Growth of a change of params from which on a derivative of the trajectory is worth nothing: finite
# differences agree below 100, and with none of its digits above 900 (`bilevel.estimators.unrolled`).
_EXPLODED = np.log(300.0)


def why_ended(status: Status, history, method) -> str:
    """Why a method ended a run by itself, and the argument to change."""
    if status != Status.DIVERGED:
        if not hasattr(method, "why_stalled"):
            return "The method can make no more progress."
        return method.why_stalled({name: column[-1] for name, column in history.items()})
    last = NonFinite(int(history["nonfinite"][-1]))
    step = int(history["step"][-1])
    if last & (NonFinite.PARAMS | NonFinite.VALUE) and _growing(history)[-1:].any():
        what = "the map of the fixed point does not contract, and numbers became too large"
        fix = f"{_DAMP}, or keep hparams in a range by constraints"
    elif last & NonFinite.PARAMS:
        what = "params became non-finite: the inner loop diverges"
        fix = "lower the inner learning rate, or keep hparams in a range by constraints"
    elif last & NonFinite.VALUE:
        what = "the outer loss is not finite"
        fix = "look for a nan in the data, or an overflow in the loss"
    elif last & NonFinite.GRAD and _exploded(history)[-1]:
        what = "the derivative of the inner loop overflows"
        fix = _SHORTER
    elif last & NonFinite.GRAD:
        what = "the hypergradient is not finite"
        fix = (
            "look for a derivative that is not (sqrt or norm at zero; Adam with eps_root=0 when unrolled) or "
            "a Neumann step size above 2 / lambda_max"
        )
    else:
        what = "the outer update or an optimiser state became non-finite"
        fix = "lower the outer learning rate, or clip its gradient"
    return f"Outer step {step}: {what}; {fix}. The last good state is kept."


def final(status: Status, history, may_rest: bool, bounded: bool) -> tuple[Status, list[str], list[str]]:
    """The status a run ends with, sentences of advice, and those of them that deserve a warning.

    ``may_rest``: a gradient norm of zero is nothing to worry about, because hyperparameters may rest on the
    end of a box, or all are fixed. ``bounded``: errors are bounds, not relative residuals.
    """
    accepted = history["accepted"]
    expanding = _expanding(history)
    still = not may_rest and accepted.any() and np.all(history["grad_norm"][accepted] == 0)
    warned = [sentence for sentence in (_indefinite(history), expanding, _exploding(history)) if sentence]
    if still and not warned:
        warned.append(
            "The hypergradient was exactly zero throughout: does the validation loss of the trained "
            "parameters depend on hparams at all? Or has a penalty shrunk all of them to zero? Then start "
            "with a smaller one."
        )
    if (still or expanding) and status == Status.BUDGET:
        status = Status.STALLED
    noted = [sentence for sentence in (_residual(history, bounded), _overfitting(history)) if sentence]
    return status, warned + noted, warned


def _indefinite(history) -> str:
    negative = int(history["negative_curvature"].sum())
    if not negative:
        return ""
    return (
        f"The inner Hessian was not positive definite in {negative} of {len(history['step'])} outer steps, "
        "where the hypergradient means little: take more inner steps, cg(damping=...) or a trajectory "
        "estimator (bilevel.unrolled)."
    )


def _expanding(history) -> str:
    """A sentence where the map of a fixed point grows its own steps, mostly and in the later half too."""
    growing = _growing(history)[history["accepted"]]
    if not all(2 * part.sum() > part.size for part in (growing, growing[growing.size // 2 :])):
        return ""
    factor = np.median(history["contraction"][history["accepted"]][growing])
    return (
        f"The map of the fixed point does not contract: in {growing.sum()} of {growing.size} outer steps it "
        f"did not shrink its own step (factor {factor:.3g}, median). Implicit derivatives are those of what "
        f"it converges to: {_DAMP}, keep hparams in a range by constraints, or take a trajectory estimator "
        "(bilevel.unrolled)."
    )


def _growing(history) -> np.ndarray:
    """In which outer steps the map of a fixed point did not shrink its own step, or made it no number.

    A cycle leaves it as long as it was, to rounding and to how far the cycle is reached.
    """
    if "contraction" not in history:
        return np.zeros(len(history["step"]), bool)
    rates = history["contraction"]
    return ~(rates < 1 - max(1e-6, float(jnp.finfo(rates.dtype).eps) ** 0.5 / 4))


# What to do about a trajectory that is chaotic.
_SHORTER = (
    "take smaller inner steps (a bound by constraints, where they are tuned), truncate= or clip= of the "
    "estimator (a bias), bilevel.pes, which needs no derivative, or bilevel.implicit for what acts on the "
    "inner loss"
)


def _exploded(history) -> np.ndarray:
    """Of each outer step, whether a small change of params grew too much on the way to the end."""
    growth = history.get("growth", np.zeros(len(history["step"])))
    return growth >= _EXPLODED


def _exploding(history) -> str:
    """A sentence where derivatives of the trajectory mean nothing, at the end or mostly."""
    # Why the others were rejected is told elsewhere.
    kept = history["accepted"]
    exploded = _exploded(history)[kept]
    times = int(exploded.sum())
    if not times or not (exploded[-1] or 2 * times > len(exploded)):
        return ""
    factor = np.exp(min(np.median(history["growth"][kept][exploded]), 600))
    return (
        f"In {times} of {len(exploded)} outer steps a small change of params had grown by a factor of "
        f"{factor:.1g} (median) at the end of the inner loop: it is chaotic, and its derivative holds for "
        f"tiny steps of the hyperparameters only. What to do: {_SHORTER}."
    )


def _residual(history, bounded: bool) -> str:
    if bounded:
        return ""
    error = history["error"]
    solved = np.isfinite(error) & (history["solver_steps"] > 0) & history["accepted"]
    if not solved.any() or history["negative_curvature"].any() or np.median(error[solved]) <= 0.3:
        return ""
    return (
        f"The linear solve left a relative residual of {np.median(error[solved]):.2g} (median), so that the "
        "hypergradient is a rough one: more solver steps make it sharper."
    )


def _overfitting(history) -> str:
    """A sentence where the test value has risen well above its minimum while outer fell."""
    if "test" not in history:
        return ""
    outer = history["judged" if "judged" in history else "value"]
    seen = np.flatnonzero(np.isfinite(history["test"]) & np.isfinite(outer) & history["accepted"])
    if len(seen) < 3:
        return ""
    test = history["test"][seen]
    lowest = int(np.argmin(test))
    rise, fall = test[-1] - test[lowest], outer[seen[lowest]] - outer[seen[-1]]
    # Noise: how much the test value moves between neighbouring measurements.
    noise = np.median(np.abs(np.diff(test)))
    if fall <= 0 or rise <= max(0.1 * abs(test[lowest]), 3 * noise):
        return ""
    return (
        f"The test value was lowest, {test[lowest]:.4g}, at step {seen[lowest]} and is {test[-1]:.4g} "
        "now, while outer went on falling: the hyperparameters overfit the validation data; take fewer "
        "steps, more validation data or fewer hyperparameters."
    )
