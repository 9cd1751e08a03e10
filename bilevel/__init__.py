"""Tune hyperparameters by gradient: bilevel optimisation for JAX, optax and flax."""

from bilevel import (
    callbacks,
    em,
    imaging,
    maps,
    mixtures,
    pareto,
    penalties,
    prox,
    scaling,
    schedules,
    soups,
    stopping,
)
from bilevel.argmin import argmin
from bilevel.check import HypergradientCheck, check_hypergradient
from bilevel.checkpoint import checkpoints
from bilevel.constraints import box, fixed, integer, interval, positive, real, simplex
from bilevel.data import episodes, minibatches, stacked, with_rng
from bilevel.estimated_smoothness import estimate_smoothness
from bilevel.estimators.best_response import best_response
from bilevel.estimators.forward import forward
from bilevel.estimators.implicit import implicit
from bilevel.estimators.look_back import look_back
from bilevel.estimators.penalty import penalty
from bilevel.estimators.pes import pes
from bilevel.estimators.unrolled import one_step, unrolled
from bilevel.hybrid import optuna_objective, optuna_study
from bilevel.hypergradient import hypergradient
from bilevel.inner_loops.accelerated import accelerated
from bilevel.inner_loops.epoch_sgd import epoch_sgd
from bilevel.inner_loops.lbfgs import lbfgs
from bilevel.inner_loops.memberwise import memberwise
from bilevel.inner_loops.newton import newton
from bilevel.inner_loops.newton_cg import newton_cg
from bilevel.inner_loops.optax_loop import optax_loop
from bilevel.inner_loops.picard import picard
from bilevel.inner_solvers import tuned
from bilevel.known_smoothness import logistic_smoothness, ridge_smoothness
from bilevel.lift import lift
from bilevel.linear_solvers import cg, dense, gmres, neumann, nystrom, sgd
from bilevel.memory import Memory, memory
from bilevel.methods.alternating import alternating
from bilevel.methods.bo_rep import bo_rep
from bilevel.methods.bome import bome
from bilevel.methods.delta_stn import delta_stn
from bilevel.methods.hoag import hoag
from bilevel.methods.isgd import isgd
from bilevel.methods.maid import maid
from bilevel.methods.presets import amigo, f2sa, ma_soba, slip, soba, stocbio, ttsa
from bilevel.methods.saba import saba
from bilevel.methods.srba import srba
from bilevel.methods.stn import stn
from bilevel.online import get_hparams, online, tune
from bilevel.optimize import optimize
from bilevel.parallel import pmean
from bilevel.path_smoothness import PathSmoothness, path_smoothness
from bilevel.populations import population
from bilevel.problem import (
    Counts,
    Estimate,
    FixedPoint,
    Info,
    Point,
    Problem,
    Smoothness,
    SolveInfo,
    Status,
    composite,
)
from bilevel.proximal import proximal_gradient
from bilevel.reparametrize import reparametrize
from bilevel.result import Best, Members, Result, Trajectory
from bilevel.result_file import load
from bilevel.run import STOP
from bilevel.schedules import Schedule
from bilevel.transforms import momentum_reset, normalized_momentum

__version__ = "0.1.0"

__all__ = [
    "STOP",
    "Best",
    "Counts",
    "Estimate",
    "FixedPoint",
    "HypergradientCheck",
    "Info",
    "Members",
    "Memory",
    "PathSmoothness",
    "Point",
    "Problem",
    "Result",
    "Schedule",
    "Smoothness",
    "SolveInfo",
    "Status",
    "Trajectory",
    "accelerated",
    "alternating",
    "amigo",
    "argmin",
    "best_response",
    "bo_rep",
    "bome",
    "box",
    "callbacks",
    "cg",
    "check_hypergradient",
    "checkpoints",
    "composite",
    "delta_stn",
    "dense",
    "em",
    "episodes",
    "epoch_sgd",
    "estimate_smoothness",
    "f2sa",
    "fixed",
    "forward",
    "get_hparams",
    "gmres",
    "hoag",
    "hypergradient",
    "imaging",
    "implicit",
    "integer",
    "interval",
    "isgd",
    "lbfgs",
    "lift",
    "load",
    "logistic_smoothness",
    "look_back",
    "ma_soba",
    "maid",
    "maps",
    "memberwise",
    "memory",
    "minibatches",
    "mixtures",
    "momentum_reset",
    "neumann",
    "newton",
    "newton_cg",
    "normalized_momentum",
    "nystrom",
    "one_step",
    "online",
    "optax_loop",
    "optimize",
    "optuna_objective",
    "optuna_study",
    "pareto",
    "path_smoothness",
    "penalties",
    "penalty",
    "pes",
    "picard",
    "pmean",
    "population",
    "positive",
    "prox",
    "proximal_gradient",
    "real",
    "reparametrize",
    "ridge_smoothness",
    "saba",
    "scaling",
    "schedules",
    "sgd",
    "simplex",
    "slip",
    "soba",
    "soups",
    "srba",
    "stacked",
    "stn",
    "stocbio",
    "stopping",
    "ttsa",
    "tune",
    "tuned",
    "unrolled",
    "with_rng",
]
