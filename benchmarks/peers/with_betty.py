"""betty: its conjugate gradients, called as its engine calls them."""

from __future__ import annotations

import types

import torch
from betty.hypergradient.cg import cg

from benchmarks.peers import in_torch
from benchmarks.peers.contract import solver_peer
from benchmarks.peers.in_torch import INNER, OUTER


def implicit(kind: str, steps: int):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        w, h = w.detach().requires_grad_(), h.detach().requires_grad_()
        lower = types.SimpleNamespace(
            paths=[],
            config=types.SimpleNamespace(cg_iterations=steps, cg_alpha=1.0),
            cur_batch=train,
            training_step_exec=lambda batch: inner(w, h, batch),
            trainable_parameters=lambda: [w],
            parameters=lambda: [w],
        )
        upper = types.SimpleNamespace(trainable_parameters=lambda: [h])
        b = torch.autograd.grad(outer(w, valid), [w])
        return cg(b, lower, upper, False)[0]

    return call


PEERS = (
    solver_peer(
        "betty",
        ("betty-ml", "torch"),
        in_torch,
        implicit,
        "its engine differentiates one step, or a linear system",
    ),
)
