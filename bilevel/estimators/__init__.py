"""Hypergradient estimators, one file each; see `bilevel.problem.Estimator` for their protocol."""
