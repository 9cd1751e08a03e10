"""What a run has to tell a person: why it ended, and what to change."""

from __future__ import annotations

import numpy as np

from bilevel.problem import NonFinite, Status


def why_ended(status: Status, history) -> str:
    """Why a method ended a run by itself, and the argument to change."""
    if status != Status.DIVERGED:
        return "the method can make no more progress"
    last = NonFinite(int(history["nonfinite"][-1]))
    step = int(history["step"][-1])
    if last & NonFinite.PARAMS:
        what = "params became non-finite: the inner loop diverges"
        fix = "lower the inner learning rate, or keep hparams in a range by constraints"
    elif last & NonFinite.VALUE:
        what = "the outer loss is not finite"
        fix = "look for a nan in the data, or an overflow in the loss"
    elif last & NonFinite.GRAD:
        what = "the hypergradient is not finite"
        fix = "look for a derivative that is (sqrt or norm at zero; Adam with eps_root=0 when unrolled)"
    else:
        what = "the outer update or an optimiser state became non-finite"
        fix = "lower the outer learning rate, or clip its gradient"
    return f"outer step {step}: {what}; {fix}. The last good state is kept"


def advice(history, status: Status) -> str:
    """What a person should know of the linear solves and gradients of a run; empty where all is well."""
    accepted = history["accepted"]
    attempted = len(accepted)
    if not attempted:
        return ""
    negative = int(history["negative_curvature"].sum())
    error = history["error"]
    solved = np.isfinite(error) & (history["solver_steps"] > 0) & accepted
    parts = []
    if negative:
        parts.append(
            f"the inner Hessian was not positive definite in {negative} of {attempted} outer steps, where "
            "the hypergradient means little: take more inner steps, cg(damping=...) or a trajectory "
            "estimator (bilevel.unrolled)"
        )
    elif solved.sum() and np.median(error[solved]) > 0.3:
        parts.append(
            f"the linear solve left a relative residual of {np.median(error[solved]):.2g} (median): give "
            "the solver more steps"
        )
    if accepted.any() and np.all(history["grad_norm"][accepted] == 0) and status != Status.CONVERGED:
        parts.append(
            "the hypergradient was exactly zero throughout: does the validation loss of the trained "
            "parameters depend on hparams at all?"
        )
    return "; ".join(parts)


def overfitting(history) -> str:
    """A sentence where the test value has risen well above its minimum; empty otherwise."""
    if "test" not in history:
        return ""
    seen = np.flatnonzero(np.isfinite(history["test"]))
    if len(seen) < 3:
        return ""
    test = history["test"][seen]
    lowest = int(np.argmin(test))
    risen = test[-1] - test[lowest]
    if risen <= 0.1 * abs(test[lowest]) or lowest == len(seen) - 1:
        return ""
    return (
        f"the test value was lowest, {test[lowest]:.4g}, at step {seen[lowest]} and is {test[-1]:.4g} "
        "now, while outer went on falling: the hyperparameters overfit the validation data; take fewer "
        "steps, more validation data or fewer hyperparameters"
    )
