"""hypergrad: its conjugate gradients."""

from __future__ import annotations

from hypergrad.approx_hypergrad import conjugate_gradient

from benchmarks.peers import in_torch
from benchmarks.peers.contract import solver_peer
from benchmarks.peers.in_torch import INNER, OUTER


def implicit(kind: str, steps: int):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        def lower(params, hparams):
            return inner(params[0], hparams[0], train)

        def upper(params, hparams):
            return outer(params[0], valid) + 0 * hparams[0].sum()

        return conjugate_gradient(lower, upper, (w,), (h,), steps, 1.0)[0]

    return call


PEERS = (
    solver_peer("hypergrad", ("hypergrad", "torch"), in_torch, implicit, "has no reverse mode through steps"),
)
