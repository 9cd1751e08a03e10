"""Inner solvers: params moved until the inner gradient is as small as asked, or a cap is hit.

For a mu-strongly convex inner loss the norm of the gradient bounds the distance to the solution::

    |d_params inner(params)| <= atol   implies   |params - params*| <= atol / mu         (1)

so that an accuracy can be asked for beforehand and measured afterwards, whatever the solver. All of them stop
by Eq. (1) with an absolute ``atol``, warm start at the point they are given, and return in `SolveInfo` the
norm measured at the very point they return: a residual above ``atol`` says that a cap was hit, that rounding
allows no more, or (inf) that the loss is not finite there. ``products`` counts gradients, and products with
the Hessian.

======================  =====================  ===============================================================
solver                  batches                for
======================  =====================  ===============================================================
`lbfgs`                 the last               the first to try: smooth losses of any size
`accelerated`           the last               convex losses with known constants; low memory; large batches
`newton`                the last               small problems, to the last digit
`newton_cg`             the last               large problems of any conditioning; the default of `optimize`
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

from bilevel.inner_loops.accelerated import accelerated
from bilevel.inner_loops.epoch_sgd import epoch_sgd
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.inner_loops.newton import newton
from bilevel.inner_loops.newton_cg import newton_cg
from bilevel.inner_loops.optax_loop import optax_loop
from bilevel.inner_loops.picard import picard

__all__ = ["accelerated", "epoch_sgd", "lbfgs", "newton", "newton_cg", "optax_loop", "picard"]
