"""What grows with scale: how a loss falls, where it flattens, and where to start a search at a new size.

A loss y at a scale x (parameters, tokens, members of an ensemble, labelled rows, steps)::

    y(x) = E + A / x^alpha,   A, alpha > 0                                                           (1)

`fit` finds E, A and alpha with intervals. For each alpha the rest is linear, so that the search is one over
alpha alone, on a grid first and then by golden section: no start can be wrong. All of it is numpy in float64.

Starting points for language models with N non-vocabulary parameters and D tokens are `step_law`::

    learning rate = 1.79 N^-0.713 D^0.307,   tokens of a batch = 0.58 D^0.571                        (2)

and `power_law_start`, of a schedule in the n tokens seen so far, with B sequences in a batch::

    min(0.02, 4.6 B n^-0.51)                                                                         (3)

An independent replication of (2) found another exponent of D: take both as starts of a search, not as its
end.

References:
  Kim et al., "Pre-training under infinite compute", 2025, arXiv:2509.14786 (fits of eq. (1)).
  Li et al., "Predictable scale: Part I, optimal hyperparameter scaling law in large language model
  pretraining", 2025, arXiv:2503.04715.
  Shen et al., "Power scheduler: a batch size and token number agnostic learning rate scheduler", 2024,
  arXiv:2408.13359.
"""

from bilevel.scaling.power_fit import PowerFit, fit
from bilevel.scaling.starts import LogNormal, log_normal, power_law_start, step_law

__all__ = ["LogNormal", "PowerFit", "fit", "log_normal", "power_law_start", "step_law"]
