"""Coordinates for `bilevel.reparametrize`: maps ``(free, hparams) -> params``.

Each is a small value whose settings are numbers or functions of hparams. It makes its first ``free`` by
``init``, or from given params by ``inverse`` where it is invertible.
"""

from bilevel.maps.companders import Companded, Curve, arctan, compander, mu_law, softsign, tanh
from bilevel.maps.factors import Factors, low_rank, refactorise
from bilevel.maps.masking import gradient_dropout, masks
from bilevel.maps.subspaces import dense_subspace, fastfood

__all__ = [
    "Companded",
    "Curve",
    "Factors",
    "arctan",
    "compander",
    "dense_subspace",
    "fastfood",
    "gradient_dropout",
    "low_rank",
    "masks",
    "mu_law",
    "refactorise",
    "softsign",
    "tanh",
]
