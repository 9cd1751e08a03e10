"""Early stopping of runs that will not beat the best, by predicting where their curves end.

A run that has been observed for t of T steps has the features

    x = [y_1 ... y_t, their first and second differences, mean, standard deviation, what else is known]  (1)

(hyperparameters, gradient norms), from which a regression on finished runs, one for each t, predicts y_T. Its
error sigma is that on runs that it has not seen: leave-one-out, in closed form for ridge regression, or
cross-validated. With y_T ~ N(prediction, sigma^2) a run is stopped where

    P(y_T < y_best) <= 1 - threshold                                                                     (2)

Lower is better throughout. What sign an early signal has (is a large gradient norm good or bad?) is not
assumed but learned, and `Predictor.signals` tells it.

References:
  Baker, Gupta, Raskar and Naik, "Accelerating neural architecture search using performance prediction", 2017,
  arXiv:1705.10823.
  Pareja et al., "Unveiling the secret recipe: a guide for supervised fine-tuning small LLMs", 2024,
  arXiv:2412.13337 (early loss and gradient norm as signals).
"""

from bilevel.stopping.predictor import Prediction, Predictor, Signal, features, predictor
from bilevel.stopping.rules import Replay, optuna_pruner, replay, stop_members

__all__ = [
    "Prediction",
    "Predictor",
    "Replay",
    "Signal",
    "features",
    "optuna_pruner",
    "predictor",
    "replay",
    "stop_members",
]
