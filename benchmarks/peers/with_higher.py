"""higher: reverse mode through steps of a torch optimiser."""

from __future__ import annotations

import higher
import torch

from benchmarks.peers.contract import Peer
from benchmarks.peers.in_torch import OUTER, Params, learning_rate

NO_SYSTEM = "differentiates trajectories only"


def unrolled(kind: str, setting):
    steps, rate = setting

    def call(w, h, train, valid):
        h, module = h.detach().requires_grad_(), Params(kind, w)
        optimizer = torch.optim.SGD(module.parameters(), rate)
        override = {"lr": [learning_rate(kind, h, rate)]}
        with higher.innerloop_ctx(module, optimizer) as (model, differentiable):
            for _ in range(steps):
                differentiable.step(model(h, train), override=override)
            return torch.autograd.grad(OUTER[kind](next(model.parameters()), valid), h)[0]

    return call


PEERS = (
    Peer(
        name="higher",
        packages=("higher", "torch"),
        family="in_torch",
        tasks={"implicit": NO_SYSTEM, "unrolled": unrolled, "along": NO_SYSTEM, "cold": NO_SYSTEM},
    ),
)
