"""Expectation-maximisation with tuned strengths, to be unrolled or solved as a fixed point.

A task is a dict: ``support`` of shape (s, d) with ``labels`` (s,), examples whose class is known, and
``query`` (q, d), whose classes are wanted. One step of generalised EM updates the assignments of the queries,
the shares of the classes and their parameters; three numbers say how::

    log u_n = log_softmax_k( (log p(z_n | theta_k) + prior_weight log pi_k) / temperature )      (1)
    pi_k    = mean_n u_nk                                                                         (2)
    theta_k = argmax of the log-likelihood, with weights u on queries and labels on support       (3)

and ``scale`` multiplies the features (Gaussian) or is the power that they are raised to (Dirichlet). With
prior_weight 1 and temperature 1 it is plain EM; a larger prior_weight leaves fewer classes in use (the
papers' lambda is ``prior_weight`` times the number of queries), a larger temperature softer assignments.

Steps are maps of a `bilevel.FixedPoint`: through `bilevel.unrolled` with ``per_step``, each step has numbers
of its own, which is UNEM; `bilevel.implicit` differentiates the converged map. `bilevel.lift` makes one
problem of many tasks.

References:
  Zhou, Shakeri, Sadraoui, Kaaniche, Pesquet and Ben Ayed, "UNEM: unrolled generalized EM for transductive
  learning", 2025, arXiv:2412.16739.
  Martin, Boudiaf, Chouzenoux, Pesquet and Ben Ayed, "Towards practical few-shot query sets: transductive
  minimum description length inference", 2022, arXiv:2210.14545.
"""

from bilevel.em.dirichlet import dirichlet_init, dirichlet_mle, dirichlet_step
from bilevel.em.gaussian import gaussian_init, gaussian_step, soft_kmeans
from bilevel.em.tasks import query_loss, sample_tasks

__all__ = [
    "dirichlet_init",
    "dirichlet_mle",
    "dirichlet_step",
    "gaussian_init",
    "gaussian_step",
    "query_loss",
    "sample_tasks",
    "soft_kmeans",
]
