"""torchopt: implicit differentiation by a decorator, and its differentiable optimisers."""

from __future__ import annotations

import functorch
import torch
import torchopt
from torchopt.diff.implicit import custom_root

from benchmarks.peers import in_torch
from benchmarks.peers.contract import TOLERANCES, solver_peer
from benchmarks.peers.in_torch import INNER, OUTER, Params, learning_rate


def implicit(kind: str, steps: int, tol: float = 0.0):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        h = h.detach().requires_grad_()
        optimality = functorch.grad(lambda w, h: inner(w, h, train))
        solve = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=tol, atol=0.0)

        @custom_root(optimality, argnums=1, solve=solve)
        def solver(w, h):
            del h
            return w

        return torch.autograd.grad(outer(solver(w, h), valid), h)[0]

    return call


def unrolled(kind: str, setting):
    steps, rate = setting

    def call(w, h, train, valid):
        h, module = h.detach().requires_grad_(), Params(kind, w)
        optimizer = torchopt.MetaSGD(module, learning_rate(kind, h, rate))
        for _ in range(steps):
            optimizer.step(module(h, train))
        return torch.autograd.grad(OUTER[kind](module.w, valid), h)[0]

    return call


PEERS = (solver_peer("torchopt", ("torchopt", "torch"), in_torch, implicit, unrolled, TOLERANCES),)
