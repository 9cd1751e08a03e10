"""Penalties whose strengths are hyperparameters.

Functions of params, or of what a model makes of them, to be added to an inner loss. Strengths are traced: one
for everything, or one for each subtree, leaf, row or entry, see `l2`; what only one part of params should
have is named, and the rest is left alone.
"""

from bilevel.penalties.distil import distillation
from bilevel.penalties.fisher import ewc, fisher_diagonal
from bilevel.penalties.graph import Neighbours, laplacian, nearest
from bilevel.penalties.noisy_labels import early_learning, held
from bilevel.penalties.norms import elastic_net, forgetting, l1, l2, l2_to
from bilevel.penalties.slopes import gradient_norm, primal_dual

__all__ = [
    "Neighbours",
    "distillation",
    "early_learning",
    "elastic_net",
    "ewc",
    "fisher_diagonal",
    "forgetting",
    "gradient_norm",
    "held",
    "l1",
    "l2",
    "l2_to",
    "laplacian",
    "nearest",
    "primal_dual",
]
