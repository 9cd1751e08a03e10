"""Delta-STN: params trained as ever, their response to hyperparameters learned beside them.

`bilevel.alternating` with `bilevel.best_response`: params take ``train_steps`` unperturbed steps, the centred
response is fitted on the same batches at the new params, with predictions that are linear in it where the
inner loss is a `bilevel.composite`, and hyperparameters and scales move by the gradient through it. Against
`bilevel.stn`: params converge to the solution itself, not to a mean over perturbations, and the size of
hyperparameters does not enter the conditioning.

References:
  Bae and Grosse, "Delta-STN: efficient bilevel optimization for neural networks using structured response
  Jacobians", 2020, arXiv:2010.13514.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bilevel import perturbations, validation
from bilevel.estimators.best_response import best_response
from bilevel.methods.alternating import Alternating, alternating
from bilevel.methods.stn import COLUMNS, reported, why_stalled
from bilevel.perturbations import Perturbations


@dataclasses.dataclass(frozen=True)
class DeltaStn:
    """See `delta_stn`."""

    method: Alternating
    columns = COLUMNS
    differentiated = None

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """Training and validation batches that one outer step takes."""
        return self.method.batches_per_step

    @property
    def _noise(self) -> Perturbations:
        estimator: Any = self.method.estimator
        return estimator.noise

    def seen(self, hparams, j):
        """Hyperparameters as they are."""
        return self.method.seen(hparams, j)

    def init(self, problem, params, hparams, train, valid, *, key, model_state=None):
        """The first state: a response of zero."""
        validation.kind("problem", problem, "a problem")
        perturbations.check("delta_stn", problem, self._noise.groups)
        return self.method.init(problem, params, hparams, train, valid, key=key, model_state=model_state)

    def step(self, problem, state, train, valid):
        """Params, response, then hyperparameters and scales; rejected as a whole where not finite."""
        after, info = self.method.step(problem, state, train, valid)
        return after, reported(info, self._noise, after.estimator.scales)

    def why_stalled(self, row: dict) -> str:
        """The reason, and the argument to change."""
        return why_stalled(self._noise, row)


def delta_stn(
    inner,
    outer,
    train_steps: int = 5,
    valid_steps: int = 1,
    warmup: int = 0,
    scale: float = 0.5,
    entropy: float = 1e-3,
    perturbations: int = 1,
    response: Any = True,
    scales=None,
    fit=None,
) -> DeltaStn:
    """Delta-STN on any model: unperturbed params and a centred response, see the module.

    The kinds of hyperparameters are those of `bilevel.stn`. An outer step costs ``train_steps / valid_steps``
    gradients of the inner loss and as many fits of the response, each of about three of them
    (`bilevel.best_response`), and two gradients of the outer loss (one where ``entropy`` is 0).

    Args:
      inner: the optax optimiser of params.
      outer: the optax optimiser of hyperparameters in free units; another like it moves the scales.
      train_steps: steps of params in a round, and fits of the response after them.
      valid_steps: updates of hyperparameters in a round; each is an outer step, and fits the response.
      warmup: leave hyperparameters and scales as they are for so many first outer steps.
      scale: of the perturbations at first, in free units; the same for all.
      entropy: weight of the entropy that keeps scales apart from zero, with which they are tuned; 0: they
        stay as they are, and the outer loss is not perturbed.
      perturbations: of a batch, whose rows are dealt out to them, see `bilevel.stn`.
      response: which parts of params respond, see `bilevel.best_response`.
      fit: the optax optimiser of the response; default one like ``inner``. The response of a network is far
        from unique, and Adam lets what predictions do not see of it walk at random, until the network at
        perturbed weights is another one: give plain gradient steps, of a rate that is stable for params.
      scales: the optax optimiser of the scales, which are one vector; default one like ``outer``, which then
        may not treat hyperparameters by name.

    Raises:
      TypeError, ValueError: something of the wrong kind, a number out of range; from ``init``, a response
        that takes too much memory, an optimiser that does not fit.

    Example:
      >>> import bilevel, jax.numpy as jnp, optax
      >>> problem = bilevel.Problem(
      ...     inner=lambda w, h, data: 0.5 * (w - data) ** 2 + 0.5 * h["l2"] * w**2,
      ...     outer=lambda w, h, data: 0.5 * (w - data) ** 2,
      ...     constraints={"l2": bilevel.positive()},
      ... )
      >>> method = bilevel.delta_stn(optax.adam(0.01), optax.adam(0.01))
      >>> start, data = (jnp.float32(0.0), {"l2": 0.1}), (jnp.float32(2.0), jnp.float32(1.0))
      >>> result = bilevel.optimize(problem, *start, *data, method, steps=3000, progress=False)
      >>> print(f"{result.hparams['l2']:.1f}")  # w* = 2 / (1 + l2) is 1
      1.0

    References:
      Bae and Grosse, 2020, arXiv:2010.13514.
    """
    validation.kind("inner", inner, "an optax optimiser")
    validation.kind("outer", outer, "an optax optimiser")
    train_steps = validation.whole_number("train_steps", train_steps, 1)
    valid_steps = validation.whole_number("valid_steps", valid_steps, 1)
    warmup = validation.whole_number("warmup", warmup, 0)
    fit = inner if fit is None else validation.kind("fit", fit, "an optax optimiser")
    estimator = best_response(
        fit, None, scale, entropy, (scales or outer) if entropy else None, perturbations, response, warmup
    )
    return DeltaStn(alternating(estimator, inner, outer, train_steps, valid_steps, warmup))
