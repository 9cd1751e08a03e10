"""Outer solvers, one file each; see `bilevel.problem.Method` for their protocol."""
